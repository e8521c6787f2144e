"""Compares our scores of real items with those of lm-evaluation-harness's HFLM in float32.

    pip install -r requirements/bench.txt
    python tests/lm_eval_parity.py --model=my_export --data_dir=data/evaluation --n_shots=5
    python tests/lm_eval_parity.py --model=SmolLM2-135M-Instruct.Q4_1.gguf

Prints a line for each task: the largest difference of a log-likelihood, greedy flags that differ,
and the accuracies of both. Where a difference exceeds 1e-4 + 1e-6 of the value, both are compared
with the value in float64, since HFLM's log-softmax alone rounds by more on a trained model. Ends
with 1 if ours exceeds it there too, a greedy flag differs, or a choice whose margin exceeds MARGIN.
HFLM computes every sequence alone: minutes a task for 500 items without examples, with five about
an hour.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.settings import config_from_constants, run_script
from evaluation.models import open_model
from evaluation.scoring import Scorer
from evaluation.tasks import Item, check_form, find_tasks, read_task, requests

model = ""  # an exported folder, or a .gguf
data_dir = "data/evaluation"  # files of items
tasks = "arc_easy,hellaswag,piqa"  # names of files in data_dir
limit = 500  # items of a task; 0: all
n_shots = 0  # examples before each context
batch_size = 16  # of HFLM

MARGIN = 1e-3  # nats between the best two choices, below which rounding may decide


def open_hflm(name: str, batch_size: int) -> Any:
    """HFLM with the model of a folder or .gguf."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements/bench.txt") from None

    path, source = Path(name), {}
    if path.suffix == ".gguf":
        path, source = path.parent, {"gguf_file": path.name}
    return HFLM(
        pretrained=str(path), batch_size=batch_size, device="cpu", dtype="float32", **source
    )


def differences(
    scorer: Scorer, hflm: Any, texts: list[tuple[str, str]]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Log-likelihoods of `texts` by ours and HFLM, and how many greedy flags differ.

    Empty contexts are HFLM's prefix token here, as lm-eval has them.
    """
    from lm_eval.api.instance import Instance

    from tests.lm_eval_adapter import LilleLM

    instances = [Instance("loglikelihood", {}, text, 0) for text in texts]
    ours = LilleLM(scorer, prefix_id=hflm.prefix_token_id).loglikelihood(instances)
    theirs = hflm.loglikelihood(instances, disable_tqdm=True)
    a, b = (np.array([logprob for logprob, _ in scores]) for scores in (ours, theirs))
    greedy = sum(x[1] != y[1] for x, y in zip(ours, theirs, strict=True))
    return a, b, greedy


def is_far(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two log-likelihoods differ by more than rounding; NaN does."""
    return ~(np.abs(a - b) <= 1e-4 + 1e-6 * np.abs(b))


def compare_in_float64(
    model: str, texts: list[tuple[str, str]], ours: np.ndarray, theirs: np.ndarray
) -> tuple[int, str]:
    """How many of ours are far from the values in float64, and a line about both."""
    scorer = Scorer(open_model(model, "cpu", torch.float64))
    exact = np.array([score.logprob for score in scorer.loglikelihoods(texts)])
    errors = [np.abs(values - exact).max() for values in (ours, theirs)]
    line = f"{len(texts)} far apart, from float64 by {errors[0]:.1e} and {errors[1]:.1e}"
    return int(is_far(ours, exact).sum()), line


def predictions(items: list[Item], logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chosen indices (N, 2), as acc and acc_norm (by characters) of lm-eval have them, and margins.

    A margin is the best score's distance to the second, in nats of the item's longest choice.
    """
    chosen, margins, first = [], [], 0
    for item in items:
        sums = logprobs[first : first + len(item["choices"])]
        first += len(sums)
        lengths = np.array([len(choice.removeprefix(" ")) for choice in item["choices"]])
        scores = sums, sums / lengths * lengths.max()
        chosen.append([int(values.argmax()) for values in scores])
        margins.append([float(np.diff(np.sort(values))[-1]) for values in scores])
    return np.array(chosen), np.array(margins)


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    if not config.model:
        raise UserError("--model is missing: give an exported folder or a .gguf")
    scorer, hflm = Scorer(config.model), open_hflm(config.model, config.batch_size)
    wrong = 0
    for path in find_tasks(Path(config.data_dir), config.tasks):
        task = read_task(path)
        if task.kind != "choice":
            raise UserError(f"{task.name} is not multiple choice: leave it out of --tasks")
        check_form(task, config.n_shots, "cloze", "plain")
        items = task.sample(config.limit, seed=0)
        texts = [text for item in items for text in requests(task, item, config.n_shots, "cloze")]
        ours, theirs, greedy = differences(scorer, hflm, texts)
        apart = np.flatnonzero(is_far(ours, theirs))
        wrong_ones, line = 0, "none far apart"
        if len(apart):
            values = [texts[i] for i in apart], ours[apart], theirs[apart]
            wrong_ones, line = compare_in_float64(config.model, *values)
            line += f", {wrong_ones} of ours too far"
        (chosen, margins), (their_choice, _) = (
            predictions(items, logprobs) for logprobs in (ours, theirs)
        )
        right = np.array([item["answer"] for item in items])[:, None]
        (acc, norm), (their_acc, their_norm) = (
            (choice == right).mean(axis=0) for choice in (chosen, their_choice)
        )
        differ = int(((chosen != their_choice) & (margins > MARGIN)).sum())
        print(
            f"{task.name}, {config.n_shots} examples: {len(items)} items, {len(texts)} sequences; "
            f"largest difference {np.abs(ours - theirs).max():.1e}, {line}; {greedy} greedy flags "
            f"differ; acc {acc:.4f} and {their_acc:.4f}, acc_norm {norm:.4f} and {their_norm:.4f}; "
            f"{differ} choices differ by more than {MARGIN}",
            flush=True,
        )
        wrong += wrong_ones + greedy + differ
    return 1 if wrong else 0


if __name__ == "__main__":
    run_script(main)
