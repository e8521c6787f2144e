#!/bin/sh
# Pretrains the full model on a consumer card:   sh runs/consumer_card.sh 12   # or 8: its gigabytes
#
# Nothing here has run on a GPU: all numbers are estimates. Smaller micro-batches and more of them
# give the same steps of 131,072 tokens. hess_batches keeps 8,192 tokens in a Hessian estimate.
#   GPU memory  the same sum as in runs/pretrain_one_gpu.sh, with 4,096 and 2,048 tokens at once:
#             12 GB: 2.0 + 0.5 + 0.3 + 2.8 + 1 = 6.6 GB (16 rows: 9.4, if no window needs the card)
#              8 GB: 1.5 + 0.5 + 0.3 + 1.4 + 1 = 4.7 GB (bfloat16 moments save 0.4 GB; they are
#                    rounded stochastically, and a long run with them has not been compared)
#   disk      as runs/pretrain_one_gpu.sh: 32 GB while preparing, 21 and 6 GB afterwards
#   time      20,000 steps, 2.6 B tokens, about 20 a parameter, are 2.2e18 FLOPs. At 40 % of the
#             dense 16-bit peak with float32 sums: RTX 4090 (165 TFLOP/s) 10 h, RTX 3060 (25) 62 h,
#             RTX 4060 (30) 52 h. Cards without bf16 use float16 with loss scaling.
#   loss      not measured at this size
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # made by `make`; otherwise the python of your environment

case ${1:-12} in
12 | 8) ;;
*) echo "usage: sh runs/consumer_card.sh [12|8]" >&2 && exit 2 ;;
esac
python prepare_dataset_fineweb.py
if [ "${1:-12}" = 12 ]; then
    python train.py --batch_size=8 --gradient_accumulation_steps=32 --hess_batches=2 \
        --max_steps=20000
else
    python train.py --batch_size=4 --gradient_accumulation_steps=64 --hess_batches=4 \
        --max_steps=20000 --optimizer_state_dtype=bfloat16
fi
