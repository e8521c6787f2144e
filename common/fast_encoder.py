"""Bulk encoding with gigatoken, checked against `tokenizers`, which it falls back to.

gigatoken is optional and tens of times faster. It is imported at the first use.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer as HFTokenizer

from common.errors import one_line
from common.signals import interrupts_deferred

# gigatoken caches every word it has met, without a limit. It starts afresh after this much text,
# and where the system says how much memory the process has, when that has grown by so much.
CACHE_TEXT_BYTES = 256 << 20
CACHE_GROWTH_BYTES = 144 << 20

# UTF-8 of the letters and digits that are new in Unicode 17, by their first byte, in whole blocks
# of 64 where these are rare: gigatoken 0.10 knows them, tokenizers 0.23 takes them for symbols.
NEW_E0 = re.compile(rb"\xe0(?:\xa2\x8f|[\xb1\xb3]\x9c)")
NEW_EA = re.compile(rb"\xea\x9f[\x8e\x8f\x92\x94\xb1]")
NEW_F0 = re.compile(
    rb"\xf0(?:\x90[\xa5\xbb]|\x91[\xb6\xb7]|\x96[\xba\xbb\xbf]|\x98[\x9f\xb4\xb6\xb7]|\x9e\x9b"
    rb"|\xab\x9c|\xac\xba|\xb2[\x8e-\xbf]|\xb3[\x80-\x91])"
)

# Token ids of all texts in one row (N,) uint16, and the end of each text in it (n,) int64.
EncodedBatch = tuple[np.ndarray, np.ndarray]
BatchEncoder = Callable[[list[bytes]], EncodedBatch]


class FastEncoder:
    """Batch encoder of UTF-8 texts as ordinary text; safe to share between threads.

    `reference` is the `tokenizers` object of `tokenizer_json`. gigatoken is used once it has given
    the same ids on `samples` and on the first texts of the first batch; otherwise a warning says
    why and every batch is encoded by `reference`. Texts with new letters always are.
    """

    def __init__(self, tokenizer_json: str, reference: HFTokenizer, samples: Sequence[str]):
        self.tokenizer_json = tokenizer_json
        self.reference = reference
        self.samples = samples
        self.gigatoken: BatchEncoder | None = None
        self.is_started = False
        self.text_bytes = 0  # encoded since gigatoken last started
        self.resident = 0  # bytes of the process at that time

    def encode(self, texts: list[bytes]) -> EncodedBatch:
        # gigatoken returns awkward arrays, and awkward turns KeyboardInterrupt into other errors.
        with interrupts_deferred():
            if not self.is_started:
                self.gigatoken = self.checked_encoder(texts)
                self.resident = resident_bytes()
                self.is_started = True
            try:
                if self.gigatoken is not None and self.cache_is_full():
                    self.gigatoken = None  # frees its memory before the next one allocates
                    self.gigatoken = gigatoken_encoder(self.tokenizer_json)
                    self.text_bytes, self.resident = 0, resident_bytes()
                encode = self.gigatoken
                if encode is not None:
                    self.text_bytes += sum(map(len, texts))
                    return self.encode_fast(encode, texts)
            except BaseException as error:  # a Rust panic is not an Exception
                warn_slow(f"gigatoken failed ({describe_error(error)})")
                self.gigatoken = None
        return self.encode_reference(texts)

    def encode_fast(self, encode: BatchEncoder, texts: list[bytes]) -> EncodedBatch:
        """`encode` by gigatoken, except for the texts with new letters."""
        new = {
            i: self.encode_reference([text])[0]
            for i, text in enumerate(texts)
            if not text.isascii() and has_new_letters(text)
        }
        if not new:
            return encode(texts)
        ids, ends = encode([b"" if i in new else text for i, text in enumerate(texts)])
        rows = np.split(ids, ends[:-1])
        for i, row in new.items():
            rows[i] = row
        return np.concatenate(rows), np.cumsum([len(row) for row in rows], dtype=np.int64)

    def encode_reference(self, texts: list[bytes]) -> EncodedBatch:
        """`encode` by `tokenizers`."""
        strings = [text.decode("utf-8") for text in texts]
        encodings = self.reference.encode_batch_fast(strings, add_special_tokens=False)
        rows = [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        return np.concatenate([np.empty(0, np.uint16), *rows]), ends

    def cache_is_full(self) -> bool:
        growth = resident_bytes() - self.resident
        return self.text_bytes > CACHE_TEXT_BYTES or growth > CACHE_GROWTH_BYTES

    def checked_encoder(self, texts: list[bytes]) -> BatchEncoder | None:
        """gigatoken's encoder, or None with a warning if it is missing or disagrees."""
        batch = [text.encode("utf-8") for text in self.samples]
        batch += [text[:8000].decode("utf-8", "ignore").encode() for text in texts[:32]]
        try:
            encode = gigatoken_encoder(self.tokenizer_json)
            agrees = all(
                map(np.array_equal, self.encode_fast(encode, batch), self.encode_reference(batch))
            )
        except BaseException as error:
            warn_slow(f"gigatoken cannot be used ({describe_error(error)})")
            return None
        if not agrees:
            warn_slow("gigatoken and tokenizers disagree on a sample")
        return encode if agrees else None


def has_new_letters(text: bytes) -> bool:
    """Whether gigatoken and `tokenizers` may disagree; `in` makes it cheap for most texts."""
    return bool(
        (b"\xf0" in text and NEW_F0.search(text))
        or (b"\xe0" in text and NEW_E0.search(text))
        or (b"\xea" in text and NEW_EA.search(text))
    )


def gigatoken_encoder(tokenizer_json: str) -> BatchEncoder:
    """A batch encoder that runs gigatoken; raises whatever makes gigatoken unusable."""
    from gigatoken import Tokenizer as GigaTokenizer

    rule = json.loads(tokenizer_json)["pre_tokenizer"]
    if rule["type"] == "Sequence":  # of Digits, Split, ByteLevel it gave other ids, seldom
        raise ValueError("its rule of several steps was not compared with that of tokenizers")
    tokenizer = GigaTokenizer.from_json(tokenizer_json)

    def encode(texts: list[bytes]) -> EncodedBatch:
        if not texts:
            return np.empty(0, np.uint16), np.empty(0, np.int64)
        layout = tokenizer.encode_batch(texts).layout
        ends = np.asarray(layout.offsets.data)[1:]
        return np.asarray(layout.content.data).astype(np.uint16), ends.astype(np.int64)

    return encode


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def describe_error(error: BaseException) -> str:
    """One line about an error of gigatoken; an interrupt or a lack of memory is raised again."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
        raise error
    return one_line(error)


def warn_slow(reason: str) -> None:
    warnings.warn(f"{reason}; using tokenizers, slower with the same result", stacklevel=4)
