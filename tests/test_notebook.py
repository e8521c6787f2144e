"""The notebook runs from top to bottom on a small checkpoint, and draws its pictures."""

import os
from pathlib import Path

import nbclient
import nbformat
import torch

from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]


def test_the_notebook_runs(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = GPTConfig(
        n_layers=2, n_embd=64, n_heads=4, n_kv_heads=2, vocab_size=32768, block_size=128
    )
    state = {
        "model_state_dict": GPT(config).state_dict(),
        "model_args": config.to_dict(),
        "iter_num": 7,
        "best_val_loss": 10.4,
    }
    torch.save(state, tmp_path / "best_model.pt")
    monkeypatch.setenv("LILLE_CHECKPOINT", str(tmp_path / "best_model.pt"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT)]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "notebooks" / "use_lille.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # committed without any
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2 and all(len(p.data["image/png"]) > 5000 for p in pictures)
    for part in ("parameters, step 7", "user: What is the capital of France?", "wrote "):
        assert part in text
    difference = float(text.partition("largest difference of a logit: ")[2].split()[0])
    assert difference < 1e-4
