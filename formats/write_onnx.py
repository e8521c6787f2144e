"""Writes a GPT as a folder that transformers.js, onnxruntime-genai and onnxruntime load.

    export_onnx(gpt, load_tokenizer(), Path("lille-onnx"), ["fp32", "int8"])

`onnx/` has a graph for each dtype, for the prompt and for decoding with a KV cache. Inputs:
`input_ids` (B, T), `attention_mask` (B, P + T), 0 for padding, and `position_ids` (B, T), all
int64; `past_key_values.i.key` and `.value` (B, K, P, D) for each layer i, P being 0 at first.
Outputs: `logits` (B, T, V) float32, `present.i.key` and `.value` (B, K, P + T, D), the past of the
next call. Positions are below block_size.

"fp16" has weights, keys and values in half precision, norms and softmax in fp32. "int8" and "q4"
have their matrices in 8 and 4 bits, a scale for every 32 weights (onnxruntime's MatMulNBits), and
the embedding in 8, the rest in fp32.
"""

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from formats.atomic_export import atomic_export
from formats.chat_template import plain_chat_template
from formats.llama import llama_config
from formats.model_card import model_card
from formats.onnx_runtime import FILES, OnnxBackend
from formats.pretrained import quiet_transformers
from formats.verify import (
    TOLERANCES,
    Reference,
    check_chat_template,
    check_token_ids,
    compare,
    float32_copy,
    make_references,
    require_packages,
)
from formats.write_hf import (
    generation_config,
    tokenizer_config,
    write_json,
    write_text,
    write_tokenizer,
)
from model import GPT, apply_rope, rope_tables
from tokenizer import Tokenizer

DTYPES = {"fp32": 32, "fp16": 16, "int8": 8, "q4": 4}  # bits of a weight
NAMES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
OPTIONAL = tuple(name + end for name in FILES.values() for end in ("", "_data"))
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGE = 1 << 30  # bytes; more weights are saved beside the graph, whose file may have 2 GiB at most
OPSET = 23  # the first with RMSNormalization
ACCURACY_LEVEL = 4  # int8 arithmetic; 0 is as exact as the weights and 25 times slower on a CPU
BLOCK = 32  # weights that share a scale in int8 and q4
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"


