"""Fast decode steps: one C++ call on the CPU, a CUDA graph on a GPU.

    decoder = Decoder(model)                          # or weights="bfloat16", "int8"
    cache = KVCache.empty(model.config, batch, like=model.tok_embeddings.weight)
    ...                                               # a prompt: model(ids, cache=cache)
    logits = decoder(tokens, cache)                   # (B,) -> (B, V)
    cache.lengths += 1

At batch 1 a decode step is memory-bandwidth-bound: it reads every weight once. So that nothing else
costs time, it is one call of decode_step.cpp on the CPU, compiled at its first use (some seconds,
kept in ~/.cache/lille), and one CUDA graph on a GPU. Without a C++ compiler it is plain PyTorch.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from model import GPT, rope_tables
from ops.cpp_build import native_library
from ops.huge_pages import use_huge_pages
from ops.kv_cache import KVCache

# For speed, the compiler may reorder the sums.
LIBRARY = (
    Path(__file__).with_name("decode_step.cpp"),
    "-ffp-contract=fast",
    "-fassociative-math",
    "-fno-signed-zeros",
)
WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # as in decode_step.cpp
BLOCK = 32  # int8 weights that share a scale, as in decode_step.cpp
SHAPE = ("n_embd", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "block_size", "ffn_dim")
LARGEST_NATIVE_BATCH = 8  # rows; PyTorch's matrix products are faster for more


# The structs of decode_step.cpp.


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("scales", ctypes.c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("attention_norm", "feed_forward_norm")]
    _fields_ += [(name, Matrix) for name in ("qkv", "out", "gate", "up", "down")]


class Model(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in (*SHAPE, "interleaved", "weight_type")]
    _fields_ += [("eps", ctypes.c_float), ("layers", ctypes.POINTER(Layer))]
    _fields_ += [("norm", ctypes.c_void_p), ("embeddings", Matrix)]
    _fields_ += [("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p)]


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 (R, C) and bfloat16 scales (R, C / BLOCK) of a matrix, its rows padded with zeros.

    C is rounded up to a multiple of BLOCK. The largest weight of each BLOCK becomes nearly ±127:
    scales are rounded up.
    """
    blocks = F.pad(weight.float(), (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(dim=2).clamp(min=1e-30) / 127
    rounded = scales.bfloat16()
    next_larger = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    rounded = torch.where(rounded < scales, next_larger, rounded)
    return (blocks / rounded[:, :, None]).round().to(torch.int8).flatten(1), rounded


class NativeStep:
    """A decode step as one call of decode_step.cpp.

    The matrices have the dtype `weights`: copies, if it is not the model's.
    """

    def __init__(self, gpt: GPT, native: ctypes.CDLL, weights: torch.dtype):
        self.config, self.native, self.weights = gpt.config, native, weights
        native.decode_step.restype = ctypes.c_int64
        self.tensors: list[torch.Tensor] = []  # owners of the memory behind the pointers
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
            **{name: getattr(config, name) for name in SHAPE},
            interleaved=config.rope_style == "lille",
            weight_type=WEIGHT_TYPES[weights],
            eps=config.layer_norm_eps,
            layers=layers,
            norm=self.pointer(gpt.norm.weight.float()),
            embeddings=self.matrix(gpt.lm_head.weight),
            cos=self.pointer(cos),
            sin=self.pointer(sin),
        )
        use_huge_pages(self.tensors)

    def pointer(self, tensor: torch.Tensor) -> int:
        """Address of the tensor, which is kept alive."""
        self.tensors.append(tensor.detach().contiguous())
        return self.tensors[-1].data_ptr()

    def matrix(self, weight: torch.Tensor) -> Matrix:
        """The weight in the dtype `weights`."""
        weight = weight.detach()
        if self.weights is not torch.int8:
            return Matrix(self.pointer(weight.to(self.weights)), None)
        return Matrix(*map(self.pointer, quantize(weight)))

    def __call__(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        config, batch = self.config, len(tokens)
        shape = (config.n_layers, batch, config.n_kv_heads, config.block_size, config.head_dim)
        lengths, tokens = cache.lengths.contiguous(), tokens.contiguous()
        for tensor in (cache.keys, cache.values):
            assert tensor.shape == shape and tensor.is_contiguous()
        assert tokens.dtype == lengths.dtype == torch.long and len(lengths) == batch
        logits = torch.empty(batch, config.vocab_size)
        bad_row = self.native.decode_step(
            ctypes.byref(self.model),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (tokens, lengths)),
            ctypes.c_int64(batch),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (cache.keys, cache.values, logits)),
            ctypes.c_int64(WEIGHT_TYPES[cache.keys.dtype]),
            ctypes.c_int64(torch.get_num_threads()),
        )
        if bad_row:
            token, length = int(tokens[bad_row - 1]), int(lengths[bad_row - 1])
            raise ValueError(
                f"token {token} after {length} others: a token is below {config.vocab_size}, "
                f"and the context holds {config.block_size}"
            )
        return logits


class GraphStep:
    """A decode step as a CUDA graph, captured again for another cache."""

    def __init__(self, step: Callable[[torch.Tensor, KVCache], torch.Tensor]):
        self.step = step
        self.cache: KVCache | None = None  # the graph's, with lengths of its own

    def capture(self, cache: KVCache) -> None:
        """Records the step on `cache` as a graph."""
        self.cache = KVCache(cache.keys, cache.values, cache.lengths.clone())
        self.tokens = torch.zeros_like(cache.lengths)  # (B,)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # first uses compile and allocate, which a graph cannot record
            for _ in range(3):  # writes the position that the first step will overwrite
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
        return self.logits.clone()  # the next replay overwrites the graph's memory


class Decoder:
    """The fastest available decode step: logits (B, V) after one more token of each row.

    `mode` "auto" is decode_step.cpp on the CPU where it can be compiled and a CUDA graph on a GPU;
    "eager" is plain PyTorch; "compile" is torch.compile, inside the CUDA graph on a GPU (it takes a
    minute or two, and gains nothing on the CPU).
    `weights` "bfloat16" or "int8" (CPU only) decode with rounded copies of the weights, in float32
    or, within blocks of int8, in integers; prompts still run through the model itself.
    Make a new decoder after moving or casting the model: its parameters are bound here.
    Raises ValueError where `weights` are not supported.
    """

    def __init__(self, gpt: GPT, weights: str | None = None, mode: str = "auto"):
        if mode not in ("auto", "eager", "compile"):
            raise ValueError(f"mode={mode!r} must be one of auto, eager, compile")
        if weights not in (None, "float32", "bfloat16", "int8"):
            raise ValueError(f"weights={weights!r} must be 'float32', 'bfloat16', 'int8' or None")
        weight = gpt.lm_head.weight
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
        self.step = gpt.decode_step
        if mode == "compile":
            self.step = torch.compile(self.step, dynamic=False, fullgraph=True)
        if weight.is_cuda and mode != "eager":
            self.step = GraphStep(self.step)

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B, V) after `tokens` (B,), whose keys and values are added to the cache.

        The caller advances the cache's lengths, all of which must be below block_size.
        """
        small = len(tokens) <= LARGEST_NATIVE_BATCH or self.rounded  # only C++ has those weights
        if self.native and small and cache.keys.is_cpu and cache.keys.dtype in WEIGHT_TYPES:
            return self.native(tokens, cache)
        return self.step(tokens, cache)
