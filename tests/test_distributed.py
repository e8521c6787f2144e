"""Several ranks under torchrun: the same run on any number of them, and no rank left behind."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from tiny import TINY, difference, newest

import train
from checkpoint import load_checkpoint
from common.errors import UserError
from common.settings import config_from_constants
from tokenizer import load_tokenizer
from training import distributed, setup
from training.checks import check_settings
from training.distributed import TORCHRUN_VARIABLES, Ranks, ranks_of_environment

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = TINY | {"batch_size": 2, "gradient_accumulation_steps": 4, "eval_interval": 4}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def arguments(data_dir: Path, out_dir: Path, /, **changes) -> list[str]:
    settings = SETTINGS | {"data_dir": data_dir, "out_dir": out_dir} | changes
    return [f"--{name}={value}" for name, value in settings.items()]


def alone(data_dir: Path, out_dir: Path, /, **changes) -> dict:
    return train.train(config_from_constants(vars(train), arguments(data_dir, out_dir, **changes)))


def start(n_ranks: int, *command: str | Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*TORCHRUN, f"--nproc_per_node={n_ranks}", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> str:
    """What a job printed; it must end, and what it started with it."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        pytest.fail(f"the job did not end: {process.communicate()[0]}")


def torchrun(n_ranks: int, data_dir: Path, out_dir: Path, /, **changes) -> str:
    process = start(n_ranks, ROOT / "train.py", *arguments(data_dir, out_dir, **changes))
    output = finish(process)
    assert process.returncode == 0, output
    return output


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The process ids of a job's ranks, by rank, once it has started them."""
    found = {}
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for pid in children.read_text().split():
        try:
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except OSError:  # it has just ended
            continue
        found |= {int(v[5:]): int(pid) for v in variables if v.startswith("RANK=")}
    return [found[rank] for rank in sorted(found)]


def wait_for_steps(process: subprocess.Popen, out_dir: Path, n: int) -> None:
    metrics = out_dir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= n:
            return
        time.sleep(0.02)
    pytest.fail(process.communicate()[0])


def losses(out_dir: Path) -> list[float]:
    """Training and validation losses in their order."""
    rows = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [value for row in rows for key, value in row.items() if key in ("loss", "val_loss")]


def assert_the_same_run(ours: Path, theirs: Path, weights: float = 5e-3) -> None:
    """Losses to float32 rounding; weights and moments as far as that rounding carries.

    An optimizer that divides by a gradient's size makes a full step of a gradient that is noise, so
    a few weights differ by steps: the norm of the difference is compared.
    """
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-6)
    a, b = (load_checkpoint(newest(out_dir)) for out_dir in (ours, theirs))
    assert (a["iter_num"], a["data_cursor"]) == (b["iter_num"], b["data_cursor"])
    tensors = []
    for state in (a, b):
        moments = state["optimizer_state_dict"]["state"].values()
        tensors.append([*state["model_state_dict"].values()])
        values = [value for values in moments for value in values.values()]
        tensors[-1] += [v for v in values if isinstance(v, torch.Tensor) and v.dim()]
    for one, other in zip(*tensors, strict=True):
        assert (one - other).norm() <= weights * other.norm()


@pytest.fixture(scope="module")
def whole(text_data, tmp_path_factory) -> Path:
    """An undisturbed run of one process: SophiaG, dropout, two epochs, two Hessian batches."""
    out_dir = tmp_path_factory.mktemp("whole")
    alone(text_data, out_dir, hess_batches=2)
    return out_dir


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_are_one_run_with_the_other_optimizers(
    optimizer, text_data, mixed_data, tmp_path
):
    settings = {"optimizer": optimizer, "max_steps": 6, "dropout": 0.0, "keep_checkpoints": 9}
    data = text_data if optimizer == "muon" else f"{text_data}:0.5, {mixed_data}"
    alone(data, tmp_path / "one", **settings)
    torchrun(2, data, tmp_path / "two", **settings)
    assert_the_same_run(tmp_path / "two", tmp_path / "one")
    if optimizer == "adamw":  # two ranks on a mixture go on from their fourth step
        (tmp_path / "killed").mkdir()
        for name in ("ckpt_0000004.pt", "metrics.jsonl"):
            shutil.copy(tmp_path / "two" / name, tmp_path / "killed")
        torchrun(2, data, tmp_path / "killed", **settings)
        assert losses(tmp_path / "killed") == losses(tmp_path / "two")
        ends = [load_checkpoint(newest(tmp_path / name)) for name in ("two", "killed")]
        assert difference(*(end | {"config": None} for end in ends)) is None


