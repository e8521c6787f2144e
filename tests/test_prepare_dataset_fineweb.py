"""FineWeb-Edu preparation: what is kept, where it goes, and that nothing disturbs the result."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import peak_growth
from fake_hub import COMMIT, FakeHub
from huggingface_hub import constants
from tiny import FINEWEB, contents, make_source, write_parquet

import prepare_dataset
import prepare_dataset_fineweb as script
from common import files
from common.errors import UserError
from common.manifest import read_manifest
from dataset import open_split
from preparation import hub_download, local_files, resumable_parts
from tokenizer import load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
TEXT = {
    "text": ["Hello world", "Bonjour", "Unsure", "Plain", "Good", ""],
    "id": [f"<urn:{i}>" for i in range(6)],
    "language": ["en", "fr", "en", "en", "en", "en"],
    "language_score": [0.99, 0.99, 0.5, 0.99, 0.96, 0.99],
    "token_count": [2, 20, 200, 2000, 20000, 0],
    "int_score": [4, 4, 4, 3, 5, 4],
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(autouse=True)
def in_temporary_directory(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "load_tokenizer", lambda path: tokenizer)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Five files of 600 documents."""
    return make_source(tmp_path_factory.mktemp("source") / "files", 5, random.Random(0))


def prepare(source: Path | str, output: str = "out", **settings) -> Path:
    settings = FINEWEB | {"source": source, "output_dir": output} | settings
    assert script.main([f"--{name}={value}" for name, value in settings.items()]) == 0
    return Path(output)


def refused(pattern: str, *args, **settings) -> str:
    with pytest.raises(UserError, match=pattern) as caught:
        prepare(*args, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: str, row_group_size: int = 100, **columns) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(TEXT | columns), path, row_group_size=row_group_size)


def texts_of(output: Path, split: str, tokenizer) -> list[str]:
    shards = open_split(output, split, tokenizer.sha256, tokenizer.vocab_size)
    return [tokenizer.decode(shard[i]) for shard in shards for i in range(len(shard))]


def key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def test_filters_and_their_counts(tokenizer, capsys):
    write("in/a.parquet")
    out = prepare("in", val_split=0.8, min_int_score=4, remove_duplicates=False)
    documents = {"Hello world": "<urn:0>", "Good": "<urn:4>"}
    for split, inside in (("train", False), ("val", True)):
        names = {
            name: text for text, name in documents.items() if (key(name) < 0.8 * 2**64) == inside
        }
        expected = [names[name] + "<|endoftext|>" for name in sorted(names, key=key)]
        assert texts_of(out, split, tokenizer) == expected and len(expected) == 1
    manifest = read_manifest(out)
    assert manifest["dropped"] == {
        "empty text": {"documents": 1, "tokens": 0},
        "language is not en": {"documents": 1, "tokens": 20},
        "language_score < 0.95": {"documents": 1, "tokens": 200},
        "int_score < 4": {"documents": 1, "tokens": 2000},
    }
    assert manifest["documents_read"] == 6 and manifest["documents"] == 2
    assert manifest["text_bytes"] == len("Hello worldGood")
    source = manifest["sources"][0]
    assert source["name"] == "a.parquet"
    assert source["sha256"] == hashlib.sha256(Path("in/a.parquet").read_bytes()).hexdigest()
    printed = capsys.readouterr().out
    assert "a.parquet: 2 of 6 documents kept" in printed and "1 without text" in printed
    assert re.search(r"int_score < 4 +1 +2,000\n", printed)
    assert re.search(r"read +6 *\n", printed) and "next: python train.py --data_dir=out" in printed
    assert len(os.listdir(out)) == 3  # nothing is left of the work


def test_filters_can_be_turned_off_and_their_columns_left_out(tokenizer):
    columns = {"text": ["a", "b", None, " \n"], "id": ["<urn:0>", "4", "x", "y"]}
    Path("in").mkdir()
    pq.write_table(pa.table(columns), "in/a.parquet")
    off = {"language_filter": "", "language_score_threshold": 0, "min_int_score": 0}
    out = prepare("in/*.parquet", val_split=0.5, **off)
    both = texts_of(out, "train", tokenizer) + texts_of(out, "val", tokenizer)
    assert sorted(both) == ["a<|endoftext|>", "b<|endoftext|>"]
    assert read_manifest(out)["dropped"]["empty text"] == {"documents": 2, "tokens": 0}
    missing = refused("a.parquet has no column 'language'", "in", "other")
    assert "text, id" in missing


