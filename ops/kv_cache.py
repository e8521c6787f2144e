"""The KV cache: keys and values of the tokens that a model has seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, with room for `block_size` of them.

    All memory is taken at once. Setting a row's length shortens it: what lies beyond is not read.
    """

    keys: torch.Tensor  # (n_layers, B, K, block_size, D)
    values: torch.Tensor
    lengths: torch.Tensor  # (B,) tokens cached in each row

    @classmethod
    def empty(cls, config: Any, batch: int, like: torch.Tensor) -> "KVCache":
        shape = (config.n_layers, batch, config.n_kv_heads, config.block_size, config.head_dim)
        lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        return cls(like.new_zeros(shape), like.new_zeros(shape), lengths)

    def places(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (B, T) of T more tokens, and which places they see, (B, 1, T, places)."""
        positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        seen = self.keys.shape[3]
        if self.lengths.is_cpu and not torch.compiler.is_compiling():
            seen = min(seen, int(self.lengths.max()) + T)  # a GPU would have to be waited for
        places = torch.arange(seen, device=self.lengths.device)
        return positions, (places <= positions[:, :, None])[:, None]

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor):
        """Writes keys and values (B, K, T, D) at positions (B, T); returns the layer's, all places.

        Under autocast they are narrower than the cache, which has the type of the weights.
        """
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, positions] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer], self.values[layer]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items at their beginning a and b share."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:  # each step of an answer: one comparison, not a loop
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
