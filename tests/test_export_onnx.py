"""The ONNX folder and the backend that runs it, against the model itself."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.runtimes import Onnxruntime
from common.errors import UserError
from formats import verify, write_onnx
from formats.atomic_export import atomic_export
from formats.llama import gpt_config_from
from formats.onnx_runtime import FILES, OnnxBackend
from formats.write_onnx import QuantizedEmbedding
from model import GPT, GPTConfig
from tokenizer import HARD_STRINGS, load_tokenizer

onnx = pytest.importorskip("onnx", reason="pip install -r requirements/export.txt")
pytest.importorskip("onnxscript", reason="pip install -r requirements/export.txt")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -r requirements/export.txt")

TOKENIZER = load_tokenizer()
ROOT = Path(__file__).resolve().parents[1]


def small_gpt(rope_style: str = "llama", **changes) -> GPT:
    """Weights large enough that greedy texts neither repeat nor depend on rounding."""
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "block_size": 96}
    gpt = GPT(GPTConfig(**(shape | {"rope_style": rope_style} | changes))).eval()
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return gpt


def prompts(n: int = 20) -> list[list[int]]:
    """Prompts of 1 to n tokens."""
    rng = random.Random(0)
    return [[rng.randrange(TOKENIZER.vocab_size) for _ in range(size + 1)] for size in range(n)]


def greedy(logits, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(logits(ids).argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return small_gpt()


@pytest.fixture(scope="module")
def folder(gpt, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "fp32"
    write_onnx.export_onnx(gpt, TOKENIZER, path)
    return path


@pytest.fixture(scope="module")
def backend(folder) -> OnnxBackend:
    return OnnxBackend(folder)


@torch.inference_mode()
def test_logits_at_every_position(gpt, backend):
    for prompt in [*prompts(), list(range(96))]:
        expected = gpt(torch.tensor([prompt]))[0]
        logits = backend.all_logits(prompt)
        assert logits.shape == expected.shape and logits.dtype == torch.float32
        assert (logits - expected).abs().max() < 1e-4
        assert (backend.logits(prompt) - expected[-1]).abs().max() < 1e-4


def test_greedy_tokens(gpt, backend):
    expected = gpt.generate(prompts(), 64, temperature=0)
    assert [greedy(backend.logits, prompt, 64) for prompt in prompts()] == expected
    assert len({token for row in expected for token in row}) > 300  # not one loop in all


def test_lille_rope_style_and_a_batch(tmp_path):
    """The original's position encoding works too; so do several rows, and any cut of the text."""
    gpt = small_gpt("lille", n_layers=1)
    write_onnx.export_onnx(gpt, TOKENIZER, tmp_path / "model")
    session = onnxruntime.InferenceSession(tmp_path / "model" / "onnx" / "model.onnx")
    ids = torch.randint(gpt.config.vocab_size, (3, 24))
    expected = gpt(ids).detach().numpy()
    for cuts in ([0, 24], [0, 1, 2, 24], [0, 7, 23, 24]):
        past = {name: np.zeros((3, 2, 0, 16), np.float32) for name in ("key", "value")}
        for start, end in zip(cuts, cuts[1:], strict=False):
            inputs = {
                "input_ids": ids[:, start:end].numpy(),
                "attention_mask": np.ones((3, end), np.int64),
                "position_ids": np.arange(start, end)[None].repeat(3, 0),
            }
            inputs |= {f"past_key_values.0.{name}": value for name, value in past.items()}
            logits, key, value = session.run(["logits", "present.0.key", "present.0.value"], inputs)
            assert np.abs(logits - expected[:, start:end]).max() < 1e-4
            assert key.shape == value.shape == (3, 2, end, 16)
            past = {"key": key, "value": value}
    other = small_gpt("llama", n_layers=1)(ids).detach().numpy()  # the two styles do differ
    assert np.abs(other - expected).max() > 0.1


