"""The tokenizer and the chat format; no other file knows token ids.

    tokenizer = load_tokenizer()  # Hastings; or the path of another
    ids = tokenizer.encode("Hello")  # as ordinary text: never a control token
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    text = tokenizer.decode(ids)

Hastings is GPT-2's byte-level BPE cut to 32,763 ids, then five control tokens; hastings/build.py
made its file, hastings/hastings.json, and learns others from a user's text. A conversation is
`<|startoftext|><|user|>question<|assistant|>answer<|endoftext|><|user|>...`, a document is
`text<|endoftext|>`. Only the code in this file inserts control tokens, so text that spells one
cannot forge a turn.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HFTokenizer

from common.byte_level import bytes_to_unicode, standard_json
from common.errors import UserError, one_line
from common.fast_encoder import FastEncoder

CONTROL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|assistant|>", "<|user|>", "<|startoftext|>")
_, END_OF_TEXT, ASSISTANT, USER, START_OF_TEXT = CONTROL_TOKENS
MAX_VOCAB_SIZE = 1 << 16  # shards hold ids as uint16

HASTINGS = Path(__file__).with_name("hastings") / "hastings.json"

# Encoders and exports are compared with `tokenizers` on these texts.
HARD_STRINGS = (
    "Don't stop: we'll SAY'LL they've 'tis\n\n\n  two  spaces\t\ttabs \r\n\u00a0nbsp\u2003em ",
    "naïve café — “quotes” … 东京 한국어 हिन्दी ไทย العربية עברית ﷽ ﬁ ſ Ǆ a\u0301\u0323",
    "🚀👩\u200d👩\u200d👧🏽 \U0001f1e9\U0001f1ea",
    "\ufeff\u200b\u2028\u0085\x1c \x00\x7f\ufffd\uffff\U0010ffff",
    "x1234567890 3.14 ½²٣Ⅷ 1e-5 $1,000,000.00% f(x)=={[<_^~`|\\>]};//**__--'\"''\"",
    "".join(CONTROL_TOKENS) + " <|endoftext|><|endoftext <|user|> |>",
    "a" * 300 + " " * 300 + "\n" * 50 + "ab" * 200 + "é" * 99 + "'" * 60 + "字" * 50,
    "def f(x):\n        return x**2  # comment\n\nclass A:\n\tpass   \n   ",
    "",
    " ",
    "\n",
)


def load_tokenizer(path: str | Path = HASTINGS) -> "Tokenizer":
    """Loads this repository's tokenizer, or another.

    `path` is a JSON file of `tokenizers`, or a folder with a tokenizer.json; a relative one is also
    looked for beside this file. Raises UserError when it is missing or no byte-level BPE.
    """
    path, beside = Path(path), HASTINGS.parents[1] / path
    path = beside if beside.exists() and not path.exists() else path
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists() or file.suffix == ".pt":
        raise UserError(
            f"the tokenizer {file} is {'a checkpoint' if file.exists() else 'not there'}: name a "
            "JSON of tokenizers, the folder of one or of an export, or make one with "
            "hastings/build.py"
        )
    try:
        return Tokenizer(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {file}: {error.strerror or error}") from None
    except Exception as error:  # `tokenizers` raises plain Exception for a file it cannot parse
        reason = one_line(error)
        raise UserError(
            f"{file} is not a byte-level BPE that can be taken over ({reason}): name another"
        ) from None


class Tokenizer:
    """Encoder and decoder, made by `load_tokenizer`. Safe to share between threads.

    Attributes: `vocab_size`, at most MAX_VOCAB_SIZE; `pad_id`, `eos_id`, `assistant_id`, `user_id`,
    `bos_id`; `is_control` (V,) bool, which ids are those five; `json_text`, by `byte_level_json`,
    and its `sha256`; `n_own`, how many ids the file has, before those that were added to it;
    `pieces`, the bytes of each id; `token_bytes` (V,) int64, the length of each piece, 0 for
    control tokens. ValueError for a file that gives texts back changed.
    """

    def __init__(self, content: bytes):
        self.json_text, self.n_own = standard_json(json.loads(content), CONTROL_TOKENS)
        self.sha256 = hashlib.sha256(self.json_text.encode("utf-8")).hexdigest()
        settings = json.loads(self.json_text)
        control = {token["content"]: token["id"] for token in settings["added_tokens"]}
        vocab = settings["model"]["vocab"]
        ids = {*vocab.values(), *control.values()}
        self.vocab_size = len(ids)
        self.pad_id, self.eos_id, self.assistant_id, self.user_id, self.bos_id = (
            control[name] for name in CONTROL_TOKENS
        )
        if ids != {*range(self.vocab_size)} or len(ids) < len(vocab | control):
            raise ValueError("its ids are not 0, 1, 2, ..., each once")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"{self.vocab_size:,} ids, more than {MAX_VOCAB_SIZE:,}")
        self.is_control = np.zeros(self.vocab_size, dtype=bool)
        self.is_control[list(control.values())] = True

        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        self.pieces = [b""] * self.vocab_size
        for piece, token_id in vocab.items():
            self.pieces[token_id] = bytes(byte_of[character] for character in piece)
        self.token_bytes = np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        self.token_bytes[self.is_control] = 0
        for piece, token_id in control.items():
            self.pieces[token_id] = piece.encode("utf-8")

        # Ordinary text is encoded by a tokenizer without control tokens.
        text_vocab = {piece: token_id for piece, token_id in vocab.items() if piece not in control}
        model = settings["model"] | {"vocab": text_vocab}
        ordinary_json = json.dumps(settings | {"added_tokens": [], "model": model})
        self._ordinary = HFTokenizer.from_str(ordinary_json)
        self._batch_encoder = FastEncoder(ordinary_json, self._ordinary, HARD_STRINGS)
        for text in HARD_STRINGS:
            if self.decode(self._ordinary.encode(text, add_special_tokens=False).ids) != text:
                raise ValueError(f"it does not give {reprlib.repr(text)} back")

    @cached_property
    def _with_control(self) -> HFTokenizer:
        return HFTokenizer.from_str(self.json_text)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; control tokens are recognised in it only with `allow_special`.

        Use `allow_special` only for text that is trusted, never for that of users or web pages.
        Raises ValueError for a string with lone surrogates, which has no UTF-8 form.
        """
        to_utf8(text)
        tokenizer = self._with_control if allow_special else self._ordinary
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes many texts as ordinary text: a list of uint16 arrays (views of one buffer).

        Uses `gigatoken` where it is installed and agrees with `tokenizers`.
        """
        ids, ends = self._batch_encoder.encode([to_utf8(text) for text in require_list(texts)])
        ends = ends.tolist()
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def encode_documents(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes pretraining documents: many texts, `<|endoftext|>` after each.

        A text may be given as its UTF-8 bytes. Returns the ids of all (N,) uint16, and the end of
        each (n,) int64: document i is `ids[ends[i - 1] : ends[i]]`, the first one `ids[: ends[0]]`.
        """
        utf8 = [text if isinstance(text, bytes) else to_utf8(text) for text in require_list(texts)]
        text_ids, ends = self._batch_encoder.encode(utf8)
        ends = ends + np.arange(1, len(utf8) + 1)
        ids = np.full(len(text_ids) + len(utf8), self.eos_id, dtype=np.uint16)
        is_text = np.ones(len(ids), dtype=bool)
        is_text[ends - 1] = False
        ids[is_text] = text_ids
        return ids, ends

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False
    ) -> list[int]:
        """Token ids of a conversation, each content encoded by itself as ordinary text.

        `messages` alternate {"role": "user"} and {"role": "assistant"}, user first, each with a
        str "content". `add_generation_prompt` appends `<|assistant|>`, for the model to continue;
        the last turn must then be the user's. Raises ValueError for anything else.
        """
        check_messages(messages)
        if add_generation_prompt and messages[-1]["role"] != "user":
            raise ValueError("add_generation_prompt needs a user turn at the end")
        contents = [self.encode(message["content"]) for message in messages]
        ids = [int(token) for part in self._chat_parts(contents) for token in part]
        return [*ids, self.assistant_id] if add_generation_prompt else ids

    def encode_chat_batch(
        self, conversations: Iterable[Sequence[dict[str, Any]]]
    ) -> list[np.ndarray]:
        """Encodes many conversations as `encode_chat` does, with `encode_batch`: uint16 arrays."""
        conversations = list(conversations)
        for messages in conversations:
            check_messages(messages)
        contents = iter(
            self.encode_batch([message["content"] for chat in conversations for message in chat])
        )
        return [
            np.concatenate(
                self._chat_parts([next(contents) for _ in chat]), dtype=np.uint16, casting="unsafe"
            )
            for chat in conversations
        ]

    def _chat_parts(self, contents: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The parts of a conversation in order; contents at odd indices are the assistant's."""
        parts: list[Sequence[int]] = [[self.bos_id]]
        for turn, content in enumerate(contents):
            if turn % 2 == 0:
                parts += [[self.user_id], content]
            else:
                parts += [[self.assistant_id], content, [self.eos_id]]
        return parts

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids` (T,), which may end inside a character; ValueError for unknown ids."""
        ids = np.asarray(list(ids) if isinstance(ids, Iterator) else ids)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"ids are a row of integers, not {ids.dtype} {ids.shape}")
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(f"id {outside[0]} is not in 0..{self.vocab_size - 1}")
        return b"".join(map(self.pieces.__getitem__, ids.tolist()))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens spelled out; exact for ids that `encode` returned.

        Bytes that are not UTF-8, as when ids were cut inside a character, become U+FFFD.
        Raises ValueError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def assistant_mask(self, ids: np.ndarray) -> np.ndarray:
        """Loss mask: True at the tokens of assistant turns and at the `<|endoftext|>` ending each.

        ids (T,) integers -> (T,) bool. `<|assistant|>` itself is False: the model never has to
        start its own turn. A position belongs to the turn of the last control token before it.
        """
        ids = np.asarray(ids)
        is_control = self.is_control[ids]
        position = np.where(is_control, np.arange(len(ids)), -1)
        last_control = np.concatenate([[-1], np.maximum.accumulate(position)[:-1]])[: len(ids)]
        in_assistant = (last_control >= 0) & (ids[last_control] == self.assistant_id)
        return in_assistant & (~is_control | (ids == self.eos_id))


def require_list(texts: Sequence[Any]) -> Sequence[Any]:
    """`texts`; TypeError for one text, whose characters would each be encoded as a text."""
    if isinstance(texts, (str, bytes)):
        raise TypeError("this takes a list of texts, not one: use encode")
    return texts


def to_utf8(text: str) -> bytes:
    """UTF-8 bytes of a text; ValueError for lone surrogates, TypeError for another type."""
    if not isinstance(text, str):
        raise TypeError(f"a text is a str, not {type(text).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"not valid Unicode text: a lone surrogate U+{code:04X} at character {error.start}"
        ) from None


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """ValueError unless `messages` alternate user and assistant, user first, with str contents."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("a conversation is a non-empty list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f'message {i + 1} is not {{"role": ..., "content": ...}}')
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            role = reprlib.repr(message["role"])
            raise ValueError(
                f"message {i + 1} has role {role}, expected {expected!r}: roles alternate user "
                "and assistant, starting with user"
            )
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise ValueError(f"the content of message {i + 1} is not a string but {kind}")


def parse_chat(text: str, may_lack_end: bool = False) -> list[dict[str, str]]:
    """Messages of one trusted example in the chat layout, given without `<|startoftext|>`.

    Whitespace after `<|endoftext|>` is dropped; with `may_lack_end` the last `<|endoftext|>` may be
    missing. ValueError unless the control tokens are (user, assistant, endoftext) once or more.
    """
    layout = (USER, ASSISTANT, END_OF_TEXT)
    before, *pieces = re.split(f"({'|'.join(map(re.escape, CONTROL_TOKENS))})", text)
    names, contents = pieces[::2], pieces[1::2]
    if before.strip():
        raise ValueError(f"text between {START_OF_TEXT} and {USER}")
    if may_lack_end and len(names) % 3 == 2:
        names.append(END_OF_TEXT)
        contents = [*contents[:-1], contents[-1].rstrip(), ""]
    messages = []
    for i, (name, content) in enumerate(zip(names, contents, strict=True)):
        if name != layout[i % 3]:
            raise ValueError(f"found {name} where {layout[i % 3]} belongs")
        if name != END_OF_TEXT:
            role = "user" if name == USER else "assistant"
            messages.append({"role": role, "content": content})
        elif content.strip():
            raise ValueError(f"text after {END_OF_TEXT}, where {USER} or a new example belongs")
    if not names or len(names) % 3:
        raise ValueError(f"the example ends where {layout[len(names) % 3]} belongs")
    return messages
