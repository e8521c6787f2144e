"""One owner for each output folder: neither preparation script touches a dataset of the other."""

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


def refuse_other_dataset(output: Path, script: str) -> None:
    """UserError if `output` holds a dataset of another script than `script`, finished or not."""
    for owner in STAGING_FOLDERS.keys() - {script}:
        staging = output / STAGING_FOLDERS[owner]
        if any(staging.glob("*")):
            raise UserError(
                f"{output} holds an unfinished dataset of {owner}: choose another --output_dir, or "
                f"delete {staging} if that dataset is not needed"
            )
        if any(output.glob(SHARD_PATTERNS[owner])):
            raise UserError(
                f"{output} holds a dataset of {owner}: choose another --output_dir, or move it away"
            )
