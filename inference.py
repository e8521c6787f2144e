"""Talk to a model: a chat in the terminal or the browser, one answer, a completion, an API.

    python inference.py                                   # a chat with checkpoints_ft/best_model.pt
    python inference.py --web                             # the same in a browser, on this machine
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

What a user types is encoded as ordinary text: it cannot become a control token.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import codecs
import os
import random
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from common.errors import UserError
from common.settings import config_from_constants, run_script
from generation import chat_terminal, chat_web
from generation.backends import Backend, open_backend
from ops.sampling import sample
from tokenizer import Tokenizer, load_tokenizer

backend = "torch"  # or "huggingface", "onnx"
model = "checkpoints_ft/best_model.pt"  # a .pt, an exported folder, a hub id, "130m-instruct"
device = ""  # "cpu", "cuda"; empty: the GPU where there is one
dtype = ""  # "float32", "bfloat16", "float16"; "int8": torch on the CPU; empty: the model's

# What to do; with none of these, a chat in the terminal, or one answer to what is piped in
prompt = ""  # answer this and exit
completion = False  # True: continue the text, as a model that was only pretrained does
web = False  # True: a chat page in the browser (pip install -r requirements/web.txt)
port = 0  # of the chat page; 0: the first free one from 7860
speed = False  # True: tokens per second after each answer

# Sampling
max_new_tokens = 500
temperature = 0.5  # 0: always the most likely token
top_p = 0.95  # keep the fewest tokens whose probabilities reach this; 1: all
top_k = 0  # keep this many tokens; 0: all
seed = 0  # of the sampling; -1: another one in every run

SWITCHES = ("--completion", "--speed", "--web")  # these may stand without =True


def lille(
    backend: str = "torch",
    model: str | os.PathLike = "checkpoints_ft/best_model.pt",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int | None = None,
) -> "Lille":
    """Loads a model to talk to.

    `backend` is "torch" (everything), "huggingface" (transformers) or "onnx". `model` is a `.pt`, a
    folder that export.py wrote, a hub id, or "130m-instruct" / "130m-base". `device` None takes
    the GPU where there is one, `dtype` None the model's; "int8" (torch, CPU) decodes with weights
    rounded to eight bits. With a `seed` the same calls in the same order give the same texts.
    Raises UserError, one line that says what to do.
    """
    opened = open_backend(backend, model, device, dtype)
    tokenizer = load_tokenizer()
    if opened.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{model} has a vocabulary of {opened.vocab_size} and the tokenizer one of "
            f"{tokenizer.vocab_size}: it is not a Lille model"
        )
    return Lille(opened, tokenizer, seed)


@dataclass
class Report:
    """What is known of the latest answer; times in seconds from the call."""

    prompt_tokens: int
    dropped_turns: int = 0  # oldest turns (question and answer) that no longer fit the context
    new_tokens: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    stopped: str = "interrupted"  # or "end", "max_new_tokens", "context" (it is full)

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first one, which also waits for the prompt."""
        seconds = self.last_token - self.first_token
        return (self.new_tokens - 1) / seconds if seconds > 0 else 0.0


