"""Every speed claim of this project, measured: ours and its peers in turn, in one process.

    python benchmark.py                            # every section; on two CPU cores eight minutes
    python benchmark.py --section=decode,packing   # train, optimizer, data, decode, packing
    python benchmark.py --readme=True              # no measurement: the README's table from results
    python benchmark.py --plot=True                # ... and benchmarks/results.png

Each table has medians and ranges after a warm-up, how many times as fast as the table's first each
contestant is, and what share that is of what this machine can do at most, measured in the same run.
Every run adds a line to benchmarks/results.jsonl. Peers are optional (requirements/bench.txt). Run
nothing else at the same time.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoding, optimizer, packing, report, timing, tokenizing, training_step
from benchmarks.decoding import PROMPT
from benchmarks.inputs import SHAPE
from common.errors import UserError
from common.settings import config_from_constants, run_script
from model import GPTConfig
from training.setup import choose_device, make_folder

section = "all"  # or some of train, optimizer, data, decode, packing, with commas between
rounds = 4  # timed samples of each contestant, after one that is not counted
device = "auto"  # "cuda" or "cpu"
dtype = "auto"  # "bfloat16" or "float32" on CUDA; float32 on a CPU
compile = False  # on a CPU also torch.compile, of ours and the peers; minutes. On CUDA always

# The model; the defaults are Lille 130M
n_layers = 24
n_embd = 640
n_heads = 10
n_kv_heads = 2
block_size = 512

# train
batch_size = 0  # rows of a micro-batch; 0: 2 on a CPU, 16 on CUDA
gradient_accumulation_steps = 0  # micro-batches of a step; 0: 1 on a CPU, 16 on CUDA

# data
source = ""  # Parquet files in FineWeb's columns; "": made of the Python library's source code
repeats = "1 3"  # how many times each file, one table for each number
filters = False  # True: as prepare_dataset_fineweb.py sets them; False: all text is kept

# decode
new_tokens = 64  # of each answer
exports = False  # also onnxruntime and llama.cpp; writing their files takes a minute or two

# packing
data_dir = ""  # also shards that prepare_dataset*.py wrote
n_documents = 20_000  # made up, of the lengths that FineWeb-Edu has
n_planned = 2_000_000  # documents whose plan is timed

# results
save = True  # append to the results; False: only print
results = ""  # "": benchmarks/results.jsonl
readme = False  # no measurement: write the README's table
plot = False  # no measurement: draw benchmarks/results.png


DEVICES, DTYPES = ("auto", "cuda", "cpu"), ("auto", "bfloat16", "float32")
SECTIONS: dict[str, Callable[[Any, torch.device], None]] = {
    "train": training_step.run,
    "optimizer": optimizer.run,
    "data": tokenizing.run,
    "decode": decoding.run,
    "packing": packing.run,
}


def check(config: Any) -> list[str]:
    """The chosen sections; UserError for settings that cannot be."""
    known = list(SECTIONS)
    chosen = known if config.section == "all" else config.section.replace(" ", "").split(",")
    for name in chosen:
        if name not in known:
            raise UserError(f"section={name!r}: expected all, or some of {','.join(known)}")
    for name in ("rounds", "new_tokens", "n_documents", "n_planned"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1")
    for name in ("batch_size", "gradient_accumulation_steps"):
        if getattr(config, name) < 0:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1, or 0 to choose")
    if config.block_size < 2:
        raise UserError(f"block_size={config.block_size} must be at least 2")
    numbers = config.repeats.split()
    if not numbers or not all(number.isdecimal() and int(number) for number in numbers):
        raise UserError(f"repeats={config.repeats!r} must be whole numbers such as '1 3'")
    for name, allowed in (("device", DEVICES), ("dtype", DTYPES)):
        if getattr(config, name) not in allowed:
            raise UserError(f"{name}={getattr(config, name)!r} must be one of {', '.join(allowed)}")
    if "decode" in chosen and PROMPT + config.new_tokens > config.block_size:
        raise UserError(
            f"new_tokens={config.new_tokens} after a prompt of {PROMPT} do not fit into "
            f"block_size={config.block_size}: lower it"
        )
    try:
        GPTConfig(**{name: getattr(config, name) for name in SHAPE})
    except ValueError as error:
        raise UserError(str(error)) from None
    return [name for name in known if name in chosen]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config = config_from_constants(globals(), argv)
    path = Path(config.results) if config.results else report.RESULTS
    if config.readme or config.plot:
        if config.readme:
            report.write_readme(path, report.ROOT / "README.md")
        if config.plot:
            report.plot(path, path.with_suffix(".png"))
        return 0
    chosen = check(config)
    where, kind = choose_device(config)
    if where.type == "mps":
        where = torch.device("cpu")
    if config.save:
        make_folder(path.parent)  # now rather than after the measurements
    config = dataclasses.replace(config, device=where.type, dtype=str(kind)[6:])
    torch.manual_seed(0)
    timing.begin()
    environment = report.environment(argv, where)
    limits = timing.limits(where)
    rates = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in limits.matmul_rate.items())
    copied, read = limits.copy_bandwidth / 1e9, limits.read_bandwidth / 1e9
    print(f"{report.place(environment)}, torch {torch.__version__}, {config.dtype}")
    print(f"copy {copied:.1f} GB/s, read {read:.1f} GB/s, matrix product {rates}")
    busy = environment["load"]
    if busy is not None and busy > 0.3 * (os.cpu_count() or 1):
        print(f"note: other programs run here (load {busy}): ratios may hold, times do not")
    seconds: dict[str, float] = {}
    failed: list[str] = []
    try:
        for name in chosen:
            started = time.perf_counter()
            try:
                SECTIONS[name](config, where)
            except UserError as error:
                print(f"{name}: {error}", file=sys.stderr)
                failed.append(name)
            except Exception:  # the other sections go on: what they measure is kept
                traceback.print_exc()
                failed.append(name)
            timing.free(where)
            seconds[name] = time.perf_counter() - started
            print(f"\n{name} took {seconds[name]:.0f} s", flush=True)
        if len(chosen) > 1:
            print(f"all together {sum(seconds.values()):.0f} s")
    finally:  # what is measured is kept, whatever ends the run
        if config.save and timing.tables:
            report.record(path, environment, seconds, where)
    if failed:
        print(f"not finished, see above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
