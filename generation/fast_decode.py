"""One decode step, made fast.

    decoder = Decoder(model)                          # or weights="bfloat16", "int8"
    cache = KVCache.empty(model.config, batch, like=model.tok_embeddings.weight)
    ...                                               # a prompt: model(ids, cache=cache)
    logits = decoder(tokens, cache)                   # (B,) -> (B, V)
    cache.lengths += 1

A step at batch 1 reads every weight once and is bound by that, if nothing else costs time. On the
CPU it is therefore one call of decode_step.cpp, compiled when first needed (some seconds, kept in
~/.cache/lille), and on a GPU one CUDA graph. Without a C++ compiler it is plain PyTorch.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from model import GPT, rope_tables
from ops.cpp_build import native_library
from ops.kv_cache import KVCache

# Its sums may be taken in another order than it is written, for speed.
LIBRARY = (
    Path(__file__).with_name("decode_step.cpp"),
    "-ffp-contract=fast",
    "-fassociative-math",
    "-fno-signed-zeros",
)
WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # as in decode_step.cpp
MODES = ("auto", "eager", "compile")
LARGEST_NATIVE_BATCH = 8  # rows; above, PyTorch's matrix products are faster


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("scale", ctypes.c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("attention_norm", "feed_forward_norm")]
    _fields_ += [(name, Matrix) for name in ("qkv", "out", "gate", "up", "down")]


class Model(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("n_embd", "n_layers", "n_heads", "n_kv_heads")]
    _fields_ += [(name, ctypes.c_int64) for name in ("vocab_size", "block_size", "ffn_dim")]
    _fields_ += [("interleaved", ctypes.c_int64), ("weight_type", ctypes.c_int64)]
    _fields_ += [("eps", ctypes.c_float), ("layers", ctypes.POINTER(Layer))]
    _fields_ += [("norm", ctypes.c_void_p), ("embeddings", Matrix)]
    _fields_ += [("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p)]


class NativeStep:
    """The step as one call of decode_step.cpp; `weights` are copied in that type if they differ."""

    def __init__(self, gpt: GPT, native: ctypes.CDLL, weights: torch.dtype):
        self.config, self.native, self.weights = gpt.config, native, weights
        native.decode_step.restype = ctypes.c_int64
        self.tensors: list[torch.Tensor] = []  # what the pointers below point to
        layers = (Layer * gpt.config.n_layers)()
        for layer, block in zip(layers, gpt.layers, strict=True):
            attention, feed_forward = block.attention, block.feed_forward
            layer.attention_norm = self.pointer(attention.norm.weight.float())
            layer.feed_forward_norm = self.pointer(feed_forward.norm.weight.float())
            layer.qkv = self.matrix(attention.qkv_proj.weight)
            layer.out = self.matrix(attention.out_proj.weight)
            layer.gate = self.matrix(feed_forward.gate_proj.weight)
            layer.up = self.matrix(feed_forward.up_proj.weight)
            layer.down = self.matrix(feed_forward.down_proj.weight)
        config, (cos, sin) = gpt.config, rope_tables(gpt.config)
        self.model = Model(
            **{name: getattr(config, name) for name in ("n_embd", "n_layers", "n_heads")},
            **{name: getattr(config, name) for name in ("n_kv_heads", "vocab_size", "block_size")},
            ffn_dim=config.ffn_dim,
            interleaved=config.rope_style == "lille",
            weight_type=WEIGHT_TYPES[weights],
            eps=config.layer_norm_eps,
            layers=layers,
            norm=self.pointer(gpt.norm.weight.float()),
            embeddings=self.matrix(gpt.lm_head.weight),
            cos=self.pointer(cos),
            sin=self.pointer(sin),
        )

    def pointer(self, tensor: torch.Tensor) -> int:
        self.tensors.append(tensor.detach().contiguous())
        return self.tensors[-1].data_ptr()

    def matrix(self, weight: torch.Tensor) -> Matrix:
        """Int8 has one scale per output row, such that the row's largest weight is ±127."""
        weight = weight.detach()
        if self.weights is not torch.int8:
            return Matrix(self.pointer(weight.to(self.weights)), None)
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
        rounded = (weight.float() / scale).round().to(torch.int8)
        return Matrix(self.pointer(rounded), self.pointer(scale))

    def __call__(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        config, batch = self.config, len(tokens)
        shape = (config.n_layers, batch, config.n_kv_heads, config.block_size, config.head_dim)
        lengths, tokens = cache.lengths.contiguous(), tokens.contiguous()
        for part in (cache.keys, cache.values):
            assert part.shape == shape and part.is_contiguous()
        assert tokens.dtype == lengths.dtype == torch.long and len(lengths) == batch
        logits = torch.empty(batch, config.vocab_size)
        wrong = self.native.decode_step(
            ctypes.byref(self.model),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (tokens, lengths)),
            ctypes.c_int64(batch),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (cache.keys, cache.values, logits)),
            ctypes.c_int64(WEIGHT_TYPES[cache.keys.dtype]),
            ctypes.c_int64(torch.get_num_threads()),
        )
        if wrong:
            token, length = int(tokens[wrong - 1]), int(lengths[wrong - 1])
            raise ValueError(
                f"token {token} after {length} others: a token is below {config.vocab_size}, "
                f"and the context holds {config.block_size}"
            )
        return logits


