"""Building and resuming a training run: settings, device, checkpoint, data, model, optimizer."""

import dataclasses
import math
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from checkpoint import BEST, TrainingState
from common.errors import UserError, printable
from common.files import locked
from common.prefetch import Prefetcher
from formats.pretrained import resolve_model
from tokenizer import Tokenizer, load_tokenizer
from training.base import base_hash, build_model
from training.checks import (
    FINETUNE_NAMES,
    check_disk,
    check_rates,
    check_sample_prompt,
    check_schedule,
    check_settings,
    explain_out_of_memory,
    flag_name,
)
from training.data import dataset_id, open_rows, open_validation
from training.distributed import SINGLE_PROCESS, Ranks, init_distributed
from training.learning_rates import warmup_steps, with_peak_rates
from training.metrics import last_metrics
from training.optimizers import first_moments
from training.packing import PackedRows
from training.resume import check_decay, check_resume, find_checkpoint
from training.trainer import Trainer, prefetch_steps, prompt_ids

LEFTOVERS = ("*.pt.tmp", "metrics.jsonl.tmp", "loss_curve.png.tmp")  # of a killed run


@dataclasses.dataclass
class TrainingRun:
    """A built run and its position; the loop in train.py advances `step`, `row` and `best`."""

    config: Any  # the settings in force
    ranks: Ranks
    tokenizer: Tokenizer
    trainer: Trainer
    rows: PackedRows
    validation: dict[str, PackedRows]  # by name, see open_validation
    data: str  # dataset id of `rows`
    base: str | None  # sha256 of the weights that `init_from` names
    checkpoint: tuple[Path, dict[str, Any]] | None  # path and content of the one to continue
    source: Path | None = None  # path of the checkpoint that was continued
    step: int = 0  # completed steps
    row: int = 0  # the next row of `rows`
    best: float = math.inf  # lowest validation loss
    total_steps: int = 0

    @property
    def out_dir(self) -> Path:
        return Path(self.config.out_dir)

    @property
    def rows_per_step(self) -> int:
        return self.config.batch_size * self.config.gradient_accumulation_steps

    @property
    def end_row(self) -> int:
        return self.rows.rows_of(self.config.num_epochs)

    @property
    def first_averaged(self) -> int:
        """The number of steps before those whose weights are averaged."""
        return self.total_steps - round(self.config.average_last * self.total_steps)

    def advance(self) -> None:
        """Counts one step."""
        self.step, self.row = self.step + 1, min(self.row + self.rows_per_step, self.end_row)

    def state(self) -> TrainingState:
        return TrainingState(
            **self.trainer.state_dict(),
            iter_num=self.step,
            best_val_loss=self.best,
            config=dataclasses.asdict(self.config),
            tokenizer_sha256=self.tokenizer.sha256,
            tokenizer_json=self.tokenizer.json_text,
            data_cursor=self.row,
            data=self.data,
            base=self.base,
        )

    def averaged_state(self) -> TrainingState:
        """The state with the averaged weights, to be the best model."""
        with self.trainer.averaged():
            weights = {name: w.clone() for name, w in self.trainer.model.state_dict().items()}
        return dataclasses.replace(
            self.state(), model_state_dict=weights, average={"n": 0, "weights": {}}
        )

    def expected_state(self, old_config: Any) -> TrainingState:
        """The state before the first step, with moments in the dtype of a checkpoint's settings."""
        settings = old_config if isinstance(old_config, dict) else {}
        half = settings.get("optimizer_state_dtype") == "bfloat16"
        moments = first_moments(self.trainer.optimizer, torch.bfloat16 if half else torch.float32)
        return dataclasses.replace(self.state(), optimizer_state_dict={"state": moments})

    def resume(self) -> None:
        """Continues the checkpoint, if there is one; UserError if it is not one of this run."""
        if self.checkpoint is not None:
            self.source, checkpoint = self.checkpoint
            self.checkpoint = None  # frees its memory
            state = TrainingState.of(checkpoint, self.source)
            self.keep_warmup(state.config)
            changes = check_resume(state, self.expected_state(state.config), self.source)
            self.trainer.restore(state)
            self.step, self.row, self.best = state.iter_num, state.data_cursor, state.best_val_loss
            self.data, self.base = state.data or self.data, state.base
            changes = "".join(f"; {change}" for change in changes)
            print(printable(f"continuing {self.source} at step {self.step}{changes}"))
        steps_left = math.ceil(max(0, self.end_row - self.row) / self.rows_per_step)
        self.total_steps = data_steps = self.step + steps_left
        if self.config.max_steps:
            self.total_steps = min(self.total_steps, self.config.max_steps)
        self.keep_warmup({"warmup_iters": warmup_steps(self.total_steps)})
        if self.source is not None:
            check_decay(self.config, state, self.total_steps, data_steps, self.source)
            self.keep_average(state)

    def keep_average(self, state: TrainingState) -> None:
        """Drops a restored average that has steps which this run does not average."""
        trainer, first = self.trainer, self.first_averaged
        if state.average and state.average["n"] == 0:
            print(f"{self.source} has averaged weights: the run goes on from those")
        if trainer.n_averaged > max(0, self.step - first):
            if self.step > first:
                print("the average begins anew: the one saved has steps from before its share")
            trainer.average, trainer.n_averaged = {}, 0

    def keep_warmup(self, settings: Any) -> None:
        """A warm-up that is not given is that of a continued run, which does not move with it."""
        saved = settings.get("warmup_iters") if isinstance(settings, dict) else None
        if not self.config.warmup_iters and type(saved) is int and saved > 0:
            self.config = dataclasses.replace(self.config, warmup_iters=saved)

    def start(self) -> None:
        """The checks that need the number of steps, the summary, and compilation."""
        config = self.config
        if not (self.out_dir / BEST).exists():
            self.best = math.inf  # best_model.pt is not here: any model is better
        check_schedule(config, self.total_steps, self.rows_per_step, self.end_row)
        if self.ranks.is_main:
            moments = first_moments(
                self.trainer.optimizer, getattr(torch, config.optimizer_state_dtype)
            )
            if config.average_last:  # one more copy of the weights
                n = self.trainer.model.n_parameters()
                moments[-1] = {"average": torch.empty(n, device="meta")}
            check_disk(self.out_dir, self.trainer.model, config.keep_checkpoints, moments)
        self.print_summary()
        if config.compile:
            self.trainer.try_compile(self.rows.batch(range(config.batch_size)))

    def print_summary(self) -> None:
        """Prints the size of the model, of the data and of the run."""
        config, trainer, rows = self.config, self.trainer, self.rows
        tokens_per_step = self.rows_per_step * rows.block_size
        epochs = min(config.num_epochs, self.total_steps * self.rows_per_step / rows.rows_per_epoch)
        n_validation = min(config.eval_rows, self.validation["val"].rows_per_epoch)
        ranks = f", {self.ranks.world_size} ranks" if self.ranks.world_size > 1 else ""
        print(
            f"{trainer.model.n_parameters():,} parameters on {trainer.device} "
            f"({str(trainer.dtype)[6:]}), {config.optimizer}, {self.total_steps:,} steps of "
            f"{tokens_per_step:,} tokens{ranks}"
        )
        print(f"peak learning rates: {self.peak_rates()}; warm-up {config.warmup_iters} steps")
        print(
            f"{config.data_dir}: {rows.description}; {rows.rows_per_epoch:,} rows of "
            f"{rows.block_size}, {rows.fill:.2%} full, {epochs:.3g} epochs; validation on "
            f"{n_validation:,} rows"
        )
        mixed = len(rows.shares) > 1 or rows.weighted
        for data_set, tokens in rows.shares.items() if mixed else ():
            share = tokens / sum(rows.shares.values())
            print(
                f"  {data_set}: {tokens:,.0f} tokens of an epoch, {share:.1%}, about "
                f"{tokens / rows.fill / rows.block_size:,.0f} rows"
            )
        if rows.n_shortened or rows.n_dropped:
            print(
                f"{rows.n_shortened} conversations longer than {rows.block_size} tokens keep their "
                f"most recent turns; {rows.n_dropped} whose last turn alone is too long are dropped"
            )

    def peak_rates(self) -> str:
        hidden, others = self.config.learning_rate, self.config.embedding_learning_rate
        if self.config.embedding_optimizer == "same":
            return f"{hidden:g} for all parameters"
        return f"{hidden:g} for the hidden matrices, {others:g} for embedding and norms (AdamW)"

    def result(self) -> str:
        """The last line of a run."""
        best = self.out_dir / BEST
        if math.isfinite(self.best) and best.exists():
            first = last_metrics(self.out_dir, until=0).get("val_loss")
            better = type(first) is float and first < self.best
            before = f"; the model that it began from has {first:.4f}" if better else ""
            return f"done: best validation loss {self.best:.4f}, in {best}{before}"
        return f"done, but no validation loss was finite: there is no {best}"

    def batches(self) -> Prefetcher:
        """This rank's micro-batches of every step that is left."""
        config = self.config
        shape = (config.batch_size, config.gradient_accumulation_steps)
        pin = self.trainer.device.type == "cuda"
        return prefetch_steps(self.rows, self.row, self.end_row, *shape, pin, self.ranks)

    def resume_hint(self, path: Path) -> str:
        """The message of an interrupted run that was saved as `path`."""
        hint = "run the same command again to continue"
        if self.step == self.total_steps:
            hint = "the run is complete"
        elif self.config.resume_checkpoint != "auto":
            hint = f"to continue, add --resume_checkpoint={path}"
        return f"interrupted at step {self.step} and saved as {path}; {hint}"


