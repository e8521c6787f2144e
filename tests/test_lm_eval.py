"""Scores equal to those of lm-evaluation-harness's own HFLM on the same exported model.

Skipped without lm_eval (requirements/bench.txt). With it, run it from another folder than the root:
python -P -m pytest /path/to/tests/test_lm_eval.py
"""

import json
from pathlib import Path

import pytest
import torch

from evaluation.scoring import Scorer
from formats.write_hf import export_hf
from model import GPT, GPTConfig
from tokenizer import load_tokenizer

pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements/bench.txt)")

ROOT = Path(__file__).resolve().parents[1]
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


def real_items(task: str, n_shots: int, n: int) -> list[tuple[str, str]]:
    data = ROOT.parent / "shared" / "data" / "evaluation"
    if not (data / f"{task}.jsonl").is_file():
        return []
    items = [json.loads(line) for line in (data / f"{task}.jsonl").read_text("utf-8").splitlines()]
    shots = (data / f"{task}.shots.txt").read_text("utf-8") if n_shots else ""
    return [(shots + item["context"], choice) for item in items[:n] for choice in item["choices"]]


@pytest.mark.parametrize("n_shots", [0, 5])
def test_log_likelihoods_are_hflms(folder, n_shots):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    shots = "".join(f"{x['context']}{x['choices'][0]}\n\n" for x in ITEMS[:n_shots])
    texts = [(shots + item["context"], choice) for item in ITEMS for choice in item["choices"]]
    texts += [("Blanks at the end of a context  ", "go on"), ("", "no context"), ("x" * 3000, " y")]
    texts += real_items("arc_easy", n_shots, 20)
    theirs = HFLM(pretrained=str(folder), batch_size=16, device="cpu", dtype="float32")
    requests = [Instance("loglikelihood", {}, text, 0) for text in texts]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    scorer = Scorer(str(folder))
    from tests.lm_eval_adapter import LilleLM

    ours = LilleLM(scorer, prefix_id=theirs.prefix_token_id).loglikelihood(requests)
    for (logprob, greedy), (their_logprob, their_greedy) in zip(ours, expected, strict=True):
        assert abs(logprob - their_logprob) <= 1e-4 + 1e-6 * abs(their_logprob)
        assert greedy == their_greedy
    with_context = [i for i, (context, _) in enumerate(texts) if context]
    scores = scorer.loglikelihoods([texts[i] for i in with_context])
    assert [s.logprob for s in scores] == pytest.approx([ours[i][0] for i in with_context])


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
