#!/usr/bin/env bash
# IMM, ImageNet-256, 2 steps: published FID 2.88 (base: 3.99 in arXiv 2503.07565). Neon's checkpoint of this row is not published.
# How it is called: _row.sh
. "$(dirname "${BASH_SOURCE[0]}")/_row.sh"
fetch adm_in256_stats.npz diffusion_pytorch_model.safetensors imagenet256_ts_a2.pkl
evaluate=(imm/calculate_fid.py --num_images 50000 --batch_size 64 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz --steps 2)
base --protocol base --model_ckpt checkpoints/imagenet256_ts_a2.pkl
run configs/imm_imagenet256_t2.toml
