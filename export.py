"""Takes a model out of the project's own format.

    python export.py --format=hf                       # a folder for transformers, a plain Llama
    python export.py --format=onnx --dtype=int8        # a graph for onnxruntime
    python export.py --format=gguf --dtype=q8_0        # a file for llama.cpp
    python export.py --model=checkpoints/best_model.pt --output=my_model

Every export is read back and compared with the checkpoint before it takes its place. A checkpoint
with rope_style="lille", as the original's, cannot be a Llama: "hf" then writes a folder that needs
`trust_remote_code=True`, and "gguf" refuses.
"""

import common.threads  # noqa: F401  before torch, which reads what it sets

# isort: split
from pathlib import Path
from typing import Any

from checkpoint import load_checkpoint, load_model, model_from_checkpoint
from common.errors import UserError
from common.settings import config_from_constants, run_script
from common.signals import terminated_as_interrupted
from formats.write_hf import export_hf
from model import GPT
from tokenizer import load_tokenizer

model = "checkpoints_ft/best_model.pt"  # a .pt, a folder, a hub id, or "130m-instruct"
format = "hf"  # "hf", "onnx" or "gguf"
output = ""  # folder to write ("gguf": file); "": named after the model, beside it
dtype = ""  # hf: float32, float16, bfloat16; onnx: fp32, fp16, int8; gguf: f32, f16, q8_0

DTYPES_OF = {
    "hf": ("float32", "float16", "bfloat16"),
    "onnx": ("fp32", "fp16", "int8"),
    "gguf": ("f32", "f16", "q8_0"),
}
# Settings of a training run that a model card may tell: no paths and no names.
TOLD = (
    "optimizer learning_rate min_lr_ratio warmup_iters weight_decay beta1 beta2 rho hess_interval "
    "adamw_beta1 adamw_beta2 grad_clip batch_size gradient_accumulation_steps num_epochs max_steps "
    "dropout finetune dtype seed"
).split()


def output_path(name: str, format: str) -> Path:
    """Where an export goes by default: ft/best_model.pt -> ft/best_model-hf.

    That of a model from the hub goes into the current folder.
    """
    path = Path(name)
    base = path.with_suffix("") if path.suffix == ".pt" else path
    base = base if path.exists() else Path(base.name)
    return base.with_name(f"{base.name}.gguf" if format == "gguf" else f"{base.name}-{format}")


def training_facts(state: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint tells about its training, for the model card; only what is there."""
    facts = {}
    if isinstance(state.get("iter_num"), int):
        facts["Optimizer steps"] = f"{state['iter_num']:,}"
    if isinstance(state.get("best_val_loss"), float):
        facts["Best validation loss (nats per token)"] = f"{state['best_val_loss']:.4f}"
    settings = state.get("config")
    for name in TOLD if isinstance(settings, dict) else ():
        if name in settings:
            facts[f"Training: {name}"] = str(settings[name])
    return facts


def check_settings(config: Any, target: Path) -> None:
    """UserError for what is wrong before a model is even read."""
    if config.format not in DTYPES_OF:
        raise UserError(f"--format={config.format}: expected {', '.join(DTYPES_OF)}")
    dtypes = DTYPES_OF[config.format]
    if config.dtype not in ("", *dtypes):
        raise UserError(
            f"--dtype={config.dtype}: expected {', '.join(dtypes)} for --format={config.format}"
        )
    if target.exists() and target.resolve() == Path(config.model).resolve():
        raise UserError(f"--output={target} is the model itself: choose another --output")


def main(argv: list[str] | None = None) -> int:
    config = config_from_constants(globals(), argv)
    target = Path(config.output) if config.output else output_path(config.model, config.format)
    check_settings(config, target)
    tokenizer = load_tokenizer()
    state = load_checkpoint(config.model) if Path(config.model).is_file() else {}
    gpt = model_from_checkpoint(state, config.model).eval() if state else load_model(config.model)
    check_vocabulary(config.model, gpt, state, tokenizer)
    with terminated_as_interrupted():
        if config.format == "hf":
            name = config.dtype or str(gpt.tok_embeddings.weight.dtype).removeprefix("torch.")
            export_hf(gpt, tokenizer, target, name, training_facts(state))
        elif config.format == "onnx":
            from formats.write_onnx import export_onnx

            export_onnx(gpt, tokenizer, target, config.dtype)
        else:
            from formats.write_gguf import export_gguf

            export_gguf(gpt, tokenizer, target, config.dtype)
    print(f"wrote {target}")
    if config.format == "hf" and gpt.config.rope_style == "lille":
        print(
            "this checkpoint has the original's position encoding (rope_style='lille'), which no "
            "Llama has: load the folder with trust_remote_code=True"
        )
    return 0


def check_vocabulary(name: str, gpt: GPT, state: dict[str, Any], tokenizer: Any) -> None:
    """UserError if the model was trained with another tokenizer than this repository's."""
    if gpt.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{name} has vocab_size {gpt.config.vocab_size} and the tokenizer "
            f"{tokenizer.vocab_size}: export a model that was trained with this tokenizer"
        )
    if state.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(
            f"{name} was trained with another tokenizer: export it with the hastings.json of "
            "that run"
        )


if __name__ == "__main__":
    run_script(main)
