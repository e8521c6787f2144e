#!/bin/sh
# Fine-tunes the pretrained model on the conversations of Nikity/Kyoto-Corpus, then chats.
# Before it: runs/pretrain_one_gpu.sh, runs/consumer_card.sh or runs/eight_gpus.sh.
#
# Nothing here has run on a GPU or fetched from the hub: all numbers are estimates.
#   disk      the corpus twice (its Parquet and the shards), 6 GB of checkpoints
#   memory    of the GPU 9.4 GB, as pretraining with the same batch_size; preparation 0.4 GB
#   time      857e6 FLOPs a token and epoch at 40 % of the card's bf16 peak: 100 M tokens, three
#             epochs, take 11 minutes on an H100 and 65 on an RTX 4090. The size of the corpus is
#             not known here; train.py prints its tokens and steps before it starts.
#   loss      not measured at this size; pretrain_val in the output shows what is forgotten
#
# The corpus contains MMLU and GSM8K (its own README): scores on those two say nothing afterwards.
# On a small card add --batch_size=4 --finetune_gradient_accumulation_steps=4: the same steps.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH" # made by `make`; otherwise the python of your environment

python prepare_dataset.py --hf_dataset=Nikity/Kyoto-Corpus --output_dir=data/finetune
python train.py --finetune "$@"
python inference.py --prompt="What is the capital of France?"
if [ -t 0 ]; then
    python inference.py # a chat; /help
fi
