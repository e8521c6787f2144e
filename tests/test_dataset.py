"""The shard format: round trips, memory mapping, every kind of damage, manifests."""

import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dataset
from common import manifest as manifest_module
from common.errors import UserError
from common.manifest import make_manifest, publish, read_manifest, write_manifest
from dataset import NpzDataset, ShardWriter, open_split

ROOT = Path(dataset.__file__).parent
TOKENIZER = SimpleNamespace(sha256="a" * 64, vocab_size=1000)


def documents(count: int = 50, seed: int = 0, vocab_size: int = 1000) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40, count)
    return [rng.integers(0, vocab_size, n).astype(np.uint16) for n in lengths]


def write_shard(path: Path, docs, order=None) -> dict:
    with ShardWriter(path.parent) as writer:
        writer.add_batch(docs)
        return writer.write(path, order)


def write_dataset(directory: Path, **manifest) -> dict:
    directory.mkdir(exist_ok=True)
    files = {
        "train.npz": write_shard(directory / "train.npz", documents(500)),
        "val.npz": write_shard(directory / "val.npz", documents(5, seed=1)),
    }
    content = make_manifest("text", TOKENIZER, [], {}, {}, files) | manifest
    write_manifest(directory / "manifest.json", content)
    return content


def assert_holds(data: NpzDataset, docs) -> None:
    assert len(data) == len(docs)
    for i, doc in enumerate(docs):
        assert data[i].dtype == np.uint16
        assert np.array_equal(data[i], doc)


def refused(match: str, call, *args, **kwargs) -> str:
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(tmp_path):
    docs = [*documents(), np.array([], np.uint16), np.array([0, 65535], np.uint16)]
    entry = write_shard(tmp_path / "train.npz", docs)
    data = NpzDataset(tmp_path / "train.npz")
    assert_holds(data, docs)
    assert np.array_equal(data[-1], docs[-1])
    assert data.max_id() == 65535
    for i in (len(docs), -len(docs) - 1):
        with pytest.raises(IndexError):
            data[i]
    assert entry["documents"] == len(docs)
    assert entry["tokens"] == len(data.tokens) == sum(map(len, docs))
    assert entry["bytes"] == (tmp_path / "train.npz").stat().st_size
    assert entry["sha256"] == dataset.file_sha256(tmp_path / "train.npz")
    with np.load(tmp_path / "train.npz") as theirs:  # an ordinary .npz, to NumPy too
        assert theirs["tokens"].dtype == np.uint16 and theirs["offsets"].dtype == np.uint64
        assert np.array_equal(theirs["tokens"], data.tokens)
        assert np.array_equal(theirs["offsets"], data.offsets)
    assert os.listdir(tmp_path) == ["train.npz"]


def test_writing_one_by_one_in_batches_or_twice_gives_the_same_bytes(tmp_path):
    docs = documents()
    write_shard(tmp_path / "a.npz", docs)
    with ShardWriter(tmp_path) as writer:
        for doc in docs[:20]:
            writer.add_batch([doc.tolist()])
        writer.add_batch([])
        writer.add_batch(doc.astype(np.int64) for doc in docs[20:])
        assert (writer.documents, writer.tokens) == (len(docs), sum(map(len, docs)))
        writer.write(tmp_path / "b.npz")
        writer.write(tmp_path / "c.npz", np.arange(len(docs)))
    assert len({(tmp_path / name).read_bytes() for name in ("a.npz", "b.npz", "c.npz")}) == 1


def test_any_order_and_any_subset(tmp_path):
    docs = documents(3000)  # more than one round of the writer's loop
    order = np.random.default_rng(1).permutation(3000)[:2500]
    write_shard(tmp_path / "a.npz", docs, order)
    assert_holds(NpzDataset(tmp_path / "a.npz"), [docs[i] for i in order])


def test_chunks_smaller_than_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK", 64)
    docs = documents(500)
    write_shard(tmp_path / "a.npz", docs)
    assert_holds(NpzDataset(tmp_path / "a.npz"), docs)
    tokens = np.concatenate(docs)
    ends = np.cumsum([0, *map(len, docs)])
    for i in (63, 64, 127, 200):  # a decrease on either side of a chunk's border is seen
        bad = ends.copy()
        bad[i] = bad[i + 1] + 1
        np.savez(tmp_path / "bad.npz", tokens=tokens, offsets=bad)
        refused("offsets that decrease", NpzDataset, tmp_path / "bad.npz")


