"""The learning study: the original's recipe, Muon's share of the weights, tuning, resuming."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from benchmarks import learning
from benchmarks.inputs import Documents
from benchmarks.learning_recipes import (
    OPTIMIZERS,
    ORIGINAL,
    ORIGINAL_TWO_RATES,
    RECIPES,
    TUNED,
    OriginalTrainer,
    PaddedStarts,
    cautious_step,
    small_tokenizer,
)
from benchmarks.learning_recipes import settings as recipe_settings
from common.errors import UserError
from common.settings import config_from_constants
from model import GPT, GPTConfig
from ops.cross_entropy import IGNORE_INDEX
from ops.sampling import draw
from tokenizer import load_tokenizer
from training.learning_rates import EMBEDDING, HIDDEN
from training.optimizers import AdamW, Muon

SHAPE = dict(n_layers=2, n_embd=16, n_heads=2, n_kv_heads=1, block_size=8, vocab_size=300)
LENGTHS = (3, 8, 20, 5)
PAD = 295


def documents() -> Documents:
    offsets = np.concatenate(([0], np.cumsum(LENGTHS)))
    return Documents(np.arange(1, offsets[-1] + 1, dtype=np.uint16), offsets)


def test_the_originals_batches():
    """First tokens of each document, padded, with the next tokens of the same row as labels."""
    batch = PaddedStarts([documents()], 8, PAD).batch([0, 2, None])
    assert batch.ids.tolist() == [[1, 2, 3] + 5 * [PAD], list(range(12, 20)), 8 * [PAD]]
    none = IGNORE_INDEX
    assert batch.targets.tolist() == [[2, 3] + 6 * [none], [*range(13, 20), none], 8 * [none]]
    assert batch.n_labels == 9
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    loss = model(batch.ids, batch.targets, batch.positions)
    assert torch.equal(loss, model(batch.ids.where(batch.ids != PAD, 7), *batch.tensors()[1:3]))
    alone = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, none]])
    whole = batch.ids[1:2], batch.targets[1:2]
    torch.testing.assert_close(loss, model(*alone) + model(*whole))


def test_documents_are_drawn_with_replacement():
    rows = PaddedStarts([documents()], 8, PAD, seed=1)
    first = rows.batch(range(4000)).ids[:, 0]
    assert torch.equal(first, torch.cat([rows.batch([r]).ids[:, 0] for r in range(4000)]))
    counts = torch.stack([(first == start).sum() for start in (1, 4, 12, 32)])
    assert counts.sum() == 4000 and (counts - 1000).abs().max() < 150  # 5.5 deviations
    other = PaddedStarts([documents()], 8, PAD, seed=2).batch(range(4000)).ids[:, 0]
    assert not torch.equal(first, other)


def settings(**changes) -> object:
    constants = config_from_constants(vars(train), [])
    changes = {name: value for name, value in changes.items() if hasattr(constants, name)}
    shape = {"block_size": 8, "batch_size": 3, "gradient_accumulation_steps": 2}
    rates = {"learning_rate": 1e-3, "embedding_learning_rate": 1e-2}
    return dataclasses.replace(constants, **shape | rates | changes)


@pytest.mark.parametrize("two_rates", [False, True])
def test_the_originals_hessian(two_rates):
    """Labels drawn at padding too, the gradient clipped to norm 1, bs of the whole step."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that the clip acts
    config = settings(**RECIPES[ORIGINAL_TWO_RATES if two_rates else ORIGINAL])
    trainer = OriginalTrainer(model, config, torch.device("cpu"), torch.float32)
    assert {group["bs"] for group in trainer.sophiag.param_groups} == {3 * 2 * 8}
    assert not any(group["bias_correction"] for group in trainer.sophiag.param_groups)
    batch = PaddedStarts([documents()], 8, PAD).batch([0, 2, 3])

    torch.manual_seed(6)
    logits = model(batch.ids, positions=batch.positions).flatten(0, 1)
    loss = F.cross_entropy(logits, draw(logits.detach().softmax(-1)))  # of all 24 positions
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 1
    torch.manual_seed(6)
    trainer.update_hessian(batch)
    checked = 0
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if parameter in trainer.sophiag.state:
            expected = (1 - 0.95) * (gradient / norm).square()
            hessian = trainer.sophiag.state[parameter]["hessian"]
            torch.testing.assert_close(hessian, expected, rtol=1e-3, atol=1e-9)
            checked += 1
        assert parameter.grad is None
    assert checked == len(gradients) - two_rates * 6  # five norms and the embedding