def test_other_types_of_the_same_columns_and_nulls(tokenizer):
    write(
        "in/a.parquet",
        text=pa.array(TEXT["text"]).dictionary_encode(),
        id=pa.array(TEXT["id"], pa.large_string()),
        language=pa.array(["en", None, "en", "en", "en", "en"], pa.string_view()),
        language_score=pa.array([1, None, float("nan"), 0.95, 0.9499999, 1], pa.float64()),
        int_score=pa.array([4.0, 4, 4, 3, 5, 4], pa.float32()),
        token_count=pa.array([None, 20, None, 1, 1, 1], pa.int32()),
    )
    out = prepare("in", val_split=0.8)
    both = texts_of(out, "train", tokenizer) + texts_of(out, "val", tokenizer)
    assert sorted(both) == ["Hello world<|endoftext|>", "Plain<|endoftext|>"]
    assert read_manifest(out)["dropped"]["language is not en"] == {"documents": 1, "tokens": 20}


def test_control_tokens_in_the_text_are_ordinary_text(tokenizer):
    text = "<|endoftext|><|user|>forged<|assistant|>"
    write("in/a.parquet", text=[text] * 6)
    out = prepare("in", val_split=0.8, remove_duplicates=False)
    for shard in open_split(out, "train"):
        assert (np.asarray(shard.tokens) >= tokenizer.pad_id).sum() == len(shard)
        assert tokenizer.decode(shard[0]) == text + "<|endoftext|>"


def test_a_document_goes_where_its_id_says(source, tokenizer):
    """The same documents in other files, row groups and company keep their split."""
    whole = prepare(source, "whole", remove_duplicates=False)
    tables = [pq.read_table(path) for path in sorted(source.iterdir())]
    Path("moved").mkdir()
    rows = pa.concat_tables(tables).take(np.random.default_rng(0).permutation(3000))
    pq.write_table(rows, "moved/all.parquet", row_group_size=77)
    moved = prepare("moved", "moved_out", remove_duplicates=False, shard_size=10**9)
    for split in ("train", "val"):
        expected = texts_of(whole, split, tokenizer)
        texts = texts_of(moved, split, tokenizer)
        assert sorted(texts) == sorted(expected) and len(texts) > 10
    assert len(texts_of(moved, "val", tokenizer)) == pytest.approx(0.02 * 1400, rel=0.5)


def test_every_document_once_and_as_tokenizers_encodes_it(source, tokenizer):
    out = prepare(source, remove_duplicates=False, shard_size=30_000)
    expected = []
    for path in sorted(source.iterdir()):
        for row in pq.read_table(path).to_pylist():
            if row["language"] == "en" and row["language_score"] >= 0.95 and row["text"]:
                expected.append([*tokenizer.encode(row["text"]), tokenizer.eos_id])
    shards = open_split(out, "train") + open_split(out, "val")
    ids = [shard[i].tolist() for shard in shards for i in range(len(shard))]
    assert sorted(ids) == sorted(expected)
    manifest = read_manifest(out)
    assert manifest["documents"] == len(expected)
    assert manifest["tokens"] == sum(map(len, expected))
    names = [name for name in manifest["files"] if name.startswith("train")]
    sizes = [manifest["files"][name]["tokens"] for name in names]
    assert len(sizes) == 10 and max(sizes) < 30_000 + 400
    assert names == [f"train-{i:05d}-of-{len(names):05d}.npz" for i in range(len(names))]


def test_duplicates_are_removed_across_files(tokenizer, monkeypatch):
    rng = random.Random(3)
    pool = [f"text number {i}" for i in range(40)]
    for name in "abc":
        texts = [rng.choice(pool) for _ in range(100)]
        ids = [f"{name}{i}" for i in range(100)]
        Path("in").mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": texts, "id": ids}), f"in/{name}.parquet")
    off = {"language_filter": "", "language_score_threshold": 0, "min_int_score": 0}
    off |= {"val_split": 0.1, "shard_size": 100}
    all_texts = prepare("in", "every", remove_duplicates=False, **off)
    for slices in (1, 7):
        monkeypatch.setattr(resumable_parts, "DUPLICATES_AT_A_TIME", 300 // slices + 1)
        unique = prepare("in", f"unique{slices}", **off)
        texts = texts_of(unique, "train", tokenizer) + texts_of(unique, "val", tokenizer)
        assert sorted(texts) == sorted(f"{text}<|endoftext|>" for text in pool)
    # Of equal texts the first stays, in the order of the files and of the shards in each.
    first_file = parts_texts("in/a.parquet", tokenizer, off)
    assert texts_of(unique, "train", tokenizer)[: len(first_file)] == first_file
    manifest, other = read_manifest(unique), read_manifest(all_texts)
    assert manifest["dropped"]["duplicate text"] == {
        "documents": 260,
        "tokens": other["tokens"] - manifest["tokens"],
    }
    assert manifest["text_bytes"] == sum(map(len, pool))
    assert contents(Path("unique1")) == contents(Path("unique7"))


def test_duplicates_of_more_files_than_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")
    paths = [tmp_path / f"{i}.npy" for i in range(60)]
    for i, path in enumerate(paths):
        np.save(path, np.array([[i % 50, 1], [100 + i, 2]], dtype=np.uint64))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(paths[0]) as file:  # the lowest free number
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 20, limits[1]))
    try:
        duplicates = resumable_parts.find_duplicates(paths)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [part.tolist() for part in duplicates] == [[i >= 50, False] for i in range(60)]


