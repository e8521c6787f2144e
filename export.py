"""Exports a checkpoint to Hugging Face, ONNX or GGUF.

    python export.py --format=hf                       # a folder for transformers, a plain Llama
    python export.py --format=onnx --dtype=fp32,int8   # for transformers.js and onnxruntime
    python export.py --format=web                      # the same with a page that chats with it
    python export.py --format=gguf --dtype=q8_0        # a file for llama.cpp
    python export.py --model=checkpoints/best_model.pt --output_dir=my_model
    python export.py --mix=checkpoints/best_model.pt:0.3,checkpoints_ft/best_model.pt:0.7 \
        --output_dir=mixed

Every export is read back and compared with the checkpoint before it replaces an earlier one. A
checkpoint with rope_style="lille", such as the original's, cannot be a Llama: "hf" then writes a
folder that needs `trust_remote_code=True`, and "gguf" refuses.

A mix is the weighted mean of models of one shape, for example of a base and what was fine-tuned
from it, which forgets less (Wortsman et al., arXiv 2109.01903).
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
import dataclasses
from pathlib import Path
from typing import Any

import torch

from checkpoint import (
    checkpoint_tokenizer,
    load_checkpoint,
    load_model_and_tokenizer,
    model_from_checkpoint,
)
from common.errors import UserError
from common.files import file_sha256
from common.mixture import parse_mixture
from common.records import read_records
from common.settings import chosen_names, config_from_constants, run_script
from common.signals import terminated_as_interrupted
from formats import push_hub, write_gguf, write_hf, write_onnx, write_web
from formats.model_card import model_card
from formats.pretrained import resolve_model
from model import GPT
from tokenizer import Tokenizer

model = "checkpoints_ft/best_model.pt"  # a .pt, a folder, a hub id, or "130m-instruct"
mix = ""  # in place of model: "a.pt:0.7,b.pt:0.3", models of one shape and their shares
format = "hf"  # "hf", "gguf", "onnx", or "web": a page that chats in the browser
output_dir = ""  # folder to write, gguf: or a .gguf file; "": beside the model, named after it
evaluations = "evaluations"  # evaluate.py's out_dir: the card shows the model's newest results
dtype = ""  # hf: float32, float16, bfloat16; gguf: f32, f16, q8_0; onnx, web: fp32,fp16,int8,q4
push = ""  # "user/name": upload the export to the hub too, as a private repository
public = False  # --push makes a public repository
title = ""  # web: heading of the page; "": the model's name
web_library = ""  # web: a node_modules folder to copy transformers.js from; "": from jsDelivr

DTYPES = {"hf": write_hf.DTYPES, "gguf": write_gguf.DTYPES}
DTYPES |= {"onnx": write_onnx.DTYPES, "web": write_onnx.DTYPES}
DEFAULTS = {"gguf": "f32", "onnx": "fp32", "web": "int8"}  # hf: the model's
RENAMED = {"output": "output_dir"}
# Settings of a training run for the model card: no paths and no names.
CARD_SETTINGS = (
    "optimizer embedding_optimizer learning_rate embedding_learning_rate schedule decay_share "
    "min_lr_ratio warmup_iters average_last "
    "weight_decay beta1 beta2 rho cautious hess_interval adamw_beta1 adamw_beta2 grad_clip "
    "batch_size gradient_accumulation_steps num_epochs max_steps dropout finetune dtype seed"
).split()
SOPHIAG_SETTINGS = ("beta", "rho", "cautious", "hess_")  # beginnings of their names


def export_target(model: str, output_dir: str, format: str) -> Path:
    """The folder to write, or for "gguf" the file.

    Without `output_dir` it is beside the model, ft/best_model.pt -> ft/best_model-hf, and that of a
    model from the Hub is in the current folder.
    """
    path = Path(model)
    base = path.with_suffix("") if path.suffix == ".pt" else path
    base = base if path.exists() else Path(base.name)
    if format != "gguf":
        return Path(output_dir) if output_dir else base.with_name(f"{base.name}-{format}")
    if output_dir.endswith(".gguf"):
        return Path(output_dir)
    return Path(output_dir or base.parent) / f"{base.name}.gguf"


def training_facts(state: dict[str, Any]) -> dict[str, str]:
    """Rows of the model card about the training, from those entries that a checkpoint has."""
    facts = {}
    if isinstance(state.get("iter_num"), int):
        facts["Optimizer steps"] = f"{state['iter_num']:,}"
    if isinstance(state.get("best_val_loss"), float):
        facts["Best validation loss (nats per token)"] = f"{state['best_val_loss']:.4f}"
    settings = state.get("config", {})
    unused = ()
    if settings.get("optimizer") in ("adamw", "muon"):
        unused = SOPHIAG_SETTINGS
    elif settings.get("optimizer") == "sophiag" and not settings.get("embedding_learning_rate"):
        unused = ("adamw_",)
    if not settings.get("embedding_learning_rate"):
        unused += ("embedding_learning_rate",)
    names = [name for name in CARD_SETTINGS if name in settings and not name.startswith(unused)]
    return facts | {f"Training: {name}": str(settings[name]) for name in names}


def evaluation_facts(path: Path, evaluations: str) -> dict[str, str]:
    """Rows of the model card about the newest evaluation of a checkpoint on each task."""
    if not path.is_file():
        return {}
    facts, sha256 = {}, file_sha256(path)
    for line in read_records(Path(evaluations, "results.jsonl")):
        if line["model"]["sha256"] != sha256:
            continue
        settings = line["settings"]
        how = f"{settings['n_shots']}-shot, {settings['form']}, {settings['prompt']} prompt"
        for task, result in line["tasks"].items():
            for metric, e in list(result["metrics"].items())[:1]:
                chance = result["chance"] if metric.startswith("acc") else None
                texts = [f"{e['value']:.4f}"]
                if None not in (e["low"], e["high"]):
                    texts.append(f"95 % interval {e['low']:.4f} to {e['high']:.4f}")
                texts += [f"{e['n']:,} items"] + ([f"chance {chance:.4f}"] if chance else [])
                facts[f"Evaluation: {task}, {metric}, {how}"] = ", ".join(texts)
    return facts


def check_settings(format: str, dtype: str, models: list[str], target: Path) -> None:
    """Raises UserError for wrong settings before a model is read."""
    if format not in DTYPES:
        raise UserError(f"--format={format}: expected {', '.join(DTYPES)}")
    if format in ("onnx", "web"):  # which take several
        chosen_names("dtype", dtype or DEFAULTS[format], DTYPES[format])
    elif dtype not in ("", *DTYPES[format]):
        raise UserError(
            f"--dtype={dtype}: expected {', '.join(DTYPES[format])} for --format={format}"
        )
    if target.exists() and target.resolve() in [Path(model).resolve() for model in models]:
        raise UserError(f"--output_dir={target} is the model itself: choose another --output_dir")


def open_model(name: str) -> tuple[GPT, Tokenizer, dict[str, str]]:
    """A model, its tokenizer, and rows of its card if it is a checkpoint."""
    path = resolve_model(name, with_tokenizer=True)
    if path.is_dir():
        return *load_model_and_tokenizer(path), {}
    state = load_checkpoint(path)
    gpt = model_from_checkpoint(state, path).eval()
    return gpt, checkpoint_tokenizer(state, path, gpt.config.vocab_size), training_facts(state)


def mixed_model(text: str) -> tuple[GPT, Tokenizer, dict[str, str]]:
    """The weighted mean of the models in `mix`, in float32, their tokenizer, a row with the shares.

    Raises UserError unless the shares sum to 1, and for models that differ in shape or tokenizer.
    """
    parts = parse_mixture(text, "mix")
    if abs((total := sum(part.weight for part in parts)) - 1) > 1e-6:
        raise UserError(
            f"mix: the shares sum to {total:g}: give a number after each colon, 1 in all"
        )
    mean: GPT | None = None
    for part in parts:
        gpt, own_tokenizer, _ = open_model(part.folder)
        shape = dataclasses.replace(gpt.config, dropout=0.0)
        if mean is None:
            mean, tokenizer = GPT(shape), own_tokenizer
            for weight in mean.parameters():
                torch.nn.init.zeros_(weight)
        for what, differs in {
            "shape": shape != mean.config,
            "tokenizer": own_tokenizer.sha256 != tokenizer.sha256,
        }.items():
            if differs:
                raise UserError(f"mix: {part.folder} has another {what} than {parts[0].folder}")
        with torch.no_grad():
            for weight, other in zip(mean.parameters(), gpt.parameters(), strict=True):
                weight.add_(other, alpha=part.weight)
    shares = ", ".join(f"{part.weight:g}" for part in parts)
    return mean.eval(), tokenizer, {"Weighted mean of models, with the shares": shares}


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv, renamed=RENAMED)
    if config.mix and not config.output_dir:
        raise UserError("--mix needs --output_dir: name the folder or file to write")
    if config.mix and config.model != model:
        raise UserError("give --mix or --model, not both")
    name = config.output_dir if config.mix else config.model
    models = [p.folder for p in parse_mixture(config.mix, "mix")] if config.mix else [name]
    target = export_target(name, config.output_dir, config.format)
    check_settings(config.format, config.dtype, models, target)
    if config.push:
        push_hub.check_push(config.push)
    if config.mix:
        gpt, tokenizer, facts = mixed_model(config.mix)
    else:
        gpt, tokenizer, facts = open_model(config.model)
        facts |= evaluation_facts(Path(config.model), config.evaluations)
    own_dtype = str(gpt.tok_embeddings.weight.dtype).removeprefix("torch.")
    dtype = config.dtype or DEFAULTS.get(config.format, own_dtype)
    dtypes = chosen_names("dtype", dtype, DTYPES[config.format])
    with terminated_as_interrupted():
        if config.format == "hf":
            write_hf.export_hf(gpt, tokenizer, target, dtype, facts, config.push)
        elif config.format == "gguf":
            write_gguf.export_gguf(gpt, tokenizer, target, dtype)
        elif config.format == "onnx":
            write_onnx.export_onnx(gpt, tokenizer, target, dtypes, facts, config.push)
        else:
            title = config.title or Path(name).name.removesuffix(".pt")
            card = (facts, config.push)
            write_web.export_web(gpt, tokenizer, target, dtypes, *card, title, config.web_library)
    print(f"wrote {target}")
    if config.format == "web":
        print(f"open it: python -m http.server --directory {target}, then http://localhost:8000")
    if config.push:
        files = push_hub.files_to_push(target)
        if config.format == "gguf":
            arguments = (gpt, tokenizer, "gguf", dtype, facts, config.push, target.name)
            files |= {"README.md": model_card(*arguments)}
            modelfile = target.with_suffix(".Modelfile")
            if modelfile.read_text("utf-8").startswith(write_gguf.MARK):  # not a user's own
                files[modelfile.name] = modelfile
        print(f"pushed to {push_hub.push(files, config.push, config.public)}")
    if config.format == "hf" and gpt.config.rope_style == "lille":
        print(
            "this checkpoint has the original's position encoding (rope_style='lille'), which no "
            "Llama has: load the folder with trust_remote_code=True"
        )
    return 0


if __name__ == "__main__":
    run_script(main)
