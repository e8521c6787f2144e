"""Causal attention within the segments of packed rows, and the inputs that all layers share.

A segment is a document, or a part of one, in a packed row; it does not see the others. Packing has
two descriptions: `positions` (B, T) count from 0 in each segment, and `cu_seqlens` int32 are the
cumulative segment lengths of the flattened batch, from 0, the last repeated to any fixed length.
A mask is made from the first and works everywhere; where `uses_segments` allows it, the second
saves the mask and the products that it would hide.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.kv_cache import KVCache


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of attention that are the same in every layer of a forward pass."""

    cos: Tensor  # RoPE tables at the positions, (B, T, 1, D), or (T, 1, D) for all rows
    sin: Tensor
    positions: Tensor  # (B, T), or (T,) for all rows
    mask: Tensor | None = None  # (B, 1, T, S), True where a query sees a key; None: causal
    cu_seqlens: Tensor | None = None  # set: attention within segments, without a mask
    cache: KVCache | None = None


def document_mask(positions: Tensor) -> Tensor:
    """Causal mask within the segments of packed rows, (B, 1, T, T); `positions` (B, T)."""
    segment = (positions == 0).cumsum(dim=1)
    same_segment = segment[:, :, None] == segment[:, None, :]
    return same_segment.tril()[:, None]


def uses_segments(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `attend_by_segment` or `flash_varlen` replaces the mask; `dtype` is that of q, k, v.

    On a CPU the segment lengths decide a loop, which would be compiled anew for every batch.
    """
    if device.type == "cpu":
        return not torch.compiler.is_compiling()
    return device.type == "cuda" and supports_flash(device, dtype, head_dim)


@torch.compiler.assume_constant_result
def supports_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether varlen_attn runs on this GPU: 16 bits, head width, Ampere or newer."""
    fits = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    """Variable-length flash attention over q (N, H, D), k and v (N, K, D) -> (N, H, D).

    The keywords of PyTorch's varlen_attn differ between releases, so they are looked up.
    """
    from torch.nn.attention.varlen import varlen_attn

    keywords = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in keywords else {"is_causal": True}
    if "enable_gqa" in keywords:
        options["enable_gqa"] = True
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, **options)


def attend_by_segment(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The same as `flash_varlen` on a CPU: causal attention, one segment after another.

    Consecutive segments of one length, such as full rows, are computed together.
    """
    groups: list[list[int]] = []  # [number of segments, length]
    for length in cu_seqlens.diff().tolist():
        if groups and groups[-1][1] == length:
            groups[-1][0] += 1
        elif length:
            groups.append([1, length])
    parts = (x.split([n * length for n, length in groups]) for x in (q, k, v))
    outputs = []
    for (n, length), *qkv in zip(groups, *parts, strict=True):
        qkv = [x.unflatten(0, (n, length)).transpose(1, 2) for x in qkv]  # (n, heads, length, D)
        y = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
        outputs.append(y.transpose(1, 2).flatten(0, 1))  # (n·length, H, D)
    return torch.cat(outputs)
