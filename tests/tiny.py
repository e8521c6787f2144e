"""Small settings and inputs, and exact comparisons, for the tests of interrupted runs."""

import random
from pathlib import Path
from typing import Any

TINY = {  # a training run
    "n_layers": 2,
    "n_embd": 16,
    "n_heads": 2,
    "n_kv_heads": 1,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_epochs": 2,
    "warmup_iters": 3,
    "learning_rate": 3e-3,
    "embedding_learning_rate": 3e-2,
    "hess_interval": 3,
    "eval_interval": 2,
    "eval_rows": 8,
    "log_interval": 1,
    "dropout": 0.1,
    "sample_tokens": 0,
    "compile": False,
    "device": "cpu",
}
FINEWEB = {"val_split": 0.02, "shard_size": 60_000, "remove_duplicates": True}
WORDS = "the cat sat on a mat and saw two dogs run over old green hills while rain fell".split()


def text(rng: random.Random, n: int) -> str:
    """`n` short documents."""
    documents = (" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for _ in range(n))
    return "<|endoftext|>".join(documents)


def write_parquet(path: Path, rng: random.Random, n: int, row_group_size: int = 100) -> None:
    """A file in FineWeb's columns; some documents are in French, unsure, empty or repeated."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 300))) for _ in range(n)]
    for i in range(0, n - 1, 50):
        texts[i] = ("", "once more", texts[i])[i // 50 % 3]
    columns = {
        "text": texts,
        "id": [f"<urn:{path.stem}:{i}>" for i in range(n)],
        "language": ["fr" if rng.random() < 0.1 else "en" for _ in texts],
        "language_score": [0.9 + 0.1 * rng.random() for _ in texts],
        "token_count": [len(text.split()) for text in texts],
        "int_score": [rng.choice([3, 4, 5]) for _ in texts],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def make_source(folder: Path, n_files: int, rng: random.Random, n: int = 600) -> Path:
    """A folder of Parquet files of `n` documents each."""
    folder.mkdir()
    for i in range(n_files):
        write_parquet(folder / f"{i:03d}.parquet", rng, n)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the staging folder's too, but no lock of a killed process."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def newest(out_dir: Path) -> Path | None:
    return max(out_dir.glob("ckpt_*.pt"), default=None)


def difference(ours: Any, theirs: Any, where: str = "") -> str | None:
    """Where two checkpoints differ, down to the last bit; paths aside."""
    import torch

    if isinstance(ours, torch.Tensor):
        return None if torch.equal(ours, theirs) else where
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return f"{where}: keys {ours.keys() ^ theirs.keys()}"
        keys = sorted(ours.keys() - {"out_dir", "resume_checkpoint"}, key=str)
        found = (difference(ours[key], theirs[key], f"{where}.{key}") for key in keys)
        return next(filter(None, found), None)
    if isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return f"{where}: lengths {len(ours)} and {len(theirs)}"
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next(filter(None, (difference(a, b, f"{where}[{i}]") for i, (a, b) in pairs)), None)
    return None if ours == theirs else f"{where}: {ours} and {theirs}"
