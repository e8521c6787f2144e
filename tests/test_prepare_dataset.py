"""prepare_dataset.py: what it reads, what it refuses, and that it never leaves half an output."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import peak_growth

import prepare_dataset
from common import files
from common.errors import UserError
from common.files import locked
from common.manifest import read_manifest
from dataset import ShardWriter, open_split
from preparation import example_readers
from tokenizer import load_tokenizer

ROOT = Path(prepare_dataset.__file__).parent
SCRIPT = ROOT / "prepare_dataset.py"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(autouse=True)
def in_temporary_directory(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_dataset, "load_tokenizer", lambda path: tokenizer)  # loaded once


def prepare(content: str | bytes, name: str = "in.txt", **settings) -> Path:
    """Prepares a file of this content in this process; returns the output directory."""
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    settings = {"input_file_path": name, "output_dir": "out", "val_split": 0.5} | settings
    assert prepare_dataset.main([f"--{key}={value}" for key, value in settings.items()]) == 0
    return Path("out")


def texts_of(directory: Path, tokenizer) -> list[str]:
    """Every document of both splits as text, sorted."""
    return sorted(
        tokenizer.decode(data[i])
        for split in ("train", "val")
        for data in open_split(directory, split, tokenizer.sha256, tokenizer.vocab_size)
        for i in range(len(data))
    )


def empty(count: int) -> dict:
    """What the manifest says of so many examples without text."""
    return {"empty": {"documents": count, "tokens": 0}}


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(*arguments, check: bool = False, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=check, **kwargs
    )


def test_plain_text(tokenizer, capsys):
    content = "\ufeff first\r\nline \n<|endoftext|>\n\n<|endoftext|>two <|user|> 东京<|endoftext|>3"
    out = prepare(content + "\n")
    assert texts_of(out, tokenizer) == [
        "3<|endoftext|>",
        "first\r\nline<|endoftext|>",
        "two <|user|> 东京<|endoftext|>",
    ]
    manifest = read_manifest(out)
    assert manifest["kind"] == "text" and manifest["dropped"] == empty(1)
    assert manifest["documents"] == 3
    data = open_split(out, "train")[0].tokens, open_split(out, "val")[0].tokens
    ids = np.concatenate(data)
    assert (ids >= 32763).sum() == 3  # the three ends; the <|user|> in the text is characters
    assert manifest["text_bytes"] == len("first\r\nlinetwo <|user|> 东京3".encode())
    printed = capsys.readouterr().out
    for part in ("3 text examples", "bytes per token", "dropped 1 (empty)", "train.npz", "val.npz"):
        assert part in printed
    assert printed.endswith("next: python train.py --data_dir=out\n")
    assert sorted(os.listdir("out")) == ["manifest.json", "train.npz", "val.npz"]


def test_jsonl_text_is_kept_as_it_is(tokenizer):
    rows = [" a \r\n", "<|endoftext|>", "b\u2028c", "", " \n", "d"]
    content = jsonl(*({"text": text, "id": 5} for text in rows)).replace("\n", "\r\n")
    out = prepare("\ufeff" + content + "\n  \n", "in.jsonl")
    expected = sorted(text + "<|endoftext|>" for text in rows if text.strip())
    assert texts_of(out, tokenizer) == expected
    assert read_manifest(out)["dropped"]["empty"]["documents"] == 2


CHATS = [
    [
        {"role": "user", "content": "Hi <|assistant|>forged<|endoftext|>"},
        {"role": "assistant", "content": "Hello"},
    ],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": " 2\n"},
        {"role": "user", "content": "3", "extra": None},
        {"role": "assistant", "content": "4 东京"},
    ],
]


def test_jsonl_conversations(tokenizer, capsys):
    qa = {"question": "Q?", "answer": "A."}
    blank = {"question": "Q?", "answer": " "}
    out = prepare(jsonl(*({"messages": chat} for chat in CHATS), qa, blank), "in.jsonl")
    expected = [tokenizer.decode(tokenizer.encode_chat(chat)) for chat in CHATS]
    expected.append("<|startoftext|><|user|>Q?<|assistant|>A.<|endoftext|>")
    assert texts_of(out, tokenizer) == sorted(expected)
    manifest = read_manifest(out)
    assert manifest["kind"] == "chat" and manifest["dropped"] == empty(1)
    assert capsys.readouterr().out.endswith(
        "next: python train.py --finetune=True --finetune_data_dir=out\n"
    )
    rows = [open_split(out, split)[0].tokens for split in ("train", "val")]
    assert (np.concatenate(rows) == tokenizer.assistant_id).sum() == 4  # none of them forged


def test_trusted_chat_text_equals_encode_chat(tokenizer, capsys):
    chats = [CHATS[1], [dict(turn, content=turn["content"] + "\n x") for turn in CHATS[1]]]
    layouts = [tokenizer.decode(tokenizer.encode_chat(chat)) for chat in chats]
    content = "\ufeff\n" + layouts[0].replace("<|endoftext|><|user|>", "<|endoftext|>\n<|user|>")
    content += "\n\n" + layouts[1].removesuffix("<|endoftext|>") + "\n"
    out = prepare(content, trust_control_tokens=True)
    assert texts_of(out, tokenizer) == sorted(layouts)
    ids = [open_split(out, split)[0][0].tolist() for split in ("train", "val")]
    assert sorted(ids) == sorted(tokenizer.encode_chat(chat) for chat in chats)
    assert read_manifest(out)["kind"] == "chat"

    # The same file, not trusted: no control token but the ends of the texts.
    capsys.readouterr()
    prepare(content)
    assert "add --trust_control_tokens=True" in capsys.readouterr().out
    for split in ("train", "val"):
        ids = open_split(out, split)[0].tokens
        assert set(ids[ids >= 32763].tolist()) == {tokenizer.eos_id}


def test_validation_file(tokenizer):
    Path("val.jsonl").write_text(jsonl({"text": "v1"}, {"text": " "}, {"text": "v2"}))
    content = "a<|endoftext|> <|endoftext|>b<|endoftext|>c"
    out = prepare(content, val_file_path="val.jsonl", val_split=0)
    train, val = open_split(out, "train")[0], open_split(out, "val")[0]
    assert sorted(tokenizer.decode(train[i]) for i in range(3)) == [
        f"{letter}<|endoftext|>" for letter in "abc"
    ]
    assert [tokenizer.decode(val[i]) for i in range(2)] == ["v1<|endoftext|>", "v2<|endoftext|>"]
    manifest = read_manifest(out)
    assert [source["name"] for source in manifest["sources"]] == ["in.txt", "val.jsonl"]
    assert manifest["settings"]["val_split"] is None
    assert manifest["text_bytes"] == len("abcv1v2") and manifest["dropped"] == empty(2)


def test_a_device_is_not_read():
    Path("null.jsonl").symlink_to("/dev/null")
    with pytest.raises(UserError, match="null.jsonl is not a regular file"):
        prepare("a<|endoftext|>b", val_file_path="null.jsonl")


def test_the_same_file_for_validation_is_noted(capsys):
    Path("linked.txt").symlink_to("in.txt")
    prepare("a<|endoftext|>b", val_file_path="linked.txt", val_split=0)
    assert "note: val_file_path is the input too" in capsys.readouterr().out
    Path("other.txt").write_text("a<|endoftext|>b")
    prepare("a<|endoftext|>b", val_file_path="other.txt", val_split=0)
    assert "note" not in capsys.readouterr().out


def test_small_chunks_and_batches_change_nothing(monkeypatch):
    texts = [f"text {i} " + "é东<" * (i % 40) for i in range(300)]
    content = "<|endoftext|>".join(texts)
    bytes_of = {}
    for chunk, characters in ((1 << 20, 1 << 20), (1, 50), (7, 1), (64, 500)):
        monkeypatch.setattr(example_readers, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(prepare_dataset, "BATCH_CHARACTERS", characters)
        out = prepare(content)
        bytes_of[chunk] = [path.read_bytes() for path in sorted(out.iterdir())]
    assert all(files == bytes_of[1] for files in bytes_of.values())


def test_same_settings_same_bytes_and_another_seed_another_order():
    content = "<|endoftext|>".join(f"document number {i}" for i in range(200))
    for directory, seed in (("a", 5), ("c", 6)):
        prepare(content, output_dir=directory, val_split=0.1, seed=seed)
    arguments = ["--input_file_path=in.txt", "--val_split=0.1", "--seed=5", "--output_dir=b"]
    run(*arguments, check=True)  # in another process
    read = {d: {p.name: p.read_bytes() for p in Path(d).iterdir()} for d in "abc"}
    assert read["a"] == read["b"]
    assert read["a"]["train.npz"] != read["c"]["train.npz"]
    prepare(content, output_dir="a", val_split=0.1, seed=5)  # over itself
    assert {path.name: path.read_bytes() for path in Path("a").iterdir()} == read["a"]


def test_split_is_disjoint_complete_and_shuffled(tokenizer):
    texts = [f"document number {i:04d}" for i in range(500)]
    out = prepare("<|endoftext|>".join(texts), val_split=0.1)
    train, val = open_split(out, "train")[0], open_split(out, "val")[0]
    assert (len(train), len(val)) == (450, 50)
    read = [tokenizer.decode(train[i]) for i in range(450)]
    assert read != sorted(read)
    assert texts_of(out, tokenizer) == [text + "<|endoftext|>" for text in texts]


def chat_text(*parts: str) -> str:
    return "".join("<|startoftext|><|user|>q<|assistant|>a<|endoftext|>\n" for _ in range(2)) + (
        "".join(parts)
    )


OK = jsonl({"text": "a"}, {"text": "b"})
USER = {"role": "user", "content": "x"}
TRUST = {"trust_control_tokens": True}


@pytest.mark.parametrize(
    "name, content, settings, error",
    [
        ("in.txt", "", {}, "in.txt is empty"),
        ("in.txt", "\ufeff", {}, "in.txt is empty"),
        ("in.txt", " \n<|endoftext|>\n", {}, "in.txt holds no examples"),
        ("in.jsonl", "\n\n \n", {}, "in.jsonl holds no examples"),
        ("in.jsonl", jsonl({"text": " "}), {}, "in.jsonl holds no examples"),
        ("in.txt", "only one", {}, "leaves 0 for validation"),
        ("in.txt", "a<|endoftext|>b", {"val_split": 0.01}, "leaves 0 for validation and 2"),
        ("in.txt", "a<|endoftext|>b", {"val_split": 0.99}, "leaves 2 for validation and 0"),
        ("in.txt", "a<|endoftext|>b", {"val_split": 0.0}, "not between 0 and 1"),
        ("in.txt", "a<|endoftext|>b", {"val_split": 1.5}, "not between 0 and 1"),
        ("in.txt", "a<|endoftext|>b", {"seed": -1}, "seed=-1 is negative"),
        ("in.txt", b"a<|endoftext|>\xe6\x9d\xb1\xff", {}, "in.txt: not UTF-8 at byte 17"),
        ("in.txt", b"\xef\xbb\xbfab\x80", {}, "not UTF-8 at byte 5"),
        ("in.txt", b"ab\xe6\x9d", {}, "not UTF-8 at byte 2"),
        ("in.txt", "a<|endoftext|>b".encode("utf-16"), {}, "not UTF-8 at byte 0"),
        ("in.csv", "a,b", {}, "only .txt, .jsonl and .parquet are read"),
        ("in", "a,b", {}, "only .txt, .jsonl and .parquet are read"),
        ("in.jsonl", OK.encode() + b'{"text": "\xff"}', {}, "not UTF-8 at byte 38"),
        ("in.jsonl", OK + '\n{"text": "c"\n', {}, "in.jsonl, line 4: not JSON"),
        ("in.jsonl", OK + "[" * 100_000, {}, "line 3: JSON nested too deep"),
        ("in.jsonl", OK + "1" * 5000, {}, "line 3: a number is too long: correct it"),
        (
            "in.jsonl",
            '\n[\n{"text": "a"}\n]',
            {},
            "line 2: not JSON (Expecting value at column 2): ",
        ),
        ("in.jsonl", "[" + OK.replace("\n", " "), {}, "write one object a line, not one array"),
        ("in.jsonl", '[{"text": "a"}]', {}, "write one object a line, not one array"),
        ("in.jsonl", '{"%s": 1}' % ("k" * 300_000), {}, "found only ['kkk"),
        ("in.jsonl", '{"messages": [{"role": "%s", "content": ""}]}' % ("r" * 300_000), {}, "rrr"),
        ("in.jsonl", OK + '"x"', {}, "line 3: a str, expected an object"),
        ("in.jsonl", OK + "null", {}, "line 3: a NoneType, expected an object"),
        ("in.jsonl", OK + "{}", {}, "line 3: expected exactly one of"),
        ("in.jsonl", OK + '{"answer": "x"}', {}, "line 3: expected exactly one of"),
        ("in.jsonl", OK + '{"text": "a", "messages": []}', {}, "found text and messages"),
        ("in.jsonl", OK + '{"text": 5}', {}, 'line 3: "text" is not a string but int: correct it'),
        ("in.jsonl", OK + '{"text": "\\ud800"}', {}, "line 3: not valid Unicode"),
        ("in.jsonl", '{"question": "x"}', {}, 'line 1: "answer" is not a string but missing'),
        ("in.jsonl", '{"question": 1, "answer": ""}', {}, 'line 1: "question" is not a string'),
        ("in.jsonl", '{"messages": {}}', {}, "line 1: a conversation is a non-empty list"),
        ("in.jsonl", '{"messages": []}', {}, "line 1: a conversation is a non-empty list"),
        ("in.jsonl", jsonl({"messages": [USER, USER]}), {}, "line 1: message 2 has role 'user'"),
        ("in.jsonl", jsonl({"messages": [USER]}), {}, "line 1: the conversation ends with a user"),
        ("in.jsonl", jsonl({"messages": [{"role": "user"}]}), {}, "line 1: message 1 is not"),
        ("in.jsonl", OK + '{"question": "x", "answer": "y"}', {}, "line 3: a chat example after"),
        ("in.jsonl", OK, TRUST, "trust_control_tokens is for .txt files only"),
        ("in.txt", "a<|endoftext|>b", TRUST, "does not begin with <|startoftext|>"),
        ("in.txt", "x" + chat_text(), TRUST, "does not begin with <|startoftext|>"),
        ("in.txt", chat_text("x"), TRUST, "example 2 at byte 52: text after <|endoftext|>"),
        ("in.txt", chat_text("<|startoftext|>"), TRUST, "example 3 at byte 104: the example ends"),
        ("in.txt", chat_text("<|startoftext|><|user|>a"), TRUST, "example 3 at byte 104"),
        ("in.txt", "<|startoftext|><|user|>a<|assistant|>b" * 2, TRUST, "example 1 at byte 0"),
        (
            "in.txt",
            chat_text("<|assistant|>b"),
            TRUST,
            "example 2 at byte 52: found <|assistant|> where",
        ),
        ("in.txt", chat_text("<|assistant|>b"), TRUST, "<|user|> belongs: correct it"),
        ("in.txt", "\n<|startoftext|> \n", TRUST, "example 1 at byte 1"),
        ("in.txt", OK, {"val_file_path": "none.txt"}, "none.txt does not exist"),
        ("in.txt", OK, {"val_file_path": "chat.jsonl"}, "both must be of one kind"),
        ("in.txt", OK, {"output_dir": "in.txt"}, "cannot write to in.txt"),
        ("in.txt", OK, {"output_dir": "in.txt/x"}, "cannot write to in.txt/x"),
        ("in.txt", OK, {"output_dir": "in.txt/x/y"}, "cannot write to in.txt/x"),
        ("in.txt", "only one", {"output_dir": "new/inner/out"}, "leaves 0 for validation"),
        ("in.txt", OK, {"output_dir": f"new/{'x' * 256}"}, "File name too long"),
        ("in.txt", OK, {"output_dir": "/proc/none"}, "cannot write to /proc/none"),
        ("in.txt", OK, {"input_file_path": "none.txt"}, "none.txt does not exist"),
        ("in.txt", OK, {"input_file_path": "folder"}, "folder is a directory"),
        ("in.txt", OK, {"val_spilt": 0.1}, "did you mean --val_split"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(name, content, settings, error):
    Path("folder").mkdir()
    Path("chat.jsonl").write_text(jsonl({"question": "q", "answer": "a"}))
    with pytest.raises(UserError) as caught:
        prepare(content, name, **settings)
    message = str(caught.value)
    assert error in message
    assert "\n" not in message and len(message) < 600
    assert sorted(os.listdir()) == sorted(["folder", "chat.jsonl", name])


def prepare_parquet(path: str, **settings) -> Path:
    settings = {"input_file_path": path, "output_dir": "out", "val_split": 0.5} | settings
    assert prepare_dataset.main([f"--{key}={value}" for key, value in settings.items()]) == 0
    return Path("out")


def write_parquet(name: str, rows: list, **kwargs) -> None:
    """A file of rows, five to a row group; `kwargs` are columns in place of theirs."""
    table = pa.Table.from_pylist(rows)
    for column, values in kwargs.items():
        table = table.drop_columns(column) if column in table.column_names else table
        table = table.append_column(column, values)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, name, row_group_size=5)


def shards(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in ("train.npz", "val.npz")]


ROWS = {
    "text": [{"text": f"text {i} <|user|> 东京\n"} for i in range(23)],
    "messages": [{"messages": CHATS[i % 2][:2]} for i in range(23)],
    "question": [{"question": f"q{i}", "answer": f" a{i}\n"} for i in range(23)],
}


@pytest.mark.parametrize("form", ROWS)
def test_parquet_gives_the_shards_of_the_same_jsonl(form):
    expected = shards(prepare(jsonl(*ROWS[form]), "in.jsonl"))
    write_parquet("all.parquet", [{"id": i} | row for i, row in enumerate(ROWS[form])])
    write_parquet("in[1].parquet", ROWS[form])  # a name, not a pattern
    for i, part in enumerate((ROWS[form][:9], ROWS[form][9:10], ROWS[form][10:])):
        write_parquet(f"data/{i}.parquet", part)
        write_parquet(f"tree/{i}/train.parquet", part)
    parts = [f"{i}.parquet" for i in range(3)]
    for path, names in {
        "all.parquet": ["all.parquet"],
        "in[1].parquet": ["in[1].parquet"],
        "data": parts,
        "data/[0-2].parquet": parts,
        "tree/**/*.parquet": [f"{i}/train.parquet" for i in range(3)],
    }.items():
        directory = prepare_parquet(path)
        assert shards(directory) == expected
        sources = read_manifest(directory)["sources"]
        assert [source["name"] for source in sources] == names
        assert all(len(source["sha256"]) == 64 and source["bytes"] > 0 for source in sources)


def test_parquet_reads_no_other_column():
    write_parquet("in.parquet", [{"text": f"t{i}", "other": f"other {i}" * 9} for i in range(23)])
    expected = shards(prepare_parquet("in.parquet"))
    content = bytearray(Path("in.parquet").read_bytes())
    metadata = pq.ParquetFile("in.parquet").metadata
    for group in range(metadata.num_row_groups):
        column = metadata.row_group(group).column(1)
        assert column.path_in_schema == "other"
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = (
            bytes([255]) * column.total_compressed_size
        )
    Path("in.parquet").write_bytes(content)
    with pytest.raises((pa.ArrowException, OSError)):
        pq.read_table("in.parquet")
    assert shards(prepare_parquet("in.parquet")) == expected


def test_parquet_nulls_and_blanks_are_dropped(tokenizer):
    texts = ["a", None, "", " \n", "b"]
    write_parquet("text.parquet", [{"text": text} for text in texts])
    out = prepare_parquet("text.parquet")
    assert texts_of(out, tokenizer) == ["a<|endoftext|>", "b<|endoftext|>"]
    assert read_manifest(out)["dropped"] == empty(3)

    def chat(answer):
        return {"messages": [USER, {"role": "assistant", "content": answer}]}

    rows = [chat("a"), {"messages": None}, {"messages": []}, chat(None), chat(" "), chat("b")]
    write_parquet("chat.parquet", rows)
    manifest = read_manifest(prepare_parquet("chat.parquet"))
    assert manifest["documents"] == 2 and manifest["dropped"] == empty(4)

    rows = [{"question": q, "answer": a} for q, a in ("qa", "qb", ("q", None), (None, "a"), "q ")]
    write_parquet("qa.parquet", rows)
    manifest = read_manifest(prepare_parquet("qa.parquet"))
    assert manifest["documents"] == 2 and manifest["dropped"] == empty(3)


def test_parquet_for_validation(tokenizer):
    write_parquet("val.parquet", [{"text": "v1"}, {"text": None}, {"text": "v2"}])
    out = prepare("a<|endoftext|>b", val_file_path="val.parquet", val_split=0)
    val = open_split(out, "val")[0]
    assert [tokenizer.decode(val[i]) for i in range(2)] == ["v1<|endoftext|>", "v2<|endoftext|>"]
    manifest = read_manifest(out)
    assert [source["name"] for source in manifest["sources"]] == ["in.txt", "val.parquet"]
    assert manifest["dropped"] == empty(1)


TEXTS = [{"text": f"t{i}"} for i in range(12)]
ASSISTANT = {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    "rows, changed, path, error",
    [
        ([{"id": 1}], {}, "", "in.parquet has the columns 'id', not exactly one of 'text', "),
        ([{"text": "a", "messages": [USER]}], {}, "", "has the columns 'text', 'messages', not"),
        ([{"question": "a"}], {}, "", "in.parquet has the columns 'question', not exactly one"),
        ([{"text": 5}], {}, "", 'in.parquet, row group 0, row 0: "text" is not a string but int'),
        ([{"text": b"x"}], {}, "", '"text" is not a string but bytes: correct the row'),
        ([{"text": None}] * 3, {}, "", "in.parquet holds no examples"),
        ([{"text": " "}] * 3, {}, "", "in.parquet holds no examples"),
        ([{"question": "a", "answer": 1.5}], {}, "", 'row 0: "answer" is not a string but float'),
        ([{"messages": "[]"}], {}, "", "row 0: a conversation is a non-empty list"),
        ([{"messages": ["x"]}], {}, "", 'row 0: message 1 is not {"role"'),
        ([{"messages": [{"role": "user"}]}], {}, "", 'row 0: message 1 is not {"role"'),
        (
            [{"messages": [USER, ASSISTANT]}] * 7 + [{"messages": [USER, USER]}],
            {},
            "",
            "in.parquet, row group 1, row 2: message 2 has role 'user'",
        ),
        ([{"messages": [USER]}], {}, "", "the conversation ends with a user turn"),
        (
            [{"messages": [USER, {"role": None, "content": None}]}],
            {},
            "",
            "row group 0, row 0: message 2 has role None",
        ),
        (TEXTS, {}, "none.parquet", "none.parquet does not exist"),
        (TEXTS, {}, "no*.parquet", "no files match --input_file_path=no*.parquet"),
        (TEXTS, {}, "*.txt", "*.txt: a pattern must end with .parquet"),
        (TEXTS, {}, "folder", "folder is a directory without .parquet files"),
        (TEXTS, {"trust_control_tokens": True}, "", "trust_control_tokens is for .txt files only"),
        (TEXTS, {"trust_control_tokens": True}, "*.parquet", "is for .txt files only"),
        (TEXTS, {"trust_control_tokens": True}, "more", "is for .txt files only"),
        (TEXTS, {}, "more", "more/2.parquet, row group 0, row 0: a chat example after text"),
        (TEXTS, {"val_file_path": "more/2.parquet"}, "", "holds text examples but more/2.parquet "),
        (TEXTS, {"val_file_path": "more/3.txt"}, "", "more/3.txt does not exist"),
    ],
)
def test_parquet_mistakes_are_one_line_and_leave_nothing(rows, changed, path, error):
    Path("folder").mkdir()
    write_parquet("more/1.parquet", TEXTS)
    write_parquet("more/2.parquet", [{"question": "q", "answer": "a"}])
    write_parquet("in.parquet", rows)
    with pytest.raises(UserError) as caught:
        prepare_parquet(path or "in.parquet", **changed)
    message = str(caught.value)
    assert error in message
    assert "\n" not in message and len(message) < 600
    assert sorted(os.listdir()) == ["folder", "in.parquet", "more"]


def test_damaged_parquet_names_the_row_group():
    write_parquet("in.parquet", TEXTS)
    content = Path("in.parquet").read_bytes()
    column = pq.ParquetFile("in.parquet").metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    middle = content[:start] + b"\xff" * 40 + content[start + 40 :]
    for damaged, error in [
        (middle, "in.parquet, row group 1 is damaged or not Parquet"),
        (content[:-20], "in.parquet is damaged or not Parquet"),
        (b"text,id\na,1\n", "in.parquet is damaged or not Parquet"),
        (b"", "in.parquet is empty"),
    ]:
        Path("in.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=error):
            prepare_parquet("in.parquet")
        assert os.listdir() == ["in.parquet"]
    invalid = pa.array([b"ok", b"a\xff"]).view(pa.utf8())
    write_parquet("in.parquet", TEXTS[:2], text=invalid)
    with pytest.raises(UserError, match="in.parquet, row group 0 is damaged"):
        prepare_parquet("in.parquet")


def test_a_mistake_leaves_the_old_output(tokenizer):
    out = prepare("old 1<|endoftext|>old 2")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(b"new 1<|endoftext|>new 2<|endoftext|>\xff")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_command_line_shows_one_line_and_no_traceback():
    Path("in.txt").write_bytes(b"a<|endoftext|>\xff")
    result = run("--input_file_path=in.txt", "--output_dir=out")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: in.txt: not UTF-8 at byte 14: save the file as UTF-8\n"
    assert os.listdir() == ["in.txt"]
    Path("in.txt").write_text("a<|endoftext|>b")
    result = run("--input_file_path=in.txt", "--output_dir=out", "--val_split=0.5")
    assert (result.returncode, result.stderr) == (0, "")  # no progress bar off a terminal


def test_too_little_disk_space_is_said_before_the_work(monkeypatch, capsys):
    usage = type("Usage", (), {"free": 3})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    prepare("a<|endoftext|>b")
    printed = capsys.readouterr().out
    line = "note: out has 0.00 GB free, the dataset may need up to 0.00 GB: make room if the disk"
    assert printed.startswith(line)


def test_two_runs_do_not_share_an_output_directory(tokenizer):
    out = prepare("old 1<|endoftext|>old 2")
    (out / ".prepare_dataset").mkdir()
    (out / ".prepare_dataset" / "train.npz").write_text("of the other run")
    with locked(out, "run"), pytest.raises(UserError) as caught:
        prepare("new 1<|endoftext|>new 2")
    assert str(caught.value) == (
        "another preparation is writing to out: wait for it or choose another place"
    )
    assert (out / ".prepare_dataset" / "train.npz").read_text() == "of the other run"
    prepare("new 1<|endoftext|>new 2")
    assert texts_of(out, tokenizer) == ["new 1<|endoftext|>", "new 2<|endoftext|>"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize(
    "name, folder", [(b"in\xff.txt", b"out\xff"), ("東.txt".encode(), "é".encode())]
)
def test_names_that_the_terminal_cannot_show(name, folder):
    with open(name, "wb") as file:
        file.write(b"a<|endoftext|>b")
    arguments = [b"--input_file_path=" + name, b"--output_dir=" + folder]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = run(*arguments, "--val_split=0.5", env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    source = read_manifest(os.fsdecode(folder))["sources"][0]
    assert os.fsencode(source["name"]) == name
    result = run(*arguments, env=environment)  # nothing left for validation
    assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_a_path_that_cannot_be_is_one_line():
    name = "x" * 300 + ".txt"
    result = run(f"--input_file_path={name}", "--output_dir=out")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {name}: File name too long: check this path")
    assert result.stderr.count("\n") == 1 and os.listdir() == []


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system of 1 MB")
    try:
        Path("in.txt").write_text("<|endoftext|>".join(f"old {i}" for i in range(100)))
        run("--input_file_path=in.txt", f"--output_dir={disk}/out", check=True)
        before = {path.name: path.read_bytes() for path in (disk / "out").iterdir()}
        rng = random.Random(0)  # about one token for each of 900 K characters: 1.8 MB
        Path("in.txt").write_text(
            "<|endoftext|>".join(
                "".join(chr(rng.randrange(0x100, 0x250)) for _ in range(1000)) for _ in range(480)
            )
        )
        result = run("--input_file_path=in.txt", f"--output_dir={disk}/out")
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: the disk is full while writing {disk}/out/")
        assert result.stderr.count("\n") == 1
        assert {path.name: path.read_bytes() for path in (disk / "out").iterdir()} == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_size_limit():
    rng = random.Random(0)
    Path("in.txt").write_text("<|endoftext|>".join(str(rng.random()) for _ in range(100_000)))
    result = run(
        "--input_file_path=in.txt",
        "--output_dir=out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert result.returncode == 1
    assert "`ulimit -f` allows while writing out/.prepare_dataset" in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir() == ["in.txt"]


# Sleeps when both shards are in the staging directory, before anything is replaced.
SLOW = """
import sys, time, pathlib
import prepare_dataset
from common.settings import run_script

