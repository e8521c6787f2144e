"""The training and optimizer benchmarks compare what they say: equal weights give equal losses.

Peers that are not installed are skipped (requirements/bench.txt); transformers always takes part.
"""

import functools

import numpy as np
import pytest
import torch
from test_model import llama_twin

from benchmarks.inputs import Documents, demo_config, make_documents, train_config
from benchmarks.optimizer import compare_updates
from benchmarks.peers import (
    PeerTrainer,
    beginnings,
    litgpt_loss,
    litgpt_of,
    llama_loss,
    llama_of,
    original_loss,
    original_of,
    plain_rows,
)
from benchmarks.timing import peer
from benchmarks.training_step import (
    ONE_ADAMW,
    compare_steps,
    make_steps,
    step_function,
    token_use,
)
from model import GPT, GPTConfig
from ops.cross_entropy import IGNORE_INDEX
from tokenizer import load_tokenizer
from training.packing import Batch, PackedRows
from training.trainer import Trainer

CPU, PAD, T = torch.device("cpu"), 510, 32
TINY = dict(n_layers=2, n_embd=64, n_heads=4, n_kv_heads=2, block_size=T)
CONFIG = train_config(**TINY, batch_size=3, gradient_accumulation_steps=2, **ONE_ADAMW)


def shape(**changes) -> GPTConfig:
    return GPTConfig(**TINY | dict(vocab_size=512) | changes)


def our_trainer(model: GPT) -> Trainer:
    return Trainer(model, CONFIG, CPU, torch.float32)


def losses_of(trainer, steps: list[list[Batch]]) -> list[float]:
    """Losses of three steps on one batch: of the weights, and of what updates make of them."""
    return [trainer.step(steps[0], lr=1e-2)[0].item() for _ in range(3)]


