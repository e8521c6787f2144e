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
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as HFTokenizer

from common.errors import UserError
from common.files import atomic_file
from formats.atomic_export import atomic_export
from formats.chat_template import plain_chat_template
from formats.llama import llama_state_dict
from formats.pretrained import quiet_transformers
from formats.verify import (
    TOLERANCES,
    Reference,
    check_token_ids,
    compare,
    float32_copy,
    make_references,
    require_packages,
)
from model import GPT
from tokenizer import ASSISTANT, END_OF_TEXT, START_OF_TEXT, USER, Tokenizer

DTYPES = {"f32": 32, "f16": 16, "q8_0": 8}  # bits of a weight
MARK = "# Written by Lille's export.py:"  # first line of a Modelfile
Q8_BLOCK = 32  # weights of a row that share a scale in q8_0


def export_gguf(gpt: GPT, tokenizer: Tokenizer, output_file: Path, dtype: str = "f32") -> None:
    """Writes `output_file` and verifies it against `gpt`.

    `dtype` is a name in DTYPES; vectors are f32 always. Raises UserError for rope_style "lille",
    for a width that q8_0 cannot have, for a missing package, and when the verification fails; an
    earlier `output_file` is then unchanged. Beside it is a Modelfile for Ollama.
    """
    if gpt.config.rope_style != "llama":
        raise UserError(
            f"a model with rope_style={gpt.config.rope_style!r} cannot be a GGUF: its position "
            "encoding is not a rotation, which llama.cpp has no operation for; use --format=onnx"
        )
    if dtype == "q8_0" and gpt.config.n_embd % Q8_BLOCK:
        raise UserError(
            f"q8_0 needs n_embd to be a multiple of {Q8_BLOCK}, not {gpt.config.n_embd}: use f16"
        )
    require_packages(("gguf", "accelerate"), "GGUF")
    gpt = float32_copy(gpt)
    references = make_references(gpt, tokenizer)
    with atomic_export(output_file, magic=b"GGUF") as path:
        write_file(gpt, tokenizer, path, dtype)
        print(verify_file(path, tokenizer, references, dtype))
    path = output_file.with_suffix(".Modelfile")
    if not path.exists() or path.read_bytes().startswith(MARK.encode()):  # not a user's own
        with atomic_file(path) as file:
            file.write(modelfile(output_file.name, gpt.config.block_size).encode())


def modelfile(name: str, block_size: int) -> str:
    """The text of a Modelfile, with which Ollama makes a model of the GGUF beside it.

    Its template is in Go's language, and cannot mark control tokens that a message spells.
    """
    user, answer = f"{USER}{{{{ .Content }}}}", f"{ASSISTANT}{{{{ .Content }}}}{END_OF_TEXT}"
    turns = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else }}}}{answer}{{{{ end }}}}'
    lines = [
        f"{MARK} delete this line to keep your changes.",
        f"FROM ./{name}",
        f'TEMPLATE """{START_OF_TEXT}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{ASSISTANT}"""',
        f"PARAMETER stop {END_OF_TEXT}",
        f"PARAMETER stop {USER}",
        f"PARAMETER num_ctx {block_size}",
        "PARAMETER temperature 0.5",
        "PARAMETER top_p 0.95",
    ]
    return "\n".join(lines) + "\n"


def write_file(gpt: GPT, tokenizer: Tokenizer | None, path: Path, dtype: str) -> None:
    """Writes `path`; without a tokenizer llama.cpp takes token ids only."""
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
        if tokenizer:
            add_tokenizer(writer, tokenizer)
        else:
            writer.add_tokenizer_model("none")
        for name, tensor in gguf_tensors(gpt):
            add_tensor(writer, name, tensor.numpy(), dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """A byte-level BPE tokenizer, of type "gpt2", with our control tokens.

    Texts get no start token: the chat template writes `<|startoftext|>` itself. An answer ends at
    `<|endoftext|>` (eos) or `<|user|>` (eot).
    """
    from gguf import TokenType

    settings = json.loads(tokenizer.json_text)
    ids = settings["model"]["vocab"]
    ids |= {token["content"]: token["id"] for token in settings["added_tokens"]}
    merges = settings["model"]["merges"]  # "left right", or pairs in files of newer tokenizers
    types = [TokenType.CONTROL if control else TokenType.NORMAL for control in tokenizer.is_control]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(settings))
    writer.add_token_list(sorted(ids, key=ids.get))
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.user_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(plain_chat_template())


def pre_tokenizer_name(settings: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that splits texts into words; UserError if it has none."""
    rule = settings["pre_tokenizer"]
    steps = rule.get("pretokenizers", [rule])
    kinds = [(step["type"], step.get("individual_digits", step.get("use_regex"))) for step in steps]
    if settings["model"]["ignore_merges"]:  # a part of another rule's name
        kinds.append(("ignore_merges", True))
    if kinds == [("ByteLevel", True)]:
        return "gpt-2"
    if kinds == [("Digits", True), ("ByteLevel", True)]:
        return "smollm"
    names = ", ".join(kind for kind, _ in kinds)
    raise UserError(
        f"llama.cpp has no name for this tokenizer's rule ({names}): use another format"
    )


def gguf_tensors(gpt: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors in llama.cpp's convention; without a head, which is the embedding."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, gpt.config.n_layers)
    for llama_name, tensor in llama_state_dict(gpt).items():
        if "q_proj" in llama_name or "k_proj" in llama_name:
            tensor = interleaved_rows(tensor, gpt.config.head_dim)
        yield names.get_name(llama_name, try_suffixes=(".weight",)), tensor


def interleaved_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows (heads·D, C) of each head in the order 0, D/2, 1, D/2 + 1, ..."""
    heads = weight.shape[0] // head_dim
    halves = weight.reshape(heads, 2, head_dim // 2, -1)  # (heads, 2, D/2, C)
    return halves.transpose(1, 2).reshape(weight.shape)


def add_tensor(writer: Any, name: str, array: np.ndarray, dtype: str) -> None:
    from gguf import GGMLQuantizationType, quantize

    if dtype == "f32" or array.ndim == 1:
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    elif dtype == "f16":
        writer.add_tensor(name, array.astype(np.float16))
    else:
        q8_0 = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(np.ascontiguousarray(array), q8_0), raw_dtype=q8_0)


def verify_file(path: Path, tokenizer: Tokenizer, references: list[Reference], dtype: str) -> str:
    """Compares a file, read with transformers, with the references; a line about the comparison.

    Logits and token ids. Raises UserError when they differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with quiet_transformers(), redirect_stderr(io.StringIO()):  # one of its bars stays on
        model = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32).eval()
        hf_tokenizer = AutoTokenizer.from_pretrained(**file)
    # llama.cpp splits texts by the rule's name; transformers does not read it.
    splitting = HFTokenizer.from_str(tokenizer.json_text).pre_tokenizer
    hf_tokenizer.backend_tokenizer.pre_tokenizer = splitting
    comparison = compare(references, lambda ids: model(torch.tensor([ids])).logits[0])
    line = comparison.check_or_raise(f"GGUF {dtype}", TOLERANCES[DTYPES[dtype]])
    check_token_ids(lambda text: hf_tokenizer.encode(text, add_special_tokens=False), tokenizer)
    return line
