"""Kills training with SIGKILL at random moments, continues, compares to an undisturbed run.

    python tests/kill_and_resume.py --kills=20 --optimizer=sophiag

Prints the moments and exits with 0 if the last checkpoints are equal bit for bit. It makes its own
small text. test_train.py runs the same with fewer kills.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script this folder is first, the project is its parent

from checkpoint import load_checkpoint  # noqa: E402
from common.settings import config_from_constants, run_script  # noqa: E402

kills = 20
optimizer = "sophiag"
seed = 0  # of the moments

TINY = {
    "n_layers": 2,
    "n_embd": 16,
    "n_heads": 2,
    "n_kv_heads": 1,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_epochs": 2,
    "warmup_iters": 3,
    "learning_rate": 3e-3,
    "hess_interval": 3,
    "eval_interval": 2,
    "eval_rows": 8,
    "log_interval": 1,
    "dropout": 0.1,
    "sample_tokens": 0,
    "compile": False,
    "device": "cpu",
}


def command(data_dir: Path, out_dir: Path, settings: dict) -> list[str]:
    settings = TINY | settings | {"data_dir": data_dir, "out_dir": out_dir}
    return [sys.executable, str(ROOT / "train.py"), *(f"--{k}={v}" for k, v in settings.items())]


def newest(out_dir: Path) -> Path | None:
    return max(out_dir.glob("ckpt_*.pt"), default=None)


def difference(ours, theirs, where: str = "") -> str | None:
    """Where two checkpoints differ, down to the last bit; paths aside."""
    if isinstance(ours, torch.Tensor):
        return None if torch.equal(ours, theirs) else where
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return f"{where}: keys {ours.keys() ^ theirs.keys()}"
        keys = sorted(ours.keys() - {"out_dir", "resume_checkpoint"}, key=str)
        found = (difference(ours[key], theirs[key], f"{where}.{key}") for key in keys)
        return next(filter(None, found), None)
    if isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return f"{where}: lengths {len(ours)} and {len(theirs)}"
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next(filter(None, (difference(a, b, f"{where}[{i}]") for i, (a, b) in pairs)), None)
    return None if ours == theirs else f"{where}: {ours} and {theirs}"


def kill_and_resume(
    data_dir: Path, directory: Path, kills: int, rng: random.Random, **settings
) -> tuple[int, str | None]:
    """(kills that hit a running process, where the results differ or None)."""
    whole, killed = directory / "whole", directory / "killed"
    subprocess.run(command(data_dir, whole, settings), check=True, capture_output=True)
    hits = 0
    while hits < kills:
        before = newest(killed)
        process = subprocess.Popen(
            command(data_dir, killed, settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if rng.random() < 0.25:  # any moment, while starting too
            time.sleep(rng.uniform(0, 6))
        else:  # soon after it got further: in a step, or while a checkpoint is being written
            while process.poll() is None and newest(killed) == before:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.4))
        process.kill()
        output = process.communicate()[0].decode()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
        hits += 1
        reached = newest(killed)
        print(f"kill {hits}: newest checkpoint {reached.name if reached else 'none'}", flush=True)
    subprocess.run(command(data_dir, killed, settings), check=True, capture_output=True)
    for name in (newest(whole).name, "best_model.pt"):
        where = difference(*(load_checkpoint(out_dir / name) for out_dir in (whole, killed)), name)
        if where is not None:
            return hits, where
    return hits, None


def main(argv: list[str] | None = None) -> int:
    import prepare_dataset

    config = config_from_constants(globals(), argv)
    with tempfile.TemporaryDirectory() as name:
        directory, rng = Path(name), random.Random(config.seed)
        words = "the cat sat on a mat and saw two dogs run over old green hills".split()
        texts = [" ".join(rng.choices(words, k=rng.randint(3, 60))) for _ in range(200)]
        (directory / "input.txt").write_text("<|endoftext|>".join(texts), "utf-8")
        data = directory / "shards"
        arguments = [f"--input_file_path={directory / 'input.txt'}", f"--output_dir={data}"]
        assert prepare_dataset.main([*arguments, "--val_split=0.1"]) == 0
        steps = {"num_epochs": 4, "eval_interval": 1, "optimizer": config.optimizer}
        hits, where = kill_and_resume(data, directory, config.kills, rng, **steps)
    print(f"{hits} kills: " + (f"DIFFERENT at {where}" if where else "bit for bit the same"))
    return 1 if where or hits < config.kills else 0


if __name__ == "__main__":
    run_script(main)
