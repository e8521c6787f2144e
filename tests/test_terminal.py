"""What hostile names and texts print: one line, without control characters."""

import sys

import pytest
import torch
from test_inference import TOKENIZER, scripted, small_gpt

from checkpoint import latest_checkpoint
from common.errors import UNPRINTABLE, printable
from common.settings import run_script
from generation import chat_terminal
from inference import lille
from training.metrics import evaluation_line

HOSTILE = "x\x1b]0;title\x07\x9b2J\r\nerror: forged\u202e\u2028"
ESCAPED = r"x\x1b]0;title\x07\x9b2J\r\nerror: forged\u202e\u2028"


def failure(main, capsys) -> str:
    """What run_script prints about the error of `main`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 2
    return capsys.readouterr().err


def check_line(text: str) -> None:
    assert r"x\x1b]0;title\x07" in text  # some messages join the lines of another one
    assert text.endswith("\n") and text.count("\n") == 1 and not UNPRINTABLE.search(text[:-1])


def test_printable():
    assert printable(HOSTILE) == ESCAPED and printable(ESCAPED) == ESCAPED
    text = "naïve café 東京 🚀 \u200d\u00a0\\ '"
    assert printable(text) == text
    assert printable("a\n\tb\r\x00\x7f\x85\u2069", keep="\n\t") == "a\n\tb\\r\\x00\\x7f\\x85\\u2069"


def test_a_bug_shows_its_traceback_without_control_characters(capsys):
    def main():
        raise KeyError("\x1b[2J") from RuntimeError("\x1b[2J\x07")

    with pytest.raises(SystemExit):
        run_script(main)
    report = capsys.readouterr().err
    assert "Traceback" in report and r"RuntimeError: \x1b[2J\x07" in report
    assert report.count("\n") > 5 and not UNPRINTABLE.search(report.replace("\n", ""))


def test_names_in_a_parquet_file_and_its_own_name(tmp_path, capsys, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    import prepare_dataset_fineweb as fineweb

    monkeypatch.setattr(fineweb, "load_tokenizer", lambda path: TOKENIZER)
    pq.write_table(pa.table({"text": ["a"], HOSTILE: ["b"]}), tmp_path / "a.parquet")
    settings = [f"--output_dir={tmp_path / 'out'}", "--val_split=0.5", "--language_filter="]
    settings += ["--language_score_threshold=0", "--min_int_score=0", "--remove_duplicates=False"]
    line = failure(lambda: fineweb.main([f"--source={tmp_path}", *settings]), capsys)
    assert "its columns" in line
    check_line(line)
    folder = tmp_path / "in"
    folder.mkdir()
    columns = {"text": [f"text {i}" for i in range(20)], "id": [f"urn:{i}" for i in range(20)]}
    pq.write_table(pa.table(columns), folder / f"{HOSTILE}.parquet")
    assert fineweb.main([f"--source={folder}", *settings]) == 0
    lines = capsys.readouterr().out.splitlines(keepends=True)
    check_line(next(line for line in lines if "documents kept" in line))


@pytest.mark.parametrize("backend", ["torch", "huggingface"])
def test_tensor_names_of_a_folder(backend, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    from test_model import llama_twin

    llama_twin(small_gpt(n_layers=1))[0].save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file(load_file(weights) | {HOSTILE: torch.ones(1)}, weights, metadata={"format": "pt"})
    check_line(failure(lambda: lille(backend, tmp_path, "cpu"), capsys))


def test_tensor_names_of_a_checkpoint(tmp_path, capsys):
    gpt = small_gpt(n_layers=1)
    state = {"model_state_dict": gpt.state_dict() | {HOSTILE: torch.ones(1)}}
    torch.save(state | {"model_args": gpt.config.to_dict()}, tmp_path / "model.pt")
    check_line(failure(lambda: lille("torch", tmp_path / "model.pt", "cpu"), capsys))


def test_names_of_a_damaged_checkpoint(tmp_path, capsys):
    folder = tmp_path / HOSTILE
    folder.mkdir()
    (folder / "ckpt_0000001.pt").write_bytes(b"damaged")
    assert latest_checkpoint(folder) is None
    line = capsys.readouterr().err
    assert line.startswith("skipped a checkpoint")
    check_line(line)


def test_text_of_a_model(monkeypatch, capsys):
    options = {"max_new_tokens": 100, "temperature": 0.0}
    for is_terminal, expected in ((True, ESCAPED.replace(r"\n", "\n")), (False, HOSTILE)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
        chat_terminal.answer_once(scripted(HOSTILE), "Hi", options, False, False)
        assert capsys.readouterr().out == expected + "\n"  # a pipe gets the exact text
    line = evaluation_line(1, {"val_loss": 1.0, "sample": HOSTILE}, False)
    check_line(line.partition("\n")[2] + "\n")
