"""Metrics of a training run: metrics.jsonl, the loss curve, the progress bar, a tracker."""

import importlib
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.errors import one_line
from common.files import atomic_file

PEAK_FLOPS = {  # dense 16-bit matrix products of a card, FLOP/s, by a pattern of its name
    r"\bH200\b": 989e12,
    r"\bH100 (80GB HBM3|SXM)": 989e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bA100[ -]": 312e12,
    r"\bL40S\b": 362e12,
    r"\bRTX 4090$": 165e12,
    r"\bRTX 4070 Ti$": 80.2e12,
    r"\bRTX 3090$": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Published 16-bit FLOP/s of a known GPU; None for any other device."""
    peaks = (peak for name, peak in PEAK_FLOPS.items() if re.search(name, device_name))
    return next(peaks, None)


def tracker_of(config: Any) -> str:
    """The tracker that the settings name: "none", "trackio" or "wandb"."""
    return "wandb" if config.wandb_log else config.tracker


class Metrics:
    """Appends one JSON object per line to `out_dir/metrics.jsonl` and draws its loss curves.

    A resumed run first drops the lines beyond the step it resumes from, so that a killed run's file
    ends up the same as an undisturbed one's, except for timings and for the next loss where
    `log_interval` does not divide the step of the checkpoint. A failure (a full disk) loses lines
    and pictures, with one message, never the run. With several ranks only one is `active`.
    `start_tracker` also sends the lines to a package with the functions of wandb.
    """

    def __init__(self, out_dir: Path, first_step: int, active: bool = True):
        self.path, self.curve = out_dir / "metrics.jsonl", out_dir / "loss_curve.png"
        self.active, self.failed, self.tracker = active, False, None
        self.tracker_failed = False
        if not active:
            return
        with self.reported_once():
            rows = [row for row in read_metrics(self.path) if row["step"] <= first_step]
            with atomic_file(self.path) as file:
                file.writelines(json.dumps(row).encode() + b"\n" for row in rows if first_step)

    def start_tracker(self, name: str, project: str, settings: dict[str, Any]) -> None:
        """Starts a run of the package `name`, "trackio" or "wandb"; nothing for "none"."""
        if self.active and name != "none":
            with self.tracking():
                package = importlib.import_module(name)
                package.init(project=project, config=settings)
                self.tracker = package

    def log(self, step: int, **values: float | str) -> None:
        if not self.active:
            return
        json_values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        with self.reported_once(), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | json_values) + "\n")
        if self.tracker is not None:
            with self.tracking():
                self.tracker.log({k: v for k, v in values.items() if v is not None}, step=step)

    @contextmanager
    def reported_once(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.report(f"cannot write metrics ({one_line(error)}); training goes on")

    @contextmanager
    def tracking(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.tracker_failed:
                self.tracker_failed = True
                with suppress(OSError):
                    line = f"the tracker fails ({one_line(error)}); training goes on"
                    print(line, file=sys.stderr)

    def report(self, line: str) -> None:
        if not self.failed:
            self.failed = True
            with suppress(OSError):
                print(line, file=sys.stderr)

    def plot(self) -> None:
        """Draws training and validation loss against steps as `loss_curve.png`."""
        if not self.active:
            return
        with self.reported_once(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a title in letters that the font lacks
            try:
                from matplotlib.figure import Figure
            except ImportError:
                return self.report("no loss_curve.png: pip install matplotlib")
            figure = Figure(figsize=(8, 4.5))  # a layout engine would draw it twice
            draw_losses(figure.subplots(), read_metrics(self.path), str(self.path.parent))
            with atomic_file(self.curve) as file:
                figure.savefig(file, dpi=120, format="png")

    def close(self) -> None:
        if self.tracker is not None:
            with self.tracking():
                self.tracker.finish()


def draw_losses(axes: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Draws training and validation losses against steps on matplotlib `axes`."""
    sets = sorted({key for row in rows for key in row if re.fullmatch("val/.*_loss", key)})
    for key, label, style in (
        ("loss", "training", {"linewidth": 1, "alpha": 0.8}),
        ("val_loss", "validation", {"marker": "o", "markersize": 4}),
        *((key, key[4:-5], {"marker": ".", "linewidth": 1}) for key in sets),
        ("averaged_val_loss", "validation, averaged weights", {"marker": "x", "markersize": 4}),
        ("watch_val_loss", "watched data", {"marker": "s", "markersize": 4}),
        ("pretrain_val_loss", "pretraining validation", {"marker": "s", "markersize": 4}),
    ):
        points = [(row["step"], row[key]) for row in rows if type(row.get(key)) in (int, float)]
        if points:
            label = os.fsencode(label).decode(errors="replace").lstrip("_")  # _: not in the legend
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    title = os.fsencode(title).decode(errors="replace")  # a path may hold any bytes
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a line that a kill cut short or that is no row is skipped."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


def last_metrics(out_dir: Path, until: float = math.inf) -> dict[str, Any]:
    """The newest value of every metric of a run, up to the step `until`."""
    newest: dict[str, Any] = {}
    with suppress(OSError):
        for row in read_metrics(out_dir / "metrics.jsonl"):
            newest |= row if row["step"] <= until else {}
    return newest


class Progress:
    """Progress bar with loss, lr, tokens/s, win rate, and MFU on known GPUs; tqdm adds the ETA.

    Tokens/s are those of all `n_devices` together, MFU is per device. A terminal that is gone or a
    full disk behind it loses text, never the run.
    """

    def __init__(
        self,
        first_step: int,
        total_steps: int,
        flops_per_token: int,
        device: torch.device,
        n_devices: int = 1,
        active: bool = True,
    ):
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.1 if sys.stderr.isatty() else 15,  # a log file needs fewer lines
            delay=1e-9,  # nothing is drawn here, where an error would end the run
            disable=not active,
        )
        self.flops_per_token, self.peak = flops_per_token, None
        if device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name(device))
        self.n_devices = n_devices
        self.tokens = 0
        self.start_time = time.perf_counter()

    def advance(self, tokens: int) -> None:
        """Counts one step of `tokens` useful tokens."""
        self.tokens += tokens
        with suppress(OSError):
            self.bar.update()

    def rate(self) -> dict[str, float]:
        """Tokens/s, and MFU where the peak is known, since the last call."""
        now = time.perf_counter()
        tokens_per_second = self.tokens / (now - self.start_time)
        self.tokens, self.start_time = 0, now
        rates = {"tokens_per_second": round(tokens_per_second, 1)}
        if self.peak is not None:
            per_device = tokens_per_second / self.n_devices
            rates["mfu"] = round(per_device * self.flops_per_token / self.peak, 4)
        return rates

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of evaluation and saving from the training rate."""
        pause_start = time.perf_counter()
        yield
        self.start_time += time.perf_counter() - pause_start

    def show(self, **values: float) -> None:
        texts = {key: f"{value:.4g}" for key, value in values.items()}
        with suppress(OSError):
            self.bar.set_postfix(texts, refresh=sys.stderr.isatty())

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.bar.write(text)

    def close(self) -> None:
        with suppress(OSError):
            self.bar.close()


def best_loss(results: dict[str, Any]) -> tuple[float, bool]:
    """The lower validation loss of an evaluation; whether it is that of the averaged weights."""
    losses = [results["val_loss"], results.get("averaged_val_loss", math.inf)]
    last, averaged = (loss if math.isfinite(loss) else math.inf for loss in losses)
    return min(last, averaged), averaged < last


def evaluation_line(step: int, results: dict[str, Any], is_best: bool) -> str:
    """An evaluation as text: its numbers, and the text sample on a line of its own."""
    numbers = ", ".join(f"{k} {v:.4f}" for k, v in results.items() if isinstance(v, float))
    which = ", the averaged weights" if best_loss(results)[1] else ""
    line = f"step {step}: {numbers}" + (f" (best so far{which})" if is_best else "")
    return line + (f"\n    {results['sample']!r}" if "sample" in results else "")
