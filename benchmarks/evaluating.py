"""Speed of evaluation: evaluate.py's scorer and lm-evaluation-harness's HFLM, on equal weights.

    python prepare_evaluation.py
    python benchmark.py --section=evaluate

Both compute the log-likelihoods of the same items, tokenizing included. HFLM has the fastest of
BATCH_SIZES, each tried once; it computes every sequence alone.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.inputs import model_config
from benchmarks.timing import compare, peer
from evaluation.scoring import Scorer
from evaluation.tasks import check_form, find_tasks, read_task, requests
from formats.write_hf import float32_copy, write_folder
from model import GPT
from tokenizer import load_tokenizer

DATA = Path("data/evaluation")
TASKS = (("hellaswag", 0), ("arc_easy", 0), ("arc_easy", 5))  # name, examples
N_ITEMS = {"cpu": 24, "cuda": 1000}
BATCH_SIZES = {"cpu": (1, 16, 64), "cuda": (16, 64, 256)}


def hflm_scores(hflm: Any, texts: list[tuple[str, str]], batch_size: int) -> np.ndarray:
    """Log-likelihoods by HFLM."""
    from lm_eval.api.instance import Instance

    hflm.batch_size_per_gpu = batch_size
    instances = [Instance("loglikelihood", {}, text, 0) for text in texts]
    return np.array([x for x, _ in hflm.loglikelihood(instances, disable_tqdm=True)])


def our_scores(scorer: Scorer, texts: list[tuple[str, str]]) -> np.ndarray:
    return np.array([score.logprob for score in scorer.loglikelihoods(texts)])


def fastest(scores: Callable[..., Any], batch_sizes: tuple[int, ...]) -> int:
    """The batch size with which a call takes the shortest time."""

    def seconds(batch_size: int) -> float:
        started = time.perf_counter()
        scores(batch_size=batch_size)
        return time.perf_counter() - started

    return min(batch_sizes, key=seconds)


def run(config: Any, device: torch.device) -> Iterator[dict[str, Any]]:
    """A table for each of TASKS."""
    if not all((DATA / f"{name}.jsonl").is_file() for name, _ in TASKS):
        print(f"skipped: {DATA} lacks tasks: python prepare_evaluation.py")
        return
    if peer("lm_eval.models.huggingface") is None:
        return
    from lm_eval.models.huggingface import HFLM

    dtype = getattr(torch, config.dtype)
    gpt = GPT(model_config(config)).to(device, dtype).eval()
    scorer = Scorer(gpt)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(float32_copy(gpt), load_tokenizer(), Path(folder), "float32", facts={})
        hflm = HFLM(pretrained=folder, device=device.type, dtype=config.dtype)
    for name, n_shots in TASKS:
        task = read_task(*find_tasks(DATA, name))
        check_form(task, n_shots, "cloze", "plain")
        items = task.sample(N_ITEMS[device.type], seed=0)
        texts = [text for item in items for text in requests(task, item, n_shots, "cloze")]
        ours, theirs = partial(our_scores, scorer, texts), partial(hflm_scores, hflm, texts)
        batch_size = fastest(theirs, BATCH_SIZES[device.type])
        theirs = partial(theirs, batch_size=batch_size)
        error = np.abs(ours() - theirs()).max()
        if not error <= (1e-3 if dtype == torch.float32 else 5):
            raise RuntimeError(f"{name}: log-likelihoods differ by {error:.2g}")
        functions = {f"lm-eval HFLM, batches of {batch_size}": theirs, "ours": ours}
        yield compare(
            f"{name}, {n_shots} examples, {len(items)} items, {gpt.n_parameters():,} parameters, "
            f"{config.dtype}",
            functions,
            config.rounds,
            device,
            unit="items/s",
            amounts=dict.fromkeys(functions, len(items)),
        )
