"""A GPT as transformers' Llama and back: configuration, tensor names, shapes.

    config = llama_config(gpt.config, load_tokenizer())
    tensors = llama_state_dict(gpt)
    same = gpt_from_llama(config, tensors)

With `rope_style="llama"` a GPT is a Llama whose q, k and v lie in one matrix. One with "lille" has
the same tensors under the model type "lille" (formats/modeling_lille.py computes it). The
original's published folders, model type "lille-130m", keep our own names behind `transformer.`.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from common.errors import UserError
from model import GPT, GPTConfig
from tokenizer import Tokenizer

ORIGINAL_TYPE = "lille-130m"
MODEL_TYPES = ("llama", "lille", ORIGINAL_TYPE)

# Per layer: our name, theirs. The one matrix qkv_proj is their q_proj, k_proj and v_proj.
LAYER_NAMES = {
    "attention.norm": "input_layernorm",
    "attention.out_proj": "self_attn.o_proj",
    "feed_forward.norm": "post_attention_layernorm",
    "feed_forward.gate_proj": "mlp.gate_proj",
    "feed_forward.up_proj": "mlp.up_proj",
    "feed_forward.down_proj": "mlp.down_proj",
}
HEADS = ("lm_head.weight", "transformer.lm_head.weight")  # a folder may repeat the embedding
# What a GPT has no switch for: config.json may leave these out or say just this.
FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "sliding_window": (None,),
}


def llama_config(config: GPTConfig, tokenizer: Tokenizer, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of a model, for transformers 4 and 5 (old and new keys).

    For rope_style "lille" it names the classes of formats/modeling_lille.py.
    """
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.layer_norm_eps,
        "rope_theta": config.rope_theta,
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
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.rope_style == "lille":
        described |= {
            "architectures": ["LilleForCausalLM"],
            "model_type": "lille",
            "auto_map": {
                "AutoConfig": "modeling_lille.LilleConfig",
                "AutoModelForCausalLM": "modeling_lille.LilleForCausalLM",
            },
        }
    return described


def llama_state_dict(gpt: GPT) -> dict[str, torch.Tensor]:
    """The parameters of a GPT under transformers' names; views, the tied embedding once."""
    config, ours = gpt.config, gpt.state_dict()
    kv_dim = config.n_kv_heads * config.head_dim
    tensors = {"model.embed_tokens.weight": ours["tok_embeddings.weight"]}
    for layer in range(config.n_layers):
        old, new = f"layers.{layer}.", f"model.layers.{layer}."
        qkv = ours[old + "attention.qkv_proj.weight"].split((config.n_embd, kv_dim, kv_dim))
        for letter, part in zip("qkv", qkv, strict=True):
            tensors[f"{new}self_attn.{letter}_proj.weight"] = part
        for name, theirs in LAYER_NAMES.items():
            tensors[f"{new}{theirs}.weight"] = ours[f"{old}{name}.weight"]
    return tensors | {"model.norm.weight": ours["norm.weight"]}


def gpt_from_llama(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> GPT:
    """The GPT of a folder's config.json and tensors, in training mode, with the tensors' dtype.

    Raises UserError naming the first thing that a GPT cannot be, or where the two disagree.
    """
    gpt_config = gpt_config_of(config)
    if gpt_config.n_layers > len(tensors):  # a shape of so many layers would take long to make
        raise UserError(
            f"config.json and the tensors disagree: {gpt_config.n_layers} layers, and only "
            f"{len(tensors)} tensors"
        )
    original = config["model_type"] == ORIGINAL_TYPE
    names = original_shapes(gpt_config) if original else llama_shapes(gpt_config)
    embedding = "transformer.tok_embeddings.weight" if original else "model.embed_tokens.weight"
    tensors = {name: tensor for name, tensor in tensors.items() if not is_rope_table(name)}
    heads = {name: names[embedding] for name in HEADS if name in tensors}
    if config.get("tie_word_embeddings") is False and not heads:
        raise UserError(
            "config.json and the tensors disagree: lm_head.weight is missing, and "
            "tie_word_embeddings is false"
        )
    check_tensors(names | heads, tensors)
    for head in heads:
        if not torch.equal(tensors[head], tensors[embedding]):
            raise UserError(f"{head} is not {embedding}: Lille has one matrix for both")

    state = {}
    if original:
        state = {name.removeprefix("transformer."): tensors[name] for name in names}
    else:
        state["tok_embeddings.weight"] = tensors[embedding]
        state["norm.weight"] = tensors["model.norm.weight"]
        for layer in range(gpt_config.n_layers):
            old, new = f"layers.{layer}.", f"model.layers.{layer}."
            qkv = [tensors[f"{new}self_attn.{letter}_proj.weight"] for letter in "qkv"]
            state[old + "attention.qkv_proj.weight"] = torch.cat(qkv)
            for name, theirs in LAYER_NAMES.items():
                state[f"{old}{name}.weight"] = tensors[f"{new}{theirs}.weight"]
    state["lm_head.weight"] = state["tok_embeddings.weight"]
    try:
        gpt = GPT(gpt_config)
    except RuntimeError as error:  # tables for more positions than there is memory
        raise UserError(f"a model of this config.json cannot be made: {error}"[:200]) from None
    gpt.load_state_dict(state)
    dtypes = {tensor.dtype for tensor in state.values()}
    return gpt.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)


