"""Disturbs the scripts at each of their file-system calls, runs them again, compares the results.

    python tests/faults.py                        # all of it, `make faults`
    python tests/faults.py --sample=10 --kills=3  # ten faults of each case, three kills
    python tests/faults.py --case=train --fault=full --call=17   # one run, as a loss names it

Each run has one fault at one call that changes a file below the output folder (fault_hook.c counts
them). After it nothing may be lost or half-written, and the error is one line; then the same
command runs undisturbed and must end with the same files as a run that never had a fault. Besides,
training and preparation are killed at random moments. Prints a table and every loss; exits with 1
for any.

For speed a worker imports everything once and forks a child for each run, and a state of the folder
that an earlier fault led to already is not continued again.
"""

import ctypes
import errno
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script this folder is first, the project is its parent

from common.errors import UserError  # noqa: E402
from common.settings import config_from_constants, run_script  # noqa: E402

case = ""  # names of cases, separated by commas; "": all
fault = ""  # names of faults, separated by commas; "": all
call = 0  # number of the call; 0: all
sample = 0  # faults of each case, drawn at random; 0: all
kills = 100  # kills of training at random moments; a third of it for each kind of preparation
seed = 0  # of the sample and the moments
processes = 2  # which share the work
worker = -1  # for its own use: the number of this process
inputs = ""  # for its own use: the folder of the inputs

# The hook's action and its argument.
FAULTS = {
    "kill": ("k", 0),  # before the call
    "torn": ("t", 0),  # killed after half of a write
    "enospc": ("e", errno.ENOSPC),  # the call fails, later ones do not
    "full": ("f", errno.ENOSPC),  # half is written, and nothing more from then on
    "eio": ("e", errno.EIO),
    "sigterm": ("s", signal.SIGTERM),
    "sigint": ("s", signal.SIGINT),
    "delay": ("d", 50),  # ms
}
WRITES = ("write", "pwrite", "pwrite64", "writev", "fwrite")
NEED_NO_SPACE = ("unlink", "unlinkat", "rmdir", "remove", "ftruncate", "ftruncate64")
TIMEOUT = 120  # seconds until a run counts as hanging

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
FINEWEB = {"val_split": 0.02, "shard_size": 60_000, "remove_duplicates": True}
WORDS = "the cat sat on a mat and saw two dogs run over old green hills while rain fell".split()


@dataclass
class Case:
    """A command, how often and how it is disturbed, and what came out."""

    name: str
    script: str
    settings: dict[str, Any]
    earlier: dict[str, Any] | None = None  # settings of an earlier run, whose result is replaced
    imports: tuple[str, ...] = ()  # before the fork, for speed
    threads: bool = False  # delays can change something
    every: int = 1  # each fault but "kill" is tried at each `every`th call
    kills: int = 0  # at random moments
    ranks: int = 1  # processes that share the work then
    box: Path = Path()  # the current folder of the runs
    old: dict[str, str] = field(default_factory=dict)  # digests of its files before a run
    new: dict[str, str] = field(default_factory=dict)  # and after an undisturbed one
    seconds: float = 0  # that it takes
    continued: dict[int, str | None] = field(default_factory=dict)  # losses, by state of the box
    whole: set[str] = field(default_factory=set)  # digests of checkpoints that were loaded


