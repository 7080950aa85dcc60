# Sourced by FAMILY.sh beside it: data, base and Neon of one small experiment.
#
#   scripts/reproduce/small/FAMILY.sh [run | base | measure, default run] [seconds for base or measure]
#
# run      the whole loop (configs/small/FAMILY.toml) from the shipped base
# base     a new base (and autoencoder) in runs/small, its length such that it ends in time; default 6 hours
# measure  Neon with every control, from the shipped base; resumes; writes results/small/FAMILY.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
family="$(basename "$0" .sh)" what="${1:-run}" seconds="${2:-21600}"
case "$what" in
    run | base | measure) ;;
    -h | --help) sed -n 's/^# \{0,1\}//p' scripts/reproduce/small/_family.sh; exit ;;
    *) echo "usage: $0 [run | base | measure] [seconds]" >&2; exit 2 ;;
esac
[[ -f data/fashion_train.npz ]] || python scripts/make_small_data.py
case "$what" in
    run) python -m neon run "configs/small/$family.toml" --out "runs/small-$family" ;;
    base) python scripts/evidence/train.py --jobs "$family" --folder runs/small --seconds "$seconds" ;;
    measure) python scripts/evidence/measure.py "$family" --seconds "$seconds" ;;
esac
