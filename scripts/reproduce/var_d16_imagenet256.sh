#!/usr/bin/env bash
# VAR-d16, ImageNet-256: published FID 3.30 -> 2.01. First Neon's published checkpoint, then the whole loop from the base.
#
#   scripts/reproduce/var_d16_imagenet256.sh [number of GPUs, default 8] [published | base | run, default all three]
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus="${1:-8}" what="${2:-all}"

bash download_models.sh --refs adm_in256_stats.npz vae_ch160v4096z32.pth var_d16.pth Neon_VARd16_imagenet256.pth

evaluate() {
    torchrun --standalone --nproc_per_node="$gpus" var/calculate_fid.py --num_images 50000 --batch_size 64 --img_size 256 \
        --fid_stats fid_stats/adm_in256_stats.npz --precision fp16 "$@"
}

if [[ $what == all || $what == published ]]; then evaluate --var_ckpt checkpoints/Neon_VARd16_imagenet256.pth; fi   # 2.01
if [[ $what == all || $what == base ]]; then evaluate --var_ckpt checkpoints/var_d16.pth --protocol base; fi        # 3.30
if [[ $what == all || $what == run ]]; then
    torchrun --standalone --nproc_per_node="$gpus" -m neon run configs/var_d16_imagenet256.toml
fi
