"""Kills the scripts at each of their file-system calls, runs them again, compares the results.

    python tests/faults.py                        # all of it, `make faults`
    python tests/faults.py --sample=10 --kills=3  # ten faults of each case, three random kills
    python tests/faults.py --case=train --fault=full --call=17   # one run, as a loss names it

Each run has one fault at one call that changes a file below the output folder (fault_hook.c counts
them): a kill at every call, the other faults in rotation, at every first to eighth call. After it
nothing may be lost or half-written, and the error is one line; then the same command runs
undisturbed and must end with the same files, but for times, as a run that never had a fault.
Besides, training, preparation and evaluation are killed at random moments. Prints a table and every
loss; exits with 1 for any.

For speed two workers import everything once and fork a child for each run, and a state of the
folder that an earlier fault led to is not continued again. Linux only, with a C compiler; a TMPDIR
in memory saves the time of fsync.
"""

import ctypes
import errno
import faulthandler
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
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script this folder is first, the project is its parent

from fake_hub import FakeHub  # noqa: E402
from tiny import FINEWEB, TINY, contents, difference, make_source, newest, text  # noqa: E402

from common.errors import UserError  # noqa: E402
from common.settings import config_from_constants, run_script  # noqa: E402

case = ""  # names of cases, separated by commas; "": all
fault = ""  # names of faults, separated by commas; "": all
call = 0  # number of the call; 0: all
every = 0  # faults other than "kill" at each `every`th call only; 0: as the case's time allows
sample = 0  # faults of each case, drawn at random; 0: all
kills = 100  # of training at random moments, of preparation, and a third as many of evaluation
seed = 0  # of the sample and the moments
workers = 2  # processes that share the cases
inputs = ""  # for the workers alone: the folder that they share

