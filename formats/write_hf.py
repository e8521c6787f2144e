"""Writes a model as a folder for transformers and everything that reads its format.

    export_hf(gpt, load_tokenizer(), Path("lille-hf"), "float32", facts={"Steps": "12,000"})

A plain Llama, which needs no custom code; with rope_style="lille" a folder that includes
modeling_lille.py and needs `trust_remote_code=True`. The folder is written under a temporary name,
loaded with transformers, compared with the model, and only then renamed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from formats.atomic_export import atomic_export
from formats.chat_template import MARK, hf_chat_template
from formats.llama import llama_config, llama_state_dict
from formats.model_card import model_card
from formats.pretrained import quiet_transformers
from formats.verify import (
    N_NEW_TOKENS,
    TOLERANCES,
    Reference,
    check_chat_template,
    check_token_ids,
    compare,
    float32_copy,
    make_references,
    mismatch,
)
from model import GPT
from tokenizer import ASSISTANT, CONTROL_TOKENS, END_OF_TEXT, START_OF_TEXT, USER, Tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHTS, MODELING = "model.safetensors", "modeling_lille.py"
NAMES = (  # of every export
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json, with a normalizer that removes the chat template's marks."""
    steps = [
        {"type": "Replace", "pattern": {"String": pattern}, "content": content}
        for pattern, content in ((MARK + "1", ""), (MARK + "0", MARK))
    ]
    return json.loads(tokenizer.json_text) | {
        "normalizer": {"type": "Sequence", "normalizers": steps}
    }


def tokenizer_config(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """tokenizer_config.json; the class is the one that transformers 4 and 5 both know."""
    control_tokens = json.loads(tokenizer.json_text)["added_tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": CONTROL_TOKENS[0],
        "additional_special_tokens": [ASSISTANT, USER],
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": block_size,
        "padding_side": "left",
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in control_tokens
        },
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: stop tokens, and the sampling settings of inference.py."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [tokenizer.eos_id, tokenizer.user_id],
        "pad_token_id": tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.95,
        "top_k": 0,
    }


def export_hf(
    gpt: GPT,
    tokenizer: Tokenizer,
    output_dir: Path,
    dtype: str,
    facts: dict[str, str],
    name: str = "",
) -> None:
    """Writes `output_dir` and verifies it against `gpt`; `dtype` is a name in DTYPES.

    `facts` are rows of the model card, `name` the model's id on the hub there. Raises UserError,
    with `output_dir` unchanged, when the folder does not compute what `gpt` computes. Both compute
    in float32 with rounded weights, so the tolerance is the same for all dtypes.
    """
    rounded = float32_copy(gpt, DTYPES[dtype])
    references = make_references(rounded, tokenizer)
    with atomic_export(output_dir, NAMES, (MODELING,)) as folder:
        write_folder(rounded, tokenizer, folder, dtype)
        write_text(folder / "README.md", model_card(gpt, tokenizer, "hf", dtype, facts, name))
        print(verify_folder(folder, rounded, tokenizer, references, f"hf {dtype}"))
    if gpt.tok_embeddings.weight.dtype != DTYPES[dtype]:
        original = float32_copy(gpt)
        difference = compare(references, lambda ids: original(torch.tensor([ids]))[0]).difference
        print(f"rounding the weights to {dtype} moves logits by up to {difference:.1e}")


def write_folder(gpt: GPT, tokenizer: Tokenizer, folder: Path, dtype: str) -> None:
    """Writes the files of an export but its card; `gpt` is on the CPU."""
    from safetensors.torch import save

    tensors = {
        name: tensor.to(DTYPES[dtype]).contiguous()
        for name, tensor in llama_state_dict(gpt).items()
    }
    # not save_file, whose error on a full disk is no OSError
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", llama_config(gpt.config, tokenizer, dtype))
    write_json(folder / "generation_config.json", generation_config(tokenizer))
    write_tokenizer(folder, tokenizer, gpt.config.block_size)
    if gpt.config.rope_style == "lille":
        shutil.copy(Path(__file__).with_name(MODELING), folder)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Writes the files of transformers' AutoTokenizer."""
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, block_size))
    write_text(folder / "chat_template.jinja", hf_chat_template())


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def verify_folder(
    folder: Path, gpt: GPT, tokenizer: Tokenizer, references: list[Reference], name: str
) -> str:
    """Compares a folder, loaded with transformers, with `gpt`; a line about the comparison.

    Token ids, chat template, logits, greedy tokens. Raises UserError when they differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": gpt.config.rope_style == "lille"}
    with quiet_transformers():
        hf_tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        check_token_ids(lambda text: hf_tokenizer(text, verbose=False)["input_ids"], tokenizer)
        check_chat_template(hf_tokenizer, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        comparison = compare(references, lambda ids: model(torch.tensor([ids])).logits[0])
        line = comparison.check_or_raise(name, TOLERANCES[32])
        check_greedy(gpt, model, hf_tokenizer, references, comparison.limit(TOLERANCES[32]))
    return line


@torch.inference_mode()
def check_greedy(
    gpt: GPT, model: Any, hf_tokenizer: Any, references: list[Reference], limit: float
) -> None:
    """Raises UserError unless greedy tokens of transformers' `generate` are those of `gpt`.

    The prompts are one batch, padded on the left. A token whose logit is the best one's within
    `limit` is a tie.
    """
    prompts = [r.ids[: r.n_prompt] for r in references if len(r.ids) > r.n_prompt]
    inputs = hf_tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    n_padded = inputs["input_ids"].shape[1]
    n_new = min(N_NEW_TOKENS, gpt.config.block_size - n_padded)
    no_sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(**inputs, **no_sampling, max_new_tokens=n_new, eos_token_id=None)
    for row, prompt in zip(output, prompts, strict=True):
        ids = row[n_padded - len(prompt) :]
        logits = gpt(ids[None, :-1])[0, len(prompt) - 1 :]  # (n_new, V)
        logits_of_ids = logits.gather(1, ids[len(prompt) :, None])[:, 0]
        if (logits.amax(dim=-1) - logits_of_ids > 2 * limit).any():
            raise mismatch("its greedy tokens are others")
