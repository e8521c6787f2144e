"""Training: the schedule, refusals, exact resume after kills, and that nothing bad gets in."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, difference, newest

import train
from checkpoint import CheckpointWriter, TrainingState, load_checkpoint, load_model
from common.errors import UserError
from common.files import file_sha256, locked
from common.settings import config_from_constants
from formats import pretrained, write_hf
from model import GPT, GPTConfig
from ops.cross_entropy import IGNORE_INDEX
from tokenizer import load_tokenizer
from training import base, setup
from training.checks import check_arguments
from training.learning_rates import learning_rate_at
from training.metrics import draw_losses, read_metrics
from training.optimizers import gradient_scale
from training.packing import Batch
from training.trainer import MAX_BAD_STEPS, Trainer

ROOT = Path(__file__).resolve().parents[1]
SAMPLED = {"eval_interval": 4, "sample_tokens": 4}


def arguments(data_dir: Path, out_dir: Path, /, **changes) -> list[str]:
    settings = TINY | {"data_dir": data_dir, "out_dir": out_dir} | SAMPLED | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def config_of(data_dir: Path, out_dir: Path, /, **changes):
    return config_from_constants(vars(train), arguments(data_dir, out_dir, **changes))


def child(*args: str, **settings) -> subprocess.Popen:
    """`python train.py ...` as a user would run it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=listen if os.name == "posix" else None,
        **settings,
    )