def test_no_documents(tmp_path):
    write_shard(tmp_path / "a.npz", [])
    data = NpzDataset(tmp_path / "a.npz")
    assert len(data) == 0 and data.max_id() == -1
    refused("holds no tokens", open_split, tmp_path, "a")


@pytest.mark.parametrize("bad", [[-1], [65536], [0.5], ["x"], [2**40]])
def test_ids_that_do_not_fit_are_refused(tmp_path, bad):
    with ShardWriter(tmp_path) as writer, pytest.raises(ValueError, match="between 0 and 65535"):
        writer.add_batch([bad])
    assert os.listdir(tmp_path) == []


def test_arrays_are_mapped_and_aligned(tmp_path):
    write_shard(tmp_path / "a.npz", documents(500))
    data = NpzDataset(tmp_path / "a.npz")
    assert isinstance(data.tokens, np.memmap) and isinstance(data.offsets, np.memmap)
    assert data.tokens.offset % 64 == data.offsets.offset % 64 == 0
    assert not data[0].flags.writeable
    # The map is of the file itself: what is written there afterwards shows.
    with open(tmp_path / "a.npz", "r+b") as file:
        file.seek(data.tokens.offset)
        file.write(struct.pack("<H", 54321))
    assert data.tokens[0] == 54321
    copy = pickle.loads(pickle.dumps(data))
    assert isinstance(copy.tokens, np.memmap) and len(pickle.dumps(data)) < 500
    np.savez(tmp_path / "numpy.npz", tokens=np.arange(5, dtype=np.uint16), offsets=[0, 2, 5])
    data = NpzDataset(tmp_path / "numpy.npz")
    assert isinstance(data.tokens, np.memmap) and data[1].tolist() == [2, 3, 4]


