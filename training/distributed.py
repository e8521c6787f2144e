"""The processes of a run, one for each GPU, and what they tell each other.

    torchrun --nproc_per_node=8 train.py

torchrun starts the processes (ranks) and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT; README.md shows several machines. `Ranks()` is a run of one process: then every method
is a plain local operation and nothing is connected. Gradients and losses go from GPU to GPU (NCCL),
everything else by way of the hosts (gloo), so that no GPU is waited for.
"""

import inspect
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from common.settings import run_script

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
# What gloo and NCCL say, in errors that have no type of their own, of a rank that is gone.
LOST = ("gloo", "NCCL", "pair closure", "Connection closed", "Connection reset", "Broken pipe")


def sum_gradients(dtype: torch.dtype, bucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's communication hook: sums a bucket over the ranks, sent as `dtype`.

    A sum, where the default averages: the loss is already divided by the labels of all ranks.
    """
    gradients = bucket.buffer()
    sent = gradients.to(dtype)
    future = dist.all_reduce(sent, async_op=True).get_future()
    if sent is gradients:
        return future.then(lambda done: done.value()[0])
    return future.then(lambda done: gradients.copy_(done.value()[0]))


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def share(self, n: int) -> int:
        """How many of the first `n` micro-batches of a step, dealt in turn, this rank has."""
        return len(range(self.rank, n, self.world_size))

    def parallel(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """`model` with rank 0's weights, its gradients summed over the ranks after a backward.

        They are sent as `dtype` while the backward goes on, a bucket of layers at a time.
        """
        if self.world_size == 1:
            return model
        known = inspect.signature(DistributedDataParallel).parameters  # renamed in PyTorch 2.13
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        parallel = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,  # one copy of the gradients less
            **{buffers: False},  # the RoPE tables are constants
        )
        parallel.register_comm_hook(dtype, sum_gradients)
        return parallel

    def no_sync(self, parallel: nn.Module) -> AbstractContextManager:
        """Within it, a forward and backward of `parallel` only adds to this rank's gradients."""
        return parallel.no_sync() if self.world_size > 1 else nullcontext()

    def sum_(self, tensors: list[Tensor]) -> None:
        """Sums each tensor over the ranks, in place, from device to device without waiting."""
        if self.world_size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()  # on CUDA: lets the stream wait, not this process

    def total(self, *values: float) -> list[float]:
        """Each value summed over the ranks, by way of the hosts; exact for whole numbers."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the first rank; the others do not call it."""
        if self.world_size == 1:
            return make()
        box = [make() if self.first else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def check_same(self, values: dict[str, Any]) -> None:
        """UserError on a rank that does not have rank 0's values, which have the same names."""
        if self.world_size == 1:
            return
        for name, value in self.broadcast(lambda: values).items():
            if values[name] != value:
                raise UserError(
                    f"rank {self.rank} ({socket.gethostname()}) has {name}={values[name]} and "
                    f"rank 0 has {value}: start every rank with the same settings and data"
                )


ALONE = Ranks()


def ranks_of_environment() -> Ranks:
    """The place that torchrun gave to this process; UserError when it is only half said."""
    values = {name: os.environ.get(name, "") for name in NEEDED}
    if values["RANK"] in ("", "0") and values["WORLD_SIZE"] in ("", "1"):
        return ALONE
    how = "start with torchrun --nproc_per_node=N train.py, or unset RANK and WORLD_SIZE"
    missing = ", ".join(name for name, value in values.items() if not value)
    if missing:
        raise UserError(f"{missing} must be set when RANK or WORLD_SIZE is: {how}")
    try:
        rank, world_size, local_rank, _ = (int(values[name]) for name in NUMBERS)
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or local_rank + 1)
        if not (0 <= local_rank <= rank < world_size and local_rank < local_world_size):
            raise ValueError
    except ValueError:
        given = ", ".join(f"{name}={values[name]}" for name in NUMBERS)
        raise UserError(
            f"{given}: these are numbers, and ranks count from 0 to WORLD_SIZE - 1: {how}"
        ) from None
    return Ranks(rank, world_size, local_rank, local_world_size)


def meeting_point(timeout: timedelta) -> Any:
    """The key-value store that all ranks reach: torchrun's, or else rank 0's."""
    return next(dist.rendezvous("env://", timeout=timeout))[0]


@contextmanager
def joined(timeout_minutes: float) -> Iterator[Ranks]:
    """The ranks of this run, connected; all but the first print nothing.

    A rank that does not answer for `timeout_minutes` counts as lost. The others leave together.
    """
    ranks = ranks_of_environment()
    if ranks.world_size == 1:
        yield ranks
        return
    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError("this PyTorch has no torch.distributed with gloo: run python train.py once")
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    timeout = timedelta(minutes=max(0.01, timeout_minutes))
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=dist.PrefixStore("run", meeting_point(timeout)),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
        )
    except (dist.DistError, RuntimeError) as error:
        address = ":".join(os.environ[name] for name in NEEDED[3:])
        raise UserError(
            f"rank {ranks.rank} ({socket.gethostname()}) could not meet the other "
            f"{ranks.world_size - 1} at {address}: {first_line(error)}"
        ) from None
    with open(os.devnull, "w") as nowhere:
        with nullcontext() if ranks.first else redirect_stdout(nowhere):
            yield ranks
            ranks.total()  # the first rank may still be writing


@contextmanager
def said_once() -> Iterator[None]:
    """What goes wrong on one rank ends all and is said once, by the rank where it went wrong first.

    A rank that is killed says nothing: there it is the first that misses it.
    """
    ranks = ranks_of_environment()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if ranks.world_size == 1:
            raise
        try:
            speaks = meeting_point(timedelta(seconds=10)).add("failures", 1) == 1
        except (dist.DistError, RuntimeError):  # it went with rank 0
            speaks = True
        lost = isinstance(error, dist.DistError)
        lost |= isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
        if speaks and not lost:
            say_and_end(error)
        if speaks:
            host, reason = socket.gethostname(), first_line(error).rpartition("] ")[2][:160]
            print(
                f"error: rank {ranks.rank} ({host}) lost contact with another rank, so the run "
                f"ends; the same command continues it from the last checkpoint ({reason})",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(1)  # torchrun ends the others as soon as one exits: let the one that speaks
        end(2 if isinstance(error, UserError) else 1)


def say_and_end(error: BaseException) -> None:
    """Says `error` as every script does, and ends this rank."""

    def main() -> None:
        raise error

    code: Any = 1
    try:
        run_script(main)
    except SystemExit as said:
        code = said.code
    except BaseException:
        traceback.print_exc()
    end(code)


def end(code: int) -> int:
    """Ends this process at once if it is one of several ranks; else returns the exit code.

    Python's own way out may wait for a GPU that waits for a rank that is gone, and gloo's threads,
    which need Python to let go of a tensor, hang or abort in it.
    """
    if ranks_of_environment().world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
