"""runs/dpo.sh and the example of docs/alignment.md with TRL and PEFT (requirements/align.txt)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
from checkpoint import load_model
from common.files import atomic_file
from model import GPT, GPTConfig
from tokenizer import load_tokenizer

pytest.importorskip("trl", reason="needs requirements/align.txt")
pytest.importorskip("peft", reason="needs requirements/align.txt")
ROOT = Path(__file__).resolve().parents[1]
QUESTION = {"role": "user", "content": "Who <|assistant|> are you?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("I am Lille.", "I am a person."))


def run(command: list[str], cwd: Path, home: Path) -> None:
    environment = os.environ | {
        "STEPS": "12",
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home),
    }
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def log_odds(folder: Path) -> float:
    """By how much the good answer is likelier than the bad one, in nats."""
    gpt, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer()
    scores = []
    for answer in (GOOD, BAD):
        prompt = tokenizer.encode_chat([QUESTION], add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode_chat([QUESTION, answer])])
        with torch.inference_mode():
            scores_of_all = gpt(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
        scores.append(scores_of_all[0, len(prompt) - 1 :].sum().item())
    return scores[0] - scores[1]


def test_preferences_are_learned_and_the_result_is_a_model_of_ours(tmp_path):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_embd=64, n_layers=2, n_heads=2, n_kv_heads=1, block_size=64))
    with atomic_file(tmp_path / "model.pt") as file:
        state = {"model_state_dict": gpt.state_dict(), "model_args": gpt.config.to_dict()}
        torch.save(state | {"tokenizer_sha256": load_tokenizer().sha256}, file)
    line = {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}
    (tmp_path / "preferences.jsonl").write_text(48 * (json.dumps(line) + "\n"))
    names = [str(tmp_path / name) for name in ("model.pt", "preferences.jsonl", "aligned")]
    run(["sh", "runs/dpo.sh", *names], ROOT, tmp_path / "home")
    before, after = (log_odds(tmp_path / "aligned" / name) for name in ("before", "model"))
    assert after > before + 0.01
    again = [f"--model={tmp_path}/aligned/model", f"--output_dir={tmp_path}/again"]
    assert export.main(again) == 0

    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/alignment.md").read_text(), re.DOTALL
    )
    chats = json.dumps({"messages": [QUESTION, GOOD]}) + "\n"
    (tmp_path / "chats.jsonl").write_text(8 * chats)
    shorter = code.replace("max_length=512,", "max_length=64, max_steps=3, learning_rate=1e-2,")
    run([sys.executable, "-c", shorter], tmp_path, tmp_path / "home")
    assert log_odds(tmp_path / "sft" / "model") > before
