"""Models by name: a checkpoint, an exported or published folder, or its id on the Hub.

    gpt = gpt_from_folder(resolve_model("130m-instruct"))

A folder has config.json and safetensors, in one file or several. Pickled weights and code in a
folder are never loaded.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.errors import MALFORMED_ANSWER, UserError
from common.files import file_sha256
from formats.llama import ORIGINAL_TYPE, gpt_from_llama
from model import GPT
from tokenizer import Tokenizer, load_tokenizer

VERSIONS = {
    "130m-instruct": "Nikity/lille-130m-instruct",
    "130m-base": "Nikity/lille-130m-base",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json")
TOKENIZER_FILES += ("chat_template.jinja", "generation_config.json")
FILE_TYPES = (".pt", ".pth", ".bin", ".safetensors", ".onnx", ".gguf")


def resolve_model(name: str | Path, with_tokenizer: bool = False) -> Path:
    """The file or the folder, with a config.json, of a model; downloads it if it is on the Hub.

    `name` is a path, a hub id, or one of VERSIONS; an existing path comes first. `with_tokenizer`:
    its tokenizer is downloaded too. Raises UserError for anything else, and when neither the Hub
    nor the local cache has the model.
    """
    path = Path(name)
    if path.is_file() or (path / CONFIG).is_file():
        return path
    repo_id = VERSIONS.get(str(name), str(name))
    is_path = path.exists() or path.suffix in FILE_TYPES or Path(repo_id).parent.is_dir()
    if HUB_ID.fullmatch(repo_id) and not is_path:
        return download(repo_id, TOKENIZER_FILES if with_tokenizer else ())
    what = "a folder without config.json" if path.is_dir() else "not there"
    raise UserError(
        f"{name} is {what}: give the path of a .pt checkpoint or of an exported folder, a hub "
        f"id like {VERSIONS['130m-instruct']}, or {' or '.join(VERSIONS)}"
    )


def gpt_from_folder(folder: Path) -> GPT:
    """The model in a folder, in training mode; UserError if its files contradict each other."""
    try:
        return gpt_from_llama(read_json(folder / CONFIG), read_tensors(folder))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # UserError too
        raise UserError(f"{folder}: {' '.join(str(error).split())[:300]}") from None


def tokenizer_in(folder: Path) -> Tokenizer:
    """The tokenizer of a folder: Hastings in the original's, or where there is none of its size.

    Raises UserError if it cannot be read.
    """
    config = read_json(folder / CONFIG)
    if config.get("model_type") == ORIGINAL_TYPE:  # whose files of it only transformers reads
        return load_tokenizer()
    if any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file():
        tokenizer = load_tokenizer(folder)
        if (config.get("tokenizer_sha256") or tokenizer.sha256) != tokenizer.sha256:
            raise UserError(
                f"{folder} has another tokenizer.json than the model was exported with: export it "
                f"again, or remove tokenizer_sha256 from {CONFIG} if both were extended since"
            )
        return tokenizer
    hastings = load_tokenizer()
    vocab_size, sha256 = config.get("vocab_size"), config.get("tokenizer_sha256")
    if vocab_size != hastings.vocab_size or (sha256 or hastings.sha256) != hastings.sha256:
        raise UserError(
            f"{folder} has a vocabulary of {vocab_size} and no tokenizer.json: add its file"
        )
    return hastings


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in the folder of a Lille model.

    Raises UserError unless the model has an id for each of its tokens, our control tokens included.
    """
    tokenizer = tokenizer_in(folder)
    vocab_size = read_json(folder / CONFIG).get("vocab_size")
    if vocab_size != tokenizer.vocab_size or tokenizer.n_own != tokenizer.vocab_size:
        raise UserError(
            f"{folder} has a vocabulary of {vocab_size} and its tokenizer {tokenizer.n_own} ids of "
            f"the {tokenizer.vocab_size} that it needs here: it is not a Lille model"
        )
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is not a JSON object")
    return content


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, from model.safetensors or from the files that its index lists."""
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        if (folder / "onnx").is_dir():
            raise UserError(f"it has graphs for onnxruntime, no {WEIGHTS}: set backend='onnx'")
        raise UserError(
            f"no {WEIGHTS} (pickled weights are not read, they can run code): download the "
            "safetensors, or give the path of a .pt checkpoint"
        )
    tensors = {}
    for file_name in sorted(set(read_json(folder / INDEX).get("weight_map", {}).values())):
        if file_name != Path(file_name).name:
            raise UserError(f"{INDEX} names {file_name!r}, not a safetensors file beside it")
        tensors |= read_safetensors(folder / file_name)
    return tensors


def count_tensors(folder: Path) -> int:
    """The number of tensors in a folder, by their names alone."""
    from safetensors import safe_open

    if not (folder / WEIGHTS).is_file():
        return len(read_json(folder / INDEX)["weight_map"])
    with safe_open(folder / WEIGHTS, "pt") as file:
        return len(file.keys())


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path.name} is damaged ({reason}): fetch or export it again") from None
    except FileNotFoundError:
        raise UserError(f"{path.name} is missing: fetch or export it again") from None


def download(repo_id: str, also: tuple[str, ...] = ()) -> Path:
    """The folder in the local cache with a model's config.json and safetensors, of one commit.

    Downloads what the cache lacks, and verifies its sha256; what is cached is enough without a
    network. Raises UserError.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import get_session, tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs | {"disable": True})

    files = {"allow_patterns": [CONFIG, INDEX, "model*.safetensors", *also]}

    def limit_waiting(request: Any) -> None:  # snapshot_download would wait for ever
        limits = request.extensions["timeout"]
        limits |= {name: limits[name] or constants.HF_HUB_ETAG_TIMEOUT for name in limits}

    cached = None
    get_session().event_hooks["request"].append(limit_waiting)
    try:
        try:
            cached = snapshot_download(repo_id, local_files_only=True, **files)
        except LocalEntryNotFoundError:
            pass
        folder = snapshot_download(repo_id, tqdm_class=NoBar if cached else None, **files)
    except HFValidationError:
        raise UserError(f"{repo_id} is no hub id: write owner/name") from None
    except RepositoryNotFoundError as error:  # a gated one too
        raise UserError(
            f"the hub has no model {repo_id}, or not for you: check the name, or set HF_TOKEN "
            f"({type(error).__name__})"
        ) from None
    except LocalEntryNotFoundError as error:
        if constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set: unset it for one run"
        else:
            cause = type(error.__cause__).__name__
            reason = f"{constants.ENDPOINT} cannot give it ({cause}): connect for one run"
        raise UserError(
            f"{repo_id} is not in the local cache and {reason}, or give the path of a .pt or a "
            "folder"
        ) from None
    except (HTTPError, OSError, *MALFORMED_ANSWER) as error:
        if getattr(error, "errno", None):  # of the local disk
            error.filename = error.filename or constants.HF_HUB_CACHE
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"cannot fetch {repo_id} ({reason}): check the network, run again"
        ) from None
    if not Path(folder, CONFIG).is_file():
        raise UserError(f"{repo_id} has no {CONFIG}: not a model that Lille can read")
    if folder != cached:
        for path in Path(folder).glob("*.safetensors"):
            check_sha256(path, repo_id)
    return Path(folder)


def check_sha256(path: Path, repo_id: str) -> None:
    """Removes a cached file whose content does not have the sha256 that names it in the cache."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and file_sha256(blob) != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{repo_id} ({path.name}) arrived damaged (another sha256 than the hub publishes): run "
            "again, or look for a proxy that changes it"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' progress bars and messages in the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
