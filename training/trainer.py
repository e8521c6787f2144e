"""Training, Hessian and evaluation steps of a run; train.py is the loop over them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from checkpoint import TrainingState
from common.errors import UserError
from common.prefetch import Prefetcher
from model import GPT
from ops.cross_entropy import IGNORE_INDEX
from tokenizer import Tokenizer
from training.distributed import SINGLE_PROCESS, Ranks
from training.optimizers import gradient_scale, make_optimizer, set_learning_rate
from training.packing import Batch, PackedRows

MAX_BAD_STEPS = 20  # consecutive steps without a finite gradient before a run gives up


def prompt_ids(prompt: str, chat: bool, tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt: a text to continue, or the user's turn of a chat."""
    if not chat:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.encode_chat(messages, add_generation_prompt=True)


def prefetch_steps(
    rows: PackedRows,
    first_row: int,
    end_row: int,
    batch_size: int,
    accumulation: int,
    pin: bool,
    ranks: Ranks = SINGLE_PROCESS,
) -> Prefetcher:
    """This rank's micro-batches of each step, prepared in a thread ahead of the loop."""
    shape = (batch_size, accumulation)
    steps = rows.steps(first_row, end_row, *shape, ranks.rank, ranks.world_size)
    if pin:  # copies to a GPU from page-locked memory do not block
        steps = ([batch.pin_memory() for batch in batches] for batches in steps)
    return Prefetcher(steps)


