"""The .npz shard format: NpzDataset and open_split read it, ShardWriter writes it.

A shard holds two arrays: `tokens` uint16 (N,) and `offsets` uint64 (documents + 1,); document i is
`tokens[offsets[i]:offsets[i + 1]]`. It is an ordinary .npz (`np.load` reads it), stored without
compression so that the arrays are memory-mapped straight out of the zip; the compressed files of
the original Lille load too. `manifest.json` beside the shards records their tokenizer and sources,
and each file's size and sha256.
"""

import errno
import os
import re
import struct
import tempfile
import tokenize
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import atomic_file, file_sha256, named_errors
from common.manifest import check_manifest, read_manifest

CHUNK = 1 << 20  # values checked or bytes copied at a time
MAX_EXPANSION, FREE_EXPANSION = 100, 1 << 30  # of a compressed array: times, or bytes in any case


class NpzDataset:
    """The documents of one shard: `len(d)`, `d[i]` (uint16, read-only), `d.tokens`, `d.offsets`.

    Arrays of an uncompressed file are `np.memmap`s, so that opening reads the offsets only.
    Compressed arrays are loaded into memory. Raises UserError, with the file's name, unless the
    file is a complete and consistent shard.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.tokens = self._read_array(archive, "tokens")
                self.offsets = self._read_array(archive, "offsets")
        except (UserError, MemoryError):
            raise
        except Exception as error:  # of zipfile, a decompressor or NumPy's parser
            if isinstance(error, OSError) and error.errno:
                hint = ": raise `ulimit -n`" if error.errno == errno.EMFILE else ""
                raise UserError(f"cannot read {self.path}: {error.strerror}{hint}") from None
            raise self._error("is truncated or is not a .npz file") from None
        self._check_offsets()
        self.tokens = self._as_uint16(self.tokens)
        self._plain_tokens = np.asarray(self.tokens)  # slicing a memmap object costs ten times more

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        i %= len(self)
        return self._plain_tokens[int(self.offsets[i]) : int(self.offsets[i + 1])]

    def __reduce__(self):
        return NpzDataset, (str(self.path),)  # a worker process maps the file again

    def _error(self, problem: str) -> UserError:
        return UserError(f"{self.path} {problem}: copy it again, or prepare the dataset again")

    def _read_array(self, archive: zipfile.ZipFile, name: str) -> np.ndarray:
        """One array of the file, memory-mapped if it is stored uncompressed."""
        try:
            info = archive.getinfo(f"{name}.npy")
        except KeyError:
            raise self._error(f"holds no array '{name}'") from None
        try:
            with archive.open(info) as member:
                if np.lib.format.read_magic(member) != (1, 0):  # NumPy's for a short header
                    raise ValueError
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                header_bytes = member.tell()
                if len(shape) != 1 or dtype.kind not in "iu":
                    raise self._error(f"has '{name}' as {dtype} {shape}, not a row of integers")
                if info.file_size != header_bytes + shape[0] * dtype.itemsize:
                    raise self._error(f"has an array '{name}' of the wrong length")
                if info.file_size > max(MAX_EXPANSION * info.compress_size, FREE_EXPANSION):
                    raise self._error(f"has '{name}' compressed more than any text can be")
                if info.compress_type != zipfile.ZIP_STORED or shape[0] == 0:
                    return np.frombuffer(member.read(), dtype, count=shape[0])
        except UserError:
            raise
        except (ValueError, SyntaxError, RecursionError, tokenize.TokenError):
            raise self._error(f"has an array '{name}' that is not in .npy format") from None

        with open(self.path, "rb") as file:  # the local header's extra field may differ from info's
            file.seek(info.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        start = info.header_offset + 30 + name_bytes + extra_bytes + header_bytes
        if start + shape[0] * dtype.itemsize > self.path.stat().st_size:
            raise self._error("is truncated")
        return np.memmap(self.path, dtype=dtype, mode="r", offset=start, shape=shape)

    def _check_offsets(self) -> None:
        offsets, n_tokens = self.offsets, len(self.tokens)
        if len(offsets) == 0 or offsets[0] != 0:
            raise self._error("has offsets that do not start at 0")
        for start in range(0, len(offsets), CHUNK):
            chunk = np.asarray(offsets[start : start + CHUNK + 1])  # one value of overlap
            if (chunk[1:] < chunk[:-1]).any():
                raise self._error("has offsets that decrease")
        if offsets[-1] != n_tokens:
            raise self._error(f"has offsets that end at {offsets[-1]}, not at {n_tokens} tokens")

    def _as_uint16(self, tokens: np.ndarray) -> np.ndarray:
        """Converts ids of another integer type in memory; UserError if one does not fit."""
        if tokens.dtype == np.uint16:
            return tokens
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            if chunk.min() < 0 or chunk.max() > 0xFFFF:
                raise self._error(f"has {tokens.dtype} tokens that do not fit into uint16")
        return tokens.astype(np.uint16)

    def max_id(self) -> int:
        """The largest id of the shard, -1 if it is empty; reads it all."""
        starts = range(0, len(self.tokens), CHUNK)
        return max((int(self._plain_tokens[s : s + CHUNK].max()) for s in starts), default=-1)


class ShardWriter:
    """Collects documents in a temporary file and writes them as shards, in any order.

        with ShardWriter(directory) as writer:
            writer.add_batch(list_of_id_arrays)
            entry = writer.write(directory / "train.npz")

    Memory use is 8 bytes per document (about 40 while writing in another order). The temporary
    file is in `directory`, takes 2 bytes per token and is deleted when the process ends.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._bounds = array("Q", [0])
        with named_errors(self.directory):
            self._file = tempfile.TemporaryFile(dir=self.directory, buffering=CHUNK)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exc_info) -> None:
        try:
            self._file.close()
        except OSError:  # the disk is full: the buffer cannot be flushed, and is not needed
            pass

    @property
    def documents(self) -> int:
        return len(self._bounds) - 1

    @property
    def tokens(self) -> int:
        return self._bounds[-1]

    def lengths(self, order: np.ndarray) -> np.ndarray:
        """The number of tokens of each document in `order`."""
        return np.diff(np.frombuffer(self._bounds, dtype=np.uint64))[order].astype(np.int64)

    def add_batch(self, documents: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Adds documents, each a sequence of ids in 0..65535; ValueError for other values."""
        documents = [np.asarray(ids) for ids in documents]
        if not documents:
            return
        for ids in documents:
            if ids.dtype != np.uint16 and ids.size:
                if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > 0xFFFF:
                    raise ValueError("a document is a row of ids between 0 and 65535")
        ids = np.concatenate(documents, dtype=np.uint16, casting="unsafe")
        self.add_flat(ids, np.cumsum([len(ids) for ids in documents]))

    def add_flat(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """Adds the documents of concatenated ids (N,) uint16; document i ends at `ends[i]`."""
        bounds = ends.astype(np.uint64) + np.uint64(self.tokens)
        with named_errors(self.directory):
            self._file.seek(0, os.SEEK_END)  # `write` may have read elsewhere
            self._file.write(ids.astype("<u2", copy=False).data)
        self._bounds.frombytes(bounds.tobytes())

    def write(self, path: str | Path, order: np.ndarray | None = None) -> dict[str, Any]:
        """Writes all documents, or those in `order`, as the shard `path`, atomically.

        The same documents give the same bytes. Returns the file's entry for the manifest: sha256,
        bytes, documents, tokens.
        """
        path = Path(path)
        bounds = np.frombuffer(self._bounds, dtype=np.uint64)
        if order is None:
            offsets, chunks = bounds, self._all_tokens()
        else:
            offsets = np.zeros(len(order) + 1, dtype=np.uint64)
            np.cumsum(bounds[1:][order] - bounds[:-1][order], out=offsets[1:])
            chunks = self._ordered_tokens(bounds, order)
        with named_errors(path):
            self._file.flush()
            write_npz(path, int(offsets[-1]), chunks, offsets)
            return {
                "sha256": file_sha256(path),
                "bytes": path.stat().st_size,
                "documents": len(offsets) - 1,
                "tokens": int(offsets[-1]),
            }

    def _read(self, start: int, n_bytes: int) -> bytes:
        # Past the buffer, which would read a whole megabyte for every document.
        self._file.raw.seek(start)
        data = self._file.raw.read(n_bytes)
        while len(data) < n_bytes:  # one call returns at most 2 GiB
            rest = self._file.raw.read(n_bytes - len(data))
            assert rest, "the temporary file is too short"
            data += rest
        return data

    def _all_tokens(self) -> Iterator[bytes]:
        total = 2 * self.tokens
        for start in range(0, total, CHUNK):
            yield self._read(start, min(CHUNK, total - start))

    def _ordered_tokens(self, bounds: np.ndarray, order: np.ndarray) -> Iterator[bytes]:
        for i in range(0, len(order), 4096):
            documents = order[i : i + 4096]
            starts, ends = bounds[:-1][documents].tolist(), bounds[1:][documents].tolist()
            for start, end in zip(starts, ends, strict=True):
                yield self._read(2 * start, 2 * (end - start))


def write_npz(path: Path, n_tokens: int, chunks: Iterable[bytes], offsets: np.ndarray) -> None:
    """Streams a shard into `path`, atomically and with a fixed date in the zip."""
    starts = range(0, len(offsets), CHUNK)
    offset_chunks = (offsets[start : start + CHUNK].tobytes() for start in starts)
    members = (
        ("tokens", "<u2", n_tokens, chunks),
        ("offsets", "<u8", len(offsets), offset_chunks),
    )
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, dtype, length, blocks in members:
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            # Padding aligns the mapped array: the fixed part of the local header has 30 bytes, its
            # zip64 field 20, the head of the padding 4.
            padding = -(file.tell() + 30 + len(info.filename) + 20 + 4) % 64
            info.extra = struct.pack("<HH", 0xD935, padding) + bytes(padding)
            with archive.open(info, "w", force_zip64=True) as member:
                header = {"descr": dtype, "fortran_order": False, "shape": (length,)}
                np.lib.format.write_array_header_1_0(member, header)
                for block in blocks:
                    member.write(block)


def open_split(
    data_dir: str | Path,
    split: str,
    tokenizer_sha256: str | None = None,
    vocab_size: int | None = None,
) -> list[NpzDataset]:
    """Opens the shards of a split: `train.npz`, or all of `train-00000-of-00016.npz` and so on.

    With a manifest, the tokenizer, the size of every file and, for a split of up to 1 GiB, its
    sha256 must match. Without one, every id is checked against `vocab_size`. Raises UserError, one
    line with the file and what to do.
    """
    data_dir = Path(data_dir)
    prepare = f"run python prepare_dataset.py --input_file_path=... --output_dir={data_dir}"
    if data_dir == Path("data/fineweb_edu_sample_10BT"):  # the default of train.py
        prepare = "run python prepare_dataset_fineweb.py"
    if data_dir.is_file():
        raise UserError(
            f"{data_dir} is a file, not a dataset directory: prepare it with python "
            f"prepare_dataset.py --input_file_path={data_dir} --output_dir=data/NAME"
        )
    if not data_dir.is_dir():
        raise UserError(f"there is no dataset directory {data_dir}: {prepare}")
    manifest = read_manifest(data_dir)
    names = split_files(data_dir, split, manifest["files"] if manifest else os.listdir(data_dir))
    paths = [data_dir / name for name in names]
    if not paths:
        raise UserError(f"there is no {data_dir / split}.npz: {prepare}")
    if manifest:
        check_manifest(data_dir, manifest, paths, tokenizer_sha256, vocab_size)
    allow_open_files(2 * len(paths))
    shards = [NpzDataset(path) for path in paths]
    if not manifest and vocab_size is not None:
        for shard in shards:
            if (largest := shard.max_id()) >= vocab_size:
                raise UserError(
                    f"{shard.path} has the id {largest}, the vocabulary ends at {vocab_size - 1}: "
                    "it is damaged or of another tokenizer, prepare the dataset again"
                )
    if not any(len(shard.tokens) for shard in shards):
        raise UserError(f"{paths[0]} holds no tokens: {prepare}")
    return shards


def allow_open_files(number: int) -> None:
    """Raises the limit of open files of this process, often 1,024, if `number` more need it.

    A memory map keeps its file open, and a shard has two.
    """
    try:
        import resource
    except ImportError:  # on Windows, where there is no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = number + 512
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(OSError, ValueError):  # not allowed here: opening says so
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def split_files(data_dir: Path, split: str, names: Iterable[str]) -> list[str]:
    """The file names of a split, in order; UserError unless they are one complete set."""
    pattern = re.compile(rf"{re.escape(split)}(?:-([0-9]{{1,9}})-of-([0-9]{{1,9}}))?\.npz")
    shards = sorted(name for name in names if pattern.fullmatch(name))
    if not shards or shards == [f"{split}.npz"]:
        return shards
    total = pattern.fullmatch(shards[0])[2]
    numbers = {name: int(pattern.fullmatch(name)[1] or 0) for name in shards}
    expected = {name: f"{split}-{i:0{len(total)}d}-of-{total}.npz" for name, i in numbers.items()}
    extra = [name for name in shards if name != expected[name] or numbers[name] >= int(total)]
    if extra:
        raise UserError(
            f"{data_dir} has {extra[-1]}, not one of the {int(total)} shards that {shards[0]} "
            "belongs to: remove one of the sets"
        )
    if n_missing := int(total) - len(shards):
        present = set(numbers.values())
        missing = next(i for i in range(int(total)) if i not in present)
        raise UserError(
            f"{data_dir}/{split}-{missing:0{len(total)}d}-of-{total}.npz is missing ({n_missing} "
            f"of {int(total)} are): copy it there, or let the preparation finish"
        )
    return shards
