#!/usr/bin/env bash
# IMM, ImageNet-256, 8 steps: published FID 1.99 -> 1.46 (arXiv 2510.03597). How it is called: _row.sh
. "$(dirname "${BASH_SOURCE[0]}")/_row.sh"
fetch adm_in256_stats.npz diffusion_pytorch_model.safetensors imagenet256_ts_a2.pkl Neon_imm_imagenet256.pkl
evaluate=(imm/calculate_fid.py --num_images 50000 --batch_size 64 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz --steps 8)
published --model_ckpt checkpoints/Neon_imm_imagenet256.pkl    # 1.46
base --protocol base --model_ckpt checkpoints/imagenet256_ts_a2.pkl    # 1.99
run configs/imm_imagenet256_t8.toml
