"""The file of a tokenizer: the `tokenizers` JSON of a byte-level BPE, in one spelling.

Files of other projects are brought to that spelling, so that one sha256 identifies a tokenizer.
"""

import itertools
import json
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

TEMPLATE_MARK = "\ufdd0"  # a noncharacter, see formats/chat_template.py


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order of the ids (33-126 come first)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


def byte_level_json(
    vocab: dict[str, int],
    merges: Sequence[str],
    control: dict[str, int],
    pre_tokenizer: dict[str, Any] | None = None,
    ignore_merges: bool = False,
) -> str:
    """The `tokenizers` JSON of a byte-level BPE, in one spelling, whose sha256 identifies it.

    `vocab` maps pieces, in the characters of `bytes_to_unicode`, to ids, `control` the
    control tokens; a merge is "left right". `pre_tokenizer` None is GPT-2's.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    options = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    byte_level = {"type": "ByteLevel", **options}
    settings = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # No merge makes a control token. One behind the vocabulary is not in it as well.
        "added_tokens": [
            {"id": token_id, "content": content, **flags, "special": True}
            for content, token_id in sorted(control.items(), key=itemgetter(1))
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer or byte_level,
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
            "ignore_merges": ignore_merges,
            "vocab": dict(sorted(vocab.items(), key=itemgetter(1))),
            "merges": list(merges),
        },
    }
    return json.dumps(settings, ensure_ascii=False, indent=1) + "\n"


def standard_json(settings: dict[str, Any], control_names: Sequence[str]) -> tuple[str, int]:
    """`byte_level_json` of a file of `tokenizers` with a byte-level BPE, and the number of its ids.

    Bytes and control tokens that it lacks get the next ids. Its other special tokens become text
    that only their ids produce. NFC, and what an export has for the marks of its chat template, are
    left out: texts are encoded as they are.
    ValueError for what else would give other ids than the file does on plain text.
    """
    model, added, pre_tokenizer = (settings[k] for k in ("model", "added_tokens", "pre_tokenizer"))
    affixes = (model.get("end_of_word_suffix"), model.get("continuing_subword_prefix"))
    other = model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or any(affixes)
    if other or pre_tokenizer is None:
        raise ValueError("it is no byte-level BPE")
    if '"Removed"' in json.dumps(pre_tokenizer):
        raise ValueError("it leaves parts of a text out")
    normalizer = settings.get("normalizer") or {"type": "NFC"}
    steps = normalizer.get("normalizers", [normalizer])
    for step in steps:
        pattern = step.get("pattern", {}).get("String", "")
        of_template = step["type"] == "Replace" and pattern.startswith(TEMPLATE_MARK)
        if step["type"] != "NFC" and not of_template:
            raise ValueError(f"it changes texts ({step['type']})")
    vocab, control, table = dict(model["vocab"]), {}, bytes_to_unicode()
    for token in added:
        content, token_id = token["content"], token["id"]
        if not token.get("special", True):
            raise ValueError(f"it looks for {content!r} in plain text")
        vocab.pop(content, None)
        if content in control_names:
            control[content] = token_id
            continue
        piece = "".join(table[byte] for byte in content.encode("utf-8"))
        if vocab.setdefault(piece, token_id) != token_id:
            raise ValueError(f"{content!r} is an added token and a piece")
    n_ids = max([*vocab.values(), *control.values()]) + 1
    next_id = itertools.count(n_ids)
    vocab |= {piece: next(next_id) for piece in table.values() if piece not in vocab}
    control |= {name: next(next_id) for name in control_names if name not in control}
    last = max(vocab.values())  # in `tokenizers` only a token of the vocabulary has an id below it
    vocab |= {name: token_id for name, token_id in control.items() if token_id < last}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    defaults = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    defaults |= {"use_regex": True}  # those of `tokenizers`
    steps = [
        defaults | step if step["type"] == "ByteLevel" else step
        for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    ]
    pre_tokenizer = pre_tokenizer | {"pretokenizers": steps} if len(steps) > 1 else steps[0]
    ignore_merges = bool(model.get("ignore_merges"))
    return byte_level_json(vocab, merges, control, pre_tokenizer, ignore_merges), n_ids
