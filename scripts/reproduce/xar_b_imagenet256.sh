#!/usr/bin/env bash
# xAR-B, ImageNet-256: published FID 1.72 -> 1.31 (arXiv 2510.03597). First Neon's published checkpoint, then the base, then the whole loop.
# The two checkpoints are sampled with different guidance (--protocol); see configs/xar_b_imagenet256.toml.
#
#   scripts/reproduce/xar_b_imagenet256.sh [number of GPUs, default 8] [published | base | run, default all three]
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus="${1:-8}" what="${2:-all}"

bash download_models.sh --refs adm_in256_stats.npz kl16.ckpt xAR-B.pth Neon_xARB_imagenet256.pth

evaluate() {
    torchrun --standalone --nproc_per_node="$gpus" xar/calculate_fid.py --model xar_base --vae_path xar/pretrained/kl16.ckpt \
        --num_images 50000 --batch_size 32 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz --precision fp16 "$@"
}

if [[ $what == all || $what == published ]]; then evaluate --protocol neon --model_ckpt checkpoints/Neon_xARB_imagenet256.pth; fi   # 1.31
if [[ $what == all || $what == base ]]; then evaluate --protocol base --model_ckpt checkpoints/xAR-B.pth; fi                        # 1.72
if [[ $what == all || $what == run ]]; then
    torchrun --standalone --nproc_per_node="$gpus" -m neon run configs/xar_b_imagenet256.toml
fi
