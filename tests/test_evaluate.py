"""evaluate.py: tasks of every kind, metrics by hand, resuming, comparison, mistakes in one line."""

import functools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from common.errors import UserError
from evaluation import report, runner
from evaluation.contamination import Match, Report
from evaluation.runner import Settings, make_plan
from evaluation.scoring import Scorer
from evaluation.tasks import check_item, read_task, reply_metrics, requests
from model import GPT, GPTConfig
from prepare_dataset import main as prepare
from tests.tiny import WORDS
from tokenizer import load_tokenizer

CONFIG = GPTConfig(n_embd=32, n_layers=1, n_heads=2, n_kv_heads=1, block_size=64)
ANIMALS = "dog cat cow hen fox owl bee ant".split()


def choice(n: int) -> dict:
    choices = [f" the {ANIMALS[(n + k) % 8]}" + " indeed" * k for k in range(3 + n % 2)]
    return {
        "context": f"Question: Which animal has number {n}?\nAnswer:",
        "choices": choices,
        "answer": n % 3,
    }


TASKS = {
    "animals": [choice(n) for n in range(20)],
    "who": [
        {
            "contexts": [f"The {a} saw the {b} because the {x}" for x in (a, b)],
            "continuation": " was old.",
            "answer": k % 2,
        }
        for k, (a, b) in enumerate(zip(ANIMALS, ANIMALS[1:], strict=False))
    ],
    "last": [{"context": f"One two three {a}", "continuation": " four"} for a in ANIMALS],
    "prose": [{"text": " ".join(WORDS * k)} for k in (1, 3, 12)],
    "sums": [{"question": f"{k} + 1?", "answer": f"#### {k + 1}"} for k in range(10)],
    "essays": [{"prompt": f"{n} words?", "gold": f"There are {n} of them."} for n in range(24)],
}


TOKENIZER = load_tokenizer()


