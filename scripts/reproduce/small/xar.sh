#!/usr/bin/env bash
# xAR on Fashion-MNIST; see _family.sh.   scripts/reproduce/small/xar.sh [run | base | measure] [seconds]
. "$(dirname "${BASH_SOURCE[0]}")/_family.sh"
