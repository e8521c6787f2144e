"""Data-parallel training under torchrun: process group, gradient all-reduce, rank-0 helpers.

    torchrun --nproc_per_node=8 train.py

torchrun starts the processes (ranks) and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT; docs/multi_gpu.md shows several machines. `Ranks()` is a run of one process: every
method is then a local operation and no process group exists. Gradients and losses are reduced on
the GPUs (NCCL), everything else on the hosts (gloo), so that no GPU has to be waited for.
"""

import inspect
import os
import socket
import sys
import time
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
from common.settings import report_error
from common.signals import terminated_as_interrupted, terminated_at_once

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Parts of gloo's and NCCL's messages about a lost rank; their errors have no type of their own.
LOST_RANK_SIGNS = ("gloo", "NCCL", "pair closure", "Connection closed", "Connection reset")
LOST_RANK_SIGNS += ("Broken pipe",)


def sum_gradients(dtype: torch.dtype, bucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's communication hook: sums a bucket over the ranks, sent as `dtype`.

    A sum, where the default averages: the loss is already divided by the labels of all ranks.
    """
    gradients = bucket.buffer()
    buffer = gradients.to(dtype)
    future = dist.all_reduce(buffer, async_op=True).get_future()
    if buffer is gradients:
        return future.then(lambda result: result.value()[0])
    return future.then(lambda result: gradients.copy_(result.value()[0]))


@dataclass(frozen=True)
class Ranks:
    """The position of this process among the processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def local_count(self, n: int) -> int:
        """How many of the first `n` micro-batches of a step this rank gets (round robin)."""
        return len(range(self.rank, n, self.world_size))

    def parallel(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """DistributedDataParallel of `model`: rank 0's weights, gradients summed over the ranks.

        Gradients are sent as `dtype` during the backward, one bucket of layers at a time.
        """
        if self.world_size == 1:
            return model
        parameters = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers"  # PyTorch 2.13's name of broadcast_buffers
        buffers = buffers if buffers in parameters else "broadcast_buffers"
        parallel = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,  # one copy of the gradients less
            **{buffers: False},  # the RoPE tables are constants
        )
        parallel.register_comm_hook(dtype, sum_gradients)
        return parallel

    def no_sync(self, parallel: nn.Module) -> AbstractContextManager:
        """Context in which a backward of `parallel` accumulates gradients on this rank alone."""
        return parallel.no_sync() if self.world_size > 1 else nullcontext()

    def all_reduce_(self, tensors: list[Tensor]) -> None:
        """Sums each tensor over the ranks in place, on the devices; the host does not wait."""
        if self.world_size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()  # on CUDA: lets the stream wait, not this process

    def all_reduce_scalars(self, *values: float) -> list[float]:
        """Each value summed over the ranks, on the hosts in float64; exact for integers."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """The result of `make` on rank 0; the other ranks do not call it."""
        if self.world_size == 1:
            return make()
        box = [make() if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def check_same(self, values: dict[str, Any]) -> None:
        """UserError on a rank whose values differ from rank 0's."""
        if self.world_size == 1:
            return
        for name, value in self.broadcast(lambda: values).items():
            if values[name] != value:
                raise UserError(
                    f"rank {self.rank} ({socket.gethostname()}) has {name}={values[name]} and "
                    f"rank 0 has {value}: start every rank with the same settings and data"
                )


SINGLE_PROCESS = Ranks()


def ranks_of_environment() -> Ranks:
    """The rank that torchrun assigned to this process; UserError for incomplete variables."""
    if os.environ.get("WORLD_SIZE", "1") == "1" and os.environ.get("RANK", "0") == "0":
        return SINGLE_PROCESS
    values = {name: os.environ.get(name, "") for name in TORCHRUN_VARIABLES}
    try:
        rank, world_size, local_rank = (int(values[name]) for name in TORCHRUN_VARIABLES[:3])
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
        if not (0 <= rank < world_size and values["MASTER_ADDR"] and values["MASTER_PORT"]):
            raise ValueError
    except ValueError:
        settings = ", ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(
            f"{settings} do not describe a rank: start with torchrun --nproc_per_node=N train.py, "
            "or unset RANK and WORLD_SIZE"
        ) from None
    return Ranks(rank, world_size, local_rank, local_world_size)


def rendezvous_store(timeout: timedelta) -> Any:
    """The key-value store that all ranks share, torchrun's or rank 0's.

    A restart by torchrun, on one machine, sees nothing of what the ranks before have written.
    """
    store = next(dist.rendezvous("env://", timeout=timeout))[0]
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


@contextmanager
def init_distributed(timeout_minutes: float) -> Iterator[Ranks]:
    """Initialises the process group; all ranks but rank 0 have their stdout silenced.

    A rank that does not answer for `timeout_minutes` counts as lost. Ranks leave together.
    """
    ranks = ranks_of_environment()
    if ranks.world_size == 1:
        yield ranks
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    timeout = timedelta(minutes=min(max(0.01, timeout_minutes), 1e6))  # checked after this
    try:
        with terminated_at_once():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo",
                store=dist.PrefixStore("run", rendezvous_store(timeout)),
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timeout,
            )
    except (dist.DistError, RuntimeError) as error:
        address = ":".join(os.environ[name] for name in TORCHRUN_VARIABLES[3:])
        raise UserError(
            f"rank {ranks.rank} ({socket.gethostname()}) could not meet the other "
            f"{ranks.world_size - 1} at {address}: {first_line(error)}"
        ) from None
    with open(os.devnull, "w") as devnull:
        with nullcontext() if ranks.is_main else redirect_stdout(devnull):
            yield ranks
            ranks.all_reduce_scalars()  # a barrier: rank 0 may still be writing


@contextmanager
def report_failure_once() -> Iterator[None]:
    """Ends all ranks after a failure on one, which is reported once, by the rank that failed first.

    A killed rank reports nothing: the first rank that misses it does. A signal ends a run of one
    process as Interrupted.
    """
    ranks = ranks_of_environment()
    if ranks.world_size == 1:
        with terminated_as_interrupted():
            yield
        return
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        try:
            reports = rendezvous_store(timedelta(seconds=10)).add("failures", 1) == 1
        except (dist.DistError, RuntimeError):  # lost with rank 0
            reports = True
        lost = isinstance(error, dist.DistError)
        if isinstance(error, RuntimeError):
            lost |= any(sign in str(error) for sign in LOST_RANK_SIGNS)
        if reports and not ranks.is_main:  # rank 0's progress bar may stand in the line
            print(file=sys.stderr)
        if reports and not lost:
            exit_rank(report_error(error))
        if reports:
            host, reason = socket.gethostname(), first_line(error).rpartition("] ")[2][:160]
            print(
                f"error: rank {ranks.rank} ({host}) lost contact with another rank, so the run "
                f"ends; the same command continues it from the last checkpoint ({reason})",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(1)  # torchrun ends the others as soon as one exits: let the reporting one finish
        exit_rank(2 if isinstance(error, UserError) else 1)


def exit_rank(code: int) -> int:
    """Exits this process at once if it is one of several ranks; otherwise returns `code`.

    Interpreter shutdown can hang: CUDA may wait for a lost rank, and gloo's threads need the GIL
    to free tensors. Hence os._exit.
    """
    if ranks_of_environment().world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
