"""Log-likelihoods in trie rows against one plain forward pass for each pair."""

import dataclasses

import numpy as np
import pytest
import torch

from common.errors import UserError
from evaluation.models import Lille, Peer, open_model
from evaluation.scoring import Score, Scorer, TrieRow, trie_rows
from formats.pretrained import folder_tokenizer
from formats.write_hf import export_hf
from model import GPT, GPTConfig
from tests.lm_eval_parity import predictions
from tests.tiny import WORDS
from tokenizer import load_tokenizer

CONFIG = GPTConfig(n_embd=32, n_layers=2, n_heads=4, n_kv_heads=2, block_size=64)
QUESTIONS = [
    ("Question: Which animal barks at night?\nAnswer:", [" dog", " a dog", " a doghouse", " cats"]),
    ("Question: Which animal is a pet?\nAnswer:", [" dog", " the cat, which sleeps", " x"]),
    ("Question: What is 2 + 2? ", ["4", "four", "22"]),  # its blank goes to the continuation
    ("", ["no context at all", "x"]),
]
TEXTS = [(context, choice) for context, choices in QUESTIONS for choice in choices]


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(CONFIG).eval()
    with torch.no_grad():  # predictions that differ
        for parameter in gpt.parameters():
            parameter.mul_(4)
    return gpt


def naive_scores(gpt: GPT, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """One forward pass a pair, all logits."""
    results = []
    for context, continuation in pairs:
        ids = torch.tensor([context + continuation])
        logprobs = gpt(ids)[0].double().log_softmax(-1)
        n = min(len(continuation), len(ids[0]) - 1)
        at = torch.arange(len(ids[0]) - 1 - n, len(ids[0]) - 1)
        targets = ids[0, len(ids[0]) - n :]
        greedy = bool((logprobs[at].argmax(-1) == targets).all())
        results.append((logprobs[at, targets].sum().item(), greedy))
    return results


def assert_close(scores: list[Score], expected: list[tuple[float, bool]]) -> None:
    assert [s.logprob for s in scores] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert [s.greedy for s in scores] == [e[1] for e in expected]


@pytest.mark.parametrize("row_tokens", [1, 40, 1024])
@pytest.mark.parametrize("style", ["llama", "lille"])
def test_scores_are_those_of_each_pair_alone(gpt, row_tokens, style):
    model = GPT(dataclasses.replace(CONFIG, rope_style=style)).eval()
    model.load_state_dict(gpt.state_dict())
    scorer = Scorer(model, row_tokens=row_tokens)
    greedy = model.generate([load_tokenizer().encode(TEXTS[0][0])], 3, temperature=0)[0]
    texts = [*TEXTS, (TEXTS[0][0], load_tokenizer().decode(greedy))]
    pairs = scorer.encode(texts)
    scores = scorer.loglikelihoods(texts)
    assert_close(scores, naive_scores(model, pairs))
    assert [s.n_tokens for s in scores] == [len(b) - (not a) for a, b in pairs]
    assert [s.n_bytes for s in scores] == [len(text.encode()) for _, text in texts]
    assert pairs[-1][1] == greedy
    assert [s.greedy for s in scores].count(True) == 2  # it, and the pair without a label


def test_order_and_company_change_nothing(gpt):
    scorer = Scorer(gpt)
    scores = scorer.loglikelihoods(TEXTS)
    reverse = scorer.loglikelihoods(TEXTS[::-1])[::-1]
    alone = [scorer.loglikelihoods([text])[0] for text in TEXTS]
    for other in (reverse, alone):
        assert_close(other, [(score.logprob, score.greedy) for score in scores])


def test_a_shared_prefix_is_computed_once():
    context, choices = [1, 2, 3, 4], [[5], [5, 6], [7, 8, 9], [7, 8, 10]]
    (row,) = trie_rows([(context, choice) for choice in choices])
    assert row.ids.tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 4, 5]
    labels = set(zip(row.pairs.tolist(), row.nodes.tolist(), row.targets.tolist(), strict=True))
    assert labels == {
        (0, 3, 5),
        *((1, 3, 5), (1, 4, 6)),
        *((2, 3, 7), (2, 5, 8), (2, 6, 9)),
        *((3, 3, 7), (3, 5, 8), (3, 6, 10)),
    }
    ancestors = [set(np.flatnonzero(line)) for line in row.mask()]
    assert ancestors == [
        *({0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}),
        {0, 1, 2, 3, 4},
        *({0, 1, 2, 3, 5}, {0, 1, 2, 3, 5, 6}),
    ]


