"""Uploads of exports to a local server that speaks the hub's protocol."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants

import export
from checkpoint import load_model
from common.errors import UserError
from formats import push_hub, write_gguf
from formats.model_card import model_card
from model import GPT, GPTConfig
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_embd=32, n_layers=1, n_heads=2, n_kv_heads=1, block_size=64))
    path = tmp_path_factory.mktemp("model") / "best_model.pt"
    state = {"model_state_dict": gpt.state_dict(), "model_args": gpt.config.to_dict()}
    state |= {"iter_num": 1200, "best_val_loss": 2.5, "config": {"optimizer": "sophiag"}}
    torch.save(state, path)
    return path


@pytest.fixture
def hub(monkeypatch):
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def front_matter(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def test_what_is_pushed_is_the_export(checkpoint, hub, tmp_path, capsys):
    arguments = [f"--model={checkpoint}", f"--output_dir={tmp_path / 'hf'}", "--push=me/lille"]
    assert export.main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"pushed to {hub.url}/me/lille\n")
    repository = hub.repositories["models", "me/lille"]
    local = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert repository.private and repository.files == local
    card = local["README.md"].decode()
    assert front_matter(card)["library_name"] == "transformers"
    assert 'from_pretrained("me/lille")' in card and "| Optimizer steps | 1,200 |" in card
    ids = torch.arange(9)[None]
    assert torch.equal(load_model(tmp_path / "hf")(ids), load_model(checkpoint)(ids))

    files = push_hub.files_to_push(tmp_path / "hf")
    push_hub.push(files | {"README.md": card.replace("1,200", "2,400")}, "me/lille", public=True)
    assert b"2,400" in repository.files["README.md"]
    assert repository.private  # an earlier repository keeps its visibility
    push_hub.push({"a/b.txt": "text"}, "me/open", public=True)
    assert not hub.repositories["models", "me/open"].private
    assert hub.repositories["models", "me/open"].files == {"a/b.txt": b"text"}
    push_hub.push({"a/c.txt": "new", "notes.txt": "mine"}, "me/open", public=True)
    push_hub.push({"a/d.txt": "newer"}, "me/open", public=True)
    files = {"notes.txt": b"mine", "a/d.txt": b"newer"}
    assert hub.repositories["models", "me/open"].files == files
    with pytest.raises(UserError, match="me/open is public already: add --public"):
        push_hub.push({"a/d.txt": "secret"}, "me/open", public=False)
    assert hub.repositories["models", "me/open"].files == files


def test_refusals_are_one_line(hub, monkeypatch):
    hub.add("models", "me/theirs", {})
    hub.repositories["models", "me/theirs"].refusal = (403, "")

    def refusal(repo_id: str, files: dict) -> str:
        with pytest.raises(UserError, match=f"cannot push to {repo_id} ") as error:
            push_hub.push(files, repo_id, public=False)
        assert "\n" not in str(error.value) and TOKEN not in str(error.value)
        return str(error.value)

    files = {"a.txt": "text"}
    assert "HTTP 403: log in with a token that may write there" in refusal("me/theirs", files)
    assert "Invalid metadata" in refusal("me/bad", {"README.md": "---\n- a list\n---\n"})
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "HTTP 401: log in" in refusal("me/lille", files)
    hub.log_in = True
    assert "the export is kept, run again to retry" in refusal("me/lille", files)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the export is kept, run again to retry" in refusal("me/lille", files)
    for repo_id in ("lille", "me/", "me/li lle", "a/b/c"):
        with pytest.raises(UserError, match="give the name of a repository, as in user/name"):
            export.main(["--model=none.pt", f"--push={repo_id}"])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="not logged in to the hub: run `hf auth login`"):
        export.main(["--model=none.pt", "--push=me/lille"])  # before any work


def test_a_gguf_with_its_modelfile_and_card(checkpoint, hub, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="pip install -r requirements/export.txt")
    arguments = [f"--model={checkpoint}", "--format=gguf", f"--output_dir={tmp_path}/small.gguf"]
    assert export.main([*arguments, "--push=me/lille-gguf"]) == 0
    files = hub.repositories["models", "me/lille-gguf"].files
    assert set(files) == {"small.gguf", "small.Modelfile", "README.md"}
    assert files["small.gguf"] == (tmp_path / "small.gguf").read_bytes()
    assert "ollama create lille -f small.Modelfile" in files["README.md"].decode()
    lines = files["small.Modelfile"].decode().splitlines()
    assert lines[1] == "FROM ./small.gguf" and "PARAMETER num_ctx 64" in lines
    assert lines[2] == (
        'TEMPLATE """<|startoftext|>{{ range .Messages }}{{ if eq .Role "user" }}<|user|>'
        "{{ .Content }}{{ else }}<|assistant|>{{ .Content }}<|endoftext|>{{ end }}{{ end }}"
        '<|assistant|>"""'
    )
    (tmp_path / "small.Modelfile").write_text("FROM ./mine.gguf")
    monkeypatch.setattr(write_gguf, "verify_file", lambda *_: "")  # the first one was verified
    export.main(arguments)
    assert (tmp_path / "small.Modelfile").read_text() == "FROM ./mine.gguf"  # a user's own


@pytest.mark.parametrize("format", ["hf", "onnx", "web", "gguf"])
def test_cards(format):
    gpt = GPT(GPTConfig(n_embd=32, n_layers=1, n_heads=2, n_kv_heads=1, block_size=64))
    facts = {"A | B": "line\nbreak"}
    card = model_card(gpt, load_tokenizer(), format, "fp32", facts, "me/lille", "m.gguf")
    assert front_matter(card)["pipeline_tag"] == "text-generation"
    assert "| A \\| B | line break |" in card and "{" not in card.split("```")[0]
