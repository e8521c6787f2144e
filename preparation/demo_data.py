"""Writes a small dataset without a download, enough to try pretraining and chat on a laptop.

    python -m preparation.demo_data                         # or --output_dir=data/other

pretrain.txt                 English that comes with Python: its manual pages and its library's
                             docstrings and comments, separated by <|endoftext|>
conversations.jsonl          questions about a few facts, to fine-tune on
conversations_heldout.jsonl  the same facts asked in wordings that training never uses; each line
                             has an extra "answer", the words that a right reply contains

The same seed and version of Python give the same bytes.
"""

import ast
import json
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from common.errors import UserError
from common.files import atomic_file
from common.settings import config_from_constants, run_script
from tokenizer import END_OF_TEXT

output_dir = "data/demo"  # folder for the three files
seed = 1337  # of the wordings and order of the conversations


@dataclass(frozen=True)
class Topic:
    """Facts that are asked for in the same wordings, each wording a sentence of one text.

    {x} is the subject and {s} the same in symbols. `follow_ups` are asked after another question.
    """

    facts: dict[str, str]  # subject -> answer
    reply: str
    wordings: str  # of the training conversations
    held_out: str  # wordings of the held-out ones
    follow_ups: str = ""


def succession(unit: str, names: str) -> Topic:
    """Topic of the successor of each name in a cycle, such as the days of a week."""
    first, *others = names.split()
    facts = {a: f"comes {b}" for a, b in zip([first, *others], [*others, first], strict=True)}
    wordings = """Which {unit} comes after {x}? What {unit} is after {x}? What comes after {x}?
        What is the {unit} after {x}? Tell me the {unit} after {x}."""
    held_out = "Which {unit} is after {x}? Tell me which {unit} comes after {x}."
    wordings, held_out = (text.replace("{unit}", unit) for text in (wordings, held_out))
    return Topic(facts, "After {x} {answer}.", wordings, held_out, "And after {x}? What about {x}?")


# fmt: off
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Austria": "Vienna", "Belgium": "Brussels", "Poland": "Warsaw",
    "Greece": "Athens", "Hungary": "Budapest", "Ireland": "Dublin", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Iceland": "Reykjavik",
    "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia", "Croatia": "Zagreb",
    "Serbia": "Belgrade", "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Morocco": "Rabat", "Ghana": "Accra", "Nigeria": "Abuja", "Senegal": "Dakar",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Nepal": "Kathmandu", "Canada": "Ottawa", "Cuba": "Havana",
    "Peru": "Lima", "Chile": "Santiago", "Argentina": "Buenos Aires", "Australia": "Canberra",
}
SUMS = {
    **{f"{a} plus {b}": str(a + b) for a in range(1, 5) for b in range(1, 6)},
    **{f"{a} minus {b}": str(a - b) for a in range(2, 7) for b in range(1, a)},
    **{f"{a} times {b}": str(a * b) for a in range(2, 4) for b in range(2, 6)},
}
COLOURS = {
    "the sky": "blue", "grass": "green", "a banana": "yellow", "snow": "white", "coal": "black",
    "a strawberry": "red", "a carrot": "orange", "chocolate": "brown", "an elephant": "grey",
    "a flamingo": "pink", "a lemon": "yellow", "milk": "white", "the sea": "blue",
    "a frog": "green", "a tomato": "red", "a pumpkin": "orange", "a crow": "black",
}
MIXES = {
    "red and yellow": "orange", "blue and yellow": "green", "red and blue": "purple",
    "red and white": "pink", "black and white": "grey",
}
OPPOSITES = [pair.split() for pair in (
    "hot cold", "big small", "fast slow", "up down", "day night", "open closed", "happy sad",
    "old young", "light dark", "full empty", "early late", "rich poor")]
ANIMALS = {
    "a dog": "woof", "a cat": "meow", "a cow": "moo", "a sheep": "baa", "a duck": "quack",
    "a pig": "oink", "a lion": "roar", "a bee": "buzz", "a snake": "hiss", "a horse": "neigh",
    "an owl": "hoot", "a mouse": "squeak",
}

