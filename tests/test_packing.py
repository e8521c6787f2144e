"""Packing: nothing lost, nothing twice, labels exactly where they belong, order from the seed."""

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.mixture import DataSet, draw_phases, parse_mixture, times_in_epoch
from common.prefetch import Prefetcher
from dataset import NpzDataset, ShardWriter
from ops.cross_entropy import IGNORE_INDEX
from tokenizer import load_tokenizer
from training import packing
from training.packing import ChatFormat, PackedRows, cut_documents, pack

SHARED = Path(__file__).resolve().parents[2] / "shared"
PAD = 65535


def shards(directory: Path, *document_lists: list[np.ndarray]) -> list[NpzDataset]:
    datasets = []
    for i, documents in enumerate(document_lists):
        with ShardWriter(directory) as writer:
            writer.add_batch([np.asarray(d, dtype=np.uint16) for d in documents])
            writer.write(directory / f"{i}.npz")
        datasets.append(NpzDataset(directory / f"{i}.npz"))
    return datasets


def unique_documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents in which no id occurs twice, so that every token can be followed."""
    ids = np.arange(sum(lengths), dtype=np.uint16)
    return np.split(ids, np.cumsum(lengths)[:-1])


def test_cut_documents_by_hand():
    starts, lengths = cut_documents(np.array([0, 5, 5, 13, 17], dtype=np.uint64), 4)
    assert starts.tolist() == [0, 4, 5, 9, 13]
    assert lengths.tolist() == [4, 1, 4, 4, 4]


@pytest.mark.parametrize("seed", range(20))
def test_pack_places_every_segment_once_and_never_overfills(seed):
    rng = np.random.default_rng(seed)
    block_size = int(rng.integers(1, 40))
    lengths = rng.integers(1, block_size + 1, size=int(rng.integers(1, 400)))
    order, borders = pack(lengths, block_size, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sums = np.add.reduceat(lengths[order], borders[:-1])
    assert borders[0] == 0 and borders[-1] == len(order) and (np.diff(borders) > 0).all()
    assert (sums <= block_size).all() and sums.sum() == lengths.sum()


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_pack_equals_a_best_fit_decreasing_that_places_segment_by_segment(block_size):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, block_size + 1, size=2000)
    rows: list[int] = []  # room left
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rows) if room >= length]
        if fitting:
            best = min(fitting, key=lambda i: rows[i])
            rows[best] -= length
        else:
            rows.append(block_size - length)
    _, borders = pack(lengths, block_size, rng)
    assert len(borders) - 1 == len(rows)


def test_every_token_with_a_successor_in_its_segment_is_a_label_exactly_once(tmp_path):
    rng = np.random.default_rng(1)
    lists = [unique_documents(rng.integers(1, 90, size=60).tolist()) for _ in range(2)]
    lists[1] = [document + 5000 for document in lists[1]]
    rows = PackedRows(shards(tmp_path, *lists), block_size=32, pad_id=PAD, seed=3)
    labels: Counter = Counter()
    inputs: Counter = Counter()
    for row in range(rows.rows_per_epoch):
        batch = rows.batch([row])
        ids, targets, positions = (t[0].numpy() for t in batch.tensors()[:3])
        for i in np.flatnonzero(targets != IGNORE_INDEX):
            labels[int(targets[i])] += 1
            assert targets[i] == ids[i + 1] and positions[i + 1] == positions[i] + 1
        inputs.update(ids[ids != PAD].tolist())
    expected_labels, expected_inputs = Counter(), Counter()
    for document in np.concatenate([np.array(d, dtype=object) for d in lists]):
        for start in range(0, len(document), 32):
            segment = document[start : start + 32].tolist()
            expected_labels.update(segment[1:])
            expected_inputs.update(segment)
    assert labels == expected_labels and inputs == expected_inputs
    assert max(labels.values()) == 1


def test_batch_by_hand(tmp_path):
    rows = PackedRows(shards(tmp_path, [[1, 2, 3], [4, 5]]), block_size=8, pad_id=PAD)
    batch = rows.batch([0, None])
    first = batch.ids[0].tolist()
    assert first == [1, 2, 3, 4, 5, PAD, PAD, PAD]  # the longer segment first
    ignore = IGNORE_INDEX
    assert batch.targets.tolist() == [[2, 3, ignore, 5] + [ignore] * 4, [ignore] * 8]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8, 16, 16, 16]
    assert batch.n_labels == 3
    assert rows.fill == 5 / 8


def test_order_is_a_function_of_seed_and_epoch(tmp_path):
    data = shards(tmp_path, unique_documents([7, 20, 33, 4, 18, 64, 9, 2] * 4))

    def epoch_rows(seed: int, epoch: int) -> list[list[int]]:
        rows = PackedRows(data, 16, PAD, seed)
        n = rows.rows_per_epoch
        return [rows.batch([r]).ids[0].tolist() for r in range(epoch * n, (epoch + 1) * n)]

    assert epoch_rows(0, 0) == epoch_rows(0, 0)
    assert epoch_rows(0, 0) != epoch_rows(1, 0)
    assert epoch_rows(0, 0) != epoch_rows(0, 1)
    flat = [sorted(sum(epoch_rows(0, epoch), [])) for epoch in (0, 1)]
    assert flat[0] == flat[1]  # the same tokens in another order
    rows = PackedRows(data, 16, PAD, 0)
    n = rows.rows_per_epoch
    crossing = rows.batch([n - 1, n]).ids.tolist()  # an epoch border inside a batch
    assert crossing == [epoch_rows(0, 0)[-1], epoch_rows(0, 1)[0]]


def test_over_two_epochs_a_token_is_a_label_twice_as_often_as_its_weight_says(tmp_path):
    rng = np.random.default_rng(0)
    documents = unique_documents(rng.integers(2, 200, size=300).tolist())
    weights, parts = [1.0, 2.0, 0.5, 1.5], [documents[i::4] for i in range(4)]
    sources = [DataSet(str(weight), weight) for weight in weights]
    rows = PackedRows(shards(tmp_path, *parts), 64, PAD, 5, None, sources, n_epochs=2)
    labels = [Counter(), Counter()]
    for row in range(rows.rows_of(2)):
        targets = rows.batch([row]).targets
        labels[row >= rows.rows_of(1)].update(targets[targets != IGNORE_INDEX].tolist())
    for weight, part in zip(weights, parts, strict=True):
        tokens = [token for document in part for token in np.delete(document, slice(0, None, 64))]
        assert {labels[0][t] + labels[1][t] for t in tokens} == {2 * weight}
        assert {labels[0][t] for t in tokens} == {int(weight), math.ceil(weight)}
        expected = weight * sum(map(len, part))
        assert rows.shares[DataSet(str(weight), weight)] == expected
    taken = sum(len(segment) for row in range(rows.rows_of(2)) for segment in rows.segments(row))
    assert rows.fill == pytest.approx(taken / rows.rows_of(2) / 64)
    resumed = PackedRows(shards(tmp_path, *parts), 64, PAD, 5, None, sources, n_epochs=3)
    for row in (rows.rows_of(2) - 1, rows.rows_of(1), 0):
        assert resumed.batch([row]).ids.equal(rows.batch([row]).ids)
    assert resumed.fingerprint() == rows.fingerprint()
    plain = PackedRows(shards(tmp_path, *parts), 64, PAD, 5)
    ones = PackedRows(shards(tmp_path, *parts), 64, PAD, 5, None, [DataSet("a")] * 4)
    assert ones.fingerprint() == plain.fingerprint() != rows.fingerprint()


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.7, 1.3])
@pytest.mark.parametrize("lengths", [[[6400]], [[3200], [3200]], [[50]] * 80, [[50] * 9, [4000]]])
def test_an_epoch_has_the_share_of_the_tokens_that_the_weight_says(tmp_path, lengths, weight):
    """Of one long text, and of many shards of one short text each, too; whatever the seed."""
    documents = iter(unique_documents(sum(lengths, [])))
    data = shards(tmp_path, *([next(documents) for _ in shard] for shard in lengths))
    mixed = [DataSet("a", weight)] * len(data)
    n_tokens = sum(map(sum, lengths))
    seen: list[list[Counter]] = []
    for seed in (0, 1):
        rows = PackedRows(data, 64, PAD, seed, None, mixed, n_epochs=10)
        epochs = [Counter() for _ in range(10)]
        for epoch, counter in enumerate(epochs):
            for row in range(rows.rows_of(epoch), rows.rows_of(epoch + 1)):
                counter.update(np.concatenate(rows.segments(row)).tolist())
            assert abs(counter.total() - weight * n_tokens) <= 64  # a segment
        assert rows.shares[mixed[0]] == sum(c.total() for c in epochs) / 10
        assert rows.shares[mixed[0]] == pytest.approx(weight * n_tokens)
        assert set(sum(epochs, Counter()).values()) == {round(10 * weight)}
        n_segments = [len(rows.segments(row)) for row in range(rows.rows_of(10))]
        assert rows.max_segments == 1 + max(n_segments)  # with the padding
        seen.append(epochs)
    assert seen[0][0] != seen[1][0]  # the seed draws


def test_segments_are_drawn_at_random_each_as_often_as_the_weight_says():
    lengths, n_seeds = np.array([1, 2, 7]), 4000
    times = np.zeros(3)
    for seed in range(n_seeds):
        phases = draw_phases(lengths, np.random.default_rng(seed))
        times += times_in_epoch(np.full(3, 0.2), phases, epoch=0)
    assert abs(times / n_seeds - 0.2).max() < 5 * math.sqrt(0.2 * 0.8 / n_seeds)
    phases = draw_phases(np.full(1000, 9), np.random.default_rng(0))
    first, second = (times_in_epoch(np.full(1000, 0.5), phases, epoch) for epoch in (0, 1))
    assert first.sum() == 500 and (first + second == 1).all()  # then the other half
    assert 420 < np.count_nonzero(np.diff(first)) < 580  # 500 +- 16 in a random order


def test_runs_without_fractions_have_the_fingerprint_that_they_always_had(tmp_path):
    data = shards(tmp_path, unique_documents([7, 20, 33, 4] * 9))
    for weight, expected in (
        (1.0, "10f75fc635d9b07a-9a312f76182065a9"),
        (2.0, "237f16659b660c8b-9a312f76182065a9"),
    ):
        rows = PackedRows(data, 16, PAD, 0, None, [DataSet("a", weight)])
        assert rows.fingerprint() == expected


def test_sets_are_drawn_independently(tmp_path):
    data = shards(tmp_path, *np.split(np.arange(8000).reshape(200, 40), 2))
    rows = PackedRows(data, 40, PAD, 0, None, [DataSet("a", 0.5), DataSet("b", 0.5)])
    seen = np.zeros(200, dtype=int)
    seen[rows.order] = 1
    assert 25 < (seen[:100] == seen[100:]).sum() < 75


def test_the_texts_that_are_drawn_depend_on_how_shards_are_grouped(tmp_path):
    data = shards(tmp_path, unique_documents([50] * 40), unique_documents([50] * 40))
    a, b = DataSet("a", 0.5), DataSet("b", 0.5)
    one, two = (PackedRows(data, 64, PAD, 0, None, sets) for sets in ([a, a], [a, b]))
    assert one.fingerprint() != two.fingerprint()
    assert two.shares == {a: 1000, b: 1000}
    empty = PackedRows(shards(tmp_path, [[]], [[1, 2]]), 8, PAD, 0, None, [a, DataSet("c")])
    assert empty.shares == {a: 0, DataSet("c"): 2}


def test_settings_of_mixtures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = parse_mixture("data/web, data/code:2,C:\\mine:0.5,data/none:0,D:\\all")
    assert list(map(str, sets)) == ["data/web", "data/code:2", "C:\\mine:0.5", "D:\\all"]
    Path("a,b:2").mkdir()
    assert parse_mixture("a,b:2") == [DataSet("a,b:2")]
    for text, message in {
        "data/web,,data/code": "empty folder",
        "data/web:two": "its weight is not a number",
        "data/web:-1": "a weight is 0 to 1000",
        "data/web:inf": "a weight is 0 to 1000",
        "data/web, data/web:2": "named twice",
        "data/web:0": "no weight above 0",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_mixture(text)


def test_fingerprint_notices_one_token(tmp_path, monkeypatch):
    documents = [np.arange(1000, dtype=np.uint16)] * 20

    def fingerprint(name: str, position: int | None = None) -> str:
        (tmp_path / name).mkdir()
        changed = [document.copy() for document in documents]
        if position is not None:
            changed[position // 1000][position % 1000] += 1
        return PackedRows(shards(tmp_path / name, changed), 64, PAD).fingerprint()

    whole = fingerprint("a")
    assert re.fullmatch("[0-9a-f]{16}-[0-9a-f]{16}", whole)
    assert whole == fingerprint("b") and whole != fingerprint("c", 12_344)
    monkeypatch.setattr(packing, "HASHED_TOKENS", 19_999)  # of many tokens a sample must do
    assert fingerprint("d") == fingerprint("e") != fingerprint("f", 0)


def test_steps_cover_all_rows_and_pad_the_last_step(tmp_path):
    rows = PackedRows(shards(tmp_path, unique_documents([16] * 11)), 16, PAD)
    steps = list(rows.steps(0, 11, batch_size=2, accumulation=2))
    assert [len(batches) for batches in steps] == [2, 2, 2]
    assert all(batch.ids.shape == (2, 16) for batches in steps for batch in batches)
    assert sum(batch.n_labels for batches in steps for batch in batches) == 11 * 15
    resumed = list(rows.steps(4, 11, batch_size=2, accumulation=2))
    for ours, theirs in zip(resumed, steps[1:], strict=True):
        assert all((a.ids == b.ids).all() for a, b in zip(ours, theirs, strict=True))


def conversations() -> tuple[list[list[dict]], PackedRows | None]:
    def turn(role: str, words: int, word: str) -> dict:
        return {"role": role, "content": " ".join([word] * words)}

    short = [turn("user", 3, "cat"), turn("assistant", 2, "dog")]
    two_turns = [*short, turn("user", 1, "red"), turn("assistant", 4, "blue")]
    long = [turn("user", 60, "cat"), turn("assistant", 9, "dog"), *two_turns]
    hopeless = [turn("user", 3, "cat"), turn("assistant", 200, "dog")]
    return [short, two_turns, long, hopeless]


def test_conversations_keep_their_most_recent_turns_and_label_the_assistant_only(tmp_path):
    tokenizer = load_tokenizer()
    chats = conversations()
    chat = ChatFormat(tokenizer.bos_id, tokenizer.user_id, tokenizer.assistant_mask)
    data = shards(tmp_path, [tokenizer.encode_chat(messages) for messages in chats])
    rows = PackedRows(data, 48, tokenizer.pad_id, chat=chat)
    assert (rows.n_shortened, rows.n_dropped) == (1, 1)
    whole = [tokenizer.encode_chat(messages) for messages in (chats[0], chats[1], chats[2][2:])]
    found, labelled = [], []
    for row in range(rows.rows_per_epoch):
        batch = rows.batch([row])
        ids, targets, _, cu_seqlens = (t.reshape(-1).tolist() for t in batch.tensors())
        borders = sorted(set(cu_seqlens))
        for a, b in zip(borders, borders[1:], strict=False):
            if ids[a] != tokenizer.pad_id:
                found.append(ids[a:b])
                labelled.append([(i - a, targets[i]) for i in range(a, b) if targets[i] >= 0])
    assert sorted(found) == sorted(whole)
    for ids, labels in zip(found, labelled, strict=True):
        expected, speaking = [], False
        for i, token in enumerate(ids):
            if speaking:
                expected.append((i - 1, token))
            if token in (tokenizer.assistant_id, tokenizer.eos_id):
                speaking = token == tokenizer.assistant_id
        assert labels == expected and labels
        assert len(labels) < len(ids) - 2  # the mask masked


def test_prefetcher_passes_items_and_errors_on_and_can_be_closed_early():
    def failing():
        yield 1
        yield 2
        raise RuntimeError("no more")

    found = []
    with pytest.raises(RuntimeError, match="no more"):
        for item in Prefetcher(failing()):
            found.append(item)
    assert found == [1, 2]
    endless = Prefetcher(iter(int, 1))
    assert next(iter(endless)) == 0
    endless.close()
    assert not endless.thread.is_alive()
    assert list(Prefetcher(iter([]))) == []


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is not here")
def test_rows_of_real_text_are_over_99_5_percent_full(tmp_path):
    import pyarrow.parquet as pq

    table = pq.read_table(SHARED / "data/fineweb_edu_like/000_00000.parquet", columns=["text"])
    texts = table["text"].to_pylist()[:2000]
    tokenizer = load_tokenizer()
    ids, ends = tokenizer.encode_documents(texts)
    data = shards(tmp_path, np.split(ids, ends[:-1]))
    rows = PackedRows(data, 512, tokenizer.pad_id)
    assert rows.fill >= 0.995
    n_segments = sum(-(-int(n) // 512) for n in np.diff(data[0].offsets))
    n_labels = sum(rows.batch([r]).n_labels for r in range(rows.rows_per_epoch))
    assert n_labels == int(rows.bases[-1]) - n_segments  # each segment's first token is no label
