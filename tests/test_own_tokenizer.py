"""Tokenizers of a user's own: learning them, what carries them, and those of other projects."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import export
import prepare_dataset
import train
from checkpoint import load_checkpoint, load_model_and_tokenizer
from common.byte_level import bytes_to_unicode
from common.errors import UserError
from common.settings import config_from_constants
from formats import write_gguf
from formats.llama import llama_config, llama_state_dict
from formats.pretrained import tokenizer_in
from hastings import build
from inference import lille
from model import GPT, GPTConfig
from tokenizer import (
    CONTROL_TOKENS,
    HASTINGS,
    MAX_VOCAB_SIZE,
    Tokenizer,
    load_tokenizer,
)

for package in ("gguf", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="pip install -r requirements/export.txt")

ROOT = Path(build.__file__).parents[1]
CODE = [
    path.read_text("utf-8", "replace")
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with code.jsonl, a tokenizer of 2,048 ids learned from it, and shards."""
    folder = tmp_path_factory.mktemp("own")
    lines = (json.dumps({"text": text}) + "\n" for text in CODE)
    (folder / "code.jsonl").write_text("".join(lines))
    learn = ["--vocab_size=2048", "--sample_bytes=3_000_000", f"--output_dir={folder}"]
    assert build.main([f"--train={folder / 'code.jsonl'}", *learn]) == 0
    own = f"--tokenizer={folder}"
    source = f"--input_file_path={folder / 'code.jsonl'}"
    assert prepare_dataset.main([source, own, f"--output_dir={folder / 'shards'}"]) == 0
    return folder