def test_two_ranks_then_one_then_four_are_one_run(text_data, mixed_data, tmp_path):
    """SIGTERM to one of two ranks saves once; one process continues, and from its middle four.

    SophiaG with dropout, on a mixture.
    """
    whole, interrupted, continued, four = (tmp_path / n for n in ("whole", "two", "one", "four"))
    # 20 steps: into the second epoch. Later a drawn label may flip by rounding, as seeds decide.
    settings = {"hess_batches": 2, "keep_checkpoints": 99, "max_steps": 20}
    data = f"{text_data}:0.5, {mixed_data}"
    alone(data, whole, **settings)
    process = start(2, ROOT / "train.py", *arguments(data, interrupted, **settings))
    wait_for_steps(process, interrupted, 5)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    output = finish(process)
    saved = newest(interrupted)
    step = load_checkpoint(saved)["iter_num"]
    assert len(list(interrupted.glob("*.pt"))) == 1 + math.ceil(step / 4) > 2
    assert output.count(f"interrupted at step {step} and saved as {saved}; run the same") == 1
    assert output.count("stopping after this step is saved") == 1 and "[rank" not in output
    assert process.returncode == 1 and "exitcode  : 143" in output  # torchrun's report

    shutil.copytree(interrupted, continued)
    alone(data, continued, **settings)
    assert_the_same_run(continued, whole)
    middle = (step // 4 + 1) * 4
    assert step < middle < load_checkpoint(newest(whole))["iter_num"]
    four.mkdir()
    for name in (f"ckpt_{middle:07d}.pt", "metrics.jsonl"):
        shutil.copy(continued / name, four)
    output = torchrun(4, data, four, **settings)
    assert f"at step {middle}" in output and output.count("4 ranks") == 1
    assert_the_same_run(four, whole)


def test_a_fine_tune_on_two_ranks_is_that_of_one(whole, text_data, chat_data, tmp_path):
    changes = {
        "finetune": True,
        "model": whole / "best_model.pt",
        "finetune_data_dir": chat_data,
        "finetune_learning_rate": 1e-4,
        "finetune_embedding_learning_rate": 1e-3,
        "finetune_gradient_accumulation_steps": 4,
        "finetune_warmup_iters": 2,
        "finetune_num_epochs": 2,
        "optimizer": "adamw",
        "sample_tokens": 4,
    }
    one, two = ({"finetune_out_dir": tmp_path / name} for name in ("one", "two"))
    alone(text_data, whole, **changes, **one)
    output = torchrun(2, text_data, whole, **changes, **two)
    assert output.count("done: best validation loss") == output.count(", 2 ranks") == 1
    assert_the_same_run(tmp_path / "two", tmp_path / "one")
    rows = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert "sample" in rows[-1] and "pretrain_val_loss" in rows[-1]


def test_one_step_from_the_inside(text_data, tmp_path):
    """What is sent and when, compiled too, in bfloat16 too: see ranks_worker.py."""
    output = finish(start(2, ROOT / "tests/ranks_worker.py", text_data, tmp_path), timeout=240)
    assert {path.name for path in tmp_path.iterdir()} == {"passed-0", "passed-1"}, output


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_job_with_one_message(how, text_data, tmp_path):
    """One that is killed at once, one that hangs after the time-out."""
    settings = {"num_epochs": 500, "distributed_timeout_minutes": 0.1}
    process = start(2, ROOT / "train.py", *arguments(text_data, tmp_path, **settings))
    wait_for_steps(process, tmp_path, 3)
    pids = ranks_of(process)
    os.kill(pids[how is signal.SIGKILL], how)
    if how is signal.SIGSTOP:  # rank 1 notices that rank 0 is silent; torchrun then waits for it
        while pids[1] in ranks_of(process):
            time.sleep(0.1)
        os.kill(pids[0], signal.SIGKILL)
    output = finish(process, timeout=40)
    assert process.returncode == 1
    assert output.count("\nerror: rank ") == output.count("lost contact with another rank") == 1
    assert "the same command continues it from the last checkpoint" in output
    assert "[rank" not in output and "stopping after this step" not in output


def test_a_mistake_is_said_once(text_data, tmp_path):
    process = start(2, ROOT / "train.py", *arguments(tmp_path / "nowhere", tmp_path / "out"))
    output = finish(process)
    assert process.returncode == 1
    assert output.count("error: there is no dataset directory") == 1, output
    assert "exitcode  : 2" in output and "[rank" not in output


def test_what_ranks_must_have_in_common(whole, text_data, chat_data, tmp_path, monkeypatch):
    """Every setting before the first message, and then all data, a fine-tune's second set too."""
    compared = []

    class Recording(Ranks):
        def check_same(self, values):
            compared.append(values)

    monkeypatch.setattr(setup, "init_distributed", lambda minutes: nullcontext(Recording()))
    changes = {
        "finetune": True,
        "model": whole / "best_model.pt",
        "finetune_data_dir": chat_data,
        "finetune_out_dir": tmp_path,
        "finetune_warmup_iters": 1,
        "max_steps": 1,
    }
    alone(text_data, whole, **changes)
    settings, found = compared
    assert settings["data_dir"] == str(text_data) and settings["finetune_data_dir"]
    assert found["data"].startswith("54 documents") and found["device"] == "cpu"
    assert "val 6 documents" in found["validation"]
    assert "pretrain_val 12 documents" in found["validation"]


def test_micro_batches_that_cannot_be_dealt_evenly_are_refused():
    config = config_from_constants(vars(train), ["--gradient_accumulation_steps=16"])
    check_settings(config, 8)
    with pytest.raises(UserError, match="cannot be dealt to 3 ranks evenly: set it to 15 or 18,"):
        check_settings(config, 3)
    tuned = setup.settings_in_force(dataclasses.replace(config, finetune=True))
    with pytest.raises(UserError, match="finetune_gradient_accumulation_steps=1 .* set it to 8,"):
        check_settings(tuned, 8)


@pytest.mark.parametrize("minutes", [0.0, 1e300])
def test_an_impossible_time_out_is_one_clear_line(minutes, monkeypatch):
    """It is refused after the ranks have met, for which it must do; Ctrl-C ends the meeting."""
    for name in TORCHRUN_VARIABLES:
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    store, met = torch.distributed.HashStore(), []
    monkeypatch.setattr(distributed, "rendezvous_store", lambda timeout: store)

    def meet(*args, **kwargs):
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        met.append(kwargs)

    monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    monkeypatch.setattr(Ranks, "all_reduce_scalars", lambda *a: None)
    with distributed.init_distributed(minutes):
        store.set_timeout(met[0]["timeout"])
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    config = config_from_constants(vars(train), [f"--distributed_timeout_minutes={minutes}"])
    with pytest.raises(UserError, match="distributed_timeout_minutes=.* must be (above 0|at most)"):
        check_settings(config)


def test_a_restart_by_torchrun_sees_nothing_of_the_ranks_before(monkeypatch):
    """Their addresses and their failure are still in torchrun's store."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *a, **k: iter([(store, 0, 2)]))
    for restarts in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        seen = [distributed.rendezvous_store(timedelta(1)).add("failures", 1) for _ in range(2)]
        assert seen == [1, 2]


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = config_from_constants(vars(train), [])
    with pytest.raises(UserError, match=r"4 ranks on .* sees 2 GPU\(s\): .*--nproc_per_node=2"):
        setup.choose_device(config, Ranks(0, 4, 0, 4))


def test_hess_batches_are_micro_batches_of_the_step():
    config = config_from_constants(vars(train), ["--hess_batches=17"])
    with pytest.raises(UserError, match="hess_batches=17 is more than the gradient_accumulation"):
        check_settings(config)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_micro_batches_of_the_same_steps(world_size, text_data):
    rows = setup.open_rows(str(text_data), "train", load_tokenizer(), 32, 0, chat=False)
    whole = list(rows.steps(0, 50, 2, 4))
    parts = [list(rows.steps(0, 50, 2, 4, rank, world_size)) for rank in range(world_size)]
    seeds = set()
    for step, batches in enumerate(whole):
        for number, batch in enumerate(batches):
            same = parts[number % world_size][step][number // world_size]
            assert torch.equal(batch.ids, same.ids) and batch.seed == same.seed
            seeds.add(batch.seed)
    assert sum(len(part[0]) for part in parts) == 4 and len(seeds) == 4 * len(whole)
    assert [sum(Ranks(r, 4).local_count(n) for r in range(4)) for n in range(9)] == list(range(9))


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "4"},
        {"RANK": "1"},
        dict.fromkeys(TORCHRUN_VARIABLES, "2"),
        dict.fromkeys(TORCHRUN_VARIABLES, "x"),
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here"},
    ],
)
def test_half_an_environment_is_one_clear_line(variables, monkeypatch):
    for name in (*TORCHRUN_VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_of_environment() == Ranks()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="do not describe a rank: start with torchrun"):
        ranks_of_environment()
