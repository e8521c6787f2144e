#!/bin/sh
# Pretrains the full model, 127,171,200 parameters, on FineWeb-Edu's sample-10BT with one GPU.
#
# Nothing here has run on a GPU or fetched from the hub: all numbers are estimates.
#   disk      32 GB while preparing, 21 GB of shards if every document is kept, 6 GB of checkpoints
#   GPU memory  9.4 GB = 2.0 (weights, gradients, two moments: 16 bytes a parameter) + 0.5 (Hessian
#             estimate) + 0.3 (bf16 weights) + 5.6 (0.69 MB a token * 8,192 tokens, from the 23.3 KB
#             a layer that a step compiled on a CPU keeps, and bf16 logits with their gradient)
#             + 1 (CUDA itself)
#   time      preparation as the network: 28.5 GB, 10 minutes at 50 MB/s.
#             Training at most (the filters drop documents) 8.6e18 FLOPs = 10 B tokens * 857 M
#             FLOPs (6 N + 12 layers * width * context). At 40 % of the card's dense bf16 peak:
#             H100 (989 TFLOP/s) 6 h, A100 (312) 19 h, RTX 4090 (165) 36 h.
#   loss      not measured at this size. ln(32768) = 10.4 at the start.
#
# The rates at this size are extrapolated (training/learning_rates.py). Look at win_rate in
# checkpoints/metrics.jsonl: good small runs end at 0.8 to 0.9; below 0.6 the rate was too high.
# Interrupted in any way, the same command continues.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # made by `make`; otherwise the python of your environment

python prepare_dataset_fineweb.py
python train.py
python inference.py --model=checkpoints/best_model.pt --completion --max_new_tokens=100 \
    --prompt="The most important thing about science is"
