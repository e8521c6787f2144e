"""Parameter groups: who updates what at which rate, and that a run with them resumes exactly."""

import copy
import dataclasses
import re

import pytest
import torch
from test_train import config_of, newest
from tiny import difference

import train
from checkpoint import load_checkpoint
from common.errors import UserError
from model import GPT, GPTConfig
from sophia_triton import SophiaG
from training.learning_rates import (
    EMBEDDING,
    FINETUNE_SHARE,
    HIDDEN,
    warmup_steps,
    with_peak_rates,
)
from training.optimizers import first_moments, make_optimizer, set_learning_rate

SHAPE = {"n_layers": 2, "n_embd": 16, "n_heads": 2, "n_kv_heads": 1, "block_size": 8}
OPTIMIZERS = ("sophiag", "adamw", "muon")
RATES = {"learning_rate": 3e-3, "embedding_learning_rate": 2e-2}


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE, vocab_size=64))


def config(optimizer: str, **changes) -> object:
    return config_of("", "", **SHAPE | {"optimizer": optimizer, "batch_size": 3} | RATES | changes)


def set_gradients(gpt: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in gpt.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_parameter_has_its_optimizer_and_rate(name):
    """Three steps equal those of PyTorch's optimizers, or of SophiaG, on each group alone."""
    gpt, twin = small_gpt(), small_gpt()
    optimizer = make_optimizer(gpt, config(name))
    embedding = twin.tok_embeddings.weight
    hidden = [p for p in twin.parameters() if p.dim() == 2 and p is not embedding]
    norms = [p for p in twin.parameters() if p.dim() == 1]
    assert len(hidden) == 10 and len(norms) == 5
    adamw = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    if name == "sophiag":
        options = {"rho": 0.8, "bs": 24, "bias_correction": True, "cautious": True}
        expected = SophiaG(hidden, 3e-3, (0.9, 0.95), **options)
    elif name == "muon":
        expected = torch.optim.Muon(hidden, 3e-3, adjust_lr_fn="match_rms_adamw")
    else:
        expected = torch.optim.AdamW(hidden, 3e-3, **adamw)
    others = torch.optim.AdamW([embedding], 2e-2, **adamw)
    rest = torch.optim.AdamW(norms, 2e-2, **adamw | {"weight_decay": 0.0})
    for step in range(3):
        for model in (gpt, twin):
            set_gradients(model, step)
        if name == "sophiag":
            optimizer.update_hessian()
            expected.update_hessian()
        set_learning_rate(optimizer, 3e-3)
        optimizer.step(grad_scale=torch.tensor(0.5))
        torch._foreach_mul_([p.grad for p in twin.parameters()], 0.5)
        for other in (expected, others, rest):
            other.step()
    for ours, theirs in zip(gpt.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    set_learning_rate(optimizer, 3e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([3e-4, 2e-3, 2e-3])
    if name == "sophiag":  # over the hidden matrices
        assert torch.equal(optimizer.win_rate, expected.win_rate)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scale_that_is_not_finite_changes_nothing(name):
    gpt = small_gpt()
    optimizer = make_optimizer(gpt, config(name))
    for scale in (1.0, float("nan")):
        set_gradients(gpt, 1)
        before = copy.deepcopy([gpt.state_dict(), optimizer.state_dict()])
        optimizer.step(grad_scale=torch.tensor(scale))
    assert difference([gpt.state_dict(), optimizer.state_dict()], before) is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_a_pair(name):
    """As `first_moments` says, numbered without a gap, and exact after a load into another one."""
    gpt = small_gpt()
    optimizer = make_optimizer(gpt, config(name))
    set_gradients(gpt, 0)
    if name == "sophiag":
        optimizer.update_hessian()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    assert numbers == sorted(saved["state"]) == list(range(16))
    expected = first_moments(optimizer, torch.float32)
    for number, values in saved["state"].items():
        assert values.keys() == expected[number].keys()
    twin = copy.deepcopy(gpt)
    other = make_optimizer(twin, config(name))
    other.load_state_dict(saved)
    assert difference(other.state_dict()["state"], saved["state"]) is None
    for model, stepper in ((gpt, optimizer), (twin, other)):
        set_gradients(model, 1)
        stepper.step()
    assert difference(gpt.state_dict(), twin.state_dict()) is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_two_rates_resumes_bit_for_bit(name, text_data, tmp_path):
    settings = RATES | {"optimizer": name, "num_epochs": 1, "eval_interval": 6, "sample_tokens": 0}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train.train(config_of(text_data, whole, keep_checkpoints=9, **settings))
    resumed.mkdir()
    middle = sorted(whole.glob("ckpt_*.pt"))[0]
    (resumed / middle.name).write_bytes(middle.read_bytes())
    train.train(config_of(text_data, resumed, **settings))
    assert newest(resumed).name == newest(whole).name != middle.name
    states = [load_checkpoint(newest(folder)) for folder in (whole, resumed)]
    for state in states:
        del state["config"]["keep_checkpoints"]
    assert difference(*states) is None


def test_a_checkpoint_of_one_optimizer_goes_on_with_it(text_data, tmp_path):
    """One of an earlier version, which did not have the settings."""
    one = {"embedding_optimizer": "same", "embedding_learning_rate": 0.0}
    one |= {"cautious": False, "rho": 0.05}
    train.train(config_of(text_data, tmp_path, max_steps=4, sample_tokens=0, **one))
    path = newest(tmp_path)
    state = load_checkpoint(path)
    for name in ("embedding_optimizer", "cautious"):
        del state["config"][name]
    torch.save(state, path)
    flags = "--embedding_optimizer=same --rho=0.05 --cautious=False"
    with pytest.raises(UserError, match=re.escape(f"to continue it add {flags}, or start anew")):
        train.train(config_of(text_data, tmp_path, max_steps=5))
    given = dict(flag.removeprefix("--").split("=") for flag in flags.split())
    given |= {"embedding_learning_rate": 0.0}  # as it is by default
    train.train(config_of(text_data, tmp_path, max_steps=5, sample_tokens=0, **given))
    assert load_checkpoint(newest(tmp_path))["iter_num"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "muon", "embedding_optimizer": "same"}, "set embedding_optimizer='adamw'"),
        (
            {"embedding_optimizer": "same", "learning_rate": 0},
            "there is no rule: set learning_rate",
        ),
        (
            {"embedding_optimizer": "same", "embedding_learning_rate": 1e-3},
            "embedding_learning_ra",
        ),
    ],
)
def test_one_optimizer_for_all_has_limits(changes, message, text_data, tmp_path):
    with pytest.raises(UserError, match=message):
        train.train(config_of(text_data, tmp_path, **changes))


