"""Scores equal to those of lm-evaluation-harness's own HFLM on the same exported model.

Skipped without lm_eval (requirements/bench.txt). tests/lm_eval_parity.py compares real items.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import evaluating
from evaluation.scoring import Scorer
from formats.write_hf import export_hf
from model import GPT, GPTConfig
from tokenizer import load_tokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements/bench.txt)")

ITEMS = [
    {
        "context": f"Question: What is {a} plus {b}?\nAnswer:",
        "choices": [f" {a + b}", f" {a * b}, I think", f" {a}{b}"],
    }
    for a in range(2, 8)
    for b in range(3, 9)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_embd=64, n_layers=2, n_heads=4, n_kv_heads=2, block_size=512)).eval()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.mul_(2)
    folder = tmp_path_factory.mktemp("lm") / "hf"
    export_hf(gpt, load_tokenizer(), folder, "float32", facts={})
    return folder


@pytest.mark.parametrize("n_shots", [0, 5])
def test_log_likelihoods_are_hflms(folder, n_shots):
    from tests.lm_eval_parity import differences, is_far, open_hflm

    shots = "".join(f"{x['context']}{x['choices'][0]}\n\n" for x in ITEMS[:n_shots])
    texts = [(shots + item["context"], choice) for item in ITEMS for choice in item["choices"]]
    texts += [("Blanks at the end of a context  ", "go on"), ("", "no context"), ("x" * 3000, " y")]
    scorer = Scorer(str(folder))
    ours, theirs, greedy = differences(scorer, open_hflm(str(folder), 16), texts)
    assert greedy == 0 and not is_far(ours, theirs).any()
    with_context = [i for i, (context, _) in enumerate(texts) if context]
    scores = scorer.loglikelihoods([texts[i] for i in with_context])
    assert [s.logprob for s in scores] == pytest.approx(ours[with_context])


def test_rolling_log_likelihoods_and_answers_are_hflms(folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tests.lm_eval_adapter import LilleLM

    theirs = HFLM(pretrained=str(folder), batch_size=1, device="cpu", dtype="float32")
    ours = LilleLM(Scorer(str(folder)), prefix_id=theirs.prefix_token_id)
    texts = ["A short text.", "The cat sat on the mat. " * 200]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-6)
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, options), 0) for text in texts]
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_the_benchmark_times_equal_scores(tmp_path, monkeypatch, capsys):
    device = torch.device("cpu")
    config = dict(n_layers=2, n_embd=64, n_heads=2, n_kv_heads=1, block_size=128)
    config = SimpleNamespace(**config, dtype="float32", rounds=1)
    monkeypatch.setattr(evaluating, "DATA", tmp_path)
    monkeypatch.setattr(evaluating, "TASKS", (("sums", 2),))
    assert [*evaluating.run(config, device)] == []
    assert "prepare_evaluation.py" in capsys.readouterr().out
    items = [item | {"answer": 0} for item in ITEMS[:4]]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, items)))
    shots = [f"{item['context']}{item['choices'][0]}\n\n" for item in ITEMS[4:6]]
    (tmp_path / "sums.shots.txt").write_text("".join(shots))
    (table,) = evaluating.run(config, device)
    assert (
        table["title"].startswith("sums, 2 examples, 4 items") and list(table["rows"])[1] == "ours"
    )
