#!/usr/bin/env bash
# Flow matching (TorchCFM), CIFAR-10 unconditional: published FID 3.50 -> 2.32 (arXiv 2510.03597). The base, then the whole loop;
# Neon's own checkpoint of this row is not published.
#
#   scripts/reproduce/flow_cifar10.sh [number of GPUs, default 8] [base | run, default both]
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus="${1:-8}" what="${2:-all}"
base=otcfm_cifar10_weights_step_400000.pt

bash download_models.sh cifar10-32x32.npz weights-inception-2015-12-05-6726825d.pth "$base"

if [[ $what == all || $what == base ]]; then                                                    # 3.50
    torchrun --standalone --nproc_per_node="$gpus" flow/calculate_fid.py --model_ckpt "checkpoints/$base" \
        --num_images 50000 --batch_size 1024 --fid_stats fid_stats/cifar10-32x32.npz
fi
if [[ $what == all || $what == run ]]; then
    torchrun --standalone --nproc_per_node="$gpus" -m neon run configs/flow_cifar10.toml
fi
