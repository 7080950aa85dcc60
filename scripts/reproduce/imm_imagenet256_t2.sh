#!/usr/bin/env bash
# IMM, ImageNet-256, 2 steps: published FID 2.88 (base: 3.99 in arXiv 2503.07565). No checkpoint of this row is published: the whole loop.
#
#   scripts/reproduce/imm_imagenet256_t2.sh [number of GPUs, default 8] [base | run, default both]
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus="${1:-8}" what="${2:-all}"

bash download_models.sh --refs adm_in256_stats.npz diffusion_pytorch_model.safetensors imagenet256_ts_a2.pkl

if [[ $what == all || $what == base ]]; then
    torchrun --standalone --nproc_per_node="$gpus" imm/calculate_fid.py --num_images 50000 --batch_size 64 --img_size 256 \
        --fid_stats fid_stats/adm_in256_stats.npz --steps 2 --protocol base --model_ckpt checkpoints/imagenet256_ts_a2.pkl
fi
if [[ $what == all || $what == run ]]; then
    torchrun --standalone --nproc_per_node="$gpus" -m neon run configs/imm_imagenet256_t2.toml
fi
