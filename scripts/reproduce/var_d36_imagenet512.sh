#!/usr/bin/env bash
# VAR-d36, ImageNet-512: published FID 2.63 -> 1.70 (arXiv 2510.03597). How it is called: _row.sh
. "$(dirname "${BASH_SOURCE[0]}")/_row.sh"
fetch adm_in512_stats.npz vae_ch160v4096z32.pth var_d36.pth Neon_VARd36_imagenet512.pth
evaluate=(var/calculate_fid.py --num_images 50000 --batch_size 32 --img_size 512 --fid_stats fid_stats/adm_in512_stats.npz
    --precision fp16)
published --var_ckpt checkpoints/Neon_VARd36_imagenet512.pth    # 1.70
base --protocol base --var_ckpt checkpoints/var_d36.pth    # 2.63
run configs/var_d36_imagenet512.toml
