#!/usr/bin/env bash
# EDM, FFHQ-64: published FID 2.39 -> 1.12 (arXiv 2510.03597). First Neon's published checkpoint, then the base, then the whole loop.
#
#   scripts/reproduce/edm_ffhq64.sh [number of GPUs, default 8] [published | base | run, default all three]
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus="${1:-8}" what="${2:-all}"

bash download_models.sh --refs edm-ffhq-64x64-uncond-vp.pkl Neon_EDM_FFHQ.pkl

evaluate() {
    torchrun --standalone --nproc_per_node="$gpus" edm/calculate_fid.py --ref fid_stats/ffhq-64x64.npz \
        --seeds 0-49999 --max_batch_size 256 --num_steps 40 "$@"
}

if [[ $what == all || $what == published ]]; then evaluate --network_pkl checkpoints/Neon_EDM_FFHQ.pkl; fi
if [[ $what == all || $what == base ]]; then evaluate --network_pkl checkpoints/edm-ffhq-64x64-uncond-vp.pkl; fi
if [[ $what == all || $what == run ]]; then
    torchrun --standalone --nproc_per_node="$gpus" -m neon run configs/edm_ffhq64.toml
fi
