"""Learning study: our recipe, the original's, and three optimizers, by loss per token on one core.

    python prepare_dataset_fineweb.py --source="my/*.parquet" --output_dir=data/learning
    OMP_NUM_THREADS=1 python -m benchmarks.learning   # every run that `results` does not hold yet
    python -m benchmarks.learning --plot              # the table and the picture, from `results`

Every recipe is tuned in the same way (`tune`) on seed 0, then trained with `seeds` seeds: all on
equally many token positions (padding included), all judged by the same packed rows of held-out
documents, in nats per token. The corpus is what our recipe reads in one epoch. The tokenizer is
Hastings cut to its first merges: with all of them most of a small model's time would go to its
head. Kill it at any time: the next start begins with the run that was cut off.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch

import train
from benchmarks import learning_recipes as recipes
from benchmarks.inputs import train_config
from benchmarks.learning_plot import draw, study_table
from benchmarks.report import append_record, git, markdown_table, processor, read_records
from common.errors import UserError
from common.settings import config_from_constants, run_script
from model import GPT, GPTConfig
from training.packing import PackedRows
from training.trainer import Trainer

data_dir = "data/learning"  # shards with a train and a val split
results = "benchmarks/learning.jsonl"  # a line for each finished run
picture = "benchmarks/learning.png"  # the learning curves
plot = False  # True: train nothing

n_layers = 4  # transformer blocks
n_embd = 64  # width
n_heads = 2  # query heads
n_kv_heads = 1  # key and value heads
block_size = 512  # context length, tokens
vocab_size = 4096  # size of the tokenizer cut short; at most Hastings' own 32,768
batch_size = 4  # rows of a micro-batch
gradient_accumulation_steps = 2  # as the original; 4,096 positions a step
steps = 256  # steps of every run
warmup_iters = 26  # steps of linear warm-up
eval_points = 8  # evaluations of each run, the last one at its end
eval_rows = 64  # packed rows of held-out documents
seeds = 3  # runs of each tuned recipe

FIRST_RATES = (2e-3, 4e-3, 8e-3)  # everyone's grid; grows by a factor of 2 while its edge is best
FIRST_RHOS = (0.05, 0.2)  # SophiaG's, by factors of 4
MAX_TRIALS = 8
NOT_OF_A_RUN = ("data_dir", "results", "picture", "plot", "seeds")


def make_trainer(settings: dict[str, Any]) -> Trainer:
    """The trainer of a recipe: train.py's settings with those of the study."""
    names = settings.keys() & vars(train_config()).keys()
    config = train_config(**{name: settings[name] for name in names})
    if config.optimizer == "muon" or "hidden_rate" in settings:  # the rate is the embedding's
        rate = config.learning_rate
        rates = {"learning_rate": rate * settings.get("hidden_rate", 1.0)}
        config = dataclasses.replace(config, embedding_learning_rate=rate, **rates)
    torch.manual_seed(config.seed)
    fields = [field.name for field in dataclasses.fields(GPTConfig)]
    model = GPT(GPTConfig(**{name: settings[name] for name in fields if name in settings}))
    kind = recipes.OriginalTrainer if settings.get("hessian") == "original" else Trainer
    return kind(model, config, torch.device("cpu"), torch.float32)