@torch.inference_mode()
def test_rows_of_different_lengths(gpt, backend):
    """Padded on the left, and with the empty past that transformers.js begins with."""
    rows = [prompt for prompt in prompts() if len(prompt) in (1, 7, 20)]
    ids, mask, positions = np.zeros((3, 3, 20), np.int64)
    for row, prompt in enumerate(rows):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
        positions[row, -len(prompt) :] = range(len(prompt))
    empty = np.zeros((0, 2, 0, 16), np.float32)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs |= dict.fromkeys(backend.past_names, empty)
    logits = backend.session.run(["logits"], inputs)[0]
    for row, prompt in zip(logits, rows, strict=True):
        expected = gpt(torch.tensor([prompt]))[0].numpy()
        assert np.abs(row[-len(prompt) :] - expected).max() < 1e-4


def test_a_batch_computes_each_row_alone(folder, backend):
    runtime, rows = Onnxruntime(folder, "cpu", "fp32"), [[1, 5, 2], [7, 7, 3]]
    logits = backend.run(rows, backend.no_past(2))[0].numpy()
    for row, ids in zip(logits, rows, strict=True):
        expected = backend.all_logits(ids)
        torch.testing.assert_close(torch.from_numpy(row), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(runtime.logits(ids), expected, atol=1e-5, rtol=1e-5)
    runtime.answer(rows, 4)
    assert runtime.n_bytes > 4 * 1000


def test_prefix_reuse_equals_fresh_runs(folder, backend, monkeypatch):
    """Random changes of prefixes; only what is new is computed."""
    computed, run = [], backend.run
    monkeypatch.setattr(backend, "run", lambda ids, past: computed.append(ids) or run(ids, past))
    fresh, rng, ids, reused = OnnxBackend(folder), random.Random(1), [1], 0
    for _ in range(150):
        old = ids
        keep = rng.choice((len(old), rng.randint(0, len(old))))
        ids = old[:keep] + [rng.randrange(9) for _ in range(rng.randint(keep == 0, 5))]
        ids = ids[:96]
        logits = backend.logits(ids)
        common = next((i for i, (a, b) in enumerate(zip(old, ids, strict=False)) if a != b), None)
        common = min(len(old), len(ids)) if common is None else common
        if len(computed) > 1:
            assert computed[-1] == [ids[min(common, len(ids) - 1) :]]
            reused += len(ids) - len(computed[-1])
        fresh.cached = ([], [])
        assert (logits - fresh.logits(ids)).abs().max() < 1e-4
    assert reused > 1000


def test_a_failed_call_keeps_the_cache_whole(gpt, backend, monkeypatch):
    backend.logits([1, 2, 3, 4, 5])
    run = backend.run

    def interrupted(ids, past):
        run(ids, past)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(backend, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.logits([1, 2, 9, 9])
    expected = gpt(torch.tensor([[1, 2, 3, 4, 5, 6]]))[0, -1]
    assert (backend.logits([1, 2, 3, 4, 5, 6]) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("ids", [[], [0] * 97, [32768], [-1]])
def test_ids_that_do_not_fit(backend, ids):
    with pytest.raises(ValueError):
        backend.logits(ids)


def test_folder_and_graph(gpt, folder):
    """The names others rely on, the context's size, no paths of the machine that exported it."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert gpt_config_from(config) == gpt.config
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert files == sorted([*write_onnx.NAMES, "onnx/model.onnx"])
    model = onnx.load(folder / "onnx" / "model.onnx")
    onnx.checker.check_model(model)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    names = [f"{i}.{name}" for i in range(2) for name in ("key", "value")]
    assert shapes == {
        **{f"past_key_values.{name}": ["batch", 2, "past", 16] for name in names},
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past + sequence"],
        "position_ids": ["batch", "sequence"],
        "logits": ["batch", "sequence", 32768],
        **{f"present.{name}": ["batch", 2, "past + sequence", 16] for name in names},
    }
    assert str(ROOT).encode() not in model.SerializeToString()
    embeddings = [t for t in model.graph.initializer if list(t.dims) == [32768, 64]]
    assert len(embeddings) == 1  # tied


def test_its_tokenizer_is_ours(folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in HARD_STRINGS:
        assert theirs(text)["input_ids"] == TOKENIZER.encode(text, allow_special=True)
    chat = [{"role": "user", "content": "Hi <|assistant|> there"}]
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"] == TOKENIZER.encode_chat(chat, add_generation_prompt=True)


@pytest.mark.parametrize("large", [False, True])
def test_smaller_dtypes(large, tmp_path, monkeypatch, capsys):
    """Smaller, and close to the model but not the same; `large`: with weights beside the graph."""
    gpt, ids = small_gpt(n_layers=1), [*range(40)]
    if large:
        monkeypatch.setattr(write_onnx, "LARGE", 0)
    write_onnx.export_onnx(gpt, TOKENIZER, tmp_path / "small", ["int8", "fp16", "q4"])
    printed = capsys.readouterr().out
    expected = gpt(torch.tensor([ids]))[0].detach()
    # shares of the size in float32; differences, where the widest logits are about 9 apart
    for dtype, share, limit in (("fp16", 0.55, 0.05), ("int8", 0.6, 0.6), ("q4", 0.45, 4)):
        assert f"ONNX {dtype} checked" in printed
        files = list(tmp_path.glob(f"small/{FILES[dtype]}*"))
        assert len(files) == 1 + large
        assert sum(file.stat().st_size for file in files) < share * 4 * gpt.n_parameters()
        backend = OnnxBackend(tmp_path / "small", dtype=dtype)
        assert 1e-4 < (backend.all_logits(ids) - expected).abs().max() < limit
        steps = torch.stack([backend.logits(ids[: n + 1]) for n in range(40)])
        assert 1e-4 < (steps - expected).abs().max() < limit
    with pytest.raises(UserError, match="model.onnx is not there: export a checkpoint"):
        OnnxBackend(tmp_path / "small", dtype="fp32")


def test_quantized_embedding():
    weight = torch.randn(50, 16)
    weight[3] = 0
    rows = QuantizedEmbedding(weight)(torch.arange(50))
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((rows - weight).abs() <= 0.5001 * steps).all() and not torch.equal(rows, weight)


def test_a_wrong_graph_is_refused(tmp_path, monkeypatch):
    """A graph whose RoPE is off by one position leaves nothing, not even a folder."""
    gpt, tables = small_gpt(n_layers=1), write_onnx.rope_tables

    def shifted(config):
        cos, sin = tables(config)
        return cos, sin.roll(1, dims=0)

    monkeypatch.setattr(write_onnx, "rope_tables", shifted)
    with pytest.raises(
        UserError, match="does not compute what the checkpoint does .largest logit difference"
    ) as error:
        write_onnx.export_onnx(gpt, TOKENIZER, tmp_path / "model", ["int8"])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_survives_a_failure_and_is_replaced_by_success(tmp_path, monkeypatch):
    target = tmp_path / "model"
    names, optional = ("a",), ("b",)

    def export(content: str, fail: type | None = None):
        with atomic_export(target, names, optional) as folder:
            (folder / "a").write_text(content)
            if fail:
                raise fail

    export("first")
    for fail in (UserError, KeyboardInterrupt, SystemExit, OSError):
        with pytest.raises(fail):
            export("second", fail)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert (target / "a").read_text() == "first"
    (target / "b").write_text("of the first")
    (tmp_path / ".model.exporting").mkdir()  # of a killed export
    (tmp_path / ".model.exporting" / "half").write_text("x")
    export("third")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "third"}

    target.rename(tmp_path / ".model.replaced")  # killed between the two renames
    with pytest.raises(UserError):
        export("fourth", UserError)
    assert (target / "a").read_text() == "third" and len(list(tmp_path.iterdir())) == 1

    for name in ("model.old", "model.tmp"):  # a user's own
        (tmp_path / name).mkdir()
    export("fourth")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.old", "model.tmp"}

    with atomic_export(target, names) as folder:
        (folder / "a").write_text("sixth")
        with pytest.raises(UserError, match=f"another export is writing to {target}: wait"):
            export("seventh")
        assert folder.exists() and (target / "a").read_text() == "fourth"
    assert (target / "a").read_text() == "sixth"
    link = tmp_path / "link"
    link.symlink_to(target)
    with atomic_export(link, names) as folder:
        (folder / "a").write_text("eighth")
    assert link.is_symlink() and (target / "a").read_text() == "eighth"
    with pytest.raises(UserError, match="holds late.txt"):  # it came while the export ran
        with atomic_export(target, names) as folder:
            (folder / "a").write_text("ninth")
            (target / "late.txt").write_text("precious")
    assert (target / "late.txt").exists() and (target / "a").read_text() == "eighth"
    (target / "late.txt").unlink()

    (target / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="thesis.txt"):
        export("fifth")
    assert (target / "thesis.txt").read_text() == "precious"
    with pytest.raises(UserError, match="is a file"):
        with atomic_export(target / "thesis.txt", names):
            pass
    with pytest.raises(UserError, match="is a folder"):
        with atomic_export(target):
            pass


def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path):
    """A real SIGINT to a real process, when the folder is written and its check has begun."""
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_export_onnx as t
from formats import write_onnx
from pathlib import Path
def slow(folder, *_):
    print(sorted(path.name for path in folder.rglob("*")), flush=True)
    time.sleep(60)
write_onnx.write_graph = lambda gpt, path, dtype: path.write_bytes(b"graph")
write_onnx.check_tokenizer = slow
write_onnx.export_onnx(t.small_gpt(n_layers=1), t.TOKENIZER, Path("target"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "model.onnx" in process.stdout.readline(), process.stderr.read()
    assert sorted(os.listdir(tmp_path)) == [".target.exporting", ".target.lock"]
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=50)
    assert process.returncode != 0 and "KeyboardInterrupt" in stderr
    assert list(tmp_path.iterdir()) == []


def test_refusals(gpt, folder, tmp_path, monkeypatch):
    def refusal(call, *arguments) -> str:
        with pytest.raises(UserError) as error:
            call(*arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    export = write_onnx.export_onnx
    target = tmp_path / "model"
    broken = small_gpt()
    broken.norm.weight.data[0] = float("nan")
    assert "not finite" in refusal(export, broken, TOKENIZER, target)
    assert "--format=onnx" in refusal(OnnxBackend, target)
    assert "'cpu' or 'cuda'" in refusal(OnnxBackend, folder, "tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert "onnxruntime-gpu" in refusal(OnnxBackend, folder, "cuda")

    graph = target / "onnx" / "model.onnx"
    graph.parent.mkdir(parents=True)
    content = (folder / "onnx" / "model.onnx").read_bytes()
    graph.write_bytes(content[: len(content) // 2])
    assert "config.json is not there" in refusal(OnnxBackend, target)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert "cannot be loaded by onnxruntime" in refusal(OnnxBackend, graph)
    assert "choose one of fp32, fp16, int8, q4" in refusal(OnnxBackend, folder, "cpu", "float16")
    (target / "model.onnx").touch()
    assert "of an earlier version: export it again" in refusal(OnnxBackend, target)

    for name in ("onnxscript", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert "requirements/export" in refusal(export, gpt, TOKENIZER, target)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "requirements/export" in refusal(OnnxBackend, folder)


def test_comparison_sees_what_is_wrong():
    expected = torch.randn(5, 40) * 3
    width = float((expected.max(dim=-1).values - expected.min(dim=-1).values).max())

    def check(logits, tolerance=1e-5):
        comparison = verify.Comparison()
        comparison.add(expected, expected)
        comparison.add(expected, logits)
        comparison.add(expected, expected)
        return comparison.check_or_raise("X", tolerance)

    assert "greedy tokens equal 15/15" in check(expected + 0.9e-5 * width)
    assert "greedy tokens equal 14/15" in check(swapped(expected), 1.0)
    for wrong in (expected + 1.1e-5 * width, swapped(expected), expected * float("nan")):
        with pytest.raises(UserError):
            check(wrong)


def swapped(logits: torch.Tensor) -> torch.Tensor:
    """The logits with the best and the worst token of the first row exchanged."""
    result = logits.clone()
    best, worst = int(logits[0].argmax()), int(logits[0].argmin())
    result[0, best], result[0, worst] = logits[0, worst], logits[0, best]
    return result
