"""The GGUF file, read back by programs that know nothing of this project."""

import json
import random
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch
from test_export_onnx import TOKENIZER, prompts, small_gpt

from benchmarks.learning_recipes import small_tokenizer
from common.errors import UserError
from formats import verify, write_gguf
from formats.write_gguf import interleaved_rows
from tokenizer import CONTROL_TOKENS, HARD_STRINGS

gguf = pytest.importorskip("gguf", reason="pip install -r requirements/export.txt")
pytest.importorskip("accelerate", reason="pip install -r requirements/export.txt")

REFERENCE_IDS = Path(__file__).resolve().parents[2] / "shared" / "reference" / "hastings_ids.jsonl"


@pytest.fixture(scope="module")
def gpt():
    return small_gpt()


@pytest.fixture(scope="module")
def file(gpt, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small-f32.gguf"
    write_gguf.export_gguf(gpt, TOKENIZER, path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model with a vocabulary that programs in Python read in no time, its tokenizer and file."""
    tokenizer, path = small_tokenizer(2048), tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
    gpt = small_gpt(vocab_size=2048)
    write_gguf.export_gguf(gpt, tokenizer, path)
    return gpt, tokenizer, path


@pytest.fixture(scope="module")
def reader(file):
    return gguf.GGUFReader(file)


def loaded(path: Path):
    from transformers import AutoModelForCausalLM

    with redirect_stderr(StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    return model.eval()


@torch.inference_mode()
def test_logits_and_greedy_tokens(gpt, file):
    """transformers reads the file and says the same, 64 tokens after each of 20 prompts."""
    theirs = loaded(file)
    for prompt in [*prompts(), list(range(96))]:
        logits = theirs(torch.tensor([prompt])).logits
        assert (logits - gpt(torch.tensor([prompt]))).abs().max() < 1e-4
    same_length = [(row * 8)[:8] for row in prompts()]
    expected = gpt.generate(same_length, 64, temperature=0)
    output = theirs.generate(
        torch.tensor(same_length), max_new_tokens=64, do_sample=False, eos_token_id=None
    )
    assert output[:, 8:].tolist() == expected
    assert len({token for row in expected for token in row}) > 300


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_smaller_dtypes(dtype, small, tmp_path, capsys):
    (gpt, tokenizer, file), path = small, tmp_path / "small.gguf"
    write_gguf.export_gguf(gpt, tokenizer, path, dtype)
    assert f"GGUF {dtype} checked" in capsys.readouterr().out
    assert path.stat().st_size < 0.62 * file.stat().st_size
    reader = gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {name for name, kind in types.items() if kind == "F32"} == {
        name for name in types if name.endswith("norm.weight")
    }
    assert set(types.values()) == {"F32", dtype.upper()}
    assert value(reader, "general.file_type") == {"f16": 1, "q8_0": 7}[dtype]


def value(reader, name: str):
    return reader.get_field(name).contents()


def test_description(gpt, reader):
    config = gpt.config
    expected = {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.context_length": config.block_size,
        "llama.embedding_length": config.n_embd,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(config.layer_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": TOKENIZER.bos_id,
        "tokenizer.ggml.eos_token_id": TOKENIZER.eos_id,
        "tokenizer.ggml.eot_token_id": TOKENIZER.user_id,
        "tokenizer.ggml.padding_token_id": TOKENIZER.pad_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {name: value(reader, name) for name in expected} == expected
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}  # tied


def test_tokenizer(file, reader):
    """Each id's text, which ids are control tokens, the merges, and the ids of hard strings."""
    from transformers import AutoTokenizer

    settings = json.loads(TOKENIZER.json_text)
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert {token: i for i, token in enumerate(tokens)} == settings["model"]["vocab"] | {
        name: 32763 + i for i, name in enumerate(CONTROL_TOKENS)
    }
    kinds = value(reader, "tokenizer.ggml.token_type")
    assert kinds == [1] * 32763 + [3] * 5
    merges = value(reader, "tokenizer.ggml.merges")
    assert [tuple(merge.split(" ")) for merge in merges] == [
        tuple(merge.split(" ") if isinstance(merge, str) else merge)
        for merge in settings["model"]["merges"]
    ]
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in HARD_STRINGS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == TOKENIZER.encode(text, allow_special=True)
    if REFERENCE_IDS.exists():
        rows = [json.loads(line) for line in REFERENCE_IDS.read_text("utf-8").splitlines()]
        assert len(rows) > 400
        for row in rows:
            ids = theirs.encode(row["text"], add_special_tokens=False)
            assert ids == row["ids"]


def test_chat_template(reader):
    """Plain Jinja renders what encode_chat encodes, as llama.cpp's programs do."""
    from jinja2 import Environment

    def raise_exception(message: str):
        raise ValueError(message)

    source = value(reader, "tokenizer.chat_template")
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        source, globals={"raise_exception": raise_exception}
    )
    roles = ("user", "assistant")
    texts = [" Hi\n", "naïve 東京 🚀", "", "  two  spaces\n\n", "{{ x }} {% if %} 'q'"]
    for n in range(1, 6):
        chat = [{"role": roles[i % 2], "content": texts[i]} for i in range(n)]
        for prompt in (False, True) if n % 2 else (False,):
            text = template.render(messages=chat, add_generation_prompt=prompt)
            ids = TOKENIZER.encode(text, allow_special=True)
            assert ids == TOKENIZER.encode_chat(chat, add_generation_prompt=prompt)
    rng = random.Random(0)
    for _ in range(300):  # text that spells control tokens makes none
        parts = rng.choices([*CONTROL_TOKENS, "<|", "<", "|>", "user", " ", "x"], k=12)
        content = "".join(parts)
        text = template.render(messages=[{"role": "user", "content": content}])
        ids = TOKENIZER.encode(text, allow_special=True)
        assert [token for token in ids if token >= TOKENIZER.pad_id] == ids[:2]
        assert text.replace("< |", "<|") == "<|startoftext|><|user|>" + content.replace("< |", "<|")
    with pytest.raises(ValueError):
        template.render(messages=[{"role": "system", "content": "x"}])


def test_interleaved_rows():
    """Columns i and i + D/2 of a head become neighbours, in every head."""
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    order = interleaved_rows(rows, 8)[:, 0].tolist()
    assert order == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_a_wrong_file_is_refused(small, tmp_path, monkeypatch):
    """q and k in the wrong order: nothing is left, and an earlier file is as it was."""
    path = tmp_path / "model.gguf"
    path.write_text("GGUF of earlier")
    monkeypatch.setattr(write_gguf, "interleaved_rows", lambda weight, head_dim: weight)
    with pytest.raises(
        UserError, match="does not compute what the checkpoint does .largest logit difference"
    ):
        write_gguf.export_gguf(*small[:2], path, "q8_0")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_text() == "GGUF of earlier"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(error, gpt, tmp_path, monkeypatch):
    path, tensors = tmp_path / "new" / "model.gguf", write_gguf.gguf_tensors

    def interrupted(gpt):
        yield from list(tensors(gpt))[:3]
        raise error

    monkeypatch.setattr(write_gguf, "gguf_tensors", interrupted)
    with pytest.raises(error):
        write_gguf.export_gguf(gpt, TOKENIZER, path, "f32")
    assert list(path.parent.iterdir()) == []


def test_a_wrong_tokenizer_is_refused(small, monkeypatch):
    _, tokenizer, file = small
    monkeypatch.setattr(tokenizer, "encode", lambda text, allow_special=False: [0])
    monkeypatch.setattr(write_gguf, "compare", lambda *_: verify.Comparison())
    with pytest.raises(UserError, match="its tokenizer gives other ids"):
        write_gguf.verify_file(file, tokenizer, [], "f32")


def test_refusals(gpt, tmp_path, monkeypatch):
    def refusal(model, dtype: str) -> str:
        with pytest.raises(UserError) as error:
            write_gguf.export_gguf(model, TOKENIZER, tmp_path / "model.gguf", dtype)
        assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []
        return str(error.value)

    checkpoint = tmp_path / "best_model.pt"
    checkpoint.write_bytes(b"PK weights")
    with pytest.raises(UserError, match="no earlier export"):
        write_gguf.export_gguf(gpt, TOKENIZER, checkpoint, "f32")
    assert checkpoint.read_bytes() == b"PK weights"
    checkpoint.unlink()
    lille = refusal(small_gpt("lille", n_layers=1), "f32")
    assert "rope_style='lille'" in lille and "not a rotation" in lille and "--format=onnx" in lille
    odd = small_gpt(n_embd=48, n_layers=1)
    assert "multiple of 32, not 48" in refusal(odd, "q8_0")
    for missing in ("gguf", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, missing, None)
            assert f"needs {missing}" in refusal(gpt, "f32")