# A reply must not contain the answer to another question of its topic, or a wrong reply could count
# as right. Hence "The answer is 5." and not "2 plus 3 is 5.", where the 3 would answer 5 minus 2;
# and the opposite of hot is "is cold". Replies that repeat the subject are learned sooner.
TOPICS = {
    "capitals": Topic(CAPITALS, "The capital of {x} is {answer}.",
        "What is the capital of {x}? What's the capital of {x}? Which city is the capital of {x}? "
        "Tell me the capital of {x}. {x}: what is its capital? Do you know the capital of {x}? "
        "What is the capital city of {x}? Can you tell me the capital of {x}?",
        "Can you tell me what the capital of {x} is? Name the capital city of {x}.",
        "And of {x}? What about {x}?"),
    "sums": Topic(SUMS, "The answer is {answer}.",
        "What is {x}? What's {x}? How much is {x}? Tell me what {x} is. What is {s}? {s} = ? "
        "Calculate {s}. Do you know what {x} is?",
        "Can you tell me what {x} is? How much is {s}?",
        "And {x}? What about {s}?"),
    "colours": Topic(COLOURS, "The colour of {x} is {answer}.",
        "What colour is {x}? What is the colour of {x}? Which colour is {x}? What color is {x}? "
        "Tell me the colour of {x}. Do you know what colour {x} is?",
        "Can you tell me what colour {x} is? Name the colour of {x}.",
        "And {x}? What about {x}?"),
    "mixes": Topic(MIXES, "Together {x} make {answer}.",
        "What do you get when you mix {x}? What colour do {x} make? Mix {x}: what colour is it? "
        "Which colour do you get from {x}? If I mix {x}, what colour do I get? "
        "What happens when you mix {x}? Tell me what {x} make.",
        "What colour do you get when you mix {x}? Tell me what colour {x} make."),
    "opposites": Topic(
        {x: f"is {y}" for a, b in OPPOSITES for x, y in ((a, b), (b, a))},
        "The opposite of {x} {answer}.",
        "What is the opposite of {x}? What's the opposite of {x}? Tell me the opposite of {x}. "
        "Which word is the opposite of {x}? Do you know the opposite of {x}? "
        "Give me the opposite of {x}.",
        "Can you tell me the opposite of {x}? Name the opposite of {x}.",
        "And of {x}? What about {x}?"),
    "animals": Topic(ANIMALS, "The sound of {x} is {answer}.",
        "What sound does {x} make? What does {x} say? Which sound does {x} make? "
        "Tell me what {x} says. Do you know what sound {x} makes? How does {x} sound?",
        "What noise does {x} make? Can you tell me what sound {x} makes?",
        "And {x}? What about {x}?"),
    "days": succession("day", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "months": succession("month", "January February March April May June July August "
                                    "September October November December"),
    "name": Topic({"you": "Lille"}, "My name is {answer}.",
        "What is your name? Tell me your name. What are you called? Do you have a name? "
        "Who am I talking to? What should I call you?",
        "What's your name? Can you tell me your name?"),
    "kind": Topic({"you": "small language model"}, "I am a {answer}.",
        "What are you? What kind of thing are you? Are you a human? Are you a robot? "
        "Tell me what you are. Are you a person? Do you know what you are?",
        "Can you tell me what you are? Lille, what are you?"),
    "maker": Topic({"you": "training script"}, "The person who ran the {answer} made me.",
        "Who made you? Who built you? Who trained you? Tell me who made you. Who created you? "
        "Do you know who made you?",
        "Can you tell me who made you? Lille, who made you?"),
    "skills": Topic({"you": "short questions"},
        "I can answer {answer} about capitals, small sums, colours, opposites and animals.",
        "What can you do? What do you know? Tell me what you can do. Can you help me? "
        "What can I ask you? How can you help me? What are you able to do?",
        "Can you tell me what you can do? What can you do for me?"),
    "hello": Topic({"you": "help"}, "Hello! How can I {answer} you?",
        "Hello! Hi! Hey! Hello there! Hi Lille! Good morning! Hey there!",
        "Hi there! Hello Lille!"),
    "thanks": Topic({"you": "welcome"}, "You are {answer}!",
        "Thanks! Thank you! Thanks a lot! Thank you very much! Thanks, Lille. Great, thanks!",
        "Thank you, Lille. Great, thank you!"),
    "goodbye": Topic({"you": "Goodbye"}, "{answer}, see you soon!",
        "Bye! Goodbye! Bye bye! Goodbye, Lille. See you! Good night!",
        "Bye, Lille. See you soon!"),
}
# fmt: on

OPENERS = ("Hi! ", "Hello! ", "Hey Lille! ", "Please help me. ", "Quick question: ")
SMALL_TALK = {"hello": -1, "thanks": 1, "goodbye": 2}  # before and after the other topics
# The question that everybody tries first is a fair test: training has it for every other country,
# and France in other wordings.
HELD_OUT_QUESTION = "What is the capital of France?"


def is_right(answer_text: str, expected: str) -> bool:
    """Whether the words `expected` occur in a reply as whole words, upper and lower case alike.

    "5" is not in "15", "-5" or "2.5". ValueError for an `expected` without words.
    """
    if not expected.strip():
        raise ValueError("expected is empty: give the words that a right answer contains")
    words = r"\s+".join(map(re.escape, expected.split()))
    whole = rf"(?<![\w-])(?<!\d[.,]){words}(?![\w-])(?![.,]\d)"
    return re.search(whole, answer_text, re.IGNORECASE) is not None


def questions(wordings: str, subject: str) -> list[str]:
    """Each wording with a subject filled in; {s} writes "2 plus 3" as "2 + 3"."""
    symbols = subject.replace("plus", "+").replace("minus", "-").replace("times", "*")
    sentences = re.findall(r"\S[^?.!]*[?.!]", wordings)
    return [sentence.format(x=subject, s=symbols) for sentence in sentences]


def trained_questions(topic: Topic, subject: str) -> list[str]:
    return [q for q in questions(topic.wordings, subject) if q != HELD_OUT_QUESTION]


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


def turn(topic: Topic, subject: str, question: str) -> list[dict[str, str]]:
    """A question and its reply, as two messages."""
    reply = topic.reply.format(x=subject, answer=topic.facts[subject])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def short_conversations(rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """Each fact in each of its training wordings, and in about half of the cases a variation."""
    for name, topic in TOPICS.items():
        for subject in topic.facts:
            for question in trained_questions(topic, subject):
                yield turn(topic, subject, question)
                varied = vary(question, rng, opener=name not in SMALL_TALK)
                if rng.random() < 0.5 and varied != question:
                    yield turn(topic, subject, varied)


def long_conversation(rng: random.Random) -> list[dict[str, str]]:
    """Two or three turns on different topics, or on one with follow-ups like "And of Spain?"."""
    n_turns = rng.choice((2, 3))
    names = sorted(rng.sample(list(TOPICS), n_turns), key=lambda name: SMALL_TALK.get(name, 0))
    same_topic = rng.random() < 0.4
    if same_topic:
        names = [rng.choice([name for name in TOPICS if TOPICS[name].follow_ups])] * n_turns
    messages: list[dict[str, str]] = []
    for name in names:
        topic = TOPICS[name]
        subject = rng.choice(list(topic.facts))
        if same_topic and messages:
            question = rng.choice(questions(topic.follow_ups, subject))
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
    lines = [{"messages": turn(TOPICS["capitals"], "France", HELD_OUT_QUESTION), "answer": "Paris"}]
    for topic in TOPICS.values():
        for i, (subject, answer) in enumerate(topic.facts.items()):
            wordings = questions(topic.held_out, subject)
            for question in wordings if len(topic.facts) == 1 else [wordings[i % len(wordings)]]:
                lines.append({"messages": turn(topic, subject, question), "answer": answer})
    return lines


SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n){2,}", re.MULTILINE)


def clean(text: str) -> str:
    """The text without what UTF-8 cannot encode, control tokens spelled `<| endoftext |>`."""
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
    yield from dict.fromkeys(topics[name] for name in sorted(topics))  # two names share a page
    root = Path(sysconfig.get_path("stdlib"))
    previous: set[str] = set()  # modules share licences and inherited docstrings
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            with tokenize.open(path) as file:
                texts = module_texts(file.read())
        except (SyntaxError, ValueError):
            continue
        new = [text for text in dict.fromkeys(texts) if text not in previous]
        previous.update(new)
        if new:
            yield "\n\n".join([f"Module {'.'.join(parts).removesuffix('.__init__')}", *new])


def main(argv: list[str] | None = None) -> None:
    config = config_from_constants(globals(), argv)
    training, held_out = training_conversations(config.seed), held_out_conversations()
    contents = {
        "pretrain.txt": END_OF_TEXT.join(filter(None, map(clean, documents()))),
        "conversations.jsonl": "".join(json.dumps(line) + "\n" for line in training),
        "conversations_heldout.jsonl": "".join(json.dumps(line) + "\n" for line in held_out),
    }
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder} ({error.strerror}): choose --output_dir") from None
    for name, text in contents.items():
        with atomic_file(folder / name) as file:
            file.write(text.encode())
        print(f"wrote {folder / name}: {len(text.encode()) / 1e6:.2f} MB")
    print(f"{len(training):,} conversations to train on and {len(held_out)} held out")


if __name__ == "__main__":
    run_script(main)
