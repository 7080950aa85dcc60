#!/usr/bin/env bash
# EDM on Fashion-MNIST; see _family.sh.   scripts/reproduce/small/edm.sh [run | base | measure] [seconds]
. "$(dirname "${BASH_SOURCE[0]}")/_family.sh"
