"""Language models that are evaluated: ours, and any causal model that transformers reads.

    model = open_model("checkpoints/best_model.pt")          # or an exported folder, or a hub id
    model = open_model("SmolLM2-135M-Instruct.Q4_1.gguf")    # a peer, with its own tokenizer

Each has a tokenizer of its own and computes logits for rows in which a token attends to what a mask
allows, which is all that scoring needs.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoint import checkpoint_tokenizer, load_checkpoint, model_from_checkpoint
from common.errors import UserError, one_line
from formats.pretrained import (
    folder_tokenizer,
    gpt_from_folder,
    quiet_transformers,
    resolve_model,
)
from model import GPT
from tokenizer import Tokenizer, load_tokenizer

LONGEST_CONTEXT = 8192  # tokens; of peers that allow more


class LanguageModel(Protocol):
    """A model with its tokenizer. `block_size` is the longest sequence, in tokens."""

    block_size: int
    device: torch.device
    facts: dict[str, int | None]  # "parameters" and training "step"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of ordinary text, without control tokens."""

    def logits(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Logits (N, V) at `places` (N,) of one row: ids and positions (T,), mask (T, T)."""

    def n_bytes(self, token: int) -> int:
        """Length of a token's text in bytes."""

    def prompt_ids(self, text: str, chat: bool) -> list[int]:
        """Token ids of a text to continue, or of a user's turn to answer."""

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        """The most probable continuations (temperature 0) up to the end of the text or turn."""


class Lille:
    """Our model."""

    def __init__(self, gpt: GPT, step: int | None = None, tokenizer: Tokenizer | None = None):
        self.gpt, self.tokenizer = gpt.eval(), tokenizer or load_tokenizer()
        self.facts = {"parameters": gpt.n_parameters(), "step": step}
        self.block_size = gpt.config.block_size
        self.device = gpt.tok_embeddings.weight.device

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.tokenizer.encode_batch(texts)]

    def logits(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        x = self.gpt.hidden(ids[None], positions[None], mask=mask[None, None])
        return self.gpt.lm_head(x[0, places])

    def n_bytes(self, token: int) -> int:
        return int(self.tokenizer.token_bytes[token])

    def prompt_ids(self, text: str, chat: bool) -> list[int]:
        if not chat:
            return self.tokenizer.encode(text)
        return self.tokenizer.encode_chat([{"role": "user", "content": text}], True)

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        stop = (self.tokenizer.eos_id, self.tokenizer.user_id, self.tokenizer.bos_id)
        rows = self.gpt.generate(prompts, max_new_tokens, temperature=0, stop_tokens=stop)
        return [self.tokenizer.decode(row) for row in rows]


class Peer:
    """A causal language model of transformers, without a BOS token, as in lm-evaluation-harness.

    Raises UserError for one that does not compute the same with a mask and positions of our own,
    such as a model with ALiBi.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.facts = {"parameters": model.num_parameters(), "step": None}
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.block_size = min(longest or LONGEST_CONTEXT, LONGEST_CONTEXT)
        self.device = model.device
        self.check(name)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:  # which a fast tokenizer refuses
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def logits(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        output = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=mask[None, None],
            use_cache=False,
            logits_to_keep=places,
        )
        return output.logits[0]

    def n_bytes(self, token: int) -> int:
        text = self.tokenizer.decode([token])
        return 1 if "\ufffd" in text else len(text.encode())  # a part of a character

    def prompt_ids(self, text: str, chat: bool) -> list[int]:
        if not chat:
            return self.encode([text])[0]
        if self.tokenizer.chat_template is None:
            raise UserError("this model has no chat template: set --prompt=plain")
        turn = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=False
        )

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        size = max(map(len, prompts))
        filled = [[0] * (size - len(ids)) + ids for ids in prompts]
        mask = [[0] * (size - len(ids)) + [1] * len(ids) for ids in prompts]
        ids = torch.tensor(filled, device=self.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.tensor(mask, device=self.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id or 0,
        )
        return self.tokenizer.batch_decode(output[:, size:], skip_special_tokens=True)

    @torch.inference_mode()
    def check(self, name: str) -> None:
        """Compares two sequences in one row with each of them alone."""
        first, second = self.encode(
            ["The cat sat on the mat and looked", "Two plus two makes four"]
        )
        ids = torch.tensor(first + second, device=self.device)
        positions = torch.tensor([*range(len(first)), *range(len(second))], device=self.device)
        mask = torch.block_diag(*(torch.ones(len(part), len(part)) for part in (first, second)))
        mask = mask.tril().bool().to(self.device)
        last = torch.tensor([len(ids) - 1], device=self.device)
        try:
            logits = self.logits(ids, positions, mask, last).float()
            alone = self.model(ids[None, len(first) :]).logits[0, -1:].float()
            agrees = logits.shape == alone.shape and torch.allclose(logits, alone, 1e-2, 5e-2)
        except Exception as error:  # any that a model's own code raises
            raise UserError(f"{name} cannot be evaluated here: {one_line(error)}") from None
        if not agrees:
            raise UserError(
                f"{name} cannot be evaluated here: it does not follow a given attention mask and "
                "positions, as models with ALiBi or a recurrent state"
            )


def open_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Lille | Peer:
    """The model at a path or hub id: ours where it has our tokenizer, otherwise transformers'.

    `name` is a `.pt`, a folder with config.json, a hub id, "130m-instruct", "130m-base" or a GGUF.
    Raises UserError for anything else.
    """
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise UserError(f"{name} is not there: give the path of a .gguf file")
        return open_peer(name, device, dtype, Path(name).parent, gguf_file=Path(name).name)
    path = resolve_model(name, with_tokenizer=True)
    if path.is_file():
        state = load_checkpoint(path)
        model = model_from_checkpoint(state, path).to(device, dtype)
        tokenizer = checkpoint_tokenizer(state, path, model.config.vocab_size)
        return Lille(model, state.get("iter_num"), tokenizer)
    try:
        tokenizer = folder_tokenizer(path)
    except UserError:
        return open_peer(name, device, dtype, path)
    return Lille(gpt_from_folder(path).to(device, dtype), None, tokenizer)


def open_peer(name: str, device: str, dtype: torch.dtype, folder: Path, **source: str) -> Peer:
    """A model of transformers with its tokenizer."""
    with quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            with redirect_stderr(io.StringIO()):  # the bars of the GGUF reader
                tokenizer = AutoTokenizer.from_pretrained(folder, **source)
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=dtype, attn_implementation="sdpa", **source
                )
        except Exception as error:  # any that a reader of a foreign file raises
            raise UserError(f"transformers cannot read {name}: {one_line(error)}") from None
    return Peer(model.to(device), tokenizer, name)
