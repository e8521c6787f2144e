"""Writes a small dataset without a download, enough to try pretraining and chat on a laptop.

    python -m preparation.demo_data                         # or --output_dir=data/other

pretrain.txt                 English that comes with Python: its manual pages and its library's
                             docstrings and comments, separated by <|endoftext|>
conversations.jsonl          questions about a few facts, to fine-tune on
conversations_heldout.jsonl  the same facts asked in wordings that training never uses; each line
                             has an extra "answer", the words that a right reply contains
evaluation/demo_*.jsonl      those questions as tasks for evaluate.py, in words and as a choice

The same seed and version of Python give the same bytes. The facts are in demo_topics.json.
"""

import ast
import json
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics as manual_pages
from typing import Any

from common.files import atomic_file
from common.settings import config_from_constants, run_script
from tokenizer import END_OF_TEXT

output_dir = "data/demo"  # folder for the three files
seed = 1337  # of the wordings and order of the conversations

OPENERS = ("Hi! ", "Hello! ", "Hey Lille! ", "Please help me. ", "Quick question: ")
SMALL_TALK = {"hello": -1, "thanks": 1, "goodbye": 2}  # before and after the other topics
# The question that everybody tries first is a fair test: training has it for every other country,
# and France in other wordings.
HELD_OUT_QUESTION = "What is the capital of France?"

Topic = dict[str, Any]
Messages = list[dict[str, str]]


@cache
def load_topics() -> dict[str, Topic]:
    """Topics by name: facts that are asked for in the same wordings.

    "facts" maps each subject to its answer. "wordings" are used in the training conversations,
    "held_out" in the others, and "follow_ups", if any, after another question; in these, {x} is the
    subject and {s} the same in symbols.
    """
    # A reply must not contain the answer to another question of its topic, or a wrong reply could
    # count as right. Hence "The answer is 5." and not "2 plus 3 is 5.", where the 3 would answer
    # 5 minus 2; and the opposite of hot is "is cold". Replies that repeat the subject are learned
    # sooner.
    return json.loads(Path(__file__).with_name("demo_topics.json").read_text("utf-8"))


def is_right(answer_text: str, expected: str) -> bool:
    """Whether the words `expected` occur in a reply as whole words, upper and lower case alike.

    "5" is not in "15", "-5" or "2.5".
    """
    words = r"\s+".join(map(re.escape, expected.split()))
    whole = rf"(?<![\w-])(?<!\d[.,]){words}(?![\w-])(?![.,]\d)"
    return re.search(whole, answer_text, re.IGNORECASE) is not None


def questions(wordings: list[str], subject: str) -> list[str]:
    """Each wording with a subject filled in; {s} writes "2 plus 3" as "2 + 3"."""
    symbols = subject.replace("plus", "+").replace("minus", "-").replace("times", "*")
    return [wording.format(x=subject, s=symbols) for wording in wordings]


def trained_questions(topic: Topic, subject: str) -> list[str]:
    return [q for q in questions(topic["wordings"], subject) if q != HELD_OUT_QUESTION]


def vary(question: str, rng: random.Random, opener: bool) -> str:
    """A question as people type it: in lower case, unpunctuated, with "please" or a greeting."""
    style = rng.choice(("plain", "lower", "bare", "bare lower", "please", "opener"))
    if style == "please":
        question = f"{question[:-1]}, please{question[-1]}"
    if style == "opener" and opener:
        question = rng.choice(OPENERS) + question
    if "bare" in style:
        question = question.rstrip("?.! =")
    return question.lower() if "lower" in style else question


def turn(topic: Topic, subject: str, question: str) -> Messages:
    """A question and its reply, as two messages."""
    reply = topic["reply"].format(x=subject, answer=topic["facts"][subject])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def short_conversations(rng: random.Random) -> Iterator[Messages]:
    """Each fact in each of its training wordings, and in about half of the cases a variation."""
    for name, topic in load_topics().items():
        for subject in topic["facts"]:
            for question in trained_questions(topic, subject):
                yield turn(topic, subject, question)
                varied = vary(question, rng, opener=name not in SMALL_TALK)
                if rng.random() < 0.5 and varied != question:
                    yield turn(topic, subject, varied)


def long_conversation(rng: random.Random) -> Messages:
    """Two or three turns on different topics, or on one with follow-ups like "And of Spain?"."""
    topics, n_turns = load_topics(), rng.choice((2, 3))
    names = sorted(rng.sample(list(topics), n_turns), key=lambda name: SMALL_TALK.get(name, 0))
    same_topic = rng.random() < 0.4
    if same_topic:
        names = [rng.choice([name for name in topics if "follow_ups" in topics[name]])] * n_turns
    messages: Messages = []
    for name in names:
        topic = topics[name]
        subject = rng.choice(list(topic["facts"]))
        if same_topic and messages:
            question = rng.choice(questions(topic["follow_ups"], subject))
        else:
            question = rng.choice(trained_questions(topic, subject))
            question = vary(question, rng, opener=name not in SMALL_TALK)
        messages += turn(topic, subject, question)
    return messages


