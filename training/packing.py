"""Packs documents into rows of `block_size` tokens; an epoch trains on every token once.

Documents longer than a row are cut into segments, and the segments are packed best-fit into rows,
over 99.5 % full; attention and positions are confined to a segment (see model.py). The order of an
epoch is a pure function of (seed, epoch), so a position in it is a single number, the row.

    rows = PackedRows(open_split("data/x", "train"), block_size=512, pad_id=tokenizer.pad_id)
    batch = rows.batch(range(0, 16))         # the first 16 rows of the first epoch

Best-fit packing against truncation: Ding et al., "Fewer Truncations Improve Language Modeling",
2404.10830.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.mixture import DataSet, draw_phases, times_in_epoch
from dataset import NpzDataset
from ops.cross_entropy import IGNORE_INDEX

HASHED_TOKENS = 1 << 26  # a dataset of no more is hashed whole, in a fraction of a second


@dataclass(frozen=True)
class ChatFormat:
    """Token ids and label mask of the chat format that tokenizer.py defines."""

    bos_id: int
    user_id: int
    assistant_mask: Callable[[np.ndarray], np.ndarray]  # ids -> True where a token is a label


@dataclass
class Batch:
    """A packed micro-batch; tensors are (B, T) int64, but cu_seqlens (segments + 1, padded) int32.

    `targets` are the next tokens within each segment, IGNORE_INDEX elsewhere; `positions` count
    from 0 in each segment; `cu_seqlens` are the cumulative segment lengths in the flattened batch.
    `seed` is that of dropout and sampled labels; None leaves the random state as it is.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    n_labels: int
    seed: int | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.targets, self.positions, self.cu_seqlens

    def pin_memory(self) -> "Batch":
        pinned = (tensor.pin_memory() for tensor in self.tensors())
        return Batch(*pinned, n_labels=self.n_labels, seed=self.seed)