class GraphStep:
    """The step as a CUDA graph, captured again when it is given another cache."""

    def __init__(self, step: Callable[[torch.Tensor, KVCache], torch.Tensor]):
        self.step = step
        self.cache: KVCache | None = None  # the one captured, with lengths of its own

    def capture(self, cache: KVCache) -> None:
        self.cache = KVCache(cache.keys, cache.values, cache.lengths.clone())
        self.tokens = torch.zeros_like(cache.lengths)  # (B,)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what compiles or allocates at first use does so here
            for _ in range(3):  # writes the place that the first step will write
                self.step(self.tokens, self.cache)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step(self.tokens, self.cache)

    def __call__(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if self.cache is None or self.cache.keys is not cache.keys:
            self.capture(cache)
        self.tokens.copy_(tokens)
        self.cache.lengths.copy_(cache.lengths)
        self.graph.replay()
        return self.logits.clone()  # the graph writes the same memory again at the next step


class Decoder:
    """Logits (B, V) after one more token of each row, by the fastest means at hand.

    `mode` "auto" is decode_step.cpp on the CPU where it can be compiled and a CUDA graph on a GPU;
    "eager" is plain PyTorch; "compile" is torch.compile, inside the CUDA graph on a GPU (it takes a
    minute or two, and on the CPU it gains nothing).
    `weights` "bfloat16" or "int8" (CPU only) decode with rounded copies of the weights; all
    arithmetic stays float32, and prompts still run through the model as it is.
    The parameters are those at this moment: make a new one after moving or casting the model.
    Raises ValueError where `weights` cannot be had.
    """

    def __init__(self, gpt: GPT, weights: str | None = None, mode: str = "auto"):
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")
        if weights not in (None, "float32", "bfloat16", "int8"):
            raise ValueError(f"weights={weights!r} must be 'float32', 'bfloat16', 'int8' or None")
        self.gpt, weight = gpt, gpt.lm_head.weight
        dtype = getattr(torch, weights) if weights else weight.dtype
        native = None
        if mode == "auto" and weight.is_cpu and dtype in WEIGHT_TYPES:
            native = native_library(*LIBRARY)
        self.native = NativeStep(gpt, native, dtype) if native else None
        self.rounded = dtype != weight.dtype
        if self.native is None and self.rounded:
            raise ValueError(
                f"weights={weights!r} needs the CPU and a C++ compiler (c++ or g++): install one, "
                "or leave the weights as they are"
            )
        self.step = self.eager
        if mode == "compile":
            self.step = torch.compile(self.eager, dynamic=False, fullgraph=True)
        if weight.is_cuda and mode != "eager":
            self.step = GraphStep(self.step)

    def eager(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self.gpt(tokens[:, None], cache=cache)[:, 0]

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B, V) after `tokens` (B,), whose keys and values the cache takes.

        The caller advances the cache's lengths, all of which must be below block_size.
        """
        few = len(tokens) <= LARGEST_NATIVE_BATCH or self.rounded  # only C++ has those weights
        if self.native and few and cache.keys.is_cpu and cache.keys.dtype in WEIGHT_TYPES:
            return self.native(tokens, cache)
        return self.step(tokens, cache)
