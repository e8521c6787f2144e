"""One training step, one evaluation, one Hessian estimate: what train.py's loop is made of."""

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import torch

from common.errors import UserError
from model import GPT
from ops.cross_entropy import IGNORE_INDEX
from sophia_triton import SophiaG
from tokenizer import Tokenizer
from training.distributed import ALONE, Ranks
from training.packing import Batch, PackedRows

MAX_BAD_STEPS = 20  # steps in a row without a finite gradient before a run gives up


def make_optimizer(model: GPT, config: Any, device: torch.device) -> torch.optim.Optimizer:
    """SophiaG or fused AdamW, with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        betas = (config.adamw_beta1, config.adamw_beta2)
        fused = device.type != "mps"  # there the fused one ignores grad_scale and found_inf
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)
    betas = (config.beta1, config.beta2)
    hessian_tokens = config.batch_size * model.config.block_size  # one micro-batch
    return SophiaG(groups, lr=config.learning_rate, betas=betas, rho=config.rho, bs=hessian_tokens)


def gradient_scale(model: GPT, loss: torch.Tensor, grad_clip: float) -> tuple[torch.Tensor, ...]:
    """The gradients' norm and the factor that clips it, NaN where nothing may be updated.

    Both stay on the device. A loss or gradient that is not finite gives NaN, which makes the
    optimizers leave every weight and moment as it is.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    scale = (grad_clip / (norm + 1e-6)).clamp(max=1.0) if grad_clip > 0 else torch.ones_like(norm)
    good = torch.isfinite(norm) & torch.isfinite(loss)
    return norm, torch.where(good, scale, torch.full_like(scale, math.nan))


def optimizer_step(optimizer: torch.optim.Optimizer, scale: torch.Tensor) -> None:
    """One step with the gradients times `scale`; NaN skips it, without waiting for the device."""
    if isinstance(optimizer, SophiaG):
        optimizer.step(grad_scale=scale)
    elif not optimizer.defaults["fused"]:
        if torch.isfinite(scale):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            torch._foreach_mul_(gradients, scale)
            optimizer.step()
    else:  # how GradScaler tells PyTorch's fused optimizers: a divisor, and a flag to skip
        optimizer.found_inf = torch.isnan(scale).float()
        optimizer.grad_scale = 1.0 / torch.nan_to_num(scale, nan=1.0)
        optimizer.step()


def prompt_ids(prompt: str, chat: bool, tokenizer: Tokenizer) -> list[int]:
    """A prompt as a text to continue, or as the user's turn of a chat."""
    if not chat:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.encode_chat(messages, add_generation_prompt=True)


