"""Training under attack: signals at any moment, odd folders, hostile checkpoints, NaN weights."""

import importlib.machinery
import json
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import arguments, config_of

import train
from checkpoint import CheckpointWriter, TrainingState, checkpoints_in, load_checkpoint
from common.errors import UserError
from common.signals import SIGNALS
from training import setup
from training.metrics import Metrics, Progress, last_metrics, read_metrics
from training.trainer import Trainer

SHORT = {"max_steps": 2, "warmup_iters": 1, "eval_interval": 100, "sample_tokens": 0}


@pytest.fixture
def strays():
    """The signals that came through to the handlers outside, which would have ended a process."""
    noted = []
    previous = {s: signal.signal(s, lambda number, frame: noted.append(number)) for s in SIGNALS}
    yield noted
    for signum, handler in previous.items():
        signal.signal(signum, handler)


def interrupt_main(signum: int) -> None:
    """Sends a signal to the main thread, whose waiting it interrupts, as one from outside does."""
    signal.pthread_kill(threading.main_thread().ident, signum)


def at_write(monkeypatch, action) -> None:
    """Calls `action` in the thread that writes the first checkpoint, before it is whole."""
    real, calls = torch.save, []

    def save(state, file):
        real(state, file)
        calls.append(1)
        if len(calls) == 1:
            action()

    monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_last_checkpoint_is_written_loses_nothing(
    signum, text_data, tmp_path, monkeypatch, capsys, strays
):
    def interrupt():
        interrupt_main(signum)
        time.sleep(0.3)

    at_write(monkeypatch, interrupt)
    assert train.main(arguments(text_data, tmp_path, **SHORT)) == 128 + signum
    assert load_checkpoint(tmp_path / "ckpt_0000002.pt")["iter_num"] == 2
    assert (tmp_path / "best_model.pt").exists() and strays == []
    error = capsys.readouterr().err
    assert "interrupted at step 2 and saved as" in error and "the run is complete" in error