def write_task(folder: Path, name: str, items: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    return path


def save_model(path: Path, seed: int, step: int, config: GPTConfig = CONFIG) -> Path:
    torch.manual_seed(seed)
    gpt = GPT(config)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.mul_(3)
    path.parent.mkdir(exist_ok=True)
    state = {"model_state_dict": gpt.state_dict(), "model_args": config.to_dict()}
    torch.save(state | {"iter_num": step}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    for name, items in TASKS.items():
        write_task(folder / "tasks", name, items)
    shots = "Question: Which animal barks?\nAnswer: the dog\n\n"
    (folder / "tasks" / "animals.shots.txt").write_text(shots * 5)
    for step in (10, 200):
        save_model(folder / "run" / f"ckpt_{step:07d}.pt", step, step)
    return folder


def arguments(folder: Path, **settings) -> list[str]:
    values = {"model": folder / "run" / "ckpt_0000010.pt", "data_dir": folder / "tasks"}
    values |= {"tasks": "animals,who,last,prose,sums", "max_new_tokens": 4, "row_tokens": 64}
    values |= {"device": "cpu", "out_dir": folder / "out"} | settings
    return [f"--{name}={value}" for name, value in values.items()]


def files_of(out_dir: Path) -> dict[str, bytes]:
    """The files of all results, without the records, which hold times."""
    paths = [path for path in out_dir.rglob("*.jsonl") if path.name != "results.jsonl"]
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in sorted(paths)}


@pytest.fixture(scope="module")
def whole(folder) -> tuple[Path, dict]:
    """The output folder and the record of an undisturbed run."""
    assert evaluate.main(arguments(folder, out_dir=folder / "whole")) == 0
    (line,) = (folder / "whole" / "results.jsonl").read_text().splitlines()
    return folder / "whole", json.loads(line)


@functools.cache
def load(path: Path) -> GPT:
    gpt = GPT(CONFIG).eval()
    gpt.load_state_dict(torch.load(path)["model_state_dict"])
    return gpt


def naive(folder: Path, context: str, continuation: str) -> float:
    gpt, tokenizer = load(folder / "run" / "ckpt_0000010.pt"), TOKENIZER
    whole, n = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    with torch.no_grad():
        logprobs = gpt(torch.tensor([whole]))[0].double().log_softmax(-1)
    return sum(logprobs[i - 1, whole[i]].item() for i in range(n, len(whole)))


def test_metrics_are_those_computed_by_hand(folder, whole):
    out_dir, record = whole
    scores = [[naive(folder, i["context"], c) for c in i["choices"]] for i in TASKS["animals"]]
    lengths = [[len(c) - 1 for c in i["choices"]] for i in TASKS["animals"]]
    gold = [i["answer"] for i in TASKS["animals"]]
    acc = np.mean([int(np.argmax(s)) == g for s, g in zip(scores, gold, strict=True)])
    norm = [int(np.argmax(np.divide(s, n))) for s, n in zip(scores, lengths, strict=True)]
    metrics = record["tasks"]["animals"]["metrics"]
    assert metrics["acc"]["value"] == acc
    assert metrics["acc_norm"]["value"] == np.mean(np.equal(norm, gold))
    assert metrics["acc"]["value"] != metrics["acc_norm"]["value"]
    bits = -sum(s[g] for s, g in zip(scores, gold, strict=True)) / np.log(2)
    n_bytes = sum(len(i["choices"][i["answer"]].encode()) for i in TASKS["animals"])
    assert metrics["gold_bits_per_byte"]["value"] == pytest.approx(bits / n_bytes, rel=1e-5)
    assert record["tasks"]["animals"]["chance"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert record["tasks"]["animals"]["items"] == 20 and len(record["model"]["sha256"]) == 64
    assert record["model"]["step"] == 10

    scores = [[naive(folder, c, i["continuation"]) for c in i["contexts"]] for i in TASKS["who"]]
    right = [int(np.argmax(s)) == i["answer"] for s, i in zip(scores, TASKS["who"], strict=True)]
    assert record["tasks"]["who"]["metrics"]["acc"]["value"] == pytest.approx(np.mean(right))
    bits = -sum(naive(folder, i["context"], i["continuation"]) for i in TASKS["last"]) / np.log(2)
    value = record["tasks"]["last"]["metrics"]["bits_per_byte"]["value"]
    assert value == pytest.approx(bits / (8 * len(" four")), rel=1e-5)
    assert set(record["tasks"]["sums"]["metrics"]) == {"strict", "flexible"}
    assert (out_dir / "results.png").read_bytes().startswith(b"\x89PNG")


def test_bits_per_byte_predict_every_token_but_the_first(folder, whole):
    text = TASKS["prose"][-1]["text"]
    ids = TOKENIZER.encode(text)
    assert len(ids) > 2 * CONFIG.block_size
    gpt, bits = load(folder / "run" / "ckpt_0000010.pt"), 0.0
    for start in range(0, len(ids) - 1, CONFIG.block_size):
        part = torch.tensor([ids[start : start + CONFIG.block_size + 1]])
        with torch.no_grad():
            loss = gpt(part[:, :-1], part[:, 1:])  # the sum over its labels
        bits += loss.item() / np.log(2)
    (path,) = whole[0].glob("*/prose.jsonl")
    result = json.loads(path.read_text().splitlines()[-1])
    assert -sum(result["logprobs"]) / np.log(2) == pytest.approx(bits, rel=1e-5)
    assert result["bytes"] == len(text.encode()) - len(TOKENIZER.decode(ids[:1]).encode())
    assert sum(result["tokens"]) == len(ids) - 1


def test_a_finished_evaluation_is_not_computed_again(folder, whole, monkeypatch, capsys):
    def loaded(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(evaluate, "open_model", loaded)
    before = (whole[0] / "results.jsonl").read_text()
    assert evaluate.main(arguments(folder, out_dir=whole[0])) == 0
    assert (whole[0] / "results.jsonl").read_text() == before
    assert "| animals" in capsys.readouterr().out


@pytest.mark.parametrize("torn", [False, True])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    folder, whole, tmp_path, monkeypatch, torn
):
    """Stopped after every third part, the last line sometimes only half on disk."""
    real, n_runs, n_parts = runner.run_parts, 0, [0]

    def stops_early(path, parts, work, done):
        def work_or_stop(part):
            if n_parts[0] == (1 if torn else 3):
                raise KeyboardInterrupt
            n_parts[0] += 1
            return work(part)

        try:
            return real(path, parts, work_or_stop, done)
        except KeyboardInterrupt:
            if torn and path.stat().st_size:
                path.write_bytes(path.read_bytes()[:-5])
            raise

    monkeypatch.setattr(runner, "run_parts", stops_early)
    while n_runs < 40:
        n_parts[0], n_runs = 0, n_runs + 1
        try:
            evaluate.main(arguments(folder, out_dir=tmp_path))
            break
        except KeyboardInterrupt:
            if torn:  # the torn part is lost: let the next run go on
                monkeypatch.setattr(runner, "run_parts", real)
    assert n_runs > (1 if torn else 3)
    assert files_of(tmp_path) == files_of(whole[0])
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["tasks"] == whole[1]["tasks"]
    assert not list(tmp_path.rglob("*.parts")) and not list(tmp_path.rglob("*.started"))


def test_other_weights_items_or_settings_are_computed_anew(folder, whole):
    for changes in ({"model": folder / "run" / "ckpt_0000200.pt"}, {"limit": 5}, {"pmi": True}):
        evaluate.main(arguments(folder, out_dir=whole[0], tasks="animals", **changes))
    lines = [json.loads(line) for line in (whole[0] / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and len(list(whole[0].glob("*/animals.jsonl"))) == 4
    assert lines[2]["tasks"]["animals"]["items"] == 5
    assert "acc_pmi" in lines[3]["tasks"]["animals"]["metrics"]
    data = shutil.copytree(folder / "tasks", folder / "changed")
    write_task(data, "animals", TASKS["animals"][:7])
    evaluate.main(arguments(folder, out_dir=whole[0], tasks="animals", data_dir=data))
    last = json.loads((whole[0] / "results.jsonl").read_text().splitlines()[-1])
    assert last["tasks"]["animals"]["items"] == 7


def test_a_sample_does_not_depend_on_what_else_is_in_the_file(folder, tmp_path):
    items = [{"id": f"q{n}"} | choice(n) for n in range(20)]
    few = read_task(write_task(tmp_path, "few", items[:15])).sample(8, seed=3)
    many = read_task(write_task(tmp_path, "many", items)).sample(8, seed=3)
    assert len(few) == len(many) == 8 and few != items[:8]
    assert [i for i in many if i in items[:15]] == [i for i in few if i in many]
    assert read_task(tmp_path / "many.jsonl").sample(8, seed=4) != many


def test_what_is_too_long_loses_shots_then_its_beginning(folder, tmp_path):
    items = [choice(0), {**choice(1), "context": " ".join(WORDS * 3) + "\nAnswer:"}]
    items[1]["context"] = "word " * 80 + "\nAnswer:"
    items.append({**choice(2), "choices": [" a", " word" * 70], "answer": 0})
    path = write_task(tmp_path, "long", items)
    shutil.copy(folder / "tasks" / "animals.shots.txt", tmp_path / "long.shots.txt")
    task, scorer = read_task(path), Scorer(str(folder / "run" / "ckpt_0000010.pt"))
    plan = make_plan(task, task.items, scorer, Settings(n_shots=5))
    assert plan.counts == {"shots_dropped": 3, "contexts_cut": 1, "left_out": 1}
    assert {item for item, _ in plan.owners} == {0, 1}
    lengths = {len(a) for (a, _), (i, _) in zip(plan.pairs, plan.owners, strict=True) if i == 1}
    assert len(lengths) == 1  # all alternatives of the item lose the same part
    first = TOKENIZER.decode(plan.pairs[0][0])
    n_kept = first.count("barks")
    assert 0 < n_kept < 5 and first.startswith("Question: Which animal barks")
    assert first.endswith(TASKS["animals"][0]["context"])
    longer = (
        "".join(task.shots[: n_kept + 1]) + items[0]["context"] + max(items[0]["choices"], key=len)
    )
    assert len(TOKENIZER.encode(longer)) - 1 > CONFIG.block_size
    for context, continuation in plan.pairs:
        assert len(context) + len(continuation) - 1 <= CONFIG.block_size


def test_letters_put_the_choices_before_the_answer(folder):
    task = read_task(folder / "tasks" / "animals.jsonl")
    context, continuation = requests(task, task.items[0], 0, "letters")[1]
    assert continuation == " B"
    assert context == (
        "Question: Which animal has number 0?\n A. the dog\n B. the cat indeed\n"
        " C. the cow indeed indeed\nAnswer:"
    )


def test_letters_have_one_length(folder, tmp_path):
    evaluate.main(arguments(folder, out_dir=tmp_path, tasks="animals", form="letters"))
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert list(record["tasks"]["animals"]["metrics"]) == ["acc", "gold_prob"]


def test_any_id_is_read_back(folder, tmp_path):
    items = [{"id": name, **choice(n)} for n, name in enumerate(("a\u20280", "b\x85", "ü", "7"))]
    write_task(tmp_path / "tasks", "odd", [*items, {"id": 7, **choice(4)}])
    for _ in range(2):
        evaluate.main(
            arguments(folder, out_dir=tmp_path / "out", data_dir=tmp_path / "tasks", tasks="odd")
        )
    (line,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["tasks"]["odd"]["items"] == 5


def test_the_newest_record_is_of_the_last_run(folder, tmp_path):
    for n in (9, 4, 9, 9):
        write_task(tmp_path / "tasks", "animals", TASKS["animals"][:n])
        evaluate.main(
            arguments(folder, out_dir=tmp_path, data_dir=tmp_path / "tasks", tasks="animals")
        )
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["tasks"]["animals"]["items"] for line in lines] == [9, 4, 9]


@pytest.mark.parametrize(
    ("reply", "strict", "flexible"),
    [
        ("3 + 4 = 7\n#### 7", True, True),
        ("#### 1,007.", False, False),
        ("It is $7.", False, True),
        ("7 apples and 8 pears", False, False),
        ("nothing", False, False),
    ],
)
def test_numbers_of_a_reply(reply, strict, flexible):
    item = {"question": "?", "answer": "three and four\n#### 7"}
    assert reply_metrics(item, reply) == {"strict": strict, "flexible": flexible}
    assert reply_metrics({"answer": "#### 1,007"}, "#### 1007")["strict"]
    assert reply_metrics({"answer": "Paris"}, "It is Paris.") == {"right": True}


def test_comparison_with_itself_and_another(folder, tmp_path, capsys):
    model = folder / "run" / "ckpt_0000010.pt"
    itself = arguments(folder, out_dir=tmp_path, baseline=model, tasks="animals,prose")
    evaluate.main(itself)
    printed = capsys.readouterr().out
    assert printed.count("not distinguishable (equal on each of") == 2
    lines = (tmp_path / "results.jsonl").read_text()
    evaluate.main(itself)
    assert (tmp_path / "results.jsonl").read_text() == lines
    other = save_model(tmp_path / "m" / "best_model.pt", 3, 7)
    with torch.no_grad():  # so wrong that everybody sees it
        state = torch.load(other)
        state["model_state_dict"]["tok_embeddings.weight"].mul_(4)
        torch.save(state, other)
    evaluate.main(arguments(folder, out_dir=tmp_path, baseline=other, tasks="animals,prose"))
    printed = capsys.readouterr().out
    assert "prose (bits_per_byte): ckpt_0000010 is better than best_model (difference -" in printed
    record = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-2])
    assert record["differences"]["prose"]["value"] < 0
    assert record["baseline"]["name"] == str(other)


def test_a_curve_over_the_steps(folder, tmp_path):
    pattern = folder / "run" / "ckpt_*.pt"
    evaluate.main(arguments(folder, out_dir=tmp_path, model=pattern, tasks="animals"))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["model"]["step"] for line in lines] == [10, 200]
    assert (tmp_path / "results.png").stat().st_size > 5000


def test_models_of_several_folders_are_marks_with_their_names(folder, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, drawn = [], []
    draw = report.draw
    monkeypatch.setattr(report, "draw", lambda models, path: drawn.append(models))
    evaluate.main(arguments(folder, out_dir=tmp_path, tasks="animals"))
    ((first, _, results),) = drawn[0]
    results, other = {f"task {i}": results["animals"] for i in range(5)}, "m/best_model.pt"
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw([(first, 10, results), (other, 20, results)], tmp_path / "a.png")
    draw([(first, 10, results), (first, 20, results)], tmp_path / "b.png")
    for figure in figures:
        assert [axes.get_visible() for axes in figure.axes] == [True] * 5 + [False] * 3
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == [first, other] and not figures[1].legends
    assert figures[1].axes[0].get_xlabel() == "step"


def test_contamination_by_the_shards_of_a_run(folder, tmp_path, capsys):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=20)) for _ in range(12)]
    items = [{**choice(n), "context": f"Question: {t}?\nAnswer:"} for n, t in enumerate(texts)]
    items[6]["choices"][0] = " dog" * 40  # too long for the second model
    small = GPTConfig(n_embd=32, n_layers=1, n_heads=2, n_kv_heads=1, block_size=32)
    second = save_model(tmp_path / "small.pt", 1, 1, small)
    models = f"{folder / 'run' / 'ckpt_0000010.pt'},{second}"
    write_task(tmp_path / "tasks", "animals", items)
    planted = [f"Before. {i['context'][10:-8]}{i['choices'][i['answer']]}" for i in items[:4]]
    rows = [{"text": text} for text in [*planted, *(f"another text {n}" * 9 for n in range(40))]]
    source = write_task(tmp_path, "source", rows)
    prepare(
        [f"--input_file_path={source}", f"--output_dir={tmp_path / 'data'}", "--val_split=0.05"]
    )
    evaluate.main(
        arguments(
            folder,
            model=models,
            out_dir=tmp_path / "out",
            data_dir=tmp_path / "tasks",
            contamination=tmp_path / "data",
            tasks="all",
        )
    )
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    record, other = map(json.loads, lines)
    assert other["tasks"]["animals"]["left_out"] == 1
    found = record["contamination"]["tasks"]["animals"]
    in_train = {m["id"] for m in found["found"]}
    assert in_train <= {f"animals-{n}" for n in range(4)} and len(in_train) >= 3
    assert {m["held"] for m in found["found"]} == {"question and gold"}
    assert "all - clean" in capsys.readouterr().out