def run_training(data: Path, out: Path, tokenizer: Path, **changes) -> Path:
    """Trains a tiny model; returns its checkpoint."""
    settings = {"data_dir": data, "out_dir": out, "tokenizer": tokenizer, "device": "cpu"}
    settings |= {"n_layers": 2, "n_embd": 32, "n_heads": 4, "n_kv_heads": 2, "block_size": 64}
    settings |= {"batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2}
    settings |= {"eval_rows": 2, "compile": False, "sample_tokens": 4, "num_epochs": 9}
    argv = [f"--{name}={value}" for name, value in (settings | changes).items()]
    train.train(config_from_constants(vars(train), argv))
    return out / "best_model.pt"


def test_learning_is_a_function_of_texts_and_seed(folder, tmp_path, capsys):
    """Also as `python hastings/build.py`, which prints the report."""
    command = [sys.executable, "hastings/build.py", f"--train={folder / '*.jsonl'}"]
    command += ["--vocab_size=2048", "--sample_bytes=3_000_000", f"--output_dir={tmp_path / 'a'}"]
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line.split(",")[0].split("  ")[0] for line in run.stdout.splitlines()[1:6]] == [
        "bytes per token",
        "your texts",
        "English",
        "code",
        "numbers",
    ]
    first = (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == first
    assert build.main([*command[2:5], f"--output_dir={tmp_path / 'b'}", "--seed=1"]) == 0
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() != first
    capsys.readouterr()


def test_every_text_comes_back_and_takes_fewer_tokens(folder):
    own, hastings = load_tokenizer(folder), load_tokenizer()
    assert own.vocab_size == 2048 and own.bos_id == 2047
    assert [own.pieces[i].decode() for i in range(2043, 2048)] == list(CONTROL_TOKENS)
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    texts = ["".join(points[i : i + 4096]) for i in range(0, len(points), 4096)]
    assert [own.decode(ids) for ids in own.encode_batch(texts)] == texts
    held_out = [text for i, text in enumerate(CODE) if i % 10 == 0]
    counts = [sum(map(len, t.encode_batch(held_out))) for t in (own, hastings)]
    assert counts[0] < 0.75 * counts[1]


def test_the_fast_path_is_that_of_tokenizers_on_a_million_tokens(folder):
    own, n_tokens = load_tokenizer(folder), 0
    rows = own.encode_batch(CODE)
    for text, ids in zip(CODE, rows, strict=True):
        assert np.array_equal(own.encode(text), ids)
        n_tokens += len(ids)
    assert n_tokens > 1_000_000
    assert own._batch_encoder.gigatoken is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size=261"], "vocab_size=261 must be from 262 to 65,536"),
        (["--vocab_size=65537"], "must be from 262 to 65,536"),
        (["--sample_bytes=79_999"], "sample_bytes=79999 must be at least 80000"),
        (["--vocab_size=60000", "--sample_bytes=100_000"], "the texts have pairs for"),
        (["--train=none/*.txt"], "no files match --train=none"),
        (["--train=small.txt"], "give more than 20,000 characters"),
        (["--train=tiny.txt"], "pairs for 261 ids: give more texts"),
        (["--train=bad.txt"], "bad.txt: not UTF-8"),
        (["--train=folder"], "no files match --train=folder/.*give a pattern, such as folder/"),
        (["--train="], "give --train= your texts"),
        (["--vocab_size=300"], "is another tokenizer, which shards and models may need"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_one_line(
    folder, flags, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.txt").write_text("a few words")
    (tmp_path / "tiny.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 20_001))))
    (tmp_path / "bad.txt").write_bytes(b"a\xff" * 9)
    (tmp_path / "folder").mkdir()
    before = (folder / "tokenizer.json").read_bytes()
    source = [f"--train={folder / 'code.jsonl'}", f"--output_dir={folder}"]
    with pytest.raises(UserError, match=message):
        build.main([*source, "--sample_bytes=1_000_000", *flags])
    assert (folder / "tokenizer.json").read_bytes() == before


def test_a_checkpoint_carries_its_tokenizer(folder, tmp_path, monkeypatch):
    """Inference and every export follow it without a flag; other shards and runs are refused."""
    best = run_training(folder / "shards", tmp_path / "run", folder)
    own = load_tokenizer(folder)
    gpt, tokenizer = load_model_and_tokenizer(best)
    assert tokenizer.json_text == own.json_text and gpt.config.vocab_size == 2048
    answer = lille(model=best, seed=1).generate("import os", max_new_tokens=5)
    hf = tmp_path / "hf"
    assert export.main([f"--model={best}", f"--output_dir={hf}"]) == 0
    again = lille(model=hf, seed=1).generate("import os", max_new_tokens=5)
    assert again == answer
    assert load_model_and_tokenizer(hf)[1].sha256 == own.sha256
    gguf = tmp_path / "m.gguf"
    assert export.main([f"--model={best}", "--format=gguf", f"--output_dir={gguf}"]) == 0
    onnx = tmp_path / "onnx"
    assert export.main([f"--model={best}", "--format=onnx", f"--output_dir={onnx}"]) == 0
    assert lille("onnx", onnx, seed=1).generate("import os", max_new_tokens=5) == answer
    with pytest.raises(UserError, match="it has graphs for onnxruntime, .*set backend='onnx'"):
        lille(model=onnx)

    with pytest.raises(UserError, match="made with another tokenizer.*give as --tokenizer"):
        run_training(folder / "shards", tmp_path / "b", HASTINGS)
    source = f"--input_file_path={folder / 'code.jsonl'}"
    other = tmp_path / "hastings"
    assert prepare_dataset.main([source, f"--output_dir={other}", "--val_split=0.1"]) == 0
    with pytest.raises(UserError, match=f"another tokenizer: give --tokenizer={folder}, as"):
        run_training(other, tmp_path / "c", HASTINGS, init_from=best)
    run_training(folder / "shards", tmp_path / "d", hf, init_from=hf)  # its folder is the same one
    swapped = json.loads((onnx / "tokenizer.json").read_text("utf-8"))  # as many ids, two exchanged
    vocabulary = swapped["model"]["vocab"]
    vocabulary |= {"a": vocabulary["b"], "b": vocabulary["a"]}
    for exported in (hf, onnx):
        (exported / "tokenizer.json").write_text(json.dumps(swapped), "utf-8")
        with pytest.raises(UserError, match="another tokenizer.json than the model was exported"):
            lille("onnx" if exported == onnx else "torch", exported)
    for path in hf.glob("tokenizer*"):
        path.unlink()
    settings = json.loads((hf / "config.json").read_text()) | {"vocab_size": 32_768}
    (hf / "config.json").write_text(json.dumps(settings))  # Hastings' size, not its sha256
    with pytest.raises(UserError, match="and no tokenizer.json: add its file"):
        tokenizer_in(hf)
    state = load_checkpoint(best)
    bare = {key: state[key] for key in ("model_state_dict", "model_args")}  # as the original's
    torch.save(bare, tmp_path / "bare.pt")
    with pytest.raises(UserError, match="another tokenizer: give --tokenizer=.*hastings.json"):
        run_training(folder / "shards", tmp_path / "e", folder, init_from=tmp_path / "bare.pt")
    torch.save(bare | {"model_args": [1]}, tmp_path / "x.pt")
    for read in (lambda path: lille(model=path), lambda path: export.main([f"--model={path}"])):
        with pytest.raises(UserError, match="its weights do not fit its model_args"):
            read(tmp_path / "x.pt")
    torch.save(state | {"tokenizer_json": HASTINGS.read_text("utf-8")}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="than it carries: it is damaged"):
        export.main([f"--model={tmp_path / 'x.pt'}"])
    torch.save(state | {"tokenizer_json": "{"}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        lille(model=tmp_path / "x.pt")


FOREIGN = {
    "no splitting": ({"pre_tokenizer": None}, {}, "it is no byte-level BPE"),
    "suffixes": ({}, {"end_of_word_suffix": "</w>"}, "it is no byte-level BPE"),
    "WordPiece": ({}, {"type": "WordPiece"}, "it is no byte-level BPE"),
    "twice": ({}, {"vocab": {"a": 0, "b": 0}, "merges": []}, "each once"),
    "a hole": ({}, {"vocab": {"a": 0, "b": 2}, "merges": []}, "each once"),
    "an added piece": ({"added_tokens": [{"id": 9, "content": " "}]}, {}, "is an added token and"),
    "a plain added token": (
        {"added_tokens": [{"id": 32763, "content": "ab", "special": False}]},
        {},
        "it looks for 'ab' in plain text",
    ),
    "a normalizer": ({"normalizer": {"type": "Lowercase"}}, {}, "it changes texts .Lowercase"),
    "letters replaced": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "c"}, "content": "k"}},
        {},
        "it changes texts .Replace",
    ),
    "a pattern replaced": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": "x"}},
        {},
        "it changes texts .Replace",
    ),
    "a space before": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {},
        "it does not give .* back",
    ),
    "text left out": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"}},
        {},
        "it leaves parts of a text out",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_tokenizers_that_would_give_other_ids_are_refused(case, tmp_path):
    changes, model, message = FOREIGN[case]
    settings = json.loads(load_tokenizer().json_text) | changes
    settings["model"] |= model
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_control_token_that_is_spelled_stays_text_in_every_tokenizer(tmp_path):
    """Also if a rule keeps the spelling whole and the vocabulary has it, as with ignore_merges."""
    settings = json.loads(load_tokenizer().json_text)
    model = settings["model"] | {"type": "BPE", "ignore_merges": True}
    model["vocab"] |= {"<|user|>": 32_763, "zzz": 32_764}
    added = [token | {"id": 32_763} for token in settings["added_tokens"] if "user" in str(token)]
    rule = settings["pre_tokenizer"] | {"use_regex": False}
    settings |= {"model": model, "added_tokens": added, "pre_tokenizer": rule}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.user_id == 32_763 and tokenizer.n_own == 32_765
    for text in CONTROL_TOKENS:
        assert not tokenizer.is_control[tokenizer.encode(text)].any()
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.is_control[tokenizer.encode(text, allow_special=True)].all()
    with pytest.raises(UserError, match="llama.cpp has no name for this .*ignore_merges"):
        write_gguf.pre_tokenizer_name(json.loads(tokenizer.json_text))


