"""Evaluates models on the tasks in data/evaluation, with intervals, and compares them.

    python prepare_evaluation.py                  # once: fetches the tasks
    python evaluate.py                            # checkpoints/best_model.pt on all of them
    python evaluate.py --model=checkpoints_ft/best_model.pt --baseline=SmolLM2.gguf --tasks=piqa
    python evaluate.py --model="checkpoints/ckpt_*.pt"       # a curve over the steps
    python evaluate.py --contamination=data/fineweb_edu_sample_10BT
    python evaluate.py --judge=gpt-4.1 --baseline=checkpoints/best_model.pt   # OPENAI_API_KEY

A task is a file; evaluation/tasks.py describes its forms, and your own are welcome. Written are
`out_dir`/results.jsonl, a line for each model, a folder of the results of each item, and a picture.
Kill it at any time: the same command goes on where it stopped.

This file has the name of a package of PyPI. Run a program that needs that package, such as lm-eval,
from another folder.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import dataclasses
import functools
import glob
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import CHECKPOINT, step_in_name
from common import records
from common.errors import UserError, printable
from common.files import atomic_file, file_sha256, locked
from common.settings import config_from_constants, run_script
from dataset import open_split
from evaluation import report
from evaluation.contamination import Report, scan
from evaluation.judge import EndpointJudge, LocalJudge, Pair, judge_pairs
from evaluation.models import open_model
from evaluation.report import TaskResult, contamination_items
from evaluation.runner import Settings, evaluate_task
from evaluation.scoring import Scorer
from evaluation.tasks import Task, check_form, find_tasks, instruction_checker, read_task
from formats.pretrained import resolve_model
from tokenizer import load_tokenizer

# Models: a .pt, an exported folder, a hub id or a .gguf
model = "checkpoints/best_model.pt"  # several are separated by commas, or fit a pattern (ckpt_*.pt)
baseline = ""  # a model that each is compared with, on the same items

# Tasks
tasks = "all"  # names of files in data_dir, separated by commas
data_dir = "data/evaluation"  # files of items
out_dir = "evaluations"  # results
limit = 1000  # items of a task, a random sample; 0: all
seed = 0  # chooses the sample
n_shots = 0  # examples before each context; 5: the curated ones
form = "cloze"  # the texts of choices are scored; "letters": they stand in the prompt, A to Z
pmi = False  # also accuracy by the choices' probability relative to that without the question
prompt = "auto"  # "chat" for answers in words and "plain" for choices; or one of them for all
max_new_tokens = 200  # longest answer in words

# Training data in which the items are looked for
contamination = ""  # folder of shards
tokenizer = "hastings/hastings.json"  # that of the shards
ngram = 13  # tokens of a match

# Judge of the answers to judged tasks, compared with the baseline's
judge = ""  # a model of an OpenAI-compatible server, or the path of a local model
judge_url = ""  # the server, such as http://127.0.0.1:8000/v1; "": OpenAI's
judge_workers = 4  # requests at a time

# Machine
device = ""  # "": cuda or mps where there is one, else cpu
dtype = "float32"  # bfloat16 and float16 are faster on a GPU, and less exact
row_tokens = 1024  # length of a row of sequences that share their beginnings

# Of a line of results.jsonl; the others are about the run.
RECORDED = ("model", "settings", "tasks", "core_mean", "contamination", "baseline", "differences")
RECORDED += ("judge",)
OPENAI_URL = "https://api.openai.com/v1"


class Evaluation:
    """The results of one model; computed where its folder does not have them yet."""

    def __init__(self, name: str, config: Any, settings: Settings):
        self.name, self.config, self.settings = name, config, settings
        self.path = Path(name) if Path(name).is_file() else resolve_model(name, with_tokenizer=True)
        self.sha256 = weights_sha256(self.path)
        made_of = json.dumps([self.sha256, vars(settings), config.dtype], sort_keys=True)
        key = hashlib.sha256(made_of.encode()).hexdigest()[:10]
        self.short_name = self.path.stem if self.path.is_file() else Path(name).name
        self.folder = Path(config.out_dir) / f"{self.short_name}-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, TaskResult] = {}

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Loads the model when it is first needed."""
        dtype = getattr(torch, self.config.dtype)
        opened = open_model(self.name, pick_device(self.config.device), dtype)
        return Scorer(opened, row_tokens=self.config.row_tokens)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """The model's number of parameters and its training step, if known."""
        path = self.folder / "model.json"
        if not path.is_file():
            with atomic_file(path) as file:
                file.write(json.dumps(self.scorer.model.facts).encode())
        return json.loads(path.read_text("utf-8"))

    def run(self, task: Task) -> None:
        """Evaluates a task, with a progress bar."""
        bar = None

        def done(parts: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                name = printable(f"{self.short_name} {task.name}")
                bar = tqdm(total=total, initial=parts, desc=name, unit="row", leave=False)
            bar.update(parts - bar.n)

        scorer = functools.partial(getattr, self, "scorer")
        results, counts = evaluate_task(scorer, task, self.settings, self.folder, done)
        if bar is not None:
            bar.close()
        self.results[task.name] = TaskResult(task, results, counts)

    def record(self) -> dict[str, Any]:
        """The fields of a line of results.jsonl about the model and its results."""
        mean = report.core_mean(self.results)
        return {
            "model": {"name": self.name, "sha256": self.sha256, **self.facts},
            "settings": vars(self.settings) | {"dtype": self.config.dtype},
            "tasks": {name: result.record() for name, result in self.results.items()},
            "core_mean": mean and report.finite(mean),
        }


def weights_sha256(path: Path) -> str:
    """Of a file, or of all files of a folder but documentation."""
    if path.is_file():
        return file_sha256(path)
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    files = [file for file in files if file.suffix != ".md" and file.name[0] != "."]
    hashes = [f"{file.name} {file_sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def pick_device(name: str) -> str:
    """`name`, or the fastest device of this machine; UserError for one that it lacks."""
    if not name:
        return torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={name} cannot be used here ({reason}): use cpu") from None
    return name


def model_names(setting: str) -> list[str]:
    """The models of a setting, patterns expanded, checkpoints in the order of their steps."""
    names = []
    for name in (part.strip() for part in setting.split(",")):
        if any(character in name for character in "*?["):
            found = sorted(glob.glob(name), key=lambda path: (step_of(path), path))
            if not found:
                raise UserError(f"--model={name}: no file fits this pattern: check the path")
            names += found
        elif name:
            names.append(name)
    if not names:
        raise UserError("--model is empty: give the path of a checkpoint")
    return names


def step_of(path: str) -> int:
    """The step in a checkpoint's name; other names come last."""
    return step_in_name(Path(path)) if CHECKPOINT.fullmatch(Path(path).name) else sys.maxsize


def load_tasks(config: Any) -> list[Task]:
    """The tasks that are evaluated; of "all" those are left out, with a line, that cannot be."""
    chosen = []
    for path in find_tasks(Path(config.data_dir), config.tasks):
        task = read_task(path)
        ties = sum(
            len(set(item.get("choices", ()))) < len(item.get("choices", ())) for item in task.items
        )
        if ties:
            print(f"{task.name}: {ties:,} items have a choice twice, of which the first is taken")
        try:
            check_form(task, config.n_shots, config.form, config.prompt)
            if task.kind == "instructions":
                instruction_checker()
            if task.kind == "judged" and not config.judge:
                raise UserError(f"{task.name} needs a judge: set --judge and --baseline")
            chosen.append(task)
        except UserError as error:
            if config.tasks != "all":
                raise
            print(f"left out: {error}")
    if not chosen:
        raise UserError("no task is left to evaluate: set --tasks=all, or see the lines above")
    if config.judge and not any(task.kind == "judged" for task in chosen):
        raise UserError("--judge compares answers to a judged task: there is none among --tasks")
    return chosen


def check_settings(config: Any) -> None:
    """UserError for settings that make no sense."""
    for name, allowed in {
        "form": ("cloze", "letters"),
        "prompt": ("auto", "chat", "plain"),
    }.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"--{name}={getattr(config, name)} must be one of {', '.join(allowed)}")
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype={config.dtype} must be float32, bfloat16 or float16")
    for name, least in {
        "limit": 0,
        "n_shots": 0,
        "max_new_tokens": 1,
        "row_tokens": 1,
        "judge_workers": 1,
    }.items():
        if getattr(config, name) < least:
            raise UserError(f"--{name}={getattr(config, name)} must be at least {least}")
    if config.judge and not config.baseline:
        raise UserError("--judge compares with the answers of another model: set --baseline")


def scan_tasks(tasks: list[Task], evaluations: list[Evaluation], config: Any) -> dict[str, Report]:
    """Looks for the items that were evaluated in the training shards, all in one pass."""
    items = {}
    for task in tasks:
        results = (e.results[task.name].results for e in evaluations)
        ids = {result["id"] for part in results for result in part}
        items[task.name] = contamination_items(task, ids)
    with tqdm(desc="looking for items", unit="token", unit_scale=True, leave=False) as bar:

        def progress(tokens: int, total: int) -> None:
            bar.total = total
            bar.update(tokens - bar.n)

        common = {"progress": progress, "tokenizer": load_tokenizer(config.tokenizer)}
        found = scan(sum(items.values(), []), config.contamination, config.ngram, **common)
    matches, reports = iter(found.matches), {}
    for name, part in items.items():
        reports[name] = dataclasses.replace(found, matches=[next(matches) for _ in part])
    return reports


def judge_task(task: Task, evaluation: Evaluation, base: Evaluation, config: Any) -> dict[str, Any]:
    """Has a judge compare the answers to a task; prints and returns what it found."""
    items = {item["id"]: item for item in task.items}
    theirs = {result["id"]: result["reply"] for result in base.results[task.name].results}
    pairs = [
        Pair(
            str(r["id"]),
            items[r["id"]]["prompt"],
            r["reply"],
            theirs[r["id"]],
            gold_of(items[r["id"]]),
        )
        for r in evaluation.results[task.name].results
        if r["id"] in theirs
    ]
    path = Path(config.judge)
    if path.exists():
        model = open_model(config.judge, pick_device(config.device), getattr(torch, config.dtype))
        scorer = Scorer(model)

        def fits(prompt: str) -> bool:
            return len(model.encode([prompt + " A"])[0]) <= model.block_size

        judge = LocalJudge(scorer, f"{config.judge} {weights_sha256(path)}", fits)
    else:
        judge = EndpointJudge(config.judge, config.judge_url or OPENAI_URL)
    replies = evaluation.folder / f"{task.name}-{base.sha256[:10]}.replies.jsonl"
    with tqdm(desc=f"judging {task.name}", unit="reply", leave=False) as bar:

        def progress(replies: int, total: int) -> None:
            bar.total = total
            bar.update(replies - bar.n)

        found = judge_pairs(pairs, judge, replies, config.judge_workers, config.seed, progress)
    print("", *map(printable, found.lines()), sep="\n")
    return found.as_dict()


def gold_of(item: dict[str, Any]) -> str:
    """The reference answer of a judged item, if it has one."""
    return item["gold"] if isinstance(item.get("gold"), str) else ""


def append_once(path: Path, record: dict[str, Any], command: list[str]) -> None:
    """Adds the record of an evaluation, unless the last one of the same comparison is equal."""
    record = json.loads(json.dumps(record))
    kept = [
        {name: line.get(name) for name in RECORDED}
        for line in records.read_records(path)
        if all(line.get(name) == record.get(name) for name in ("model", "settings", "baseline"))
    ]
    if not kept or kept[-1] != {name: record.get(name) for name in RECORDED}:
        environment = records.environment(["evaluate.py", *command], torch.device("cpu"))
        records.append_record(path, environment | record)


@contextmanager
def hint_to_continue() -> Iterator[None]:
    """Tells after Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nwhat is finished is kept: run the same command again to continue", file=sys.stderr)
        raise


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    command = sys.argv[1:] if argv is None else argv
    check_settings(config)
    names, tasks = model_names(config.model), load_tasks(config)
    shared = [name for name in vars(Settings()) if hasattr(config, name)]
    settings = Settings(**{name: getattr(config, name) for name in shared})
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if config.contamination:  # before the evaluation, which takes longer
        open_split(config.contamination, "train", load_tokenizer(config.tokenizer).sha256)
    with locked(out_dir, "evaluate.py"), hint_to_continue():
        evaluations = [Evaluation(name, config, settings) for name in names]
        base = Evaluation(config.baseline, config, settings) if config.baseline else None
        for evaluation in [*evaluations, *([base] if base else [])]:
            for task in tasks:
                evaluation.run(task)
            print(f"\n{printable(evaluation.name)}, {evaluation.facts['parameters']:,} parameters")
            print(records.markdown_table(report.results_table(evaluation.results)))
            vars(evaluation).pop("scorer", None)  # its memory
        scans = scan_tasks(tasks, evaluations, config) if config.contamination else {}
        for evaluation in evaluations:
            record = evaluation.record()
            if scans:
                print(f"\n{printable(evaluation.name)} and {printable(config.contamination)}")
                print(records.markdown_table(report.contamination_table(evaluation.results, scans)))
                record["contamination"] = report.contamination_record(
                    evaluation.results, scans, config.contamination
                )
            if base:
                both = (evaluation.short_name, base.short_name)
                if both[0] == both[1]:
                    both = (evaluation.name, base.name)
                found = report.compare(evaluation.results, base.results, both)
                print(f"\ncompared with {printable(base.name)}, p adjusted for {len(found)} tasks:")
                print("\n".join(printable(sentence) for _, _, sentence in found.values()))
                record["baseline"] = {"name": base.name, "sha256": base.sha256}
                record["differences"] = {
                    name: report.finite(difference) | {"adjusted_p": p}
                    for name, (difference, p, _) in found.items()
                }
            if base and config.judge:
                record["judge"] = {
                    task.name: judge_task(task, evaluation, base, config)
                    for task in tasks
                    if task.kind == "judged"
                }
            append_once(out_dir / "results.jsonl", record, command)
        if base:
            append_once(out_dir / "results.jsonl", base.record(), command)
        drawn = [(e.name, e.facts["step"], e.results) for e in evaluations]
        if base:
            drawn.append((base.name, None, base.results))
        report.draw(drawn, out_dir / "results.png")
    print(f"\nresults in {out_dir / 'results.jsonl'}, picture in {out_dir / 'results.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
