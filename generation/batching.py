"""Decodes the answers to several requests together, each as if it were alone.

    decoder = BatchedDecoder(gpt)
    decoder.submit(Request(ids, Sampling(), seed=0, emit=print))     # from any thread
    decoder.close()

At batch 1 a decode step reads every weight for one token; a step of several rows reads them once
for all. Rows join after their prompt, and leave when they end. In decode_step.cpp a row's logits do
not depend on the others, so that an answer is the one that the request would have got alone. In
PyTorch, on a GPU or without a C++ compiler, they differ by rounding.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from generation.conversation import Sampling
from generation.fast_decode import LARGEST_NATIVE_BATCH, Decoder
from model import GPT
from ops.kv_cache import KVCache
from ops.sampling import sample


@dataclass
class Request:
    """A prompt, and what becomes of it.

    `emit`, called in the decoder's thread, gets each new token id, at last "stop" (the answer is
    complete), "length" (its limit or the context's end is reached), or an exception.
    """

    ids: list[int]
    sampling: Sampling
    seed: int
    emit: Callable[[int | str | Exception], None]
    stop_tokens: tuple[int, ...] = ()
    cancelled: bool = False  # set by whoever no longer wants the answer
    generator: torch.Generator | None = field(default=None, repr=False)
    n_new: int = 0


class BatchedDecoder:
    """A thread that answers requests, up to `rows` at a time; others wait in their order.

    `decoder` makes the steps on a CPU. On a GPU they are plain PyTorch, since a CUDA graph would be
    captured for each set of rows.
    """

    def __init__(self, gpt: GPT, decoder: Decoder | None = None, rows: int = LARGEST_NATIVE_BATCH):
        self.gpt, self.rows = gpt.eval(), rows
        self.block_size, self.vocab_size = gpt.config.block_size, gpt.config.vocab_size
        self.weight = gpt.lm_head.weight.detach()
        if not self.weight.is_cpu:
            decoder = Decoder(gpt, mode="eager")
        self.step = decoder or Decoder(gpt)
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []
        self.tokens: list[int] = []  # the newest of each row, not in the cache yet
        self.cache = KVCache.empty(gpt.config, 0, like=self.weight)
        self.changed, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self.run, name="decoder", daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        """Adds a request; ValueError for a prompt that is empty or does not fit the context."""
        if not 1 <= len(request.ids) <= self.block_size:
            raise ValueError(f"{len(request.ids)} ids: the context takes 1 to {self.block_size}")
        with self.changed:
            self.waiting.append(request)
            self.changed.notify()

    def close(self) -> None:
        """Ends the thread after the current step."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    @torch.inference_mode()
    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting or self.active)
                if self.closed:
                    return
                wanted = [request for request in self.waiting if not request.cancelled]
                free = self.rows - len(self.active)
                new, self.waiting = wanted[:free], deque(wanted[free:])
            for request in new:
                try:
                    self.admit(request)
                except Exception as error:  # a prompt that needs too much memory, say
                    request.emit(error)
            try:
                self.keep([i for i, request in enumerate(self.active) if not request.cancelled])
                if self.active:
                    self.advance()
            except Exception as error:  # those who wait must hear of it
                failed, self.active, self.tokens = self.active, [], []
                self.cache = KVCache.empty(self.gpt.config, 0, like=self.weight)
                for request in failed:
                    request.emit(error)

    def admit(self, request: Request) -> None:
        """Computes a prompt; its row joins the others unless the answer ends with one token."""
        cache = KVCache.empty(self.gpt.config, 1, like=self.weight)
        ids = torch.tensor([request.ids], device=self.weight.device)
        logits = self.gpt.lm_head(self.gpt.hidden(ids, cache=cache)[:, -1])
        request.generator = torch.Generator(self.weight.device).manual_seed(request.seed)
        token = self.next_token(request, logits)
        if token is not None:
            keys, values = (
                torch.cat(pair, dim=1)
                for pair in ((self.cache.keys, cache.keys), (self.cache.values, cache.values))
            )
            lengths = torch.cat((self.cache.lengths, cache.lengths + len(request.ids)))
            self.cache = KVCache(keys, values, lengths)
            self.active.append(request)
            self.tokens.append(token)

    def advance(self) -> None:
        """One more token of each row."""
        tokens = torch.tensor(self.tokens, device=self.weight.device)
        logits = self.step(tokens, self.cache)
        self.cache.lengths += 1
        rows = [self.next_token(r, logits[i : i + 1]) for i, r in enumerate(self.active)]
        self.tokens = [0 if token is None else token for token in rows]
        self.keep([i for i, token in enumerate(rows) if token is not None])

    def next_token(self, request: Request, logits: torch.Tensor) -> int | None:
        """Samples from logits (1, V) and emits the token; None, and its reason, at the end."""
        sampling = request.sampling
        temperature = sampling.temperature if sampling.do_sample else 0.0
        options = (temperature, sampling.top_k, sampling.top_p, request.generator)
        token = int(sample(logits.float(), *options))
        request.n_new += 1
        if token in request.stop_tokens:
            request.emit("stop")
            return None
        request.emit(token)
        # The last token of the context is never an input.
        room = self.block_size + 1 - len(request.ids)
        if request.n_new >= min(sampling.max_new_tokens, room):
            request.emit("length")
            return None
        return token

    def keep(self, rows: list[int]) -> None:
        """Drops the other rows."""
        if len(rows) == len(self.active):
            return
        self.active = [self.active[i] for i in rows]
        self.tokens = [self.tokens[i] for i in rows]
        index = torch.tensor(rows, dtype=torch.long, device=self.weight.device)
        keys, values = (x.index_select(1, index) for x in (self.cache.keys, self.cache.values))
        self.cache = KVCache(keys, values, self.cache.lengths[index])
