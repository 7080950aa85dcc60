#!/usr/bin/env bash
# Flow matching (TorchCFM), CIFAR-10 unconditional: published FID 3.50 -> 2.32 (arXiv 2510.03597). Neon's checkpoint of
# this row is not published. How it is called: _row.sh
. "$(dirname "${BASH_SOURCE[0]}")/_row.sh"
fetch cifar10-32x32.npz otcfm_cifar10_weights_step_400000.pt
evaluate=(flow/calculate_fid.py --num_images 50000 --batch_size 1024 --fid_stats fid_stats/cifar10-32x32.npz)
base --model_ckpt checkpoints/otcfm_cifar10_weights_step_400000.pt    # 3.50
run configs/flow_cifar10.toml
