"""Log-likelihoods of continuations, with every prefix that sequences share computed once.

    scorer = Scorer("checkpoints/best_model.pt")
    scores = scorer.loglikelihoods([("The capital of France is", " Paris"), ...])

The sequences are sorted and laid out as a trie, depth first, in rows of at most ROW_TOKENS tokens:
a token's position is its depth, and it attends to its ancestors and itself. A few-shot prompt, a
question and the beginnings that its choices share are computed once in a row. Logits are computed
only where a continuation is predicted, their log-softmax in float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluation.models import LanguageModel, Lille, open_model
from model import GPT

ROW_TOKENS = 1024

Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation


@dataclass(frozen=True)
class Score:
    """Of a continuation given its context."""

    logprob: float  # natural logarithm of its probability
    greedy: bool  # whether each of its tokens is the most probable one
    n_tokens: int  # that are predicted
    n_bytes: int  # of its text in UTF-8


@dataclass(frozen=True)
class TrieRow:
    """A part of the trie.

    Label n says that the token after place `nodes[n]` of pair `pairs[n]` is `targets[n]`.
    """

    ids: np.ndarray  # (T,)
    positions: np.ndarray  # (T,)
    branches: list[tuple[int, int, list[int]]]  # first place, one after the last, their ancestors
    pairs: np.ndarray  # (L,)
    nodes: np.ndarray  # (L,)
    targets: np.ndarray  # (L,)

    def mask(self) -> np.ndarray:
        """(T, T), True where a place attends to another: itself and its ancestors."""
        mask = np.zeros((len(self.ids), len(self.ids)), dtype=bool)
        for first, end, ancestors in self.branches:
            mask[first:end, ancestors] = True
            mask[first:end, first:end] = np.tri(end - first, dtype=bool)
        return mask


def trie_rows(pairs: Sequence[Pair], row_tokens: int = ROW_TOKENS) -> list[TrieRow]:
    """Rows for all pairs, a pure function of them; only a longer sequence makes a longer row.

    All labels of a pair are in one row. A token without a context is not predicted.
    """
    sequences = [context + continuation[:-1] for context, continuation in pairs]
    rows: list[TrieRow] = []
    ids: list[int] = []
    positions: list[int] = []
    branches: list[tuple[int, int, list[int]]] = []
    labels: list[tuple[int, int, int]] = []
    path: list[int] = []  # the places of the tokens of the sequence before

    def end_row() -> None:
        columns = np.array(labels, dtype=np.int64).reshape(-1, 3).T
        rows.append(TrieRow(np.array(ids), np.array(positions), list(branches), *columns))
        for values in (ids, positions, branches, labels, path):
            values.clear()

    before = np.array([], dtype=np.int64)
    for pair in sorted(range(len(pairs)), key=sequences.__getitem__):
        context, continuation = pairs[pair]
        sequence = np.array(sequences[pair], dtype=np.int64)
        shared = min(shared_length(before, sequence), len(path))
        if ids and len(ids) + len(sequence) - shared > row_tokens:
            end_row()
            shared = 0
        first, end = len(ids), len(ids) + len(sequence) - shared
        del path[shared:]
        if first < end:
            branches.append((first, end, path.copy()))
        ids += sequences[pair][shared:]
        positions += range(shared, len(sequence))
        path += range(first, end)
        predicted = range(max(1, len(context)), len(context) + len(continuation))
        labels += [(pair, path[n - 1], continuation[n - len(context)]) for n in predicted]
        before = sequence
    if labels:
        end_row()
    return rows


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


class Scorer:
    """Log-likelihoods by one model: a `Lille`, a `Peer`, a `GPT`, or a name for `open_model`."""

    def __init__(
        self,
        model: LanguageModel | GPT | str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        row_tokens: int = ROW_TOKENS,
    ):
        if isinstance(model, str | Path):
            model = open_model(str(model), device, dtype)
        self.model = Lille(model) if isinstance(model, GPT) else model
        self.row_tokens = row_tokens

    def loglikelihoods(self, texts: Iterable[tuple[str, str]]) -> list[Score]:
        """Scores of (context, continuation) pairs, in their order.

        What is too long for the model's context is cut at the left of the context. Raises
        ValueError for a continuation that is empty or does not fit itself.
        """
        texts = list(texts)
        scores = self.score_ids([self.fit(*pair) for pair in self.encode(texts)])
        sizes = [len(continuation.encode()) for _, continuation in texts]
        return [Score(*values, size) for values, size in zip(scores, sizes, strict=True)]

    def score_ids(self, pairs: Sequence[Pair]) -> list[tuple[float, bool, int]]:
        """(logprob, greedy, number of predicted tokens) of pairs of token ids that fit."""
        scores = [(0.0, True, 0)] * len(pairs)
        for row in trie_rows(pairs, self.row_tokens):
            for pair, *values in self.score_row(row):
                scores[pair] = tuple(values)
        return scores

    def encode(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Token ids of each pair of texts, as lm-evaluation-harness has them (`_encode_pair`).

        The continuation's are those of both texts together after as many as the context has alone.
        Trailing blanks of a context belong to its continuation.
        """
        contexts = [context.rstrip() for context, _ in texts]
        unique = list(dict.fromkeys(contexts))
        ids_of = dict(zip(unique, self.model.encode(unique), strict=True))
        wholes = self.model.encode([context + continuation for context, continuation in texts])
        ids = [ids_of[context] for context in contexts]
        return [(part, whole[len(part) :]) for part, whole in zip(ids, wholes, strict=True)]

    def encode_chat(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Token ids of pairs of a user's turn and an answer, whose first blank is left out."""
        ids_of = {turn: self.model.prompt_ids(turn, chat=True) for turn, _ in texts}
        answers = self.model.encode([answer.removeprefix(" ") for _, answer in texts])
        return [(ids_of[turn], ids) for (turn, _), ids in zip(texts, answers, strict=True)]

    def fit(self, context: list[int], continuation: list[int]) -> Pair:
        """The pair with the end of its context that fits; ValueError for what cannot be scored."""
        room = self.model.block_size + 1 - len(continuation)
        if not continuation:
            raise ValueError("a continuation is empty: give at least one character")
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit the context of "
                f"{self.model.block_size}: shorten it"
            )
        return context[-room:], continuation

    @torch.inference_mode()
    def score_row(self, row: TrieRow) -> Iterator[tuple[int, float, bool, int]]:
        """(pair, logprob, greedy, number of predicted tokens) of each pair in a row.

        Raises ValueError for logits that are not finite.
        """
        device = self.model.device
        nodes, at = np.unique(row.nodes, return_inverse=True)
        tensors = (torch.from_numpy(x).to(device) for x in (row.ids, row.positions, row.mask()))
        logits = self.model.logits(*tensors, torch.from_numpy(nodes).to(device)).float()  # (N, V)
        at, targets = torch.from_numpy(at).to(device), torch.from_numpy(row.targets).to(device)
        logprobs = logits[at, targets] - logits.logsumexp(dim=1)[at]
        greedy = (logits.argmax(dim=1)[at] == targets).cpu().numpy()
        logprobs = logprobs.cpu().double().numpy()
        pairs, at, counts = np.unique(row.pairs, return_inverse=True, return_counts=True)
        sums = np.bincount(at, logprobs)
        all_greedy = np.bincount(at, greedy) == counts
        if not np.isfinite(sums).all():
            raise ValueError("the model's logits are not finite")
        yield from zip(
            pairs.tolist(), sums.tolist(), all_greedy.tolist(), counts.tolist(), strict=True
        )