FAULTS = {  # name: action and argument of the hook
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
EXIT_CODES = {  # the hook's action: exit codes that are right
    "k": (-signal.SIGKILL,),
    "t": (-signal.SIGKILL,),
    "e": (0, 1, 2),
    "f": (0, 1, 2),
    "d": (0,),
    "s": (0, 130, 143, -signal.SIGTERM, -signal.SIGINT),
}
TIMEOUT = 300  # seconds until a run counts as hanging
WORKER = [sys.executable, __file__]


@dataclass
class Case:
    """A command, how it is disturbed, and what it gives undisturbed. Its output is "out"."""

    name: str
    script: str
    settings: dict[str, Any]
    earlier: dict[str, Any] | None = None  # settings of an earlier run, whose result is replaced
    imports: tuple[str, ...] = ()  # before the fork, for speed
    every: int = 1  # a fault other than "kill" is tried at each `every`th call
    kills: int = 0  # at random moments, in place of faults
    ranks: int = 1  # processes that share the work then
    box: Path = Path()  # the current folder of the runs; beside it "old", "new", "output", "calls"
    old: dict[str, str] = field(default_factory=dict)  # digests of its files before a run
    new: dict[str, str] = field(default_factory=dict)  # and after an undisturbed one
    seconds: float = 0  # that it takes
    continued: dict[int, str | None] = field(default_factory=dict)  # losses, by state of the box
    whole: set[str] = field(default_factory=set)  # digests of checkpoints that could be loaded


def make_cases(inputs: Path, n_kills: int) -> list[Case]:
    """The cases, the slowest ones first."""
    train = TINY | {"data_dir": inputs / "shards", "out_dir": "out"}
    few_steps = train | {"max_steps": 4, "keep_checkpoints": 1}
    many_steps = train | {"max_steps": 12, "eval_interval": 1, "average_last": 0.5}
    many_steps |= {"data_dir": f"{inputs / 'shards'}, {inputs / 'more'}:1.5"}
    local = {"input_file_path": inputs / "input.txt", "val_split": 0.1, "output_dir": "out"}
    web = FINEWEB | {"val_split": 0.1, "shard_size": 10_000, "output_dir": "out"}
    two, twelve = web | {"source": inputs / "2"}, web | {"source": inputs / "12"}
    hub = web | {"source": "owner/texts", "revision": "main"}
    export = {"model": inputs / "new.pt", "output_dir": "out"}
    gguf = export | {"format": "gguf", "output_dir": "out/model.gguf"}
    older = {"model": inputs / "old.pt"}
    judged = {"model": inputs / "long.pt", "baseline": inputs / "longer.pt", "limit": 24}
    judged |= {"judge": inputs / "long.pt", "judge_workers": 1, "row_tokens": 64}
    judged |= {"data_dir": inputs / "tasks", "out_dir": "out", "max_new_tokens": 4}
    hf, onnx = export | {"format": "hf"}, export | {"format": "onnx"}

    llama = ("transformers.models.llama.modeling_llama", "accelerate")
    figure = ("matplotlib.figure", "matplotlib.backends.backend_agg")
    parquet, fineweb = (
        ("gigatoken", "awkward", "pyarrow.parquet", "pandas"),
        "prepare_dataset_fineweb",
    )
    cases = [
        Case("train", "train", few_steps, None, figure, every=2),
        Case("onnx", "export", onnx, onnx | older, (*llama, "onnxscript"), every=8),
        Case("gguf", "export", gguf, gguf | older, (*llama, "gguf"), every=6),
        Case("fineweb", fineweb, two, None, parquet, every=3),
        Case("hub", fineweb, hub, None, parquet, every=6),
        Case("hf", "export", hf, hf | older, llama, every=2),
        Case("prepare", "prepare_dataset", local, local | {"seed": 1}, parquet),
    ]
    if n_kills:
        third = -(-n_kills // 3)
        for name in ("sophiag", "adamw", "muon"):
            settings = many_steps | {"optimizer": name}
            cases.append(Case(f"kill-{name}", "train", settings, None, figure, kills=third))
        cases += [
            Case("kill-fineweb", fineweb, twelve, None, parquet, kills=third),
            Case("kill-fineweb-by-3", fineweb, twelve, None, parquet, kills=third, ranks=3),
            Case("kill-hub", fineweb, hub, None, parquet, kills=third),
            Case("kill-evaluate", "evaluate", judged, None, figure, kills=third),
        ]
    return cases


def make_inputs(directory: Path, rng: random.Random) -> None:
    """Text, shards, Parquet files, tasks, and checkpoints to export and to evaluate."""
    import prepare_dataset
    import train

    for name, folder in {"input.txt": "shards", "more.txt": "more"}.items():
        (directory / name).write_text(text(rng, 60), "utf-8")
        arguments = [f"--input_file_path={directory / name}", "--val_split=0.1"]
        assert prepare_dataset.main([*arguments, f"--output_dir={directory / folder}"]) == 0
    for n in (2, 12):
        make_source(directory / str(n), n, rng, 200)
    make_tasks(directory / "tasks", rng)
    sizes = {"old": (1, 32), "new": (2, 32), "long": (1, 512), "longer": (2, 512)}
    for name, (n, block_size) in sizes.items():
        settings = TINY | {"data_dir": directory / "shards", "max_steps": n, "warmup_iters": 1}
        settings |= {"block_size": block_size}
        arguments = [f"--{k}={v}" for k, v in (settings | {"out_dir": directory / name}).items()]
        assert train.main(arguments) == 0
        os.replace(directory / name / "best_model.pt", directory / f"{name}.pt")


def make_tasks(directory: Path, rng: random.Random) -> None:
    """Tasks that are scored, answered in words and judged."""
    words, tasks = text(rng, 40).split(), {"choices": [], "sums": [], "essays": []}
    for _ in range(24):
        context, *choices = (f" {' '.join(rng.choices(words, k=6))}" for _ in range(4))
        tasks["choices"].append({"context": context, "choices": choices, "answer": 1})
        tasks["sums"].append({"question": context, "answer": "rain"})
        tasks["essays"].append({"prompt": context, "gold": choices[0]})
    directory.mkdir()
    for name, items in tasks.items():
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)), "utf-8")


