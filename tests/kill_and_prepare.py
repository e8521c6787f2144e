"""Kills prepare_dataset_fineweb.py at random moments, continues, compares to an undisturbed run.

    python tests/kill_and_prepare.py --kills=30
    python tests/kill_and_prepare.py --kills=30 --processes=3   # one of them is killed at a time
    python tests/kill_and_prepare.py --kills=30 --from_hub=True # downloads from a local server

Exits with 0 if every file of the two folders has the same bytes. It makes its own text, or repeats
the Parquet files of a folder, `--source`. The tests run the same with fewer kills.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script this folder is first, the project is its parent

from fake_hub import FakeHub  # noqa: E402

from common.settings import config_from_constants, run_script  # noqa: E402

kills = 30
processes = 1
from_hub = False
source = ""  # a folder of Parquet files
n_files = 150
seed = 0  # of the moments and the text

SETTINGS = {"val_split": 0.02, "shard_size": 60_000, "remove_duplicates": True}
WORDS = "the cat sat on a mat and saw two dogs run over old green hills while rain fell".split()


def write_parquet(path: Path, rng: random.Random, n: int, row_group_size: int = 100) -> None:
    """A file in FineWeb's columns; some documents are in French, unsure, empty or repeated."""
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 300))) for _ in range(n)]
    for i in range(0, n - 1, 50):
        texts[i] = ("", "once more", texts[i])[i // 50 % 3]
    columns = {
        "text": texts,
        "id": [f"<urn:{path.stem}:{i}>" for i in range(n)],
        "language": ["fr" if rng.random() < 0.1 else "en" for _ in texts],
        "language_score": [0.9 + 0.1 * rng.random() for _ in texts],
        "token_count": [len(text.split()) for text in texts],
        "int_score": [rng.choice([3, 4, 5]) for _ in texts],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def make_source(folder: Path, n_files: int, rng: random.Random, given: str = "") -> Path:
    """`n_files` Parquet files in `folder`: links to those of `given`, or new ones."""
    folder.mkdir()
    originals = sorted(Path(given).glob("*.parquet")) if given else []
    for i in range(n_files):
        path = folder / f"{i:03d}.parquet"
        if originals:
            path.symlink_to(originals[i % len(originals)].resolve())
        else:
            write_parquet(path, rng, 600)
    return folder


def command(source: Path | str, output: Path, **settings) -> list[str]:
    settings = SETTINGS | {"source": source, "output_dir": output} | settings
    script = str(ROOT / "prepare_dataset_fineweb.py")
    return [sys.executable, script, *(f"--{k}={v}" for k, v in settings.items())]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the staging folder's too, but not a killed process's `.lock`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def parts_done(output: Path) -> int:
    return len(list(output.glob(".preparing/part-*/part.json")))


def kill_and_prepare(
    source: Path | str, directory: Path, kills: int, rng: random.Random, processes: int = 1, **env
) -> tuple[int, list[str]]:
    """(kills that hit a running process, names of the files that differ afterwards)."""
    whole, killed, environment = directory / "whole", directory / "killed", os.environ | env
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment}
    subprocess.run(command(source, whole), check=True, **quiet)
    running: dict[int, subprocess.Popen] = {}
    hits = 0
    while hits < kills and not (killed / "manifest.json").exists():
        for rank in range(processes):
            if rank not in running:
                arguments = command(source, killed, rank=rank, world_size=processes)
                running[rank] = subprocess.Popen(arguments, **quiet)
        before = parts_done(killed)
        if rng.random() < 0.3:  # any moment, while starting too
            time.sleep(rng.uniform(0, 2))
        else:  # soon after another part is complete
            deadline = time.time() + 60
            while parts_done(killed) == before and time.time() < deadline:
                if any(process.poll() is not None for process in running.values()):
                    break
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.15))
        rank = rng.choice(sorted(running))
        process = running.pop(rank)
        process.kill()
        output = process.communicate()[0].decode()
        if process.returncode == -signal.SIGKILL:
            hits += 1
            print(f"kill {hits}: {parts_done(killed)} parts complete", flush=True)
        assert process.returncode in (0, -signal.SIGKILL), output
    for process in running.values():
        output = process.communicate()[0].decode()
        assert process.returncode == 0, output
    subprocess.run(command(source, killed), check=True, **quiet)
    ours, theirs = contents(killed), contents(whole)
    return hits, [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    with tempfile.TemporaryDirectory() as name, FakeHub() as hub:
        directory, rng = Path(name), random.Random(config.seed)
        folder = make_source(directory / "source", config.n_files, rng, config.source)
        source, env = str(folder), {}
        if config.from_hub:
            files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
            patterns = [{"split": "train", "path": "*"}]
            card = {"configs": [{"config_name": "sample-10BT", "data_files": patterns}]}
            hub.add("datasets", "owner/texts", files, card)
            hub.faults = {path: [("slow", 0.2)] * 10 for path in files}
            source, env = "owner/texts", {"HF_ENDPOINT": hub.url}
            SETTINGS["revision"] = "main"
        started = time.time()
        hits, different = kill_and_prepare(
            source, directory, config.kills, rng, config.processes, **env
        )
    result = f"DIFFERENT: {', '.join(different)}" if different else "the same bytes"
    print(f"{hits} kills in {time.time() - started:.0f} s: {result}")
    return 1 if different or hits < config.kills else 0


if __name__ == "__main__":
    run_script(main)