def test_rows_cover_random_pairs_and_keep_to_their_size():
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(300):
        sizes = rng.integers(0, 12), rng.integers(1, 5)
        pairs.append(tuple(rng.integers(0, 3, size).tolist() for size in sizes))
    rows = trie_rows(pairs, row_tokens=30)
    seen: dict[int, list] = {}
    for row in rows:
        assert len(row.ids) <= 30
        mask = row.mask()
        assert (mask.sum(axis=1) == row.positions + 1).all()
        for pair, node, target in zip(row.pairs, row.nodes, row.targets, strict=True):
            seen.setdefault(int(pair), []).append([*row.ids[mask[node]].tolist(), int(target)])
    for number, (context, continuation) in enumerate(pairs):
        whole = context + continuation
        ends = range(max(1, len(context)), len(whole))
        assert sorted(seen.get(number, [])) == sorted(whole[: end + 1] for end in ends)
    assert sum(len(row.ids) for row in rows) < 0.7 * sum(len(a) + len(b) - 1 for a, b in pairs)


def test_a_wrong_ancestor_would_be_noticed(gpt, monkeypatch):
    scorer = Scorer(gpt)
    expected = naive_scores(gpt, scorer.encode(TEXTS))
    right = TrieRow.mask

    def wrong(row: TrieRow) -> np.ndarray:
        mask = right(row)
        mask[-1, row.branches[-1][0] - 1] ^= True
        return mask

    monkeypatch.setattr(TrieRow, "mask", wrong)
    with pytest.raises(AssertionError):
        assert_close(scorer.loglikelihoods(TEXTS), expected)


def test_what_is_too_long_loses_the_beginning_of_its_context(gpt):
    scorer = Scorer(gpt)
    context, continuation = " ".join(WORDS * 10), " and the dogs ran home"
    ((ids, end),) = scorer.encode([(context, continuation)])
    kept = ids[-(CONFIG.block_size + 1 - len(end)) :]
    assert len(ids) > len(kept) > 40
    score = scorer.loglikelihoods([(context, continuation)])
    ids = torch.tensor([kept + end])
    logprobs = gpt(ids[:, :-1])[0].log_softmax(-1)[-len(end) :]
    expected = logprobs.gather(1, torch.tensor(end)[:, None]).sum().item()
    assert score[0].logprob == pytest.approx(expected, abs=1e-4)
    with pytest.raises(
        ValueError, match="continuation of 1.. tokens does not fit the context of 64"
    ):
        scorer.loglikelihoods([("a", context)])
    with pytest.raises(ValueError, match="empty"):
        scorer.loglikelihoods([("a", "")])


def test_logits_that_are_not_finite_are_refused(gpt):
    broken = GPT(CONFIG)
    broken.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        broken.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Scorer(broken).loglikelihoods(TEXTS)


def test_an_exported_folder_and_transformers_give_the_same(gpt, tmp_path):
    torch.manual_seed(1)
    gpt = GPT(CONFIG).eval()  # transformers' tokenizer and ours agree on TEXTS
    export_hf(gpt, load_tokenizer(), tmp_path / "hf", "float32", facts={})
    assert folder_tokenizer(tmp_path / "hf").sha256 == load_tokenizer().sha256
    ours = Scorer(str(tmp_path / "hf"))
    assert isinstance(ours.model, Lille)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="sdpa")
    peer = Scorer(Peer(model, AutoTokenizer.from_pretrained(tmp_path / "hf"), "hf"))
    assert peer.model.block_size == 64 and peer.model.encode([]) == []
    expected = ours.loglikelihoods(TEXTS)
    assert_close(peer.loglikelihoods(TEXTS), [(s.logprob, s.greedy) for s in expected])


def test_a_folder_without_a_tokenizer_is_ours_by_its_size(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"vocab_size": 49152}')
    with pytest.raises(UserError, match="a vocabulary of 49152 and no tokenizer.json"):
        folder_tokenizer(tmp_path)
    config.write_text('{"vocab_size": 32768}')
    assert folder_tokenizer(tmp_path).sha256 == load_tokenizer().sha256
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match="tokenizer.json is not there: name a JSON"):
        folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "vocab.json").touch()
    with pytest.raises(UserError, match="tokenizer.json is not there"):
        folder_tokenizer(tmp_path)
    config.write_text('{"model_type": "lille-130m", "vocab_size": 32768}')  # as its export writes
    assert folder_tokenizer(tmp_path).sha256 == load_tokenizer().sha256


def test_a_model_that_ignores_the_mask_is_refused(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    class Tokenizer:
        def __call__(self, texts, **options):
            return {"input_ids": [list(text.encode()) for text in texts]}

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="bloom cannot be evaluated here"):
        Peer(model, Tokenizer(), "bloom")


def test_names_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match="give the path of a .gguf file"):
        open_model(str(tmp_path / "x.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="transformers cannot read"):
        open_model(str(tmp_path / "bad.gguf"))
    with pytest.raises(UserError, match="not there"):
        open_model(str(tmp_path / "no.pt"))


def test_parity_compares_each_choice_with_a_margin():
    items = [{"choices": [" a", " bcd"], "answer": 0}] * 2
    chosen, margins = predictions(items, np.array([-1.0, -2.0, -3.0, -1.0]))
    assert chosen.tolist() == [[0, 1], [1, 1]]  # by the sum, by characters
    assert margins[0].tolist() == pytest.approx([1, 1])  # -1 * 3 and -2 / 3 * 3
