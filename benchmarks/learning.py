"""Learning per token: our recipe against the original's, and three optimizers, on one CPU core.

    python prepare_dataset_fineweb.py --source="my/*.parquet" --output_dir=data/learning
    OMP_NUM_THREADS=1 python -m benchmarks.learning   # every run that `results` does not hold yet
    python -m benchmarks.learning --plot=True         # the table and the picture, from `results`

Every contestant is tuned in the same way (`tune`) on seed 0, then trained with `seeds` seeds: all
on equally many slots (places of a batch, padding included), all judged by the same packed rows of
held-out documents, in nats per token. The corpus is what our recipe reads in one epoch. The
tokenizer is Hastings cut to its first merges: with all of them most of a small model's time would
go to its head. Kill it at any time: the next start begins with the run that was cut off.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import dataclasses
import json
import math
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import train
from benchmarks.learning_plot import best_runs, draw, print_table
from benchmarks.learning_recipes import (
    ADAMW,
    CHANGES,
    MUON,
    OF_SOPHIAG,
    ORIGINAL,
    RECIPES,
    SOPHIAG,
    TWO_RATES,
    HiddenAndOther,
    OriginalRun,
    PaddedStarts,
    load_documents,
    small_tokenizer,
)
from common.errors import UserError
from common.files import atomic_file
from common.settings import config_from_constants, run_script
from model import GPT, GPTConfig
from training.metrics import read_metrics
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
gradient_accumulation_steps = 2  # as the original; 4,096 slots a step
steps = 256
warmup_iters = 26
eval_points = 8  # of each run, the last one at its end
eval_rows = 64  # packed rows of held-out documents
seeds = 3
timing_rounds = 4  # of ten steps of every contestant in turn, the first one not counted

FIRST_RATES = (2e-3, 4e-3, 8e-3)  # everyone's grid; grows by a factor of 2 while its edge is best
FIRST_RHOS = (0.05, 0.2)  # SophiaG's, by factors of 4
MOST_TRIALS = 8
NOT_OF_A_RUN = ("data_dir", "results", "picture", "plot", "seeds", "timing_rounds")


def settings_of(config: Any, name: str, seed: int = 0, **chosen: Any) -> dict[str, Any]:
    """What decides a run's result beside train.py's constants; `results` is searched for it."""
    study = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_OF_A_RUN}
    return study | {"name": name, "seed": seed} | RECIPES.get(name, {}) | chosen


class Contestant:
    """A run, its batches, and train.py's settings with those that the study changes."""

    def __init__(self, data_dir: str, settings: dict[str, Any]):
        constants = config_from_constants(vars(train), [])
        changed = {k: settings[k] for k in settings.keys() & vars(constants).keys()}
        self.config = config = dataclasses.replace(constants, **changed)
        torch.manual_seed(config.seed)
        shape = {f.name: settings.get(f.name, f.default) for f in dataclasses.fields(GPTConfig)}
        model, device = GPT(GPTConfig(**shape)), torch.device("cpu")
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps
        self.slots_per_step = self.rows_per_step * config.block_size
        kind = OriginalRun if settings.get("hessian") == "original" else Trainer
        self.run = kind(model, config, device, torch.float32)
        if config.optimizer == "muon" or "hidden_rate" in settings:
            rate = settings.get("hidden_rate", 1.0)
            self.run.optimizer = HiddenAndOther(model, config, rate)
        self.steps, vocab_size = settings["steps"], settings["vocab_size"]
        n_tokens = 0 if settings.get("all_documents") else self.slots_per_step * self.steps
        corpus = load_documents(data_dir, "train", vocab_size, n_tokens)
        held_out = load_documents(data_dir, "val", vocab_size, 0)
        kind = PaddedStarts if settings.get("batches") == "padded" else PackedRows
        block, pad_id = config.block_size, small_tokenizer(vocab_size).pad_id
        self.rows = kind([corpus], block, pad_id, config.seed)
        self.validation = PackedRows([held_out], block, pad_id)
        self.starts = PaddedStarts([held_out], block, pad_id, seed=None)
        self.token_bytes = torch.from_numpy(small_tokenizer(vocab_size).token_bytes)

    def step(self, step: int) -> int:
        """Optimizer step number `step`; returns how many labels it had."""
        config = self.config
        first, last = step * self.rows_per_step, (step + 1) * self.rows_per_step
        starts = range(first, last, config.batch_size)
        batches = [self.rows.batch(range(start, start + config.batch_size)) for start in starts]
        if config.optimizer == "sophiag" and step % config.hess_interval == 0:
            self.run.update_hessian(batches[-1])
        schedule = (config.learning_rate, config.warmup_iters, self.steps, 0.1)
        self.run.step(batches, train.learning_rate_at(step, *schedule))
        return sum(batch.n_labels for batch in batches)

    def evaluate(self, rows: PackedRows | PaddedStarts) -> float | None:
        """Nats per token; None if it is not finite."""
        loss, _ = self.run.evaluate(rows, self.token_bytes)
        return loss if math.isfinite(loss) else None


