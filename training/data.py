"""The rows that a run trains on and is judged by, from the shards in its settings."""

from pathlib import Path
from typing import Any

from common.errors import UserError, printable
from common.mixture import DataSet, parse_mixture
from dataset import open_split
from tokenizer import Tokenizer
from training.packing import ChatFormat, PackedRows


def open_rows(
    directory: str,
    split: str,
    tokenizer: Tokenizer,
    block_size: int,
    seed: int,
    chat: bool,
    n_epochs: int = 1,
    setting: str = "data_dir",
) -> PackedRows:
    """The packed rows of a split of one data set or of a mixture.

    Validation has every text of each set once. UserError when there is no label to train on.
    """
    shards, sources = [], []
    for data_set in parse_mixture(directory, "finetune_data_dir" if chat else setting):
        found = open_split(data_set.folder, split, tokenizer.sha256, tokenizer.vocab_size)
        shards += found
        sources += [data_set if split == "train" else DataSet(data_set.folder)] * len(found)
    format = ChatFormat(tokenizer.bos_id, tokenizer.user_id, tokenizer.assistant_mask)
    format = format if chat else None
    rows = PackedRows(shards, block_size, tokenizer.pad_id, seed, format, sources, n_epochs)
    if rows.batch(range(min(64, rows.rows_per_epoch))).n_labels == 0:
        context = f"the context of {block_size} tokens"
        kind = f"conversation that fits {context}" if chat else "text"
        raise UserError(
            f"{directory}: the first epoch of its {split} split has no {kind}: prepare it again, "
            "or raise the weights of a mixture"
        )
    return rows


def open_validation(
    config: Any, pretrain_data_dir: str, tokenizer: Tokenizer, block_size: int
) -> dict[str, PackedRows]:
    """Validation rows by name: "val", of a mixture also those of each data set.

    And those of `watch_data_dir`; a fine-tune also watches the loss on the pretraining data.
    """
    common = ("val", tokenizer, block_size, 0)
    validation = {"val": open_rows(config.data_dir, *common, config.finetune)}
    folders = [data_set.folder for data_set in parse_mixture(config.data_dir)]
    names = [Path(folder).name for folder in folders]
    for folder, name in zip(folders, names, strict=True) if len(folders) > 1 else ():
        name = name if names.count(name) == 1 else folder
        validation[f"val/{name}"] = open_rows(folder, *common, config.finetune)
    if folder := config.watch_data_dir:
        validation["watch_val"] = open_rows(folder, *common, chat=False, setting="watch_data_dir")
    if config.finetune:
        try:
            validation["pretrain_val"] = open_rows(pretrain_data_dir, *common, chat=False)
        except UserError as error:
            print(f"no pretraining validation loss: {printable(error)}")
    return validation


def dataset_id(rows: PackedRows) -> str:
    """Size and fingerprint of a dataset; must match on every rank and on resume."""
    return f"{rows.description} ({rows.fingerprint()})"
