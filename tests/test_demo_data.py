"""The demo's data: the same bytes every time, held-out wordings that no training text has."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from preparation import demo_data
from preparation.demo_data import HELD_OUT_QUESTION, is_right, load_topics, questions

ROOT = Path(__file__).resolve().parents[1]

CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
FILES = ("pretrain.txt", "conversations.jsonl", "conversations_heldout.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    demo_data.main([f"--output_dir={folder}"])
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def training(folder) -> list[dict]:
    return lines(folder / "conversations.jsonl")


@pytest.fixture(scope="module")
def held_out(folder) -> list[dict]:
    return lines(folder / "conversations_heldout.jsonl")


def normal(question: str) -> str:
    """Lower case without punctuation; the operators stay, or 2 + 3 would be 2 - 3."""
    return " ".join(re.sub(r"[^\w\s+*-]", "", question.lower()).split())


def user_texts(conversations: list[dict]) -> set[str]:
    return {
        normal(message["content"])
        for line in conversations
        for message in line["messages"]
        if message["role"] == "user"
    }


def test_two_runs_are_byte_identical_even_with_other_hash_seeds(folder, tmp_path):
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-m", "preparation.demo_data", f"--output_dir={tmp_path}"]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "evaluation"])
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_seed_changes_the_training_conversations():
    assert demo_data.training_conversations(1) != demo_data.training_conversations(2)


def test_pretraining_text_is_large_and_splits_into_documents(folder):
    text = (folder / "pretrain.txt").read_text(encoding="utf-8")
    documents = text.split("<|endoftext|>")
    assert len(text.encode()) > 2_000_000
    assert len(documents) > 200
    assert len(set(documents)) == len(documents)
    assert all(document.strip() for document in documents)
    assert not any(CONTROL_TOKEN.search(document) for document in documents)
    assert "hastings.json" not in text  # nothing of this repository, which changes
    assert any(document.startswith("Module json.decoder\n") for document in documents)
    assert not any(document.startswith(("Module test", "Module idlelib")) for document in documents)


def test_a_mentioned_control_token_does_not_split_a_document():
    text = "one <|endoftext|> <|user|> \ud800\0 "
    assert demo_data.clean(text) == "one <| endoftext |> <| user |> ?"


def test_module_texts_keep_the_order_of_the_source():
    source = '"""Top."""\n\n# one\n# two\n\ndef f(a, b=1):\n    "F."\n\nclass C:\n    "C."\n'
    assert demo_data.module_texts(source) == ["Top.", "one\ntwo", "f(a, b=1)\nF.", "C\nC."]


def test_conversations_alternate_between_user_and_assistant(training, held_out):
    assert 500 < len(training) < 3000
    assert 140 < len(held_out) < 200
    for line in training + held_out:
        roles = [message["role"] for message in line["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        for message in line["messages"]:
            assert message.keys() == {"role", "content"}
            assert message["content"] == message["content"].strip() != ""
            assert not CONTROL_TOKEN.search(message["content"])
            assert not re.search(r"[{}]", message["content"])  # a field that was not filled in
    assert {len(line["messages"]) for line in training} == {2, 4, 6}
    assert {len(line["messages"]) for line in held_out} == {2}
    assert all(line.keys() == {"messages"} for line in training)
    assert all(line.keys() == {"messages", "answer"} for line in held_out)


def test_held_out_questions_are_never_trained(training, held_out):
    asked = user_texts(held_out)
    assert len(asked) == len(held_out)  # no question twice
    assert not asked & user_texts(training)


def test_every_held_out_wording_is_kept_from_training(training):
    """Also those that the held-out file does not use for this subject, polite or not."""
    trained = user_texts(training)
    for topic in load_topics().values():
        for subject in topic["facts"]:
            for question in questions(topic["held_out"], subject):
                assert not {normal(question), normal(question) + " please"} & trained, question


def test_every_held_out_fact_is_trained_in_other_words(training, held_out):
    replies = {}
    for line in training:
        question, reply = (message["content"] for message in line["messages"][:2])
        replies.setdefault(reply, set()).add(normal(question))
    for line in held_out:
        assert len(replies[line["messages"][1]["content"]]) >= 5, line
    trained = user_texts(training)
    for (
        topic
    ) in load_topics().values():  # sums share replies, so look for each subject's questions too
        for subject in topic["facts"]:
            asked = [normal(question) for question in questions(topic["wordings"], subject)]
            assert len(trained.intersection(asked)) >= 5, subject


def test_capital_of_france_is_asked_in_new_words_only(training, held_out):
    assert held_out[0]["messages"][0]["content"] == HELD_OUT_QUESTION
    assert held_out[0]["answer"] == "Paris"
    trained = user_texts(training)
    assert not any("what is the capital of france" in question for question in trained)
    assert {"which city is the capital of france", "what is the capital of germany"} <= trained


def test_every_topic_is_held_out(held_out):
    asked = user_texts(held_out)
    for name, topic in load_topics().items():
        for subject in topic["facts"]:
            wordings = {normal(question) for question in questions(topic["held_out"], subject)}
            assert wordings & asked, (name, subject)


def test_answer_is_in_its_reply_and_in_no_other_reply_of_its_topic():
    for topic in load_topics().values():
        replies = {
            subject: demo_data.turn(topic, subject, "?")[1]["content"] for subject in topic["facts"]
        }
        for subject, answer in topic["facts"].items():
            for other, reply in replies.items():
                assert is_right(reply, answer) == (topic["facts"][other] == answer), (
                    subject,
                    other,
                )


def test_answer_of_one_topic_is_not_in_the_replies_of_the_small_ones(held_out):
    small = {answer for topic in load_topics().values() if len(topic["facts"]) == 1
             for answer in topic["facts"].values()}  # fmt: skip
    assert len(small) == 7
    for line in held_out:
        reply = line["messages"][1]["content"]
        assert is_right(reply, line["answer"])
        assert [word for word in small if is_right(reply, word)] == [line["answer"]] * (
            line["answer"] in small
        )


@pytest.mark.parametrize(
    ("reply", "expected", "right"),
    [
        ("The capital of France is Paris.", "Paris", True),
        ("PARIS", "paris", True),
        ("It is Parisian.", "Paris", False),
        ("New\nDelhi, of course", "New Delhi", True),
        ("Newer Delhi", "New Delhi", False),
        ("The answer is 5.", "5", True),
        ("5, I think", "5", True),
        ("The answer is 15.", "5", False),
        ("The answer is 2.5", "5", False),
        ("The answer is 5.2", "5", False),
        ("The answer is -5.", "5", False),
        ("", "5", False),
    ],
)
def test_is_right_matches_whole_words(reply, expected, right):
    assert is_right(reply, expected) is right
