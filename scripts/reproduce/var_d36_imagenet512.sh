#!/usr/bin/env bash
# VAR-d36, ImageNet-512: published FID 2.63 -> 1.70. First Neon's published checkpoint, then the whole loop from the base.
#
#   scripts/reproduce/var_d36_imagenet512.sh [number of GPUs, default 8] [published | base | run, default all three]
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus="${1:-8}" what="${2:-all}"

bash download_models.sh --refs adm_in512_stats.npz vae_ch160v4096z32.pth var_d36.pth Neon_VARd36_imagenet512.pth

evaluate() {
    torchrun --standalone --nproc_per_node="$gpus" var/calculate_fid.py --num_images 50000 --batch_size 32 --img_size 512 \
        --fid_stats fid_stats/adm_in512_stats.npz --precision fp16 "$@"
}

if [[ $what == all || $what == published ]]; then evaluate --var_ckpt checkpoints/Neon_VARd36_imagenet512.pth; fi   # 1.70
if [[ $what == all || $what == base ]]; then evaluate --var_ckpt checkpoints/var_d36.pth --protocol base; fi        # 2.63
if [[ $what == all || $what == run ]]; then
    torchrun --standalone --nproc_per_node="$gpus" -m neon run configs/var_d36_imagenet512.toml
fi
