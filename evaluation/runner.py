"""The evaluation of one model on one task: what fits the context, scores, metrics; resumable.

A task's work is split into parts, the rows of its trie or batches of prompts, which follow from the
task's file and the settings alone. The result of each part is appended to a file when it is done,
so that a run that was killed goes on where it stopped and ends with the same bytes.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import atomic_file
from evaluation import intervals
from evaluation.intervals import Estimate
from evaluation.scoring import Pair, Scorer, trie_rows
from evaluation.tasks import (
    SCORED,
    Item,
    Task,
    bare,
    instruction_checker,
    reply_metrics,
    requests,
)

BATCH = 8  # prompts that are answered together
PRIMARY = {"choice": "acc_norm", "schema": "acc", "last_word": "acc", "text": "bits_per_byte"}
UNCONDITIONAL = "Answer:"  # the context without the question, for PMI

Done = Callable[[int, int], None]  # of parts done, and all of them


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation that the results of a task depend on."""

    n_shots: int = 0
    form: str = "cloze"  # or "letters", of multiple choice
    pmi: bool = False  # also the choices without their question
    prompt: str = "auto"  # "chat" for answers in words, "plain" for others; or one for all
    max_new_tokens: int = 200
    limit: int = 0  # items of a task, 0: all
    seed: int = 0


@dataclass
class Plan:
    """The pairs to score of a task, (item, alternative) of each, and what did not fit."""

    pairs: list[Pair] = field(default_factory=list)
    owners: list[tuple[int, int]] = field(default_factory=list)
    n_bytes: dict[int, int] = field(default_factory=dict)  # of a text, that are predicted
    counts: dict[str, int] = field(
        default_factory=lambda: {"shots_dropped": 0, "contexts_cut": 0, "left_out": 0}
    )


def make_plan(task: Task, items: list[Item], scorer: Scorer, settings: Settings) -> Plan:
    """Pairs that fit the model's context.

    If one alternative of an item is too long, all lose whole examples, the first ones first, then
    the beginning of their contexts, to one length. Left out are items with a continuation that is
    too long, or without a token of its own, and chats that are too long.
    """
    plan, block_size = Plan(), scorer.model.block_size
    if task.kind == "text":
        encoded = scorer.model.encode([item["text"] for item in items])
        for number, ids in enumerate(encoded):
            n_bytes = len(items[number]["text"].encode()) - scorer.model.n_bytes(ids[0])
            if len(ids) == 1 or n_bytes <= 0:  # nothing is predicted
                plan.counts["left_out"] += 1
                continue
            plan.n_bytes[number] = n_bytes
            for start in range(0, len(ids) - 1, block_size):
                plan.pairs.append((ids[start : start + 1], ids[start + 1 : start + 1 + block_size]))
                plan.owners.append((number, 0))
        return plan
    left = list(range(len(items)))
    encode = scorer.encode_chat if settings.prompt == "chat" else scorer.encode
    for n_shots in range(settings.n_shots, -1, -1):
        texts = {i: requests(task, items[i], n_shots, settings.form) for i in left}
        if settings.prompt == "chat":
            texts = {
                i: [(bare(context), end) for context, end in pairs] for i, pairs in texts.items()
            }
        encoded = iter(encode([text for i in left for text in texts[i]]))
        too_long = []
        for i in left:
            pairs = [next(encoded) for _ in texts[i]]
            if max(len(a) + len(b) - 1 for a, b in pairs) > block_size and n_shots:
                too_long.append(i)
                continue
            plan.counts["shots_dropped"] += n_shots < settings.n_shots
            room = block_size + 1 - max(len(b) for _, b in pairs)
            is_cut = any(len(a) > room for a, _ in pairs)
            if room < 1 or not all(b for _, b in pairs) or (is_cut and settings.prompt == "chat"):
                plan.counts["left_out"] += 1
                continue
            fitted = [(a[-room:], b) for a, b in pairs]
            plan.counts["contexts_cut"] += fitted != pairs
            plan.pairs += fitted
            plan.owners += [(i, alternative) for alternative in range(len(pairs))]
        left = too_long
        if not left:
            break
    if settings.pmi and task.kind == "choice":
        kept = sorted({i for i, _ in plan.owners})
        texts = [(i, k, c) for i in kept for k, c in enumerate(items[i]["choices"])]
        encoded = scorer.encode([(UNCONDITIONAL, choice) for _, _, choice in texts])
        plan.pairs += [scorer.fit(*pair) for pair in encoded]
        plan.owners += [(i, -1 - k) for i, k, _ in texts]
    return plan