def test_scores_of_clean_and_dirty_items(folder):
    """The items of the scan and of the results are matched by id, whatever their order."""
    task = read_task(folder / "tasks" / "animals.jsonl")
    ids, right = [item["id"] for item in task.items[:7]], [0, 1, 1, 1, 1, 1, 0]
    results = []
    for item, is_right in zip(task.items, right, strict=False):
        predicted = item["answer"] if is_right else (item["answer"] + 1) % 3
        logprobs = [-1.0] * len(item["choices"])
        results.append(
            {"id": item["id"], "predicted": {"acc_norm": predicted}, "logprobs": logprobs}
        )
    covered = dict(zip(ids, [0.0, 0.19, 0.2, 0.79, 0.8, 1.0, 0.5], strict=True))
    matches = [Match(name, 20, 13, covered[name], "", None, None) for name in reversed(ids)]
    result = report.TaskResult(task, results, {})
    header, row = report.contamination_table(
        {"animals": result}, {"animals": Report(matches, 0, 0)}
    )
    cells = dict(zip(header, row, strict=True))
    assert [cells[name] for name in ("items", "clean", "partly", "dirty")] == ["7", "2", "3", "2"]
    starts = {name: cells[name].split()[0] for name in ("all", "clean only", "dirty only")}
    assert starts == {"all": "0.7143", "clean only": "0.5000", "dirty only": "1.0000"}
    assert cells["all - clean"] == "+0.2143 (too few items)"
    (scores,) = [
        task["scores"]
        for task in report.contamination_record(
            {"animals": result}, {"animals": Report(matches, 0, 0)}, ""
        )["tasks"].values()
    ]
    assert scores["clean only"]["n"] == 2 and scores["all - clean"]["value"] > 0.2