def listen() -> None:
    """Lets a child get Ctrl-C, which the background job of a shell script ignores."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def finished(text_data, tmp_path_factory) -> tuple[Path, dict]:
    """An undisturbed run of two epochs that keeps every checkpoint."""
    out_dir = tmp_path_factory.mktemp("finished")
    result = train.train(config_of(text_data, out_dir, keep_checkpoints=99))
    return out_dir, result


def test_schedule_against_a_table():
    settings = {"peak": 1.0, "warmup": 4, "total": 13, "min_ratio": 0.1}
    found = [learning_rate_at(step, **settings) for step in range(13)]
    half = [0.1 + 0.45 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, *half])
    assert found[4] == 1.0 and found[8] == pytest.approx(0.55) and found[-1] == pytest.approx(0.1)
    found = [learning_rate_at(step, **settings, schedule="linear") for step in range(13)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, *(1 - 0.9 * k / 8 for k in range(9))])
    settings |= {"schedule": "wsd", "decay_share": 0.3}  # of 13 steps: 4
    found = [learning_rate_at(step, **settings) for step in range(13)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1] * 5, 0.775, 0.55, 0.325, 0.1])
    assert found[4:9] == [1.0] * 5
    settings["decay_share"] = 0.0  # at least the last step
    assert learning_rate_at(11, **settings) == 1.0
    assert learning_rate_at(12, **settings) == pytest.approx(0.1)


@pytest.mark.usefixtures("no_pictures")
def test_a_stable_run_branches_into_finished_ones_of_several_lengths(text_data, tmp_path, capsys):
    """Each branch is, bit for bit, the run that had its length from the beginning."""
    stable = {"schedule": "wsd", "decay_share": 0.5, "warmup_iters": 2, "keep_checkpoints": 9}
    train.train(config_of(text_data, tmp_path / "long", **stable, max_steps=20))
    checkpoint = tmp_path / "long" / "ckpt_0000008.pt"
    branch = stable | {"resume_checkpoint": str(checkpoint)}
    with pytest.raises(UserError, match="a run of 14 steps has 0.0026.*max_steps=16"):
        train.train(config_of(text_data, tmp_path / "short", **branch, max_steps=14))
    for name, changes in (("branch", branch), ("whole", stable)):
        train.train(config_of(text_data, tmp_path / name, **changes, max_steps=16))
    rates = [
        row["lr"] for row in read_metrics(tmp_path / "branch" / "metrics.jsonl") if "lr" in row
    ]
    assert rates[0] == pytest.approx(3e-3 * (0.1 + 0.9 * 7 / 8)) and len(rates) == 8
    assert rates[-1] == pytest.approx(3e-4) and sorted(rates)[::-1] == rates
    longer = branch | {"resume_checkpoint": str(tmp_path / "branch" / "ckpt_0000016.pt")}
    train.train(config_of(text_data, tmp_path / "longer", **longer, max_steps=20))
    assert "ckpt_0000016.pt has a rate of 0.0003, this run at its step 0.0" in (
        capsys.readouterr().out
    )
    ends = [load_checkpoint(tmp_path / name / "ckpt_0000016.pt") for name in ("branch", "whole")]
    for key in ("model_state_dict", "optimizer_state_dict", "data_cursor", "rng_state"):
        assert difference(*(end[key] for end in ends)) is None


def test_a_finished_run_has_what_it_promises(finished):
    out_dir, result = finished
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert result["step"] == len(losses) > 10
    assert losses[-1] < losses[0] - 1.0
    assert all(
        {"lr", "win_rate", "grad_norm", "tokens_per_second"} <= row.keys()
        for row in rows
        if "loss" in row
    )
    validation = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in validation][:3] == [4, 8, 12]
    assert result["best_val_loss"] == min(row["val_loss"] for row in validation)
    assert all("val_bpb" in row and "sample" in row for row in validation)
    assert (out_dir / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"

    best = torch.load(out_dir / "best_model.pt", weights_only=True)  # as the README's notebook cell
    model = GPT(GPTConfig(**best["model_args"]))
    model.load_state_dict(best["model_state_dict"])
    assert best["best_val_loss"] == result["best_val_loss"]
    assert not list(out_dir.glob("*.tmp"))
    again = load_model(out_dir / "best_model.pt")
    assert not again.training and torch.equal(again.norm.weight, model.norm.weight)


PINNED_LOSSES = [
    10.39198,
    10.29341,
    9.88608,
    9.23116,
    8.41426,
    7.47983,
    6.78755,
    6.22105,
    5.96023,
    5.80495,
]


def test_ten_pinned_losses(text_data, tmp_path):
    """A refactoring leaves these as they are; rounding differs in the sixth digit between CPUs."""
    train.train(config_of(text_data, tmp_path, dropout=0.0, max_steps=10, sample_tokens=0))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert losses == pytest.approx(PINNED_LOSSES, abs=2e-4)


def test_the_picture_has_a_curve_for_each_loss():
    from matplotlib.figure import Figure

    losses = ["loss", "val_loss", "val/web_loss", "val/code_loss", "averaged_val_loss"]
    losses += ["watch_val_loss", "pretrain_val_loss"]
    rows = [{"step": step} | dict.fromkeys(losses, 5.0 - step) for step in range(3)]
    axes = Figure().subplots()
    draw_losses(axes, [*rows, {"step": 3, "loss": None, "lr": 1.0}], "a run")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:4] == ["training", "validation", "code", "web"] and len(labels) == 7
    assert all(list(line.get_xdata()) == [0, 1, 2] for line in axes.get_lines())


@pytest.mark.usefixtures("no_pictures")
def test_the_mean_of_the_last_weights_is_evaluated_saved_and_resumed(
    text_data, tmp_path, capsys, monkeypatch
):
    settings = {"average_last": 0.25, "max_steps": 24, "eval_interval": 1, "keep_checkpoints": 99}
    averaged, evaluate, inside = Trainer.averaged, Trainer.evaluate, []

    @contextmanager
    def noted(trainer):
        with averaged(trainer):
            inside.append(True)
            yield
            inside.clear()

    def better_inside(trainer, *arguments):
        loss, bits_per_byte = evaluate(trainer, *arguments)
        return loss - 0.5 * len(inside), bits_per_byte

    monkeypatch.setattr(Trainer, "averaged", noted)
    monkeypatch.setattr(Trainer, "evaluate", better_inside)
    train.train(config_of(text_data, tmp_path / "whole", **settings))
    printed = capsys.readouterr().out
    steps = [load_checkpoint(tmp_path / "whole" / f"ckpt_{n:07d}.pt") for n in range(1, 25)]
    assert [step["average"] and step["average"]["n"] for step in steps] == [
        *[None] * 18,
        *range(1, 7),
    ]
    for name, mean in steps[-1]["average"]["weights"].items():
        of_steps = torch.stack([step["model_state_dict"][name] for step in steps[18:]])
        torch.testing.assert_close(mean, of_steps.double().mean(0).float(), atol=1e-6, rtol=1e-5)
    rows = [r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "val_loss" in r]
    assert all(("averaged_val_loss" in row) == (row["step"] > 18) for row in rows)
    last = rows[-1]
    assert last["averaged_val_loss"] < last["val_loss"] - 0.01
    best = load_checkpoint(tmp_path / "whole" / "best_model.pt")
    assert "(best so far, the averaged weights)" in printed
    step, loss = min(((r["step"], r["averaged_val_loss"]) for r in rows[18:]), key=lambda p: p[1])
    assert best["best_val_loss"] == loss and best["iter_num"] == step
    mean = steps[step - 1]["average"]["weights"]
    assert all(torch.equal(best["model_state_dict"][name], mean[name]) for name in mean)
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt_0000020.pt", tmp_path / "again")
    train.train(config_of(text_data, tmp_path / "again", **settings))
    assert difference(steps[-1], load_checkpoint(tmp_path / "again" / "ckpt_0000024.pt")) is None
    again = load_checkpoint(tmp_path / "again" / "best_model.pt")
    assert difference(best, again) is None
    for name, changes, n in (
        ("less", {"average_last": 0.125}, 3),
        ("none", {"average_last": 0}, 0),
    ):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "whole" / "ckpt_0000022.pt", tmp_path / name)
        train.train(config_of(text_data, tmp_path / name, **settings | changes))
        average = load_checkpoint(tmp_path / name / "ckpt_0000024.pt")["average"]
        assert (average["n"] if average else 0) == n - bool(n)
    damaged = steps[19] | {"average": {"n": 2, "weights": {"norm.weight": torch.zeros(3)}}}
    (tmp_path / "damaged").mkdir()
    torch.save(damaged, tmp_path / "damaged" / "ckpt_0000020.pt")
    with pytest.raises(UserError, match="its average does not fit this run"):
        train.train(config_of(text_data, tmp_path / "damaged", **settings))


@pytest.mark.usefixtures("no_pictures")
def test_pretraining_goes_on_with_other_data_from_a_checkpoint_or_a_folder(
    finished, text_data, mixed_data, tmp_path, capsys
):
    base = finished[0] / "best_model.pt"
    write_hf.export_hf(load_model(base), load_tokenizer(), tmp_path / "hf", "float32", {})
    other_shape = {"n_layers": 5, "n_embd": 32, "block_size": 64}  # that of the weights is taken
    settings = other_shape | {"watch_data_dir": text_data, "keep_checkpoints": 9, "num_epochs": 2}
    settings |= {"learning_rate": 1e-3, "dropout": 0.0}
    for name, path in {"a": base, "b": tmp_path / "hf"}.items():
        train.train(config_of(mixed_data, tmp_path / name, init_from=path, **settings))
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert [r["loss"] for r in first if "loss" in r] == [r["loss"] for r in second if "loss" in r]
    watched = [row["watch_val_loss"] for row in first if "val_loss" in row]
    new = [row["val_loss"] for row in first if "val_loss" in row]
    before = read_metrics(finished[0] / "metrics.jsonl")
    best = min(row["val_loss"] for row in before if "val_loss" in row)
    assert (first[0]["step"], watched[0]) == (0, pytest.approx(best))  # before the first step
    assert best < watched[1] < best + 1 and watched[-1] > watched[1] and new[-1] < new[1] < new[0]
    cut = newest(tmp_path / "a")
    assert (
        load_checkpoint(cut)["base"]
        == file_sha256(base)
        != load_checkpoint(newest(tmp_path / "b"))["base"]
    )
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "a" / "ckpt_0000004.pt", tmp_path / "resumed")
    train.train(config_of(mixed_data, tmp_path / "resumed", init_from=base, **settings))
    assert all(row["step"] > 4 for row in read_metrics(tmp_path / "resumed" / "metrics.jsonl"))
    ends = [
        load_checkpoint(path) | {"config": None} for path in (cut, newest(tmp_path / "resumed"))
    ]
    assert difference(*ends) is None
    assert "the model that it began from" not in capsys.readouterr().out
    worse = {"init_from": base, "num_epochs": 1, "learning_rate": 0.9, "warmup_iters": 1}
    train.train(config_of(text_data, tmp_path / "worse", **settings | worse))
    assert f"; the model that it began from has {best:.4f}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="was trained with base="):
        train.train(config_of(mixed_data, tmp_path / "a", init_from=cut, **settings))
    vocabulary = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] = {"a": 0}
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="is not a byte-level BPE"):
        train.train(config_of(mixed_data, tmp_path / "c", init_from=tmp_path / "hf"))
    with pytest.raises(UserError, match="began with random weights, not with init_from"):
        train.train(config_of(text_data, finished[0], init_from=base, num_epochs=3))
    with pytest.raises(UserError, match="--n_layers has no effect with --init_from"):
        check_arguments(["--init_from=x", "--n_layers=2"], finetune=False)
    with pytest.raises(UserError, match="--init_from has no effect with --finetune"):
        check_arguments(["--init_from=x", "--finetune"], finetune=True)


@pytest.mark.usefixtures("no_pictures")
def test_a_fine_tune_mixes_conversations(finished, text_data, chat_data, tmp_path):
    settings = {"finetune": True, "model": finished[0] / "best_model.pt", "finetune_num_epochs": 1}
    settings |= {"finetune_gradient_accumulation_steps": 2, "finetune_warmup_iters": 1}
    other = shutil.copytree(chat_data, tmp_path / "other")
    steps = {}
    for name, mixture in {"one": chat_data, "mixed": f"{chat_data}:0.5, {other}:2"}.items():
        where = {"finetune_data_dir": mixture, "finetune_out_dir": tmp_path / name}
        steps[name] = train.train(config_of(text_data, tmp_path, **settings, **where))["step"]
    assert 2.3 < steps["mixed"] / steps["one"] < 2.7
    rows = read_metrics(tmp_path / "mixed" / "metrics.jsonl")
    assert {"val/shards_loss", "val/other_loss", "pretrain_val_loss"} <= rows[-1].keys()


def test_a_run_starts_from_a_model_on_the_hub(finished, mixed_data, tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    write_hf.export_hf(
        load_model(finished[0] / "best_model.pt"), load_tokenizer(), folder, "float32", {}
    )
    asked = []

    def download(repo_id, also=()):
        asked.append((repo_id, "tokenizer*" in also))
        return folder

    monkeypatch.setattr(pretrained, "download", download)
    settings = {"keep_checkpoints": 9, "max_steps": 6}
    train.train(config_of(mixed_data, tmp_path / "run", init_from="me/base", **settings))
    assert asked == [("me/base", True)]
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    (tmp_path / "cut" / "ckpt_0000006.pt").unlink()
    train.train(config_of(mixed_data, tmp_path / "cut", init_from="me/base", **settings))
    assert len(asked) == 1
    ends = (load_checkpoint(newest(tmp_path / name)) for name in ("run", "cut"))
    assert difference(*(end | {"config": None, "base": None} for end in ends)) is None
    with pytest.raises(UserError, match="began with init_from='me/base', not 'me/other'"):
        train.train(config_of(mixed_data, tmp_path / "cut", init_from="me/other", max_steps=9))


@pytest.mark.usefixtures("no_pictures")
def test_a_mixture_resumes_bit_for_bit_and_shows_the_loss_of_each_set(
    text_data, mixed_data, tmp_path, capsys
):
    settings = {"keep_checkpoints": 99, "num_epochs": 2, "eval_interval": 9}
    mixture = f"{text_data}:0.5, {mixed_data}:2"
    result = train.train(config_of(mixture, tmp_path / "whole", **settings))
    rows = setup.open_rows(mixture, "train", load_tokenizer(), 32, 1337, chat=False, n_epochs=2)
    of_set = {str(data_set): tokens for data_set, tokens in rows.shares.items()}
    part, every = of_set[f"{mixed_data}:2"], sum(of_set.values())
    n_rows = part / every * rows.first_rows[2] / 2  # the mean of two epochs
    line = f"  {mixed_data}:2: {part:,.0f} tokens of an epoch, {part / every:.1%}, about "
    line += f"{n_rows:,.0f} rows"
    assert line in (printed := capsys.readouterr().out), printed
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    names = {key for key in rows[-1] if key.endswith("_loss")}
    assert names == {"val_loss", f"val/{text_data.name}_loss", f"val/{mixed_data.name}_loss"}
    for cut in (9, result["step"] // 9 * 9):
        (tmp_path / str(cut)).mkdir()
        shutil.copy(tmp_path / "whole" / f"ckpt_{cut:07d}.pt", tmp_path / str(cut))
        train.train(config_of(f"{mixture}, nothing:0", tmp_path / str(cut), **settings))
        ends = [load_checkpoint(newest(tmp_path / name)) for name in ("whole", str(cut))]
        ends = [end | {"config": None} for end in ends]
        assert difference(*ends) is None
    with pytest.raises(UserError, match="with data='.*:0.5, .* has '.*:0.75, "):
        train.train(config_of(mixture.replace("0.5", "0.75"), tmp_path / "9", **settings))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("cut", [12, 16])  # before and after the border of the first epoch
def test_resume_continues_bit_for_bit(finished, text_data, tmp_path, cut):
    whole, result = finished
    rows = setup.open_rows(str(text_data), "train", load_tokenizer(), 32, 1337, chat=False)
    border = math.ceil(rows.rows_per_epoch / 8)
    assert 12 < border < 16 < result["step"]
    shutil.copy(whole / f"ckpt_{cut:07d}.pt", tmp_path)
    shutil.copy(whole / "metrics.jsonl", tmp_path)  # with lines beyond the cut, as after a kill
    config = config_of(text_data, tmp_path, keep_checkpoints=99)
    resumed = train.train(config)
    assert difference(load_checkpoint(newest(whole)), load_checkpoint(newest(tmp_path))) is None

    def without_timing(directory: Path) -> list[dict]:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) | {"tokens_per_second": 0} for line in lines]

    assert without_timing(whole) == without_timing(tmp_path)
    assert resumed["best_val_loss"] == result["best_val_loss"]
    leftovers = [tmp_path / name for name in ("ckpt_0000001.pt.tmp", "loss_curve.png.tmp")]
    for path in leftovers:
        path.touch()
    assert train.train(config)["step"] == result["step"]  # finished: nothing to do, and no error
    assert not any(path.exists() for path in leftovers)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit_so_that_a_shell_chain_stops(signum, code, text_data, tmp_path):
    process = child(*arguments(text_data, tmp_path, num_epochs=500, eval_interval=10_000))
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    (saved,) = tmp_path.glob("ckpt_*.pt")
    step = load_checkpoint(saved)["iter_num"]
    assert step >= 3 and "Traceback" not in output
    assert f"interrupted at step {step}" in output and "run the same command again" in output


def test_damaged_checkpoint_is_skipped(finished, text_data, tmp_path, capsys):
    whole, _ = finished
    for step in (4, 8, 12):
        shutil.copy(whole / f"ckpt_{step:07d}.pt", tmp_path)
    newest = tmp_path / "ckpt_0000012.pt"
    newest.write_bytes(newest.read_bytes()[:-5000])
    middle = bytearray((tmp_path / "ckpt_0000008.pt").read_bytes())
    middle[len(middle) // 2] ^= 1  # one flipped bit
    (tmp_path / "ckpt_0000008.pt").write_bytes(middle)
    train.train(config_of(text_data, tmp_path))
    captured = capsys.readouterr()
    assert captured.err.count("skipped a checkpoint") == 2
    assert "ckpt_0000004.pt at step 4" in captured.out


def test_the_checkpoint_just_written_stays_beside_damaged_newer_ones(tmp_path):
    for step in (500, 600):
        (tmp_path / f"ckpt_{step:07d}.pt").write_bytes(b"half")
    (tmp_path / "ckpt_mine.pt").write_bytes(b"not ours to remove")
    writer = CheckpointWriter(tmp_path, keep=1)
    for step in (440, 450):
        writer.save(TrainingState.of({"config": {}, "iter_num": step}, ""), best=False)
    writer.wait()
    left = sorted(path.name for path in tmp_path.iterdir())
    names = ["ckpt_0000450.pt", "ckpt_0000500.pt", "ckpt_0000600.pt", "ckpt_mine.pt"]
    assert left == names


def test_the_tied_weight_is_saved_once(finished):
    path = finished[0] / "best_model.pt"
    n_parameters = load_model(path).n_parameters()
    n_bytes = path.stat().st_size - len(load_tokenizer().json_text.encode())
    assert n_bytes < 12 * n_parameters * 1.05


def test_a_run_never_overwrites_another(finished, text_data, tmp_path):
    whole, _ = finished
    with pytest.raises(UserError, match="resume_checkpoint=auto"):
        train.train(config_of(text_data, whole, resume_checkpoint=""))
    (tmp_path / "best_model.pt").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="holds the results of an earlier run"):
        train.train(config_of(text_data, tmp_path))
    older = whole / "ckpt_0000004.pt"
    with pytest.raises(UserError, match="is newer than"):
        train.train(config_of(text_data, whole, resume_checkpoint=older))


def test_only_one_run_at_a_time_writes_to_a_folder(text_data, tmp_path):
    with locked(tmp_path, "train.py"), pytest.raises(UserError, match="another"):
        train.train(config_of(text_data, tmp_path))


def test_an_older_checkpoint_continues_in_another_folder(finished, text_data, tmp_path):
    whole, result = finished
    settings = {"resume_checkpoint": whole / "ckpt_0000012.pt", "keep_checkpoints": 99}
    train.train(config_of(text_data, tmp_path, **settings))
    assert difference(*(load_checkpoint(newest(folder)) for folder in (whole, tmp_path))) is None
    assert load_checkpoint(tmp_path / "best_model.pt")["best_val_loss"] == result["best_val_loss"]
    with pytest.raises(UserError, match="is newer than"):  # nor is a best_model.pt overwritten
        only_best = tmp_path / "only_best"
        only_best.mkdir()
        shutil.copy(whole / "best_model.pt", only_best)
        train.train(config_of(text_data, only_best, **settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3}, "n_layers=2"),
        ({"seed": 1}, "seed=1337"),
        ({"optimizer": "adamw"}, "optimizer=sophiag"),
        ({"block_size": 64}, "block_size=32"),
    ],
)
def test_resume_refuses_another_run(changes, message, finished, text_data):
    with pytest.raises(UserError, match=message):
        train.train(config_of(text_data, finished[0], **changes))


@pytest.mark.usefixtures("no_pictures")
def test_resume_names_harmless_changes(finished, text_data, tmp_path, capsys):
    state = load_checkpoint(finished[0] / "ckpt_0000004.pt")
    state["data"], n = re.subn(r"-[0-9a-f]{16}\)$", ")", state["data"])  # as in old checkpoints
    assert n == 1
    torch.save(state, tmp_path / "ckpt_0000004.pt")
    train.train(config_of(text_data, tmp_path, learning_rate=1e-3))
    assert "learning_rate 0.003 -> 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"block_size": 1}, "block_size=1 must be at least 2"),
        ({"seed": -1}, "seed=-1"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps=-1.0 must be above 0"),
        ({"sample_prompt": "\udcff"}, "sample_prompt is not valid Unicode text"),
        ({"sample_prompt": ""}, "sample_prompt has 0 tokens"),
        ({"sample_prompt": "word " * 40}, "sample_prompt has 41 tokens, the context 32"),
        ({"learning_rate": "nan"}, "expected a number"),
        ({"finetune": True, "finetune_learning_rate": -1.0}, "finetune_learning_rate=-1.0 must"),
        ({"resume_checkpoint": "."}, "is a folder"),
        ({"warmup_iters": 5000}, "warmup_iters=5000 takes up all"),
        ({"batch_size": 3 * 10**8, "warmup_iters": 0}, "=2 are more rows than the run's"),
        ({"optimizer": "lion"}, "one of sophiag, adamw"),
        ({"dtype": "bfloat16"}, "needs a CUDA GPU"),
        ({"device": "cuda"}, "PyTorch sees no GPU"),
        ({"n_heads": 3}, "n_embd=16 must be n_heads=3 times"),
        ({"n_kv_heads": 3}, "multiple of n_kv_heads=3"),
        ({"dropout": 1.0}, "dropout=1.0 must be"),
        ({"data_dir": "nowhere"}, "no dataset directory nowhere: run python prepare_dataset.py"),
        ({"data_dir": train.data_dir}, "fineweb_edu_sample_10BT: run python .*_fineweb.py$"),
        ({"data_dir": "train.py"}, "train.py is a file, not a dataset directory"),
        ({"finetune": True, "finetune_out_dir": "same", "out_dir": "same"}, "the same folder"),
        ({"finetune": True, "model": "none.pt"}, "none.pt is not there"),
        ({"resume_checkpoint": "none.pt"}, "none.pt is not there"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"learning_rate": 1e300}, "learning_rate=1e.300 must be at most 1$"),
        ({"weight_decay": 1e300}, "weight_decay=1e.300 times learning_rate=0.003 is above 1"),
        (
            {"embedding_learning_rate": 1, "weight_decay": 2},
            "embedding_learning_rate=1.* is above 1",
        ),
        ({"rho": 1e300}, "rho=1e.300 must be at most"),
        ({"seed": 10**26}, "seed=1(0){26} must be at most"),
        ({"n_embd": 2**31}, "n_embd must be at least 1 and at most 1048576"),
        ({"block_size": 2**63}, "block_size=9223372036854775808 must be at most"),
        ({"n_layers": 10**6}, "n_layers=1000000 must be at most 10000"),
        ({"out_dir": ""}, "out_dir is empty"),
        ({"batch_size": 3 * 10**8, "warmup_iters": 5}, "=2 are more rows than the run's"),
        ({"eval_interval": -1}, "eval_interval=-1"),
    ],
)
def test_mistakes_are_refused_before_the_first_step(changes, message, text_data, tmp_path):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message) as refusal:
        train.train(config_of(text_data, tmp_path / "out", **changes))
    assert "\n" not in str(refusal.value) and not list(tmp_path.glob("out/*"))


def test_one_line_and_exit_code_2_for_a_mistake(text_data, tmp_path):
    process = child(*arguments(text_data, tmp_path), "--learning_rte=1")
    output, _ = process.communicate()
    assert process.returncode == 2
    assert output == "error: unknown setting --learning_rte: did you mean --learning_rate?\n"


def test_too_little_disk_is_refused(text_data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="lower keep_checkpoints"):
        train.train(config_of(text_data, tmp_path))


def test_another_tokenizer_is_refused(finished, text_data, tmp_path):
    state = load_checkpoint(finished[0] / "ckpt_0000004.pt")
    torch.save(state | {"tokenizer_sha256": "0" * 64}, tmp_path / "ckpt_0000004.pt")
    with pytest.raises(UserError, match="another tokenizer"):
        train.train(config_of(text_data, tmp_path))
    data = tmp_path / "data"
    shutil.copytree(text_data, data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another tokenizer"):
        train.train(config_of(data, tmp_path / "out"))


def test_an_output_folder_that_cannot_be_is_refused(text_data, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot make the folder"):
        train.train(config_of(text_data, tmp_path / "file"))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_out_of_memory_says_what_to_lower(gpu, compile, text_data, tmp_path, monkeypatch):
    def too_much(*args, **kwargs):
        if gpu:
            raise torch.OutOfMemoryError("CUDA out of memory")
        torch.empty(2**55)

    monkeypatch.setattr(Trainer, "loss_sum", too_much)
    with pytest.raises(UserError, match=r"lower batch_size \(now 4\) and raise"):
        train.train(config_of(text_data, tmp_path, compile=compile))


def test_training_goes_on_without_matplotlib(text_data, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    train.train(config_of(text_data, tmp_path, max_steps=8, sample_tokens=0))
    assert capsys.readouterr().err.count("no loss_curve.png: pip install matplotlib") == 1
    assert (tmp_path / "best_model.pt").exists() and not (tmp_path / "loss_curve.png").exists()


def test_full_disk_keeps_the_earlier_checkpoint(text_data, tmp_path, monkeypatch, capfd):
    real, calls = torch.save, []

    def save(state, file):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match="run again to continue"):
        train.train(config_of(text_data, tmp_path))
    assert "could not save" in capfd.readouterr().out
    (left,) = tmp_path.glob("ckpt_*.pt")
    assert load_checkpoint(left)["iter_num"] == 4 and not list(tmp_path.glob("*.tmp"))


def test_training_goes_on_without_a_compiler(text_data, tmp_path):
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = arguments(text_data, tmp_path / "out", compile=True, max_steps=4, eval_interval=4)
    process = child(*command, env=environment)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "torch.compile does not work here" in output and "Traceback" not in output


def test_training_goes_on_where_compile_refuses(text_data, tmp_path, monkeypatch, capsys):
    """On a Python that PyTorch is too old for it fails when it is called, not when it is used."""

    def refuse(model):
        raise RuntimeError("torch.compile is not supported on Python 4")

    monkeypatch.setattr(torch, "compile", refuse)
    train.train(config_of(text_data, tmp_path, compile=True, max_steps=4))
    assert "does not work here, training without it (slower): torch." in capsys.readouterr().out


def test_compiled_training_equals_eager(text_data, tmp_path):
    losses = []
    for compile in (False, True):
        out_dir = tmp_path / str(compile)
        changes = {"compile": compile, "max_steps": 5, "dropout": 0.0, "sample_tokens": 0}
        train.train(config_of(text_data, out_dir, **changes))
        lines = (out_dir / "metrics.jsonl").read_text().splitlines()
        losses.append([row.get("loss", row.get("val_loss")) for row in map(json.loads, lines)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_goes_on_with_more_epochs_from_the_right_row(text_data, tmp_path):
    train.train(config_of(text_data, tmp_path, num_epochs=1))
    rows_per_epoch = load_checkpoint(newest(tmp_path))["data_cursor"]
    rows = setup.open_rows(str(text_data), "train", load_tokenizer(), 32, 1337, chat=False)
    assert rows_per_epoch == rows.rows_per_epoch and rows_per_epoch % 8
    result = train.train(config_of(text_data, tmp_path, num_epochs=2))
    assert result["step"] == 2 * math.ceil(rows_per_epoch / 8)


def test_changed_optimizer_settings_count_after_a_resume(tiny_run):
    run, batches = tiny_run()
    run.step(batches, lr=1e-3)
    state = TrainingState.of({"config": {}} | run.state_dict(), "")
    other, _ = tiny_run(rho=0.5, weight_decay=0.7, batch_size=8)
    other.restore(state)
    matrices = other.optimizer.param_groups[0]
    assert (matrices["rho"], matrices["weight_decay"], matrices["bs"]) == (0.5, 0.7, 8 * 32)
    for ours, theirs in zip(run.model.parameters(), other.model.parameters(), strict=True):
        saved, loaded = run.optimizer.state[ours], other.optimizer.state[theirs]
        assert torch.equal(ours, theirs) and torch.equal(saved["exp_avg"], loaded["exp_avg"])


MOMENTS = {"exp_avg", "exp_avg_sq", "hessian"}


@pytest.mark.usefixtures("no_pictures")
def test_bfloat16_moments_take_half_the_memory_and_resume_bit_for_bit(text_data, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = {"optimizer_state_dtype": "bfloat16", "max_steps": 12, "keep_checkpoints": 99}
    train.train(config_of(text_data, whole, **settings))
    resumed.mkdir()
    shutil.copy(whole / "ckpt_0000004.pt", resumed)
    train.train(config_of(text_data, resumed, **settings))
    states = [load_checkpoint(newest(directory)) for directory in (whole, resumed)]
    assert difference(*states) is None
    moments = states[0]["optimizer_state_dict"]["state"].values()
    dtypes = {(name, values[name].dtype) for values in moments for name in values.keys() & MOMENTS}
    half = {(name, torch.bfloat16) for name in ("exp_avg", "hessian")}
    assert dtypes == half | {(name, torch.float32) for name in ("exp_avg", "exp_avg_sq")}  # AdamW
    with pytest.raises(UserError, match="needs optimizer='sophiag'"):
        train.train(config_of(text_data, tmp_path / "adamw", optimizer="adamw", **settings))


def test_samples_work_in_sixteen_bits(tiny_run):
    run, _ = tiny_run()
    run.dtype = torch.bfloat16  # as on a GPU: autocast over float32 weights
    assert run.sample_text(load_tokenizer()).startswith(run.config.sample_prompt)


@pytest.fixture
def tiny_run(text_data, tmp_path):
    def make(**changes) -> tuple[Trainer, list[Batch]]:
        changes = {"dropout": 0.0} | changes
        config = setup.settings_in_force(config_of(text_data, tmp_path, **changes))
        torch.manual_seed(0)
        shape = {f.name: getattr(config, f.name, f.default) for f in dataclasses.fields(GPTConfig)}
        model = GPT(GPTConfig(**shape))
        run = Trainer(model, config, torch.device("cpu"), torch.float32)
        rows = setup.open_rows(str(text_data), "train", load_tokenizer(), 32, 0, chat=False)
        return run, [rows.batch([i, i + 1]) for i in range(0, 8, 2)]

    return make


def tensors_of_state(run: Trainer) -> list[torch.Tensor]:
    values = [v for state in run.optimizer.state.values() for v in state.values()]
    return [value.clone() for value in values if isinstance(value, torch.Tensor)]


def weights_of(run: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.model.parameters()]


def test_accumulation_is_normalised_by_the_labels_of_the_whole_step(tiny_run):
    results = []
    for merged in (False, True):
        run, batches = tiny_run(optimizer="adamw")
        batches[0].targets[0, 3:] = IGNORE_INDEX  # unequal numbers of labels per micro-batch
        for batch in batches:
            batch.n_labels = int((batch.targets != IGNORE_INDEX).sum())
        assert len({batch.n_labels for batch in batches}) > 1
        if merged:
            fields = zip(*(batch.tensors()[:3] for batch in batches), strict=True)
            tensors = [torch.cat(tensors) for tensors in fields]
            n_labels = sum(batch.n_labels for batch in batches)
            size = batches[0].ids.numel()
            cu_seqlens = torch.cat([b.cu_seqlens + i * size for i, b in enumerate(batches)])
            batches = [Batch(*tensors, cu_seqlens=cu_seqlens, n_labels=n_labels)]
        loss, norm = run.step(batches, lr=1e-2)
        results.append([loss, norm, *weights_of(run)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sophiag", "adamw"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_never_reaches_the_weights(tiny_run, optimizer, poison):
    run, batches = tiny_run(optimizer=optimizer)
    if optimizer == "sophiag":
        run.update_hessian(batches[0])
    run.step(batches, lr=1e-3)
    before = weights_of(run)
    moments = tensors_of_state(run)
    real = run.loss_sum
    run.loss_sum = lambda *args, **kwargs: real(*args, **kwargs) * poison
    loss, _ = run.step(batches, lr=1e-3)
    if optimizer == "sophiag":
        run.update_hessian(batches[0])
    assert not math.isfinite(loss) and int(run.bad_steps) == 1
    assert all(map(torch.equal, before, weights_of(run)))
    assert all(map(torch.equal, moments, tensors_of_state(run)))
    for _ in range(MAX_BAD_STEPS - 1):
        run.check_finite()
        run.step(batches, lr=1e-3)
    with pytest.raises(UserError, match="lower learning_rate"):
        run.check_finite()
    run.loss_sum = real
    run.step(batches, lr=1e-3)
    assert int(run.bad_steps) == 0 and not all(map(torch.equal, before, weights_of(run)))


def test_gradient_clipping_bounds_the_norm(tiny_run):
    run, batches = tiny_run(optimizer="adamw", grad_clip=1e-3)
    total = sum(run.loss_sum(batch) for batch in batches)
    total.backward()
    norm, scale = gradient_scale(list(run.model.parameters()), total, 1e-3)
    by_hand = math.sqrt(sum(float(p.grad.square().sum()) for p in run.model.parameters()))
    assert norm.item() == pytest.approx(by_hand, rel=1e-3)  # float32 sums in another order
    assert (norm * scale).item() == pytest.approx(1e-3, rel=1e-2) and scale < 1
    assert gradient_scale(list(run.model.parameters()), total, 1e9)[1] == 1.0


def test_hessian_estimate_counts_its_own_labels(tiny_run):
    """The optimizer's bs is constant; a batch with fewer labels must still give n · ĝ²."""
    run, batches = tiny_run()
    batch, sophiag = batches[0], run.optimizer.hidden
    hidden = [p for group in sophiag.param_groups for p in group["params"]]
    batch.targets[0] = IGNORE_INDEX
    batch.n_labels = int((batch.targets != IGNORE_INDEX).sum())
    torch.manual_seed(5)
    loss = run.loss_sum(batch, sample_targets=True) / batch.n_labels
    gradients = torch.autograd.grad(loss, hidden)
    torch.manual_seed(5)
    run.update_hessian(batch)
    bs = sophiag.defaults["bs"]
    assert bs == TINY["batch_size"] * TINY["block_size"] > batch.n_labels and len(hidden) == 10
    for parameter, gradient in zip(hidden, gradients, strict=True):
        expected = (1 - TINY_BETA2) * batch.n_labels * gradient.square()
        found = bs * sophiag.state[parameter]["hessian"]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)


