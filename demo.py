"""End-to-end demo on a CPU in minutes: data, pretraining, fine-tuning, a question, evaluation.

    make demo          # or, in an environment with requirements.txt: python demo.py

Each stage runs one of the project's scripts with the command line that is printed; only the model
is small. After an interruption the same command continues where it stopped.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from common.errors import UserError
from common.files import atomic_file
from common.records import read_records
from common.settings import config_from_constants, run_script
from preparation.demo_data import HELD_OUT_QUESTION
from training.metrics import draw_losses, read_metrics

data_dir = "data/demo"  # texts and shards
output_dir = "checkpoints_demo"  # checkpoints, metrics and loss curves
picture = ""  # also draw both loss curves here; README.md's is docs/demo.png

MODEL_SHAPE = {"n_layers": 4, "n_embd": 128, "n_heads": 4, "n_kv_heads": 2, "block_size": 128}
PRETRAIN = {
    "compile": False,
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "max_steps": 225,
    "hess_interval": 20,  # with one micro-batch a step an estimate costs as much as a step
    "eval_interval": 50,
    "sample_prompt": "Return the",
}
FINETUNE = {
    "compile": False,
    "finetune": True,
    "batch_size": 8,
    "finetune_num_epochs": 8,
    "hess_interval": 20,
    "eval_interval": 100,
    "finetune_sample_prompt": HELD_OUT_QUESTION,
}


def stages(data: str, out: str) -> list[tuple[str, list[str]]]:
    """Title and command of each stage, in order."""
    base, tuned, chats = f"{out}/pretrain", f"{out}/finetune", f"{data}/conversations"
    texts = {"input_file_path": f"{data}/pretrain.txt", "output_dir": f"{data}/pretrain"}
    conversations = {
        "input_file_path": f"{chats}.jsonl",
        "val_file_path": f"{chats}_heldout.jsonl",
        "output_dir": chats,
    }
    train = MODEL_SHAPE | {"data_dir": f"{data}/pretrain", "out_dir": base}
    finetune = {
        "model": f"{base}/best_model.pt",
        "finetune_data_dir": chats,
        "finetune_out_dir": tuned,
    }
    question = {"model": f"{tuned}/best_model.pt", "prompt": HELD_OUT_QUESTION, "temperature": 0}
    evaluation = {
        "model": f"{tuned}/best_model.pt",
        "baseline": f"{base}/best_model.pt",
        "data_dir": f"{data}/evaluation",
        "out_dir": f"{out}/evaluation",
        "prompt": "chat",
        "max_new_tokens": 32,
        "device": "cpu",
    }
    commands = [
        ("Collect texts", "-m preparation.demo_data", {"output_dir": data}),
        ("Prepare the texts", "prepare_dataset.py", texts | {"val_split": 0.02}),
        ("Prepare the conversations", "prepare_dataset.py", conversations),
        ("Pretrain", "train.py", train | PRETRAIN),
        ("Fine-tune", "train.py", train | FINETUNE | finetune),
        ("Ask", "inference.py", question),
        ("Evaluate", "evaluate.py", evaluation),
    ]
    return [
        (title, [*script.split(), *(f"--{name}={value}" for name, value in settings.items())])
        for title, script, settings in commands
    ]


def run_stage(title: str, command: list[str], out: str) -> float:
    """Runs one script, its output on the screen; returns its seconds, or exits with its code."""
    print(f"\n=== {title}\n$ python {shlex.join(command)}", flush=True)
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, *command]) as stage:
        while stage.poll() is None:
            with suppress(KeyboardInterrupt):  # the script gets it too: it saves and exits
                stage.wait()
    if code := stage.returncode:
        print(
            f"the demo stopped at this stage (exit code {code}): run it again to continue, or "
            f"delete {out} to begin anew"
        )
        raise SystemExit(code if code > 0 else 128 - code)
    return time.perf_counter() - started


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
    config = config_from_constants(globals(), argv, renamed={"out_dir": "output_dir"})
    if not Path("train.py").exists():
        raise UserError("run the demo in the project's folder, where train.py is")
    times = {
        title: run_stage(title, command, config.output_dir)
        for title, command in stages(config.data_dir, config.output_dir)
    }
    tuned = f"{config.output_dir}/finetune/best_model.pt"
    lines = read_records(Path(config.output_dir, "evaluation", "results.jsonl"))
    record = next(line for line in reversed(lines) if line["model"]["name"] == tuned)
    right = record["tasks"]["demo_questions"]["metrics"]["right"]
    n_right = round(right["value"] * right["n"])
    print(f"\n{n_right} of {right['n']} questions in wordings it never saw are answered right")
    if config.picture:
        draw_curves(Path(config.output_dir), Path(config.picture))
    print("\nSeconds: " + ", ".join(f"{title} {seconds:.0f}" for title, seconds in times.items()))
    print(
        f"Loss curves: {config.output_dir}/*/loss_curve.png\n"
        f'Ask on: python inference.py --model={tuned} --prompt="Who are you?"\n'
        f"In a web page: python export.py --model={tuned} --format=web (requirements/export.txt)\n"
        "Next: your own text, python prepare_dataset.py --input_file_path=... and python train.py"
    )
    if right["value"] <= 0.5:
        print("that is worse than it should be: please report it with the output above")
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