PADDING = 10  # rows of the embedding that no token has


def foreign_model(folder: Path) -> GPT:
    """A Llama as other projects publish them.

    Special tokens come first, digits are apart, two bytes are missing, the vocabulary is padded.
    """
    own = json.loads(load_tokenizer().json_text)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    missing = {"\u0100", "\u0101"}  # the bytes 0 and 1
    merges = own["model"]["merges"][:300]
    pieces = [p for p in own["model"]["vocab"] if len(p) == 1 and p not in missing]
    pieces = [*specials, *pieces, *(merge.replace(" ", "") for merge in merges)]
    own["model"] |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}
    own["added_tokens"] = [
        own["added_tokens"][0] | {"id": i, "content": name} for i, name in enumerate(specials)
    ]
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, own["pre_tokenizer"]]
    own["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    folder.mkdir()
    torch.manual_seed(0)
    gpt = GPT(
        GPTConfig(
            n_embd=32,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            block_size=96,
            vocab_size=len(pieces) + PADDING,
            rope_theta=50_000.0,
        )
    )
    with torch.no_grad():
        gpt.tok_embeddings.weight[-PADDING:] = 7.0
    config = llama_config(gpt.config, load_tokenizer())
    del config["tokenizer_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in llama_state_dict(gpt).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(own))
    return gpt


def test_a_llama_of_another_project_trains_with_its_own_tokenizer(folder, tmp_path, capsys):
    """Its logits stay, for the tokens that it has; those that it lacks begin at the mean."""
    theirs = tmp_path / "theirs"
    gpt = foreign_model(theirs).eval()
    tokenizer, n_known = load_tokenizer(theirs), gpt.config.vocab_size - PADDING
    assert tokenizer.eos_id == 0 and tokenizer.vocab_size == n_known + 2 + 4
    assert tokenizer.decode(tokenizer.encode("\0 12 <|im_end|>")) == "\0 12 <|im_end|>"
    assert tokenizer.encode("".join(CONTROL_TOKENS), allow_special=True)[1:3] == [0, n_known + 3]
    assert not tokenizer.token_bytes[[0, n_known + 2]].any() and tokenizer.is_control.sum() == 5
    assert 2 not in tokenizer.encode("<|im_end|>") and len(tokenizer.encode("1234")) == 4
    with pytest.raises(UserError, match="it is not a Lille model"):
        lille(model=theirs)
    source = [f"--input_file_path={folder / 'code.jsonl'}", f"--tokenizer={theirs}"]
    assert prepare_dataset.main([*source, f"--output_dir={tmp_path / 'shards'}"]) == 0
    with pytest.raises(UserError, match="made with another tokenizer"):
        run_training(folder / "shards", tmp_path / "a", theirs, init_from=theirs)
    with pytest.raises(UserError, match=f"has a tokenizer of its own: give --tokenizer={theirs}"):
        run_training(folder / "shards", tmp_path / "a", folder, init_from=theirs)
    best = run_training(
        *(tmp_path / "shards", tmp_path / "b", theirs), init_from=theirs, learning_rate=1e-30
    )
    assert "context: block_size=64, at most 96" in capsys.readouterr().out
    longer = {"init_from": theirs, "block_size": 32, "max_steps": 3}  # as the run began
    run_training(tmp_path / "shards", tmp_path / "b", theirs, **longer, learning_rate=1e-30)
    assert "context:" not in capsys.readouterr().out
    trained, carried = load_model_and_tokenizer(best)
    assert carried.sha256 == tokenizer.sha256 and trained.config.block_size == 64
    ids = torch.tensor([tokenizer.encode("def f(x): return x")])
    logits = [model(ids)[0][..., :n_known] for model in (trained, gpt)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    mean = gpt.tok_embeddings.weight[:n_known].mean(0)
    torch.testing.assert_close(
        trained.tok_embeddings.weight[n_known:], mean.expand(6, -1), atol=1e-6, rtol=0
    )
    assert export.main([f"--model={best}", "--format=gguf", f"--output_dir={tmp_path}"]) == 0
    assert export.main([f"--model={best}", f"--output_dir={tmp_path / 'hf'}"]) == 0
    chat = {"messages": [{"role": r, "content": "2 + 2"} for r in ("user", "assistant")]}
    (tmp_path / "chat.jsonl").write_text((json.dumps(chat) + "\n") * 40)
    source = [f"--input_file_path={tmp_path / 'chat.jsonl'}", f"--tokenizer={theirs}"]
    source += ["--val_split=0.1", f"--output_dir={tmp_path / 'chat'}"]
    assert prepare_dataset.main(source) == 0
    settings = {"finetune": True, "model": theirs, "finetune_data_dir": tmp_path / "chat"}
    settings |= {"finetune_out_dir": tmp_path / "tuned", "out_dir": tmp_path / "b"}
    run_training(tmp_path / "shards", tmp_path / "b", theirs, **settings)
    tuned, carried = load_model_and_tokenizer(tmp_path / "tuned" / "best_model.pt")
    assert carried.sha256 == tokenizer.sha256 and tuned.config.block_size == 96  # all of it

    for name, content in {"no": None, "not": '{"model": {"type": "Unigram"}}'}.items():
        path = theirs / "tokenizer.json"
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(UserError, match="tokenizer") as caught:
            run_training(tmp_path / "shards", tmp_path / name, tmp_path / "hf", init_from=theirs)
        assert "\n" not in str(caught.value)


def test_the_largest_vocabulary_fits_shards():
    """65,536 ids, as many as 16 bits have: all bytes and nearly all pairs of them."""
    characters = bytes_to_unicode().values()
    merges = [f"{left} {right}" for left in characters for right in characters]
    n = MAX_VOCAB_SIZE - 256 - len(CONTROL_TOKENS)
    tokenizer = Tokenizer(build.build_json(merges[:n]).encode())
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (1 << 16, (1 << 16) - 1)
    texts = ["".join(map(chr, range(start, start + 997))) for start in range(0, 0xD000, 997)]
    rows = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    assert all(np.array_equal(r, tokenizer.encode(t)) for r, t in zip(rows, texts, strict=True))
    assert max(row.max() for row in rows) > 60_000 and rows[0].dtype == np.uint16
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert ids[0] == tokenizer.bos_id and tokenizer.decode(ids).endswith("<|assistant|>")
    with pytest.raises(ValueError, match="65,537 ids, more than 65,536"):
        Tokenizer(build.build_json(merges[: n + 1]).encode())
