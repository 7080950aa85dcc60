# What the scripts of the published rows share. Each is called as
#   scripts/reproduce/ROW.sh [number of GPUs, default 8] [published | base | run, default all]
# and sources this file, then says, as far as its row has it:
#   fetch NAME...                 the files that it reads; the FID Inception comes with them (download_models.sh)
#   evaluate=(FAMILY/calculate_fid.py FLAG...)   what its evaluations have in common
#   published FLAG...             evaluate Neon's published checkpoint
#   base FLAG...                  evaluate the base model
#   run CONFIG                    the whole loop from the base; comes last
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^[^#]/{/^#/s/^# \?//p}' "$0"
    echo "usage: $0 [number of GPUs, default 8] [published | base | run, default all]"
    exit
fi
gpus="${1:-8}" what="${2:-all}" num_done=0
if [[ ! $gpus =~ ^[1-9][0-9]*$ || ! $what =~ ^(all|published|base|run)$ ]]; then
    echo "$0: expected a number of GPUs, then published, base, run or all; got '$gpus' '$what'" >&2
    exit 1
fi

fetch() { bash download_models.sh weights-inception-2015-12-05-6726825d.pth "$@"; }

step() { # step NAME COMMAND...: run the command on all GPUs, if this step was asked for
    if [[ $what == all || $what == "$1" ]]; then
        torchrun --standalone --nproc_per_node="$gpus" "${@:2}"
        num_done=$((num_done + 1))
    fi
}

published() { step published "${evaluate[@]}" "$@"; }
base() { step base "${evaluate[@]}" "$@"; }
run() {
    step run -m neon run "$@"
    if [[ $num_done == 0 ]]; then
        echo "$0: this row has no '$what': the authors published no checkpoint of it" >&2
        exit 1
    fi
}
