"""The Lille decoder: RMSNorm, grouped-query attention with RoPE, SwiGLU, tied embedding and head.

    model = GPT(GPTConfig())
    logits = model(ids)                                   # (B, T) -> (B, T, V)
    new_ids = model.generate([[1, 2, 3]], max_new_tokens=20)

With `rope_style="llama"` (the default) the model computes exactly what a Llama of the same shape
does. `rope_style="lille"` is what the original project computed and its published weights need.

Letters in shape comments: B batch, T time, C n_embd, H query heads, K KV heads, D head width,
V vocabulary, F feed-forward width, N = B·T tokens of a flattened batch.

References: RoPE 2104.09864, GQA 2305.13245, SwiGLU 2002.05202, RMSNorm 1910.07467 (arXiv).
"""

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from ops.attention import (
    AttentionInputs,
    attend_by_segment,
    document_mask,
    flash_varlen,
    uses_segments,
)
from ops.cross_entropy import linear_cross_entropy
from ops.kv_cache import KVCache
from ops.sampling import sample

LARGEST_SIZE = 1 << 20  # of a width, a number of layers, the vocabulary and the context


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model; the defaults are Lille 130M (127,171,200 parameters)."""

    n_embd: int = 640
    n_layers: int = 24
    n_heads: int = 10
    n_kv_heads: int = 2
    vocab_size: int = 32768
    block_size: int = 512  # longest sequence, tokens
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_style: str = "llama"  # or "lille", the original's; see apply_rope

    def __post_init__(self) -> None:
        for name in ("n_embd", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "block_size"):
            value = getattr(self, name)
            if type(value) is not int:
                raise ValueError(f"{name} must be a whole number, not {reprlib.repr(value)}")
            if not 1 <= value <= LARGEST_SIZE:
                raise ValueError(f"{name} must be at least 1 and at most {LARGEST_SIZE}")
        for name in ("layer_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite")
        if self.n_embd % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"n_embd={self.n_embd} must be n_heads={self.n_heads} times an even head width"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.rope_style not in ("llama", "lille"):
            raise ValueError(f"rope_style={self.rope_style!r} must be 'llama' or 'lille'")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """SwiGLU width: 8/3·n_embd rounded to the nearest multiple of 256."""
        return 256 * max(1, round(8 * self.n_embd / 3 / 256))

    def to_dict(self) -> dict:
        return asdict(self)


def rope_tables(config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (block_size, D), half-split: column i and column i + D/2 share an angle."""
    frequencies = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(
        torch.arange(config.block_size, dtype=torch.float32), config.rope_theta**-frequencies
    )
    angles = torch.cat((angles, angles), dim=-1)  # (block_size, D)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    """Position encoding of queries or keys x (B, T, heads, D) with tables (…, T, 1, D).

    "llama" rotates the pair (i, i + D/2). "lille" pairs interleaved columns with the half-split
    tables, so it is not a rotation and scores depend on absolute position: kept for old weights.
    """
    if style == "llama":
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
    else:
        rotated = torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation; statistics and scale are float32 in a bfloat16 stream too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        y = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return y.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with its pre-norm; the residual is added by Block."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        kv_dim = config.n_kv_heads * config.head_dim
        self.norm = RMSNorm(config.n_embd, eps=config.layer_norm_eps)
        self.qkv_proj = nn.Linear(config.n_embd, config.n_embd + 2 * kv_dim, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        config, mask, cu_seqlens = self.config, inputs.mask, inputs.cu_seqlens
        B, T, C = x.shape
        heads, kv_heads, width = config.n_heads, config.n_kv_heads, config.head_dim
        qkv = self.qkv_proj(self.norm(x)).view(B, T, heads + 2 * kv_heads, width)
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=2)
        qk = apply_rope(qk, inputs.cos, inputs.sin, config.rope_style)
        q, k = qk.split((heads, kv_heads), dim=2)

        if cu_seqlens is not None:
            q, k, v = (part.reshape(B * T, -1, width) for part in (q, k, v))  # (N, heads, D)
            if x.is_cuda:
                y = flash_varlen(q, k, v, cu_seqlens, max_length=T)
            else:
                y = attend_by_segment(q, k, v, cu_seqlens)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
            if inputs.cache is not None:
                k, v = inputs.cache.update(self.layer, k, v, inputs.positions)
                k, v = k[:, :, : mask.shape[3]], v[:, :, : mask.shape[3]]  # (B, K, S, D)
                if T == 1:  # the queries of a KV head beside each other: it is read once
                    q = q.reshape(B, kv_heads, -1, width)
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != kv_heads
            )
            y = y.reshape(B, heads, T, width).transpose(1, 2)  # (B, T, H, D)
        return self.dropout(self.out_proj(y.reshape(B, T, C)))


class FeedForward(nn.Module):
    """SwiGLU with its pre-norm: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm = RMSNorm(config.n_embd, eps=config.layer_norm_eps)
        self.gate_proj = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.dropout(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """Attention and feed-forward network, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        x = x + self.attention(x, inputs)
        return x + self.feed_forward(x)


class GPT(nn.Module):
    """The whole decoder: embedding, blocks, final norm and tied head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.n_embd, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.tok_embeddings.weight
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # residual projections shrink with depth, as in GPT-2
                residual = name.endswith(("out_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)

    def n_parameters(self) -> int:
        """Number of parameters, the tied embedding and head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs per token, 6·N + 12·n_layers·C·T (PaLM, 2204.02311, appendix B)."""
        config = self.config
        return 6 * self.n_parameters() + 12 * config.n_layers * config.n_embd * config.block_size

    def forward(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: KVCache | None = None,
        sample_targets: bool = False,
    ) -> torch.Tensor:
        """Logits (B, T, V) of ids (B, T), or with targets (B, T) the summed cross-entropy in nats.

        `targets` are shifted by the caller; -100 marks positions without a label.
        `positions` and `cu_seqlens` describe packed rows (see ops/attention.py): the model takes
        the fastest attention that its device and dtype support. Without `cu_seqlens` it is a mask.
        `cache` holds the tokens before `ids` and takes theirs; the caller advances its lengths.
        `sample_targets` draws the labels from the model instead (see ops/cross_entropy.py).
        Raises ValueError when the sequence is longer than `block_size`.
        """
        x = self.hidden(ids, positions, cu_seqlens, cache)
        if targets is None:
            return self.lm_head(x)
        return linear_cross_entropy(
            x.flatten(0, 1), self.lm_head.weight, targets.flatten(), sample_targets
        )

    def hidden(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: KVCache | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Final normalised hidden states (B, T, C); arguments as in `forward`.

        `mask`, (B, 1, T, T) or (1, 1, T, T), is True where a token attends to another. Given it,
        `positions` below `block_size` need not rise along the row, which may be longer.
        """
        T = ids.shape[1]
        if mask is None and T > self.config.block_size:
            raise ValueError(
                f"{T} tokens do not fit the context of {self.config.block_size}: shorten the text"
            )
        x = self.dropout(self.tok_embeddings(ids))  # (B, T, C)
        autocast = torch.is_autocast_enabled(x.device.type)
        compute_dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if mask is not None:
            assert positions is not None and cache is None and cu_seqlens is None
        elif cache is not None:
            positions, mask = cache.positions_and_mask(T)
        elif positions is None:
            positions = torch.arange(T, device=ids.device)
        elif cu_seqlens is None or not uses_segments(x.device, compute_dtype, self.config.head_dim):
            mask, cu_seqlens = document_mask(positions), None
        if compute_dtype == torch.bfloat16:
            x = x.bfloat16()  # the residual stream too: half the memory traffic of compiled steps
        cos = self.rope_cos[positions].unsqueeze(-2)  # (B, T, 1, D), or (T, 1, D) for all rows
        sin = self.rope_sin[positions].unsqueeze(-2)
        inputs = AttentionInputs(cos, sin, positions, mask, cu_seqlens, cache)
        for block in self.layers:
            x = block(x, inputs)
        return self.norm(x)

    @torch.inference_mode()
    def generate(
        self,
        ids: torch.Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.5,
        top_k: int | None = None,
        top_p: float | None = 0.95,
        stop_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
        decoder: Callable[[torch.Tensor, KVCache], torch.Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> list[list[int]]:
        """New token ids of each prompt, without the prompt and without the stop token.

        `ids` is (B, T) or B lists of any lengths. A row ends before a stop token, after
        `max_new_tokens`, or when the context is full. See `sample` for temperature, top_k, top_p.
        `decoder` computes the logits (B, V) after one more token of each row, (B,), and appends
        its keys and values to the cache, as generation/fast_decode.py does; by default it is the
        forward pass. `cache`, of B rows, is overwritten; reuse one to keep its memory.
        Raises ValueError for an empty prompt and for one that does not fit the context.
        """
        prompts = ids.tolist() if isinstance(ids, torch.Tensor) else [list(row) for row in ids]
        sizes = [len(prompt) for prompt in prompts]
        block_size, weight = self.config.block_size, self.tok_embeddings.weight
        if not sizes or min(sizes) == 0:
            raise ValueError("nothing to continue: give at least one token in every prompt")
        if max(sizes) > block_size:
            raise ValueError(
                f"the prompt has {max(sizes)} tokens and the context only {block_size}: shorten it"
            )
        limits = [min(max_new_tokens, block_size + 1 - size) for size in sizes]
        decoder = decoder or self.decode_step
        cache = cache or KVCache.empty(self.config, len(prompts), like=weight)
        rows: list[list[int]] = [[] for _ in prompts]
        active = {row for row, limit in enumerate(limits) if limit > 0}
        was_training = self.training
        self.eval()
        try:
            rows_of_ids = [prompt + [0] * (max(sizes) - len(prompt)) for prompt in prompts]
            ids = torch.tensor(rows_of_ids, device=weight.device)  # causality hides the padding
            cache.lengths.zero_()
            x = self.hidden(ids, cache=cache)
            cache.lengths += torch.tensor(sizes, device=weight.device)
            last = cache.lengths - 1
            logits = self.lm_head(x[torch.arange(len(prompts), device=weight.device), last])
            while active:
                tokens = sample(logits, temperature, top_k, top_p, generator)  # (B,)
                new_tokens = tokens.to("cpu", non_blocking=weight.is_cuda)
                if weight.is_cuda:  # queue the next step before waiting for this one's tokens
                    copy_done = torch.cuda.Event()
                    copy_done.record()
                    logits = self.advance(decoder, tokens, cache)
                    copy_done.synchronize()
                for row, token in enumerate(new_tokens.tolist()):
                    if row in active and token not in stop_tokens:
                        rows[row].append(token)
                    if token in stop_tokens or len(rows[row]) == limits[row]:
                        active.discard(row)
                if active and not weight.is_cuda:
                    logits = self.advance(decoder, tokens, cache)
        finally:
            self.train(was_training)
        return rows

    def decode_step(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B, V) after one more token of each row, (B,); the caller advances the lengths."""
        return self(tokens[:, None], cache=cache)[:, 0]

    def advance(self, decoder: Callable, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B, V) after one more token of each row; advances the lengths."""
        cache.lengths.clamp_(max=self.config.block_size - 1)  # only finished rows are full
        logits = decoder(tokens, cache)
        cache.lengths += 1
        return logits
