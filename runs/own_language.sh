#!/bin/sh
# A model of a language that Hastings knows little: a tokenizer, pretraining, chat, exports. Without
# files the language is Python, whose library every machine has.
#
#     sh runs/own_language.sh texts.jsonl chats.jsonl        # formats: prepare_dataset.py --help
#     sh runs/own_language.sh                                # Python's library
#     OUT=/tmp/try STEPS=20 EPOCHS=1 sh runs/own_language.sh # to see that everything works
#
# Measured with Python's library, two cores of a server CPU, 1.6 M parameters, 8,192 ids: about five
# minutes, 3 of them pretraining; 3.8 bytes per token (Hastings 2.1); validation loss 3.96 (1.47 bits
# per byte). An answer has a docstring's form, not its truth: the model is small.
set -eu
[ $# -eq 0 ] || [ $# -eq 2 ] || { echo "usage: sh runs/own_language.sh [texts chats]" >&2; exit 2; }
[ $# -eq 0 ] || set -- "$(realpath "$1")" "$(realpath "$2")"
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # made by `make`; otherwise the python of your environment
out=${OUT:-checkpoints_own} data=${DATA:-data/own}

if [ $# -eq 0 ]; then
    python -m preparation.python_library --output_dir="$data"
    set -- "$data/texts.jsonl" "$data/conversations.jsonl"
fi
python hastings/build.py --train="$1" --vocab_size="${VOCAB:-8192}" --output_dir="$data"
for part in "text $1" "chat $2"; do
    python prepare_dataset.py --input_file_path="${part#* }" --tokenizer="$data" \
        --output_dir="$data/${part%% *}"
done
python train.py --data_dir="$data/text" --tokenizer="$data" --out_dir="$out/pretrain" \
    --n_layers=4 --n_embd=128 --n_heads=4 --n_kv_heads=2 --block_size=256 --batch_size=8 \
    --gradient_accumulation_steps=1 --num_epochs=1000 --max_steps="${STEPS:-1000}" \
    --eval_interval=500 --eval_rows=64 --compile=False --sample_prompt="def read_file(path):"
python train.py --finetune --model="$out/pretrain/best_model.pt" --data_dir="$data/text" \
    --tokenizer="$data" --finetune_data_dir="$data/chat" --finetune_out_dir="$out/finetune" \
    --batch_size=4 --finetune_num_epochs="${EPOCHS:-4}" --eval_interval=100 --eval_rows=64 \
    --compile=False --finetune_sample_prompt="What does os.path.join do?"
model="$out/finetune/best_model.pt" # it carries its tokenizer, so nothing below names it
python inference.py --model="$model" --prompt="What does shutil.copy do?"
for format in hf gguf onnx; do # requirements/export.txt
    python export.py --model="$model" --format="$format"
done