def start(case: Case, fault: str = "", call: int = 0, **changes: Any) -> int:
    """The process id of a forked child that runs the command, with a fault at a call."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        os.chdir(case.box)
        output = os.open("../output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), output, output]):
            os.dup2(descriptor, number)
        faulthandler.dump_traceback_later(TIMEOUT - 5)  # a run that hangs says where
        action, argument = FAULTS.get(fault, ("-", 0))
        arguments = [f"--{k}={v}" for k, v in (case.settings | changes).items()]
        main = import_module(case.script).main
        paths = os.fsencode(case.box), os.fsencode(case.box.parent / "calls")
        ctypes.CDLL(None).fault_arm(*paths, call, ord(action), argument)
        try:
            run_script(lambda: main(arguments))
        except SystemExit as exit:
            code = exit.code
        threading._shutdown()  # as at the end of a script: waits for the threads
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def wait(pid: int) -> int | str:
    """The exit code of a child, negative for a signal; "hangs" if it is stopped at last."""
    descriptor = os.pidfd_open(pid)
    ended, _, _ = select.select([descriptor], [], [], TIMEOUT)
    os.close(descriptor)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if ended else "hangs"


def run(case: Case, fault: str = "", call: int = 0) -> tuple[int | str, str, list[str]]:
    """(exit code, output, calls) of a run."""
    code, folder = wait(start(case, fault, call)), case.box.parent
    output = (folder / "output").read_text("utf-8", "replace")
    return code, output, (folder / "calls").read_text("utf-8").splitlines()


def set_up(case: Case, directory: Path) -> list[str]:
    """Makes the folders of a case and runs its command undisturbed; returns its calls."""
    case.box = directory / "box"
    case.box.mkdir(parents=True)
    for name in (case.script, *case.imports):
        import_module(name)
    if case.earlier:
        code, output, _ = run(replace(case, settings=case.earlier))
        assert code == 0, output
    shutil.copytree(case.box, directory / "old")
    started = time.perf_counter()
    code, output, calls = run(case)
    assert code == 0, output
    case.seconds = time.perf_counter() - started
    case.old, case.new = digests(directory / "old"), digests(case.box)
    shutil.copytree(case.box, directory / "new")
    # The hook saw all writes: they have at least the bytes of the files (a linked one counts once).
    stats = [path.stat() for path in case.box.rglob("*") if path.is_file()]
    size = sum({stat.st_ino: stat.st_size for stat in stats}.values())
    assert sum(int(line.split()[1]) for line in calls) >= size, f"{case.name}: unseen writes"
    return calls


def digests(folder: Path) -> dict[str, str]:
    """`contents`, hashed; speeds and times left out."""
    times = rb'"(tokens_per_second|date|seconds|load)": [^,}]*'
    return {
        name: hashlib.blake2b(
            re.sub(times, b"", content) if "jsonl" in name else content
        ).hexdigest()
        for name, content in contents(folder).items()
    }


def visible(files: dict[str, str]) -> dict[str, str]:
    """Those of the files that are neither temporary nor in a staging folder."""
    return {name: files[name] for name in files if not re.search(r"(^|/)\.|\.tmp$", name)}


def differs(case: Case) -> str | None:
    """How the result differs from that of an undisturbed run; None if it does not."""
    if case.script != "train":
        ours = visible(digests(case.box))
        names = [name for name in {**ours, **case.new} if ours.get(name) != case.new.get(name)]
        return f"other files: {', '.join(names)}" if names else None
    from checkpoint import load_checkpoint

    ours, theirs = case.box / "out", case.box.parent / "new/out"
    for name in (newest(theirs).name, "best_model.pt"):
        if not (ours / name).exists():
            return f"{name} is missing"
        if (ours / name).read_bytes() != (theirs / name).read_bytes():
            where = difference(*(load_checkpoint(folder / name) for folder in (ours, theirs)), name)
            if where:
                return f"other values: {where}"
    return None


def half_written(case: Case, state: dict[str, str]) -> str | None:
    """A file or dataset that could be taken for whole and is not; None if there is none."""
    from checkpoint import load_checkpoint
    from common.manifest import read_manifest
    from dataset import open_split

    out, final = case.box / "out", visible(state)
    if final in (case.old, case.new):
        return None
    if case.script == "evaluate":  # files of lines grow, the last one may be torn; others are whole
        parts = [n for n in final if not n.endswith(".jsonl") and final[n] != case.new.get(n)]
        return f"{parts[0]} is half-written" if parts else None
    if case.script == "export":
        moved = {n.replace(".out.replaced", "out"): d for n, d in state.items() if "replaced" in n}
        if moved == case.old and not final:  # between two renames, of which the next run knows
            return None
        return f"neither the old nor the new export: {', '.join(final)}"
    try:
        if case.script == "train":
            for name in final:
                if name.endswith(".pt") and final[name] not in case.whole:
                    load_checkpoint(case.box / name)
                    case.whole.add(final[name])
            return None
    except UserError as error:
        return str(error)
    for name, digest in final.items():
        if digest not in (case.old.get(name), case.new.get(name)) and name != "out/manifest.json":
            return f"{name} is half-written"
    try:
        read_manifest(out)
        for split in ("train", "val"):
            open_split(out, split)
    except UserError:
        return None
    shards, old, new = (
        {name: files[name] for name in files if name.endswith(".npz")}
        for files in (final, case.old, case.new)
    )
    return None if shards in (old, new) else f"a mixed dataset can be read: {', '.join(final)}"


def steps_lost(out: Path) -> str | None:
    """The steps that an interrupted training run has logged and not saved."""
    from checkpoint import load_checkpoint

    log, saved = out / "metrics.jsonl", newest(out)
    rows = log.read_text("utf-8").splitlines() if log.exists() else []
    reached = json.loads(rows[-1])["step"] if rows else 0
    step = load_checkpoint(saved)["iter_num"] if saved else 0
    return f"step {reached} was reached, step {step} saved" if step < reached else None


def lost_at_once(case: Case, fault: str, code: int | str, output: str) -> str | None:
    """What is wrong directly after a run with a fault; None for nothing."""
    action = FAULTS[fault][0]
    n_errors = len(re.findall("^error:", output, re.MULTILINE))
    if code not in EXIT_CODES[action] or (code in (1, 2) and n_errors != 1):
        return f"exit code {code}: {output[-1000:]!r}"
    if re.search("Traceback|Exception ignored", output):
        return f"exit code {code} with a traceback: {output[-400:]!r}"
    if code == 0:
        return differs(case)
    if action == "s" and case.script == "train":
        return steps_lost(case.box / "out")
    return None


def lost_at_last(case: Case) -> str | None:
    """What is lost when the same command ran again, undisturbed; None for nothing."""
    code, output, _ = run(case)
    if code != 0:
        return f"the next run: exit code {code}: {output[-1000:]!r}"
    if difference := differs(case):
        return f"the next run: {difference}"
    left = [path.name for path in case.box.rglob("*") if re.search(r"^\.|\.tmp$", path.name)]
    left = [name for name in left if not name.endswith(".lock")]
    return f"the next run: leftovers {', '.join(left)}" if left else None


def reset(case: Case) -> None:
    shutil.rmtree(case.box, ignore_errors=True)
    shutil.copytree(case.box.parent / "old", case.box)


def disturb(case: Case, fault: str, call: int) -> tuple[str | None, str]:
    """(what a fault at a call loses or None, that call or "" if the run did not reach it)."""
    reset(case)
    code, output, calls = run(case, fault, call)
    reached = next((line[1:] for line in calls if line.startswith("*")), "")
    if not reached:
        return (None if code == 0 else f"exit code {code} without a fault: {output}"), ""
    state = digests(case.box)
    lost = lost_at_once(case, fault, code, output) or half_written(case, state)
    others = set(os.listdir(case.box)) - {"out", ".out.lock", ".out.exporting", ".out.replaced"}
    if others:
        lost = lost or f"other files beside the output: {', '.join(others)}"
    key = hash(tuple(sorted(state.items())))
    if key not in case.continued:
        case.continued[key] = lost_at_last(case)
    return lost or case.continued[key], reached


def kill_randomly(case: Case, rng: random.Random) -> Iterator[str | None]:
    """Kills at random moments, starts again, compares at the end, and so on: yields the losses.

    Of several `ranks` that share the work one is killed at a time.
    """
    hits = 0
    while hits < case.kills:
        reset(case)
        running: dict[int, int] = {}
        codes: set[int | str] = set()
        while hits < case.kills and 0 not in codes:
            for rank in set(range(case.ranks)) - set(running):
                ranks = {"rank": rank, "world_size": case.ranks} if case.ranks > 1 else {}
                running[rank] = start(case, **ranks)
            time.sleep(rng.uniform(0, 1.2 * case.seconds / case.ranks))
            pid = running.pop(rng.choice(sorted(running)))
            os.kill(pid, signal.SIGKILL)
            codes.add(wait(pid))
            hits += 0 not in codes
            yield None
        codes |= {wait(pid) for pid in running.values()}
        if codes - {0, -signal.SIGKILL}:
            yield f"exit codes {codes}: {(case.box.parent / 'output').read_text('utf-8')}"
        yield lost_at_last(case)


def choose(case: Case, calls: list[str], config: Any, rng: random.Random) -> list[tuple[int, str]]:
    """The calls and faults to try."""
    pairs, every = [], config.every or case.every
    for number, line in enumerate(calls, start=1):
        for i, fault in enumerate(FAULTS):
            name = line.split()[0]
            skip = fault == "torn" and name not in WRITES
            skip |= FAULTS[fault][1] == errno.ENOSPC and name in NEED_NO_SPACE
            skip |= fault == "delay" and case.script in ("export", "prepare_dataset")  # no threads
            thinned = fault != "kill" and (number + i) % every > 0  # killed at every call
            skip |= thinned if not config.call else number != config.call
            skip |= config.fault != "" and fault not in config.fault.split(",")
            if not skip:
                pairs.append((number, fault))
    return sorted(rng.sample(pairs, min(config.sample, len(pairs)))) if config.sample else pairs


def work(config: Any) -> None:
    """Takes cases that no other worker has; prints a JSON line for each loss and each case."""
    import torch

    torch.set_num_threads(1)
    folder = Path(config.inputs)
    for case in make_cases(folder / "inputs", config.kills):
        try:
            if not config.case or case.name in config.case.split(","):
                (folder / case.name).mkdir()
            else:
                continue
        except FileExistsError:
            continue
        started, before = time.perf_counter(), digests(folder / "inputs")
        calls = set_up(case, folder / case.name)
        counts: Counter[str] = Counter()
        rng = random.Random(f"{config.seed} {case.name}")

        def count(fault: str, lost: str | None, where: str, case=case, counts=counts) -> None:
            counts.update([fault] + ["lost"] * bool(lost))
            if lost:
                print(json.dumps(f"--case={case.name!r} {where}: {lost}"), flush=True)

        if case.kills:
            for lost in kill_randomly(case, rng):
                count("random kill", lost, "killed at random")
        else:
            for number, fault in choose(case, calls, config, rng):
                lost, reached = disturb(case, fault, number)
                count(fault, lost, f"--fault={fault} --call={number} ({reached})")
        if digests(folder / "inputs") != before:
            count("input", "an input was changed", "")
        seconds = time.perf_counter() - started
        print(json.dumps([case.name, len(calls), counts, seconds]), flush=True)


def build_hook(directory: Path) -> Path:
    """Compiles fault_hook.c; UserError where that is not possible."""
    compiler, library = shutil.which("cc"), directory / "hook.so"
    if sys.platform != "linux" or not compiler:
        raise UserError("the faults need Linux and a C compiler: install one, such as gcc")
    source = Path(__file__).with_name("fault_hook.c")
    command = [compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return library


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    if config.inputs:
        work(config)
        return 0
    with tempfile.TemporaryDirectory() as name, FakeHub() as hub:
        directory = Path(name).resolve()
        hub.server.handle_error = lambda *args: None  # a killed client
        library = build_hook(directory)
        (directory / "inputs").mkdir()
        with open(os.devnull, "w") as devnull, redirect_stdout(devnull), redirect_stderr(devnull):
            make_inputs(directory / "inputs", random.Random(config.seed))
        files = {path.name: path.read_bytes() for path in (directory / "inputs/2").iterdir()}
        patterns = [{"split": "train", "path": "*"}]
        card = {"configs": [{"config_name": "sample-10BT", "data_files": patterns}]}
        hub.add("datasets", "owner/texts", files, card)
        environment = os.environ | {"LD_PRELOAD": str(library), "HF_ENDPOINT": hub.url}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(directory / "hf")}
        command = [*WORKER, *(sys.argv[1:] if argv is None else argv)]
        command.append(f"--inputs={directory}")
        output = {"env": environment, "stdout": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, **output) for _ in range(config.workers)]
        print(f"{'':26}{'calls':>6}{'runs':>6}{'losses':>7}{'time':>7}", flush=True)
        lost: list[str] = []
        readers = [threading.Thread(target=report, args=(p.stdout, lost)) for p in processes]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        failed = any([process.wait() for process in processes])
    return int(failed or bool(lost))


def report(lines: Any, lost: list[str]) -> None:
    """Prints the losses and cases that a worker sends, and appends the losses to `lost`."""
    for line in lines:
        if isinstance(message := json.loads(line), str):
            lost.append(message)
            print(f"LOST {message}", flush=True)
            continue
        name, n_calls, counts, seconds = message
        n_lost, n_runs = counts.pop("lost", 0), sum(counts.values())
        kinds = ", ".join(f"{n} {fault}" for fault, n in counts.items())
        row = f"{name:26}{n_calls:6}{n_runs:6}{n_lost:7}{seconds:6.0f}s"
        print(f"{row}  {kinds}", flush=True)


if __name__ == "__main__":
    run_script(main)