def test_a_second_ctrl_c_from_python_still_waits_for_the_file(text_data, tmp_path, monkeypatch):
    def interrupt_twice():
        for _ in range(2):
            time.sleep(0.2)
            interrupt_main(signal.SIGINT)
        time.sleep(1)

    at_write(monkeypatch, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train.train(config_of(text_data, tmp_path, **SHORT))
    assert load_checkpoint(tmp_path / "best_model.pt")["iter_num"] == 2


def test_a_signal_while_a_failed_run_waits_for_its_file(
    text_data, tmp_path, monkeypatch, capsys, strays
):
    failed = threading.Event()

    def interrupt():
        assert failed.wait(30)
        time.sleep(0.3)
        interrupt_main(signal.SIGTERM)

    def fail(*_):
        if checkpoints_in(tmp_path) or list(tmp_path.glob("*.tmp")):
            failed.set()
            raise UserError("it failed")

    at_write(monkeypatch, interrupt)
    monkeypatch.setattr(Trainer, "check_finite", fail)
    with pytest.raises(UserError, match="it failed"):
        train.main(arguments(text_data, tmp_path, **SHORT | {"max_steps": 4, "eval_interval": 2}))
    assert load_checkpoint(tmp_path / "ckpt_0000002.pt")["iter_num"] == 2 and strays == []


def test_a_signal_before_the_first_step_is_one_line(
    text_data, tmp_path, monkeypatch, capsys, strays
):
    monkeypatch.setattr(setup, "check_disk", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(arguments(text_data, tmp_path, **SHORT)) == 143
    assert capsys.readouterr().err == "interrupted\n" and strays == []
    assert list(tmp_path.iterdir()) == []


def test_any_folder_name_will_do(text_data, tmp_path, capsys):
    sys.stdout.reconfigure(errors="backslashreplace")  # as run_script does
    out_dir = tmp_path / "run_$lr^$" / os.fsdecode(b"bad\xff") / " a\nb 漢"
    train.train(config_of(text_data, out_dir, **SHORT))
    result = train.train(config_of(text_data, out_dir, **SHORT | {"max_steps": 3}))
    assert result["step"] == 3 and "cannot write" not in capsys.readouterr().err
    assert {"best_model.pt", "ckpt_0000003.pt", "loss_curve.png"} <= set(os.listdir(out_dir))


def test_neither_a_picture_nor_a_log_ends_a_run(text_data, tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug of the backend")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    result = train.train(config_of(text_data, tmp_path / "picture", **SHORT))
    (tmp_path / "log" / "metrics.jsonl").mkdir(parents=True)
    assert result["step"] == train.train(config_of(text_data, tmp_path / "log", **SHORT))["step"]
    error = capsys.readouterr().err
    assert error.count("cannot write metrics (RuntimeError: a bug of the backend)") == 1
    assert error.count("cannot write metrics (IsADirectoryError") == 1
    for name in ("picture", "log"):
        assert (tmp_path / name / "ckpt_0000002.pt").exists()


def test_a_tracker_that_fails_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    class Wandb(types.ModuleType):
        def init(self, **settings):
            return self

        def log(self, values, step):
            raise ConnectionError("no network")

        def finish(self):
            raise ConnectionError("still none")

    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    metrics = Metrics(tmp_path, 0)
    metrics.start_tracker("wandb", "lille", {"seed": 1})
    metrics.log(1, loss=2.0)
    metrics.close()
    assert capsys.readouterr().err.count("ConnectionError: no network") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_settings_and_every_line(name, text_data, tmp_path, monkeypatch):
    calls, tracker = [], types.ModuleType(name)
    tracker.init = lambda **settings: calls.append(settings)
    tracker.log = lambda values, step: calls.append({"step": step} | values)
    tracker.finish = lambda: calls.append("finished")
    tracker.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="here")
    monkeypatch.setitem(sys.modules, name, tracker)
    setting = {"wandb_log": True} if name == "wandb" else {"tracker": name}
    train.train(config_of(text_data, tmp_path, **SHORT, **setting))
    first, *lines, last = calls
    assert first["project"] == "lille" and first["config"]["n_layers"] == 2
    assert lines == read_metrics(tmp_path / "metrics.jsonl") and last == "finished"


def test_a_terminal_that_is_gone_does_not_end_a_run(monkeypatch):
    progress = Progress(0, 4, 1, torch.device("cpu"))

    def gone(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("update", "write", "set_postfix", "close"):
        monkeypatch.setattr(progress.bar, name, gone)
    progress.advance(1)
    progress.show(loss=1.0)
    progress.write("text")
    progress.close()


JUNK = [b"5", b"{}", b'{"step": null}', b"\xff", b"[" * 100_000, b"\0" * 9, b"9" * 5000]
JUNK += [
    b'{"step": true}',
    b'{"step": 1, "loss": [1]}',
    b'{"step": 1, "loss": "x"}',
    b'{"step": 2, "lo',
]


def test_damaged_metrics_are_survived(tmp_path, capsys):
    rows = [json.dumps({"step": step, "loss": 3.0}).encode() for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*JUNK, *rows, *JUNK]))
    metrics = Metrics(tmp_path, 2)
    metrics.log(3, loss=2.0)
    metrics.plot()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in lines] == [1, 1, 1, 2, 1, 1, 3]  # odd losses are no points
    assert last_metrics(tmp_path) == {"step": 3, "loss": 2.0}
    assert (tmp_path / "loss_curve.png").exists() and capsys.readouterr().err == ""


