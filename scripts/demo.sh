#!/usr/bin/env bash
# Set up and run the demo: Neon on a real model and real images (both shipped), in minutes, without a GPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python scripts/demo.py "$@"
