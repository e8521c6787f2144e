"""Does an exported folder compute what the model does? Asked with transformers, before it counts.

    check_folder(gpt, load_tokenizer(), Path("lille-hf.tmp"), torch.float32)

Compares token ids, the chat template, logits and greedy tokens, and prints the largest difference.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from model import GPT, rope_tables
from tokenizer import CONTROL_TOKENS, HARD_STRINGS, Tokenizer

PROMPTS = ("The capital of France is", "Once upon a time", "1, 2, 3, 4,", "def add(a, b):")
GREEDY_TOKENS = 32
# Two float32 computations in another order differ by less than this, or else by less than so many
# times what float32 itself is away from float64 in this model. Wrong weights differ by far more.
TOLERANCE, NOISE_FACTOR = 1e-4, 8.0


def check_folder(gpt: GPT, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Prints how close the folder is to the model; UserError when it is another model.

    Weights rounded to `dtype` are compared with the model's own, rounded alike, both computed in
    float32, so that the limit is the same for all.
    """
    import transformers

    custom = gpt.config.rope_style == "lille"
    with quiet_transformers():
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=custom)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=custom
        ).eval()
        rounded = copy.deepcopy(gpt).to("cpu", dtype).float().eval()
        rounded.rope_cos, rounded.rope_sin = rope_tables(gpt.config)
        check_tokenizer(theirs, tokenizer)
        difference, limit = largest_difference(rounded, loaded), TOLERANCE
        if difference > limit:
            limit = max(limit, NOISE_FACTOR * float32_noise(rounded))
        if not difference <= limit:  # NaN too
            refuse(f"its logits differ by {difference:.2g}, the limit is {limit:.2g}")
        n_tokens = check_greedy(rounded, loaded, theirs, limit)
    print(
        f"checked with transformers {transformers.__version__}: largest logit difference "
        f"{difference:.1e}, the same {n_tokens} greedy tokens"
    )
    if dtype != next(gpt.parameters()).dtype:
        changed = largest_difference(rounded, copy.deepcopy(gpt).to("cpu").float().eval())
        name = str(dtype).removeprefix("torch.")
        print(f"rounding the weights to {name} moves logits by up to {changed:.1e}")


def check_tokenizer(theirs: Any, tokenizer: Tokenizer) -> None:
    """The same ids for hard strings and for conversations that spell control tokens."""
    for text in HARD_STRINGS:
        if theirs(text, verbose=False)["input_ids"] != tokenizer.encode(text, allow_special=True):
            refuse(f"its tokenizer gives other ids for {text[:40]!r}")
    forged = " ".join(CONTROL_TOKENS)
    contents = [text for text in HARD_STRINGS if text] + [forged, "<|user|>Hi<|assistant|>"]
    chat = [
        {"role": ("user", "assistant")[turn % 2], "content": content}
        for turn, content in enumerate(contents)
    ]
    for n_messages, prompt in ((1, True), (2, False), (len(chat), len(chat) % 2 == 1)):
        messages = chat[:n_messages]
        ids = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=True, tokenizer_kwargs=QUIET
        )["input_ids"]
        if ids != tokenizer.encode_chat(messages, prompt):
            refuse("its chat template gives other ids than encode_chat")


QUIET = {"verbose": False}  # long texts are fine here: no model reads them


@torch.inference_mode()
def largest_difference(gpt: GPT, other: Any) -> float:
    """Largest difference of the logits of two models at a full context of random tokens."""
    config = gpt.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, config.block_size), generator=generator)
    ours, theirs = gpt(ids), other(ids)
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.logits
    return (ours - theirs).abs().max().item()


def float32_noise(gpt: GPT) -> float:
    """How far float32 is from float64 in the logits of a model."""
    return largest_difference(gpt, copy.deepcopy(gpt).double())


@torch.inference_mode()
def check_greedy(gpt: GPT, loaded: Any, theirs: Any, limit: float) -> int:
    """Greedy generation in one batch, padded on the left: each token is the model's best.

    Returns how many tokens were compared. One whose logit is as good as the best, within `limit`,
    is a tie that either may win.
    """
    room = gpt.config.block_size - GREEDY_TOKENS
    inputs = theirs(list(PROMPTS), return_tensors="pt", padding=True)
    inputs = {name: tensor[:, -max(1, room) :] for name, tensor in inputs.items()}
    n_prompt = inputs["input_ids"].shape[1]
    n_new = min(GREEDY_TOKENS, gpt.config.block_size - n_prompt)
    output = loaded.generate(**inputs, do_sample=False, max_new_tokens=n_new, **NO_SAMPLING)
    compared = 0
    for row, mask in zip(output, inputs["attention_mask"], strict=True):
        ids = row[n_prompt - int(mask.sum()) :]
        n_new = len(ids) - int(mask.sum())
        ends = torch.isin(ids[-n_new:], torch.tensor(loaded.generation_config.eos_token_id))
        if ends.any():
            n_new = int(ends.nonzero()[0]) + 1  # padding follows
            ids = ids[: int(mask.sum()) + n_new]
        best = gpt(ids[None, :-1])[0, -n_new:]  # (n_new, V)
        chosen = best.gather(1, ids[-n_new:, None])[:, 0]
        if (best.max(dim=-1).values - chosen > 2 * limit).any():
            refuse("its greedy tokens are others")
        compared += n_new
    return compared


NO_SAMPLING = {"temperature": None, "top_p": None, "top_k": None}  # or transformers warns


def refuse(reason: str) -> None:
    raise UserError(
        f"the export does not compute what the checkpoint does ({reason}), so it was not kept: "
        "export with the versions in requirements.txt, and report it if that does not help"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and notes."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
