"""The learning study: the original's recipe, Muon's share of the weights, tuning, resuming."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from benchmarks import learning
from benchmarks.inputs import Documents
from benchmarks.learning_recipes import (
    OriginalTrainer,
    PaddedStarts,
    small_tokenizer,
)
from common.errors import UserError
from common.settings import config_from_constants
from model import GPT, GPTConfig
from ops.cross_entropy import IGNORE_INDEX
from ops.sampling import sample
from tokenizer import load_tokenizer

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
    return dataclasses.replace(constants, batch_size=3, gradient_accumulation_steps=2, **changes)


def test_the_originals_hessian():
    """Labels drawn at padding too, the gradient clipped to norm 1, bs of the whole step."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that the clip acts
    trainer = OriginalTrainer(model, settings(block_size=8), torch.device("cpu"), torch.float32)
    assert {group["bs"] for group in trainer.optimizer.param_groups} == {3 * 2 * 8}
    batch = PaddedStarts([documents()], 8, PAD).batch([0, 2, 3])

    torch.manual_seed(5)
    logits = model(batch.ids, positions=batch.positions).flatten(0, 1)
    loss = F.cross_entropy(logits, sample(logits.detach()))  # the mean over all 24 positions
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 1
    torch.manual_seed(5)
    trainer.update_hessian(batch)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        expected = (1 - 0.99) * (gradient / norm).square()
        hessian = trainer.optimizer.state[parameter]["hessian"]
        torch.testing.assert_close(hessian, expected, rtol=1e-3, atol=1e-9)
        assert parameter.grad is None


def test_the_rate_of_a_study_with_two_is_the_embeddings():
    """So it was recorded before train.py had an embedding_learning_rate."""
    shape = SHAPE | {"block_size": 8, "batch_size": 2, "seed": 0, "learning_rate": 0.01}
    for changes, hidden in (({"optimizer": "muon"}, 0.01), ({"hidden_rate": 0.125}, 0.00125)):
        trainer = learning.make_trainer(shape | {"optimizer": "adamw"} | changes)
        assert trainer.config.learning_rate == hidden
        assert trainer.config.embedding_learning_rate == 0.01


def test_the_tokenizer_cut_short_spells_the_same_text():
    small, text = small_tokenizer(400), "The cat sat <|endoftext|> naïve 東京\n"
    ids = small.encode(text)
    assert small.vocab_size == 400 and max(ids) < 395 and small.decode(ids) == text
    assert len(ids) > len(load_tokenizer().encode(text))


def test_tuning_leaves_the_edge_of_the_grid_and_runs_nothing_twice(tmp_path, monkeypatch):
    rates = []

    def pretend(data_dir, settings):
        rates.append(settings["learning_rate"])
        return {"settings": settings, "loss": abs(settings["learning_rate"] - 0.0011)}

    monkeypatch.setattr(learning, "train_once", pretend)
    config = config_from_constants(vars(learning), [f"--results={tmp_path}/new/r.jsonl"])
    study = learning.Study(config)
    grid = learning.FIRST_RATES
    assert study.tune("ours, AdamW", "learning_rate", grid) == 1e-3
    assert rates == [2e-3, 4e-3, 8e-3, 1e-3, 5e-4]
    assert learning.Study(config).tune("ours, AdamW", "learning_rate", grid) == 1e-3
    assert len(rates) == 5
    learning.Study(config).run("ours, AdamW", seed=1, learning_rate=1e-3)
    longer = dataclasses.replace(config, steps=config.steps + 1)
    learning.Study(longer).run("ours, AdamW", learning_rate=1e-3)
    assert len(rates) == 7


def test_the_whole_study_and_its_picture(text_data, tmp_path, monkeypatch, capsys):
    """Every recipe trains, once; a run that is cut off leaves the finished ones alone."""
    results, picture = tmp_path / "r.jsonl", tmp_path / "r.png"
    shape = {**SHAPE, "block_size": 32, "vocab_size": 400, "batch_size": 2}
    shape |= dict(steps=2, warmup_iters=1, eval_points=2, eval_rows=4, seeds=2)
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
    (row,) = (line.split("|") for line in printed if line.startswith("| ours, Muon"))
    losses = [line["loss"] for line in lines if line["settings"]["name"] == "ours, Muon"]
    assert min(losses) - 1e-4 <= float(row[5]) <= max(losses) + 1e-4
    with pytest.raises(UserError, match="no finished run"):
        learning.main(["--plot", f"--results={tmp_path / 'none.jsonl'}"])
