#!/usr/bin/env bash
# VAR-d16, ImageNet-256: published FID 3.30 -> 2.01 (arXiv 2510.03597). How it is called: _row.sh
. "$(dirname "${BASH_SOURCE[0]}")/_row.sh"
fetch adm_in256_stats.npz vae_ch160v4096z32.pth var_d16.pth Neon_VARd16_imagenet256.pth
evaluate=(var/calculate_fid.py --num_images 50000 --batch_size 64 --img_size 256 --fid_stats fid_stats/adm_in256_stats.npz
    --precision fp16)
published --var_ckpt checkpoints/Neon_VARd16_imagenet256.pth    # 2.01
base --protocol base --var_ckpt checkpoints/var_d16.pth    # 3.30
run configs/var_d16_imagenet256.toml
