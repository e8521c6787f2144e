"""Contamination: planted copies are found where they are, nothing else, as brute force has it."""

import random
from bisect import bisect
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from dataset import ShardWriter
from evaluation import contamination
from evaluation.contamination import Item, Match, Report, scan
from tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
WORDS = (
    "cat river seven blue Monday glass engine quietly under 42 market, seed. window north".split()
)
BORDER = chr(65535)  # no token


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch):
    """Saves loading it for every scan."""
    monkeypatch.setattr(contamination, "load_tokenizer", lambda: TOKENIZER)


def phrase(rng: random.Random, n: int) -> str:
    """`n` words drawn from so many that no 13-gram is likely to come twice."""
    return " ".join(f"{rng.choice(WORDS)} {rng.choice('abcdefghijklmnop')}" for _ in range(n // 2))


def write_shards(directory: Path, *shards: list[np.ndarray | list[int]]) -> Path:
    directory.mkdir(exist_ok=True)
    for i, documents in enumerate(shards):
        with ShardWriter(directory) as writer:
            writer.add_batch(documents)
            writer.write(directory / f"train-{i:05d}-of-{len(shards):05d}.npz")
    return directory


def text_ids(*texts: str) -> list[np.ndarray]:
    ids, ends = TOKENIZER.encode_documents(texts)
    return np.split(ids, ends[:-1])


def as_characters(ids: list[int] | np.ndarray) -> str:
    """A string with one character a token, so that str.find looks for tokens."""
    return "".join(map(chr, ids))


def brute_force(
    items: list[Item], shards: list[list[np.ndarray]], chat: bool, ngram: int = 13
) -> list[Match]:
    """The matches by substring search for every n-gram of every spelling."""
    documents = [(shard, i) for shard, list_ in enumerate(shards) for i in range(len(list_))]
    texts = [as_characters(document) for list_ in shards for document in list_]
    corpus = BORDER.join(texts) + BORDER
    begins = [0]
    for text in texts:
        begins.append(begins[-1] + len(text) + 1)

    @cache
    def occurrences(part: str) -> list[int]:
        places = [corpus.find(part)]
        while places[-1] >= 0:
            places.append(corpus.find(part, places[-1] + 1))
        return places[:-1]

    def common_length(a: str, b: str) -> int:
        return next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )

    def share(covered: set[int], low: int, high: int) -> float:
        return sum(i in covered for i in range(low, high)) / (high - low) if high > low else 0.0

    matches = []
    for item in items:
        sequences = []
        for blank in ("", " "):
            question = as_characters(TOKENIZER.encode(blank + item.question))
            whole = as_characters(TOKENIZER.encode(blank + item.question + item.gold))
            border = common_length(question, whole)
            sequences.append((whole, border))
            if chat and item.gold:
                gold = as_characters([TOKENIZER.assistant_id, *TOKENIZER.encode(item.gold.strip())])
                sequences.append((question + gold, len(question)))
        tokens, longest, covered, held, hits = len(sequences[0][0]), 0, 0.0, 0, []
        for ids, border in sequences if tokens >= 8 else ():
            n = min(ngram, len(ids))
            windows = [(i, i + n) for i in range(len(ids) - n + 1) if n >= 8]
            windows += [(0, border)] if 8 <= border < n else []
            by_document: dict[int, set[int]] = {}
            for low, high in windows:
                for place in occurrences(ids[low:high]):
                    document = bisect(begins, place) - 1
                    by_document.setdefault(document, set()).update(range(low, high))
                    hits.append(document)
                    size = high - low
                    if size == n:
                        size = common_length(ids[low:], corpus[place : place + len(ids) - low])
                    longest = max(longest, size)
            for tokens_of in by_document.values():
                has_question = share(tokens_of, 0, border) >= 0.8
                held = max(held, has_question * (1 + (share(tokens_of, border, len(ids)) >= 0.8)))
            union = set().union(*by_document.values())
            covered = max(covered, share(union, 0, len(ids)))
        shard, document = documents[min(hits)] if hits else (None, None)
        name = None if shard is None else f"train-{shard:05d}-of-{len(shards):05d}.npz"
        matches.append(
            Match(item.id, tokens, longest, covered, contamination.HELD[held], name, document)
        )
    return matches


def phrase_corpus(seed: int, n_documents: int) -> tuple[list[Item], list[list[str]]]:
    """Items and texts of two shards from the same phrases, so that they overlap in many ways."""
    rng = random.Random(seed)
    pool = [phrase(rng, rng.randint(2, 16)) for _ in range(150)]

    def text(n: int) -> str:
        return " ".join(rng.choice(pool) for _ in range(n))

    items = []
    for i in range(70):
        gold = rng.choice(["", " 42", "th", " " + text(rng.randint(1, 3))])
        items.append(Item(f"i{i}", text(rng.randint(1, 5)), gold))
    lists = [[text(rng.randint(1, 40)) for _ in range(n_documents)] for _ in range(2)]
    for i in range(0, n_documents, 8):  # whole items, at the begin, inside and at the end
        item = rng.choice(items)
        copy = item.question + item.gold
        lists[i % 2][i] = rng.choice([copy, f"{copy} {text(3)}", f"{text(3)} {copy}"])
        lists[i % 2][i + 1] = f"{text(2)} {copy} {text(2)} {copy} {copy}"
    items += [Item("late", phrase(rng, 30), " 7"), Item("absent", phrase(rng, 30), "")]
    lists[1][5] += " " + items[-2].question
    return items, lists


@pytest.mark.parametrize("block, pairs", [(1 << 16, 1 << 19), (61, 30)])
def test_equals_brute_force(tmp_path, monkeypatch, block, pairs):
    monkeypatch.setattr(contamination, "BLOCK", block)
    monkeypatch.setattr(contamination, "PAIRS", pairs)
    items, lists = phrase_corpus(0, 800 if block > 1000 else 80)
    shards = [text_ids(*texts) for texts in lists]
    ours = scan(items, write_shards(tmp_path, *shards))
    assert ours.tokens == sum(len(ids) for documents in shards for ids in documents)
    assert ours.tokens > (200_000 if block > 1000 else 15_000)
    theirs = brute_force(items, shards, chat=False)
    assert ours.matches == theirs
    assert {match.held for match in theirs} == set(contamination.HELD)
    assert all(0 < count < len(items) for count in ours.counts().values())
    assert len({match.longest for match in theirs}) > 20
    names = [f"train-0000{i}-of-00002.npz" for i in (0, 1)]
    assert {match.shard for match in theirs} == {*names, None}


def test_conversations_equal_brute_force_too(tmp_path, monkeypatch):
    monkeypatch.setattr(contamination, "BLOCK", 256)
    items, lists = phrase_corpus(1, 80)
    rng = random.Random(2)
    shards = []
    for texts in lists:
        chats = []
        for text in texts:
            item = rng.choice(items)
            turns = [rng.choice([item.question, text]), rng.choice([item.gold.strip(), text])]
            roles = ("user", "assistant")
            chat = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
            chats.append(chat * rng.randint(1, 2))
        shards.append(TOKENIZER.encode_chat_batch(chats))
    ours = scan(items, write_shards(tmp_path, *shards)).matches
    assert ours == brute_force(items, shards, chat=True)
    as_text = brute_force(items, shards, chat=False)
    assert sum(a.longest > b.longest for a, b in zip(ours, as_text, strict=True)) > 10


@pytest.mark.parametrize("n", [*range(1, 18), 64])
def test_hashes_are_the_polynomial(n):
    tokens = np.random.default_rng(n).integers(0, 65536, 80).astype(np.uint16)
    expected = []
    for i in range(80 - n + 1):
        value = 0
        for token in tokens[i : i + n].tolist():
            value = (value * contamination.MULTIPLIER + token) % 2**64
        expected.append(value)
    assert contamination.window_hashes(tokens, n).tolist() == expected
    assert len(contamination.window_hashes(tokens[: n - 1], n)) == 0


def test_colliding_hashes_change_nothing(tmp_path, monkeypatch):
    hashes = contamination.window_hashes
    few = []

    def coarse(*arguments) -> np.ndarray:
        few.append(hashes(*arguments) >> np.uint64(61) << np.uint64(61))
        return few[-1]

    items, lists = phrase_corpus(3, 16)
    data = write_shards(tmp_path, *(text_ids(*texts) for texts in lists))
    exact = scan(items[:10], data)
    monkeypatch.setattr(contamination, "window_hashes", coarse)
    assert scan(items[:10], data).matches == exact.matches
    assert len(np.unique(np.concatenate(few))) == 8
    assert len({match.longest for match in exact.matches}) > 3


def test_planted_items_are_found_in_their_document_and_no_others(tmp_path):
    rng = random.Random(4)
    items = [Item(f"p{i}", phrase(rng, 40), " " + phrase(rng, 14)) for i in range(100)]
    others = [Item(f"o{i}", phrase(rng, 40), " " + phrase(rng, 14)) for i in range(4000)]
    texts = [[phrase(rng, 150) for _ in range(200)] for _ in range(3)]
    places = rng.sample([(s, d) for s in range(3) for d in range(200)], len(items))
    for i, (item, (shard, document)) in enumerate(zip(items, places, strict=True)):
        whole = item.question + item.gold
        copy = (
            whole,
            whole.split(" ", 1)[1],
            f"{phrase(rng, 30)} {item.question} {phrase(rng, 30)}",
            f"{phrase(rng, 30)} {whole} {phrase(rng, 30)}",
            whole[: len(whole) // 2],
        )[i % 5]
        texts[shard][document] = copy
        if i % 2:  # again in a later document, which is not the first hit
            texts[2].append(copy)
    report = scan([*others, *items], write_shards(tmp_path, *map(lambda t: text_ids(*t), texts)))
    assert all(m.longest == 0 and m.covered == 0 and not m.shard for m in report.matches[:4000])
    for i, (match, (shard, document)) in enumerate(zip(report.matches[4000:], places, strict=True)):
        assert (match.id, match.shard) == (f"p{i}", f"train-0000{shard}-of-00003.npz")
        assert match.document == document
        if i % 5 in (0, 3):
            assert (match.longest, match.covered) == (pytest.approx(match.tokens, abs=1), 1.0)
        assert match.held == contamination.HELD[(2, 2, 1, 2, 0)[i % 5]]
        assert match.status == ("dirty", "dirty", "partly", "dirty", "partly")[i % 5]
    assert report.counts() == {"clean": 4000, "partly": 40, "dirty": 60, "too short": 0}
    assert [match.held for match in report.matches].count("question and gold") == 60


def test_matches_at_the_ends_of_documents_but_never_across(tmp_path):
    rng = random.Random(5)
    items = [Item(str(i), phrase(rng, 30), "") for i in range(3)]
    first, last, across = (TOKENIZER.encode(item.question) for item in items)
    filler = TOKENIZER.encode(phrase(rng, 60))
    documents = [across[:12], across[12:], [], [*first, *filler], [*filler, *last], across[:12]]
    data = write_shards(tmp_path, documents, [across[12:]])
    matches = scan(items, data).matches
    assert [(m.longest, m.document) for m in matches[:2]] == [(len(first), 3), (len(last), 4)]
    part = len(across) - 12  # in document 1 whole, so only what crosses its begin is missing
    assert part >= 13 and (matches[2].longest, matches[2].document) == (part, 1)
    assert matches[2].covered == pytest.approx(part / len(across), abs=0.03)
    bare = write_shards(tmp_path / "bare", [across[:12], across[12:24], across[24:36]])
    assert len(across) < 37 and scan(items, bare).matches[2].longest == 0
    assert scan(items, bare, ngram=12).matches[2].longest == 12


def test_short_items_are_matched_whole_or_counted(tmp_path):
    ten = "one two three four five six seven eight nine ten"
    items = [Item("ten", ten, ""), Item("question", ten, " eleven twelve thirteen fourteen")]
    items += [Item("seven", ten[:33], ""), Item("other", ten.replace("four", "five"), "")]
    report = scan(items, write_shards(tmp_path, text_ids(f"Count: {ten} stop")))
    found = [(m.tokens, m.longest, m.held, m.status) for m in report.matches]
    assert found == [
        (10, 10, "question", "dirty"),
        (14, 10, "question", "partly"),
        (7, 0, "", "too short"),
        (10, 0, "", "clean"),
    ]
    assert report.counts() == {"clean": 1, "partly": 1, "dirty": 1, "too short": 1}
    turns = [{"role": "user", "content": "one two three four"}]
    turns += [{"role": "assistant", "content": "five six seven"}]  # 8 tokens with the one between
    chat = write_shards(tmp_path / "chat", [TOKENIZER.encode_chat(turns)])
    match = scan([Item("seven", "one two three four", " five six seven")], chat).matches[0]
    assert (match.tokens, match.longest, match.status) == (7, 0, "too short")
    with pytest.raises(UserError, match="at least 8"):
        scan(items, tmp_path, ngram=7)
    with pytest.raises(UserError, match="val.npz"):
        scan(items, tmp_path, split="val")


def test_compressed_shards_and_progress(tmp_path):
    items, lists = phrase_corpus(6, 16)
    documents = text_ids(*lists[0])
    plain = scan(items, write_shards(tmp_path / "plain", documents))
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.uint64)
    (tmp_path / "packed").mkdir()
    np.savez_compressed(
        tmp_path / "packed/train.npz", tokens=np.concatenate(documents), offsets=offsets
    )
    calls = []
    packed = scan(items, tmp_path / "packed", progress=lambda *call: calls.append(call))
    assert [m.longest for m in packed.matches] == [m.longest for m in plain.matches]
    assert calls == [(plain.tokens, plain.tokens)]
    assert scan([], tmp_path / "packed").matches == []


def test_the_status_follows_the_covered_share():
    covered = [0.0, 0.19, 0.2, 0.79, 0.8, 1.0]
    matches = [Match(str(i), 20, 13, share, "", None, None) for i, share in enumerate(covered)]
    matches.append(Match("short", 7, 0, 0.0, "", None, None))
    statuses = [match.status for match in matches]
    assert statuses == ["clean", "clean", "partly", "partly", "dirty", "dirty", "too short"]
    assert Report(matches, 0, 0.0).counts() == {"clean": 2, "partly": 2, "dirty": 2, "too short": 1}