@contextmanager
def open_run(config: Any) -> Iterator[TrainingRun]:
    """Joins the ranks, locks the output folder and builds the run.

    Raises UserError for settings, data or checkpoints that do not fit.
    """
    with init_distributed(config.distributed_timeout_minutes) as ranks, ExitStack() as stack:
        ranks.check_same(dataclasses.asdict(config))  # otherwise the collectives deadlock
        pretrain_data_dir, config = config.data_dir, settings_in_force(config)
        check_settings(config, ranks.world_size)
        if ranks.is_main:
            make_folder(Path(config.out_dir))
            stack.enter_context(locked(Path(config.out_dir), "train.py"))
            for pattern in LEFTOVERS:
                for path in Path(config.out_dir).glob(pattern):
                    path.unlink()
        stack.enter_context(explain_out_of_memory(config))
        yield build_run(config, pretrain_data_dir, ranks)


def build_run(config: Any, pretrain_data_dir: str, ranks: Ranks) -> TrainingRun:
    """Device, data, model and optimizer of a run."""
    device, dtype = choose_device(config, ranks)
    tokenizer = load_tokenizer(config.tokenizer)
    path, checkpoint = ranks.broadcast(lambda: find_checkpoint(config) or (None, None))
    base_path = Path(config.init_from)
    if path is None and config.init_from:  # a model on the hub has a folder then
        base_path = ranks.broadcast(lambda: resolve_model(config.init_from, with_tokenizer=True))
    base = ranks.broadcast(lambda: base_hash(base_path)) if config.init_from else None
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer, path or base_path, checkpoint, ranks)
    if path is None and base and ranks.broadcast(lambda: base_hash(base_path)) != base:
        raise UserError(f"{config.init_from} was replaced while it was read: run again")
    block_size = model.config.block_size
    config = with_peak_rates(config, model.config.n_embd, block_size)
    check_rates(config)
    rows = open_rows(
        *(config.data_dir, "train", tokenizer, block_size, config.seed, config.finetune),
        n_epochs=config.num_epochs,
    )
    validation = open_validation(config, pretrain_data_dir, tokenizer, block_size)
    max_segments = max(split.max_segments for split in (rows, *validation.values()))
    for split in (rows, *validation.values()):  # one shape of cu_seqlens: compiled once
        split.max_segments = max_segments
    try:
        n_prompt = len(prompt_ids(config.sample_prompt, config.finetune, tokenizer))
    except ValueError as error:
        raise UserError(f"{flag_name(config, 'sample_prompt')} is {error}: change it") from None
    check_sample_prompt(config, n_prompt, block_size)

    data = dataset_id(rows)
    validation_ids = "; ".join(f"{name} {dataset_id(split)}" for name, split in validation.items())
    ids = {"data": data, "validation": validation_ids}
    ranks.check_same({"device": device.type, "dtype": dtype} | ids)
    trainer = Trainer(model.to(device), config, device, dtype, ranks)
    datasets = (rows, validation, data, base)
    return TrainingRun(config, ranks, tokenizer, trainer, *datasets, path and (path, checkpoint))


