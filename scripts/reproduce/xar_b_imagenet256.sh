#!/usr/bin/env bash
# xAR-B, ImageNet-256: published FID 1.72 -> 1.31 (arXiv 2510.03597). How it is called: _row.sh
# The two checkpoints are sampled with different guidance (--protocol); see configs/xar_b_imagenet256.toml.
. "$(dirname "${BASH_SOURCE[0]}")/_row.sh"
fetch adm_in256_stats.npz kl16.ckpt xAR-B.pth Neon_xARB_imagenet256.pth
evaluate=(xar/calculate_fid.py --model xar_base --vae_path xar/pretrained/kl16.ckpt --num_images 50000 --batch_size 32 --img_size 256
    --fid_stats fid_stats/adm_in256_stats.npz --precision fp16)
published --protocol neon --model_ckpt checkpoints/Neon_xARB_imagenet256.pth    # 1.31
base --protocol base --model_ckpt checkpoints/xAR-B.pth    # 1.72
run configs/xar_b_imagenet256.toml
