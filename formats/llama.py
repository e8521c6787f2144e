"""Conversion between a GPT and transformers' Llama: configuration and tensors.

    config = llama_config(gpt.config, load_tokenizer())
    tensors = llama_state_dict(gpt)
    gpt = gpt_from_llama(config, tensors)

With `rope_style="llama"` a GPT is a Llama whose q, k and v projections are one matrix. One with
"lille" has the same tensors under the model type "lille" (see formats/modeling_lille.py). The
original's published folders, model type "lille-130m", have our own names after `transformer.`.
"""

from typing import Any

import torch

from common.errors import UserError
from model import GPT, GPTConfig
from tokenizer import Tokenizer

ORIGINAL_TYPE = "lille-130m"
MODEL_TYPES = ("llama", "lille", ORIGINAL_TYPE)

# Our name and transformers' name of a layer's weights; qkv_proj is q_proj, k_proj and v_proj.
LAYER_NAMES = {
    "attention.norm": "input_layernorm",
    "attention.out_proj": "self_attn.o_proj",
    "feed_forward.norm": "post_attention_layernorm",
    "feed_forward.gate_proj": "mlp.gate_proj",
    "feed_forward.up_proj": "mlp.up_proj",
    "feed_forward.down_proj": "mlp.down_proj",
}
HEADS = ("lm_head.weight", "transformer.lm_head.weight")  # a folder may repeat the embedding
# Fields of config.json for each field of GPTConfig.
CONFIG_NAMES = {
    "n_embd": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "layer_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
ORIGINAL_CONFIG_NAMES = {name: name for name in CONFIG_NAMES} | {
    "n_layers": "n_layer",
    "n_heads": "n_head",
}
# Features of a Llama that a GPT does not have: config.json omits them or has these values.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "quantization_config": None,
    "sliding_window": None,
}


