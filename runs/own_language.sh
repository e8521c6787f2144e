#!/bin/sh
# A model of a language that Hastings does not know, from text that every machine has: Python.
#
#     sh runs/own_language.sh                                # about ten minutes on two cores
#     sh runs/own_language.sh texts.jsonl                    # your language: see prepare_dataset.py
#     OUT=/tmp/try STEPS=20 sh runs/own_language.sh          # to see that everything works
#
set -eu
[ $# -eq 0 ] || set -- "$(realpath "$1")"
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # made by `make`; otherwise the python of your environment
out=${OUT:-checkpoints_own} data=${DATA:-data/own} vocab=${VOCAB:-8192}
mkdir -p "$data"

if [ $# -eq 0 ]; then # the source files of Python's own library, one a line
    set -- "$data/texts.jsonl"
    python - "$1" <<'END'
import json, pathlib, sys, sysconfig
files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).rglob("*.py"))
with open(sys.argv[1], "w") as output:
    for file in files:
        if not {"site-packages", "dist-packages", "test"} & set(file.parts):
            print(json.dumps({"text": file.read_text("utf-8", "replace")}), file=output)
END
fi
[ -f "$data/tokenizer.json" ] ||
    python hastings/build.py --train="$1" --vocab_size="$vocab" --output_dir="$data"
python prepare_dataset.py --input_file_path="$1" --tokenizer="$data" --output_dir="$data/shards"
python train.py --data_dir="$data/shards" --tokenizer="$data" --out_dir="$out" --n_layers=4 \
    --n_embd=128 --n_heads=4 --n_kv_heads=2 --block_size=256 --batch_size=8 \
    --gradient_accumulation_steps=1 --num_epochs=1000 --max_steps="${STEPS:-500}" \
    --eval_interval=250 --eval_rows=64 --compile=False --sample_prompt="def read_file(path):"
python inference.py --model="$out/best_model.pt" --completion --prompt="import os" \
    --max_new_tokens=100
for format in hf gguf onnx; do # the checkpoint carries its tokenizer; requirements/export.txt
    python export.py --model="$out/best_model.pt" --format="$format"
done
