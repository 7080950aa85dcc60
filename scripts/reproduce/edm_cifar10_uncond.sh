#!/usr/bin/env bash
# EDM, CIFAR-10 unconditional: published FID 1.98 -> 1.38 (arXiv 2510.03597). How it is called: _row.sh
. "$(dirname "${BASH_SOURCE[0]}")/_row.sh"
fetch cifar10-32x32.npz edm-cifar10-32x32-uncond-vp.pkl Neon_EDM_unconditional_CIFAR10.pkl
evaluate=(edm/calculate_fid.py --ref fid_stats/cifar10-32x32.npz --seeds 0-49999 --max_batch_size 256 --num_steps 18)
published --network_pkl checkpoints/Neon_EDM_unconditional_CIFAR10.pkl    # 1.38
base --network_pkl checkpoints/edm-cifar10-32x32-uncond-vp.pkl    # 1.98
run configs/edm_cifar10_uncond.toml
