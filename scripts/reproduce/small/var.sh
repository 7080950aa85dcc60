#!/usr/bin/env bash
# VAR on Fashion-MNIST; see _family.sh.   scripts/reproduce/small/var.sh [run | base | measure] [seconds]
. "$(dirname "${BASH_SOURCE[0]}")/_family.sh"