def gpt_config_of(config: dict[str, Any]) -> GPTConfig:
    """The shape that a config.json describes; UserError for what a GPT cannot be."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"model_type {kind!r} is none that Lille reads: {', '.join(MODEL_TYPES)}")
    if kind == ORIGINAL_TYPE:
        shape = {
            "n_embd": needed(config, "n_embd", int),
            "n_layers": needed(config, "n_layer", int),
            "n_heads": needed(config, "n_head", int),
            "n_kv_heads": needed(config, "n_kv_heads", int),
            "vocab_size": needed(config, "vocab_size", int),
            "block_size": needed(config, "block_size", int),
            "layer_norm_eps": needed(config, "layer_norm_eps", float),
            "rope_theta": needed(config, "rope_theta", float),
            "rope_style": "lille",
        }
    else:
        rope = config.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise UserError(f"config.json has rope_parameters {rope!r}, not an object")
        kind_of_rope = rope.get("rope_type", rope.get("type", "default"))
        shape = {
            "n_embd": needed(config, "hidden_size", int),
            "n_layers": needed(config, "num_hidden_layers", int),
            "n_heads": needed(config, "num_attention_heads", int),
            "n_kv_heads": needed(config, "num_key_value_heads", int),
            "vocab_size": needed(config, "vocab_size", int),
            "block_size": needed(config, "max_position_embeddings", int),
            "layer_norm_eps": needed(config, "rms_norm_eps", float),
            "rope_theta": needed(rope if "rope_theta" in rope else config, "rope_theta", float),
            "rope_style": kind,
        }
        if kind_of_rope != "default":
            raise UserError(f"rope_type {kind_of_rope!r}: Lille has only the default RoPE")
    for name, allowed in FIXED.items():
        if name in config and config[name] not in allowed:
            raise UserError(f"{name} is {config[name]!r}: Lille has only {allowed[0]!r}")
    try:
        gpt_config = GPTConfig(**shape)
    except ValueError as error:
        raise UserError(str(error)) from None
    widths = {"head_dim": gpt_config.head_dim, "intermediate_size": gpt_config.ffn_dim}
    for name, width in widths.items():
        if config.get(name) not in (None, width):
            raise UserError(f"{name} is {config[name]}: Lille of this shape has {width}")
    return gpt_config


def needed(config: dict[str, Any], name: str, kind: type) -> Any:
    """A number that config.json must have."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        found = f"has {name} {value!r}, not a number" if name in config else f"has no {name}"
        raise UserError(f"config.json {found}")
    if not 0 < value < math.inf:  # not NaN either
        raise UserError(f"config.json has {name} {value!r}: it must be above 0")
    return kind(value)


def llama_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Llama folder."""
    return {name: tuple(tensor.shape) for name, tensor in llama_state_dict(on_meta(config)).items()}


def original_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published folder, which has no lm_head."""
    state = on_meta(config).state_dict()
    return {
        f"transformer.{name}": tuple(tensor.shape)
        for name, tensor in state.items()
        if name != "lm_head.weight"
    }


def on_meta(config: GPTConfig) -> GPT:
    """A model without memory, for its names and shapes."""
    with torch.device("meta"):
        return GPT(config)


def is_rope_table(name: str) -> bool:
    """Whether a tensor is a saved RoPE table, which the configuration determines."""
    return "rotary_emb." in name


def check_tensors(shapes: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]) -> None:
    """UserError with the first tensor that is missing, has another shape or kind, or is extra."""
    for problem in differences(shapes, tensors):
        raise UserError(f"config.json and the tensors disagree: {problem}")


def differences(
    shapes: dict[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]
) -> Iterator[str]:
    for name, shape in shapes.items():
        if name not in tensors:
            yield f"{name} is missing"
            continue
        found = tuple(tensors[name].shape)
        if found != shape:
            yield f"{name} has shape {list(found)}, the configuration says {list(shape)}"
        if tensors[name].dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            yield f"{name} holds {tensors[name].dtype}, not floating-point weights"
    for name in tensors:
        if name not in shapes:
            yield f"{name} is not part of such a model"
