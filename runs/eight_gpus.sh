#!/bin/sh
# Pretrains the full model on sample-10BT with eight GPUs of one machine.
#
# Measured: 2 and 4 processes on a CPU compute the run of one (LOG.md). Nothing here has run on a
# GPU: all other numbers are estimates (docs/multi_gpu.md has the formula, and several machines).
#   GPU memory  9.4 GB each, the sum of runs/pretrain_one_gpu.sh, and up to 0.5 GB of NCCL buffers
#   disk      32 GB while preparing, 21 and 6 GB afterwards
#   time      preparation as the network: 28.5 GB. Training: 34 ms a step of 131,072 tokens at
#             500,000 tokens/s a GPU (43 % of an H100's bf16 peak), 76,000 steps for 10 B tokens:
#             43 minutes at most, and evaluations and checkpoints. The filters drop documents.
#   loss      not measured at this size; to rounding that of one GPU with the same settings
#
# hess_batches=8: each GPU makes one Hessian estimate of 8,192 tokens, in the time of one.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # made by `make`; otherwise the python of your environment

torchrun --standalone --nproc_per_node=4 prepare_dataset_fineweb.py
torchrun --standalone --nproc_per_node=8 --shutdown-timeout=120 train.py --hess_batches=8
