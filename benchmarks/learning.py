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
from benchmarks.learning_plot import best_runs, draw, study_table
from benchmarks.learning_recipes import (
    ADAMW,
    CHANGES,
    MUON,
    OF_SOPHIAG,
    ORIGINAL,
    RECIPES,
    SOPHIAG,
    TWO_RATES,
    OriginalTrainer,
    PaddedStarts,
    TwoOptimizers,
    load_documents,
    small_tokenizer,
)
from benchmarks.report import append_record, git, processor, read_records, text_table
from common.errors import UserError
from common.settings import config_from_constants, run_script
from model import GPT, GPTConfig
from training.packing import PackedRows
from training.trainer import Trainer

data_dir = "data/learning"  # shards with a train and a val split
results = "benchmarks/learning.jsonl"  # a line for each finished run
picture = "benchmarks/learning.png"
plot = False  # True: train nothing

n_layers = 4
n_embd = 64
n_heads = 2
n_kv_heads = 1
block_size = 512
vocab_size = 4096  # of the tokenizer cut short; at most Hastings' own 32,768
batch_size = 4  # rows of a micro-batch
gradient_accumulation_steps = 2  # as the original; 4,096 positions a step
steps = 256
warmup_iters = 26
eval_points = 8  # of each run, the last one at its end
eval_rows = 64  # packed rows of held-out documents
seeds = 3
timing_rounds = 4  # of ten steps of every recipe in turn, the first one not counted

FIRST_RATES = (2e-3, 4e-3, 8e-3)  # everyone's grid; grows by a factor of 2 while its edge is best
FIRST_RHOS = (0.05, 0.2)  # SophiaG's, by factors of 4
MAX_TRIALS = 8
NOT_OF_A_RUN = ("data_dir", "results", "picture", "plot", "seeds", "timing_rounds")


def run_settings(config: Any, name: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The settings that identify a run in `results`, beside train.py's constants."""
    study = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_OF_A_RUN}
    return study | {"name": name, "seed": seed} | RECIPES.get(name, {}) | changes


class RecipeRun:
    """A recipe in training: trainer, batches, and train.py's settings with those of the study."""

    def __init__(self, data_dir: str, settings: dict[str, Any]):
        constants = config_from_constants(vars(train), [])
        changes = {k: settings[k] for k in settings.keys() & vars(constants).keys()}
        self.config = config = dataclasses.replace(constants, **changes)
        torch.manual_seed(config.seed)
        shape = {f.name: settings.get(f.name, f.default) for f in dataclasses.fields(GPTConfig)}
        model = GPT(GPTConfig(**shape))
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps
        self.tokens_per_step = self.rows_per_step * config.block_size
        kind = OriginalTrainer if settings.get("hessian") == "original" else Trainer
        self.trainer = kind(model, config, torch.device("cpu"), torch.float32)
        if config.optimizer == "muon" or "hidden_rate" in settings:
            rate = settings.get("hidden_rate", 1.0)
            self.trainer.optimizer = TwoOptimizers(model, config, rate)
        self.steps, vocab_size = settings["steps"], settings["vocab_size"]
        n_tokens = self.tokens_per_step * self.steps
        corpus = load_documents(data_dir, "train", vocab_size, n_tokens)
        held_out = load_documents(data_dir, "val", vocab_size, 0)
        tokenizer, block = small_tokenizer(vocab_size), config.block_size
        kind = PaddedStarts if settings.get("batches") == "padded" else PackedRows
        self.rows = kind([corpus], block, tokenizer.pad_id, config.seed)
        self.validation = PackedRows([held_out], block, tokenizer.pad_id)
        self.starts = PaddedStarts([held_out], block, tokenizer.pad_id, seed=None)
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes)

    def step(self, step: int) -> int:
        """Optimizer step number `step`; returns its number of labels."""
        config = self.config
        first, end = step * self.rows_per_step, (step + 1) * self.rows_per_step
        starts = range(first, end, config.batch_size)
        batches = [self.rows.batch(range(start, start + config.batch_size)) for start in starts]
        if config.optimizer == "sophiag" and step % config.hess_interval == 0:
            self.trainer.update_hessian(batches[-1])
        schedule = (config.learning_rate, config.warmup_iters, self.steps, 0.1)
        self.trainer.step(batches, train.learning_rate_at(step, *schedule))
        return sum(batch.n_labels for batch in batches)

    def evaluate(self, rows: PackedRows | PaddedStarts) -> float | None:
        """Nats per token; None if it is not finite."""
        loss, _ = self.trainer.evaluate(rows, self.token_bytes)
        return loss if math.isfinite(loss) else None