def test_step_numbers_of_any_size(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (9_999_998, 9_999_999, 10_000_000, 10**18):
        writer.save(TrainingState.of({"config": {}, "iter_num": step}, ""), best=False)
    writer.wait()
    names = [path.name for path in checkpoints_in(tmp_path)]
    assert names == ["ckpt_1000000000000000000.pt", "ckpt_10000000.pt"]
    assert len(list(tmp_path.iterdir())) == 2


RATES = {"sophiag": {}, "muon": {}}  # the settings of the embedding
RATES["adamw"] = {"embedding_optimizer": "same", "embedding_learning_rate": 0.0}


@pytest.fixture(scope="module")
def runs(text_data, tmp_path_factory) -> dict[str, Path]:
    """The last checkpoint of a short run with each optimizer."""
    paths = {}
    for optimizer, rates in RATES.items():
        out_dir = tmp_path_factory.mktemp(optimizer)
        settings = SHORT | {"optimizer": optimizer} | rates
        train.train(config_of(text_data, out_dir, **settings))
        paths[optimizer] = out_dir / "ckpt_0000002.pt"
    return paths


def nested() -> list:
    value: list = []
    for _ in range(300):
        value = [value]
    return value


VALUES = {  # by key of a checkpoint: what it must not hold; None: it is missing
    "optimizer_state_dict": [None, 5, {}, {"state": 5}, {"state": {}}, {"state": {0: {}}}],
    "model_state_dict": [5, {}, {"norm.weight": torch.ones(16)}],
    "scaler_state_dict": [5],
    "model_args": [5, {"n_layers": torch.ones(2)}],
    "iter_num": [None, -1, True, "2", 2.0, 10**300, torch.ones(())],
    "data_cursor": [None, -1, True, "2", 10**300],
    "best_val_loss": [None, float("nan"), "low", nested()],
    "config": ["x", {"seed": torch.ones(2)}, {"seed": nested()}],
    "rng_state": [None, {}, {"cpu": 5}, {"cpu": torch.zeros(3, dtype=torch.uint8)}],
    "tokenizer_sha256": [torch.ones(2)],
    "data": [torch.ones(2)],
    "base": [torch.ones(2)],
}
VALUES["rng_state"] += [{"cpu": torch.full((5056,), 255, dtype=torch.uint8)}]
TENSORS = {  # what a weight or moment must not become
    "another shape": lambda t: torch.zeros(3),
    "stride 0": lambda t: torch.zeros(1).expand(t.shape),
    "transposed": lambda t: t.T.contiguous().T,
    "int8": lambda t: t.to(torch.int8),
    "float64": lambda t: t.double(),
    "sparse": lambda t: t.to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "no tensor": lambda t: t.tolist(),
    "NaN": lambda t: torch.full_like(t, torch.nan),
    "infinite": lambda t: torch.full_like(t, torch.inf),
}


def hostile(good: dict, second: str) -> Iterator[tuple[Any, dict]]:
    """Changes of a checkpoint, each with a description; `second` is the name of a moment."""
    for key, values in VALUES.items():
        for value in values:
            rest = {name: item for name, item in good.items() if name != key}
            yield (key, value), rest if value is None else rest | {key: value}
    key, weights = "layers.0.attention.qkv_proj.weight", good["model_state_dict"]
    for name, change in TENSORS.items():
        yield (key, name), good | {"model_state_dict": weights | {key: change(weights[key])}}
    moments = good["optimizer_state_dict"]["state"]
    states = [{n: moments[n] for n in moments if n}, moments | {99: moments[0]}]
    names = {"exp_avg", second} & moments[0].keys()
    changed = [{n: change(moments[0][n])} for n in sorted(names) for change in TENSORS.values()]
    changed += [{"step": torch.tensor(step)} for step in (-1.0, 99.0, torch.nan, 2)]
    changed += [{"step": 2.0}, {"step": "2"}, {"other": torch.tensor(2.0)}]
    states += [moments | {0: moments[0] | change} for change in changed]
    for state in states:
        yield state[0] if 0 in state else "none", good | {"optimizer_state_dict": {"state": state}}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    ("optimizer", "moment"),
    [("sophiag", "hessian"), ("adamw", "exp_avg_sq"), ("muon", "momentum_buffer")],
)
def test_hostile_checkpoints_are_refused_in_one_line(optimizer, moment, runs, text_data, tmp_path):
    good = load_checkpoint(runs[optimizer])
    settings = SHORT | RATES[optimizer]
    config = config_of(text_data, tmp_path / "out", optimizer=optimizer, **settings)
    with setup.open_run(config) as run:
        for what, checkpoint in hostile(good, moment):
            run.checkpoint = (Path("hostile.pt"), checkpoint)
            with pytest.raises(UserError, match=r"\Ahostile\.pt[: ].*\Z"):
                run.resume()
                pytest.fail(f"accepted: {what}")
        run.checkpoint = (runs[optimizer], good)
        run.resume()
        assert run.step == 2


def test_weights_that_are_not_finite_replace_nothing(text_data, tmp_path, monkeypatch):
    real = Trainer.step

    def step(self, *args):
        result = real(self, *args)
        if next(iter(self.optimizer.state.values()))["step"] == 5:
            self.model.norm.weight.data[3] = torch.nan
        return result

    monkeypatch.setattr(Trainer, "step", step)
    changes = SHORT | {"max_steps": 8, "eval_interval": 2}
    with pytest.raises(UserError, match=r"^step 6: .*ckpt_0000004.pt, which is good$") as refusal:
        train.train(config_of(text_data, tmp_path, **changes))
    assert str(tmp_path) in str(refusal.value)
    for path in tmp_path.glob("*.pt"):
        weights = load_checkpoint(path)["model_state_dict"].values()
        assert all(bool(weight.isfinite().all()) for weight in weights)


def test_done_names_no_file_that_is_not_there(text_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: (torch.nan, torch.nan))
    train.train(config_of(text_data, tmp_path, **SHORT))
    assert not (tmp_path / "best_model.pt").exists() and (tmp_path / "ckpt_0000002.pt").exists()
    assert "done, but no validation loss was finite" in capsys.readouterr().out