def training_conversations(seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    lines = [*short_conversations(rng), *(long_conversation(rng) for _ in range(500))]
    return [{"messages": messages} for messages in rng.sample(lines, len(lines))]


def held_out_conversations() -> list[dict[str, Any]]:
    """One question for each fact, the wordings in turn; all wordings for a topic of one fact."""
    topics = load_topics()
    lines = [{"messages": turn(topics["capitals"], "France", HELD_OUT_QUESTION), "answer": "Paris"}]
    for topic in topics.values():
        for i, (subject, answer) in enumerate(topic["facts"].items()):
            wordings = questions(topic["held_out"], subject)
            for question in wordings if len(topic["facts"]) == 1 else [wordings[i % len(wordings)]]:
                lines.append({"messages": turn(topic, subject, question), "answer": answer})
    return lines


def evaluation_tasks(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Tasks of evaluate.py by name: the held-out questions, answered in words and by choice.

    A choice is between four replies of a topic, of which one is right.
    """
    rng, tasks = random.Random(seed), {"demo_questions": [], "demo_choices": []}
    for line in held_out_conversations():
        question = line["messages"][0]["content"]
        tasks["demo_questions"].append({"question": question, "answer": line["answer"]})
    for topic in load_topics().values():
        answers = sorted(set(topic["facts"].values()))
        for i, (subject, answer) in enumerate(topic["facts"].items() if len(answers) >= 4 else ()):
            wordings = questions(topic["held_out"], subject)
            choices = rng.sample([other for other in answers if other != answer], 3) + [answer]
            rng.shuffle(choices)
            replies = [" " + topic["reply"].format(x=subject, answer=choice) for choice in choices]
            item = {"context": f"Question: {wordings[i % len(wordings)]}\nAnswer:"}
            item |= {"choices": replies, "answer": choices.index(answer)}
            tasks["demo_choices"].append(item)
    return tasks


SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n){2,}", re.MULTILINE)


def clean(text: str) -> str:
    """Drops lone surrogates; control tokens become `<| endoftext |>`."""
    # A text that mentions <|endoftext|> would otherwise be split there.
    text = text.encode("utf-8", "replace").decode().replace("\0", "")
    return re.sub(r"<\|(\w+)\|>", r"<| \1 |>", text).strip()


def module_texts(source: str) -> list[str]:
    """A module's docstrings, each below its name and arguments, and comment blocks, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes
        tree = ast.parse(source)
    texts = [(0, ast.get_docstring(tree) or "")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            if docstring := ast.get_docstring(node):
                texts.append((node.lineno, f"{node.name}{arguments}\n{docstring}"))
    for block in COMMENT_BLOCK.finditer(source):
        lines = [line.strip().lstrip("#").removeprefix(" ") for line in block[0].splitlines()]
        texts.append((source.count("\n", 0, block.start()) + 1, "\n".join(lines).strip("\n")))
    return [text for _, text in sorted(texts, key=lambda item: item[0]) if text]


def documents() -> Iterator[str]:
    """Python's manual pages, then a document for each module of its library, in a fixed order."""
    yield from dict.fromkeys(
        manual_pages[name] for name in sorted(manual_pages)
    )  # two names share a page
    previous: set[str] = set()  # modules share licences and inherited docstrings
    for name, source in library_sources():
        try:
            texts = module_texts(source)
        except (SyntaxError, ValueError):
            continue
        new = [text for text in dict.fromkeys(texts) if text not in previous]
        previous.update(new)
        if new:
            yield "\n\n".join([f"Module {name}", *new])


def library_sources() -> Iterator[tuple[str, str]]:
    """Name and source of each module of Python's library, in order, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            with tokenize.open(path) as file:
                yield ".".join(parts).removesuffix(".__init__"), file.read()
        except (SyntaxError, ValueError):
            continue


def main(argv: list[str] | None = None) -> None:
    config = config_from_constants(globals(), argv)
    training, held_out = training_conversations(config.seed), held_out_conversations()
    contents = {
        "pretrain.txt": END_OF_TEXT.join(filter(None, map(clean, documents()))),
        "conversations.jsonl": "".join(json.dumps(line) + "\n" for line in training),
        "conversations_heldout.jsonl": "".join(json.dumps(line) + "\n" for line in held_out),
    }
    for name, items in evaluation_tasks(config.seed).items():
        contents[f"evaluation/{name}.jsonl"] = "".join(json.dumps(item) + "\n" for item in items)
    folder = Path(config.output_dir)
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        with atomic_file(folder / name) as file:
            file.write(text.encode())
        print(f"wrote {folder / name}: {len(text.encode()) / 1e6:.2f} MB")
    print(f"{len(training):,} conversations to train on and {len(held_out)} held out")


if __name__ == "__main__":
    run_script(main)