def settings_in_force(config: Any) -> Any:
    """`config`, in a fine-tune with the finetune_* values under their plain names."""
    if not config.finetune:
        return config
    if Path(config.finetune_out_dir).resolve() == Path(config.out_dir).resolve():
        raise UserError(
            "finetune_out_dir and out_dir are the same folder, so a fine-tune would overwrite the "
            "pretrained model: change finetune_out_dir"
        )
    values = {name: getattr(config, f"finetune_{name}") for name in FINETUNE_NAMES}
    return dataclasses.replace(config, **values, init_from=config.model)


def choose_device(config: Any, ranks: Ranks = SINGLE_PROCESS) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype, with "auto" resolved; every rank of a machine gets a GPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = config.device
    if name == "auto":
        name = next((name for name, present in available.items() if present), "cpu")
    if not available.get(name, True):
        kind = "GPU" if name == "cuda" else "Apple GPU"
        raise UserError(f"device={name!r}, but PyTorch sees no {kind}: set device='auto'")
    if ranks.world_size > 1 and name == "mps":
        raise UserError("several ranks cannot share an Apple GPU: run python train.py once")
    if ranks.world_size > 1 and name == "cuda":
        if ranks.local_world_size > (count := torch.cuda.device_count()):
            raise UserError(
                f"{ranks.local_world_size} ranks on {socket.gethostname()}, where PyTorch sees "
                f"{count} GPU(s): start torchrun with --nproc_per_node={count}"
            )
        name = f"cuda:{ranks.local_rank}"
        torch.cuda.set_device(name)
    if config.dtype != "auto":
        if not name.startswith("cuda") and config.dtype != "float32":
            raise UserError(f"dtype={config.dtype!r} needs a CUDA GPU: set dtype='auto'")
        return torch.device(name), getattr(torch, config.dtype)
    if name.startswith("cuda"):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device(name), torch.bfloat16 if bf16 else torch.float16
    return torch.device(name), torch.float32


def make_folder(directory: Path) -> None:
    """Makes the output folder; UserError when it cannot be made or written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {directory}: {error.strerror or error}") from None
    if not os.access(directory, os.W_OK):
        raise UserError(f"cannot write to {directory}: change its permissions, or choose another")
