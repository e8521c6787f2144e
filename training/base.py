"""The model that a run starts from: a new one, or that of a checkpoint or a folder."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from checkpoint import check_tokenizer, load_checkpoint, model_from_checkpoint
from common.errors import UserError
from common.files import file_sha256
from formats.pretrained import INDEX, WEIGHTS, gpt_from_folder, tokenizer_in
from model import GPT, GPTConfig
from tokenizer import Tokenizer
from training.distributed import Ranks


def build_model(
    config: Any,
    tokenizer: Tokenizer,
    name: Path,
    checkpoint: dict[str, Any] | None,
    ranks: Ranks,
) -> GPT:
    """A new model, or with `init_from` that of `name`, to continue from or to start from.

    The context is that of the weights. Only a run that goes on with plain text may begin with a
    shorter one.
    """
    if config.init_from:
        begins = checkpoint is None
        checkpoint = checkpoint or ranks.broadcast(lambda: load_base(name, tokenizer))
        check_tokenizer(checkpoint, name, tokenizer.sha256)
        model = model_from_checkpoint(checkpoint, name, dropout=config.dropout)
        if begins and config.block_size != (longest := model.config.block_size):
            block_size = longest if config.finetune else min(config.block_size, longest)
            changes = {"dropout": config.dropout, "block_size": block_size}
            model = model_from_checkpoint(checkpoint, name, **changes)
            if ranks.is_main:
                print(f"context: block_size={block_size}, at most {longest}")
        if (vocab_size := model.config.vocab_size) != tokenizer.vocab_size:  # it names no tokenizer
            raise UserError(
                f"{name} has vocab_size={vocab_size}, the tokenizer {config.tokenizer} "
                f"{tokenizer.vocab_size} ids: start from a model that was trained with it"
            )
        return model
    try:
        shape = {f.name: getattr(config, f.name, f.default) for f in dataclasses.fields(GPTConfig)}
        return GPT(GPTConfig(**shape | {"vocab_size": tokenizer.vocab_size}))
    except ValueError as error:
        raise UserError(str(error)) from None


def load_base(path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of a checkpoint, or of a model's folder as if it were one.

    A model of another project gets rows for the tokens that ours adds to its tokenizer. UserError
    for a folder whose tokenizer cannot be read, or is not `tokenizer`.
    """
    if not path.is_dir():
        return load_checkpoint(path)
    if (theirs := tokenizer_in(path)).sha256 != tokenizer.sha256:
        raise UserError(
            f"{path} has a tokenizer of its own: give --tokenizer={path} to the prepare scripts "
            "and to train.py, or start from another model"
        )
    gpt = gpt_from_folder(path)
    weights, config = gpt.state_dict(), gpt.config
    if (n_own := theirs.n_own) != theirs.vocab_size:
        if config.vocab_size < n_own:
            raise UserError(f"{path}: its tokenizer has more ids than its model: fetch it again")
        embedding = gpt.tok_embeddings.weight.detach()[:n_own]  # rows of padding are left out
        embedding = with_new_rows(embedding, theirs.vocab_size - n_own)
        weights |= {"tok_embeddings.weight": embedding, "lm_head.weight": embedding}
        config = dataclasses.replace(config, vocab_size=theirs.vocab_size)
    entries = {"model_state_dict": weights, "model_args": config.to_dict()}
    return entries | {"tokenizer_sha256": theirs.sha256}


def with_new_rows(embedding: torch.Tensor, n_new: int) -> torch.Tensor:
    """The embedding (V, C) with `n_new` more rows, the mean of the others.

    With the mean a new token takes little probability from the others (Hewitt 2021, "Initializing
    new word embeddings for pretrained language models").
    """
    mean = embedding.float().mean(0).to(embedding.dtype)
    return torch.cat([embedding, mean.expand(n_new, -1)])


def base_hash(base: Path) -> str | None:
    """sha256 of a checkpoint or of a folder's weights, in several files that of their index.

    None if it is not there (any more), as a model on the hub whose run is continued.
    """
    files = [base / WEIGHTS, base / INDEX] if base.is_dir() else [base]
    return next((file_sha256(file) for file in files if file.is_file()), None)