def sleep(*args):
    pathlib.Path("working").touch()
    time.sleep(60)

prepare_dataset.publish = sleep
run_script(lambda: prepare_dataset.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_the_old_output(tokenizer, signal_number):
    prepare("old 1<|endoftext|>old 2")
    Path("in.txt").write_text("<|endoftext|>".join(f"new {i}" for i in range(200)))
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, "--input_file_path=in.txt", "--output_dir=out"],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    while not Path("working").exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    assert {"train.npz", "val.npz"} <= set(os.listdir("out/.prepare_dataset"))
    child.send_signal(signal_number)
    _, stderr = child.communicate(timeout=30)
    assert texts_of(Path("out"), tokenizer) == ["old 1<|endoftext|>", "old 2<|endoftext|>"]
    if signal_number == signal.SIGINT:
        assert (child.returncode, stderr) == (130, "interrupted\n")
        assert not Path("out/.prepare_dataset").exists()
    else:
        assert child.returncode == -signal.SIGKILL
    prepare("new 1<|endoftext|>new 2")  # the next run is not disturbed by what was left
    assert sorted(os.listdir("out")) == ["manifest.json", "train.npz", "val.npz"]
    assert texts_of(Path("out"), tokenizer) == ["new 1<|endoftext|>", "new 2<|endoftext|>"]


