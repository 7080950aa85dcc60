#!/usr/bin/env bash
# EDM, FFHQ-64: published FID 2.39 -> 1.12 (arXiv 2510.03597). How it is called: _row.sh
. "$(dirname "${BASH_SOURCE[0]}")/_row.sh"
fetch ffhq-64x64.npz edm-ffhq-64x64-uncond-vp.pkl Neon_EDM_FFHQ.pkl
evaluate=(edm/calculate_fid.py --ref fid_stats/ffhq-64x64.npz --seeds 0-49999 --max_batch_size 256 --num_steps 40)
published --network_pkl checkpoints/Neon_EDM_FFHQ.pkl    # 1.12
base --network_pkl checkpoints/edm-ffhq-64x64-uncond-vp.pkl    # 2.39
run configs/edm_ffhq64.toml