class Run:
    """A model with its forward pass, data and optimizer; `train` is the loop over it.

    Each of the `ranks` of a run has one. Their weights and moments are always the same, since each
    sees the gradients summed over all.
    """

    def __init__(
        self,
        model: GPT,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks = ALONE,
    ):
        self.model, self.config, self.device, self.dtype = model, config, device, dtype
        self.ranks = ranks
        # `forward` is of this rank alone, `parallel` the one whose gradients are summed over ranks.
        self.forward = model
        self.parallel = self.ranks.parallel(model, getattr(torch, config.gradient_dtype))
        self.optimizer = make_optimizer(model, config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        # Flash attention over packed rows needs 16 bits, Ampere or newer, and heads that fit it.
        width = model.config.head_dim
        self.flash = device.type == "cuda" and dtype != torch.float32
        self.flash &= width % 8 == 0 and width <= 256
        self.flash = self.flash and torch.cuda.get_device_capability(device) >= (8, 0)
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)  # skipped, in a row

    def loss_sum(
        self, batch: Batch, sample_targets: bool = False, forward: Any = None
    ) -> torch.Tensor:
        """Cross-entropy of a micro-batch in nats, summed over its labels."""
        if batch.seed is not None:
            torch.default_generator.manual_seed(batch.seed)
            if self.device.type != "cpu":  # only sets two numbers on the host: nothing waits
                torch.get_device_module(self.device).manual_seed(batch.seed)
        # On a CPU the pieces' lengths decide a loop, which would be compiled for each batch anew.
        by_piece = self.flash or self.device.type == "cpu" and self.forward is self.model
        wanted = batch.tensors() if by_piece else batch.tensors()[:-1]
        tensors = [tensor.to(self.device, non_blocking=True) for tensor in wanted]
        with self.autocast():
            forward = self.forward if forward is None else forward
            return forward(*tensors, sample_targets=sample_targets)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def try_compile(self, batch: Batch) -> None:
        """Compiles the forward pass, or says why it cannot be and goes on without.

        Each of its uses runs once on `batch`, so that whatever can fail fails here.
        """
        eager = self.parallel
        self.forward = self.parallel = torch.compile(self.model)
        if eager is not self.model:  # outside, so that the gradients of a bucket need not wait
            self.parallel = torch.compile(eager)
        try:
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
        """The mean of Gauss-Newton-Bartlett estimates n·ĝ², one of each batch of every rank.

        ĝ is the gradient against labels drawn from the model, n its batch's own number of labels.
        The optimizer's bs is constant, so n / bs is part of the mean, and as the optimizer squares
        what it is given, that is the root of the mean.
        """
        estimated = [batch for batch in batches if batch.n_labels]
        n_estimates = int(*self.ranks.total(len(estimated)))
        if n_estimates == 0:
            return
        parameters = list(self.model.parameters())
        sizes = [p.numel() for p in parameters]
        flat = torch.zeros(sum(sizes), device=self.device)  # in one piece: one message, one root
        pieces = zip(flat.split(sizes), parameters, strict=True)
        squares = [piece.view_as(p) for piece, p in pieces]
        for batch in estimated:
            loss = self.loss_sum(batch, sample_targets=True) / batch.n_labels
            self.scaler.scale(loss).backward()
            weight = batch.n_labels / (self.optimizer.defaults["bs"] * n_estimates)
            weight /= self.scaler.get_scale() ** 2
            gradients = [p.grad for p in parameters]
            torch._foreach_addcmul_(squares, gradients, gradients, value=weight)
            self.optimizer.zero_grad(set_to_none=True)
        self.ranks.sum_([flat])
        flat.sqrt_()
        for p, root in zip(parameters, squares, strict=True):
            p.grad = root
        _, usable = gradient_scale(self.model, flat.new_zeros(()), grad_clip=0.0)
        self.optimizer.update_hessian(grad_scale=usable)
        self.optimizer.zero_grad(set_to_none=True)

    def step(
        self, batches: list[Batch], lr: float, n_labels: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; returns its loss and gradient norm, on the device.

        The loss is the mean over the labelled tokens of all micro-batches together: `n_labels` on
        all ranks, by default those of `batches`. The gradients are summed over the ranks once,
        while the last backward goes on.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        n_labels = max(1, n_labels or sum(batch.n_labels for batch in batches))
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with nullcontext() if last else self.ranks.no_sync(self.parallel):
                loss = self.loss_sum(batch, forward=self.parallel) / n_labels
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.ranks.sum_([total])
        self.scaler.unscale_(self.optimizer)
        norm, scale = gradient_scale(self.model, total, self.config.grad_clip)
        optimizer_step(self.optimizer, scale)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps = torch.where(torch.isnan(scale), self.bad_steps + 1, 0)
        return total, norm

    def check_finite(self) -> None:
        """Gives up when the gradient has not been finite for MAX_BAD_STEPS steps in a row."""
        bad = int(self.bad_steps)
        if bad >= MAX_BAD_STEPS:
            raise UserError(
                f"no finite loss or gradient for {bad} steps, none of which changed the weights: "
                "lower learning_rate or raise warmup_iters, and continue from the last checkpoint"
            )

    @torch.no_grad()
    def evaluate(self, rows: PackedRows, token_bytes: torch.Tensor) -> tuple[float, float]:
        """Loss in nats per label and bits per byte on the first `eval_rows` rows, ever the same."""
        self.model.eval()
        n_rows = min(self.config.eval_rows, rows.rows_per_epoch)
        nats, n_labels, n_bytes = torch.zeros((), dtype=torch.float64), 0, 0
        starts = range(0, n_rows, self.config.batch_size)
        for start in starts[self.ranks.rank :: self.ranks.world_size]:
            chosen = range(start, start + self.config.batch_size)
            batch = rows.batch([row if row < n_rows else None for row in chosen])
            nats += self.loss_sum(batch).cpu().double()
            n_labels += batch.n_labels
            n_bytes += int(token_bytes[batch.targets[batch.targets != IGNORE_INDEX]].sum())
        self.model.train()
        total, n_labels, n_bytes = self.ranks.total(nats.item(), n_labels, n_bytes)
        return total / n_labels, total / math.log(2) / max(1, n_bytes)

    def evaluate_all(self, validation: dict[str, PackedRows], tokenizer: Tokenizer) -> dict:
        """Loss and bits per byte of each validation set, and on the first rank a text sample."""
        token_bytes = torch.from_numpy(tokenizer.token_bytes)
        results: dict[str, Any] = {}
        for name, rows in validation.items():
            loss, bits_per_byte = self.evaluate(rows, token_bytes)
            results |= {f"{name}_loss": loss, f"{name}_bpb": bits_per_byte}
        if self.config.sample_tokens and self.ranks.first:
            results["sample"] = self.sample_text(tokenizer)
        return results

    def sample_text(self, tokenizer: Tokenizer) -> str:
        """What the model says to `sample_prompt`: a completion, or an answer in a fine-tune."""
        prompt = self.config.sample_prompt
        ids = prompt_ids(prompt, self.config.finetune, tokenizer)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        with self.autocast():
            (new,) = self.model.generate(
                [ids],
                self.config.sample_tokens,
                stop_tokens=(tokenizer.eos_id, tokenizer.user_id),
                generator=generator,
            )
        return f"{prompt} | {tokenizer.decode(new).strip()}"

    def state(self, step: int, row: int, best: float, tokenizer: Tokenizer) -> dict[str, Any]:
        """What a run needs to continue exactly, but for its `origin`; see checkpoint.py."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            rng[self.device.type] = torch.get_device_module(self.device).get_rng_state()
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            "model_args": self.model.config.to_dict(),
            "iter_num": step,
            "best_val_loss": best,
            "config": dataclasses.asdict(self.config),
            "tokenizer_sha256": tokenizer.sha256,
            "data_cursor": row,
            "rng_state": rng,
        }

    def restore(self, state: dict[str, Any]) -> tuple[int, int, float]:
        """Puts a checkpoint's state in place; returns (step, row, best validation loss)."""
        self.model.load_state_dict(state["model_state_dict"])
        settings = self.optimizer.state_dict()["param_groups"]  # this run's, not the saved ones
        moments = state["optimizer_state_dict"]["state"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": settings})
        if self.scaler.is_enabled() and state["scaler_state_dict"]:
            self.scaler.load_state_dict(state["scaler_state_dict"])
        rng = state["rng_state"]
        torch.set_rng_state(rng["cpu"])
        if self.device.type in rng and self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(rng[self.device.type])
        return state["iter_num"], state["data_cursor"], state["best_val_loss"]
