"""The object that `inference.lille` returns: chat with history, completion, streaming."""

import codecs
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import UserError
from generation.backends import Backend
from ops.sampling import check_sampling, sample
from tokenizer import Tokenizer

Message = dict[str, str]  # {"role": "user" or "assistant", "content": ...}


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer; UserError for values out of range."""

    max_new_tokens: int = 500
    temperature: float = 0.5  # 0: always the most likely token
    top_p: float | None = 0.95  # the fewest tokens whose probabilities reach this; None: all
    top_k: int | None = None  # the k most likely tokens; None: all
    do_sample: bool = True  # False: always the most likely token
    seed: int | None = None  # makes this call repeatable

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed={self.seed} must be from 0 to 2**63 - 1")


@dataclass
class Report:
    """Token counts and times of the latest answer; times in seconds from the first computation."""

    prompt_tokens: int
    dropped_turns: int = 0  # oldest turns (question and answer) that no longer fit the context
    new_tokens: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    stopped: str = "interrupted"  # or "end", "max_new_tokens", "context" (it is full)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first token, whose time includes the prompt."""
        seconds = self.last_token - self.first_token
        return (self.new_tokens - 1) / seconds if seconds > 0 else 0.0


class Lille:
    """A model with a conversation; `inference.lille` builds one.

    Attributes: `history`, the conversation as the model sees it, a list of
    {"role": "user", "content": ...} to save or to assign; `report` of the latest answer; `notify`,
    called with a line of text when old turns are dropped, by default a warning.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer, seed: int | None = None):
        self.backend, self.tokenizer = backend, tokenizer
        self.seeds = random.Random(seed)  # for calls without a seed
        self.lock = threading.Lock()  # the backend has one cache
        self.history: list[Message] = []
        self.report: Report | None = None
        self.notify: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=2)

    def generate(self, prompt: str, *settings: Any, **named_settings: Any) -> str:
        """Continues a text and returns the continuation; the conversation is not involved.

        The settings are those of `Sampling`, by name or in its order: max_new_tokens=500,
        temperature=0.5, top_p=0.95, top_k=None, do_sample=True, seed=None. No control token is put
        before the text. Generation stops at `<|endoftext|>`, at `<|user|>`, after `max_new_tokens`
        or when the context is full. UserError for settings out of range and a text too long.
        """
        return "".join(self.stream(prompt, False, *settings, **named_settings))

    def chat(self, prompt: str, *settings: Any, **named_settings: Any) -> str:
        """Answers the user's next message and adds both to the history.

        Settings and stopping as in `generate`. The oldest turns are dropped when the conversation
        no longer fits. UserError, and no change, for a message that is too long alone.
        """
        return "".join(self.stream(prompt, True, *settings, **named_settings))

    def stream(
        self, prompt: str, chat: bool = True, *settings: Any, **named_settings: Any
    ) -> Iterator[str]:
        """The text of `chat`, or of `generate` with `chat=False`, in pieces of whole characters.

        The history takes the question with the first piece of the answer and then grows with it,
        so an answer that is interrupted stays as far as it got. An unfinished answer ends when
        another one is asked for or the history is replaced.
        """
        sampling = Sampling(*settings, **named_settings)
        if not prompt.strip():
            raise UserError("nothing to answer: the prompt is empty")
        message, start = {"role": "user", "content": prompt}, 0
        if chat:
            ids, start = self.fit(message, sampling.max_new_tokens)
        else:
            ids = self.tokenizer.encode(prompt)
            if len(ids) > self.backend.block_size:
                raise UserError(
                    f"the prompt has {len(ids)} tokens and the context {self.backend.block_size}: "
                    "shorten it"
                )
        seed = self.seeds.getrandbits(63) if sampling.seed is None else sampling.seed
        report = Report(len(ids), dropped_turns=start // 2)
        pieces = self.text(self.tokens(ids, sampling, seed, report), report)
        if not chat:
            return pieces
        self.history = list(self.history)  # a new list, by which an unfinished answer sees its end
        return self.recorded(pieces, self.history, [*self.history[start:], message])

    def reset_chat(self) -> None:
        """Starts a new conversation."""
        self.history = []

    def session(self) -> "Lille":
        """An empty conversation with the same model, such as one for each user of a web page."""
        session = Lille(self.backend, self.tokenizer)
        session.seeds, session.lock, session.notify = self.seeds, self.lock, self.notify
        return session

    def fit(self, message: Message, max_new_tokens: int) -> tuple[list[int], int]:
        """Prompt ids of the newest turns that fit and `message`, and where these turns start.

        A quarter of the context, or less for a shorter answer, is left for the answer.
        """
        if len(self.history) % 2:
            raise ValueError("the history must be questions with their answers: its end is missing")
        limit = self.backend.block_size - min(max_new_tokens, self.backend.block_size // 4)
        encode_chat = self.tokenizer.encode_chat
        size = len(encode_chat([message], add_generation_prompt=True))
        if size > limit:
            raise UserError(
                f"the message takes {size} tokens and the context has room for {limit} beside the "
                "answer: shorten it"
            )
        start = len(self.history)
        while start > 0:
            turn = self.history[max(start - 2, 0) : start]
            size += len(encode_chat(turn)) - 1  # without <|startoftext|>
            if size > limit:
                break
            start -= 2
        return encode_chat([*self.history[start:], message], add_generation_prompt=True), start

    def recorded(
        self, pieces: Iterator[str], history: list[Message], messages: list[Message]
    ) -> Iterator[str]:
        """Passes the pieces of an answer on; `messages` and the answer become the history.

        Ends as soon as the history is no longer `history` or what this answer made of it.
        """
        if self.history is not history:
            return
        answer = {"role": "assistant", "content": ""}
        history = [*messages, answer]
        for piece in pieces:
            answer["content"] += piece
            self.history = history
            yield piece
            if self.history is not history:
                return
        self.history = history  # an empty answer is an answer too

    def text(self, tokens: Iterator[int], report: Report) -> Iterator[str]:
        """The text of tokens as it becomes readable.

        Leaves out control tokens and a character that was cut in the middle. Bytes that are not
        UTF-8 become U+FFFD.
        """
        self.report = report
        if report.dropped_turns:
            self.notify(
                f"the conversation no longer fits {self.backend.block_size} tokens; oldest turns "
                f"dropped: {report.dropped_turns}"
            )
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if not self.tokenizer.is_control[token]:
                piece = decoder.decode(self.tokenizer.decode_bytes([token]))
                if piece:
                    yield piece
        if report.stopped == "end":
            piece = decoder.decode(b"", final=True)
            if piece:
                yield piece

    def tokens(
        self, ids: list[int], sampling: Sampling, seed: int, report: Report
    ) -> Iterator[int]:
        """Samples new token ids up to the one that ends the answer and updates `report`."""
        start = time.perf_counter()
        stop_tokens = (self.tokenizer.eos_id, self.tokenizer.user_id)
        temperature = sampling.temperature if sampling.do_sample else 0.0
        context_left = self.backend.block_size + 1 - len(ids)  # the last token is never an input
        generator = None
        for _ in range(min(sampling.max_new_tokens, context_left)):
            with self.lock:
                logits = self.backend.logits(ids)  # (V,)
            generator = generator or torch.Generator(logits.device).manual_seed(seed)
            token = int(
                sample(logits[None], temperature, sampling.top_k, sampling.top_p, generator)
            )
            report.last_token = time.perf_counter() - start
            report.first_token = report.first_token or report.last_token
            report.new_tokens += 1
            if token in stop_tokens:
                report.stopped = "end"
                return
            ids = [*ids, token]
            yield token
        shorter = sampling.max_new_tokens <= context_left
        report.stopped = "max_new_tokens" if shorter else "context"
