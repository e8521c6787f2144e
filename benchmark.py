"""Speed of training, optimizers, tokenizers, decoding, evaluation: ours and peers, in turn.

    python benchmark.py                          # every section; on two CPU cores a quarter hour
    python benchmark.py --section=train,decode   # some of train, optimizer, data, decode, evaluate
    python benchmark.py --readme                 # no measurement: benchmarks/README.md from results

Each table has medians and ranges after a warm-up, speed relative to its first row, and the share of
the limit of this machine, measured in the same run. Every run adds a line to the results. Peers
are optional (requirements/bench.txt). Run nothing else at the same time.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import dataclasses
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoding, evaluating, optimizer, report, tokenizing, training_step
from benchmarks.inputs import model_config
from benchmarks.learning_plot import tables
from benchmarks.timing import free_memory, limits
from common import records
from common.errors import UserError
from common.files import atomic_file
from common.settings import chosen_names, config_from_constants, run_script
from training.setup import choose_device, make_folder

section = "all"  # "all", or some of SECTIONS, with commas between
rounds = 4  # timed samples of each implementation, after one that is not counted
device = "auto"  # "cuda" or "cpu"
dtype = "auto"  # "bfloat16" or "float32" on CUDA; float32 on a CPU
compile = False  # also torch.compile on a CPU, which takes minutes; always so on CUDA

# The model; the defaults are Lille 130M
n_layers = 24  # transformer blocks
n_embd = 640  # width
n_heads = 10  # query heads
n_kv_heads = 2  # key and value heads
block_size = 512  # context length, tokens

# train
batch_size = 0  # rows of a micro-batch; 0: 2 on a CPU, 16 on CUDA
gradient_accumulation_steps = 0  # micro-batches of a step; 0: 1 on a CPU, 16 on CUDA

# decode
prompt_tokens = 16  # tokens of each prompt
new_tokens = 64  # tokens of each answer
decode_rows = 8  # prompts that are answered at once; the other tables have one
long_prompt = 400  # tokens; the time to the first token of an answer to it
model = ""  # checkpoint or exported folder whose weights decode; "": random ones
text = ""  # text file on which the model's KL divergence from float32 is measured
exports = False  # also onnxruntime and llama.cpp; writing their files takes a minute or two

# results
results = "benchmarks/results.jsonl"  # "": only print
readme = False  # no measurement: write the README.md beside the results

RENAMED = {
    "save": "is gone: --results= (empty) only prints",
    "plot": "is gone: --readme writes all tables",
    **dict.fromkeys(("source", "repeats", "filters", "data_dir"), "is gone with its measurement"),
    **dict.fromkeys(("n_documents", "n_planned"), "is gone with its measurement"),
}
DEVICES, DTYPES = ("auto", "cuda", "cpu"), ("auto", "bfloat16", "float32")
SECTIONS = {
    "train": training_step.run,
    "optimizer": optimizer.run,
    "data": tokenizing.run,
    "decode": decoding.run,
    "evaluate": evaluating.run,
}


def check_settings(config: Any) -> list[str]:
    """The sections to run; UserError for invalid settings."""
    names = chosen_names("section", config.section, SECTIONS)
    for name in ("rounds", "prompt_tokens", "new_tokens", "decode_rows", "long_prompt"):
        if (value := getattr(config, name)) < 1:
            raise UserError(f"{name}={value} must be at least 1")
    for name, allowed in (("device", DEVICES), ("dtype", DTYPES)):
        if (value := getattr(config, name)) not in allowed:
            raise UserError(f"{name}={value!r} must be one of {', '.join(allowed)}")
    if "decode" in names:
        decoding.check_settings(config)
    try:
        model_config(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    return [name for name in SECTIONS if name in names]


def write_readme(path: Path) -> None:
    """Writes the README.md beside the results at `path`."""
    study = tables(records.read_records(path.with_name("learning.jsonl")))
    unseen = tables(records.read_records(path.with_name("learning_unseen.jsonl")))
    study |= {f"{title}, WikiText-2 and GSM8K, rates not tuned": unseen[title] for title in unseen}
    with atomic_file(path.with_name("README.md")) as file:
        file.write(report.readme_text(records.read_records(path), study).encode())


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config = config_from_constants(globals(), argv, renamed=RENAMED)
    path = Path(config.results)
    if config.readme:
        write_readme(path)
        return 0
    names = check_settings(config)
    device, dtype = choose_device(config)
    if device.type == "mps":
        device = torch.device("cpu")
    if config.results:
        make_folder(path.parent)  # now rather than after the measurements
    config = dataclasses.replace(config, device=device.type, dtype=str(dtype)[6:])
    torch.manual_seed(0)
    record = records.environment(["benchmark.py", *argv], device) | {"limits": limits(device)}
    rates = ", ".join(f"{name} {rate / 1e9:,.1f}e9/s" for name, rate in limits(device).items())
    print(f"{report.hardware_name(record)}, torch {torch.__version__}, {config.dtype}\n{rates}")
    if record["load"] is not None and record["load"] > 0.3 * (os.cpu_count() or 1):
        print(f"note: other programs run here (load {record['load']}): times do not hold")
    record |= {"seconds": {}, "tables": []}
    failures = []
    try:
        for name in names:
            started = time.perf_counter()
            try:
                for table in SECTIONS[name](config, device):
                    record["tables"].append({"section": name} | table)
                    cells = records.markdown_table(report.table_cells(table))
                    print(f"\n{name}: {table['title']}\n{cells}", flush=True)
            except Exception as error:  # the other sections go on: their measurements are kept
                if isinstance(error, UserError):
                    print(f"{name}: {error}", file=sys.stderr)
                else:
                    traceback.print_exc()
                failures.append(name)
            free_memory(device)
            record["seconds"][name] = round(time.perf_counter() - started, 1)
            print(f"\n{name} took {record['seconds'][name]:.0f} s", flush=True)
    finally:  # tables are kept, whatever ends the run
        if config.results and record["tables"]:
            records.append_record(path, record)
            print(f"\nadded to {path}")
    if failures:
        print(f"not finished, see above: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    run_script(main)
