"""Contamination: evaluation items that stand in the training shards.

    report = scan([Item("1", "Natalia sold clips to 48 of her friends ...", " 72")], "data/mine")
    report.matches[0]  # Match(id="1", tokens=38, longest=0, covered=0.0, ...)

Every n-gram (13 tokens by default) of an item is looked up in every document and its tokens are
compared, so no match is false. An n-gram does not cross the border of a document. A token is
covered if it is in an n-gram that stands in any document; an item is clean with less than 20 % of
its tokens covered, dirty from 80 % on (Llama 2, arXiv 2307.09288, appendix). The longest match
(ConTAM, arXiv 2411.03923) is contiguous and in one document.

An item is looked up in several spellings, and each figure is that of the best one: without and
with a blank in front, and in conversations also as the user's turn and the assistant's answer, the
control token between them counted as one. Limits: only equal tokens match. Changed case, blanks or
punctuation break a match, a paraphrase or a translation is not found, nor is a part shorter than an
n-gram. A template that all items share counts as part of each, and every document with it costs
milliseconds: give items without it.
"""

import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

import numpy as np

from common.errors import UserError
from dataset import NpzDataset, open_split
from tokenizer import Tokenizer, load_tokenizer

CLEAN, PARTLY, DIRTY, TOO_SHORT = "clean", "partly", "dirty", "too short"
CLEAN_BELOW, DIRTY_FROM = 0.2, 0.8  # share of tokens that are covered
SHORTEST = 8  # tokens of an n-gram, and of an item that can be judged
HELD = ("", "question", "question and gold")

BLOCK = 1 << 16  # tokens read at a time: their hashes stay in the processor's cache
PAIRS = 1 << 19  # pairs of an n-gram in a shard and its equal in an item, held at a time
MULTIPLIER = 0x9E3779B97F4A7C15  # of the polynomial hash: 2^64 / golden ratio, odd
NO_DOCUMENT = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Item:
    """An evaluation item; `gold`, its answer as it follows the question, may be empty."""

    id: str
    question: str
    gold: str


@dataclass(frozen=True)
class Match:
    """The part of an item that stands in the shards."""

    id: str
    tokens: int  # of question and gold
    longest: int  # tokens of the longest contiguous match, 0 below an n-gram
    covered: float  # share of the tokens, by all documents together
    held: str  # one of HELD: of what a single document covers at least 80 %
    shard: str | None  # file name of the first hit, in the order of the shards
    document: int | None  # its number in the shard

    @property
    def status(self) -> str:
        """CLEAN, PARTLY, DIRTY, or TOO_SHORT to judge."""
        if self.tokens < SHORTEST:
            return TOO_SHORT
        if self.covered < CLEAN_BELOW:
            return CLEAN
        return DIRTY if self.covered >= DIRTY_FROM else PARTLY


@dataclass(frozen=True)
class Report:
    """The matches of all items, in their order."""

    matches: list[Match]
    tokens: int  # scanned
    seconds: float

    def counts(self) -> dict[str, int]:
        """Number of items by status."""
        statuses = [match.status for match in self.matches]
        return {status: statuses.count(status) for status in (CLEAN, PARTLY, DIRTY, TOO_SHORT)}


