#!/usr/bin/env bash
# EDM, CIFAR-10 unconditional: published FID 1.98 -> 1.38 (arXiv 2510.03597). First Neon's published checkpoint, then the base, then the whole loop.
#
#   scripts/reproduce/edm_cifar10_uncond.sh [number of GPUs, default 8] [published | base | run, default all three]
set -euo pipefail
cd "$(dirname "$0")/../.."
gpus="${1:-8}" what="${2:-all}"

bash download_models.sh --refs edm-cifar10-32x32-uncond-vp.pkl Neon_EDM_unconditional_CIFAR10.pkl

evaluate() {
    torchrun --standalone --nproc_per_node="$gpus" edm/calculate_fid.py --ref fid_stats/cifar10-32x32.npz \
        --seeds 0-49999 --max_batch_size 256 --num_steps 18 "$@"
}

if [[ $what == all || $what == published ]]; then evaluate --network_pkl checkpoints/Neon_EDM_unconditional_CIFAR10.pkl; fi
if [[ $what == all || $what == base ]]; then evaluate --network_pkl checkpoints/edm-cifar10-32x32-uncond-vp.pkl; fi
if [[ $what == all || $what == run ]]; then
    torchrun --standalone --nproc_per_node="$gpus" -m neon run configs/edm_cifar10_uncond.toml
fi