def test_each_recipe_is_what_it_is_called():
    """Its optimizers and settings; rates that are not given follow the rule."""
    shape = SHAPE | {"batch_size": 2, "gradient_accumulation_steps": 1, "seed": 0}
    kinds = {}
    schedules = {"ours linear": ("linear", 0.1), "ours linear to 0": ("linear", 0.0)}
    schedules["ours wsd"] = ("wsd", 0.1)
    for name in RECIPES:
        trainer = learning.make_trainer(shape | recipe_settings(name) | {"learning_rate": 0.01})
        parts = getattr(trainer.optimizer, "optimizers", (trainer.optimizer,))
        kinds[name] = [type(part).__name__ for part in parts]
        if "SophiaG" in kinds[name]:
            group = parts[0].param_groups[0]
            kinds[name] += [group[key] for key in ("cautious", "bias_correction", "rho", "betas")]
        config = trainer.config
        assert config.learning_rate == 0.01
        assert (config.schedule, config.min_lr_ratio) == schedules.get(name, ("cosine", 0.1))
        assert (config.embedding_learning_rate > 0) == (config.embedding_optimizer == "adamw")
        assert config.dropout == trainer.model.config.dropout == 0.1 * ("original" in name)
        if name.endswith(" cautious") and name != "ours not cautious":
            kinds[name].append(trainer.optimizer.hidden.step.func.__name__)
    ours = ["SophiaG", "AdamW", True, True, 0.8, (0.9, 0.95)]
    original = [False, False, 0.04, (0.9, 0.95)]
    assert kinds == {
        "ours": ours,
        "AdamW cautious": ["AdamW", "AdamW", "cautious_step"],
        "Muon cautious": ["Muon", "AdamW", "cautious_step"],
        "ours padded": ours,
        **dict.fromkeys(schedules, ours),
        "ours lille RoPE": ours,
        "ours not cautious": ours[:2] + [False] + ours[3:],
        "AdamW": ["AdamW", "AdamW"],
        "AdamW one rate": ["AdamW"],
        "Muon": ["Muon", "AdamW"],
        "SophiaG one rate": ["SophiaG", False, False, 0.8, (0.965, 0.99)],
        "original": ["SophiaG", *original],
        "original two rates": ["SophiaG", "AdamW", *original],
    }


def test_the_tokenizer_cut_short_spells_the_same_text():
    small, text = small_tokenizer(400), "The cat sat <|endoftext|> naïve 東京\n"
    ids = small.encode(text)
    assert small.vocab_size == 400 and max(ids) < 395 and small.decode(ids) == text
    assert len(ids) > len(load_tokenizer().encode(text))


def test_tuning_leaves_the_edge_and_runs_nothing_twice(tmp_path, monkeypatch):
    """One setting after the other, from values that fit the size."""
    tried = []

    def pretend(data_dir, settings):
        rates = settings["learning_rate"], settings["embedding_learning_rate"]
        tried.append(rates)
        loss = abs(math.log(rates[0] / 1.1e-3)) + abs(math.log(rates[1] / 3e-2))
        return {"settings": settings, "loss": None if rates[0] > 5e-3 else loss}

    monkeypatch.setattr(learning, "train_once", pretend)
    config = config_from_constants(vars(learning), [f"--results={tmp_path}/new/r.jsonl"])
    study = learning.Study(config)
    best = {"learning_rate": 1e-3, "embedding_learning_rate": 3.2e-2}
    assert study.tune("AdamW") == best
    assert [rates for rates, _ in tried] == [4e-3, 2e-3, 8e-3, 1e-3, 5e-4] + 2 * [1e-3]
    assert [rates for _, rates in tried] == 5 * [3.2e-2] + [1.6e-2, 6.4e-2]
    assert learning.Study(config).tune("AdamW") == best
    assert len(tried) == 7
    learning.Study(config).run("AdamW", seed=1, **best)
    longer = dataclasses.replace(config, steps=config.steps + 1)
    learning.Study(longer).run("AdamW", **best)
    assert len(tried) == 9
    wide = learning.Study(dataclasses.replace(config, n_embd=128, batch_size=16))
    assert wide.first_values("AdamW") == {"learning_rate": 4e-3, "embedding_learning_rate": 3.2e-2}
    assert wide.first_values("SophiaG one rate") == {"learning_rate": 2e-3, "rho": 0.2}


def test_the_study_of_sizes(tmp_path, monkeypatch, capsys):
    """Three optimizers at every size; the table has the best rates and those of the rule."""

    def pretend(data_dir, settings):
        best = 1e-3 * 64 / settings["n_embd"], EMBEDDING.at(settings["n_embd"], 4096)
        rates = settings["learning_rate"], settings["embedding_learning_rate"]
        off = sum(abs(math.log(rate / at)) for rate, at in zip(rates, best, strict=True))
        return {"settings": settings, "loss": 4 + off}

    monkeypatch.setattr(learning, "train_once", pretend)
    results = tmp_path / "r.jsonl"
    assert learning.main([f"--results={results}", "--study=sizes"]) == 0
    lines = [json.loads(line)["settings"] for line in results.read_text().splitlines()]
    sizes = {(s["name"], s["n_embd"], s["steps"]) for s in lines}
    widths = ((64, 256), (64, 128), (128, 256), (256, 256))
    assert sizes == {(name, *size) for name in OPTIMIZERS for size in widths}
    for s in lines:  # each has a run at the rule's rates
        tokens = s["batch_size"] * s["gradient_accumulation_steps"] * s["block_size"]
        rate = float(f"{EMBEDDING.at(s['n_embd'], tokens):.3g}")
        assert any(
            line["embedding_learning_rate"] == rate
            and all(line[key] == s[key] for key in ("name", "n_embd", "batch_size"))
            for line in lines
        )
    assert len({json.dumps(s, sort_keys=True) for s in lines}) == len(lines)
    table = [row.split("|") for row in capsys.readouterr().out.splitlines() if row[:1] == "|"]
    assert len(table) == 2 + 3 * len(learning.SIZES)
    assert all(len(row) == len(table[0]) for row in table)