class Lille:
    """A model with a conversation; build it with `lille`.

    `history` is the conversation as the model sees it, [{"role": "user", "content": ...}, ...];
    save it, or assign one to go on with it. `report` tells about the latest answer. `notify` is
    called with a line of text when turns are dropped; the default is a warning.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer, seed: int | None = None):
        self.backend, self.tokenizer = backend, tokenizer
        self.seeds = random.Random(seed)  # of the calls that do not bring one
        self.history: list[dict[str, str]] = []
        self.one_at_a_time = threading.Lock()  # the backend has one cache
        self.report: Report | None = None
        self.notify: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=2)
        self.unfinished: weakref.ref[Iterator[str]] | None = None

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 500,
        temperature: float = 0.5,
        top_p: float | None = 0.95,
        top_k: int | None = None,
        do_sample: bool = True,
        seed: int | None = None,
    ) -> str:
        """The continuation of a text, without the text; the conversation is not involved.

        No control token is put before the text. `do_sample` False or `temperature` 0 takes the
        most likely token each time. `seed` makes this call repeatable. It ends at
        `<|endoftext|>`, at `<|user|>`, after `max_new_tokens` or when the context is full.
        Raises ValueError for settings that make no sense and for a text too long to continue.
        """
        settings = (max_new_tokens, temperature, top_p, top_k, do_sample, seed)
        return "".join(self.stream(prompt, False, *settings))

    def chat(
        self,
        prompt: str,
        max_new_tokens: int = 500,
        temperature: float = 0.5,
        top_p: float | None = 0.95,
        top_k: int | None = None,
        do_sample: bool = True,
        seed: int | None = None,
    ) -> str:
        """The answer to the next thing the user says; both are added to the history.

        Arguments as in `generate`. The oldest turns are dropped when the conversation no longer
        fits. Raises ValueError, and changes nothing, for a message that alone is too long.
        """
        settings = (max_new_tokens, temperature, top_p, top_k, do_sample, seed)
        return "".join(self.stream(prompt, True, *settings))

    def session(self) -> "Lille":
        """An empty conversation of its own with the same model, as for each user of a page."""
        session = Lille(self.backend, self.tokenizer)
        session.seeds, session.notify = self.seeds, self.notify
        session.one_at_a_time = self.one_at_a_time
        return session

    def reset_chat(self) -> None:
        """Forgets the conversation."""
        self.finish()
        self.history = []

    def stream(
        self,
        prompt: str,
        chat: bool = True,
        max_new_tokens: int = 500,
        temperature: float = 0.5,
        top_p: float | None = 0.95,
        top_k: int | None = None,
        do_sample: bool = True,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The text of `chat`, or of `generate` with `chat=False`, as it is made.

        It comes in whole characters. Arguments as in `generate`.

        An answer that is interrupted, by Ctrl-C or by `close()`, stays in the history as far as
        it got; if that is nowhere, its question leaves the history too.
        """
        if chat:
            self.finish()
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not prompt.strip():
            raise UserError("nothing to answer: the prompt is empty")
        sample(torch.zeros(1, 1), temperature, top_k, top_p)  # refuses settings that make no sense
        kept, message = self.history, {"role": "user", "content": prompt}
        if chat:
            ids, kept = self.fit(message, max_new_tokens)
        else:
            ids = self.tokenizer.encode(prompt)
            if len(ids) > self.backend.block_size:
                raise UserError(
                    f"the prompt has {len(ids)} tokens and the context {self.backend.block_size}: "
                    "shorten it"
                )
        report = Report(len(ids), (len(self.history) - len(kept)) // 2)
        temperature = temperature if do_sample else 0.0
        seed = self.seeds.getrandbits(63) if seed is None else seed
        if not 0 <= seed < 1 << 63:
            raise UserError(f"seed={seed} must be from 0 to 2**63 - 1")
        tokens = self.tokens(ids, max_new_tokens, temperature, top_p, top_k, seed, report)
        pieces = self.pieces(tokens, report, [*kept, message] if chat else None)
        if chat:
            self.unfinished = weakref.ref(pieces)
        return pieces

    def finish(self) -> None:
        """Closes an answer that nobody read to its end, so that the history is in order."""
        pieces = self.unfinished and self.unfinished()
        if pieces is not None:
            pieces.close()

    def fit(self, message: dict[str, str], max_new_tokens: int):
        """The ids of the prompt and the turns of the history it has room for, the newest ones.

        A quarter of the context, or less for a shorter answer, is left for the answer.
        """
        if len(self.history) % 2:
            raise ValueError("the history must be questions with their answers: its end is missing")
        room = self.backend.block_size - min(max_new_tokens, self.backend.block_size // 4)
        encode_chat = self.tokenizer.encode_chat
        size = len(encode_chat([message], add_generation_prompt=True))
        if size > room:
            raise UserError(
                f"the message takes {size} tokens and the context has room for {room} beside the "
                "answer: shorten it"
            )
        first = len(self.history)
        while first > 0:
            size += len(encode_chat(self.history[max(first - 2, 0) : first])) - 1  # one bos for all
            if size > room:
                break
            first -= 2
        kept = self.history[first:]
        return encode_chat([*kept, message], add_generation_prompt=True), kept

    def pieces(
        self, tokens: Iterator[int], report: Report, messages: list[dict[str, str]] | None
    ) -> Iterator[str]:
        """The text of tokens as it becomes readable; `messages` and the answer become the history.

        Control tokens other than those that end an answer are left out, as is a character that
        was cut in the middle. Bytes that are not UTF-8 become U+FFFD.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        said: list[str] = []
        before, self.report = self.history, report
        if report.dropped_turns:
            self.notify(
                f"the conversation no longer fits {self.backend.block_size} tokens; oldest turns "
                f"dropped: {report.dropped_turns}"
            )
        try:
            for token in tokens:
                if token < self.tokenizer.n_text:
                    said.append(decoder.decode(self.tokenizer.decode_bytes([token])))
                    if said[-1]:
                        yield said[-1]
            if report.stopped == "end":
                said.append(decoder.decode(b"", final=True))
                if said[-1]:
                    yield said[-1]
        finally:
            answer = "".join(said)
            replaced = self.history is not before  # by the caller, meanwhile
            if messages and not replaced and (answer or report.stopped != "interrupted"):
                self.history = [*messages, {"role": "assistant", "content": answer}]

    def tokens(
        self,
        ids: list[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float | None,
        top_k: int | None,
        seed: int,
        report: Report,
    ) -> Iterator[int]:
        """New token ids up to the one that ends the answer; `report` is kept up to date."""
        started = time.perf_counter()
        ends = (self.tokenizer.eos_id, self.tokenizer.user_id)
        budget = self.backend.block_size + 1 - len(ids)
        generator = None
        for _ in range(min(max_new_tokens, budget)):
            with self.one_at_a_time:
                logits = self.backend.logits(ids)  # (V,)
            generator = generator or torch.Generator(logits.device).manual_seed(seed)
            token = int(sample(logits[None], temperature, top_k, top_p, generator))
            report.last_token = time.perf_counter() - started
            report.first_token = report.first_token or report.last_token
            report.new_tokens += 1
            if token in ends:
                report.stopped = "end"
                return
            ids = [*ids, token]
            yield token
        report.stopped = "max_new_tokens" if max_new_tokens <= budget else "context"


def piped_text() -> str:
    """All of standard input, which is one prompt; UserError when it is empty or not UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin else ""
    except UnicodeDecodeError as error:
        raise UserError(f"the piped text is not UTF-8 (byte {error.start}): convert it") from None
    if not text.strip():
        raise UserError('nothing to answer: give a question, as in --prompt="Who are you?"')
    return text.removesuffix("\n")


def check_settings(
    max_new_tokens: int, temperature: float, top_p: float | None, top_k: int | None
) -> None:
    """UserError, before anything is loaded, for settings that no answer could be made with."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    try:
        sample(torch.zeros(1, 1), temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    argv = [f"{argument}=True" if argument in SWITCHES else argument for argument in argv]
    config = config_from_constants(globals(), argv)
    prompt = config.prompt
    if config.web:
        if prompt or config.completion:
            raise UserError("--web is a chat page: leave out --prompt and --completion")
        chat_web.require_gradio()
    elif not prompt.strip() and not (sys.stdin and sys.stdin.isatty()):
        prompt = piped_text()
    options = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k or None,
    }
    seed = None if config.seed == -1 else config.seed
    check_settings(**options)
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
