"""Writes a GPT as an ONNX folder: one graph for the prompt and for decoding with a KV cache.

    export_onnx(gpt, load_tokenizer(), Path("lille-onnx"), "fp32")

Inputs: `input_ids` (B, T) int64, `past_key_i` and `past_value_i` (B, K, P, D) for each layer i, P
being 0 for the first call. Outputs: `logits` (B, T, V) float32, `present_key_i` and
`present_value_i` (B, K, P + T, D), the past of the next call. B, T and P are free; the rows of a
batch are equally long. P + T is at most block_size.

"fp16" has weights, keys and values in half precision, norms and softmax in fp32. "int8" has its
matrices in 8 bits, a scale for every 32 weights (onnxruntime's MatMulNBits), the rest in fp32.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.errors import UserError
from formats.onnx_runtime import CONFIG, MODEL, OnnxBackend
from formats.verify import (
    Comparison,
    Reference,
    check_packages,
    check_vocabulary,
    float32_copy,
    references,
    written_beside,
)
from formats.verify_hf import check_tokenizer, quiet_transformers
from formats.write_hf import chat_template, tokenizer_config, tokenizer_json, write_text
from model import GPT, apply_rope, rope_tables
from tokenizer import Tokenizer

# Largest difference from the checkpoint's logits as a part of their width, see Comparison.
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-2, "int8": 0.1}
EXTERNAL = MODEL + ".data"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NAMES = (MODEL, CONFIG, *TOKENIZER_FILES)
LARGE = 1 << 30  # bytes; weights beyond this go beside the graph, whose file may have 2 GiB at most
OPSET = 23  # the first with RMSNormalization
ACCURACY_LEVEL = 4  # int8 arithmetic; 0 is as exact as the weights and 25 times slower on a CPU
BLOCK = 32  # weights that share a scale in int8


class QuantizedEmbedding(nn.Module):
    """An embedding in 8 bits with one scale a row: a quarter of the size, rounded alike."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        scales = weight.abs().amax(dim=1, keepdim=True) / 127  # (V, 1)
        rounded = (weight / scales.clamp(min=1e-30)).round()
        self.register_buffer("scales", scales)
        self.register_buffer("weight", rounded.to(torch.int8))  # (V, C)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight).float() * F.embedding(ids, self.scales)


class CachedGPT(nn.Module):
    """A GPT as a function of new ids and earlier keys and values, in operations ONNX has."""

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
        """As model.Attention, the query heads of a KV head side by side: no copies of the cache."""
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
    """Writes the folder `output_dir`, after checking what was written against `gpt`.

    `dtype` is "fp32" (also ""), "fp16" or "int8". Raises UserError for another one, for missing
    packages, and when the check fails; then an earlier `output_dir` is as it was.
    """
    from transformers import AutoTokenizer

    dtype = dtype or "fp32"
    if dtype not in TOLERANCES:
        raise UserError(f"dtype={dtype!r}: ONNX is written as one of {', '.join(TOLERANCES)}")
    check_packages(("onnx", "onnxscript", "onnxruntime"), "ONNX")
    check_vocabulary(gpt, tokenizer)
    gpt = float32_copy(gpt)
    config = gpt.config
    expected = references(gpt, tokenizer)
    with written_beside(Path(output_dir), NAMES, (EXTERNAL,)) as folder:
        write_graph(gpt, folder / MODEL, dtype)
        described = {
            "model_type": "lille-onnx",
            **config.to_dict(),
            "head_dim": config.head_dim,
            "weights": dtype,  # transformers would take "dtype" for one of torch's
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": [tokenizer.eos_id, tokenizer.user_id],
            "pad_token_id": tokenizer.pad_id,
            "tokenizer_sha256": tokenizer.sha256,
        }
        write_json(folder / CONFIG, described)
        write_tokenizer(folder, tokenizer, config.block_size)
        with quiet_transformers():
            check_tokenizer(AutoTokenizer.from_pretrained(folder), tokenizer)
        print(check(folder, expected).verdict(f"ONNX {dtype}", TOLERANCES[dtype]))


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """The files from which transformers' AutoTokenizer makes the tokenizer, as in an hf export."""
    names = dict(zip(("json", "config", "template"), TOKENIZER_FILES, strict=True))
    write_json(folder / names["json"], tokenizer_json(tokenizer))
    write_json(folder / names["config"], tokenizer_config(tokenizer, block_size))
    write_text(folder / names["template"], chat_template())


def write_graph(gpt: GPT, path: Path, dtype: str) -> None:
    """Exports the graph with free batch, sequence and past lengths, and saves it."""
    import onnx

    config = gpt.config
    module = CachedGPT(gpt, dtype)
    kind = torch.float16 if dtype == "fp16" else torch.float32
    shape = (2, config.n_kv_heads, 3, config.head_dim)  # any lengths that differ
    past = [torch.zeros(shape, dtype=kind) for _ in range(2 * config.n_layers)]
    names = [f"{name}_{i}" for i in range(config.n_layers) for name in ("key", "value")]
    batch, sequence, length = map(torch.export.Dim, ("batch", "sequence", "past"))
    with tools_quiet():
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
    for node in model.graph.node:  # the exporter notes lines and paths of this machine's files
        del node.metadata_props[:]
    if dtype == "int8":
        model = quantized(model)
    large = model.ByteSize() > LARGE
    onnx.save_model(
        model,
        path,
        save_as_external_data=large,
        all_tensors_to_one_file=True,
        location=EXTERNAL if large else None,
    )


@contextmanager
def tools_quiet() -> Iterator[None]:
    """Without warnings about torchvision and about names of dimensions, or a line per node.

    onnxruntime's quantizer turns on everybody's INFO messages when imported: that is undone.
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


def quantized(model):
    """The graph with every constant matrix in 8 bits, by onnxruntime's tool."""
    with tools_quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL
        )
        quantizer.process()
    return quantizer.model.model


def check(folder: Path, expected: list[Reference]) -> Comparison:
    """Reads the folder back and compares whole texts, and greedy decoding with the cache."""
    backend, comparison = OnnxBackend(folder, "cpu"), Comparison()
    for reference in expected:
        ids, n_prompt = reference.ids, reference.n_prompt
        comparison.add(reference.logits, backend.all_logits(ids))
        steps = [backend.logits(ids[:n]) for n in range(n_prompt, len(ids) + 1)]
        comparison.add(reference.logits[n_prompt - 1 :], torch.stack(steps))
    return comparison
