#!/usr/bin/env bash
# Fetch the published checkpoints and statistics into checkpoints/ and fid_stats/ beside this script.
#   bash download_models.sh                  the eight Neon checkpoints, their autoencoders (kl16, VQ-VAE, SD-VAE), the ADM statistics
#   bash download_models.sh --refs --bases   EDM statistics and FID Inception; the base models
#   bash download_models.sh --list           what there is;  bash download_models.sh NAME: one file
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c "import click, huggingface_hub, torch, tqdm"; then
    echo "download_models.sh: $PYTHON lacks the modules named above. Run: pip install -e . (or set PYTHON=/path/to/venv/bin/python)" >&2
    exit 1
fi
exec "$PYTHON" -m neon.cli.download "$@"
