"""Models of other projects in Lille's shape, their batches and losses, for the training step.

transformers' Llama, litgpt's GPT (code in the style of nanoGPT), liger-kernel's fused loss, and the
original Lille with the batches of its train.py. All but transformers are optional
(requirements/bench.txt): a function returns None where its package is absent.
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
from training.packing import Batch
from training.trainer import Trainer

# (forward, ids, targets) -> mean loss
LossOf = Callable[[Callable, torch.Tensor, torch.Tensor], torch.Tensor]


def llama_of(config: GPTConfig) -> torch.nn.Module:
    """transformers' LlamaForCausalLM of the same shape."""
    import transformers

    settings = llama_config(config, load_tokenizer())
    settings = {k: v for k, v in settings.items() if not k.endswith(("token_id", "dtype"))}
    settings = transformers.LlamaConfig(**settings, attn_implementation="sdpa")
    return transformers.LlamaForCausalLM(settings)


def liger_llama_of(config: GPTConfig) -> torch.nn.Module | None:
    """The same with liger-kernel's fused head and cross-entropy; CUDA only.

    Its other kernels would replace those of every Llama of this process.
    """
    if (liger := peer("liger_kernel.transformers")) is None:
        return None
    llama = llama_of(config)
    liger.apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False, model=llama)
    return llama


def litgpt_of(config: GPTConfig) -> torch.nn.Module | None:
    """litgpt's GPT of the same shape with a tied head."""
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
    """The original's model of the same shape."""
    if (simple_ai := peer("simple_ai.model")) is None:
        return None
    names = {field.name for field in dataclasses.fields(simple_ai.GPTConfig)}
    shape = {name: value for name, value in config.to_dict().items() if name in names}
    return simple_ai.GPT(simple_ai.GPTConfig(**shape))


def plain_rows(batch: Batch, pad_id: int) -> Batch:
    """Packed rows for a trainer without documents: every token but padding is a label.

    `targets` are not shifted: transformers does that itself.
    """
    targets = batch.ids.masked_fill(batch.ids == pad_id, IGNORE_INDEX)
    n_labels = int((targets[:, 1:] != IGNORE_INDEX).sum())
    return dataclasses.replace(batch, targets=targets, n_labels=n_labels)


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
    positions = torch.arange(block_size).repeat(len(documents), 1)
    borders = torch.arange(0, ids.numel() + 1, block_size, dtype=torch.int32)
    return Batch(ids, targets, positions, borders, int((targets != IGNORE_INDEX).sum()))


def llama_loss(forward: Callable, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return forward(input_ids=ids, labels=targets, use_cache=False).loss


def litgpt_loss(forward: Callable, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All logits at once, in float32, then F.cross_entropy, as in nanoGPT."""
    return F.cross_entropy(forward(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


def original_loss(pad_id: int) -> LossOf:
    def loss_of(forward: Callable, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return litgpt_loss(lambda ids: forward(ids, attn_mask=ids != pad_id)[0], ids, targets)

    return loss_of


class PeerTrainer(Trainer):
    """The training step of ours on a peer's model; `loss_of` is its mean loss of a micro-batch."""

    def __init__(self, loss_of: LossOf, *arguments: Any):
        super().__init__(*arguments)
        self.loss_of = loss_of

    def loss_sum(
        self, batch: Batch, sample_targets: bool = False, forward: Any = None
    ) -> torch.Tensor:
        ids, targets = (t.to(self.device, non_blocking=True) for t in batch.tensors()[:2])
        forward = self.forward if forward is None else forward
        with self.autocast():
            return self.loss_of(forward, ids, targets) * batch.n_labels
