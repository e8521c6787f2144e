"""Learning study: our recipe, other optimizers and the original's, by loss per token on one core.

    python prepare_dataset_fineweb.py --source="my/*.parquet" --output_dir=data/learning
    OMP_NUM_THREADS=1 python -m benchmarks.learning                 # every recipe
    OMP_NUM_THREADS=1 python -m benchmarks.learning --study=sizes   # the best rates by size
    OMP_NUM_THREADS=1 python -m benchmarks.learning --study=untuned --data_dir=data/other \
        --results=other.jsonl     # on other text: at the rule's rates, or those TUNED begins with
    python -m benchmarks.learning --plot             # tables and picture of the runs in `results`

Every recipe is tuned in the same way (`tune`) on seed 0: its rate first, then its second setting,
each by factors of 2 (rho: 4) until the edge of the grid is no better than its neighbour by
TOLERANCE. Then it is trained with `seeds` seeds: all on equally many token positions (padding
included), all judged by the same packed rows of held-out documents. The corpus is what our recipe
reads in one epoch. The tokenizer is Hastings cut to its first merges: with all of them most of a
small model's time would go to its head. Kill it at any time: the next start begins with the run
that was cut off. Recorded runs of older recipes come from earlier grids: a start trains what they
lack.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import learning_recipes as recipes
from benchmarks.inputs import train_config
from benchmarks.learning_plot import SIZE, draw, of_one_size, sizes_table, study_table
from common.errors import UserError
from common.records import append_record, git, markdown_table, processor, read_records
from common.settings import chosen_names, config_from_constants, run_script
from model import GPT, GPTConfig
from training.learning_rates import schedule_of, warmup_steps, with_peak_rates
from training.packing import PackedRows
from training.trainer import Trainer

data_dir = "data/learning"  # shards with a train and a val split
results = "benchmarks/learning.jsonl"  # a line for each finished run
picture = "benchmarks/learning.png"  # the learning curves
plot = False  # True: train nothing
compile = False  # torch.compile: a quarter less time from a width of 256; losses to rounding
study = "recipes"  # all of them, tuned; "sizes": three optimizers' rates at SIZES; "untuned"
only = "all"  # or names of recipes, separated by commas

n_layers = 4  # transformer blocks
n_embd = 64  # width
n_heads = 2  # query heads
n_kv_heads = 1  # key and value heads
block_size = 512  # context length, tokens
vocab_size = 4096  # size of the tokenizer cut short; at most Hastings' own 32,768
batch_size = 4  # rows of a micro-batch
gradient_accumulation_steps = 2  # as the original; 4,096 positions a step
steps = 256  # steps of every run
eval_points = 8  # evaluations of each run, the last one at its end
eval_rows = 64  # packed rows of held-out documents
seeds = 3  # runs of each tuned recipe

SIZES: tuple[dict[str, int], ...] = (
    {},
    {"batch_size": 8, "gradient_accumulation_steps": 4, "steps": 128},  # 16,384 positions a step
    {"n_embd": 128, "n_heads": 4, "n_kv_heads": 2},
    {"n_embd": 256, "n_heads": 8, "n_kv_heads": 4},
)
MAX_TRIALS = 6  # values of a setting
TOLERANCE = 0.01  # nats: an edge that is less than this better than its neighbour will do
ACCUMULATION = "gradient_accumulation_steps"
NOT_OF_A_RUN = ("data_dir", "results", "picture", "plot", "study", "only", "seeds", "compile")


def make_trainer(settings: dict[str, Any]) -> Trainer:
    """The trainer of a recipe: train.py's settings with those of the study."""
    names = settings.keys() & vars(train_config()).keys()
    config = train_config(**{name: settings[name] for name in names})
    torch.manual_seed(config.seed)
    fields = [field.name for field in dataclasses.fields(GPTConfig)]
    model = GPT(GPTConfig(**{name: settings[name] for name in fields if name in settings}))
    config = with_peak_rates(config, model.config.n_embd, model.config.block_size)
    kind = recipes.OriginalTrainer if settings.get("hessian") == "original" else Trainer
    if settings.get("cautious") and config.optimizer != "sophiag":
        kind = recipes.CautiousTrainer
    return kind(model, config, torch.device("cpu"), torch.float32)


def train_once(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains one run; returns its line of `results`."""
    data_dir, compiled = config.data_dir, config.compile
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
    if compiled:
        trainer.try_compile(rows.batch(range(config.batch_size)))
    starts = recipes.PaddedStarts([held_out], block, tokenizer.pad_id, seed=None)

    def evaluate(rows: PackedRows | recipes.PaddedStarts) -> list[float | None]:
        losses = trainer.evaluate(rows, torch.from_numpy(tokenizer.token_bytes))
        return [loss if math.isfinite(loss) else None for loss in losses]

    points = {steps * k // settings["eval_points"] for k in range(1, settings["eval_points"] + 1)}
    curve, n_labels, seconds = [], 0, 0.0
    learning_rate = schedule_of(config, steps)
    for step in range(steps):
        started = time.process_time()
        first_rows = range(step * rows_per_step, (step + 1) * rows_per_step, config.batch_size)
        batches = [rows.batch(range(row, row + config.batch_size)) for row in first_rows]
        if trainer.uses_hessian and step % config.hess_interval == 0:
            trainer.update_hessian(batches[-1])
        trainer.step(batches, learning_rate(step))
        n_labels += sum(batch.n_labels for batch in batches)
        seconds += time.process_time() - started
        if step + 1 in points:
            loss, bits_per_byte = evaluate(validation)
            curve.append([(step + 1) * tokens_per_step, loss])
            print(f"  {curve[-1][0]:>9,} tokens  {loss}", flush=True)
    line = {"settings": settings, "curve": curve, "loss": loss, "bits_per_byte": bits_per_byte}
    line |= {"loss_of_document_starts": evaluate(starts)[0], "labels": n_labels}
    if trainer.uses_hessian:
        line["win_rate"] = round(trainer.optimizer.win_rate.item(), 4)
    return line | {"cpu_seconds": round(seconds, 1)}


class Study:
    """The finished runs of `results`, and the ones still to be done."""

    def __init__(self, config: Any):
        self.config, self.path = config, Path(config.results)
        self.lines = read_records(self.path)

    def run(self, name: str, seed: int = 0, **changes: Any) -> float:
        """The loss of this run, trained now unless it has been already; inf if not finite."""
        settings = dataclasses.asdict(self.config) | {"name": name, "seed": seed}
        settings = {k: v for k, v in settings.items() if k not in NOT_OF_A_RUN}
        settings |= recipes.settings(name) | changes
        settings["warmup_iters"] = warmup_steps(self.config.steps)
        for line in self.lines:
            if line["settings"] == settings:
                return math.inf if line["loss"] is None else line["loss"]
        print(f"{time.strftime('%H:%M')} {name}, seed {seed}, {changes}", flush=True)
        line = train_once(self.config, settings)
        line |= {"hardware": f"{processor()}, {torch.get_num_threads()} thread(s)"}
        line |= {"torch": torch.__version__, "commit": git("describe", "--always", "--dirty")}
        self.lines.append(line)
        append_record(self.path, line)
        return math.inf if line["loss"] is None else line["loss"]

    def first_values(self, name: str) -> dict[str, float]:
        """Initial values of a recipe's tuning, its rates scaled roughly to the study's size.

        By one rule for all recipes, so that none begins with what was found for another.
        """
        config = self.config
        tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size
        factor = 64 / config.n_embd * math.sqrt(tokens / 4096)
        return {
            setting: float(f"{value * (1 if setting == 'rho' else factor):.4g}")
            for setting, value in recipes.TUNED[name].items()
        }

    def untuned(self, name: str) -> dict[str, float]:
        """The rule's rates, or for a recipe that has no rule the initial values of its tuning."""
        if name not in recipes.HAVE_RULE:
            return self.first_values(name)
        batches = {key: getattr(self.config, key) for key in ("batch_size", ACCUMULATION)}
        config = train_config(**recipes.RECIPES[name] | batches)
        config = with_peak_rates(config, self.config.n_embd, self.config.block_size)
        return {rate: getattr(config, rate) for rate in recipes.TUNED[name]}

    def tune(self, name: str) -> dict[str, float]:
        """The settings with the lowest loss of seed 0, one after the other."""
        best = self.first_values(name)
        for setting in best:
            factor, middle = 4 if setting == "rho" else 2, best[setting]
            losses: dict[int, float] = {}  # by the power of `factor`
            candidates = [0, -1, 1]
            while candidates and len(losses) < MAX_TRIALS:
                power = candidates.pop(0)
                value = float(f"{middle * factor**power:.4g}")
                losses[power] = self.run(name, **best | {setting: value})
                at = min(losses, key=losses.get)
                step = -1 if at == min(losses) else 1
                is_edge = not candidates and at in (min(losses), max(losses))
                if is_edge and losses[at] < losses[at - step] - TOLERANCE:
                    candidates = [at + step]
            best[setting] = float(f"{middle * factor**at:.4g}")
        return best

    def work(self) -> None:
        """All runs of the study."""
        known = [*recipes.TUNED, *recipes.VARIANTS]
        names = chosen_names("only", self.config.only, known)
        if self.config.study == "sizes":
            at_first = self.config
            for name in [name for name in names if name in recipes.OPTIMIZERS]:
                for size in SIZES:
                    self.config = dataclasses.replace(at_first, **size)
                    self.tune(name)
                    self.run(name, **self.untuned(name))
            return
        choose = self.untuned if self.config.study == "untuned" else self.tune
        best = {name: choose(recipes.VARIANTS.get(name, name)) for name in names}
        for seed in range(self.config.seeds):
            for name, changes in best.items():
                self.run(name, seed, **changes)


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    if config.study not in ("recipes", "sizes", "untuned"):
        raise UserError(f"--study={config.study!r} must be one of recipes, sizes, untuned")
    study = Study(config)
    if not config.plot:
        study.work()
    elif not study.lines:
        raise UserError(f"{config.results} holds no finished run: leave --plot out to train some")
    if config.study == "sizes":
        print(markdown_table(sizes_table(study.lines)))
        return 0
    size = {name: getattr(config, name) for name in SIZE}
    lines = of_one_size(study.lines, size)
    print(markdown_table(study_table(lines)))
    draw(lines, Path(config.picture))
    return 0


if __name__ == "__main__":
    run_script(main)
