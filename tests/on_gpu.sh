#!/bin/sh
# Everything that only a GPU can show, in one command of about ten minutes: the GPU tests, the
# benchmarks, and the full model trained for 40 steps in float32 and in bfloat16.
#
#     sh tests/on_gpu.sh [output folder] [folder of shards] [python]
set -eu
out=${1:-checkpoints/on_gpu} data=${2:-data/demo/pretrain} python=${3:-.venv/bin/python}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"

"$python" -m pytest -m gpu -q > "$out/tests.txt" 2>&1 || true  # what fails is shown, not the end
tail -n 15 "$out/tests.txt"

if [ ! -d "$data" ]; then
    "$python" demo_data.py --output_dir=data/demo
    "$python" prepare_dataset.py --input_file_path=data/demo/pretrain.txt \
        --output_dir="$data" --val_split=0.02
fi
for dtype in bfloat16 float32; do
    "$python" train.py --data_dir="$data" --out_dir="$out/$dtype" --dtype=$dtype --max_steps=40 \
        --num_epochs=100 --warmup_iters=10 --log_interval=1 --eval_interval=20 --sample_tokens=16 \
        > "$out/train_$dtype.txt" 2>&1 || tail -n 15 "$out/train_$dtype.txt"
done
"$python" - "$out" <<'END'
import sys
from pathlib import Path

from metrics import read_metrics

runs = {
    dtype: {row["step"]: row for row in read_metrics(Path(sys.argv[1], dtype, "metrics.jsonl"))}
    for dtype in ("float32", "bfloat16")
}
for step, row in runs["bfloat16"].items():
    losses = [run.get(step, {}).get("loss") for run in runs.values()]
    speed = row.get("tokens_per_second"), row.get("mfu")
    print(f"step {step}: loss float32 {losses[0]}, bfloat16 {losses[1]}, tokens/s, MFU {speed}")
END
rm -f "$out"/*/*.pt
"$python" benchmark.py --device=cuda --results="$out/results.jsonl" 2>&1 | tee "$out/benchmark.txt"
