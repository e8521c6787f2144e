#!/bin/sh
# Preference tuning of a fine-tuned model: TRL's DPO on a LoRA of PEFT, merged and taken back.
#
#     pip install -r requirements/align.txt
#     sh runs/dpo.sh checkpoints_ft/best_model.pt preferences.jsonl aligned
#     STEPS=3 sh runs/dpo.sh ...                  # to see that everything works
#
# Each line of the preferences has a question and two answers:
#
#     {"prompt": [{"role": "user", "content": "Who are you?"}],
#      "chosen": [{"role": "assistant", "content": "I am Lille."}],
#      "rejected": [{"role": "assistant", "content": "I am a person."}]}
#
# aligned/model is a folder for transformers, and every command here reads it as --model. More in
# docs/alignment.md.
set -eu
[ $# -eq 3 ] || { echo "usage: sh runs/dpo.sh model preferences.jsonl folder" >&2; exit 2; }
[ "$PWD" = "$(cd "$(dirname "$0")/.." && pwd)" ] || { echo "run it in the project's folder" >&2; exit 2; }
PATH="$PWD/.venv/bin:$PATH" # made by `make`; otherwise the python of your environment

python export.py --model="$1" --format=hf --dtype=float32 --output_dir="$3/before"
python - "$2" "$3" "${STEPS:--1}" <<'EOF'
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

preferences, folder, steps = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(f"{folder}/before", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/before")
settings = DPOConfig(
    output_dir=f"{folder}/training",
    max_steps=int(steps),  # -1: all epochs
    num_train_epochs=1,
    per_device_train_batch_size=4,
    learning_rate=1e-4,  # of the LoRA; a hundredth of it for all weights
    beta=0.1,  # how closely the model stays to where it began
    max_length=model.config.max_position_embeddings,
    bf16=torch.cuda.is_available(),
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
trainer = DPOTrainer(
    model,
    args=settings,
    train_dataset=load_dataset("json", data_files=preferences, split="train"),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
trainer.model.merge_and_unload().float().save_pretrained(f"{folder}/model")
tokenizer.save_pretrained(f"{folder}/model")
EOF
python inference.py --model="$3/model" --prompt="Who are you?"
# The same formats as from a checkpoint: GGUF, ONNX, a web page.
python export.py --model="$3/model" --format=hf --output_dir="$3/hf"