TINY_BETA2 = train.beta2


def test_evaluation_is_the_same_every_time_and_bits_per_byte_is_by_the_formula(tiny_run, text_data):
    run, _ = tiny_run(dropout=0.3)  # which must be off
    tokenizer = load_tokenizer()
    rows = setup.open_rows(str(text_data), "val", tokenizer, 32, 0, chat=False)
    token_bytes = torch.from_numpy(tokenizer.token_bytes)
    first, second = (run.evaluate(rows, token_bytes) for _ in range(2))
    assert first == second
    nats = n_labels = n_bytes = 0
    run.model.eval()
    for row in range(min(TINY["eval_rows"], rows.rows_per_epoch)):
        batch = rows.batch([row])
        nats += run.loss_sum(batch).item()
        labels = batch.targets[batch.targets != IGNORE_INDEX].tolist()
        n_labels += len(labels)
        n_bytes += sum(len(tokenizer.decode([i]).encode()) for i in labels if i < 32763)
    assert first[0] == pytest.approx(nats / n_labels, rel=1e-6)
    assert first[1] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_fine_tune_end_to_end(finished, text_data, chat_data, tmp_path, capsys):
    base, _ = finished
    changes = {
        "finetune": True,
        "model": base / "best_model.pt",
        "finetune_data_dir": chat_data,
        "finetune_out_dir": tmp_path / "ft",
        "finetune_num_epochs": 3,
        "finetune_warmup_iters": 2,
        "finetune_learning_rate": 1e-3,
        "n_layers": 7,  # the checkpoint's shape counts, not this
    }
    result = train.train(config_of(text_data, base, **changes))
    rows = [json.loads(line) for line in (tmp_path / "ft/metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert max(rates) == pytest.approx(1e-3, rel=0.05) and rates[-1] == pytest.approx(1e-4)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert {"val_loss", "pretrain_val_loss", "pretrain_val_bpb"} <= result.keys()
    assert load_model(tmp_path / "ft/best_model.pt").config.n_layers == 2
    assert train.train(config_of(text_data, base, **changes))["step"] == result["step"]
    other = changes | {"model": base / "ckpt_0000004.pt"}
    with pytest.raises(UserError, match="was trained with base=.*--model=none"):
        train.train(config_of(text_data, base, **other))
    again = train.train(config_of(text_data, base, **changes | {"model": "none"}))
    assert again["step"] == result["step"]
    with pytest.raises(UserError, match="finetune=True"):  # a fine-tune is not continued as another
        shutil.copy(max((tmp_path / "ft").glob("ckpt_*.pt")), tmp_path)
        train.train(config_of(text_data, tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--finetune", "--learning_rate", "1e-3"], "set --finetune_learning_rate in its place"),
        (["--finetune", "--out_dir=x", "--data_dir=x"], "--out_dir has no effect with"),
        (["--finetune_data_dir=x", "--batch_size=4"], "--finetune_data_dir has no effect without"),
        (["--model=x.pt"], "add --finetune"),
    ],
)
def test_settings_without_effect_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(train, "train", lambda config: pytest.fail("accepted"))
    with pytest.raises(UserError, match=message):
        train.main(arguments)


def test_a_command_line_that_both_kinds_of_run_share_is_accepted(monkeypatch):
    runs = []
    monkeypatch.setattr(train, "train", runs.append)
    shared = ["--learning_rate=1e-3", "--finetune_learning_rate=1e-4"]
    assert train.main(shared) == train.main([*shared, "--finetune", "--data_dir=x"]) == 0
    assert len(runs) == 2


def fine_tune_of(vocab_size: int, text_data: Path, chat_data: Path, directory: Path):
    """The settings of a fine-tune that starts from a new model, `directory`/base.pt."""
    shape = {"n_embd": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "block_size": 32}
    model = GPT(GPTConfig(**shape, vocab_size=vocab_size))
    weights = {"model_args": model.config.to_dict(), "model_state_dict": model.state_dict()}
    torch.save(weights, directory / "base.pt")
    changes = {"finetune_data_dir": chat_data, "finetune_out_dir": directory / "ft"}
    changes |= {"finetune": True, "model": directory / "base.pt"}
    return config_of(text_data, directory, **changes)


def test_a_base_that_is_replaced_while_it_is_read(text_data, chat_data, tmp_path, monkeypatch):
    config, real = fine_tune_of(32768, text_data, chat_data, tmp_path), base.load_checkpoint

    def load(path):
        checkpoint = real(path)
        torch.save(checkpoint | {"iter_num": 7}, path)
        return checkpoint

    monkeypatch.setattr(base, "load_checkpoint", load)
    with pytest.raises(UserError, match="base.pt was replaced while it was read: run again"):
        train.train(config)


def test_fine_tune_refuses_a_base_of_another_vocabulary(text_data, chat_data, tmp_path):
    with pytest.raises(UserError, match="vocab_size=100"):
        train.train(fine_tune_of(100, text_data, chat_data, tmp_path))


def test_fine_tune_refuses_data_without_conversations(finished, text_data, tmp_path):
    changes = {
        "finetune": True,
        "model": finished[0] / "best_model.pt",
        "finetune_data_dir": text_data,
        "finetune_out_dir": tmp_path,
    }
    with pytest.raises(UserError, match="no conversation"):
        train.train(config_of(text_data, finished[0], **changes))


def test_weights_of_the_original_cannot_be_resumed_but_say_how_to_use_them(text_data, tmp_path):
    model = GPT(GPTConfig(n_embd=16, n_layers=2, n_heads=2, n_kv_heads=1, block_size=32))
    args = {k: v for k, v in model.config.to_dict().items() if k != "rope_style"}
    state = {"_orig_mod." + key: value for key, value in model.state_dict().items()}
    state["_orig_mod.rotary_emb.inv_freq"] = torch.ones(4)
    old = {"model_state_dict": state, "model_args": args, "iter_num": 1, "best_val_loss": 3.0}
    torch.save(old, tmp_path / "old.pt")
    with pytest.raises(UserError, match=r"--model=.*old\.pt and another finetune_out_dir"):
        train.train(config_of(text_data, tmp_path / "out", resume_checkpoint=tmp_path / "old.pt"))
    loaded = load_model(tmp_path / "old.pt")
    assert loaded.config.rope_style == "lille"
    np.testing.assert_array_equal(
        loaded.tok_embeddings.weight.detach(), model.tok_embeddings.weight.detach()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["sophiag", "adamw"])
@pytest.mark.filterwarnings("error:SophiaG runs")
def test_training_on_a_gpu_follows_the_cpu(optimizer, dtype, compile, text_data, tmp_path, capsys):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    losses = []
    for device, precision in (("cpu", "float32"), ("cuda", dtype)):
        changes = {"optimizer": optimizer, "device": device, "dtype": precision, "dropout": 0.0}
        changes |= {"max_steps": 12, "compile": compile and device == "cuda"}
        train.train(config_of(text_data, tmp_path / device, **changes))
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # the sampled labels differ too
    assert "torch.compile does not work" not in capsys.readouterr().out