def train_once(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains one run; returns its line of `results`."""
    contestant = Contestant(config.data_dir, settings)
    points = {config.steps * k // config.eval_points for k in range(1, config.eval_points + 1)}
    curve, n_labels, seconds = [], 0, 0.0
    for step in range(config.steps):
        started = time.process_time()
        n_labels += contestant.step(step)
        seconds += time.process_time() - started
        if step + 1 in points:
            slots = (step + 1) * contestant.slots_per_step
            curve.append([slots, contestant.evaluate(contestant.validation)])
            print(f"  {slots:>9,} slots  {curve[-1][1]}", flush=True)
    line = {"settings": settings, "curve": curve, "loss": curve[-1][1]}
    line["loss_of_document_starts"] = contestant.evaluate(contestant.starts)
    if hasattr(contestant.run.optimizer, "win_rate"):
        line["win_rate"] = round(contestant.run.optimizer.win_rate.item(), 4)
    corpus = {"documents": contestant.rows.n_documents, "rows": contestant.rows.rows_per_epoch}
    return line | {"labels": n_labels, "cpu_seconds": round(seconds, 1), "corpus": corpus}


class Study:
    """The finished runs of `results`, and what is still to be done."""

    def __init__(self, config: Any):
        self.config, self.path = config, Path(config.results)
        self.lines = read_metrics(self.path)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        line |= {"hardware": processor(), "torch": torch.__version__, "commit": commit()}
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as file:  # few short lines: a kill leaves the old file whole
            file.writelines(json.dumps(line).encode() + b"\n" for line in self.lines)
        return line

    def run(self, name: str, seed: int = 0, **chosen: Any) -> dict[str, Any]:
        """The line of this run, trained now unless it has been already."""
        settings = settings_of(self.config, name, seed, **chosen)
        for line in self.lines:
            if line.get("settings") == settings:
                return line
        print(f"{time.strftime('%H:%M')} {name}, seed {seed}, {chosen}", flush=True)
        return self.add(train_once(self.config, settings))

    def tune(self, name: str, setting: str, grid: tuple[float, ...], **chosen: Any) -> float:
        """The value of `setting` with the lowest loss of seed 0, not at the edge of its grid."""
        grid, factor = list(grid), grid[1] / grid[0]
        while True:
            losses = [self.run(name, **chosen | {setting: value})["loss"] for value in grid]
            best = min(range(len(grid)), key=lambda i: math.inf if losses[i] is None else losses[i])
            if len(grid) == MOST_TRIALS or 0 < best < len(grid) - 1:
                return grid[best]
            if best == 0:
                grid.insert(0, float(f"{grid[0] / factor:.4g}"))
            else:
                grid.append(float(f"{grid[-1] * factor:.4g}"))

    def work(self) -> None:
        """All runs, the most telling ones first."""
        best = {}
        for name in (SOPHIAG, ADAMW, MUON, ORIGINAL):
            chosen = {"rho": FIRST_RHOS[0]} if name == SOPHIAG else {}
            rate = self.tune(name, "learning_rate", FIRST_RATES, **chosen)
            best[name] = {"learning_rate": rate}
        # SophiaG has one more setting, and its rate once more with that
        rate = best[SOPHIAG]["learning_rate"]
        rho = self.tune(SOPHIAG, "rho", FIRST_RHOS, learning_rate=rate)
        rate = self.tune(SOPHIAG, "learning_rate", (rate / 2, rate), rho=rho)
        best[SOPHIAG] = {"learning_rate": rate, "rho": rho}
        for seed in range(self.config.seeds + 1):
            if seed < self.config.seeds:
                for name, chosen in best.items():
                    self.run(name, seed, **chosen)
            if seed == 1:
                self.time_steps(best)
            if seed > 0:  # a seed behind: should time run out, more has been tried once
                self.others(best, seed - 1)

    def others(self, best: dict[str, dict[str, Any]], seed: int) -> None:
        """What is not tuned itself: it takes the best settings of what it differs from."""
        # Muon's rate is also its embedding's; AdamW with that one, and its own where Muon is.
        ratio = best[ADAMW]["learning_rate"] / best[MUON]["learning_rate"]
        two = {"learning_rate": best[MUON]["learning_rate"], "hidden_rate": ratio}
        self.run(TWO_RATES, seed, **two)
        for name, change in CHANGES.items():
            for base in (SOPHIAG,) if name in OF_SOPHIAG else (SOPHIAG, ADAMW):
                chosen = RECIPES[base] | best[base] | change
                self.run(f"{base}, {name}", seed, **chosen)
        original = RECIPES[ORIGINAL] | best[ORIGINAL]
        self.run(f"{ORIGINAL}, all documents", seed, **original | {"all_documents": True})
        stock = original | {"learning_rate": 1e-4}  # which was for 16,384 slots a step
        self.run(f"{ORIGINAL}, rate 1e-4", seed, **stock)

    def time_steps(self, best: dict[str, dict[str, Any]]) -> None:
        """CPU seconds of ten steps of each contestant in turn, A B C A B C."""
        if any("seconds_of_ten_steps" in line for line in self.lines):
            return
        times: dict[str, list[float]] = {name: [] for name in best}
        contestants = {
            name: Contestant(self.config.data_dir, settings_of(self.config, name, **chosen))
            for name, chosen in best.items()
        }
        for turn in range(self.config.timing_rounds):
            for name, contestant in contestants.items():
                started = time.process_time()
                for step in range(10 * turn, 10 * turn + 10):
                    contestant.step(step)
                times[name].append(round(time.process_time() - started, 3))
        self.add({"seconds_of_ten_steps": {name: taken[1:] for name, taken in times.items()}})


def processor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s), shared machine"


def commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return result.stdout.strip()


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    study = Study(config)
    if not config.plot:
        study.work()
    elif not best_runs(study.lines):
        raise UserError(f"{config.results} holds no finished run: leave --plot out to train some")
    print_table(study.lines)
    draw(study.lines, Path(config.picture))
    return 0


if __name__ == "__main__":
    run_script(main)
