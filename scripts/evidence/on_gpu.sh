#!/usr/bin/env bash
# All small experiments side by side on one GPU, in one call: bases are trained, and every base is measured as soon as it is there.
#
#   OUT=out GIVEN=runs/given scripts/evidence/on_gpu.sh 185 390
#
# 185: seconds for training; 390: for everything. GIVEN: JOB/model.safetensors, JOB/autoencoder.safetensors and out/JOB.json that are
# there already: such models are not trained, such measurements not repeated. JOBS: which jobs (scripts/evidence/jobs.py).
# Needs data/fashion_{train,reference,test}.npz (scripts/make_small_data.py). Work lies in $WORK (default /tmp/small).
# MPS=0 leaves out CUDA's multi-process service, which lets the small kernels of several processes run at once.
set -u
cd "$(dirname "$0")/../.."
train_s="$1" total_s="$2"
work="${WORK:-/tmp/small}" out="${OUT:?name a folder for the results}"
jobs="${JOBS:-edm imm flow var xar edm-again}" # repeats come last
python="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD" OMP_NUM_THREADS=1
mkdir -p "$work/logs" "$work/out" "$out"
[[ -n "${GIVEN:-}" ]] && cp -r "$GIVEN/." "$work/" && chmod -R u+w "$work"

say() { echo "[$SECONDS s] $*"; }

start_mps() {
    export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps-log
    mkdir -p /tmp/mps /tmp/mps-log
    if [[ "${MPS:-1}" == 1 ]] && command -v nvidia-cuda-mps-control >/dev/null && timeout 10 nvidia-cuda-mps-control -d &&
        timeout 40 "$python" -c 'import torch; print("MPS works:", torch.ones(8, device="cuda").sum().item() == 8)'; then
        return
    fi
    say "no MPS"
    command -v nvidia-cuda-mps-control >/dev/null && echo quit | timeout 10 nvidia-cuda-mps-control
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

stop_mps() { [[ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ]] && echo quit | timeout 10 nvidia-cuda-mps-control; }

is_there() { [[ -f "$work/$1/model.safetensors" ]]; }

# measure JOB: begins nothing new in the last 20 seconds; what is under way when they end is lost.
measure() {
    local left=$((total_s - SECONDS))
    timeout -k 3 "$left" "$python" scripts/evidence/measure.py "$1" --models "$work" --folder "$work/neon" --out "$work/out" \
        --seconds $((left - 20)) >>"$work/logs/measure-$1.log" 2>&1 || say "$1: measuring ended with $?"
}

# Until the others are trained, the models that are there already get a part of the GPU.
early() {
    CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="${EARLY_PERCENT:-40}" measure "$1"
}

train_and_measure() {
    "$python" scripts/evidence/train.py --jobs "$1" --folder "$work" --seconds $((train_s - SECONDS)) || say "$1: training ended with $?"
    is_there "$1" && measure "$1"
}

repeat() { # a repeat waits for the end of training
    while ((SECONDS < train_s)); do sleep 1; done
    measure "$1"
}

pack() { # pack NAME FOLDER ... : into $out, whole or not at all
    (cd "$work" && tar -czf "$out/$1.part" --ignore-failed-read "${@:2}" 2>/dev/null)
    mv "$out/$1.part" "$out/$1.tar.gz"
}

command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
start_mps
say "begins: $jobs"
for job in $jobs; do
    if ! is_there "$job"; then
        train_and_measure "$job" &
    elif [[ "$job" == *-again ]]; then
        repeat "$job" &
    else
        early "$job" &
    fi
done
while [[ -n "$(jobs -r)" ]] && ((SECONDS < total_s + 5)); do
    sleep 5
    ((SECONDS % 60 < 5)) && pack results out logs
done
(cd "$work" && pack models $(ls -d */model.safetensors train-*.json runs/*/log.jsonl 2>/dev/null))
pack results out logs $(cd "$work" && ls -d neon/*/*/*.jsonl 2>/dev/null)
"$python" - "$work/out" <<'PY'
import json, sys
from pathlib import Path
for file in sorted(Path(sys.argv[1]).glob("*.json")):
    found = json.loads(file.read_text())
    base = found.get("base", {})
    print(file.stem, "| base:", {k: base.get("best", {}).get(k) for k in ("sampler", "cfg_scale", "metrics")}, "recognised", base.get("recognised"))
    main = found.get("main", {})
    if "rows" in main:
        print("   main:", {n: round(r["metrics"][main["metric"]], 2) for n, r in main["rows"].items()}, "w", main["w"], "cfg", main["cfg_scale"])
    for name, part in found.items():
        if isinstance(part, dict) and "error" in part:
            print("   FAILED", name, part["error"])
    print("   not measured:", found.get("not_measured"))
PY
stop_mps
ls -la "$out"
say "done"