def test_a_judge_that_is_a_local_model(folder, tmp_path, capsys):
    model, other = (folder / "run" / f"ckpt_{step:07d}.pt" for step in (10, 200))
    settings = arguments(folder, out_dir=tmp_path, tasks="essays", baseline=other, judge=model)
    evaluate.main(settings)
    printed = capsys.readouterr().out
    assert "this judge cannot be trusted here" in printed
    assert "\nnot to be believed: win rate" in printed
    record = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert record["judge"]["essays"]["n_pairs"] == len(TASKS["essays"])
    assert not record["judge"]["essays"]["trusted"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("not json", "line 2: not JSON"),
        ({"context": "a", "choices": [" b", " c"], "answer": 2}, "line 2: answer 2 is not one of"),
        ({"context": "a", "choices": [" b"], "answer": 0}, "line 2: at least two texts"),
        ({"context": "a", "choices": [" b", " "], "answer": 0}, "line 2: a text is empty"),
        ({"context": "a", "choices": [" b", " c"], "answer": "0"}, "line 2: answer must be a int"),
        ({"context": " ", "choices": [" b", " c"], "answer": 0}, "line 2: a text is empty"),
        ({"question": "a", "choices": ["b", "c"], "answer": "B"}, "line 2: choices need a context"),
        ({"text": "prose"}, "line 2 is of kind text, the first of choice: use two files"),
        ({"words": 1}, "line 2: its columns words are of no kind of task"),
        ([1], "line 2: a list, expected an object"),
        ({"id": "x", **choice(1)}, None),
        ({"id": "bad-0", **choice(1)}, "the id bad-0 stands at two items"),
    ],
)
def test_mistakes_in_a_task_are_one_line(folder, tmp_path, row, message):
    first = json.dumps(choice(0))
    text = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "bad.jsonl").write_text(f"{first}\n{text}\n")
    if message is None:
        assert len(read_task(tmp_path / "bad.jsonl").items) == 2
        return
    with pytest.raises(UserError, match=message) as error:
        read_task(tmp_path / "bad.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "animls"}, "there is no animls here: did you mean animals"),
        ({"data_dir": "/nowhere"}, "prepare_evaluation.py"),
        ({"model": "/nowhere/x.pt"}, "not there"),
        ({"model": "/nowhere/ckpt_*.pt"}, "no file fits"),
        ({"model": ""}, "--model is empty"),
        ({"form": "other"}, "must be one of cloze, letters"),
        ({"dtype": "int8"}, "must be float32"),
        ({"n_shots": 6, "tasks": "animals"}, "has 5 examples, fewer than --n_shots=6"),
        ({"n_shots": 1, "form": "letters", "tasks": "animals"}, "set --n_shots=0"),
        ({"tasks": "essays"}, "needs a judge"),
        ({"judge": "x"}, "set --baseline"),
        ({"judge": "x", "baseline": "y", "tasks": "animals"}, "there is none among --tasks"),
        ({"judge_workers": 0}, "at least 1"),
        ({"n_shots": 1, "tasks": "sums"}, "has no examples"),
        ({"device": "nonsense"}, "cannot be used here"),
        ({"limit": -1}, "at least 0"),
        ({"contamination": "/nowhere", "tasks": "animals"}, "/nowhere"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(arguments(folder, out_dir=tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_logits_that_are_not_finite_are_one_line(folder, tmp_path):
    path = save_model(tmp_path / "run" / "best_model.pt", 1, 1)
    state = torch.load(path)
    for name, factor in {"norm.weight": 1e36, "tok_embeddings.weight": 1e4}.items():
        state["model_state_dict"][name].mul_(factor)  # finite, but not what they are multiplied to
    torch.save(state, path)
    with pytest.raises(UserError, match="animals: the model's logits are not finite"):
        evaluate.main(arguments(folder, out_dir=tmp_path, model=path))


def test_a_folder_is_known_by_all_of_its_files(tmp_path):
    sums = set()
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_text("x")
        sums.add(evaluate.weights_sha256(tmp_path))
    (tmp_path / "README.md").write_text("x")
    assert len(sums) == 3 and evaluate.weights_sha256(tmp_path) in sums


def test_kinds_are_seen_from_the_columns():
    for name, kind in (
        ("animals", "choice"),
        ("who", "schema"),
        ("last", "last_word"),
        ("prose", "text"),
        ("sums", "generated"),
        ("essays", "judged"),
    ):
        assert {check_item(item) for item in TASKS[name]} == {kind}
    row = {"prompt": "x", "instruction_id_list": ["a"], "kwargs": [{}]}
    assert check_item(row) == "instructions"


def test_the_mean_is_over_the_core_tasks(folder):
    result = report.TaskResult(read_task(folder / "tasks" / "who.jsonl"), [], {})
    assert result.metrics == {} and report.core_mean({"piqa": result}) is None
