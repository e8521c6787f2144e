"""Next-token logits of a model that `export.py --format=onnx` wrote, by onnxruntime.

    backend = OnnxBackend("lille-onnx")
    logits = backend.logits(ids)  # of the token after ids, (V,)

generation/backends.py has the interface.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from formats.pretrained import CONFIG, read_json
from ops.kv_cache import common_prefix

# The graph of each dtype in a folder, under the names that transformers.js looks for.
FILES = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
    "q4": "onnx/model_q4.onnx",
}
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxBackend:
    """An exported graph; keys and values stay on the device between calls (IO binding).

    Attributes: `folder`, `block_size`, `vocab_size`, `device` ("cpu" or "cuda"), `session`.
    """

    def __init__(self, path: str | Path, device: str | None = None, dtype: str | None = None):
        """`path` is the folder or a graph in it; `device` None is CUDA if onnxruntime has it.

        `dtype` is a name in FILES; None is the first that the folder has. Raises UserError when
        onnxruntime is not installed and for what is not such a folder.
        """
        file = find_graph(Path(path), dtype)
        self.folder = file.parents[1]
        config = read_json(self.folder / CONFIG)
        sizes = [config.get(name) for name in ("max_position_embeddings", "vocab_size")]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise UserError(f"{self.folder / CONFIG} is not one that export.py wrote")
        self.block_size, self.vocab_size = sizes
        self.session = open_session(file, device)
        self.device = "cuda" if "CUDAExecutionProvider" in self.session.get_providers() else "cpu"
        inputs = self.session.get_inputs()
        self.past_names = [value.name for value in inputs if value.name.startswith("past_")]
        self.present_names = [
            name.replace("past_key_values", "present") for name in self.past_names
        ]
        outputs = [value.name for value in self.session.get_outputs()]
        if not self.past_names or set(outputs) != {"logits", *self.present_names}:
            raise UserError(f"{file} is not a model with a KV cache that export.py wrote")

        self.past = next(value for value in inputs if value.name == self.past_names[0])
        self.cached: tuple[list[int], list[Any]] = ([], [])  # ids, and their keys and values

    def no_past(self, rows: int) -> list[Any]:
        """The empty keys and values of a batch."""
        _, kv_heads, _, head_dim = self.past.shape
        empty = np.zeros((rows, kv_heads, 0, head_dim), NUMPY_TYPES[self.past.type])
        return [self.on_device(empty)] * len(self.past_names)

    def on_device(self, array: np.ndarray):
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(array, self.device)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 logits (V,) of the token after `ids` (1 to block_size of them).

        Only the tokens after the longest prefix shared with the previous call are computed, at
        least the last one. Raises ValueError for another number of ids, and for ids that are not
        in the vocabulary.
        """
        ids = [int(token) for token in ids]
        if not 1 <= len(ids) <= self.block_size:
            raise ValueError(f"{len(ids)} ids: the context takes 1 to {self.block_size}")
        n_cached = min(common_prefix(self.cached[0], ids), len(ids) - 1)
        if not all(0 <= token < self.vocab_size for token in ids[n_cached:]):
            raise ValueError(f"an id is not in 0..{self.vocab_size - 1}")
        outputs = self.run([ids[n_cached:]], self.cached_past(n_cached))
        self.cached = (ids, outputs[1:])
        return torch.from_numpy(outputs[0].numpy()[0, -1].astype(np.float32))

    def all_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 logits (T, V) at every position of `ids`, computed in one call, uncached."""
        return torch.from_numpy(self.run([list(ids)], self.no_past(1))[0].numpy()[0]).float()

    def cached_past(self, length: int) -> list[Any]:
        """The first `length` cached keys and values; slicing copies through host memory."""
        ids, values = self.cached
        if length == 0:
            return self.no_past(1)
        if length < len(ids):
            values = [
                self.on_device(np.ascontiguousarray(value.numpy()[:, :, :length]))
                for value in values
            ]
            self.cached = (ids[:length], values)
        return values

    def run(self, rows: Sequence[Sequence[int]], past: list[Any]) -> list[Any]:
        """Logits (B, T, V) of rows of one length on the host, keys and values on the device."""
        binding = self.session.io_binding()
        n_past, n_new = past[0].shape()[2], len(rows[0])
        inputs = {
            "input_ids": rows,
            "attention_mask": [[1] * (n_past + n_new)] * len(rows),
            "position_ids": [range(n_past, n_past + n_new)] * len(rows),
        }
        for name, values in inputs.items():
            binding.bind_cpu_input(name, np.array(values, dtype=np.int64))
        for name, value in zip(self.past_names, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in self.present_names:
            binding.bind_output(name, self.device)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()


def find_graph(path: Path, dtype: str | None) -> Path:
    """The graph of a folder, or `path` if it is one; UserError if there is none."""
    if (path / "model.onnx").is_file():
        raise UserError(f"{path} is an export of an earlier version: export it again")
    if dtype not in (None, *FILES):
        raise UserError(f"dtype={dtype!r}: choose one of {', '.join(FILES)} with the onnx backend")
    path = path.absolute()
    names = FILES.values() if dtype is None else [FILES[dtype]]
    files = [path / name for name in names] if path.is_dir() else [path]
    file = next(filter(Path.is_file, files), files[0])
    for needed in (file, file.parents[1] / CONFIG):
        if not needed.is_file():
            raise UserError(f"{needed} is not there: export a checkpoint with --format=onnx first")
    return file


def open_session(file: Path, device: str | None):
    """The onnxruntime session of a file, with as many threads as torch uses."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(
            "onnxruntime is not installed: pip install -r requirements/export.txt"
        ) from None
    available = onnxruntime.get_available_providers()
    providers = ["CPUExecutionProvider"]
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"device={device!r}: the onnx backend runs on 'cpu' or 'cuda'")
    if device == "cuda" and "CUDAExecutionProvider" not in available:
        raise UserError("this onnxruntime has no CUDA: install onnxruntime-gpu, or use the CPU")
    if device != "cpu" and "CUDAExecutionProvider" in available:
        providers.insert(0, "CUDAExecutionProvider")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; its warnings are about the placement of nodes
    try:
        return onnxruntime.InferenceSession(file, options, providers=providers)
    except Exception as error:  # onnxruntime's own classes derive from Exception alone
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} cannot be loaded by onnxruntime ({reason}): export it again"
        ) from None
