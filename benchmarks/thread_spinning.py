"""Speed by how long OpenMP threads spin, on a quiet machine and beside two busy programs.

    python -m benchmarks.thread_spinning      # 10 minutes; run nothing else

Trains the demo's model and decodes with the full one, each in a process of its own, the wait
policies in turn. common/threads.py sets what came out.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from common.settings import config_from_constants, run_script

rounds = 3  # samples of each cell
seconds = 6.0  # of each training

ROOT = Path(__file__).parents[1]
POLICIES = {
    "default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=5000": {"GOMP_SPINCOUNT": "5000"},
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
}
TASKS = {
    "train, steps/s": """
import sys, time, torch
from model import GPT, GPTConfig
torch.manual_seed(0)
model = GPT(GPTConfig(n_embd=128, n_layers=4, n_heads=4, n_kv_heads=2, block_size=128))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(0, 32000, (16, 129))
def step():
    model(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()
step()
start, n = time.perf_counter(), 0
while time.perf_counter() - start < float(sys.argv[1]):
    step()
    n += 1
print(n / (time.perf_counter() - start))
""",
    "decode, tokens/s": """
import time, torch
from generation.fast_decode import Decoder
from model import GPT, GPTConfig
torch.manual_seed(0)
model = GPT(GPTConfig()).eval()
decoder, prompt = Decoder(model), [list(range(1, 17))]
model.generate(prompt, 8, temperature=0, decoder=decoder)
start = time.perf_counter()
model.generate(prompt, 64, temperature=0, decoder=decoder)
print(64 / (time.perf_counter() - start))
""",
}


def measure(code: str, seconds: float, variables: dict[str, str]) -> float:
    """The speed that a new process prints."""
    user = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", code, str(seconds)]
    result = subprocess.run(
        command, env=user | variables, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(result.stdout)


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    for n_busy in (0, 2):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_busy)]
        try:
            speeds = {(task, policy): [] for task in TASKS for policy in POLICIES}
            for _ in range(config.rounds):
                for (task, policy), samples in speeds.items():
                    samples.append(measure(TASKS[task], config.seconds, POLICIES[policy]))
        finally:
            for process in busy:
                process.kill()
        for (task, policy), samples in speeds.items():
            values = " ".join(f"{sample:.2f}" for sample in samples)
            print(
                f"{n_busy} busy: {task:16} {policy:24} {statistics.median(samples):6.2f} ({values})"
            )
    return 0


if __name__ == "__main__":
    run_script(main)
