"""Models that are not our own .pt: an exported or published folder, or its name on the hub.

    gpt = gpt_of_folder(model_folder("130m-instruct"))

A folder has config.json and safetensors, in one file or several; pickled weights are never read.
`checkpoint.load_model` calls these for every name that is not a .pt.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import file_sha256
from formats.llama import gpt_from_llama
from model import GPT

VERSIONS = {
    "130m-instruct": "Nikity/lille-130m-instruct",
    "130m-base": "Nikity/lille-130m-base",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def model_folder(name: str | Path) -> Path | None:
    """The folder of a model: `name` itself, or what the hub has under a hub id or version.

    None for anything else, such as a file. Raises UserError when the hub or the local cache of its
    files cannot give the model.
    """
    path = Path(name)
    if path.exists():
        return path if (path / CONFIG).is_file() else None
    repo_id = VERSIONS.get(str(name), str(name))
    is_file_name = path.suffix in (".pt", ".pth", ".bin", ".safetensors", ".onnx", ".gguf")
    if not HUB_ID.fullmatch(repo_id) or is_file_name or Path(repo_id).parent.is_dir():
        return None
    return download(repo_id)


def gpt_of_folder(folder: Path) -> GPT:
    """The model in a folder, in training mode; UserError, with what disagrees, if it is not one."""
    try:
        return gpt_from_llama(read_json(folder / CONFIG), read_tensors(folder))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
        if isinstance(value, dict):
            return value
        reason = "it is not an object"
    except (RecursionError, ValueError) as error:
        reason = str(error)
    raise UserError(f"{path.name} cannot be read as JSON: {reason}") from None


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, from model.safetensors or from the files that its index lists."""
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise UserError(
            f"no {WEIGHTS} (pickled weights are not read, they can run code): download the "
            "safetensors, or give the path of a .pt checkpoint"
        )
    tensors = {}
    place = weight_map(folder / INDEX)
    for file_name in sorted(set(place.values())):
        found = read_safetensors(folder / file_name)
        expected = {name for name in place if place[name] == file_name}
        for name in sorted(expected ^ set(found)):
            problem = "lacks" if name in expected else "also has"
            raise UserError(f"{file_name} {problem} {name}, otherwise than {INDEX} says")
        tensors |= found
    return tensors


def weight_map(path: Path) -> dict[str, str]:
    """Which file holds each tensor, from the index of weights in several files."""
    place = read_json(path).get("weight_map")
    if not isinstance(place, dict) or not place:
        raise UserError(f"{path.name} has no weight_map")
    for file_name in place.values():
        plain = isinstance(file_name, str) and file_name == Path(file_name).name
        if not plain or not file_name.endswith(".safetensors"):
            raise UserError(f"{path.name} names {file_name!r}, not a safetensors file beside it")
    return place


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


def download(repo_id: str) -> Path:
    """The folder in the local cache with the files of a model on the hub, all of one commit.

    What is in the cache is not fetched again, and without a network it is enough.
    """
    config = hub_file(repo_id, CONFIG)
    folder, commit = config.parent, config.parent.name
    if hub_file(repo_id, WEIGHTS, commit, optional=True) is None:
        index = hub_file(repo_id, INDEX, commit)
        for file_name in sorted(set(weight_map(index).values())):
            hub_file(repo_id, file_name, commit)
    return folder


def hub_file(
    repo_id: str, name: str, revision: str | None = None, optional: bool = False
) -> Path | None:
    """One file of a model, in the local cache; UserError in one line when that cannot be.

    With `optional`, None for a file that the model does not have.
    """
    import httpx2
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    what = f"{repo_id} ({name})"
    try:
        cached = isinstance(try_to_load_from_cache(repo_id, name, revision=revision), str)
        path = Path(hf_hub_download(repo_id, name, revision=revision))
    except RepositoryNotFoundError as error:  # a gated one too
        raise UserError(
            f"the hub has no model {repo_id}, or not for you: check the name, or set HF_TOKEN "
            f"({type(error).__name__})"
        ) from None
    except HFValidationError:
        raise UserError(f"{repo_id} is no hub id: write owner/name") from None
    except LocalEntryNotFoundError as error:
        if optional:
            return None
        if constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set: unset it for one run"
        else:
            cause = type(error.__cause__).__name__
            reason = f"{constants.ENDPOINT} cannot give it ({cause}): connect for one run"
        raise UserError(
            f"{what} is not in the local cache and {reason}, or give the path of a .pt or a folder"
        ) from None
    except EntryNotFoundError:
        if optional:
            return None
        raise UserError(f"{repo_id} has no {name}: not a model that Lille can read") from None
    except (httpx2.HTTPError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot fetch {what} ({reason}): check the network, run again") from None
    except OSError as error:
        if error.errno:  # of this machine's disk
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot fetch {what} ({reason}): check the network, run again") from None
    if not cached:
        check_download(path, what)
    return path


def check_download(path: Path, what: str) -> None:
    """Removes a file that does not have the sha256 which is the name of its place in the cache."""
    stored = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", stored.name) and file_sha256(stored) != stored.name:
        path.unlink()
        stored.unlink(missing_ok=True)
        raise UserError(
            f"{what} arrived damaged (another sha256 than the hub publishes): run again, or look "
            "for a proxy that changes it"
        )
