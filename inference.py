"""Talk to a checkpoint: one answer to one prompt.

    python inference.py --prompt="What is the capital of France?"
    python inference.py --model=checkpoints/best_model.pt --completion=True --prompt="The sky"

From Python: `answer(load_model(path), load_tokenizer(), "Hello")`. A chat in the terminal, history
and streaming are not here yet.
"""

import torch

from checkpoint import load_model
from config import UserError, config_from_constants, run_script
from model import GPT
from tokenizer import Tokenizer, load_tokenizer

model = "checkpoints_ft/best_model.pt"  # a .pt checkpoint
prompt = ""  # what to say to it
completion = False  # True: continue the text, as a model that was only pretrained does
max_new_tokens = 500
temperature = 0.5  # 0: always the most likely token
top_p = 0.95  # keep the fewest tokens whose probabilities reach this; 1: all
top_k = 0  # keep this many tokens; 0: all
seed = 0  # of the sampling


def answer(
    gpt: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    completion: bool = False,
    max_new_tokens: int = 500,
    temperature: float = 0.5,
    top_p: float | None = 0.95,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """The model's reply to a user turn, or the continuation of a text with `completion`.

    Raises ValueError when the prompt is empty or does not fit the context.
    """
    if completion:
        ids = tokenizer.encode(prompt)
    else:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
    generator = torch.Generator(gpt.tok_embeddings.weight.device).manual_seed(seed)
    (new,) = gpt.generate(
        [ids],
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        stop_tokens=(tokenizer.eos_id, tokenizer.user_id),
        generator=generator,
    )
    return tokenizer.decode(new).strip("\n" if completion else None)


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    if not config.prompt.strip():
        raise UserError('nothing to answer: give a question, as in --prompt="Who are you?"')
    gpt, tokenizer = load_model(config.model), load_tokenizer()
    settings = {
        "completion": config.completion,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k or None,
        "seed": config.seed,
    }
    try:
        text = answer(gpt, tokenizer, config.prompt, **settings)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(config.prompt + text if config.completion else text)
    return 0


if __name__ == "__main__":
    run_script(main)
