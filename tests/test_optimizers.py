"""Parameter groups: who updates what at which rate, and that a run with them resumes exactly."""

import copy
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
        expected = SophiaG(hidden, 3e-3, (0.965, 0.99), rho=0.05, bs=24, bias_correction=True)
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


def test_a_checkpoint_of_one_rate_keeps_it(text_data, tmp_path):
    """Also one that does not name the setting; and the other way round."""
    train.train(config_of(text_data, tmp_path, max_steps=4, sample_tokens=0))
    path = newest(tmp_path)
    state = load_checkpoint(path)
    del state["config"]["embedding_learning_rate"]
    torch.save(state, path)
    message = "trained with embedding_learning_rate=0.0 and this run has 0.02: change it back"
    with pytest.raises(UserError, match=re.escape(message)):
        train.train(config_of(text_data, tmp_path, max_steps=5, embedding_learning_rate=0.02))
    train.train(config_of(text_data, tmp_path, max_steps=5, sample_tokens=0))
    assert load_checkpoint(newest(tmp_path))["iter_num"] == 5


def test_muon_needs_another_optimizer_for_the_embedding(text_data, tmp_path):
    with pytest.raises(UserError, match="give the embedding and the norms embedding_learning_rate"):
        train.train(config_of(text_data, tmp_path, optimizer="muon"))
