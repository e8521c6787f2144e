"""Models of other projects in Lille's shape, and one plain training step for all of them.

transformers' Llama, litgpt's GPT (code in the style of nanoGPT), liger-kernel's fused loss, and the
original Lille with the batches of its train.py. Each is called as its own project trains it. All
are optional, see requirements/bench.txt.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.timing import peer
from formats.llama import llama_config
from model import GPTConfig
from ops.cross_entropy import IGNORE_INDEX
from tokenizer import load_tokenizer
from training.optimizers import make_optimizer
from training.packing import Batch

LossOf = Callable[[Callable, tuple[torch.Tensor, ...]], torch.Tensor]  # (forward, batch) -> mean


def llama_of(config: GPTConfig) -> torch.nn.Module | None:
    """transformers' LlamaForCausalLM of the same shape, or None where transformers is absent."""
    if (transformers := peer("transformers")) is None:
        return None
    settings = llama_config(config, load_tokenizer())
    settings = {k: v for k, v in settings.items() if not k.endswith(("token_id", "dtype"))}
    settings = transformers.LlamaConfig(**settings, attn_implementation="sdpa")
    return transformers.LlamaForCausalLM(settings)


def litgpt_of(config: GPTConfig) -> torch.nn.Module | None:
    """litgpt's GPT of the same shape with a tied head, or None where litgpt is absent."""
    if (litgpt := peer("litgpt.model")) is None:
        return None
    model = litgpt.GPT(
        litgpt.Config(
            block_size=config.block_size,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            n_layer=config.n_layers,
            n_embd=config.n_embd,
            n_head=config.n_heads,
            n_query_groups=config.n_kv_heads,
            intermediate_size=config.ffn_dim,
            mlp_class_name="LLaMAMLP",
            norm_class_name="RMSNorm",
            norm_eps=config.layer_norm_eps,
            rope_base=int(config.rope_theta),
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
        )
    )
    model.apply(model._init_weights)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def original_of(config: GPTConfig) -> torch.nn.Module | None:
    """The original's model of the same shape, or None where simpleai-sdk is absent."""
    if (simple_ai := peer("simple_ai.model")) is None:
        return None
    settings = config.to_dict()
    names = [field.name for field in dataclasses.fields(simple_ai.GPTConfig)]
    shape = {name: settings[name] for name in names if name in settings}
    return simple_ai.GPT(simple_ai.GPTConfig(**shape))


def plain_rows(batch: Batch, pad_id: int) -> Batch:
    """Packed rows for a trainer without documents: every token but padding is a label.

    `targets` are not shifted: transformers does that itself.
    """
    targets = batch.ids.masked_fill(batch.ids == pad_id, IGNORE_INDEX)
    n_labels = int((targets[:, 1:] != IGNORE_INDEX).sum())
    return Batch(batch.ids, targets, batch.positions, batch.cu_seqlens, n_labels)


def one_segment_rows(ids: torch.Tensor, targets: torch.Tensor) -> Batch:
    """A batch of rows with causal attention over each whole row."""
    n_rows, block_size = ids.shape
    positions = torch.arange(block_size).expand(n_rows, -1).contiguous()
    borders = torch.arange(0, ids.numel() + 1, block_size, dtype=torch.int32)
    return Batch(ids, targets, positions, borders, int((targets != IGNORE_INDEX).sum()))


def beginnings(documents: Sequence[np.ndarray | None], block_size: int, pad_id: int) -> Batch:
    """The original's rows: the first `block_size` tokens of each document, padded; None is padding.

    A document that is cut off gives block_size - 1 labels, since its next token is cut off too. A
    row is one segment: attention is causal, so no labelled token sees the padding behind it.
    """
    ids = torch.full((len(documents), block_size), pad_id)
    targets = torch.full_like(ids, IGNORE_INDEX)
    for row, document in enumerate(documents):
        if document is not None:
            tokens = torch.from_numpy(document[:block_size].astype(np.int64))
            ids[row, : len(tokens)] = tokens
            targets[row, : len(tokens) - 1] = tokens[1:]
    return one_segment_rows(ids, targets)


def padded_rows(
    documents: Sequence[np.ndarray],
    block_size: int,
    batch_size: int,
    pad_id: int,
    rng: np.random.Generator,
) -> Batch:
    """The original's micro-batch: documents drawn with replacement."""
    numbers = rng.integers(len(documents), size=batch_size)
    return beginnings([documents[i] for i in numbers], block_size, pad_id)


def llama_loss(forward: Callable, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    ids, labels = tensors[:2]
    return forward(input_ids=ids, labels=labels, use_cache=False).loss


def litgpt_loss(forward: Callable, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """All logits at once, in float32, then F.cross_entropy, as in nanoGPT."""
    ids, targets = tensors[:2]
    return F.cross_entropy(forward(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def original_loss(pad_id: int) -> LossOf:
    def loss_of(forward: Callable, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        ids, targets = tensors[:2]
        logits, _ = forward(ids, attn_mask=ids != pad_id)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)

    return loss_of


def liger_loss(llama: torch.nn.Module) -> LossOf | None:
    """transformers' Llama with liger-kernel's fused head and cross-entropy; CUDA only."""
    if (liger := peer("liger_kernel.transformers")) is None:
        return None
    criterion = liger.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX)

    def loss_of(forward: Callable, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        ids, labels = tensors[:2]
        x = forward(input_ids=ids, use_cache=False).last_hidden_state
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        return criterion(llama.lm_head.weight, x.flatten(0, 1), targets.flatten())

    return loss_of


class PlainTrainer:
    """A peer's training step over micro-batches: forward, backward, clip_grad_norm_, optimizer.

    The optimizer is that of `config`, the same fused AdamW as ours, unless another one is passed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_of: LossOf,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        forward: Callable | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.model, self.loss_of, self.config = model.to(device).train(), loss_of, config
        self.device, self.dtype = device, dtype
        self.forward = forward or model
        self.optimizer = optimizer or make_optimizer(self.model, config)

    def step(self, batches: list[Batch], lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; returns its loss and gradient norm, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        n_labels = sum(batch.n_labels for batch in batches)
        total = torch.zeros((), device=self.device)
        half = self.dtype != torch.float32
        for batch in batches:
            tensors = tuple(t.to(self.device, non_blocking=True) for t in batch.tensors()[:2])
            with torch.autocast(self.device.type, self.dtype, enabled=half):
                loss = self.loss_of(self.forward, tensors) * (batch.n_labels / n_labels)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm
