#!/bin/sh
# A small model on your own text on a CPU: prepare, pretrain, fine-tune, ask, export as GGUF.
#
#     sh runs/laptop_cpu.sh texts.txt chats.jsonl            # formats: prepare_dataset.py --help
#     sh runs/laptop_cpu.sh                                  # without files: the demo's
#     OUT=/tmp/try STEPS=20 EPOCHS=1 sh runs/laptop_cpu.sh   # to see that everything works
#
# Measured with the demo's files, one thread of a busy server CPU, a model of 4.8 M parameters:
#   time      about ten minutes in all, half of it pretraining (order of magnitude only)
#   disk      0.4 GB
#   loss      validation 5.05 after 250 steps of 2,048 tokens (10.4 at the start); of the answers
#             0.01 after 16 epochs, when it answers "The capital of France is Paris."
# Not measured: memory (a machine that runs PyTorch has enough) and your own texts. Another text
# takes the same time; more conversations take longer in proportion.
set -eu
[ $# -eq 0 ] || [ $# -eq 2 ] || { echo "usage: sh runs/laptop_cpu.sh [texts chats]" >&2; exit 2; }
[ $# -eq 0 ] || set -- "$(realpath "$1")" "$(realpath "$2")"
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # made by `make`; otherwise the python of your environment
out=${OUT:-checkpoints_laptop} data=${DATA:-data/laptop}

if [ $# -eq 0 ]; then
    python -m preparation.demo_data --output_dir="$data"
    set -- "$data/pretrain.txt" "$data/conversations.jsonl"
fi
python prepare_dataset.py --input_file_path="$1" --output_dir="$data/pretrain" --val_split=0.02
python prepare_dataset.py --input_file_path="$2" --output_dir="$data/chats" --val_split=0.02
# num_epochs: a small text is repeated until max_steps.
python train.py --data_dir="$data/pretrain" --out_dir="$out/pretrain" --n_layers=4 --n_embd=128 \
    --n_heads=4 --n_kv_heads=2 --block_size=256 --batch_size=8 --gradient_accumulation_steps=1 \
    --num_epochs=1000 --max_steps="${STEPS:-250}" --eval_interval=100 --eval_rows=64 --compile=False
python train.py --finetune --model="$out/pretrain/best_model.pt" --data_dir="$data/pretrain" \
    --finetune_data_dir="$data/chats" --finetune_out_dir="$out/finetune" --batch_size=4 \
    --finetune_num_epochs="${EPOCHS:-16}" --eval_interval=100 --eval_rows=64 --compile=False
python inference.py --model="$out/finetune/best_model.pt" --prompt="What is the capital of France?"
# GGUF needs requirements/export.txt
python export.py --model="$out/finetune/best_model.pt" --format=gguf --dtype=f16
