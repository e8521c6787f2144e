"""Speed of training, optimizers, data preparation and decoding: ours and peers, timed in turn.

    python benchmark.py                          # every section; on two CPU cores eight minutes
    python benchmark.py --section=train,decode   # some of train, optimizer, data, decode
    python benchmark.py --readme                 # no measurement: benchmarks/README.md from results

Each table has medians and ranges after a warm-up, speed relative to a baseline, and the share of
the limit of this machine, measured in the same run. Every run adds a line to
benchmarks/results.jsonl. Peers are optional (requirements/bench.txt). Run nothing else at the same
time.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import dataclasses
import importlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.inputs import model_config
from benchmarks.learning_plot import study_table
from benchmarks.timing import free_memory, limits
from common.errors import UserError
from common.files import atomic_file
from common.settings import config_from_constants, run_script
from training.setup import choose_device, make_folder

section = "all"  # or some of train, optimizer, data, decode, with commas between
rounds = 4  # timed samples of each implementation, after one that is not counted
device = "auto"  # "cuda" or "cpu"
dtype = "auto"  # "bfloat16" or "float32" on CUDA; float32 on a CPU
compile = False  # CPU: also torch.compile, which takes minutes. CUDA: also max-autotune

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
source = ""  # Parquet files with FineWeb's columns; "": made of the Python library's source code
repeats = 3  # how many times each file

# decode
prompt_tokens = 16
new_tokens = 64  # of each answer
exports = False  # also onnxruntime and llama.cpp; writing their files takes a minute or two

# results
save = True  # append to the results; False: only print
results = ""  # "": benchmarks/results.jsonl
readme = False  # no measurement: write the README.md beside the results

DEVICES, DTYPES = ("auto", "cuda", "cpu"), ("auto", "bfloat16", "float32")
# Imported when run: `data` needs pyarrow, which a machine that only trains may not have.
SECTIONS = {
    "train": "benchmarks.training_step",
    "optimizer": "benchmarks.optimizer",
    "data": "benchmarks.tokenizing",
    "decode": "benchmarks.decoding",
}


def check_settings(config: Any) -> list[str]:
    """The sections to run; UserError for settings that cannot be."""
    names = config.section.replace(" ", "").split(",")
    names = list(SECTIONS) if names == ["all"] else names
    for name in names:
        if name not in SECTIONS:
            raise UserError(f"section={name!r}: expected all, or some of {','.join(SECTIONS)}")
    smallest = dict.fromkeys(("rounds", "repeats", "prompt_tokens", "new_tokens"), 1)
    smallest |= {"batch_size": 0, "gradient_accumulation_steps": 0, "block_size": 2}
    for name, least in smallest.items():
        if (value := getattr(config, name)) < least:
            raise UserError(f"{name}={value} must be at least {least}")
    for name, allowed in (("device", DEVICES), ("dtype", DTYPES)):
        if getattr(config, name) not in allowed:
            raise UserError(f"{name}={getattr(config, name)!r} must be one of {', '.join(allowed)}")
    if "decode" in names and config.prompt_tokens + config.new_tokens > config.block_size:
        raise UserError(
            f"new_tokens={config.new_tokens} after a prompt of {config.prompt_tokens} do not fit "
            f"into block_size={config.block_size}: lower it"
        )
    try:
        model_config(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    return [name for name in SECTIONS if name in names]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config = config_from_constants(globals(), argv)
    path = Path(config.results) if config.results else report.RESULTS
    if config.readme:
        study = study_table(report.read_records(path.with_name("learning.jsonl")))
        with atomic_file(path.with_name("README.md")) as file:
            file.write(report.readme_text(report.read_records(path), study).encode())
        return 0
    names = check_settings(config)
    device, dtype = choose_device(config)
    if device.type == "mps":
        device = torch.device("cpu")
    if config.save:
        make_folder(path.parent)  # now rather than after the measurements
    config = dataclasses.replace(config, device=device.type, dtype=str(dtype)[6:])
    torch.manual_seed(0)
    report.reset()
    record = report.environment(argv, device)
    bounds = limits(device)
    rates = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in bounds.matmul_rate.items())
    copy, read = bounds.copy_bandwidth / 1e9, bounds.read_bandwidth / 1e9
    print(f"{report.hardware_name(record)}, torch {torch.__version__}, {config.dtype}")
    print(f"copy {copy:.1f} GB/s, read {read:.1f} GB/s, matrix product {rates}")
    if record["load"] is not None and record["load"] > 0.3 * (os.cpu_count() or 1):
        print(f"note: other programs run here (load {record['load']}): times do not hold")
    seconds: dict[str, float] = {}
    failures: list[str] = []
    try:
        for name in names:
            started = time.perf_counter()
            try:
                importlib.import_module(SECTIONS[name]).run(config, device)
            except (UserError, ImportError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                failures.append(name)
            except Exception:  # the other sections go on: their measurements are kept
                traceback.print_exc()
                failures.append(name)
            free_memory(device)
            seconds[name] = round(time.perf_counter() - started, 1)
            print(f"\n{name} took {seconds[name]:.0f} s", flush=True)
    finally:  # tables are kept, whatever ends the run
        if config.save and report.tables:
            record |= {"limits": dataclasses.asdict(bounds), "seconds": seconds}
            report.append_record(path, report.rounded(record | {"tables": report.tables}))
            print(f"\nadded to {path}")
    if failures:
        print(f"not finished, see above: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run_script(main)
