"""Writes a GPT as an ONNX folder: one graph for the prompt and for decoding with a KV cache.

    export_onnx(gpt, load_tokenizer(), Path("lille-onnx"), "fp32")

Inputs: `input_ids` (B, T) int64, `past_key_i` and `past_value_i` (B, K, P, D) for each layer i, P
being 0 for the first call. Outputs: `logits` (B, T, V) float32, `present_key_i` and
`present_value_i` (B, K, P + T, D), the past of the next call. B, T and P are free; the rows of a
batch are equally long. P + T is at most block_size.

"fp16" has weights, keys and values in half precision, norms and softmax in fp32. "int8" has its
matrices in 8 bits, a scale for every 32 weights (onnxruntime's MatMulNBits), the rest in fp32.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from formats.atomic_export import atomic_export
from formats.onnx_runtime import CONFIG, MODEL, OnnxBackend
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
from formats.write_hf import write_json, write_tokenizer
from model import GPT, apply_rope, rope_tables
from tokenizer import Tokenizer

DTYPES = {"fp32": 32, "fp16": 16, "int8": 8}  # bits of a weight
EXTERNAL = MODEL + ".data"
NAMES = (MODEL, CONFIG, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LARGE = 1 << 30  # bytes; more weights are saved beside the graph, whose file may have 2 GiB at most
OPSET = 23  # the first with RMSNormalization
ACCURACY_LEVEL = 4  # int8 arithmetic; 0 is as exact as the weights and 25 times slower on a CPU
BLOCK = 32  # weights that share a scale in int8


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
        if dtype == "int8":
            self.embed = QuantizedEmbedding(gpt.lm_head.weight.detach())
        if dtype == "fp16":
            self.half()  # the gpt too, which is a copy
        cos, sin = rope_tables(gpt.config)  # in fp32 always
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.eval()

    def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor]):
        """ids (B, T) and 2·n_layers tensors (B, K, P, D) -> logits (B, T, V), and the present."""
        T, P = input_ids.shape[1], past[0].shape[2]
        cos, sin = self.cos[P : P + T, None], self.sin[P : P + T, None]  # (T, 1, D)
        hidden = torch.arange(P + T) > torch.arange(P, P + T)[:, None]  # (T, P + T)
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
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(x.dtype)
        y = weights.view(B, kv_heads, group * T, S) @ v  # (B, K, H/K·T, D)
        y = y.view(B, heads, T, width).transpose(1, 2).reshape(B, T, heads * width)
        return module.out_proj(y), k, v


def export_onnx(gpt: GPT, tokenizer: Tokenizer, output_dir: Path, dtype: str = "fp32") -> None:
    """Writes the folder `output_dir` and verifies it against `gpt`.

    `dtype` is a name in DTYPES. Raises UserError for missing packages, and when the verification
    fails; an earlier `output_dir` is then unchanged.
    """
    require_packages(("onnx", "onnxscript", "onnxruntime"), "ONNX")
    gpt = float32_copy(gpt)
    config = gpt.config
    references = make_references(gpt, tokenizer)
    with atomic_export(output_dir, NAMES, (EXTERNAL,)) as folder:
        write_graph(gpt, folder / MODEL, dtype)
        description = {
            "model_type": "lille-onnx",
            **config.to_dict(),
            "head_dim": config.head_dim,
            "weights": dtype,  # transformers would take "dtype" for one of torch's
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": [tokenizer.eos_id, tokenizer.user_id],
            "pad_token_id": tokenizer.pad_id,
            "tokenizer_sha256": tokenizer.sha256,
        }
        write_json(folder / CONFIG, description)
        write_tokenizer(folder, tokenizer, config.block_size)
        print(verify_folder(folder, tokenizer, references, dtype))


def write_graph(gpt: GPT, path: Path, dtype: str) -> None:
    """Exports the graph with free batch, sequence and past lengths, and saves it."""
    import onnx

    config = gpt.config
    module = CachedGPT(gpt, dtype)
    past_dtype = torch.float16 if dtype == "fp16" else torch.float32
    shape = (2, config.n_kv_heads, 3, config.head_dim)  # any lengths that differ
    past = [torch.zeros(shape, dtype=past_dtype) for _ in range(2 * config.n_layers)]
    names = [f"{name}_{i}" for i in range(config.n_layers) for name in ("key", "value")]
    batch, sequence, length = map(torch.export.Dim, ("batch", "sequence", "past"))
    with quiet_tools():
        program = torch.onnx.export(
            module,
            (torch.ones((2, 4), dtype=torch.long), past),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input_ids", *(f"past_{name}" for name in names)],
            output_names=["logits", *(f"present_{name}" for name in names)],
            dynamic_shapes=({0: batch, 1: sequence}, [{0: batch, 2: length}] * len(past)),
            verbose=False,
        )
    model = program.model_proto
    for node in model.graph.node:  # metadata with the paths of source files
        del node.metadata_props[:]
    if dtype == "int8":
        model = quantize(model)
    large = model.ByteSize() > LARGE
    onnx.save_model(
        model,
        path,
        save_as_external_data=large,
        all_tensors_to_one_file=True,
        location=EXTERNAL if large else None,
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


def quantize(model: Any) -> Any:
    """The graph with its constant matrices in 8 bits, by onnxruntime's quantizer."""
    with quiet_tools():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL
        )
        quantizer.process()
    return quantizer.model.model


def verify_folder(
    folder: Path, tokenizer: Tokenizer, references: list[Reference], dtype: str
) -> str:
    """Compares a folder, read back, with the references; a line about the comparison.

    Token ids, chat template, logits in one call and with the cache. Raises UserError when they
    differ.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        hf_tokenizer = AutoTokenizer.from_pretrained(folder)
        check_token_ids(lambda text: hf_tokenizer(text, verbose=False)["input_ids"], tokenizer)
        check_chat_template(hf_tokenizer, tokenizer)
    backend = OnnxBackend(folder, "cpu")
    comparison = compare(references, backend.all_logits)
    for reference in references:
        ids, n_prompt = reference.ids, reference.n_prompt
        steps = [backend.logits(ids[:n]) for n in range(n_prompt, len(ids) + 1)]
        comparison.add(reference.logits[n_prompt - 1 :], torch.stack(steps))
    return comparison.check_or_raise(f"ONNX {dtype}", TOLERANCES[DTYPES[dtype]])