def train_once(data_dir: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains one run; returns its line of `results`."""
    trainer = make_trainer(settings)
    config, steps, vocab_size = trainer.config, settings["steps"], settings["vocab_size"]
    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    tokens_per_step = rows_per_step * config.block_size
    corpus = recipes.load_documents(data_dir, "train", vocab_size, tokens_per_step * steps)
    held_out = recipes.load_documents(data_dir, "val", vocab_size, None)
    tokenizer, block = recipes.small_tokenizer(vocab_size), config.block_size
    kind = recipes.PaddedStarts if settings.get("batches") == "padded" else PackedRows
    rows = kind([corpus], block, tokenizer.pad_id, config.seed)
    validation = PackedRows([held_out], block, tokenizer.pad_id)
    starts = recipes.PaddedStarts([held_out], block, tokenizer.pad_id, seed=None)

    def evaluate(rows: PackedRows | recipes.PaddedStarts) -> float | None:
        loss, _ = trainer.evaluate(rows, torch.from_numpy(tokenizer.token_bytes))
        return loss if math.isfinite(loss) else None

    points = {steps * k // settings["eval_points"] for k in range(1, settings["eval_points"] + 1)}
    curve, n_labels, seconds = [], 0, 0.0
    for step in range(steps):
        started = time.process_time()
        first_rows = range(step * rows_per_step, (step + 1) * rows_per_step, config.batch_size)
        batches = [rows.batch(range(row, row + config.batch_size)) for row in first_rows]
        if config.optimizer == "sophiag" and step % config.hess_interval == 0:
            trainer.update_hessian(batches[-1])
        schedule = (config.learning_rate, config.warmup_iters, steps, 0.1)
        trainer.step(batches, train.learning_rate_at(step, *schedule))
        n_labels += sum(batch.n_labels for batch in batches)
        seconds += time.process_time() - started
        if step + 1 in points:
            curve.append([(step + 1) * tokens_per_step, evaluate(validation)])
            print(f"  {curve[-1][0]:>9,} tokens  {curve[-1][1]}", flush=True)
    line = {"settings": settings, "curve": curve, "loss": curve[-1][1]}
    line |= {"loss_of_document_starts": evaluate(starts), "labels": n_labels}
    if config.optimizer == "sophiag":
        line["win_rate"] = round(trainer.optimizer.win_rate.item(), 4)
    return line | {"cpu_seconds": round(seconds, 1)}


class Study:
    """The finished runs of `results`, and the ones still to be done."""

    def __init__(self, config: Any):
        self.config, self.path = config, Path(config.results)
        self.lines = read_records(self.path)

    def run(self, name: str, seed: int = 0, **changes: Any) -> float | None:
        """The loss of this run, trained now unless it has been already; None if not finite."""
        study = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in NOT_OF_A_RUN}
        settings = study | {"name": name, "seed": seed} | recipes.RECIPES.get(name, {}) | changes
        for line in self.lines:
            if line["settings"] == settings:
                return line["loss"]
        print(f"{time.strftime('%H:%M')} {name}, seed {seed}, {changes}", flush=True)
        line = train_once(self.config.data_dir, settings)
        line |= {"hardware": f"{processor()}, {torch.get_num_threads()} thread(s)"}
        line |= {"torch": torch.__version__, "commit": git("describe", "--always", "--dirty")}
        self.lines.append(line)
        append_record(self.path, line)
        return line["loss"]

    def tune(self, name: str, setting: str, grid: tuple[float, ...], **changes: Any) -> float:
        """The value of `setting` with the lowest loss of seed 0, not at the edge of its grid."""
        values, factor = list(grid), grid[1] / grid[0]
        while True:
            losses = [self.run(name, **changes | {setting: value}) for value in values]
            losses = [math.inf if loss is None else loss for loss in losses]
            best = losses.index(min(losses))
            if len(values) == MAX_TRIALS or 0 < best < len(values) - 1:
                return values[best]
            if best == 0:
                values.insert(0, float(f"{values[0] / factor:.4g}"))
            else:
                values.append(float(f"{values[-1] * factor:.4g}"))

    def work(self) -> None:
        """All runs: the tuning of each recipe, then its seeds and those of untuned variants."""
        best: dict[str, dict[str, Any]] = {}
        for name in (recipes.SOPHIAG, recipes.ADAMW, recipes.MUON, recipes.ORIGINAL):
            changes = {"rho": FIRST_RHOS[0]} if name == recipes.SOPHIAG else {}
            best[name] = {"learning_rate": self.tune(name, "learning_rate", FIRST_RATES, **changes)}
        # SophiaG has one more setting, and its rate once more with that
        rate = best[recipes.SOPHIAG]["learning_rate"]
        rho = self.tune(recipes.SOPHIAG, "rho", FIRST_RHOS, learning_rate=rate)
        rate = self.tune(recipes.SOPHIAG, "learning_rate", (rate / 2, rate), rho=rho)
        best[recipes.SOPHIAG] = {"learning_rate": rate, "rho": rho}
        # Muon's rate is also its embedding's; AdamW with that one, and its own where Muon is.
        ratio = best[recipes.ADAMW]["learning_rate"] / best[recipes.MUON]["learning_rate"]
        untuned = {recipes.TWO_RATES: best[recipes.MUON] | {"hidden_rate": ratio}}
        untuned[recipes.SOPHIAG_TWO_RATES] = {}
        for base, changes in recipes.CHANGES.items():
            for change_name, change in changes.items():
                untuned[f"{base}, {change_name}"] = recipes.RECIPES[base] | best[base] | change
        for seed in range(self.config.seeds):
            for name, changes in (best | untuned).items():
                self.run(name, seed, **changes)


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    study = Study(config)
    if not config.plot:
        study.work()
    elif not study.lines:
        raise UserError(f"{config.results} holds no finished run: leave --plot out to train some")
    print(markdown_table(study_table(study.lines)))
    draw(study.lines, Path(config.picture))
    return 0


if __name__ == "__main__":
    run_script(main)
