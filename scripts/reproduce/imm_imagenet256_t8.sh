#!/usr/bin/env bash
# IMM, ImageNet-256, 8 steps: published FID 1.99 -> 1.46. First Neon's published checkpoint, then the whole loop from the base.
#
#   scripts/reproduce/imm_imagenet256_t8.sh [number of GPUs, default 8] [published | base | run, default all three]
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus="${1:-8}" what="${2:-all}"

bash download_models.sh --refs adm_in256_stats.npz diffusion_pytorch_model.safetensors imagenet256_ts_a2.pkl Neon_imm_imagenet256.pkl

evaluate() {
    torchrun --standalone --nproc_per_node="$gpus" imm/calculate_fid.py --num_images 50000 --batch_size 64 --img_size 256 \
        --fid_stats fid_stats/adm_in256_stats.npz --steps 8 "$@"
}

if [[ $what == all || $what == published ]]; then evaluate --model_ckpt checkpoints/Neon_imm_imagenet256.pkl; fi          # 1.46
if [[ $what == all || $what == base ]]; then evaluate --model_ckpt checkpoints/imagenet256_ts_a2.pkl --protocol base; fi   # 1.99
if [[ $what == all || $what == run ]]; then
    torchrun --standalone --nproc_per_node="$gpus" -m neon run configs/imm_imagenet256_t8.toml
fi
