"""Writes a model as a folder for transformers and everything that reads its format.

    export_hf(gpt, load_tokenizer(), Path("lille-hf"), "float32", facts={"Steps": "12,000"})

A plain Llama, which needs no custom code; with rope_style="lille" a folder that brings
modeling_lille.py and needs `trust_remote_code=True`. The folder is written beside its place,
loaded with transformers, compared with the model, and only then put in place.

In the chat template a user's text cannot become a control token. Its "<|" is rendered with two
characters in between that nobody types, so that the tokenizer finds no control token there, and the
tokenizer's normalizer takes them out again: the ids are those of `Tokenizer.encode_chat`.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from formats.llama import llama_config, llama_state_dict
from formats.verify import check_finite, written_beside
from formats.verify_hf import check_folder
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

# In rendered text MARK is written MARK + "0", and "<" + MARK + "1|" stands for "<|".
MARK = "\ufdd0"  # a code point that Unicode keeps free of characters

# What an assistant writes lies between the generation tags, with its end token, for training masks.
TEMPLATE = """\
{#- U+FDD0 keeps text from spelling a control token; the normalizer in tokenizer.json undoes it. -#}
{%- macro text(content) -%}
{{- content | replace("MARK", "MARK0") | replace("<|", "<MARK1|") -}}
{%- endmacro -%}
{%- if not messages -%}
{{- raise_exception("a conversation is a non-empty list of messages") -}}
{%- endif -%}
{{- "START_OF_TEXT" -}}
{%- for message in messages -%}
{%- set expected = "user" if loop.index0 % 2 == 0 else "assistant" -%}
{%- if message["role"] != expected or message["content"] is not string -%}
{{- raise_exception("roles alternate user and assistant, starting with user, each with text") -}}
{%- endif -%}
{%- if expected == "user" -%}
{{- "USER" + text(message["content"]) -}}
{%- else -%}
{{- "ASSISTANT" -}}
{%- generation -%}
{{- text(message["content"]) + "END_OF_TEXT" -}}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if messages[-1]["role"] != "user" -%}
{{- raise_exception("add_generation_prompt needs a user turn at the end") -}}
{%- endif -%}
{{- "ASSISTANT" -}}
{%- endif -%}
"""


def chat_template(marked: bool = True) -> str:
    """The Jinja template of `Tokenizer.encode_chat`; it refuses what `check_messages` refuses.

    `marked` False is for a runtime without the normalizer: user text is rendered as it is.
    """
    names = {"START_OF_TEXT": START_OF_TEXT, "END_OF_TEXT": END_OF_TEXT}
    names |= {"USER": USER, "ASSISTANT": ASSISTANT, "MARK": MARK}
    template = TEMPLATE
    if not marked:
        replaced = ' | replace("MARK", "MARK0") | replace("<|", "<MARK1|")'
        assert replaced in template
        template = "".join(template.replace(replaced, "").splitlines(keepends=True)[1:])
    for name, value in names.items():
        template = template.replace(name, value)
    return template


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json: Hastings, with a normalizer that undoes what the chat template marks."""
    replacements = [(MARK + "1", ""), (MARK + "0", MARK)]
    steps = [
        {"type": "Replace", "pattern": {"String": pattern}, "content": content}
        for pattern, content in replacements
    ]
    return json.loads(tokenizer.json_text) | {
        "normalizer": {"type": "Sequence", "normalizers": steps}
    }


def tokenizer_config(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """tokenizer_config.json; the class is the one that transformers 4 and 5 both know."""
    added = json.loads(tokenizer.json_text)["added_tokens"]
    pad = CONTROL_TOKENS[0]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": pad,
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
            for token in added
        },
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: where a turn ends, and the sampling that inference.py uses."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": [tokenizer.eos_id, tokenizer.user_id],
        "pad_token_id": tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.95,
        "top_k": 0,
    }


def model_card(gpt: GPT, tokenizer: Tokenizer, dtype: str, facts: dict[str, str]) -> str:
    """README.md: what it is, how to use it, and the facts that the checkpoint itself holds."""
    config, custom = gpt.config, gpt.config.rope_style == "lille"
    argument = ", trust_remote_code=True" if custom else ""
    kind = (
        "This is **not** a plain Llama: its position encoding is the one that the original Lille "
        f"weights were trained with, which `{MODELING}` in this folder computes. Load it with "
        "`trust_remote_code=True`."
        if custom
        else "A plain `LlamaForCausalLM`: it needs no custom code."
    )
    rows = {"Parameters": f"{gpt.n_parameters():,}"}
    rows |= {name: str(value) for name, value in config.to_dict().items() if name != "dropout"}
    rows |= {"Weights": dtype, "Tokenizer (Hastings) sha256": tokenizer.sha256} | facts
    table = "\n".join(f"| {cell(name)} | {cell(value)} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- lille
---

# Lille

A small language model. {kind}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder{argument})
model = AutoModelForCausalLM.from_pretrained(folder{argument})
messages = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Messages alternate user and assistant; there is no system role. The context is {config.block_size}
tokens. What a message spells, such as `{USER}`, stays ordinary text in the chat template; in a
direct call of the tokenizer it is a control token unless you pass `split_special_tokens=True`.

| | |
|---|---|
{table}
"""


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def export_hf(
    gpt: GPT, tokenizer: Tokenizer, output_dir: Path, dtype: str, facts: dict[str, str]
) -> None:
    """Writes, checks and puts in place the folder of `gpt`; `dtype` is a name in DTYPES.

    `facts` go into the model card. Raises UserError, with `output_dir` as it was, when the folder
    that was written does not compute what `gpt` computes.
    """
    check_finite(gpt, DTYPES[dtype])
    with written_beside(output_dir, NAMES, (MODELING,)) as folder:
        write_folder(gpt, tokenizer, folder, dtype, facts)
        check_folder(gpt, tokenizer, folder, DTYPES[dtype])


def write_folder(
    gpt: GPT, tokenizer: Tokenizer, folder: Path, dtype: str, facts: dict[str, str]
) -> None:
    tensors = {
        name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in llama_state_dict(gpt).items()
    }
    save_tensors(tensors, folder / WEIGHTS)
    for name, value in {
        "config.json": llama_config(gpt.config, tokenizer, dtype),
        "generation_config.json": generation_config(tokenizer),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer, gpt.config.block_size),
    }.items():
        write_text(folder / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    # safetensors makes its file readable for its owner alone
    shutil.copymode(folder / "config.json", folder / WEIGHTS)
    write_text(folder / "chat_template.jinja", chat_template())
    write_text(folder / "README.md", model_card(gpt, tokenizer, dtype, facts))
    if gpt.config.rope_style == "lille":
        shutil.copy(Path(__file__).with_name(MODELING), folder)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file; OSError, such as that of a full disk, when it cannot."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