def test_an_untuned_study_has_the_rates_of_the_rule(tmp_path, monkeypatch):
    runs = []

    def pretend(data_dir, settings):
        runs.append(settings)
        keys = ("loss", "loss_of_document_starts", "labels")
        return {"settings": settings, "curve": [[1, 1.0]]} | dict.fromkeys(keys, 1.0)

    monkeypatch.setattr(learning, "train_once", pretend)
    paths = [f"--results={tmp_path}/r.jsonl", f"--picture={tmp_path}/r.png"]
    only = "--only=Muon,original two rates"
    assert learning.main(["--study=untuned", only, "--n_embd=128", "--seeds=2", *paths]) == 0
    assert [(run["name"], run["seed"]) for run in runs] == [
        (name, seed) for seed in (0, 1) for name in ("Muon", "original two rates")
    ]
    rate = EMBEDDING.at(128, 4096)
    assert runs[0]["learning_rate"] == pytest.approx(HIDDEN["muon"].at(128, 4096), rel=5e-3)
    assert runs[0]["embedding_learning_rate"] == pytest.approx(rate, rel=5e-3)
    for mistake in ("--only=muon", "--study=size"):
        with pytest.raises(UserError, match="did you mean Muon|must be one of recipes"):
            learning.main([mistake, *paths])
    assert runs[1]["learning_rate"] == TUNED["original two rates"]["learning_rate"] / 2


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_a_cautious_step_keeps_only_updates_against_the_gradient(kind):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(16, 8))
    plain = torch.nn.Parameter(p.detach().clone())
    options = {"lr": 0.1, "weight_decay": 0.1}
    optimizer, reference = kind([p], **options), kind([plain], **options)
    shares = []
    for _ in range(5):
        before, gradient = p.detach().clone(), torch.randn(16, 8)
        plain.data.copy_(p.detach())
        p.grad, plain.grad = gradient.clone(), gradient.clone()
        cautious_step(optimizer, optimizer.step, grad_scale=torch.tensor(0.5))
        reference.step(grad_scale=torch.tensor(0.5))
        decayed = before * (1 - 0.1 * 0.1)
        kept = (plain.detach() - decayed) * gradient < 0
        assert torch.equal(p.detach(), torch.where(kept, plain.detach(), decayed))
        shares.append(kept.float().mean().item())
    assert 0.6 < min(shares[1:]) and max(shares[1:]) < 0.9


def test_the_whole_study_and_its_picture(text_data, tmp_path, monkeypatch, capsys):
    """Every recipe trains, once; a run that is cut off leaves the finished ones alone."""
    results, picture = tmp_path / "r.jsonl", tmp_path / "r.png"
    shape = {**SHAPE, "block_size": 32, "vocab_size": 400, "batch_size": 2}
    shape |= dict(steps=2, eval_points=2, eval_rows=4, seeds=2)
    arguments = [f"--{name}={value}" for name, value in shape.items()]
    arguments += [f"--data_dir={text_data}", f"--results={results}", f"--picture={picture}"]
    monkeypatch.setattr(learning, "MAX_TRIALS", 3)
    real, count = learning.train_once, 0

    def killed_in_the_third(data_dir, settings):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(data_dir, settings)

    monkeypatch.setattr(learning, "train_once", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        learning.main(arguments)
    before = results.read_text()
    assert before.count("\n") == 2
    assert learning.main(arguments) == 0
    after = results.read_text()
    assert after.startswith(before)
    lines = [json.loads(line) for line in after.splitlines()]
    runs = [json.dumps(line["settings"], sort_keys=True) for line in lines]
    assert len(set(runs)) == len(runs) == count - 1
    assert {len(line["curve"]) for line in lines} == {2}

    def untrained(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(learning, "train_once", untrained)
    assert learning.main(arguments) == 0
    picture.unlink()
    capsys.readouterr()
    assert learning.main([*arguments, "--plot"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and results.read_text() == after
    printed = capsys.readouterr().out.splitlines()
    (row,) = (line.split("|") for line in printed if line.startswith("| Muon  "))
    losses = [line["loss"] for line in lines if line["settings"]["name"] == "Muon"]
    assert min(losses) - 1e-4 <= float(row[6]) <= max(losses) + 1e-4
    with pytest.raises(UserError, match="no finished run"):
        learning.main(["--plot", f"--results={tmp_path / 'none.jsonl'}"])
