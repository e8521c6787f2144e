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
# aligned/model is a folder for transformers, which every command takes as --model; more in
# docs/alignment.md.
set -eu
[ $# -eq 3 ] || { echo "usage: sh runs/dpo.sh model preferences.jsonl folder" >&2; exit 2; }
[ "$PWD" = "$(cd "$(dirname "$0")/.." && pwd)" ] || { echo "run it in the project's folder" >&2; exit 2; }
[ -f "$2" ] || { echo "$2 is not there: give a file of preferences" >&2; exit 2; }
[ -n "${VIRTUAL_ENV:-}" ] || PATH="$PWD/.venv/bin:$PATH" # an active environment, or the one made by `make`

python export.py --model="$1" --format=hf --dtype=float32 --output_dir="$3/before"
mkdir -p "$3/data" && cp "$2" "$3/data/train.jsonl"
# The rate is the LoRA's; beta is how closely the model stays to where it began.
python -m trl.scripts.dpo --model_name_or_path "$3/before" --dataset_name "$3/data" --beta 0.1 \
    --output_dir "$3/lora" --learning_rate 1e-4 --num_train_epochs 1 --max_steps "${STEPS:--1}" \
    --per_device_train_batch_size 4 --use_peft --lora_r 16 --lora_alpha 32 \
    --lora_target_modules all-linear --eval_strategy no --report_to none --bf16 False
python - "$3" <<'EOF'
import sys, torch, peft, transformers
lora, merged = f"{sys.argv[1]}/lora", f"{sys.argv[1]}/model"
model = peft.AutoPeftModelForCausalLM.from_pretrained(lora, dtype=torch.float32)
model.merge_and_unload().save_pretrained(merged)
transformers.AutoTokenizer.from_pretrained(lora).save_pretrained(merged)
EOF
python inference.py --model="$3/model" --prompt="Who are you?"