def run_parts(path: Path, parts: list[Any], work: Callable[[Any], Any], done: Done) -> list[Any]:
    """The results of all parts, those in the file `path` not computed again.

    The file has a line for each finished part, in order; a line torn by a kill is dropped.
    """
    results = read_lines(path) if path.exists() else []
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.truncate(sum(len(json.dumps(result)) + 1 for result in results))
        file.seek(0, 2)
        done(len(results), len(parts))
        for number in range(len(results), len(parts)):
            results.append(work(parts[number]))
            file.write(json.dumps(results[-1]).encode() + b"\n")
            file.flush()
            done(number + 1, len(parts))
    return results


def read_lines(path: Path) -> list[Any]:
    """The JSON lines of a file up to the first that is torn or damaged."""
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def evaluate_task(
    scorer_of: Callable[[], Scorer], task: Task, settings: Settings, folder: Path, done: Done
) -> tuple[list[Item], dict[str, int]]:
    """The results of each item, in order, and the counts of what did not fit the context.

    They are kept as `folder`/NAME.jsonl, one item a line after a first line of what they depend on;
    if that file is there, nothing is computed. `scorer_of` loads the model.
    """
    path, parts_path = folder / f"{task.name}.jsonl", folder / f"{task.name}.parts"
    items = task.sample(settings.limit, settings.seed)
    made_of = {"task": task.sha256, "settings": vars(settings)}
    if path.is_file():
        lines = read_lines(path)
        if lines and lines[0]["made_of"] == made_of:
            return lines[1:], lines[0]["counts"]
    scorer = scorer_of()
    begun = made_of | {"row_tokens": scorer.row_tokens}
    started = folder / f"{task.name}.started"
    if not started.is_file() or json.loads(started.read_text("utf-8")) != begun:
        parts_path.unlink(missing_ok=True)  # of another file or other settings
        with atomic_file(started) as file:
            file.write(json.dumps(begun).encode())
    try:
        if task.kind in SCORED:
            results, counts = score_items(scorer, task, items, settings, parts_path, done)
        else:
            results, counts = answer_items(scorer, task, items, settings, parts_path, done)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{task.name}: {error}") from None
    with atomic_file(path) as file:
        for line in ({"made_of": made_of, "counts": counts}, *results):
            file.write(json.dumps(line).encode() + b"\n")
    parts_path.unlink()
    started.unlink()
    return results, counts


def score_items(
    scorer: Scorer, task: Task, items: list[Item], settings: Settings, path: Path, done: Done
) -> tuple[list[Item], dict[str, int]]:
    """Results of items of the SCORED kinds: log-likelihoods of each alternative."""
    plan = make_plan(task, items, scorer, settings)
    rows = trie_rows(plan.pairs, scorer.row_tokens)
    scored = run_parts(path, rows, lambda row: list(scorer.score_row(row)), done)
    scores = {pair: values for part in scored for pair, *values in part}
    results: dict[int, Item] = {}
    for pair, (i, alternative) in enumerate(plan.owners):
        logprob, greedy, n_tokens = scores[pair]
        result = results.setdefault(i, {"id": items[i]["id"]})
        if alternative < 0:
            result.setdefault("without_context", []).append(logprob)
        else:
            result.setdefault("logprobs", []).append(logprob)
            result.setdefault("greedy", []).append(greedy)
            result.setdefault("tokens", []).append(n_tokens)
    for i, result in results.items():
        if task.kind == "choice":
            named = choice_scores(items[i], result, settings.form)
            result["predicted"] = {name: int(values.argmax()) for name, values in named}
        elif task.kind == "text":
            result["bytes"] = plan.n_bytes[i]
    return [results[i] for i in sorted(results)], plan.counts


def choice_scores(item: Item, result: Item, form: str) -> Iterator[tuple[str, np.ndarray]]:
    """Scores of the choices for each kind of accuracy; the first of the highest is predicted.

    Lengths are without the blank that a choice begins with, as in lm-evaluation-harness. Letters
    have one length.
    """
    logprobs = np.array(result["logprobs"])
    if form == "letters":
        yield "acc", logprobs
        return
    texts = [choice.removeprefix(" ") for choice in item["choices"]]
    yield "acc", logprobs
    yield "acc_norm", logprobs / np.maximum(1, [len(text) for text in texts])
    yield "acc_bytes", logprobs / np.maximum(1, [len(text.encode()) for text in texts])
    if "without_context" in result:
        yield "acc_pmi", logprobs - np.array(result["without_context"])