def scan(
    items: Sequence[Item],
    data_dir: str | Path,
    ngram: int = 13,
    split: str = "train",
    progress: Callable[[int, int], None] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Report:
    """Looks up items in the shards of a split, in one pass.

    An item, or its question, with fewer than `ngram` tokens is looked up whole if it has SHORTEST.
    `progress` is called with the tokens scanned and those of the split; `tokenizer` is that of the
    shards, None: Hastings. Memory depends on the items
    and on the hits in a single document, not on the size of the shards. Raises UserError for an
    `ngram` below SHORTEST and for shards that are missing, damaged or of another tokenizer.
    """
    start = time.perf_counter()
    if ngram < SHORTEST:
        raise UserError(f"ngram={ngram} would match common phrases: give at least {SHORTEST}")
    tokenizer = tokenizer or load_tokenizer()
    shards = open_split(data_dir, split, tokenizer.sha256)
    chat = any(tokenizer.bos_id in shard.tokens[:1] for shard in shards)
    search = Search(spellings(items, tokenizer, chat), ngram)
    first_documents = np.cumsum([0] + [len(shard) for shard in shards]).tolist()
    tokens, total = 0, sum(len(shard.tokens) for shard in shards)
    for shard, first_document in zip(shards, first_documents, strict=False):
        for n_tokens in search.scan_shard(shard, first_document):
            tokens += n_tokens
            if progress:
                progress(tokens, total)
    matches = []
    for item, (*figures, held, document) in zip(items, search.results(), strict=True):
        shard, number = None, None
        if document != NO_DOCUMENT:
            i = bisect(first_documents, document) - 1
            shard, number = shards[i].path.name, document - first_documents[i]
        matches.append(Match(item.id, *figures, HELD[held], shard, number))
    return Report(matches, tokens, time.perf_counter() - start)


def spellings(
    items: Sequence[Item], tokenizer: Tokenizer, chat: bool
) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Of each item a list of (ids of question and gold (T,) uint16, how many are the question's).

    The first one is the item as it is. A token across the end of the question is the gold's.
    """
    pairs = [(item.question.lstrip(), item.gold.rstrip()) for item in items]
    pairs = [(blank + question, gold) for question, gold in pairs for blank in ("", " ")]
    questions = tokenizer.encode_batch([question.rstrip() for question, _ in pairs])
    golds = tokenizer.encode_batch([gold.lstrip() for _, gold in pairs])
    wholes = tokenizer.encode_batch([(question + gold).rstrip() for question, gold in pairs])
    turn = np.array([tokenizer.assistant_id], dtype=np.uint16)
    for i in range(0, len(pairs), 2):
        lists = [(questions[j], golds[j], wholes[j]) for j in (i, i + 1)]
        texts = [(w, len(commonprefix([q.tolist(), w.tolist()]))) for q, _, w in lists]
        turns = [(np.concatenate([q, turn, g]), len(q)) for q, g, _ in lists if chat and len(g)]
        yield texts + turns


def window_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """Polynomial hashes of the n-grams of tokens (T,): (T - n + 1,) uint64.

    H_n[i] is the sum of tokens[i + j] MULTIPLIER^(n - 1 - j), modulo 2^64, by doubling:
    H_{a+b}[i] = H_a[i] MULTIPLIER^b + H_b[i + a] with b = a, and b = 1 for the ones in binary n.
    """
    hashes, width = tokens.astype(np.uint64), 1
    for bit in f"{n:b}"[1:]:
        factor = np.uint64(pow(MULTIPLIER, width, 1 << 64))
        hashes, width = hashes[:-width] * factor + hashes[width:], 2 * width
        if bit == "1":
            hashes, width = hashes[:-1] * np.uint64(MULTIPLIER) + tokens[width:], width + 1
    return hashes


def expand(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, j) with low[i] <= j < high[i], in order, as two arrays."""
    counts = high - low
    rows = np.repeat(np.arange(len(low)), counts)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts - low, counts)


def sort_equal(tokens: np.ndarray, starts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorts the starts of n-grams of `tokens` so that equal ones follow each other.

    Returns them, ascending among equal ones, and a mask of those that differ from the one before.
    Where two n-grams have one hash, a group of equal ones may be cut into several.
    """
    hashes = window_hashes(tokens, n)[starts]
    order = np.argsort(hashes, kind="stable")
    hashes, starts = hashes[order], starts[order]
    differs = np.concatenate([[True], hashes[1:] != hashes[:-1]])
    for i in range(n):
        column = tokens[starts + i]
        differs[1:] |= column[1:] != column[:-1]
    return starts, differs


class Search:
    """The spellings of all items as one row of tokens, and what was found of each.

    Their distinct n-grams are looked up by the hash of their first SHORTEST tokens, whatever their
    length, then compared whole.
    """

    def __init__(self, by_item: Iterator[list[tuple[np.ndarray, int]]], ngram: int):
        spelled = [(i, *pair) for i, pairs in enumerate(by_item) for pair in pairs]
        columns = [(i, n_question, len(ids)) for i, ids, n_question in spelled]
        self.item_of, questions, lengths = np.array(columns, dtype=np.int64).reshape(-1, 3).T
        self.row = np.concatenate([np.zeros(0, np.uint16)] + [ids for _, ids, _ in spelled])
        self.bases = np.concatenate([[0], np.cumsum(lengths)])
        self.borders = self.bases[:-1] + questions  # where the gold begins
        self.tokens = lengths[np.searchsorted(self.item_of, self.item_of)]  # of the first spelling
        self.longest, self.held = np.zeros((2, len(spelled)), dtype=np.int64)
        self.first_document = np.full(len(spelled), NO_DOCUMENT)
        self.depth = np.zeros(len(self.row) + 1, dtype=np.int64)  # +1 at a match's begin, -1 at end

        starts: dict[int, list[np.ndarray]] = {}  # by length of the n-gram
        for i in np.flatnonzero(np.minimum(lengths, self.tokens) >= SHORTEST).tolist():
            n, question = min(ngram, int(lengths[i])), int(questions[i])
            places = np.arange(self.bases[i], self.bases[i + 1] - n + 1)
            starts.setdefault(n, []).append(places)
            if SHORTEST <= question < n:
                starts.setdefault(question, []).append(places[:1])
        firsts, sizes, postings = ([np.zeros(0, dtype=np.int64)] for _ in range(3))
        self.step = len(self.row) + 1  # more than any place in the row
        for n in sorted(starts):
            places, is_first = sort_equal(self.row, np.concatenate(starts[n]), n)
            ids = sum(map(len, firsts)) - 1 + np.cumsum(is_first)
            firsts.append(places[is_first])
            sizes.append(np.full(len(firsts[-1]), n))
            postings.append(ids * self.step + places)
        self.firsts, self.sizes = np.concatenate(firsts), np.concatenate(sizes)  # by number
        self.postings = np.concatenate(postings)  # number * step + place of all n-grams, ascending
        hashes = window_hashes(self.row, SHORTEST)[self.firsts]
        self.by_hash = np.argsort(hashes)
        self.hashes = hashes[self.by_hash]
        bits = min(26, len(hashes).bit_length() + 5)  # at most one place in 32 is True
        self.shift = np.uint64(64 - bits)
        self.bitmap = np.zeros(1 << bits, dtype=bool)
        self.bitmap[hashes >> self.shift] = True

    def find(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places and numbers (hits,) of all n-grams that start in the first BLOCK tokens."""
        hashes = window_hashes(tokens, SHORTEST)[:BLOCK]
        places = np.flatnonzero(self.bitmap[(hashes >> self.shift).view(np.int64)])
        low, high = (np.searchsorted(self.hashes, hashes[places], s) for s in ("left", "right"))
        candidates, ranks = expand(low, high)
        places, ids = places[candidates], self.by_hash[ranks]
        fits = places + self.sizes[ids] <= len(tokens)
        places, ids = places[fits], ids[fits]
        equal = np.ones(len(places), dtype=bool)
        for i in range(self.sizes.max(initial=0)):
            i = np.minimum(i, self.sizes[ids] - 1)  # the last token again for shorter ones
            equal &= tokens[places + i] == self.row[self.firsts[ids] + i]
        return places[equal], ids[equal]

    def scan_shard(self, shard: NpzDataset, first_document: int) -> Iterator[int]:
        """Scans a shard, whose documents are numbered from `first_document` on, block by block.

        Yields each block's tokens. The hits of a document are recorded when it ends.
        """
        offsets, size = np.asarray(shard.offsets).astype(np.int64), len(shard.tokens)
        overlap = int(self.sizes.max(initial=1)) - 1
        pending = []
        for start in range(0, size, BLOCK):
            end = min(size, start + BLOCK)
            tokens = read_tokens(shard, start, min(size, end + overlap))
            places, ids = self.find(tokens)
            places += start
            documents = np.searchsorted(offsets, places, "right") - 1
            inside = places + self.sizes[ids] <= offsets[documents + 1]
            pending.append(np.stack([documents + first_document, places, ids])[:, inside])
            border = offsets[np.searchsorted(offsets, end, "right") - 1]
            if border > start:  # a document ends in this block
                hits = np.concatenate(pending, axis=1)
                complete = hits[1] < border
                self.record(hits[:, complete], 0, len(self.item_of))
                pending = [hits[:, ~complete]]
            yield end - start

    def record(self, hits: np.ndarray, first: int, last: int) -> None:
        """Enters the hits (3, N) of whole documents in one shard into spellings first..last - 1."""
        documents, places, ids = hits
        low = np.searchsorted(self.postings, ids * self.step + self.bases[first])
        high = np.searchsorted(self.postings, ids * self.step + self.bases[last])
        middle = (first + last) // 2
        if (high - low).sum() > PAIRS and first < middle:
            self.record(hits, first, middle)
            self.record(hits, middle, last)
            return
        hit, posting = expand(low, high)
        starts = self.postings[posting] % self.step
        # A match goes on where the place in the item and that in the document rise by one.
        keys = (places[hit] - starts) * self.step + starts
        order = np.argsort(keys)
        heads = np.flatnonzero(np.diff(keys[order], prepend=keys.min(initial=0) - 2) > 1)
        ends = np.maximum.reduceat((starts + self.sizes[ids[hit]])[order], heads)
        starts, documents = starts[order[heads]], documents[hit[order[heads]]]
        spelled = np.searchsorted(self.bases, starts, "right") - 1
        np.maximum.at(self.longest, spelled, ends - starts)
        np.minimum.at(self.first_document, spelled, documents)
        np.add.at(self.depth, starts, 1)
        np.add.at(self.depth, ends, -1)
        self.record_held(documents, spelled, starts, ends)

    def record_held(
        self, documents: np.ndarray, spelled: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> None:
        """Enters what single documents hold, from all matches (M,) of each of them."""
        order = np.argsort(documents * self.step + starts)
        documents, spelled = documents[order], spelled[order]
        shift = documents * self.step
        ends = np.maximum.accumulate(ends[order] + shift)
        starts = np.maximum(starts[order] + shift, np.append(0, ends[:-1]))  # each token once
        borders = self.borders[spelled] + shift
        of_question = np.minimum(ends, borders) - np.minimum(starts, borders)
        heads = np.flatnonzero(np.diff(documents * len(self.item_of) + spelled, prepend=-1))
        spelled = spelled[heads]
        question = np.add.reduceat(of_question, heads)
        gold = np.add.reduceat(ends - starts - of_question, heads)
        question = question / np.maximum(1, self.borders[spelled] - self.bases[spelled])
        gold = gold / np.maximum(1, self.bases[spelled + 1] - self.borders[spelled])
        held = (question >= DIRTY_FROM) * (1 + (gold >= DIRTY_FROM))
        np.maximum.at(self.held, spelled, held)

    def results(self) -> Iterator[tuple[int, int, float, int, int]]:
        """Of each item: tokens, longest match, covered share, index into HELD, document."""
        covered = np.concatenate([[0], np.cumsum(np.cumsum(self.depth[:-1]) > 0)])
        shares = np.diff(covered[self.bases]) / np.maximum(1, np.diff(self.bases))
        heads = np.flatnonzero(np.diff(self.item_of, prepend=-1))
        best = [np.maximum.reduceat(x, heads) for x in (self.longest, shares, self.held)]
        columns = [self.tokens[heads], *best, np.minimum.reduceat(self.first_document, heads)]
        return zip(*(column.tolist() for column in columns), strict=True)


def read_tokens(shard: NpzDataset, start: int, end: int) -> np.ndarray:
    """Tokens of a shard, read rather than mapped: pages of a map would stay in memory."""
    tokens = shard.tokens
    if not isinstance(tokens, np.memmap):
        return tokens[start:end]
    offset = tokens.offset + start * tokens.itemsize
    return np.fromfile(shard.path, tokens.dtype, end - start, offset=offset)
