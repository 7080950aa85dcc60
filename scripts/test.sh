#!/usr/bin/env bash
# Set up and run the quick tests (no network, no GPU, under 12 minutes on 2 cores). Arguments go to pytest: bash scripts/test.sh tests/edm
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
export OMP_NUM_THREADS=1  # two processes share the cores
exec python -m pytest -m "not slow" -n 2 --dist worksteal "$@"
