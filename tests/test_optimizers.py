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


def test_rates_follow_the_size():
    """Given ones are kept; a fine-tune has a share; the warm-up is a tenth, within bounds."""
    at_rest = dict.fromkeys(("learning_rate", "embedding_learning_rate"), 0.0)
    rates = {}
    for name in OPTIMIZERS:
        tokens = {"batch_size": 8, "gradient_accumulation_steps": 2}  # of 256: 4,096
        settings = config(name, **tokens, **at_rest)
        found = with_peak_rates(settings, 64, 256)
        rates[name] = found.learning_rate
        assert found.learning_rate == HIDDEN[name].reference
        assert found.embedding_learning_rate == EMBEDDING.reference
        wide = with_peak_rates(settings, 128, 256)
        expected = HIDDEN[name].reference * 2 ** HIDDEN[name].width
        assert wide.learning_rate == pytest.approx(expected, rel=5e-3)
        for block_size in (1024, 4096):  # 16,384 tokens, and more: no more than there
            long = with_peak_rates(settings, 64, block_size)
            expected = EMBEDDING.reference * 4**EMBEDDING.tokens
            assert long.embedding_learning_rate == pytest.approx(expected, rel=5e-3)
        tuned = with_peak_rates(dataclasses.replace(settings, finetune=True), 64, 256)
        assert tuned.learning_rate == pytest.approx(FINETUNE_SHARE * found.learning_rate, rel=5e-3)
        given = dataclasses.replace(settings, learning_rate=0.5)
        assert with_peak_rates(given, 64, 256).learning_rate == 0.5
        assert with_peak_rates(given, 64, 256).embedding_learning_rate == EMBEDDING.reference
    assert len(set(rates.values())) == 3
    found = [warmup_steps(0, total) for total in (1, 9, 250, 7600, 100_000)]
    assert found == [1, 1, 25, 760, 2000] and warmup_steps(7, 250) == 7


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