def cases(inputs: Path, n_kills: int) -> list[Case]:
    shape = TINY | {"max_steps": 4, "keep_checkpoints": 1, "data_dir": inputs / "shards"}
    train = shape | {"out_dir": "out"}
    text = {"input_file_path": inputs / "input.txt", "val_split": 0.1, "output_dir": "out"}
    fineweb = FINEWEB | {"val_split": 0.1, "shard_size": 10_000, "output_dir": "out"}
    fineweb |= {"source": inputs / "source"}
    hub = fineweb | {"source": "owner/texts", "revision": "main"}
    figure = ("matplotlib.figure", "matplotlib.backends.backend_agg")
    parquet, web = ("pyarrow.parquet", "pandas"), "prepare_dataset_fineweb"
    llama = ("transformers.models.llama.modeling_llama",)
    result = [
        Case("train", "train", train, None, figure, True, 1),
        Case("prepare", "prepare_dataset", text, text | {"seed": 1}, ("gigatoken", "awkward")),
        Case("fineweb", web, fineweb, None, parquet, True, 2),
        Case("hub", web, hub, None, parquet, True, 4),
    ]
    packages = {"hf": llama, "onnx": (*llama, "onnxscript", "onnxruntime"), "gguf": llama}
    for format, names in packages.items():
        new = {"model": inputs / "new.pt", "output_dir": "out", "format": format}
        if format == "gguf":
            new["output_dir"] = "out/model.gguf"
        every = 1 if format == "hf" else 4
        result.append(
            Case(format, "export", new, new | {"model": inputs / "old.pt"}, names, every=every)
        )
    rows = train | {"max_steps": 12, "num_epochs": 4, "eval_interval": 1}
    for optimizer in ("sophiag", "adamw"):
        settings = rows | {"optimizer": optimizer}
        result.append(
            Case(f"kill {optimizer}", "train", settings, None, figure, kills=n_kills // 2)
        )
    many = fineweb | {"source": inputs / "many"}
    for name, settings, ranks in (("", many, 1), (" x 3", many, 3), (" hub", hub, 1)):
        result.append(Case(f"kill fineweb{name}", web, settings, kills=n_kills // 3, ranks=ranks))
    return result


def newest(out_dir: Path) -> Path | None:
    return max(out_dir.glob("ckpt_*.pt"), default=None)


def difference(ours: Any, theirs: Any, where: str = "") -> str | None:
    """Where two checkpoints differ, down to the last bit; paths aside."""
    import torch

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


def write_parquet(path: Path, rng: random.Random, n: int, row_group_size: int = 100) -> None:
    """A file in FineWeb's columns; some documents are in French, unsure, empty or repeated."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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


def make_source(folder: Path, n_files: int, rng: random.Random, n: int = 600) -> Path:
    folder.mkdir()
    for i in range(n_files):
        write_parquet(folder / f"{i:03d}.parquet", rng, n)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the staging folder's too, but no lock of a killed process."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def digests(folder: Path) -> dict[str, str]:
    """`contents`, hashed; the speeds in metrics.jsonl left out."""
    hashes = {}
    for name, content in contents(folder).items():
        if name.endswith(".jsonl"):
            content = re.sub(rb'"tokens_per_second": [^,}]*', b"", content)
        hashes[name] = hashlib.blake2b(content).hexdigest()
    return hashes


def make_inputs(directory: Path, rng: random.Random) -> None:
    """Text, shards, Parquet files, and two checkpoints to export."""
    import prepare_dataset
    import train

    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for _ in range(60)]
    (directory / "input.txt").write_text("<|endoftext|>".join(texts), "utf-8")
    shards, text = directory / "shards", directory / "input.txt"
    arguments = [f"--input_file_path={text}", f"--output_dir={shards}", "--val_split=0.1"]
    assert prepare_dataset.main(arguments) == 0
    make_source(directory / "source", 2, rng, 200)
    make_source(directory / "many", 12, rng, 200)
    for name, n in (("old", 1), ("new", 2)):
        settings = TINY | {"data_dir": shards, "out_dir": directory / name, "max_steps": n}
        arguments = [f"--{k}={v}" for k, v in (settings | {"warmup_iters": 0}).items()]
        assert train.main(arguments) == 0
        os.replace(directory / name / "best_model.pt", directory / f"{name}.pt")
        shutil.rmtree(directory / name)


def start(case: Case, fault: str = "", call: int = 0, **changes: Any) -> int:
    """The process id of a forked child that runs the command, with a fault at a call."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.chdir(case.box)
        output = os.open("../output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        action, number = FAULTS.get(fault, ("", 0))
        paths = (os.fsencode(case.box), os.fsencode(case.box.parent / "calls"))
        arguments = [f"--{k}={v}" for k, v in (case.settings | changes).items()]
        main = import_module(case.script).main
        ctypes.CDLL(None).fault_arm(*paths, call, ord(action or "\0"), number)
        try:
            run_script(lambda: main(arguments))
        except SystemExit as exit:
            code = exit.code
        threading._shutdown()  # as at the end of a script: waits for the threads
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float = TIMEOUT) -> int | None:
    """The exit code of a child, negative for a signal; None if it still runs after `seconds`."""
    descriptor = os.pidfd_open(pid)
    ready, _, _ = select.select([descriptor], [], [], seconds)
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if ready else None


def run(case: Case, fault: str = "", call: int = 0) -> tuple[int | None, str, list[str]]:
    """(exit code, output, calls) of a run; None as the code of one that was stopped as it hung."""
    pid = start(case, fault, call)
    if (code := wait(pid)) is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    output = (case.box.parent / "output").read_text("utf-8", "replace")
    return code, output, (case.box.parent / "calls").read_text("utf-8").splitlines()


def reset(case: Case) -> None:
    """Makes the box as it is before the first run."""
    shutil.rmtree(case.box, ignore_errors=True)
    shutil.copytree(case.box.parent / "old", case.box)


def set_up(case: Case, directory: Path) -> list[str]:
    """Runs the command undisturbed; returns its calls."""
    case.box = directory / "box"
    for name in ("box", "old", "new"):
        shutil.rmtree(directory / name, ignore_errors=True)
    case.box.mkdir(parents=True)
    for name in case.imports:
        import_module(name)
    if case.earlier:
        code, output, _ = run(replace(case, settings=case.earlier))
        assert code == 0, output
    shutil.copytree(case.box, directory / "old")
    started = time.perf_counter()
    code, output, calls = run(case)
    case.seconds = time.perf_counter() - started
    assert code == 0, output
    shutil.copytree(case.box, directory / "new", copy_function=os.link)
    case.old, case.new = digests(directory / "old"), digests(directory / "new")
    # The hook has seen every write: no file has more bytes than were written.
    new_files = {p.stat().st_ino: p.stat().st_size for p in case.box.rglob("*") if p.is_file()}
    written = sum(int(line.split()[1]) for line in calls)
    assert written >= sum(new_files.values()) > 0, f"{case.name}: writes unseen"
    return calls


def lost_at_once(case: Case, fault: str, code: int | None, output: str) -> str | None:
    """What is wrong directly after a run with a fault; None for nothing."""
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    if code is None:
        return "hangs"
    if fault in ("sigterm", "sigint"):
        signum = FAULTS[fault][1]
        if code not in (0, 128 + signum, -signum):
            return f"exit code {code}: {output[-300:]!r}"
    elif code not in (0, 1, 2) or (code and len(errors) != 1) or (fault == "delay" and code):
        return f"exit code {code}: {output[-300:]!r}"
    if "Traceback" in output or "Exception ignored" in output:
        return f"exit code {code} with a traceback: {output[-500:]!r}"
    return lost_if_done(case) if code == 0 else None


def lost_if_done(case: Case) -> str | None:
    """How the result of a run that says that it is complete differs from the expected one."""
    if case.script != "train":
        ours = digests(case.box)
        names = [name for name in {**ours, **case.new} if ours.get(name) != case.new.get(name)]
        return f"other files: {', '.join(names)}" if names else None
    from checkpoint import load_checkpoint

    expected = case.box.parent / "new" / "out"
    for name in (newest(expected).name, "best_model.pt"):
        paths = (case.box / "out" / name, expected / name)
        if not paths[0].exists():
            return f"{name} is missing"
        if paths[0].read_bytes() != paths[1].read_bytes():
            if where := difference(*map(load_checkpoint, paths), name):
                return f"differs at {where}"
    return None


def half_written(case: Case, state: dict[str, str]) -> str | None:
    """A file or dataset that could be taken for whole and is not; None if there is none."""
    final = {
        name: digest
        for name, digest in state.items()
        if not name.endswith(".tmp") and not any(part[0] == "." for part in Path(name).parts)
    }
    if case.script == "train":
        return half_written_run(case, final)
    if final in (case.old, case.new):
        return None
    if case.script == "export":
        moved = {n.replace(".out.replaced", "out"): d for n, d in state.items() if "replaced" in n}
        both = moved == case.old and not final  # killed between two renames: the next run goes on
        return None if both else f"neither the old nor the new export: {sorted(final)}"
    for name, digest in final.items():
        if digest not in (case.old.get(name), case.new.get(name)) and name != "out/manifest.json":
            return f"{name} is half-written"
    shards, old, new = (
        {name: digest for name, digest in files.items() if name.endswith(".npz")}
        for files in (final, case.old, case.new)
    )
    return None if shards in (old, new) or not readable(case) else "a mixed dataset can be read"


def readable(case: Case) -> bool:
    from dataset import open_split
    from tokenizer import load_tokenizer

    tokenizer = load_tokenizer()
    try:
        for split in ("train", "val"):
            open_split(case.box / "out", split, tokenizer.sha256, tokenizer.vocab_size)
    except UserError:
        return False
    return True


def half_written_run(case: Case, final: dict[str, str]) -> str | None:
    from checkpoint import load_checkpoint

    for name, digest in final.items():
        if name.endswith(".png") and not (case.box / name).read_bytes().endswith(b"IEND\xaeB`\x82"):
            return f"{name} is cut off"
        if name.endswith(".pt") and digest not in case.whole:
            try:
                load_checkpoint(case.box / name)
            except UserError as error:
                return str(error)
            case.whole.add(digest)
    return None


def steps_lost(case: Case) -> str | None:
    """The steps that a stopped training run has logged but not saved."""
    from checkpoint import load_checkpoint

    metrics, saved = case.box / "out" / "metrics.jsonl", newest(case.box / "out")
    rows = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    reached = json.loads(rows[-1])["step"] if rows else 0
    step = load_checkpoint(saved)["iter_num"] if saved else 0
    return f"step {reached} was reached and step {step} saved" if step < reached else None


def lost_at_last(case: Case) -> str | None:
    """What is lost after the same command ran again, undisturbed."""
    code, output, _ = run(case)
    if code != 0:
        return f"the next run ends with {code}: {output[-500:]!r}"
    if lost := lost_if_done(case):
        return f"after the next run: {lost}"
    left = [path.name for path in case.box.rglob("*") if re.search(r"^\.|\.tmp$", path.name)]
    left = [name for name in left if not name.endswith(".lock")]
    return f"leftovers: {', '.join(left)}" if left else None


def disturb(case: Case, fault: str, call: int) -> tuple[str | None, str]:
    """(what a fault at a call loses or None, the name of the call or "" if it was not reached)."""
    reset(case)
    code, output, calls = run(case, fault, call)
    fired = next((line.lstrip("*") for line in calls if line.startswith("*")), "")
    killed = fault in ("kill", "torn") and bool(fired)
    lost = None
    if killed and code != -signal.SIGKILL:
        lost = f"exit code {code} of a killed run"
    elif not killed:
        lost = lost_at_once(case, fault, code, output)
    state = digests(case.box)
    lost = lost or half_written(case, state)
    if fault in ("sigterm", "sigint") and code and case.script == "train":
        lost = lost or steps_lost(case)
    if set(os.listdir(case.box)) - {"out", ".out.lock", ".out.exporting", ".out.replaced"}:
        lost = lost or f"other files in the current folder: {os.listdir(case.box)}"
    if not lost:
        key = hash(tuple(sorted(state.items())))
        if key not in case.continued:
            case.continued[key] = lost_at_last(case)
        lost = case.continued[key]
    return lost, fired


def kill_randomly(case: Case, n: int, rng: random.Random) -> Iterator[str | None]:
    """Kills at random moments, continues, and compares at the end, until it has killed `n` times.

    Several `ranks` share the work; one of them is killed at a time. Yields the losses.
    """
    hits = 0
    while hits < n:
        reset(case)
        running: dict[int, int] = {}
        done = False
        while hits < n and not done:
            for rank in range(case.ranks):
                if rank not in running:
                    ranks = {"rank": rank, "world_size": case.ranks} if case.ranks > 1 else {}
                    running[rank] = start(case, **ranks)
            time.sleep(rng.uniform(0, 1.2 * case.seconds / case.ranks))
            process = running.pop(rng.choice(sorted(running)))
            os.kill(process, signal.SIGKILL)
            code = wait(process)
            hits += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                yield f"exit code {code} without a fault: {(case.box.parent / 'output').read_text()}"
            done = code == 0 and (case.ranks == 1 or (case.box / "out/manifest.json").exists())
        for process in running.values():
            if code := wait(process):
                yield f"exit code {code} without a fault: {(case.box.parent / 'output').read_text()}"
        yield lost_at_last(case)


def chosen(case: Case, calls: list[str], config: Any, rng: random.Random) -> list[tuple[int, str]]:
    """The calls and faults that are tried: all of them, a sample, or those of the settings."""
    pairs = []
    names = config.fault.split(",") if config.fault else list(FAULTS)
    for number, line in enumerate(calls, start=1):
        name = line.split()[0]
        for i, fault in enumerate(names):
            skip = fault == "torn" and name not in WRITES
            skip |= fault in ("enospc", "full") and name in NEED_NO_SPACE
            skip |= fault == "delay" and not case.threads
            skip |= fault != "kill" and (number + i) % case.every > 0 and not config.call
            if not skip and config.call in (0, number):
                pairs.append((number, fault))
    return sorted(rng.sample(pairs, min(config.sample, len(pairs)))) if config.sample else pairs


def work(config: Any) -> None:
    """Does a worker's share of each case; prints a JSON line for each loss and each case."""
    import torch

    torch.set_num_threads(1)
    source, rng = Path(config.inputs), random.Random(config.seed)
    names = config.case.split(",") if config.case else []
    for case in cases(source, config.kills):
        if names and case.name not in names:
            continue
        started = time.perf_counter()
        before = {p: p.stat().st_mtime_ns for p in source.glob("[!w]*")}
        calls = set_up(case, source / f"worker-{config.worker}")
        row = {"case": case.name, "calls": len(calls), "faults": {}, "lost": 0}

        def count(fault: str, lost: str | None, where: str = "", row: dict = row) -> None:
            row["faults"][fault] = row["faults"].get(fault, 0) + 1
            row["lost"] += lost is not None
            if lost:
                print(json.dumps({"loss": f"--case={row['case']!r} {where}: {lost}"}), flush=True)

        pairs = chosen(case, calls, config, rng)
        for number, fault in [] if case.kills else pairs:
            if number % config.processes == config.worker:
                lost, name = disturb(case, fault, number)
                count(fault, lost, f"--fault={fault} --call={number} ({name})")
        for lost in kill_randomly(case, case.kills // config.processes, rng):
            count("killed runs", lost, "killed at random")
        after = {p: p.stat().st_mtime_ns for p in source.glob("[!w]*")}
        if before != after:
            count("inputs", "an input was changed")
        row["seconds"] = time.perf_counter() - started
        print(json.dumps(row), flush=True)


def build_hook(directory: Path) -> Path:
    """Compiles fault_hook.c; UserError where that, or the harness, does not work."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or not compiler:
        raise UserError("faults.py needs Linux and a C compiler")
    library = directory / "hook.so"
    source = str(Path(__file__).with_name("fault_hook.c"))
    command = [compiler, "-shared", "-fPIC", "-O1", source, "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return library


def main(argv: list[str] | None = None) -> int:
    from fake_hub import FakeHub

    config = config_from_constants(globals(), argv)
    if config.worker >= 0:
        work(config)
        return 0
    with tempfile.TemporaryDirectory() as name, FakeHub() as hub:
        directory = Path(name).resolve()
        library = build_hook(directory)
        make_inputs(directory, random.Random(config.seed))
        files = {path.name: path.read_bytes() for path in (directory / "source").iterdir()}
        patterns = [{"split": "train", "path": "*"}]
        card = {"configs": [{"config_name": "sample-10BT", "data_files": patterns}]}
        hub.add("datasets", "owner/texts", files, card)
        environment = os.environ | {"LD_PRELOAD": str(library), "HF_ENDPOINT": hub.url}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(directory / "worker-hf")}
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
        workers = [
            subprocess.Popen(
                [*command, f"--worker={i}", f"--inputs={directory}"],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(config.processes)
        ]
        rows: dict[str, dict] = {}
        threads = [threading.Thread(target=collect, args=(w.stdout, rows)) for w in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = any([worker.wait() for worker in workers])
    print(f"\n{'case':20}{'calls':>6}{'runs':>6}{'lost':>6}{'s':>6}  faults")
    for row in rows.values():
        runs, faults = (
            sum(row["faults"].values()),
            ", ".join(f"{n} {f}" for f, n in row["faults"].items()),
        )
        print(
            f"{row['case']:20}{row['calls']:6}{runs:6}{row['lost']:6}{row['seconds']:6.0f}  {faults}"
        )
    return 1 if failed or any(row["lost"] for row in rows.values()) else 0


def collect(lines: Any, rows: dict[str, dict]) -> None:
    """Adds a worker's counts to `rows`, prints its losses."""
    for line in lines:
        row = json.loads(line)
        if "loss" in row:
            print(f"LOST {row['loss']}", flush=True)
        elif row["case"] not in rows:
            rows[row["case"]] = row
        else:
            total = rows[row["case"]]
            for name, n in row["faults"].items():
                total["faults"][name] = total["faults"].get(name, 0) + n
            total["lost"] += row["lost"]
            total["seconds"] += row["seconds"]


if __name__ == "__main__":
    run_script(main)
