#!/usr/bin/env bash
# Set up and run the quick tests (no network, no GPU, under 12 minutes on 2 cores). Arguments go to pytest: bash scripts/test.sh tests/edm
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
exec python -m pytest -m "not slow" "$@"
