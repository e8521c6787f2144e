"""manifest.json: the tokenizer and sources of a dataset, and each file's size and sha256."""

import json
import os
import reprlib
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_file, file_sha256, sync_directory
from common.signals import interrupts_deferred

FORMAT_VERSION = 1
HASHED_SPLIT_BYTES = 1 << 30  # a split up to this size has its sha256 checked when it is opened

# The fields that readers use, with their types.
FIELDS = {"complete": bool, "kind": str, "tokenizer": dict, "files": dict}
TOKENIZER_FIELDS = {"sha256": str, "vocab_size": int}
FILE_FIELDS = {"sha256": str, "bytes": int, "documents": int, "tokens": int}


def make_manifest(
    kind: str,
    tokenizer: Any,
    sources: list[dict[str, Any]],
    settings: dict[str, Any],
    dropped: dict[str, dict[str, int]],
    files: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The content of manifest.json.

    `kind` is "text" or "chat"; `sources` are {"name", "bytes", "sha256"}; `dropped` counts the
    {"documents", "tokens"} left out, by reason; `files` maps file names to the entries that
    `ShardWriter.write` returns.
    """
    return {
        "format_version": FORMAT_VERSION,
        "complete": True,
        "kind": kind,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "sources": sources,
        "settings": settings,
        "documents": sum(entry["documents"] for entry in files.values()),
        "tokens": sum(entry["tokens"] for entry in files.values()),
        "dropped": dropped,
        "files": files,
    }


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest atomically, in ASCII: a source's name need not be valid Unicode."""
    with atomic_file(path) as file:
        file.write(json.dumps(manifest, indent=2).encode("ascii") + b"\n")


def read_manifest(data_dir: str | Path) -> dict[str, Any] | None:
    """The manifest of a dataset, None if it has none; UserError if it is damaged or incomplete."""
    path = Path(data_dir, "manifest.json")
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        manifest = None
    if not (
        has_fields(manifest, FIELDS)
        and has_fields(manifest["tokenizer"], TOKENIZER_FIELDS)
        and all(has_fields(entry, FILE_FIELDS) for entry in manifest["files"].values())
    ):
        raise UserError(f"{path} is damaged: prepare the dataset again")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        version = reprlib.repr(version)
        raise UserError(f"{path} has format {version}, not {FORMAT_VERSION}: prepare it again")
    if not manifest["complete"]:
        raise UserError(f"{path}: replacing the files was cut off: prepare the dataset again")
    return manifest


def has_fields(value: Any, fields: dict[str, type]) -> bool:
    """Whether `value` is a dictionary with all `fields`, each of its type."""
    return isinstance(value, dict) and all(
        isinstance(value.get(name), kind) for name, kind in fields.items()
    )


def publish(staging: Path, data_dir: Path, manifest: dict[str, Any]) -> None:
    """Moves finished shards from `staging` into `data_dir` (the same disk) with their manifest.

    Until the last file is in place the manifest is marked incomplete, and read_manifest refuses the
    dataset, so a mixture of old and new files cannot be read. All that a full disk or Ctrl-C could
    stop is done before the first file is replaced.
    """
    write_manifest(staging / "incomplete.json", manifest | {"complete": False})
    write_manifest(staging / "manifest.json", manifest)
    with interrupts_deferred():
        os.replace(staging / "incomplete.json", data_dir / "manifest.json")
        for name in [*manifest["files"], "manifest.json"]:
            os.replace(staging / name, data_dir / name)
        sync_directory(data_dir)


def check_manifest(
    data_dir: Path,
    manifest: dict[str, Any],
    paths: list[Path],
    tokenizer_sha256: str | None,
    vocab_size: int | None,
) -> None:
    """UserError unless the manifest matches the tokenizer and the files at `paths`.

    Compares the sha256 of a split of up to HASHED_SPLIT_BYTES, and only the sizes of a larger one.
    """
    tokenizer, remedy = manifest["tokenizer"], "prepare the dataset again"
    name = data_dir / "manifest.json"
    if tokenizer_sha256 is not None and tokenizer["sha256"] != tokenizer_sha256:
        hashes = f"{tokenizer['sha256'][:12]}, not {tokenizer_sha256[:12]}"
        raise UserError(
            f"{name}: made with another tokenizer ({hashes}): give as --tokenizer the one that "
            f"made these shards, or {remedy} with this one"
        )
    if vocab_size is not None and tokenizer["vocab_size"] > vocab_size:
        sizes = f"{tokenizer['vocab_size']} ids, the model takes {vocab_size}"
        raise UserError(f"{name}: made with a larger tokenizer ({sizes}): {remedy}")
    entries = [manifest["files"][path.name] for path in paths]
    compare_hashes = sum(entry["bytes"] for entry in entries) <= HASHED_SPLIT_BYTES
    for path, entry in zip(paths, entries, strict=True):
        if not path.is_file():
            raise UserError(f"{path} is missing: copy it there, or {remedy}")
        size, difference = path.stat().st_size, None
        if size != entry["bytes"]:
            difference = f"has {size:,} bytes, its manifest says {entry['bytes']:,}"
        elif compare_hashes and file_sha256(path) != entry["sha256"]:
            difference = "does not have the sha256 of its manifest"
        if difference:
            raise UserError(f"{path} {difference}: copy it again, or {remedy}")
