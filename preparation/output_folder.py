"""One owner for each output folder: neither preparation script touches a dataset of the other."""

import json
from pathlib import Path

from common.errors import UserError

# Of each script: its temporary folder in the output folder, and the names of its training shards.
STAGING_FOLDERS = {
    "prepare_dataset.py": ".prepare_dataset",
    "prepare_dataset_fineweb.py": ".preparing",
}
SHARD_PATTERNS = {
    "prepare_dataset.py": "train.npz",
    "prepare_dataset_fineweb.py": "train-*-of-*.npz",
}
# What is unfinished data there. An earlier prepare_dataset.py left train.npz in ".preparing".
STAGED = {"prepare_dataset.py": "*", "prepare_dataset_fineweb.py": "part-*/*"}
NO_DATA = ("run.json", ".lock")


def refuse_other_dataset(output: Path, script: str) -> None:
    """UserError if `output` holds a dataset of another script than `script`, finished or not."""
    for owner in STAGING_FOLDERS.keys() - {script}:
        staging = output / STAGING_FOLDERS[owner]
        if any(path.name not in NO_DATA for path in staging.glob(STAGED[owner])):
            raise UserError(
                f"{output} holds an unfinished dataset of {owner}: choose another --output_dir, or "
                f"delete {staging} if that dataset is not needed"
            )
        if any(output.glob(SHARD_PATTERNS[owner])) or owner_in_manifest(output) == owner:
            raise UserError(
                f"{output} holds a dataset of {owner}: choose another --output_dir, or move it away"
            )


def owner_in_manifest(output: Path) -> str | None:
    """The script that wrote manifest.json; None if there is none that can be read."""
    try:
        settings = json.loads((output / "manifest.json").read_bytes())["settings"]
    except (OSError, KeyError, RecursionError, TypeError, ValueError):
        return None
    return "prepare_dataset_fineweb.py" if "files" in settings else "prepare_dataset.py"
