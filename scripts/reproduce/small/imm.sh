#!/usr/bin/env bash
# IMM on Fashion-MNIST; see _family.sh.   scripts/reproduce/small/imm.sh [run | base | measure] [seconds]
. "$(dirname "${BASH_SOURCE[0]}")/_family.sh"
