"""The whole of Lille in some minutes on a CPU: data, pretraining, fine-tuning, an answer.

    make demo          # or, in an environment with requirements.txt: python demo.py

Each stage is one of the project's scripts, run as its printed command line says; only the model is
small. A stage that an interrupted demo had begun continues; a finished one says so.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_file
from common.settings import config_from_constants, run_script
from inference import Lille, lille
from preparation.demo_data import is_right
from training.metrics import draw_losses, read_metrics

data_dir = "data/demo"  # texts and shards
out_dir = "checkpoints_demo"  # checkpoints, metrics and loss curves
picture = ""  # also draw both loss curves here; README.md's is docs/demo.png

QUESTION, EXPECTED = "What is the capital of France?", "Paris"
MODEL_SHAPE = {"n_layers": 4, "n_embd": 128, "n_heads": 4, "n_kv_heads": 2, "block_size": 128}
# SophiaG is far behind AdamW at batches as small as these: see LOG.md.
SMALL_STEPS = {"gradient_accumulation_steps": 1, "optimizer": "adamw", "compile": False}
PRETRAIN = SMALL_STEPS | {
    "batch_size": 16,
    "max_steps": 250,
    "learning_rate": 3e-3,
    "warmup_iters": 30,
    "eval_interval": 50,
    "sample_prompt": "Return the",
}


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def stages(data: str, out: str) -> list[tuple[str, list[str]]]:
    """Title and command of each stage, in order."""
    base, tuned = f"{out}/pretrain", f"{out}/finetune"
    common = [f"--data_dir={data}/pretrain", f"--out_dir={base}", *flags(MODEL_SHAPE)]
    finetune = [
        *flags(SMALL_STEPS),
        "--finetune=True",
        f"--model={base}/best_model.pt",
        f"--finetune_data_dir={data}/conversations",
        f"--finetune_out_dir={tuned}",
        "--batch_size=8",
        "--finetune_num_epochs=12",
        "--finetune_learning_rate=1e-3",
        "--eval_interval=100",
        f"--finetune_sample_prompt={QUESTION}",
    ]
    return [
        ("Collect texts", ["-m", "preparation.demo_data", f"--output_dir={data}"]),
        (
            "Prepare the texts",
            [
                "prepare_dataset.py",
                f"--input_file_path={data}/pretrain.txt",
                f"--output_dir={data}/pretrain",
                "--val_split=0.02",
            ],
        ),
        (
            "Prepare the conversations",
            [
                "prepare_dataset.py",
                f"--input_file_path={data}/conversations.jsonl",
                f"--val_file_path={data}/conversations_heldout.jsonl",
                f"--output_dir={data}/conversations",
            ],
        ),
        ("Pretrain", ["train.py", *common, *flags(PRETRAIN)]),
        ("Fine-tune", ["train.py", *common, *finetune]),
        (
            "Ask",
            [
                "inference.py",
                f"--model={tuned}/best_model.pt",
                f"--prompt={QUESTION}",
                "--temperature=0",
            ],
        ),
    ]


def run_stage(title: str, command: list[str], out: str) -> float:
    """Runs one script in this directory, its output on the screen; returns its seconds."""
    print(f"\n=== {title}\n$ python {shlex.join(command)}", flush=True)
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *command]) as stage:
        code = None
        while code is None:
            try:
                code = stage.wait()
            except KeyboardInterrupt:  # the stage has it too: it saves and ends
                continue
    if code:
        print(
            f"the demo stopped at this stage (exit code {code}): run it again to continue, or "
            f"delete {out} to begin anew"
        )
        raise SystemExit(code if code > 0 else 128 - code)
    return time.perf_counter() - started


def ask(model: Lille, question: str) -> str:
    """The likeliest answer to a question by itself."""
    model.reset_chat()
    return model.chat(question, do_sample=False).strip()


def held_out_share(model: Lille, conversations: Path) -> tuple[int, int]:
    """(right, all) answers to questions worded as none of the training conversations are."""
    right = total = 0
    for line in conversations.read_text("utf-8").splitlines():
        row = json.loads(line)
        answer = ask(model, row["messages"][0]["content"])
        right, total = right + is_right(answer, row["answer"]), total + 1
    return right, total


def draw_curves(out: Path, picture: Path) -> None:
    """Draws the losses of both training stages side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    titles = {"pretrain": "pretraining", "finetune": "fine-tuning"}
    for axes, (stage, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        draw_losses(axes, read_metrics(out / stage / "metrics.jsonl"), title)
    with atomic_file(picture) as file:
        figure.savefig(file, dpi=100, format="png")


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    if not Path("train.py").exists():
        raise UserError("run the demo in the project's folder, where train.py is")
    times = []
    for title, command in stages(config.data_dir, config.out_dir):
        times.append((title, run_stage(title, command, config.out_dir)))

    print("\n=== Ask what was held out", flush=True)
    tuned = f"{config.out_dir}/finetune/best_model.pt"
    started = time.perf_counter()
    model = lille("torch", tuned, device="cpu")
    answer = ask(model, QUESTION)
    right, total = held_out_share(model, Path(config.data_dir, "conversations_heldout.jsonl"))
    times.append(("Ask what was held out", time.perf_counter() - started))
    print(f"{right} of {total} questions in wordings it never saw are answered right")
    print(f"{QUESTION} {answer}")

    if config.picture:
        draw_curves(Path(config.out_dir), Path(config.picture))
    print("\nSeconds: " + ", ".join(f"{title} {seconds:.0f}" for title, seconds in times))
    print(
        f"Loss curves: {config.out_dir}/*/loss_curve.png\n"
        f'Ask on: python inference.py --model={tuned} --prompt="Who are you?"\n'
        "Next: your own text, python prepare_dataset.py --input_file_path=... and python train.py"
    )
    if not is_right(answer, EXPECTED) or 2 * right <= total:
        print("that is worse than it should be: please report it with the output above")
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
