"""The model card, README.md of an export: description, usage, shape, and facts about the training.

model_card(gpt, tokenizer, "hf", "float32", {"Optimizer steps": "12,000"})
"""

import json

from model import GPT
from tokenizer import USER, Tokenizer

QUESTION = "What is the capital of France?"
LIBRARIES = {"hf": "transformers", "onnx": "transformers.js", "web": "transformers.js"}
LIBRARIES["gguf"] = "gguf"
HF = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model}{argument})
model = AutoModelForCausalLM.from_pretrained({model}{argument})
messages = [{{"role": "user", "content": {question}}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
ONNX = """\
In JavaScript, with transformers.js:

```js
import {{ pipeline }} from "@huggingface/transformers";

const generator = await pipeline("text-generation", {model}, {{ dtype: "{dtype}" }});
const messages = [{{ role: "user", content: {question} }}];
const output = await generator(messages, {{ max_new_tokens: 100 }});
console.log(output[0].generated_text.at(-1).content);
```

In Python, onnxruntime-genai loads the folder: `onnxruntime_genai.Model(folder)`."""
WEB = """\
A web page that chats with the model in the browser: `python -m http.server --directory FOLDER`,
then http://localhost:8000. Any static host will do.

"""
GGUF = """\
With Ollama, in the folder of this file and of `{modelfile}`:

```sh
ollama create lille -f {modelfile}
ollama run lille {question}
```

With llama.cpp: `llama-cli -m {file}`. Ollama's template cannot mark a control token that a message
spells, so there it is one."""
CUSTOM = """\
This is **not** a plain Llama: its position encoding is the one that the original Lille weights were
trained with, which `modeling_lille.py` in this folder computes. Load it with
`trust_remote_code=True`."""
PLAIN = "A plain `LlamaForCausalLM`: it needs no custom code."


def model_card(
    gpt: GPT,
    tokenizer: Tokenizer,
    format: str,
    dtype: str,
    facts: dict[str, str],
    name: str = "",
    file: str = "",
) -> str:
    """The card of an export; `name` is its id on the hub, `file` the name of a GGUF."""
    config = gpt.config
    custom = format == "hf" and config.rope_style == "lille"
    usage = {"hf": HF, "onnx": ONNX, "web": WEB + ONNX, "gguf": GGUF}[format].format(
        model=json.dumps(name) if name else "folder",
        question=json.dumps(QUESTION),
        argument=", trust_remote_code=True" if custom else "",
        dtype=dtype.split(", ")[0].replace("int8", "q8"),
        file=file,
        modelfile=file.replace(".gguf", ".Modelfile"),
    )
    rows = {"Parameters": f"{gpt.n_parameters():,}"}
    rows |= {name: str(value) for name, value in config.to_dict().items() if name != "dropout"}
    rows |= {"Weights": dtype, "Tokenizer sha256": tokenizer.sha256} | facts
    table = "\n".join(
        f"| {markdown_cell(name)} | {markdown_cell(value)} |" for name, value in rows.items()
    )
    kind = "" if format != "hf" else " " + (CUSTOM if custom else PLAIN)
    return f"""---
library_name: {LIBRARIES[format]}
pipeline_tag: text-generation
tags:
- lille
---

# Lille

A small language model.{kind}

{usage}

Messages alternate user and assistant; there is no system role. The context is {config.block_size}
tokens. What a message spells, such as `{USER}`, stays ordinary text in the chat template; in a
direct call of the tokenizer it is a control token unless you split special tokens.

| | |
|---|---|
{table}
"""


def markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
