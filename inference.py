"""Chats with a model in the terminal or the browser, answers one prompt, completes, serves.

    python inference.py                                   # a chat with checkpoints_ft/best_model.pt
    python inference.py --web                             # the same in a browser, on this machine
    python inference.py --serve                           # OpenAI's protocol, on this machine
    python inference.py --prompt="What is the capital of France?"
    python inference.py --model=checkpoints/best_model.pt --completion --prompt="The sky is"
    echo "What is the capital of France?" | python inference.py --model=130m-instruct

From Python, with the history of the conversation kept between calls:

    from inference import lille
    model = lille("huggingface", "130m-instruct")  # or "torch", "onnx"; a .pt, a folder, a hub id
    model.chat("What is the capital of France?", max_new_tokens=50)
    for text in model.stream("And of Spain?"):
        print(text, end="", flush=True)
    model.reset_chat()
    model.generate("Artificial Intelligence is", max_new_tokens=50, temperature=0.9)

User text is encoded as ordinary text: it cannot become a control token.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import os
import sys

import torch

from common.errors import UserError
from common.settings import config_from_constants, run_script
from generation import chat_terminal, chat_web, server
from generation.backends import open_backend
from generation.conversation import Lille, Sampling

backend = "torch"  # "torch", "huggingface" or "onnx"
model = "checkpoints_ft/best_model.pt"  # a .pt, an exported folder, a hub id, "130m-instruct"
device = ""  # "cpu", "cuda"; empty: the GPU where there is one
dtype = ""  # "float32", "bfloat16", "float16"; "int8": torch on the CPU; empty: the model's

# What to do: with none of these, a chat in the terminal, or one answer to piped text
prompt = ""  # answer this and exit
completion = False  # continue the text, as a model that was only pretrained does
web = False  # a chat page in the browser (pip install -r requirements/web.txt)
serve = False  # answer programs that speak OpenAI's protocol (requirements/web.txt too)
port = 0  # port of the page or the server; 0: the first free one from 7860, or 8000
host = "127.0.0.1"  # address of the server; 0.0.0.0: other machines too, who need LILLE_API_KEY
speed = False  # print tokens per second after each answer

# Sampling
max_new_tokens = 500  # longest answer, tokens
temperature = 0.5  # 0: always the most likely token
top_p = 0.95  # keep the fewest tokens whose probabilities reach this; 1: all
top_k = 0  # keep this many tokens; 0: all
seed = 0  # seed of the sampling; -1: a new one in each run. The server's requests bring theirs


def lille(
    backend: str = "torch",
    model: str | os.PathLike = "checkpoints_ft/best_model.pt",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int | None = None,
) -> Lille:
    """Loads a model for chat and completion.

    `backend` is "torch" (everything), "huggingface" (transformers) or "onnx". `model` is a `.pt`, a
    folder that export.py wrote, a hub id, or "130m-instruct" / "130m-base". `device` None takes
    the GPU where there is one, `dtype` None the model's; "int8" (torch, CPU) decodes with weights
    rounded to eight bits. With a `seed` the same calls in the same order give the same texts.
    Raises UserError.
    """
    return Lille(*open_backend(backend, model, device, dtype), seed)


def piped_text() -> str:
    """Standard input as one prompt; UserError when it is empty or not UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin else ""
    except UnicodeDecodeError as error:
        raise UserError(f"the piped text is not UTF-8 (byte {error.start}): convert it") from None
    if not text.strip():
        raise UserError('nothing to answer: give a question, as in --prompt="Who are you?"')
    return text.removesuffix("\n")


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    try:
        prompt = chat_terminal.typed(config.prompt)
    except UnicodeError:
        raise UserError("--prompt is not UTF-8 text: convert it, or pipe it in as UTF-8") from None
    if config.web or config.serve:
        if prompt or config.completion or (config.web and config.serve):
            raise UserError("give one of --web, --serve, and --prompt or --completion")
        chat_web.require_gradio() if config.web else server.require_packages()
    elif not prompt.strip() and not (sys.stdin and sys.stdin.isatty()):
        prompt = piped_text()
    options = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k or None,
    }
    seed = None if config.seed == -1 else config.seed
    Sampling(**options)  # refuses values out of range before a model is loaded
    if config.serve:
        server.run(config, options)
        return 0
    model = lille(config.backend, config.model, config.device or None, config.dtype or None, seed)
    try:
        if config.web:
            chat_web.serve(model, options, config.port)
        elif prompt:
            chat_terminal.answer_once(model, prompt, options, config.completion, config.speed)
        else:
            chat_terminal.converse(model, options, config.completion, config.speed)
    except ValueError as error:
        raise UserError(str(error)) from None
    return 0


if __name__ == "__main__":
    run_script(main)
