#!/usr/bin/env bash
# Flow matching on Fashion-MNIST; see _family.sh.   scripts/reproduce/small/flow.sh [run | base | measure] [seconds]
. "$(dirname "${BASH_SOURCE[0]}")/_family.sh"
