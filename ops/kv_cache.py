"""The KV cache: keys and values of earlier tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class KVCache:
    """Keys and values of earlier tokens, with room for `block_size` of them.

    All memory is allocated at once. A row is cut by setting its length: what follows is not read.
    """

    keys: torch.Tensor  # (n_layers, B, K, block_size, D)
    values: torch.Tensor
    lengths: torch.Tensor  # (B,) number of cached tokens of each row

    @classmethod
    def empty(cls, config: Any, batch: int, like: torch.Tensor) -> "KVCache":
        """A cache for `batch` rows of a model of the shape `config`; dtype and device of `like`."""
        shape = (config.n_layers, batch, config.n_kv_heads, config.block_size, config.head_dim)
        lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        return cls(like.new_zeros(shape), like.new_zeros(shape), lengths)

    def positions_and_mask(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (B, T) of T more tokens, and their causal mask (B, 1, T, S).

        S is the longest row's new length on a CPU, else block_size: reading the lengths of a GPU
        would wait for it.
        """
        positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        S = self.keys.shape[3]
        if self.lengths.is_cpu and not torch.compiler.is_compiling():
            S = min(S, int(self.lengths.max()) + T)
        key_positions = torch.arange(S, device=self.lengths.device)
        return positions, (key_positions <= positions[:, :, None])[:, None]

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor):
        """Writes k and v (B, K, T, D) at positions (B, T); returns all of the layer.

        Under autocast they are narrower than the cache, which has the weights' dtype.
        """
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, positions] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer], self.values[layer]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of a and b."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:  # the usual case while decoding: one comparison, not a loop
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
