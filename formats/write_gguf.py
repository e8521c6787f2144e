"""Writes a GPT as one GGUF file for llama.cpp and the programs built on it.

    export_gguf(gpt, load_tokenizer(), Path("lille-f16.gguf"), "f16")

The file holds the weights, the tokenizer and the chat template. llama.cpp rotates neighbouring
columns where a Llama of transformers rotates column i with i + D/2, so the rows of q and k are
written in llama.cpp's order. A model with rope_style "lille" is not a Llama and is refused.
"""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from formats.llama import llama_state_dict
from formats.verify import (
    Comparison,
    Reference,
    check_packages,
    check_vocabulary,
    float32_copy,
    references,
    written_beside,
)
from formats.verify_hf import quiet_transformers
from formats.write_hf import chat_template
from model import GPT
from tokenizer import CONTROL_TOKENS, HARD_STRINGS, Tokenizer

# Largest difference from the checkpoint's logits as a part of their width, see Comparison.
TOLERANCES = {"f32": 1e-5, "f16": 2e-2, "q8_0": 0.1}
Q8_BLOCK = 32  # weights of a row that share a scale in q8_0

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def export_gguf(gpt: GPT, tokenizer: Tokenizer, output_file: Path, dtype: str = "f32") -> None:
    """Writes `output_file`, after checking what was written against `gpt`.

    `dtype` is "f32" (also ""), "f16" or "q8_0"; vectors are f32 always. Raises UserError for
    another one, for rope_style "lille", for a missing package, and when the check fails; then an
    earlier `output_file` is as it was.
    """
    dtype = dtype or "f32"
    check_request(gpt, dtype)
    check_vocabulary(gpt, tokenizer)
    gpt = float32_copy(gpt)
    expected = references(gpt, tokenizer)
    with written_beside(Path(output_file), magic=b"GGUF") as path:
        write_file(gpt, tokenizer, path, dtype)
        print(check(path, expected).verdict(f"GGUF {dtype}", TOLERANCES[dtype]))
        check_tokenizer(path, tokenizer)


def check_request(gpt: GPT, dtype: str) -> None:
    if dtype not in TOLERANCES:
        raise UserError(f"dtype={dtype!r}: GGUF is written as one of {', '.join(TOLERANCES)}")
    if gpt.config.rope_style != "llama":
        raise UserError(
            f"a model with rope_style={gpt.config.rope_style!r} cannot be a GGUF: its position "
            "encoding is not a rotation, which llama.cpp has no operation for; use --format=onnx"
        )
    if dtype == "q8_0" and gpt.config.n_embd % Q8_BLOCK:
        raise UserError(
            f"q8_0 needs n_embd to be a multiple of {Q8_BLOCK}, not {gpt.config.n_embd}: use f16"
        )
    check_packages(("gguf", "accelerate"), "GGUF")


def write_file(gpt: GPT, tokenizer: Tokenizer, path: Path, dtype: str) -> None:
    import gguf

    config = gpt.config
    writer = gguf.GGUFWriter(path, "llama")
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name("Lille")
        writer.add_file_type(
            {
                "f32": gguf.LlamaFileType.ALL_F32,
                "f16": gguf.LlamaFileType.MOSTLY_F16,
                "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
            }[dtype]
        )
        if dtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.block_size)
        writer.add_embedding_length(config.n_embd)
        writer.add_block_count(config.n_layers)
        writer.add_feed_forward_length(config.ffn_dim)
        writer.add_head_count(config.n_heads)
        writer.add_head_count_kv(config.n_kv_heads)
        writer.add_layer_norm_rms_eps(config.layer_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        add_tokenizer(writer, tokenizer)
        for name, tensor in gguf_tensors(gpt):
            add_tensor(writer, name, tensor.numpy(), dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_tokenizer(writer, tokenizer: Tokenizer) -> None:
    """GPT-2's kind of tokenizer, whose five last tokens are control tokens.

    No token is put before a text: the chat template writes `<|startoftext|>` itself. An answer ends
    at `<|endoftext|>` (eos) or at `<|user|>` (eot).
    """
    from gguf import TokenType

    settings = json.loads(tokenizer.json_text)
    ids = settings["model"]["vocab"]
    ids |= {token["content"]: token["id"] for token in settings["added_tokens"]}
    kinds = [TokenType.NORMAL] * tokenizer.n_text
    kinds += [TokenType.CONTROL] * (tokenizer.vocab_size - tokenizer.n_text)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(ids, key=ids.get))
    writer.add_token_types(kinds)
    writer.add_token_merges(merge_lines(settings["model"]["merges"]))
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.user_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(gguf_chat_template())


def merge_lines(merges: list) -> list[str]:
    """ "left right" of each merge; newer tokenizer files have pairs instead."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def gguf_chat_template() -> str:
    """The chat template for other Jinja engines and for programs that read its text as a whole.

    llama.cpp makes a control token of every spelling of one in the rendered text, a user's too: so
    a space splits those in a message ("< |user|>"), and nothing else is changed. transformers'
    generation tags, which other engines refuse, are left out.
    """
    lines = chat_template(marked=False).splitlines(keepends=True)
    template = "".join(line for line in lines if "generation -%}" not in line)
    splits = "".join(f'.replace("{name}", "< {name[1:]}")' for name in CONTROL_TOKENS)
    assert template.count("{{- content -}}") == 1, template
    return template.replace("{{- content -}}", f"{{{{- content{splits} -}}}}")


def gguf_tensors(gpt: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every parameter in llama.cpp's terms; the head is the embedding."""
    config, tensors = gpt.config, llama_state_dict(gpt)
    yield "token_embd.weight", tensors["model.embed_tokens.weight"]
    for layer in range(config.n_layers):
        for theirs, name in LAYER_NAMES.items():
            tensor = tensors[f"model.layers.{layer}.{theirs}.weight"]
            if name in ("attn_q", "attn_k"):
                tensor = neighbouring_pairs(tensor, config.head_dim)
            yield f"blk.{layer}.{name}.weight", tensor
    yield "output_norm.weight", tensors["model.norm.weight"]


def neighbouring_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (heads·D, C) of each head reordered from 0, 1, ... to 0, D/2, 1, D/2 + 1, ..."""
    heads = weight.shape[0] // head_dim
    halves = weight.reshape(heads, 2, head_dim // 2, -1)  # (heads, 2, D/2, C)
    return halves.transpose(1, 2).reshape(weight.shape)


def add_tensor(writer, name: str, array: np.ndarray, dtype: str) -> None:
    from gguf import GGMLQuantizationType, quantize

    if dtype == "f32" or array.ndim == 1:
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    elif dtype == "f16":
        writer.add_tensor(name, array.astype(np.float16))
    else:
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)


@torch.inference_mode()
def check(path: Path, expected: list[Reference]) -> Comparison:
    """Reads the file back with transformers, which knows nothing of ours, and compares."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), redirect_stderr(io.StringIO()):  # its progress bar cannot be off
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
    comparison = Comparison()
    for reference in expected:
        comparison.add(reference.logits, model(torch.tensor([reference.ids])).logits[0])
    return comparison


def check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """UserError unless transformers' tokenizer of the file gives the ids of ours."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in HARD_STRINGS:
        if theirs.encode(text, add_special_tokens=False) != tokenizer.encode(text, True):
            raise UserError(f"the GGUF's tokenizer reads {text[:40]!r} in another way")