class Trainer:
    """A model with its forward pass, optimizer and loss scaling, on one rank.

    Weights and moments are the same on all ranks, since each sees the gradients summed over all.
    `config` provides train.py's settings of the optimizer, the batches and the evaluation.
    """

    def __init__(
        self,
        model: GPT,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks = SINGLE_PROCESS,
    ):
        self.model, self.config, self.device, self.dtype = model, config, device, dtype
        self.ranks = ranks
        # `forward` is this rank's alone; the gradients of `parallel` are summed over the ranks.
        self.forward = model
        self.parallel = ranks.parallel(model, getattr(torch, config.gradient_dtype))
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)  # consecutive, skipped
        self.average: dict[str, torch.Tensor] = {}  # running mean of the weights, by name
        self.n_averaged = 0  # steps in it

    @property
    def uses_hessian(self) -> bool:
        return hasattr(self.optimizer, "update_hessian")

    def loss_sum(
        self, batch: Batch, sample_targets: bool = False, forward: Any = None
    ) -> torch.Tensor:
        """Cross-entropy of a micro-batch in nats, summed over its labels."""
        if batch.seed is not None:
            torch.default_generator.manual_seed(batch.seed)
            if self.device.type != "cpu":  # seeds the device generator without a sync
                torch.get_device_module(self.device).manual_seed(batch.seed)
        tensors = [tensor.to(self.device, non_blocking=True) for tensor in batch.tensors()]
        with self.autocast():
            forward = self.forward if forward is None else forward
            return forward(*tensors, sample_targets=sample_targets)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def try_compile(self, batch: Batch) -> None:
        """Compiles the forward pass, or prints why not and stays eager.

        Each of its uses runs once on `batch`, so that any failure happens here.
        """
        eager = self.parallel
        try:
            self.forward = self.parallel = torch.compile(self.model)
            if eager is not self.model:  # outside, so that the gradients of a bucket need not wait
                self.parallel = torch.compile(eager)
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # a run is the same with and without this trial
                with self.ranks.no_sync(eager):
                    self.loss_sum(batch, forward=self.parallel).backward()
                self.loss_sum(batch, sample_targets=True).backward()
                self.model.eval()
                with torch.no_grad():
                    self.loss_sum(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise many kinds; without them all still works
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"torch.compile does not work here, training without it (slower): {reason}")
            print("  it needs a C++ compiler (g++); compile = False skips this attempt")
            self.forward, self.parallel = self.model, eager
        self.model.train()
        self.model.zero_grad(set_to_none=True)

    def update_hessian(self, *batches: Batch) -> None:
        """Updates SophiaG's Hessian with the mean of the estimates n·ĝ² of all ranks' batches.

        ĝ is the gradient against labels drawn from the model (GNB), n its batch's number of labels.
        """
        labelled = [batch for batch in batches if batch.n_labels]
        n_estimates = int(*self.ranks.all_reduce_scalars(len(labelled)))
        if n_estimates == 0:
            return
        sophiag = getattr(self.optimizer, "hidden", self.optimizer)
        parameters = [p for group in sophiag.param_groups for p in group["params"]]
        sizes = [p.numel() for p in parameters]
        flat = torch.zeros(sum(sizes), device=self.device)  # contiguous: one message to the ranks
        segments = zip(flat.split(sizes), parameters, strict=True)
        estimates = [segment.view_as(p) for segment, p in segments]
        for batch in labelled:
            loss = self.loss_sum(batch, sample_targets=True) / batch.n_labels
            self.scaler.scale(loss).backward()
            weight = batch.n_labels / n_estimates / self.scaler.get_scale() ** 2
            gradients = [p.grad for p in parameters]
            torch._foreach_addcmul_(estimates, gradients, gradients, value=weight)
            self.optimizer.zero_grad(set_to_none=True)
        self.ranks.all_reduce_([flat])
        for p, estimate in zip(parameters, estimates, strict=True):
            p.grad = estimate
        _, scale = gradient_scale(parameters, flat.new_zeros(()), grad_clip=0.0)
        self.optimizer.update_hessian(grad_scale=scale, squared=True)
        self.optimizer.zero_grad(set_to_none=True)

    def step(
        self, batches: list[Batch], lr: float, n_labels: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; returns its loss and gradient norm, on the device.

        The loss is the mean over the labelled tokens of all micro-batches together: `n_labels` on
        all ranks, by default those of `batches`. The gradients are summed over the ranks once,
        during the last backward.
        """
        set_learning_rate(self.optimizer, lr)
        n_labels = max(1, n_labels or sum(batch.n_labels for batch in batches))
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with nullcontext() if last else self.ranks.no_sync(self.parallel):
                loss = self.loss_sum(batch, forward=self.parallel) / n_labels
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.ranks.all_reduce_([total])
        self.scaler.unscale_(self.optimizer)
        norm, scale = gradient_scale(list(self.model.parameters()), total, self.config.grad_clip)
        self.optimizer.step(grad_scale=scale)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps = torch.where(torch.isnan(scale), self.bad_steps + 1, 0)
        return total, norm

    def check_finite(self) -> None:
        """Gives up when the gradient has not been finite for MAX_BAD_STEPS steps in a row."""
        bad_steps = int(self.bad_steps)
        if bad_steps >= MAX_BAD_STEPS:
            raise UserError(
                f"no finite loss or gradient for {bad_steps} steps, none of which changed the "
                f"weights: lower learning_rate (now {self.config.learning_rate:g}) or raise "
                "warmup_iters, and continue from the last checkpoint"
            )

    @torch.no_grad()
    def add_to_average(self) -> None:
        """Makes the weights a part of their running mean over steps, on the device.

        Polyak and Juditsky, 1992, over the last steps of a run alone.
        """
        weights = dict(self.model.named_parameters())
        self.n_averaged += 1
        if self.n_averaged == 1:
            self.average = {name: weight.detach().clone() for name, weight in weights.items()}
        means = [self.average[name] for name in weights]
        torch._foreach_lerp_(means, list(weights.values()), 1 / self.n_averaged)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Has the averaged weights in the model; afterwards, bit for bit, those of before."""
        weights = dict(self.model.named_parameters())
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(self.average[name])
            yield
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(kept[name])

    @torch.no_grad()
    def evaluate(self, rows: PackedRows, token_bytes: torch.Tensor) -> tuple[float, float]:
        """Loss in nats per label, and bits per byte, on the first `eval_rows` rows.

        `token_bytes` (V,) holds the number of bytes that each token id stands for.
        """
        self.model.eval()
        n_rows = min(self.config.eval_rows, rows.rows_per_epoch)
        nats, n_labels, n_bytes = torch.zeros((), dtype=torch.float64), 0, 0
        starts = range(0, n_rows, self.config.batch_size)
        for start in starts[self.ranks.rank :: self.ranks.world_size]:
            numbers = range(start, start + self.config.batch_size)
            batch = rows.batch([row if row < n_rows else None for row in numbers])
            nats += self.loss_sum(batch).cpu().double()
            n_labels += batch.n_labels
            n_bytes += int(token_bytes[batch.targets[batch.targets != IGNORE_INDEX]].sum())
        self.model.train()
        total, n_labels, n_bytes = self.ranks.all_reduce_scalars(nats.item(), n_labels, n_bytes)
        return total / n_labels, total / math.log(2) / max(1, n_bytes)

    def evaluate_all(self, validation: dict[str, PackedRows], tokenizer: Tokenizer) -> dict:
        """Loss and bits per byte of each validation set, and on rank 0 a text sample."""
        token_bytes = torch.from_numpy(tokenizer.token_bytes)
        results: dict[str, Any] = {}
        for name, rows in validation.items():
            loss, bits_per_byte = self.evaluate(rows, token_bytes)
            results |= {f"{name}_loss": loss, f"{name}_bpb": bits_per_byte}
        if self.n_averaged:
            with self.averaged():
                results["averaged_val_loss"] = self.evaluate(validation["val"], token_bytes)[0]
        if self.config.sample_tokens and self.ranks.is_main:
            results["sample"] = self.sample_text(tokenizer)
        return results

    def sample_text(self, tokenizer: Tokenizer) -> str:
        """A sampled continuation of `sample_prompt`, or an answer to it in a fine-tune."""
        prompt = self.config.sample_prompt
        ids = prompt_ids(prompt, self.config.finetune, tokenizer)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        with self.autocast():
            (new_ids,) = self.model.generate(
                [ids],
                self.config.sample_tokens,
                stop_tokens=(tokenizer.eos_id, tokenizer.user_id),
                generator=generator,
            )
        return f"{prompt} | {tokenizer.decode(new_ids).strip()}"

    def state_dict(self) -> dict[str, Any]:
        """This trainer's part of a TrainingState."""
        rng_state = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            rng_state[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "model_args": self.model.config.to_dict(),
            "rng_state": rng_state,
            "average": {"n": self.n_averaged, "weights": self.average} if self.n_averaged else None,
        }

    def restore(self, state: TrainingState) -> None:
        """Loads weights, moments, loss scaling and random states."""
        self.model.load_state_dict(state.model_state_dict)
        if state.average and state.average["n"]:
            self.n_averaged = state.average["n"]
            self.average = {k: v.to(self.device) for k, v in state.average["weights"].items()}
        settings = self.optimizer.state_dict()["param_groups"]  # this run's, not the saved ones
        moments = state.optimizer_state_dict["state"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": settings})
        if self.scaler.is_enabled() and state.scaler_state_dict:
            self.scaler.load_state_dict(state.scaler_state_dict)
        torch.set_rng_state(state.rng_state["cpu"])
        if self.device.type in state.rng_state and self.device.type != "cpu":
            device_module = torch.get_device_module(self.device)
            device_module.set_rng_state(state.rng_state[self.device.type])