SIZES = {  # n_embd, tokens a step: rates of sophiag, adamw, muon and the embedding
    (64, 4096): (2.5e-3, 4e-3, 2e-2, 4e-2),
    (256, 4096): (6.25e-4, 1e-3, 5e-3, 1e-2),
    (64, 16_384): (4.35e-3, 5.66e-3, 2.83e-2, 8e-2),
    (640, 131_072): (4.35e-4, 5.66e-4, 2.83e-3, 8e-3),
}


def rates_at(settings, n_embd: int, tokens: int) -> tuple[float, float]:
    sizes = {"batch_size": 8, "gradient_accumulation_steps": 2}
    found = with_peak_rates(dataclasses.replace(settings, **sizes), n_embd, tokens // 16)
    return found.learning_rate, found.embedding_learning_rate


@pytest.mark.parametrize("number", range(3))
def test_rates_follow_the_size(number):
    """A fine-tune has a share of them; one that is given is kept and the other in proportion."""
    free = config(OPTIMIZERS[number], learning_rate=0, embedding_learning_rate=0)
    for size, expected in SIZES.items():
        hidden, embedding = expected[number], expected[3]
        assert rates_at(free, *size) == (hidden, embedding)
        tuned = rates_at(dataclasses.replace(free, finetune=True), *size)
        half = FINETUNE_SHARE * hidden, FINETUNE_SHARE * embedding
        assert tuned == pytest.approx(half, rel=5e-3) and FINETUNE_SHARE < 1
        for finetune in (False, True):
            some = dataclasses.replace(free, finetune=finetune, learning_rate=hidden / 10)
            expected_rates = (hidden / 10, embedding / 10)
            assert rates_at(some, *size) == pytest.approx(expected_rates, rel=1e-2)
            some = dataclasses.replace(free, finetune=finetune, embedding_learning_rate=0.5)
            expected_rates = (hidden * 0.5 / embedding, 0.5)
            assert rates_at(some, *size) == pytest.approx(expected_rates, rel=1e-2)
    both = config(OPTIMIZERS[number])
    assert rates_at(both, 64, 4096) == (RATES["learning_rate"], RATES["embedding_learning_rate"])


def test_rates_of_the_rule_are_checked_too(text_data, tmp_path):
    changes = {"learning_rate": 0, "embedding_learning_rate": 0, "weight_decay": 60}
    with pytest.raises(UserError, match="weight_decay=60.0 times embedding_learning_rate=.* above"):
        train.train(config_of(text_data, tmp_path, **changes))


def test_the_warm_up_is_a_tenth_and_stays(text_data, tmp_path, capsys):
    """Also in a run that is continued for longer."""
    assert [warmup_steps(total) for total in (1, 9, 250, 7600, 100_000)] == [1, 1, 25, 760, 2000]
    changes = {"warmup_iters": 0, "sample_tokens": 0, "eval_interval": 100}
    train.train(config_of(text_data, tmp_path, max_steps=20, **changes))
    train.train(config_of(text_data, tmp_path, max_steps=26, **changes))
    assert capsys.readouterr().out.count("; warm-up 2 steps") == 2
    assert load_checkpoint(newest(tmp_path))["config"]["warmup_iters"] == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_summary_has_the_rates_in_force(name, text_data, tmp_path, capsys):
    changes = {"optimizer": name, "warmup_iters": 0, "n_embd": 32}
    changes |= dict.fromkeys(("learning_rate", "embedding_learning_rate"), 0)
    train.train(config_of(text_data, tmp_path, max_steps=2, **changes))
    tokens = 4 * 2 * 32
    hidden, embedding = HIDDEN[name].at(32, tokens), EMBEDDING.at(32, tokens)
    line = f"rates: {hidden:.3g} for the hidden matrices, {embedding:.3g} for embedding and norms"
    assert line in capsys.readouterr().out
    saved = load_checkpoint(newest(tmp_path))["config"]
    assert saved["learning_rate"] == float(f"{hidden:.3g}")
