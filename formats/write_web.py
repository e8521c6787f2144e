"""Writes a GPT as a web page that chats with it, in the browser and without a server of its own.

    export_web(gpt, load_tokenizer(), Path("lille-web"), ["int8"], title="Lille")
    python -m http.server --directory lille-web

The folder is the one of write_onnx.py with `web/index.html`, `web/chat.js` and settings.json. The
page loads transformers.js and onnxruntime's WebAssembly from jsDelivr, or from the folder itself
if it was exported with a copy of them, and checks their hashes.
"""

import base64
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from formats import write_onnx
from formats.atomic_export import atomic_export
from formats.model_card import model_card
from formats.onnx_runtime import FILES
from formats.verify import require_packages
from formats.write_hf import write_json, write_text
from model import GPT
from tokenizer import Tokenizer

CDN = "https://cdn.jsdelivr.net/npm/"
# Files of the library: package, version, path in the package, sha384.
LIBRARY = {
    "transformers": (
        "@huggingface/transformers",
        "4.3.2",
        "dist/transformers.min.js",
        "xFDNfwR3J/vPYzGjMr1VSM8LHIcA+ii2Ha4x+6WAuISKpT9I0dxgF/mVQW+I0kSd",
    ),
    "runtime": (
        "onnxruntime-web",
        "1.31.0-dev.20260914-8d85527a0",
        "dist/ort-wasm-simd-threaded.asyncify.mjs",
        "ik7L7J2uXfXmGuWHh3yOUDPpUslz/dJjcvZgdX5hcItLjxlkEpUF7mpCcATr3Dg8",
    ),
    "wasm": (
        "onnxruntime-web",
        "1.31.0-dev.20260914-8d85527a0",
        "dist/ort-wasm-simd-threaded.asyncify.wasm",
        "JuzrCV6BUmTUbsgNhgU94qo0vZ4l3w0VqgQAKPm0La2hXL9kmv8P9pGenfsWJY9c",
    ),
}
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
PAGE = Path(__file__).with_name("web")
NAMES = (*write_onnx.NAMES, "index.html", "chat.js", "settings.json")
COPIES = tuple(f"library/{Path(path).name}" for _, _, path, _ in LIBRARY.values())
JS_NAMES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "q4": "q4"}  # in transformers.js


def export_web(
    gpt: GPT,
    tokenizer: Tokenizer,
    output_dir: Path,
    dtypes: Sequence[str] = ("int8",),
    facts: dict[str, str] | None = None,
    name: str = "",
    title: str = "Lille",
    library: str = "",
) -> None:
    """Writes the folder `output_dir`; as `write_onnx.export_onnx` otherwise.

    `title` is the page's heading. `library` is a node_modules folder whose files of transformers.js
    are copied into the export; without it the page loads them from jsDelivr. Raises UserError if
    they are of another version.
    """
    require_packages(write_onnx.PACKAGES, "web")
    files = pinned_files(library)
    with atomic_export(output_dir, NAMES, (*write_onnx.OPTIONAL, *COPIES)) as folder:
        write_onnx.write_folder(gpt, tokenizer, folder, dtypes)
        card = model_card(gpt, tokenizer, "web", ", ".join(dtypes), facts or {}, name)
        write_text(folder / "README.md", card)
        for name in ("index.html", "chat.js"):
            shutil.copyfile(PAGE / name, folder / name)
        if library:
            (folder / "library").mkdir()
            for part, copy in zip(LIBRARY, COPIES, strict=True):
                shutil.copyfile(source_file(library, part), folder / copy)
        settings = {
            "title": title,
            "dtypes": [JS_NAMES[dtype] for dtype in FILES if dtype in dtypes],
            "context": gpt.config.block_size,
            "control": {
                "start": tokenizer.bos_id,
                "end": tokenizer.eos_id,
                "user": tokenizer.user_id,
                "assistant": tokenizer.assistant_id,
            },
            "library": files,
        }
        write_json(folder / "settings.json", settings)


def pinned_files(library: str) -> dict[str, dict[str, Any]]:
    """URL, hash and type of each file of the library, as chat.js fetches them."""
    files = {}
    for (name, (package, version, path, sha384)), copy in zip(LIBRARY.items(), COPIES, strict=True):
        url = f"{CDN}{package}@{version}/{path}"
        if library:
            url, file = copy, source_file(library, name)
            if not file.is_file():
                raise UserError(f"{file} is not there: npm install {package}@{version}")
            found = base64.b64encode(hashlib.sha384(file.read_bytes()).digest()).decode()
            if found != sha384:
                raise UserError(
                    f"{file} is not that of version {version}: npm install {package}@{version}"
                )
        kind = TYPES[Path(path).suffix]
        files[name] = {"url": url, "integrity": f"sha384-{sha384}", "type": kind}
    return files


def source_file(library: str, name: str) -> Path:
    package, _, path, _ = LIBRARY[name]
    return Path(library, package, path)