def parts_texts(path: str, tokenizer, settings: dict) -> list[str]:
    """The distinct training texts of one file, in the order of their first place."""
    out = prepare(path, "one_file", remove_duplicates=False, **settings)
    return list(dict.fromkeys(texts_of(out, "train", tokenizer)))


def test_ranks_in_any_order_and_number_equal_one_process(source):
    whole = prepare(source, "whole")
    for rank in (2, 0, 3, 1):
        prepare(source, "four", rank=rank, world_size=4)
        assert (Path("four/manifest.json")).exists() == (rank == 1)
    assert contents(Path("four")) == contents(whole)
    prepare(source, "mixed", rank=1, world_size=2)  # goes on with another number of processes
    prepare(source, "mixed", rank=2, world_size=3)
    prepare(source, "mixed")
    assert contents(Path("mixed")) == contents(whole)
    prepare(source, "many", rank=6, world_size=8)  # more processes than files
    prepare(source, "many")
    assert contents(Path("many")) == contents(whole)


def test_torchrun_variables_and_wrong_ranks(source, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    prepare(source)
    assert "the others have 3 of 5 files left" in capsys.readouterr().out
    refused("rank=2 is not one of world_size=2", source, rank=2)
    prepare(source, rank=0, world_size=1)
    assert read_manifest(Path("out"))


def test_a_finished_output_is_recognised_and_other_settings_are_refused(source, capsys):
    out = prepare(source)
    before = contents(out)
    capsys.readouterr()
    prepare(source)
    printed = capsys.readouterr().out
    assert "out is finished already, there is nothing to do" in printed and "train, in" in printed
    message = refused("a finished dataset with other settings", source, min_int_score=4)
    assert "min_int_score was 3, is 4" in message and "val_split" not in message
    prepare(source, workers=1, rank=0, world_size=3)  # no such setting
    prepare("gone/*.parquet")  # the input may be gone
    assert contents(out) == before
    write_parquet(Path("more/a.parquet"), random.Random(1), 10)
    refused("files was '5, 000.parquet to 004.parquet.* is '1, a.parquet", "more")
    (out / "val.npz").write_bytes(b"")
    refused("val.npz is missing or damaged", source)


def test_an_unfinished_output_refuses_other_settings(source):
    prepare(source, rank=0, world_size=2)
    message = refused("an unfinished dataset with other settings", source, val_split=0.5)
    assert "val_split was 0.02, is 0.5" in message and "out/.preparing" in message
    prepare(source)
    refused("is not the same|another script|other settings", source, "out", shard_size=5)


def test_other_data_in_the_output_is_left_alone(source):
    Path("out").mkdir()
    Path("out/mine.npz").write_bytes(b"mine")
    refused("mine.npz is there without a manifest.json", source)
    Path("out/manifest.json").write_text("{}")
    refused("damaged", source)
    assert Path("out/mine.npz").read_bytes() == b"mine"


@pytest.mark.parametrize("state", ["an unfinished dataset", "a dataset"])
def test_neither_script_touches_a_dataset_of_the_other(source, state):
    Path("in.txt").write_text("one<|endoftext|>two")
    text = ["--val_split=0.5", "--output_dir=out"]
    prepare(source, **({"rank": 0, "world_size": 2} if state == "an unfinished dataset" else {}))
    before = contents(Path("out"))
    for name in ("in.txt", "typo.txt"):
        with pytest.raises(UserError, match=f"out holds {state} of prepare_dataset_fineweb.py"):
            prepare_dataset.main([f"--input_file_path={name}", *text])
    assert contents(Path("out")) == before

    text[1] = "--output_dir=texts"
    assert prepare_dataset.main(["--input_file_path=in.txt", *text]) == 0
    if state == "an unfinished dataset":  # as a killed run leaves it
        Path("texts/train.npz").rename(made(Path("texts/.prepare_dataset")) / "train.npz")
    before = contents(Path("texts"))
    refused(f"texts holds {state} of prepare_dataset.py", source, "texts")
    assert contents(Path("texts")) == before


def test_a_dataset_without_its_shards_has_an_owner(source):
    """They may be on their way from another machine."""
    for path in prepare(source).glob("train-*"):
        path.unlink()
    Path("in.txt").write_text("one<|endoftext|>two")
    text = ["--input_file_path=in.txt", "--val_split=0.5"]
    with pytest.raises(UserError, match="out holds a dataset of prepare_dataset_fineweb.py"):
        prepare_dataset.main([*text, "--output_dir=out"])
    assert prepare_dataset.main([*text, "--output_dir=texts"]) == 0
    Path("texts/train.npz").unlink()
    refused("texts holds a dataset of prepare_dataset.py", source, "texts")


def test_what_an_earlier_version_left_is_not_taken_for_the_other_script_s(tokenizer):
    """Both scripts once had the same staging folder."""
    made(Path("out/.preparing"))
    Path("out/.preparing/train.npz").write_bytes(b"of a killed prepare_dataset.py")
    Path("in.txt").write_text("one<|endoftext|>two")
    text = ["--input_file_path=in.txt", "--val_split=0.5", "--output_dir=out"]
    assert prepare_dataset.main(text) == 0 and Path("out/train.npz").exists()


def test_a_run_that_prepared_nothing_leaves_the_folder_to_others(tokenizer):
    write("in/a.parquet")
    with pytest.raises(UserError, match="no column 'int_score'"):
        pq.write_table(pa.table({"text": ["a"], "id": ["b"]}), "in/b.parquet")
        prepare("in/b.parquet", language_filter="", language_score_threshold=0)
    Path("in.txt").write_text("one<|endoftext|>two")
    text = ["--input_file_path=in.txt", "--val_split=0.5", "--output_dir=out"]
    assert prepare_dataset.main(text) == 0 and Path("out/train.npz").exists()


def test_a_fineweb_run_does_not_wait_for_a_run_of_the_other_script(source):
    made(Path("out/.prepare_dataset"))
    with files.locked(Path("out"), "prepare_dataset.py"):
        refused("another preparation is writing to out", source)


def test_a_mistake_in_the_input_removes_nothing(tokenizer):
    made(Path("out/.prepare_dataset/kept"))
    with pytest.raises(UserError, match="typo.txt does not exist"):
        prepare_dataset.main(["--input_file_path=typo.txt", "--output_dir=out"])
    assert Path("out/.prepare_dataset/kept").exists()


def test_processes_with_different_settings_do_not_mix(source, monkeypatch):
    """From the first moment on, when no part is complete yet, and until the dataset is finished."""
    started = []

    def other_settings(*args):
        if not started:
            started.append(args)
            prepare(source, min_int_score=4, rank=1, world_size=2)
        return real(*args)

    real = script.prepare_parts
    monkeypatch.setattr(script, "prepare_parts", other_settings)
    refused("min_int_score was 4, is 3", source, rank=0, world_size=2)
    refused("min_int_score was 4, is 3", source)
    shutil.rmtree("out")

    folder = made(resumable_parts.part_folder(Path("out"), 1))
    resumable_parts.claim(Path("out"), {"min_int_score": 4})
    with files.locked(folder, "one that is at its first part"):
        refused("min_int_score was 4, is 3", source)
    (folder / ".lock").touch()  # as a killed process leaves it
    prepare(source, rank=0, world_size=2)

    def taken_over(*args):
        resumable_parts.write_record(Path("other/.preparing/run.json"), {"min_int_score": 4})
        (Path("other/.preparing/part-00001") / "something").mkdir(parents=True)
        Path("other/.preparing/part-00001/something/prepared").touch()
        return real(*args)

    monkeypatch.setattr(script, "prepare_parts", taken_over)
    refused("min_int_score was 4, is 3", source, "other")
    assert not list(Path("other").glob(".preparing/*/part.json"))

    def removed_in_between(*args):  # and another one started there
        record = json.loads((part / "part.json").read_text())
        record["identity"]["min_int_score"] = 4
        real(*args)
        (part / "part.json").write_text(json.dumps(record))

    part = resumable_parts.part_folder(Path("out"), 0)
    monkeypatch.setattr(script, "prepare_parts", removed_in_between)
    refused("min_int_score was 4, is 3", source)
    assert not Path("out/manifest.json").exists()


def test_a_file_that_changes_while_it_is_read(source, monkeypatch):
    write("in/a.parquet")
    Path("in.txt").write_text("one<|endoftext|>two")

    def changed(path):
        digest = real(path)
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # however coarse the clock is
        return digest

    real = files.file_sha256
    for module in (script, local_files):
        monkeypatch.setattr(module, "file_sha256", changed)
    refused("in/a.parquet was changed while it was read: run again", "in", val_split=0.5)
    for path in ("in.txt", "in/a.parquet"):
        with pytest.raises(UserError, match=f"{path} was changed while it was read: run again"):
            prepare_dataset.main([f"--input_file_path={path}", "--output_dir=texts"])
    assert not Path("texts").exists()


def test_a_file_reached_twice_is_read_once(source, capsys):
    folder = made(Path("in/deep"))
    shutil.copy(source / "000.parquet", folder / "a.parquet")
    (folder / "loop").symlink_to("..")
    (folder / "also").symlink_to("..")  # two loops: 2^40 paths
    (folder / ".hidden").mkdir()
    expected = contents(prepare("in/**/*.parquet", "once"))
    assert "note" not in capsys.readouterr().out
    assert read_manifest("once")["documents_read"] == 600
    Path("in/deep/b.parquet").symlink_to("a.parquet")
    assert contents(prepare("in/deep/*", "twice")) == expected
    printed = capsys.readouterr().out
    assert (
        "note: the same file is read only once: in/deep/b.parquet is in/deep/a.parquet" in printed
    )


def test_two_processes_that_finish_together(source, monkeypatch):
    """The one that comes later finds the dataset finished, or waits for it."""
    whole = contents(prepare(source, "whole"))
    prepare(source, rank=0, world_size=2)
    command = [sys.executable, script.__file__, "--output_dir=out", "--world_size=1"]
    command += [f"--{k}={v}" for k, v in (FINEWEB | {"source": source}).items()]
    prepare(source, "out", rank=1, world_size=4)
    with files.locked(Path("out"), "test"):
        process = subprocess.Popen([*command, "--rank=0"], stdout=subprocess.PIPE, text=True)
        while len(list(Path("out").glob(".preparing/part-*/part.json"))) < 5:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.3)
        assert process.poll() is None and not Path("out/manifest.json").exists()  # it waits
    assert "next: python train.py" in process.communicate(timeout=60)[0]
    assert process.returncode == 0 and contents(Path("out")) == whole