def test_opening_a_file_beyond_4_gib_reads_almost_nothing(tmp_path):
    n_tokens = (5 << 30) // 2
    path = tmp_path / "big.npz"
    with open(path, "wb") as file:  # sparse: the tokens are a hole with a value at its end
        with zipfile.ZipFile(file, "w") as archive:
            header = {"descr": "<u2", "fortran_order": False, "shape": (n_tokens,)}
            with archive.open("tokens.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                data_start = file.tell()
                file.seek(2 * n_tokens - 2, os.SEEK_CUR)
                file.write(struct.pack("<H", 777))
                member._file_size += 2 * n_tokens
                member._compress_size += 2 * n_tokens
            archive.writestr("offsets.npy", npy(np.array([0, 3, n_tokens], dtype=np.uint64)))
    assert path.stat().st_size > 5 << 30 and path.stat().st_blocks * 512 < 1 << 20
    code = (
        "import resource, sys; from dataset import NpzDataset\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "d = NpzDataset(sys.argv[1])\n"
        "print(len(d), len(d.tokens), d[1][-1], d.tokens.offset,\n"
        "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    n, tokens, last, offset, grown_kib = map(int, result.stdout.split())
    assert (n, tokens, last, offset) == (2, n_tokens, 777, data_start)
    assert grown_kib < 20_000


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize("offsets_type", [np.int64, np.uint64, np.int32])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_the_original_load(tmp_path, save, offsets_type):
    docs = documents()
    ends = np.cumsum([0, *map(len, docs)]).astype(offsets_type)
    save(tmp_path / "train.npz", tokens=np.concatenate(docs), offsets=ends)
    data = NpzDataset(tmp_path / "train.npz")
    assert_holds(data, docs)
    assert isinstance(data.tokens, np.memmap) == (save is np.savez)


@pytest.mark.parametrize("token_type", [np.uint8, np.int32, np.int64, ">u2"])
def test_other_integer_tokens_are_taken_if_they_fit(tmp_path, token_type):
    np.savez(tmp_path / "a.npz", tokens=np.array([1, 2, 255], token_type), offsets=[0, 1, 3])
    data = NpzDataset(tmp_path / "a.npz")
    assert data[1].tolist() == [2, 255] and data[1].dtype == np.uint16
    for bad in ([1, 2, 65536], [1, -1, 2]):
        np.savez(tmp_path / "bad.npz", tokens=np.array(bad, np.int32), offsets=[0, 1, 3])
        refused("do not fit into uint16", NpzDataset, tmp_path / "bad.npz")


GOOD = {"tokens": np.arange(6, dtype=np.uint16), "offsets": np.array([0, 2, 6], np.uint64)}


@pytest.mark.parametrize(
    "change, error",
    [
        ({"tokens": None}, "no array 'tokens'"),
        ({"offsets": None}, "no array 'offsets'"),
        ({"tokens": np.arange(6.0)}, "not a row of integers"),
        ({"tokens": GOOD["tokens"].reshape(2, 3)}, "not a row of integers"),
        ({"tokens": np.array(7, np.uint16)}, "not a row of integers"),
        ({"tokens": np.array([1, None])}, "not a row of integers"),
        ({"offsets": np.array([0.0, 2, 6])}, "not a row of integers"),
        ({"offsets": np.array([], np.uint64)}, "do not start at 0"),
        ({"offsets": np.array([1, 2, 6])}, "do not start at 0"),
        ({"offsets": np.array([0, 4, 2, 6])}, "decrease"),
        ({"offsets": np.array([0, -1, 6])}, "decrease"),
        ({"offsets": np.array([0, 2, 5])}, "end at 5, not at 6"),
        ({"offsets": np.array([0, 2, 7])}, "end at 7, not at 6"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_wrong_arrays_are_refused(tmp_path, save, change, error):
    arrays = {name: array for name, array in (GOOD | change).items() if array is not None}
    save(tmp_path / "bad.npz", **arrays)
    assert "bad.npz" in refused(error, NpzDataset, tmp_path / "bad.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_cut_anywhere_is_refused(tmp_path, save):
    path = tmp_path / "cut.npz"
    save(path, tokens=np.arange(300, dtype=np.uint16), offsets=np.arange(301))
    whole = path.read_bytes()
    for keep in [0, 1, 10, *range(30, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:keep])
        refused("cut.npz", NpzDataset, path)


def test_a_damaged_file_never_escapes_as_another_error(tmp_path):
    path = tmp_path / "hit.npz"
    rng = np.random.default_rng(0)
    n_refused = 0
    for save in (np.savez, np.savez_compressed):
        save(path, tokens=np.arange(300, dtype=np.uint16), offsets=np.arange(301))
        whole = path.read_bytes()
        for _ in range(400):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                NpzDataset(path)
            except UserError as error:
                n_refused += 1
                assert "hit.npz" in str(error) and "\n" not in str(error)
    assert n_refused > 400


def test_what_is_no_file_is_refused(tmp_path):
    refused("No such file", NpzDataset, tmp_path / "none.npz")
    refused("cannot read", NpzDataset, tmp_path)
    (tmp_path / "text.npz").write_text("hello")
    refused("not a .npz file", NpzDataset, tmp_path / "text.npz")
    np.savez(tmp_path / "swapped.npz", tokens=GOOD["tokens"])
    with zipfile.ZipFile(tmp_path / "swapped.npz", "a") as archive:
        archive.writestr("offsets.npy", b"this is not an array")
    refused("not in .npy format", NpzDataset, tmp_path / "swapped.npz")


def test_hostile_files_are_refused_in_bounded_memory(tmp_path, monkeypatch):
    path, zeros = tmp_path / "bomb.npz", np.zeros(10_000_000, np.uint16)
    np.savez_compressed(path, tokens=zeros, offsets=[0, len(zeros)])
    assert len(NpzDataset(path).tokens) == len(zeros)  # a little text, often repeated
    monkeypatch.setattr(dataset, "FREE_EXPANSION", 1 << 20)
    refused("'tokens' compressed more than any text can be", NpzDataset, path)
    for member, compression, message in (
        (b"\x93NUMPY\x01\0\x04\0((((", zipfile.ZIP_STORED, "not in .npy format"),
        (b"\x93NUMPY\x01\0\x04\0[[[[", zipfile.ZIP_STORED, "not in .npy format"),
        (bytes(range(256)) * 9, zipfile.ZIP_LZMA, "is not a .npz file"),
        (bytes(range(256)) * 9, zipfile.ZIP_BZIP2, "is not a .npz file"),
    ):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("tokens.npy", member)
        if compression != zipfile.ZIP_STORED:
            path.write_bytes(path.read_bytes().replace(b"\0", b"\1", 60))  # damaged
        refused(message, NpzDataset, path)


def test_open_split(tmp_path):
    manifest = write_dataset(tmp_path)
    assert read_manifest(tmp_path) == manifest
    (train,) = open_split(tmp_path, "train", TOKENIZER.sha256, 1000)
    (val,) = open_split(str(tmp_path), "val", TOKENIZER.sha256, 1000)
    assert_holds(train, documents(500))
    assert_holds(val, documents(5, seed=1))
    refused("another tokenizer", open_split, tmp_path, "train", "b" * 64, 1000)
    refused("larger tokenizer", open_split, tmp_path, "train", TOKENIZER.sha256, 999)
    refused("prepare_dataset.py", open_split, tmp_path / "none", "train")
    refused("there is no .*test.npz.*prepare_dataset.py", open_split, tmp_path, "test")
    assert len(open_split(tmp_path, "train")) == 1


def test_files_that_differ_from_their_manifest_are_refused(tmp_path, monkeypatch):
    write_dataset(tmp_path)
    path = tmp_path / "train.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused("train.npz has .* bytes, its manifest says", open_split, tmp_path, "train")
    path.write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    assert len(NpzDataset(path)) == 500  # a flipped bit of a token is no damage that opening sees
    refused("train.npz does not have the sha256", open_split, tmp_path, "train")
    monkeypatch.setattr(manifest_module, "HASHED_SPLIT_BYTES", 10)
    open_split(tmp_path, "train")
    path.unlink()
    refused("train.npz is missing", open_split, tmp_path, "train")
    assert len(open_split(tmp_path, "val")) == 1


@pytest.mark.parametrize(
    "content, error",
    [
        (b"", "damaged"),
        (b"{}", "damaged"),
        (b"[]", "damaged"),
        (b"\xff", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b'{"format_version": %s}' % (b"9" * 5000), "damaged"),
        (b'{"format_version": 1, "complete": true}', "damaged"),
        ({"files": {"train.npz": {}}}, "damaged"),
        ({"files": None}, "damaged"),
        ({"tokenizer": "x"}, "damaged"),
        ({"tokenizer": {"sha256": 5, "vocab_size": 5}}, "damaged"),
        ({"format_version": "x" * 300_000}, "format 'xxx"),
        ({"format_version": 2}, "format 2"),
        ({"complete": False}, "cut off"),
    ],
)
def test_manifests_that_cannot_be_trusted_are_refused(tmp_path, content, error):
    manifest = write_dataset(tmp_path)
    if isinstance(content, dict):
        content = json.dumps(manifest | content).encode()
    (tmp_path / "manifest.json").write_bytes(content)
    message = refused(error, open_split, tmp_path, "train", TOKENIZER.sha256)
    assert "manifest.json" in message and len(message) < 300


def test_without_a_manifest_every_id_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK", 16)
    write_shard(tmp_path / "train.npz", [*documents(), [999]])
    assert len(open_split(tmp_path, "train", TOKENIZER.sha256, 1000)) == 1
    error = refused("train.npz has the id 999", open_split, tmp_path, "train", None, 999)
    assert "vocabulary ends at 998" in error


def test_a_split_too_large_to_hash_opens_without_being_read(tmp_path, monkeypatch):
    """60 links to one shard stand for a dataset of many gigabytes."""
    files = {"train-00000-of-00060.npz": write_shard(tmp_path / "train.npz", documents(2000))}
    for i in range(60):
        name = f"train-{i:05d}-of-00060.npz"
        os.link(tmp_path / "train.npz", tmp_path / name)
        files[name] = files["train-00000-of-00060.npz"]
    write_manifest(tmp_path / "manifest.json", make_manifest("text", TOKENIZER, [], {}, {}, files))
    monkeypatch.setattr(manifest_module, "HASHED_SPLIT_BYTES", 10)
    monkeypatch.setattr(manifest_module, "file_sha256", lambda path: 1 / 0)
    monkeypatch.setattr(NpzDataset, "max_id", lambda self: 1 / 0)
    shards = open_split(tmp_path, "train", TOKENIZER.sha256, 1000)
    assert len(shards) == 60 and all(isinstance(shard.tokens, np.memmap) for shard in shards)


@pytest.mark.parametrize("with_manifest", [False, True])
def test_numbered_shards(tmp_path, with_manifest):
    shards = [documents(10, seed) for seed in range(11)]
    names = [f"train-{i:05d}-of-00011.npz" for i in range(11)]
    files = {
        name: write_shard(tmp_path / name, docs) for name, docs in zip(names, shards, strict=True)
    }
    (tmp_path / "train-notes.npz").write_text("no shard")
    if with_manifest:
        manifest = make_manifest("text", TOKENIZER, [], {}, {}, files)
        write_manifest(tmp_path / "manifest.json", manifest)
    shards_of_split = open_split(tmp_path, "train", TOKENIZER.sha256, 1000)
    assert [data.path.name for data in shards_of_split] == names
    for data, docs in zip(shards_of_split, shards, strict=True):
        assert_holds(data, docs)
    (tmp_path / names[3]).unlink()
    refused(f"{names[3]} is missing", open_split, tmp_path, "train")
    write_shard(tmp_path / names[3], shards[3])
    write_shard(tmp_path / "train.npz", shards[0])
    if with_manifest:  # which lists the files that count
        assert len(open_split(tmp_path, "train")) == 11
    else:
        refused("has train.npz, not one of the 11 shards that", open_split, tmp_path, "train")


def test_names_that_promise_any_number_of_shards(tmp_path):
    for name, message in (
        ("train-0-of-999999999.npz", "has train-0-of-999999999.npz, not one of the 999999999"),
        ("train-000000000-of-999999999.npz", "train-000000001-of-999999999.npz is missing"),
        ("train-5-of-3.npz", "has train-5-of-3.npz, not one of the 3 shards"),
        ("train-0-of-99999999999.npz", "there is no .*train.npz"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).touch()
        refused(message, open_split, folder, "train")


def test_publish_cut_off_between_two_renames_is_detected(tmp_path, monkeypatch):
    write_dataset(tmp_path)
    staging = tmp_path / "staging"
    manifest = write_dataset(staging, settings={"seed": 2})
    real, seen = os.replace, []

    def killed_at_val(source, target):
        if Path(target).parent == tmp_path:
            seen.append(Path(target).name)
        if seen[-1:] == ["val.npz"]:
            raise SystemExit("killed")
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", killed_at_val)
        publish(staging, tmp_path, manifest)
    assert seen == ["manifest.json", "train.npz", "val.npz"]
    for split in ("train", "val"):
        refused("cut off", open_split, tmp_path, split)
    manifest = write_dataset(staging, settings={"seed": 2})
    publish(staging, tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert len(open_split(tmp_path, "val", TOKENIZER.sha256, 1000)) == 1


@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device")])
def test_ctrl_c_or_a_full_disk_in_publish_leaves_all_old_or_all_new(tmp_path, monkeypatch, error):
    """Ctrl-C after each rename in turn; or a disk that is full from the start."""
    old, new = write_dataset(tmp_path), {"settings": {"seed": 2}}
    staging, real, outcomes, n_replaced = tmp_path / "staging", os.replace, [], 5
    for interrupted in range(n_replaced):
        write_dataset(tmp_path)
        manifest, calls = write_dataset(staging, **new), []

        def replace(source, target, interrupted=interrupted, calls=calls):
            real(source, target)
            if len(calls) == interrupted:
                os.kill(os.getpid(), signal.SIGINT)
            calls.append(target)

        def full(descriptor):
            raise error

        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, OSError)):
            patch.setattr(os, "replace", replace)
            if error:
                patch.setattr(os, "fsync", full)
            publish(staging, tmp_path, manifest)
        manifest_on_disk = read_manifest(tmp_path)  # which refuses what is neither
        assert manifest_on_disk in (old, manifest)
        outcomes.append(manifest_on_disk == manifest)
        for split in ("train", "val"):
            open_split(tmp_path, split, TOKENIZER.sha256, 1000)
    assert outcomes == ([False] * 5 if error else [False] * 2 + [True] * 3)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    write_shard(tmp_path / "a.npz", documents())
    before = (tmp_path / "a.npz").read_bytes()
    with ShardWriter(tmp_path) as writer:
        writer.add_batch(documents(seed=5))

        def fails(*args):
            yield b"abc"
            raise OSError(28, "No space left on device")

        writer._all_tokens = fails
        with pytest.raises(OSError) as caught:
            writer.write(tmp_path / "a.npz")
        assert caught.value.filename == str(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_writer_goes_on_after_it_wrote_in_another_order(tmp_path):
    docs = documents(60)
    with ShardWriter(tmp_path) as writer:
        writer.add_batch(docs[:40])
        writer.write(tmp_path / "first.npz", order=np.array([3, 0, 2]))
        writer.add_batch(docs[40:])
        writer.write(tmp_path / "all.npz")
    data = NpzDataset(tmp_path / "all.npz")
    assert len(data) == 60
    assert all(np.array_equal(a, b) for a, b in zip(data, docs, strict=True))


@pytest.mark.parametrize("hard", [True, False])
def test_more_shards_than_files_may_be_open(tmp_path, hard):
    """The soft limit is raised; under a hard one a line says what to do."""
    pytest.importorskip("resource")
    for i in range(40):
        write_shard(tmp_path / f"train-{i:05d}-of-00040.npz", documents(2, seed=i))
    code = (
        "import resource, sys; from dataset import open_split; "
        "limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (60, {60 if hard else 'limit'})); "
        "print(len(open_split(sys.argv[1], 'train')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT
    )
    if hard:
        assert "Too many open files: raise `ulimit -n`" in result.stderr
    else:
        assert result.stdout == "40\n", result.stderr