def whole_rows() -> dict[str, list[list[Batch]]]:
    """Batches of rows that are one document each, so that document masks change nothing."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(PAD, size=30 * T).astype(np.uint16)
    documents = Documents(tokens, np.arange(0, 30 * T + 1, T))
    return make_steps(PackedRows([documents], T, PAD), documents, 3, 2)


def test_peers_with_our_weights_have_our_losses():
    torch.manual_seed(0)
    steps, model = whole_rows(), GPT(shape())
    llama, _ = llama_twin(model)
    trainer = PeerTrainer(llama_loss, llama, CONFIG, CPU, torch.float32)
    losses = {"transformers": losses_of(trainer, steps["plain"])}
    if (litgpt := litgpt_of(shape())) is not None:
        copy_into_litgpt(model, litgpt)
        assert sum(p.numel() for p in litgpt.parameters()) == model.n_parameters()
        trainer = PeerTrainer(litgpt_loss, litgpt, CONFIG, CPU, torch.float32)
        losses["litgpt"] = losses_of(trainer, steps["packed"])
    ours = losses_of(our_trainer(model), steps["packed"])

    assert ours[0] == pytest.approx(np.log(512), abs=0.2) and ours[2] < ours[0] - 0.5
    for name, values in losses.items():  # float32 rounding, through two updates
        assert values == pytest.approx(ours, rel=2e-5), name
    assert llama_of(shape()).num_parameters() == model.n_parameters()


def copy_into_litgpt(model: GPT, theirs: torch.nn.Module) -> None:
    pieces = {"transformer.wte": model.tok_embeddings, "transformer.ln_f": model.norm}
    for i, block in enumerate(model.layers):
        name = f"transformer.h.{i}"
        attention, feed_forward = block.attention, block.feed_forward
        pieces |= {f"{name}.norm_1": attention.norm, f"{name}.norm_2": feed_forward.norm}
        pieces |= {f"{name}.attn.qkv": attention.qkv_proj, f"{name}.attn.proj": attention.out_proj}
        pieces |= {
            f"{name}.mlp.fc_1": feed_forward.gate_proj,
            f"{name}.mlp.fc_2": feed_forward.up_proj,
            f"{name}.mlp.proj": feed_forward.down_proj,
        }
    with torch.no_grad():
        for name, module in pieces.items():
            theirs.get_submodule(name).weight.copy_(module.weight)


def short_and_long(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(PAD, size=n).astype(np.uint16) for n in (2, 5, T - 1, T, T + 1, 3 * T)]


def test_the_original_on_its_padded_rows_has_our_loss():
    model = original_of(shape())
    if model is None:
        pytest.skip("simpleai-sdk is not installed")
    steps = [[beginnings(short_and_long(seed), T, PAD) for seed in range(2)]]
    twin = GPT(shape(rope_style="lille"))
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all("rotary_emb" in name for name in unexpected)
    ours = losses_of(our_trainer(twin), steps)
    trainer = PeerTrainer(original_loss(PAD), model, CONFIG, CPU, torch.float32)
    assert losses_of(trainer, steps) == pytest.approx(ours, rel=2e-5)


def test_padded_rows_are_beginnings_of_documents_drawn_with_replacement():
    documents = short_and_long()
    offsets = np.cumsum([0, *map(len, documents)])
    documents = Documents(np.concatenate(documents), offsets)
    ((batch,), _) = make_steps(PackedRows([documents], T, PAD), documents, 64, 1)["padded"]
    numbers = set()
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        length = int((ids != PAD).sum())
        (number,) = (
            i for i, d in enumerate(documents)
            if len(d[:T]) == length and (d[:T] == ids[:length].numpy()).all()
        )  # fmt: skip
        numbers.add(number)
        assert targets[: length - 1].tolist() == ids[1:length].tolist()
        assert (targets[length - 1 :] == IGNORE_INDEX).all()
    assert numbers == set(range(len(documents)))  # all are drawn
    assert batch.n_labels == int((batch.ids != PAD).sum()) - 64


def test_useful_tokens_are_counted_as_labels():
    documents = make_documents(3000, vocab_size=500)
    lengths = np.diff(documents.offsets)
    assert lengths.mean() == pytest.approx(1030, rel=0.1)
    assert np.log(lengths).std() == pytest.approx(1.08, rel=0.05)

    rows = PackedRows([documents], T, PAD)
    steps = make_steps(rows, documents, 3, 2)
    for step in range(2):
        numbers = range(step * 6, step * 6 + 6)
        segments = [segment for row in numbers for segment in rows.segments(row)]
        tokens = sum(map(len, segments))
        assert sum(batch.n_labels for batch in steps["packed"][step]) == tokens - len(segments)
        # transformers makes a label of every token that has one before it in its row
        assert sum(batch.n_labels for batch in steps["plain"][step]) == tokens - 6
    plain = plain_rows(rows.batch([0, None]), PAD)  # a row of padding has no labels
    assert plain.n_labels == T - 1 and (plain.targets[1] == IGNORE_INDEX).all()


def test_use_of_tokens_against_sums_by_hand():
    offsets = np.cumsum([0, 1, 10, 10, 10])  # rows of 4: 1; three times 4 + 4 + 2: packed in 8 rows
    documents = Documents(np.zeros(31, dtype=np.uint16), offsets)
    rows = PackedRows([documents], 4, pad_id=9)
    assert rows.rows_per_epoch == 8
    use = token_use(rows, documents)
    assert use["ours"] == {"filled": 31 / 32, "trained on": 1}
    assert use["original Lille"] == {"filled": 13 / 16, "trained on": 13 / 31}


def test_tables_of_a_tiny_model(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    documents = make_documents(40, vocab_size=32000)
    rows = PackedRows([documents], T, load_tokenizer().pad_id)
    steps = compare_steps("tiny", CONFIG, rows, documents, CPU, torch.float32, 1, compile=True)
    optimizers = compare_updates("tiny", GPT(shape()), CPU, 1, muon=True)

    assert list(steps["rows"])[0] == "transformers Llama, torch.compile"
    assert {"transformers Llama", "ours, torch.compile", "ours"} <= steps["rows"].keys()
    for row in steps["rows"].values():
        assert 0 < row["share"] < 1 and row["rate"] > 0
    assert len(optimizers["rows"]) == 7 + (peer("sophia_opt") is not None)
    assert "left out" not in capsys.readouterr().out


def test_a_step_that_fails_leaves_no_gradients_to_others():
    model, steps = GPT(shape()), whole_rows()["packed"]

    def fails_second(forward, ids, targets) -> torch.Tensor:
        if any(p.grad is not None for p in model.parameters()):
            raise RuntimeError("out of memory")
        return forward(ids, targets)

    trainer = PeerTrainer(fails_second, model, CONFIG, CPU, torch.float32)
    with pytest.raises(RuntimeError, match="out of memory"):
        step_function(trainer, steps)()
    assert all(p.grad is None for p in model.parameters())


def test_the_demo_is_measured_as_it_trains():
    config = demo_config()
    assert (config.n_layers, config.n_embd, config.block_size) == (4, 128, 128)
    assert (config.batch_size, config.optimizer, config.compile) == (16, "sophiag", False)
