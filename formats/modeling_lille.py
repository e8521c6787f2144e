"""Lille with the position encoding of its first published weights, for transformers.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`export.py --format=hf` copies this file into the folder of a checkpoint with rope_style="lille",
which is a Llama except for the position encoding: it pairs interleaved columns with half-split
tables. That is not a rotation, so scores depend on absolute positions; where none are given, they
are derived from the attention mask. Requires only transformers, 4.56 or later.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward


class LilleConfig(LlamaConfig):
    model_type = "lille"


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys x (B, heads, T, D) with half-split tables (B, 1, T, D)."""
    rotated = torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1)
    return x * cos + rotated * sin


class LilleAttention(LlamaAttention):
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        cache=None,  # past_key_values since transformers 5.24
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T = hidden_states.shape[:2]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            projection(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
            for projection in projections
        )  # (B, heads, T, D)
        cos, sin = (table[:, None] for table in position_embeddings)  # (B, 1, T, D)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            # a static cache of transformers 4 needs the positions
            cache_kwargs = {"cache_position": kwargs.get("cache_position")}
            k, v = cache.update(k, v, self.layer_idx, cache_kwargs)

        attention_function = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention_function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = attention_function(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(y.reshape(B, T, -1).contiguous()), weights


class LilleForCausalLM(LlamaForCausalLM):
    config_class = LilleConfig

    def __init__(self, config: LilleConfig):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = LilleAttention(config, i)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        """As LlamaForCausalLM.forward, but positions do not count padding on the left."""
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            T = (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[1]
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -T:]
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