def test_a_process_that_comes_late_makes_nothing_again(source, monkeypatch):
    whole = contents(prepare(source))
    real = script.input_files

    def slow(config):  # the others finish while this one lists its input
        (Path("out")).rename("hidden")
        monkeypatch.setattr(script, "check_disk", lambda *_: Path("hidden").rename("out"))
        return real(config)

    Path("out/manifest.json").rename("kept.json")
    Path("out/.preparing").mkdir()
    monkeypatch.setattr(script, "input_files", slow)
    monkeypatch.setattr(
        script, "prepare_parts", late(script.prepare_parts, Path("kept.json"), Path("out"))
    )
    prepare(source)
    assert contents(Path("out")) == whole


def late(prepare_parts, manifest: Path, output: Path):
    def after(*args):
        manifest.rename(output / "manifest.json")
        prepare_parts(*args)

    return after


def test_a_shard_that_is_not_whole_at_the_end_is_named(source, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resumable_parts, "write_manifest", stop)
        prepare(source)
    path = Path("out/train-00001-of-00005.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused("train-00001-of-00005.npz is missing or damaged", source)
    path.write_bytes(whole)
    prepare(source)
    assert not Path("out/.preparing").exists()


def test_an_unfinished_output_of_local_files_refuses_the_hub(source, server):
    prepare(source, rank=0, world_size=2)
    refused("source was None, is 'owner/texts'", "owner/texts", revision="main")


def test_an_input_of_the_same_size_that_changed_is_refused(source):
    Path("in").mkdir()
    for path in source.iterdir():
        (Path("in") / path.name).write_bytes(path.read_bytes())
    prepare("in", rank=0, world_size=2)
    path = Path("in/000.parquet")
    content = path.read_bytes()
    os.utime(path, (1, 1))  # touched, the same
    prepare("in", rank=0, world_size=2)
    path.write_bytes(content[:5000] + b"?" + content[5001:])
    refused("000.parquet is not the file that was prepared", "in")
    path.write_bytes(content)
    prepare("in")


def test_memory_does_not_follow_the_size_of_rows_shards_or_the_vocabulary():
    """60 MB of random words in documents of 500 KB take at most 250 MB more than 15 MB do.

    Both are one row group. The growth is about 130 MB, of the tokenizer's cache, which is bounded;
    with the whole row group in memory it is 480 MB.
    """
    rng = random.Random(5)
    for name, n in (("small", 30), ("large", 120)):
        texts = [" ".join(f"{rng.getrandbits(60):x}" for _ in range(31_000)) for _ in range(n)]
        Path(name).mkdir()
        table = pa.table({"text": texts, "id": [str(i) for i in range(n)]})
        pq.write_table(table, f"{name}/a.parquet", write_batch_size=1)  # pages of one document
    settings = "--language_filter= --language_score_threshold=0 --min_int_score=0 --val_split=0.1"
    settings += " --workers=2"  # each has a cache of its own
    growth = peak_growth("prepare_dataset_fineweb", settings, "source=small", "source=large")
    assert growth < 250e6


@pytest.mark.parametrize("nth", range(0, 30, 3))
def test_a_failure_at_any_rename_loses_nothing(source, monkeypatch, nth):
    """Every complete file gets its name by os.replace; the disk is full at the nth of them."""
    real, count = os.replace, [0]

    def full(*args):
        count[0] += 1
        if count[0] > nth:
            raise OSError(28, "No space left on device", str(args[1]))
        return real(*args)

    monkeypatch.setattr(os, "replace", full)
    try:
        prepare(source, shard_size=1_000_000)
        assert nth >= 16  # two shards and a record, of five parts, and seven names
    except OSError as error:
        assert error.errno == 28
        monkeypatch.setattr(os, "replace", real)
        prepare(source, shard_size=1_000_000)
    monkeypatch.setattr(os, "replace", real)
    assert contents(Path("out")) == contents(prepare(source, "whole", shard_size=1_000_000))


def test_a_full_disk_is_one_line_and_the_next_run_continues(source):
    command = [sys.executable, script.__file__]
    command += [f"--{k}={v}" for k, v in (FINEWEB | {"source": source}).items()]
    limited = f"ulimit -f 50; exec {' '.join(command)} --output_dir=out"  # 50 KB a file
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert re.search(r"error: a file is larger.*free some space.*\n$", result.stderr)
    prepare(source)
    assert contents(Path("out")) == contents(prepare(source, "whole"))


def test_ctrl_c_says_how_to_go_on(source):
    command = [sys.executable, script.__file__, "--output_dir=out"]
    command += [f"--{k}={v}" for k, v in (FINEWEB | {"source": source}).items()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(Path("out").glob(".preparing/part-*/part.json")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    if process.returncode != 0:  # it may have been done already
        assert process.returncode == 130
        assert re.search(r"[1-5] of 5 files are prepared: run the same command", errors)
        assert "Traceback" not in errors
        prepare(source)
    assert contents(Path("out")) == contents(prepare(source, "whole"))


def test_two_processes_cannot_make_the_same_part(source, monkeypatch):
    with files.locked(made(resumable_parts.part_folder(Path("out"), 0)), "other"):
        refused(
            "another prepare_dataset_fineweb.py is writing to out/.preparing/part-00000", source
        )
    prepare(source)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_damaged_and_unfit_files_are_named_and_the_others_kept(source):
    bad = make_source(Path("bad"), 0, random.Random(0))
    for path in list(source.iterdir())[:2]:
        (bad / f"0{path.name}").write_bytes(path.read_bytes())
    whole = sorted(source.iterdir())[2].read_bytes()

    def rejects(content: bytes, pattern: str) -> None:
        (bad / "1.parquet").write_bytes(content)
        message = refused(pattern, bad, "bad_out", rank=0, world_size=1)
        assert "bad/1.parquet" in message and len(message) < 500

    rejects(b"", "damaged or not Parquet")
    rejects(whole[: len(whole) // 2], "damaged or not Parquet")
    done = contents(Path("bad_out"))
    assert sum(name.endswith("part.json") for name in done) == 2  # what was done is kept

    metadata = pq.ParquetFile(sorted(source.iterdir())[2]).metadata
    place = metadata.row_group(3).column(0).dictionary_page_offset + 30
    rejects(whole[:place] + b"\xff" * 200 + whole[place + 200 :], "row group 3 is damaged")
    for columns, pattern in [
        ({"text": [1, 2, 3, 4, 5, 6]}, "'text' as int64, not as a string"),
        ({"language_score": list("abcdef")}, "'language_score' as string, not as a number"),
        ({"id": [*"abcde", None]}, "row group 2, row 1: the document has no id"),
        ({"text": pa.array([b"ok"] * 5 + [b"\xff"]).cast(pa.binary())}, "'text' as binary"),
    ]:
        write("one/x.parquet", row_group_size=2, **columns)
        rejects(Path("one/x.parquet").read_bytes(), pattern)
    invalid = pa.Array.from_buffers(pa.string(), 6, pa.array([b"ok"] * 5 + [b"\xff"]).buffers())
    write("one/x.parquet", row_group_size=2, text=invalid)
    rejects(Path("one/x.parquet").read_bytes(), "row group 2 is damaged.*[Uu][Tt][Ff]")
    (bad / "1.parquet").write_bytes(whole)
    prepare(bad, "bad_out")
    (bad / "1.parquet").write_bytes(whole + b"more")
    refused("1.parquet is not the file that was prepared", bad, "bad_out")


def test_nothing_passes_the_filters_or_nothing_is_for_validation():
    write("in/a.parquet")
    message = refused("none of the 6 documents passed", "in", language_filter="de")
    assert "1 empty text, 5 language is not de" in message
    refused("leaves no document for validation", "in", "other", val_split=1e-9)


@pytest.mark.parametrize(
    "settings, pattern",
    [
        ({"source": ""}, "source is empty"),
        ({"source": "nowhere/*.parquet"}, "no files match"),
        ({"source": "/nowhere"}, "no files match"),
        ({"val_split": 0}, "val_split=0.0 is not between 0 and 1"),
        ({"val_split": 1}, "val_split=1.0 is not"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"workers": -1}, "workers=-1"),
        ({"source": "owner/name", "revision": ""}, "revision is empty"),
        ({"world_size": 2, "rank": 5}, "rank=5 is not one of world_size=2"),
        ({"world_size": 2}, "rank=-1 is not one of world_size=2"),
        ({"language_score_threshold": 95}, "language_score_threshold is a probability"),
        ({"min_int_score": 6}, "min_int_score goes from 0 to 5"),
        ({"output_dir": ""}, "output_dir is empty"),
    ],
)
def test_wrong_settings(settings, pattern):
    refused(pattern, **({"source": "x"} | settings))


def test_too_little_room_is_said_first(source, monkeypatch, capsys):
    usage = SimpleNamespace(free=100_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    prepare(source)
    assert "note: " in capsys.readouterr().out


# The hub ----------------------------------------------------------------------------------------

CARD = {
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
    ]
}


@pytest.fixture
def server(source, monkeypatch):
    """A hub with the five files, and one of another configuration."""
    contents = {f"sample/10BT/{p.name}": p.read_bytes() for p in sorted(source.iterdir())}
    with FakeHub() as server:
        server.add(
            "datasets", "owner/texts", contents | {"data/x/0.parquet": b"", "a.md": b"x"}, CARD
        )
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_download, "CHUNK_BYTES", 4096)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", constants.DOWNLOAD_CHUNK_SIZE)
        monkeypatch.setattr(hub_download, "WAITS", (0.01, 0.01, 0.01))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


def shards(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(output).items() if name.endswith(".npz")}


def fetches(server: FakeHub, name: str) -> list[str]:
    return [request.rpartition(name)[2].strip() for request in server.requests if name in request]


def test_hub_equals_local_whatever_the_network_does(source, server):
    names = [f"sample/10BT/{i:03d}.parquet" for i in range(5)]
    server.faults = {
        names[0]: [("drop", 20_000), ("status", 503), ("drop", 10_000)],
        names[1]: [("status", 429), ("truncate", 9_000)],
        names[2]: [("corrupt", 5_000)],
        names[3]: [("drop", 0), ("status", 500), ("status", 502)],
        names[4]: [("drop", 20_000), ("truncate", 9_000), ("longer", 500)],  # the second: HTTP 416
    }
    out = prepare("owner/texts", revision="main")
    assert shards(out) == shards(prepare(source, "local"))
    manifest = read_manifest(out)
    assert [entry["name"] for entry in manifest["sources"]] == names
    assert manifest["settings"]["revision"] == "main"
    ranges = fetches(server, names[0])
    assert ranges[0] == "" and all(re.fullmatch(r"bytes=\d+-", r) for r in ranges[1:])
    assert fetches(server, names[1])[-1] == "bytes=9000-"
    assert fetches(server, names[2]) == ["", ""]  # all of it again
    assert not fetches(server, "data/x")
    assert not list(out.rglob("input.parquet*"))
    n_requests = len(server.requests)
    prepare("owner/texts", revision="main")  # finished: the network is not needed
    assert len(server.requests) == n_requests
    refused("revision was 'main', is", "owner/texts", revision=COMMIT)


def test_a_redirect_to_another_host_without_ranges_gets_no_token(source, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    name = "sample/10BT/001.parquet"
    with FakeHub() as cdn:
        cdn.repositories = server.repositories
        cdn.faults = {name: [("drop", 20_000), ("whole", 0)]}
        server.cdn = cdn
        out = prepare("owner/texts", revision=COMMIT)
    assert shards(out) == shards(prepare(source, "local"))
    requests = zip(server.requests, server.authorizations, strict=True)
    ours = [
        token for request, token in requests if "owner/texts" in request
    ]  # not the library's own
    assert set(ours) == {"Bearer hf_secret"} and set(cdn.authorizations) == {None}
    assert fetches(cdn, name)[1].startswith("bytes=")


@pytest.mark.parametrize(
    "name",
    ["../up.parquet", "{here}/up.parquet", "a/../../up.parquet", "..\\up.parquet", "\33.parquet"],
)
def test_a_file_name_that_leads_out_of_the_folder_is_refused(server, tmp_path, name):
    name = name.format(here=tmp_path)
    server.add("datasets", "owner/texts", {name: b"x"})
    message = refused(
        "the file name", "owner/texts", revision=COMMIT, config_name="", download_dir="kept/here"
    )
    assert repr(name) in message and message.isprintable()
    assert not list(tmp_path.rglob("*"))


def test_a_network_that_wants_a_log_in(server):
    server.log_in = True
    refused("cannot read what .* says about owner/texts .*log-in", "owner/texts", revision=COMMIT)


def test_a_file_of_another_length_is_said(server):
    server.faults["sample/10BT/000.parquet"] = [("longer", 500)] * 4
    refused("Consistency check failed: file should be of", "owner/texts", revision=COMMIT)


def test_two_processes_share_a_download(server, source, monkeypatch):
    """The second waits for the first, instead of adding to the same partial file."""
    both, http_get = threading.Barrier(2), hub_download.http_get

    def meet_then_get(*args, **kwargs) -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        http_get(*args, **kwargs)

    monkeypatch.setattr(hub_download, "http_get", meet_then_get)
    file = hub_download.dataset_files("owner/texts", "sample-10BT", COMMIT)[0]
    with ThreadPoolExecutor(2) as pool:
        paths = [pool.submit(hub_download.download, file, Path("kept/0.parquet")) for _ in range(2)]
        contents = {path.result().read_bytes() for path in paths}
    assert contents == {(source / "000.parquet").read_bytes()}
    assert fetches(server, file.name) == [""] and os.listdir("kept") == ["0.parquet"]


def test_a_hub_that_does_not_answer(server, monkeypatch):
    monkeypatch.setattr(hub_download, "TIMEOUT", 0.2)
    server.api_delay = 60
    refused("cannot fetch owner/texts .*check the network", "owner/texts", revision=COMMIT)


def test_a_download_is_deleted_as_soon_as_its_part_is_complete(server, monkeypatch):
    name = "sample/10BT/003.parquet"
    server.faults[name] = [("status", 503)] * 50
    with pytest.raises(UserError):
        prepare("owner/texts", revision=COMMIT)
    for part in Path("out/.preparing").glob("part-*"):
        assert not ((part / "part.json").exists() and (part / "input.parquet").exists())


def test_a_file_that_is_not_what_was_published_is_refused_and_nothing_lost(server, source):
    name = "sample/10BT/002.parquet"
    repository = server.repositories["datasets", "owner/texts"]
    repository.published[name] = "0" * 64
    message = refused(
        "does not have the sha256 that the hub publishes", "owner/texts", revision=COMMIT
    )
    assert name in message
    assert (Path("out/.preparing/part-00000/part.json")).exists()
    del repository.published[name]  # as it was meant to be
    refused("files was", "owner/texts", revision=COMMIT)
    prepare("owner/texts", "again", revision=COMMIT)
    assert shards(Path("again")) == shards(prepare(source, "local"))


def test_a_download_goes_on_in_the_next_run(server):
    name = "sample/10BT/000.parquet"
    server.faults[name] = [("drop", 30_000), *[("status", 503)] * 50]
    refused(
        "cannot fetch owner/texts/sample.*what has arrived is kept", "owner/texts", revision=COMMIT
    )
    partial = Path("out/.preparing/part-00000/input.parquet.incomplete")
    assert partial.stat().st_size >= 28_000
    server.faults[name] = []
    server.requests.clear()
    prepare("owner/texts", revision=COMMIT)
    assert fetches(server, name)[0].startswith("bytes=2")
    assert not list(Path("out").rglob("*.incomplete"))


def test_downloads_are_kept_only_where_that_is_asked_for(server):
    prepare("owner/texts", revision=COMMIT, download_dir="kept")
    assert len(list(Path("kept").rglob("*.parquet"))) == 5
    server.requests.clear()
    prepare("owner/texts", "again", revision=COMMIT, download_dir="kept", val_split=0.1)
    assert not fetches(server, ".parquet")


def test_what_the_hub_does_not_have(server, monkeypatch):
    for settings, pattern in [
        ({"source": "owner/nothing"}, "the hub has no owner/nothing"),
        ({"revision": "f" * 40}, "the hub has no owner/texts at revision fff"),
        ({"config_name": "sample"}, "no config_name 'sample' .known: default, sample-10BT"),
    ]:
        refused(pattern, **({"source": "owner/texts", "revision": COMMIT} | settings))
    assert not Path("out").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set", "owner/texts", revision=COMMIT)


def test_no_network_at_all(server, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refused(
        "cannot fetch owner/texts .*check the network", "owner/texts", revision=COMMIT
    )
    assert "http://127.0.0.1:9" in message
    waits = capsys.readouterr().err.splitlines()  # who waits for it sees why
    assert len(waits) == 3 and all("trying again in 0.01 s" in line for line in waits)


def test_one_file_that_cannot_fit_on_the_disk_is_not_fetched(server, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused("alone takes", "owner/texts", revision=COMMIT)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is not here")
def test_real_text(tokenizer, capsys):
    """The four real files, as a user would: 16,443 documents, of which 7,952 pass."""
    source = SHARED / "data/fineweb_edu_like"
    assert script.main([f"--source={source}", "--output_dir=out"]) == 0
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["documents_read"] == 16_443 and manifest["documents"] == 7_952
    assert manifest["tokens"] == 10_006_663