def answer_items(
    scorer: Scorer, task: Task, items: list[Item], settings: Settings, path: Path, done: Done
) -> tuple[list[Item], dict[str, int]]:
    """Results of items that are answered in words."""
    model, chat = scorer.model, settings.prompt != "plain"
    check = instruction_checker() if task.kind == "instructions" else None
    texts = [item.get("question") or item.get("prompt") for item in items]
    if not chat and task.kind == "generated":
        texts = [f"Question: {text}\nAnswer:" for text in texts]
    prompts = [model.prompt_ids(text, chat) for text in texts]
    room = model.block_size - min(settings.max_new_tokens, model.block_size // 2)
    kept = [i for i, ids in enumerate(prompts) if len(ids) <= room]
    order = sorted(kept, key=lambda i: len(prompts[i]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]

    def answer(batch: list[int]) -> list[str]:
        replies = model.generate([prompts[i] for i in batch], settings.max_new_tokens)
        ends = [] if chat else ["\nQuestion:"]
        return [cut(reply, ends).strip() for reply in replies]

    replies = [reply for part in run_parts(path, batches, answer, done) for reply in part]
    results = {}
    for i, reply in zip(order, replies, strict=True):
        results[i] = {"id": items[i]["id"], "reply": reply}
        if task.kind == "generated":
            results[i] |= reply_metrics(items[i], reply)
        elif check is not None:
            results[i] |= check(items[i], reply)
    counts = {"shots_dropped": 0, "contexts_cut": 0, "left_out": len(items) - len(kept)}
    return [results[i] for i in kept], counts


def cut(text: str, ends: list[str]) -> str:
    """The text before the first of `ends`."""
    return text[: min([text.find(end) for end in ends if end in text], default=len(text))]


def metrics(task: Task, results: list[Item]) -> dict[str, Estimate]:
    """All metrics of a task by name, the primary one first; empty for a judged task."""
    values, clusters = item_values(task, results)
    found = {name: estimate_of(value, clusters) for name, value in values.items()}
    primary = PRIMARY.get(task.kind)
    return {name: found[name] for name in sorted(found, key=lambda name: name != primary)}


def estimate_of(
    value: Any, clusters: np.ndarray | None, mask: np.ndarray | slice = slice(None)
) -> Estimate:
    """The estimate of a metric from its values by item, of those that `mask` chooses."""
    clusters = None if clusters is None else clusters[mask]
    if isinstance(value, tuple):
        return intervals.ratio(value[0][mask], value[1][mask], clusters)
    kind = intervals.share if value.dtype == bool else intervals.mean
    return kind(value[mask], clusters)


def item_values(task: Task, results: list[Item]) -> tuple[dict[str, Any], np.ndarray | None]:
    """Each metric's values by item, and the items' clusters.

    Boolean arrays are shares, real ones means, and a pair of them (bits, bytes) a ratio.
    """
    by_id = {item["id"]: item for item in task.items}
    items = [by_id[result["id"]] for result in results]
    clusters = None
    if any(item.get("cluster") is not None for item in items):
        names = [item.get("cluster") for item in items]
        names = [
            f"id {r['id']}" if c is None else str(c) for c, r in zip(names, results, strict=True)
        ]
        clusters = np.array(names)
    gold = [item.get("answer", 0) for item in items]
    pairs, values = list(zip(items, results, gold, strict=True)), {}
    if task.kind == "choice":
        for name in results[0]["predicted"] if results else ():
            values[name] = np.array([r["predicted"][name] == g for _, r, g in pairs])
        values["gold_prob"] = np.array([softmax(r["logprobs"])[g] for _, r, g in pairs])
        if "acc_norm" in values:
            sizes = np.array([len(item["choices"][g].encode()) for item, _, g in pairs])
            values["gold_bits_per_byte"] = bits([r["logprobs"][g] for _, r, g in pairs]), sizes
    elif task.kind == "schema":
        values["acc"] = np.array([int(np.argmax(r["logprobs"])) == g for _, r, g in pairs])
        values["gold_prob"] = np.array([softmax(r["logprobs"])[g] for _, r, g in pairs])
    elif task.kind == "last_word":
        values["acc"] = np.array([r["greedy"][0] for r in results])
        sizes = [len(item["continuation"].encode()) for item in items]
        values["bits_per_byte"] = bits([r["logprobs"][0] for r in results]), np.array(sizes)
    elif task.kind == "text":
        sizes = np.array([r["bytes"] for r in results])
        values["bits_per_byte"] = bits([sum(r["logprobs"]) for r in results]), sizes
    else:
        for name in ("right", "strict", "flexible", "loose"):
            if results and name in results[0]:
                values[name] = np.array([r[name] for r in results])
    return values, clusters


def bits(logprobs: list[float]) -> np.ndarray:
    return -np.array(logprobs) / math.log(2)


def softmax(logprobs: list[float]) -> np.ndarray:
    exponentials = np.exp(np.array(logprobs) - max(logprobs))
    return exponentials / exponentials.sum()


def chance(task: Task, items: list[Item]) -> float | None:
    """The accuracy of guessing, where there are alternatives."""
    name = {"choice": "choices", "schema": "contexts"}.get(task.kind)
    return name and float(np.mean([1 / len(item[name]) for item in items]))