class QuantizedEmbedding(nn.Module):
    """An embedding rounded to 8 bits with one scale per row."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        scales = weight.abs().amax(dim=1, keepdim=True) / 127  # (V, 1)
        rounded = (weight / scales.clamp(min=1e-30)).round()
        self.register_buffer("scales", scales)
        self.register_buffer("weight", rounded.to(torch.int8))  # (V, C)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight).float() * F.embedding(ids, self.scales)


class CachedGPT(nn.Module):
    """A GPT whose keys and values are inputs and outputs, in operations that ONNX has."""

    def __init__(self, gpt: GPT, dtype: str):
        super().__init__()
        self.config, self.layers, self.norm = gpt.config, gpt.layers, gpt.norm
        self.head = gpt.lm_head
        self.embed = gpt.tok_embeddings
        if DTYPES[dtype] <= 8:
            self.embed = QuantizedEmbedding(gpt.lm_head.weight.detach())
        if dtype == "fp16":
            self.half()  # the gpt too, which is a copy
        cos, sin = rope_tables(gpt.config)  # in fp32 always
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ):
        """(B, T), (B, P + T), (B, T) and 2·n_layers (B, K, P, D) -> (B, T, V), and the present."""
        P = past[0].shape[2]
        cos, sin = self.cos[position_ids, None], self.sin[position_ids, None]  # (B, T, 1, D)
        slots = torch.arange(attention_mask.shape[1])
        hidden = (slots > slots[P:, None]) | (attention_mask == 0)[:, None]  # (B, T, P + T)
        hidden = hidden[:, None, None]
        x = self.embed(input_ids)  # (B, T, C)
        present = []
        for layer, block in enumerate(self.layers):
            y, *keys_values = self.attention(
                block.attention, x, cos, sin, hidden, *past[2 * layer : 2 * layer + 2]
            )
            present += keys_values
            x = x + y
            x = x + block.feed_forward(x)
        return self.head(self.norm(x)).float(), *present

    def attention(self, module, x, cos, sin, hidden, past_key, past_value):
        """As model.Attention, but the query heads of a KV head are one matrix: no copies of it."""
        config = self.config
        B, T, _ = x.shape
        heads, kv_heads, width = config.n_heads, config.n_kv_heads, config.head_dim
        group = heads // kv_heads
        qkv = module.qkv_proj(module.norm(x)).view(B, T, heads + 2 * kv_heads, width)
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=2)
        qk = apply_rope(qk.float(), cos, sin, config.rope_style).to(x.dtype)
        q, k = qk.split((heads, kv_heads), dim=2)
        k = torch.cat((past_key, k.transpose(1, 2)), dim=2)  # (B, K, P + T, D)
        v = torch.cat((past_value, v.transpose(1, 2)), dim=2)
        S = k.shape[2]

        q = (q * width**-0.5).transpose(1, 2).reshape(B, kv_heads, group * T, width)
        scores = (q @ k.transpose(2, 3)).view(B, kv_heads, group, T, S).float()
        lowest = torch.finfo(torch.float32).min  # not -inf: padding sees nothing, and is no NaN
        weights = scores.masked_fill(hidden, lowest).softmax(dim=-1).to(x.dtype)
        y = weights.view(B, kv_heads, group * T, S) @ v  # (B, K, H/K·T, D)
        y = y.view(B, heads, T, width).transpose(1, 2).reshape(B, T, heads * width)
        return module.out_proj(y), k, v


def export_onnx(
    gpt: GPT,
    tokenizer: Tokenizer,
    output_dir: Path,
    dtypes: Sequence[str] = ("fp32",),
    facts: dict[str, str] | None = None,
    name: str = "",
) -> None:
    """Writes the folder `output_dir` with a graph for each of `dtypes`, verified against `gpt`.

    `dtypes` are names in DTYPES, `facts` rows of the model card, and `name` the model's id on the
    hub there. Raises UserError for missing packages, and when the verification fails; an earlier
    `output_dir` is then unchanged.
    """
    require_packages(PACKAGES, "ONNX")
    with atomic_export(output_dir, NAMES, OPTIONAL) as folder:
        write_folder(gpt, tokenizer, folder, dtypes)
        card = model_card(gpt, tokenizer, "onnx", ", ".join(dtypes), facts or {}, name)
        write_text(folder / "README.md", card)


def write_folder(gpt: GPT, tokenizer: Tokenizer, folder: Path, dtypes: Sequence[str]) -> None:
    """Writes and verifies the files of an export but its card in `folder`, which is empty."""
    references = make_references(float32_copy(gpt), tokenizer)
    (folder / "onnx").mkdir()
    for dtype in dtypes:
        write_graph(float32_copy(gpt), folder / FILES[dtype], dtype)
    write_configs(gpt, tokenizer, folder, dtypes[0])
    check_tokenizer(folder, tokenizer)
    for dtype in dtypes:
        print(check_graph(folder, references, dtype))


def write_configs(gpt: GPT, tokenizer: Tokenizer, folder: Path, dtype: str) -> None:
    """Writes all other files; onnxruntime-genai will load the graph of `dtype`."""
    config = dataclasses.replace(gpt.config, rope_style="llama")  # RoPE is in the graph
    llama = llama_config(config, tokenizer)
    llama["transformers.js_config"] = {
        "kv_cache_dtype": {"fp16": "float16"},
        "use_external_data_format": {
            path.name.removesuffix("_data"): 1 for path in folder.glob("onnx/*_data")
        },
    }
    write_json(folder / "config.json", llama)
    write_json(folder / "generation_config.json", generation_config(tokenizer))
    write_json(folder / "genai_config.json", genai_config(llama, FILES[dtype]))
    write_tokenizer(folder, tokenizer, config.block_size)
    described = tokenizer_config(tokenizer, config.block_size)  # where transformers.js reads it
    described["chat_template"] = plain_chat_template()
    write_json(folder / "tokenizer_config.json", described)


def genai_config(llama: dict[str, Any], filename: str) -> dict[str, Any]:
    """genai_config.json of onnxruntime-genai for a graph, with greedy decoding."""
    names = {"inputs": PAST, "outputs": PRESENT}
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": llama["head_dim"],
        "hidden_size": llama["hidden_size"],
        "num_attention_heads": llama["num_attention_heads"],
        "num_hidden_layers": llama["num_hidden_layers"],
        "num_key_value_heads": llama["num_key_value_heads"],
        "inputs": inputs,
        "outputs": {"logits": "logits"},
    }
    for side, name in names.items():
        kind = "past" if side == "inputs" else "present"
        for part in ("key", "value"):
            decoder[side][f"{kind}_{part}_names"] = name.format("%d", part)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")
    model = {"type": "llama", "context_length": llama["max_position_embeddings"]}
    search = {
        "do_sample": False,
        "max_length": llama["max_position_embeddings"],
        "past_present_share_buffer": False,
    }
    return {
        "model": {**model, **{name: llama[name] for name in tokens}, "decoder": decoder},
        "search": search,
    }


def write_graph(gpt: GPT, path: Path, dtype: str) -> None:
    """Exports the graph with free batch, sequence and past lengths, and saves it."""
    import onnx

    config = gpt.config
    module = CachedGPT(gpt, dtype)
    past_dtype = torch.float16 if dtype == "fp16" else torch.float32
    B, T, P = 2, 4, 3  # any lengths that differ
    shape = (B, config.n_kv_heads, P, config.head_dim)
    past = [torch.zeros(shape, dtype=past_dtype) for _ in range(2 * config.n_layers)]
    sizes = {"input_ids": T, "attention_mask": P + T, "position_ids": T}
    inputs = [torch.ones((B, size), dtype=torch.long) for size in sizes.values()]
    pairs = [(i, part) for i in range(config.n_layers) for part in ("key", "value")]
    free = torch.export.Dim.DYNAMIC
    with quiet_tools():
        program = torch.onnx.export(
            module,
            (*inputs, past),
            dynamo=True,
            opset_version=OPSET,
            input_names=[*sizes, *(PAST.format(*pair) for pair in pairs)],
            output_names=["logits", *(PRESENT.format(*pair) for pair in pairs)],
            dynamic_shapes=(*[{0: free, 1: free}] * 3, [{0: free, 2: free}] * len(past)),
            verbose=False,
        )
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        axes = value.type.tensor_type.shape.dim
        axes[0].dim_param = "batch"
        if value.name.startswith(("past", "present")):
            axes[2].dim_param = "past" if value.name.startswith("past") else "past + sequence"
        else:
            axes[1].dim_param = "past + sequence" if "mask" in value.name else "sequence"
    names = {value.name for value in model.graph.input}
    for node in model.graph.node:
        del node.metadata_props[:]  # which have the paths of source files
        axes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "Shape" and node.input[0] in names and axes.get("end") == 1:
            node.input[0] = "input_ids"  # has B; transformers.js begins with a past (0, K, 0, D)
    if DTYPES[dtype] <= 8:
        model = quantize(model, DTYPES[dtype])
    large = model.ByteSize() > LARGE
    onnx.save_model(
        model,
        path,
        save_as_external_data=large,
        all_tensors_to_one_file=True,
        location=path.name + "_data" if large else None,
    )


@contextmanager
def quiet_tools() -> Iterator[None]:
    """Turns off warnings, and the exporter's and the quantizer's messages, in the block.

    Importing onnxruntime's quantizer sets the root logger to INFO, which is undone.
    """
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers


def quantize(model: Any, bits: int) -> Any:
    """The graph with its constant matrices in 8 or 4 bits, by onnxruntime's quantizer."""
    with quiet_tools():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            model, bits=bits, block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL
        )
        quantizer.process()
    return quantizer.model.model


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError unless transformers reads the folder's tokenizer and template as ours."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        hf_tokenizer = AutoTokenizer.from_pretrained(folder)
        check_token_ids(lambda text: hf_tokenizer(text, verbose=False)["input_ids"], tokenizer)
        check_chat_template(hf_tokenizer, tokenizer)


def check_graph(folder: Path, references: list[Reference], dtype: str) -> str:
    """Compares a graph, read back, with the references, in one call and with the cache.

    A line about the comparison; UserError when they differ.
    """
    backend = OnnxBackend(folder, "cpu", dtype)
    comparison = compare(references, backend.all_logits)
    for reference in references:
        ids, n_prompt = reference.ids, reference.n_prompt
        steps = [backend.logits(ids[:n]) for n in range(n_prompt, len(ids) + 1)]
        comparison.add(reference.logits[n_prompt - 1 :], torch.stack(steps))
    return comparison.check_or_raise(f"ONNX {dtype}", TOLERANCES[DTYPES[dtype]])
