"""Trainer by torchrun from test_distributed.py: what several ranks do in a step, from the inside.

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/ranks_worker.py \
        DATA_DIR OUT_DIR
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tiny import TINY  # noqa: E402

import train  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.settings import config_from_constants  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from tokenizer import load_tokenizer  # noqa: E402
from training import setup  # noqa: E402
from training.distributed import Ranks, exit_rank, init_distributed  # noqa: E402
from training.trainer import Trainer  # noqa: E402

N_MICRO_BATCHES, HESS_BATCHES, STEPS = 6, 3, 3


def make_run(model: GPT, ranks: Ranks, **changes) -> Trainer:
    settings = TINY | {"batch_size": 2, "hess_batches": HESS_BATCHES} | changes
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    config = config_from_constants(vars(train), arguments)
    return Trainer(copy.deepcopy(model), config, torch.device("cpu"), torch.float32, ranks)


def take_steps(run: Trainer, rows, n: int = STEPS) -> list[float]:
    ranks, losses = run.ranks, []
    steps = rows.steps(0, 10**6, 2, N_MICRO_BATCHES, ranks.rank, ranks.world_size)
    for step, batches in zip(range(n), steps, strict=False):
        n_labels = int(*ranks.all_reduce_scalars(sum(batch.n_labels for batch in batches)))
        if step == 1:
            run.update_hessian(*batches[: ranks.local_count(HESS_BATCHES)])
        losses.append(run.step(batches, 1e-3, n_labels)[0].item())
    return losses


def weights(run: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def moments(run: Trainer, name: str) -> torch.Tensor:
    states = run.optimizer.state.values()
    return torch.cat([state[name].flatten() for state in states if name in state])


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


class Sent:
    """Counts the elements of every all-reduce of float32 or bfloat16, as they are sent."""

    def __enter__(self) -> "Sent":
        self.sizes, self.real = [], dist.all_reduce
        dist.all_reduce = self.all_reduce
        return self

    def all_reduce(self, tensor: torch.Tensor, *args, **kwargs):
        if tensor.dtype != torch.float64:
            self.sizes.append((tensor.dtype, tensor.numel()))
        return self.real(tensor, *args, **kwargs)

    def __exit__(self, *error) -> None:
        dist.all_reduce = self.real


def main() -> None:
    data_dir, out_dir = sys.argv[1:]
    rows = setup.open_rows(data_dir, "train", load_tokenizer(), 32, 1337, chat=False)
    with init_distributed(1.0) as ranks:
        torch.manual_seed(ranks.rank)  # each rank makes other weights: rank 0's count
        shape = GPTConfig(n_embd=16, n_layers=2, n_heads=2, n_kv_heads=1, block_size=32)
        start = make_run(GPT(shape), ranks).model
        n_parameters = start.n_parameters()

        # One process does all of the work, the ranks share it.
        alone, run = make_run(start, Ranks()), make_run(start, ranks)
        expected = take_steps(alone, rows)
        with Sent() as sent:
            losses = take_steps(run, rows)
        close = [abs(a - b) < 1e-6 * b for a, b in zip(losses, expected, strict=True)]
        assert all(close), (losses, expected)
        for name in ("exp_avg", "hessian", "exp_avg_sq"):
            assert distance(moments(run, name), moments(alone, name)) < 1e-4, name
        assert moments(run, "hessian").max() > 0
        theirs = ranks.broadcast(lambda: weights(run))
        assert torch.equal(weights(run), theirs)  # the ranks stay together to the last bit

        # What was sent: in each step every gradient once and one loss, and once the estimate.
        assert sent.sizes.count((torch.float32, 1)) == STEPS
        sizes = [size for _, size in sent.sizes]
        n_hidden = sum(p.numel() for p in run.optimizer.hidden.param_groups[0]["params"])
        assert sum(sizes) == STEPS * (n_parameters + 1) + n_hidden, sizes

        compiled = make_run(start, ranks)
        compiled.try_compile(rows.batch(range(2)))
        assert compiled.forward is not compiled.model  # the attempt did not fail
        with Sent() as sent:
            first = take_steps(compiled, rows, n=1)
        assert sum(size for _, size in sent.sizes) == n_parameters + 1, sent.sizes
        assert abs(first[0] - expected[0]) < 1e-5 * expected[0]

        # Gradients rounded on their way.
        rounded, exact = make_run(start, ranks, gradient_dtype="bfloat16"), make_run(start, Ranks())
        with Sent() as sent:
            take_steps(rounded, rows, n=1)
        take_steps(exact, rows, n=1)
        assert sum(n for dtype, n in sent.sizes if dtype == torch.bfloat16) == n_parameters
        error = distance(moments(rounded, "exp_avg"), moments(exact, "exp_avg"))
        assert 1e-5 < error < 2**-7, error

        token_bytes = torch.from_numpy(load_tokenizer().token_bytes)
        alone.model.load_state_dict(run.model.state_dict())
        results = [some.evaluate(rows, token_bytes) for some in (run, alone)]
        assert all(abs(a - b) < 1e-12 * b for a, b in zip(*results, strict=True)), results

        ranks.check_same({"data": "one", "seed": 1})
        try:
            ranks.check_same({"data": "one", "seed": ranks.rank})
            assert ranks.is_main
        except UserError as error:
            assert not ranks.is_main and "has seed=1 and rank 0 has 0" in str(error)
        Path(out_dir, f"passed-{ranks.rank}").touch()
    exit_rank(0)


if __name__ == "__main__":
    main()
