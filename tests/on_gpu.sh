#!/bin/sh
# Checks that need a GPU, in one command: the GPU tests, the full model trained for 40 steps in
# float32 and in bfloat16, and the benchmarks. A quarter of an hour, much of it compiling. Each part
# that fails or cannot run is named at the end, and the others go on. requirements/bench.txt has the
# peers; `make gpu` installs them. DEVICE=cpu and SETTINGS="--n_layers=2 ..." try this script out
# without a GPU.
#
#     sh tests/on_gpu.sh [output folder] [folder of shards] [python]
set -u
out=${1:-checkpoints/on_gpu} data=${2:-data/demo/pretrain} python=${3:-.venv/bin/python}
device=${DEVICE:-cuda} settings=${SETTINGS:-}
failures=""
mkdir -p "$out" || exit 1

# run NAME COMMAND...: the command's output in $out/NAME.txt; its end is shown if it fails
run() {
    name=$1
    shift
    echo "== $name"
    if ! "$@" > "$out/$name.txt" 2>&1; then
        failures="$failures $name"
        tail -n 15 "$out/$name.txt"
        return 1
    fi
}

if command -v nvidia-smi > /dev/null; then
    run gpu nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader && cat "$out/gpu.txt"
fi
if [ "$device" = cuda ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "no GPU for PyTorch")' || exit 1
fi

run tests "$python" -m pytest -m gpu -q && tail -n 3 "$out/tests.txt"

if [ ! -d "$data" ]; then
    run demo_data "$python" -m preparation.demo_data --output_dir=data/demo
    run prepare_dataset "$python" prepare_dataset.py --input_file_path=data/demo/pretrain.txt \
        --output_dir="$data" --val_split=0.02
fi
for dtype in bfloat16 float32; do
    rm -rf "${out:?}/$dtype" # an earlier run's, which would be continued
    # shellcheck disable=SC2086
    run "train_$dtype" "$python" train.py --data_dir="$data" --out_dir="$out/$dtype" \
        --device="$device" --dtype=$dtype --max_steps=40 --num_epochs=100 --warmup_iters=10 \
        --log_interval=1 --eval_interval=20 --eval_rows=128 --sample_tokens=16 $settings
    rm -f "$out/$dtype"/*.pt
done
"$python" - "$out" <<'END' || failures="$failures losses"
import sys
from pathlib import Path

from training.metrics import read_metrics

runs = {}
for dtype in ("float32", "bfloat16"):
    path = Path(sys.argv[1], dtype, "metrics.jsonl")
    runs[dtype] = {row["step"]: row for row in read_metrics(path) if "loss" in row} if path.exists() else {}
for step in sorted(runs["float32"].keys() | runs["bfloat16"].keys()):
    rows = [run.get(step, {}) for run in runs.values()]
    losses = [row.get("loss") for row in rows]
    speed = [(row.get("tokens_per_second"), row.get("mfu")) for row in rows]
    print(f"step {step}: loss float32 {losses[0]}, bfloat16 {losses[1]}; tokens/s, MFU {speed}")
END
# shellcheck disable=SC2086
run benchmark "$python" benchmark.py --device="$device" --results="$out/results.jsonl" $settings
cat "$out/benchmark.txt"
if [ -n "$failures" ]; then
    echo "not done, see above and $out:$failures"
    exit 1
fi