def llama_config(config: GPTConfig, tokenizer: Tokenizer, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a model, with the keys of transformers 4 and of 5.

    For rope_style "lille" it names the classes of formats/modeling_lille.py.
    """
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: getattr(config, field) for field, name in CONFIG_NAMES.items()},
        "intermediate_size": config.ffn_dim,
        "head_dim": config.head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [tokenizer.eos_id, tokenizer.user_id],
        "pad_token_id": tokenizer.pad_id,
        "tokenizer_sha256": tokenizer.sha256,  # of its JSON in a checkpoint
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.rope_style == "lille":
        llama |= {
            "architectures": ["LilleForCausalLM"],
            "model_type": "lille",
            "auto_map": {
                "AutoConfig": "modeling_lille.LilleConfig",
                "AutoModelForCausalLM": "modeling_lille.LilleForCausalLM",
            },
        }
    return llama


def llama_state_dict(gpt: GPT) -> dict[str, torch.Tensor]:
    """The parameters of a GPT under transformers' names: views, the tied embedding once."""
    config, state = gpt.config, gpt.state_dict()
    kv_dim = config.n_kv_heads * config.head_dim
    tensors = {"model.embed_tokens.weight": state["tok_embeddings.weight"]}
    for layer in range(config.n_layers):
        old, new = f"layers.{layer}.", f"model.layers.{layer}."
        qkv = state[old + "attention.qkv_proj.weight"].split((config.n_embd, kv_dim, kv_dim))
        for letter, weight in zip("qkv", qkv, strict=True):
            tensors[f"{new}self_attn.{letter}_proj.weight"] = weight
        for name, llama_name in LAYER_NAMES.items():
            tensors[f"{new}{llama_name}.weight"] = state[f"{old}{name}.weight"]
    return tensors | {"model.norm.weight": state["norm.weight"]}


def gpt_from_llama(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> GPT:
    """The GPT of a folder's config.json and tensors, in training mode, with the tensors' dtype.

    Raises UserError for a configuration that a GPT cannot have, and if the tensors are not its.
    """
    original = config.get("model_type") == ORIGINAL_TYPE
    embedding = "transformer.tok_embeddings.weight" if original else "model.embed_tokens.weight"
    tensors = {name: tensor for name, tensor in tensors.items() if "rotary_emb." not in name}
    heads = {name: tensors.pop(name) for name in HEADS if name in tensors}
    gpt_config = gpt_config_from(config)
    check_bounds(gpt_config, tensors)
    with torch.device("meta"):  # takes no memory
        check_names_and_shapes(tensors, folder_views(GPT(gpt_config), original))
    if config.get("tie_word_embeddings") is False and not heads:
        raise UserError(
            "config.json and the tensors disagree: lm_head.weight is missing, and "
            "tie_word_embeddings is false"
        )
    for name, head in heads.items():
        if not torch.equal(head, tensors[embedding]):
            raise UserError(f"{name} is not {embedding}: Lille has one matrix for both")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    gpt = GPT(gpt_config).to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    for name, view in folder_views(gpt, original).items():
        view.copy_(tensors[name])
    return gpt


def check_bounds(config: GPTConfig, weights: dict[str, torch.Tensor]) -> None:
    """ValueError for a configuration and weights of which no model can or should be made.

    So that a small file cannot take much time or memory: more than 1,000 layers without weights, a
    tensor with a stride of 0. And weights that are not finite, with which nothing is computed.
    """
    if config.n_layers > max(1000, len(weights)):
        raise ValueError(f"{config.n_layers} layers cannot be made of {len(weights)} tensors")
    for name, tensor in weights.items():
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"{name} holds fewer values than its shape says")
        if not tensor.sum(dtype=torch.float32).isfinite():  # ten times faster than of each
            raise ValueError(f"{name} holds NaN or infinity: take an earlier file")


def folder_views(gpt: GPT, original: bool) -> dict[str, torch.Tensor]:
    """The parameters of a GPT under the names of a folder, the original's or transformers'."""
    if not original:
        return llama_state_dict(gpt)
    state = gpt.state_dict()
    del state["lm_head.weight"]
    return {f"transformer.{name}": tensor for name, tensor in state.items()}


def check_names_and_shapes(
    tensors: dict[str, torch.Tensor], views: dict[str, torch.Tensor]
) -> None:
    """UserError unless `tensors` have the names and shapes of `views`.

    As `load_state_dict(strict=True)` does, but with the names in the folder.
    """
    problems = [f"{name} is missing" for name in views if name not in tensors]
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if name not in views:
            problems.append(f"{name} is not part of such a model")
        elif shape != list(views[name].shape):
            expected = list(views[name].shape)
            problems.append(f"{name} has shape {shape}, the configuration says {expected}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} holds {tensor.dtype}, not floating-point weights")
    if problems:
        rest = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"config.json and the tensors disagree: {', '.join(problems[:3])}{rest}")


def gpt_config_from(config: dict[str, Any]) -> GPTConfig:
    """The configuration that a config.json describes; UserError if a GPT cannot have it."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"model_type {model_type!r} is none that Lille reads: {', '.join(MODEL_TYPES)}"
        )
    rope = config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"rope_type {rope_type!r}: Lille has only the default RoPE")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{name} is {config[name]!r}: Lille has only {value!r}")
    names = ORIGINAL_CONFIG_NAMES if model_type == ORIGINAL_TYPE else CONFIG_NAMES
    numbers = {field: require_number(config | rope, name) for field, name in names.items()}
    try:
        gpt_config = GPTConfig(**numbers, rope_style="llama" if model_type == "llama" else "lille")
    except ValueError as error:
        raise UserError(str(error)) from None
    widths = {"head_dim": gpt_config.head_dim, "intermediate_size": gpt_config.ffn_dim}
    for name, width in widths.items():
        if config.get(name) not in (None, width):
            raise UserError(f"{name} is {config[name]}: Lille of this shape has {width}")
    return gpt_config


def require_number(config: dict[str, Any], name: str) -> int | float:
    """A number that config.json must have."""
    if name not in config:
        raise UserError(f"config.json has no {name}")
    if not isinstance(config[name], int | float):
        raise UserError(f"config.json has {name} {config[name]!r}, not a number")
    return config[name]