def cut_documents(offsets: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the segments, each of at most `block_size` tokens, of all documents."""
    offsets = offsets.astype(np.int64)
    counts = -(-np.diff(offsets) // block_size)  # segments of each document, 0 for an empty one
    first_segment = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(first_segment, counts)
    starts = np.repeat(offsets[:-1], counts) + within * block_size
    lengths = np.minimum(np.repeat(offsets[1:], counts) - starts, block_size)
    return starts, lengths


def cut_conversations(
    dataset: NpzDataset, block_size: int, user_id: int
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Starts and lengths of the conversations, numbers of shortened and of dropped ones.

    A conversation that is too long keeps its most recent turns. Its segment then begins one token
    before a user turn; PackedRows writes `<|startoftext|>` there. One whose last turn alone is too
    long is dropped.
    """
    offsets = np.asarray(dataset.offsets, dtype=np.int64)
    starts, lengths = offsets[:-1].copy(), np.diff(offsets)
    n_shortened = n_dropped = 0
    for i in np.flatnonzero(lengths > block_size):
        turns = offsets[i] + np.flatnonzero(dataset[i] == user_id) - 1
        fitting = turns[offsets[i + 1] - turns <= block_size]
        n_shortened, n_dropped = n_shortened + bool(len(fitting)), n_dropped + (not len(fitting))
        starts[i] = fitting[0] if len(fitting) else offsets[i + 1]
        lengths[i] = offsets[i + 1] - starts[i]
    fits = lengths > 0
    return starts[fits], lengths[fits], n_shortened, n_dropped


def pack(
    lengths: np.ndarray, block_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: (order, borders); row r holds segments order[borders[r]:borders[r + 1]].

    Segments of one length are interchangeable, so all of them are placed at once: into the fullest
    rows with space first, into new rows last. `rng` decides
    which segments share a row, and the order of the rows.
    """
    shuffled = rng.permutation(len(lengths))
    segments = shuffled[np.argsort(-lengths[shuffled], kind="stable")]  # longest first
    row_of = np.empty(len(segments), dtype=np.int64)
    room: list[list[np.ndarray]] = [[] for _ in range(block_size + 1)]  # rows by free positions
    n_rows = n_placed = 0
    counts = np.bincount(lengths, minlength=block_size + 1)
    for length in np.flatnonzero(counts)[::-1].tolist():
        remaining = int(counts[length])
        while remaining:
            free = next((c for c in range(length, block_size + 1) if room[c]), block_size)
            per_row = free // length
            n_needed = -(-remaining // per_row)
            if room[free]:
                rows = np.concatenate(room[free])
                room[free] = [rows[n_needed:]] if len(rows) > n_needed else []
                rows = rows[:n_needed]
            else:
                rows = np.arange(n_rows, n_rows + n_needed)
                n_rows += n_needed
            n = min(remaining, len(rows) * per_row)
            row_of[n_placed : n_placed + n] = np.repeat(rows, per_row)[:n]
            in_last = n - (len(rows) - 1) * per_row
            room[free - in_last * length].append(rows[-1:])
            if len(rows) > 1:
                room[free - per_row * length].append(rows[:-1])
            n_placed, remaining = n_placed + n, remaining - n
    row_of = rng.permutation(n_rows)[row_of]
    by_row = np.argsort(row_of, kind="stable")
    borders = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=n_rows))))
    return segments[by_row], borders


class PackedRows:
    """All shards of a split as an endless sequence of packed rows, epoch after epoch.

    Row numbers run on across epochs, of `rows_per_epoch` rows each. Every epoch packs the segments
    anew: each once, or as often as the weights of `sources`, the data set of each shard, say (see
    mixture.py). Epochs of a weight that is not whole differ by some rows; `n_epochs` of them are
    planned at once. `chat` selects conversations, which are never cut in the middle.
    """

    def __init__(
        self,
        datasets: Sequence[NpzDataset],
        block_size: int,
        pad_id: int,
        seed: int = 0,
        chat: ChatFormat | None = None,
        sources: Sequence[DataSet] | None = None,
        n_epochs: int = 1,
    ):
        self.block_size, self.pad_id, self.seed, self.chat = block_size, pad_id, seed, chat
        self.tokens = [np.asarray(dataset.tokens) for dataset in datasets]  # cheap to slice
        self.bases = np.cumsum([0] + [len(tokens) for tokens in self.tokens])
        self.n_documents = sum(len(dataset) for dataset in datasets)
        self.n_shortened = self.n_dropped = 0
        starts, lengths = [], []
        for dataset, base in zip(datasets, self.bases, strict=False):
            if chat is None:
                s, n = cut_documents(np.asarray(dataset.offsets), block_size)
            else:
                s, n, shortened, dropped = cut_conversations(dataset, block_size, chat.user_id)
                self.n_shortened += shortened
                self.n_dropped += dropped
            starts.append(s + base)
            lengths.append(n)
        self.starts, self.lengths = np.concatenate(starts), np.concatenate(lengths)
        self.set_weights(sources or [DataSet("data")] * len(datasets), list(map(len, lengths)))
        self.plan(n_epochs)

    def set_weights(self, sources: Sequence[DataSet], n_segments: list[int]) -> None:
        """The data set of each segment, and what decides in which epochs it is seen."""
        self.sets = list(dict.fromkeys(sources))
        self.shard_weights = [source.weight for source in sources]
        self.weighted = set(self.shard_weights) != {1.0}
        set_of_shard = np.array([self.sets.index(source) for source in sources], dtype=np.int16)
        self.set_of = np.repeat(set_of_shard, n_segments)
        self.weights = np.array([data_set.weight for data_set in self.sets])
        self.phases = np.zeros(len(self.starts))
        for i in np.flatnonzero(self.weights % 1).tolist():
            mine = np.flatnonzero(self.set_of == i)
            rng = np.random.default_rng((self.seed, i, 1))
            self.phases[mine] = draw_phases(self.lengths[mine], rng)
        # Lengths alone decide which lengths share a row, so epochs of the same segments are alike.
        self.differ = bool((self.weights % 1).any())  # the epochs

    def plan(self, n_epochs: int) -> None:
        """Packs the epochs for their numbers of rows and tokens; one of them if all are alike.

        Sets `shares`, the tokens of each data set in an epoch, in the mean over epochs.
        """
        self.epoch, self.first_rows, self.max_segments = -1, [0], 0
        n_tokens = np.zeros(len(self.sets))
        for epoch in range(n_epochs if self.differ else 1)[::-1]:
            self.plan_epoch(epoch)
            self.first_rows.insert(1, len(self.borders) - 1)
            segments = int(np.diff(self.borders).max(initial=0)) + 1  # with padding
            self.max_segments = max(self.max_segments, segments)
            lengths = self.lengths[self.order]
            n_tokens += np.bincount(self.set_of[self.order], lengths, len(self.sets))
        self.first_rows = np.cumsum(self.first_rows).tolist()
        means = n_tokens / (len(self.first_rows) - 1)
        self.shares: dict[DataSet, float] = dict(zip(self.sets, means.tolist(), strict=True))
        self.rows_per_epoch = self.first_rows[1]  # of the first one

    def rows_of(self, n_epochs: int) -> int:
        """The number of rows of the first `n_epochs` epochs."""
        return self.first_rows[n_epochs] if self.differ else self.rows_per_epoch * n_epochs

    @property
    def description(self) -> str:
        """Numbers of documents and tokens; must match on resume."""
        return f"{self.n_documents:,} documents, {int(self.bases[-1]):,} tokens"

    def fingerprint(self) -> str:
        """Hash of the document boundaries and 4,096 tokens a shard; and, if not too many, of all.

        Checkpoints of before 2026-11-25 have the first part alone.
        """
        sampled = hashlib.sha256(self.starts.tobytes() + self.lengths.tobytes())
        every = hashlib.sha256()
        for tokens in self.tokens:
            sample = np.linspace(0, len(tokens) - 1, num=min(4096, len(tokens)), dtype=np.int64)
            sampled.update(tokens[sample].tobytes())
            if self.bases[-1] <= HASHED_TOKENS:
                every.update(tokens)
        if self.weighted:
            sampled.update(repr(self.shard_weights).encode())
        if self.differ:  # which of them are drawn together
            sampled.update(self.set_of.tobytes())
        parts = [sampled, every] if self.bases[-1] <= HASHED_TOKENS else [sampled]
        return "-".join(part.hexdigest()[:16] for part in parts)

    @property
    def fill(self) -> float:
        """Share of the token positions of an epoch's rows that hold a token."""
        rows = self.first_rows[-1] / (len(self.first_rows) - 1)  # the mean over planned epochs
        return sum(self.shares.values()) / max(1, rows * self.block_size)

    def plan_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        rng = np.random.default_rng((self.seed, epoch))
        if not self.weighted:
            self.order, self.borders = pack(self.lengths, self.block_size, rng)
        else:
            times = times_in_epoch(self.weights[self.set_of], self.phases, epoch)
            segments = np.repeat(np.arange(len(times)), times)
            order, self.borders = pack(self.lengths[segments], self.block_size, rng)
            self.order = segments[order]
        self.epoch = epoch

    def segments(self, row: int) -> list[np.ndarray]:
        """The token ids of the segments of a row."""
        if self.differ:
            epoch = int(np.searchsorted(self.first_rows, row, side="right")) - 1
            row -= self.first_rows[epoch]
        else:
            epoch, row = divmod(row, self.rows_per_epoch)
        self.plan_epoch(epoch)
        arrays = []
        for segment in self.order[self.borders[row] : self.borders[row + 1]]:
            start, length = self.starts[segment], self.lengths[segment]
            shard = int(np.searchsorted(self.bases, start, side="right")) - 1
            begin = start - self.bases[shard]
            ids = np.array(self.tokens[shard][begin : begin + length], dtype=np.int64)
            if self.chat is not None:
                ids[0] = self.chat.bos_id  # already so, unless earlier turns were dropped
            arrays.append(ids)
        return arrays

    def batch(self, rows: Iterable[int | None]) -> Batch:
        """The batch of these rows; None is a row of padding, without labels."""
        rows = list(rows)
        shape = (len(rows), self.block_size)
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        borders = []
        for r, row in enumerate(rows):
            end = 0
            for segment in self.segments(row) if row is not None else []:
                start, end = end, end + len(segment)
                borders.append(r * self.block_size + start)
                ids[r, start:end] = segment
                positions[r, start:end] = np.arange(len(segment))
                labels = segment[1:]
                if self.chat is not None:
                    labels = np.where(self.chat.assistant_mask(segment)[1:], labels, IGNORE_INDEX)
                targets[r, start : end - 1] = labels
            if end < self.block_size:  # the padding is a segment of its own
                borders.append(r * self.block_size + end)
                positions[r, end:] = np.arange(self.block_size - end)
        # Of the same length in every batch, so that a model is compiled once.
        cu_seqlens = np.full(len(rows) * self.max_segments + 1, ids.size, dtype=np.int32)
        cu_seqlens[: len(borders)] = borders
        arrays = map(torch.from_numpy, (ids, targets, positions, cu_seqlens))
        return Batch(*arrays, n_labels=int((targets != IGNORE_INDEX).sum()))

    def steps(
        self,
        first_row: int,
        end_row: int,
        batch_size: int,
        accumulation: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[list[Batch]]:
        """Yields the micro-batches of each optimizer step; the last one is filled with padding.

        A step has `accumulation` micro-batches, dealt to the ranks in turn: this rank has every
        `world_size`-th from `rank` on. Each has a seed of its own, a pure function of its place in
        the data, so that a run is the same on any number of ranks and after any resume.
        """
        for start in range(first_row, end_row, batch_size * accumulation):
            batches = []
            for i in range(rank, accumulation, world_size):
                first = start + i * batch_size
                rows = range(first, first + batch_size)
                batch = self.batch([row if row < end_row else None for row in rows])
                (seed,) = np.random.SeedSequence((self.seed, first)).generate_state(1, np.uint64)
                batch.seed = int(seed)
                batches.append(batch)
            yield batches