def train_once(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains one run; returns its line of `results`."""
    run = RecipeRun(config.data_dir, settings)
    points = {config.steps * k // config.eval_points for k in range(1, config.eval_points + 1)}
    curve, n_labels, seconds = [], 0, 0.0
    for step in range(config.steps):
        started = time.process_time()
        n_labels += run.step(step)
        seconds += time.process_time() - started
        if step + 1 in points:
            curve.append([(step + 1) * run.tokens_per_step, run.evaluate(run.validation)])
            print(f"  {curve[-1][0]:>9,} tokens  {curve[-1][1]}", flush=True)
    line = {"settings": settings, "curve": curve, "loss": curve[-1][1]}
    line["loss_of_document_starts"] = run.evaluate(run.starts)
    if hasattr(run.trainer.optimizer, "win_rate"):
        line["win_rate"] = round(run.trainer.optimizer.win_rate.item(), 4)
    corpus = {"documents": run.rows.n_documents, "rows": run.rows.rows_per_epoch}
    return line | {"labels": n_labels, "cpu_seconds": round(seconds, 1), "corpus": corpus}


class Study:
    """The finished runs of `results`, and the ones still to be done."""

    def __init__(self, config: Any):
        self.config, self.path = config, Path(config.results)
        self.lines = read_records(self.path)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        line |= {"hardware": f"{processor()}, {torch.get_num_threads()} thread(s)"}
        line |= {"torch": torch.__version__, "commit": git("describe", "--always", "--dirty")}
        self.lines.append(line)
        append_record(self.path, line)
        return line

    def run(self, name: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
        """The line of this run, trained now unless it has been already."""
        settings = run_settings(self.config, name, seed, **changes)
        for line in self.lines:
            if line.get("settings") == settings:
                return line
        print(f"{time.strftime('%H:%M')} {name}, seed {seed}, {changes}", flush=True)
        return self.add(train_once(self.config, settings))

    def tune(self, name: str, setting: str, grid: tuple[float, ...], **changes: Any) -> float:
        """The value of `setting` with the lowest loss of seed 0, not at the edge of its grid."""
        values, factor = list(grid), grid[1] / grid[0]
        while True:
            losses = [self.run(name, **changes | {setting: value})["loss"] for value in values]
            best = min(
                range(len(values)), key=lambda i: math.inf if losses[i] is None else losses[i]
            )
            if len(values) == MAX_TRIALS or 0 < best < len(values) - 1:
                return values[best]
            if best == 0:
                values.insert(0, float(f"{values[0] / factor:.4g}"))
            else:
                values.append(float(f"{values[-1] * factor:.4g}"))

    def work(self) -> None:
        """All runs, the most informative ones first."""
        best = {}
        for name in (SOPHIAG, ADAMW, MUON, ORIGINAL):
            changes = {"rho": FIRST_RHOS[0]} if name == SOPHIAG else {}
            rate = self.tune(name, "learning_rate", FIRST_RATES, **changes)
            best[name] = {"learning_rate": rate}
        # SophiaG has one more setting, and its rate once more with that
        rate = best[SOPHIAG]["learning_rate"]
        rho = self.tune(SOPHIAG, "rho", FIRST_RHOS, learning_rate=rate)
        rate = self.tune(SOPHIAG, "learning_rate", (rate / 2, rate), rho=rho)
        best[SOPHIAG] = {"learning_rate": rate, "rho": rho}
        for seed in range(self.config.seeds + 1):
            if seed < self.config.seeds:
                for name, changes in best.items():
                    self.run(name, seed, **changes)
            if seed == 1:
                self.time_steps(best)
            if seed > 0:  # a seed behind: should time run out, more has been tried once
                self.run_untuned(best, seed - 1)

    def run_untuned(self, best: dict[str, dict[str, Any]], seed: int) -> None:
        """Variants that take the best settings of the recipe they differ from."""
        # Muon's rate is also its embedding's; AdamW with that one, and its own where Muon is.
        ratio = best[ADAMW]["learning_rate"] / best[MUON]["learning_rate"]
        self.run(TWO_RATES, seed, learning_rate=best[MUON]["learning_rate"], hidden_rate=ratio)
        for name, change in CHANGES.items():
            for base in (SOPHIAG,) if name in OF_SOPHIAG else (SOPHIAG, ADAMW):
                self.run(f"{base}, {name}", seed, **RECIPES[base] | best[base] | change)

    def time_steps(self, best: dict[str, dict[str, Any]]) -> None:
        """CPU seconds of ten steps of each recipe in turn, A B C A B C."""
        if any("seconds_of_ten_steps" in line for line in self.lines):
            return
        times: dict[str, list[float]] = {name: [] for name in best}
        runs = {
            name: RecipeRun(self.config.data_dir, run_settings(self.config, name, **changes))
            for name, changes in best.items()
        }
        for turn in range(self.config.timing_rounds):
            for name, run in runs.items():
                started = time.process_time()
                for step in range(10 * turn, 10 * turn + 10):
                    run.step(step)
                times[name].append(round(time.process_time() - started, 3))
        self.add({"seconds_of_ten_steps": {name: values[1:] for name, values in times.items()}})


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    study = Study(config)
    if not config.plot:
        study.work()
    elif not best_runs(study.lines):
        raise UserError(f"{config.results} holds no finished run: leave --plot out to train some")
    print(text_table(study_table(study.lines)))
    draw(study.lines, Path(config.picture))
    return 0


if __name__ == "__main__":
    run_script(main)