def random_texts(n: int) -> list[str]:
    """Texts of about 3.3 KB each."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij klmnop", k=rng.randrange(2, 9))) for _ in range(5000)]
    return [" ".join(rng.choices(words, k=600)) for _ in range(n)]


def test_memory_does_not_grow_with_the_input():
    """60 MB take at most 30 MB more than 6 MB do; text and ids held whole would take 100."""
    block = "<|endoftext|>".join(random_texts(1500)) + "\n<|endoftext|>"
    for times in (1, 10):
        Path(f"in{times}.txt").write_text(block * times)
    assert os.path.getsize("in10.txt") > 50e6
    inputs = "input_file_path=in1.txt", "input_file_path=in10.txt"
    assert peak_growth("prepare_dataset", "", *inputs) < 30e6


def test_memory_does_not_grow_with_a_row_group():
    """One row group of 50 MB takes at most 30 MB more than one of 5 MB does."""
    texts = random_texts(1500)
    for times in (1, 10):
        path = f"in{times}.parquet"
        table = pa.table({"text": texts * times})
        pq.write_table(table, path, compression="none", use_dictionary=False)
        assert pq.ParquetFile(path).num_row_groups == 1
    assert os.path.getsize("in10.parquet") > 45e6
    inputs = "input_file_path=in1.parquet", "input_file_path=in10.parquet"
    assert peak_growth("prepare_dataset", "", *inputs) < 30e6


def test_an_earlier_writer_is_closed_when_the_second_input_fails(monkeypatch):
    """No open file descriptors stay behind after a refusal."""
    writers = []
    real = ShardWriter.__init__

    def counted(self, directory):
        real(self, directory)
        writers.append(self)

    monkeypatch.setattr(ShardWriter, "__init__", counted)
    Path("val.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="val.txt: not UTF-8 at byte 0"):
        prepare("a<|endoftext|>b", val_file_path="val.txt")
    assert len(writers) == 2 and all(writer._file.closed for writer in writers)
