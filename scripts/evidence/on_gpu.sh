#!/usr/bin/env bash
# All small experiments side by side on one GPU, in two calls.
#
#   OUT=out scripts/evidence/on_gpu.sh train 330      # base models, then each base alone; weights, logs and pictures into $OUT
#   OUT=out scripts/evidence/on_gpu.sh measure 240    # Neon and its controls; JSON, logs and pictures into $OUT
#
# Needs data/fashion_{train,reference,test}.npz (scripts/make_small_data.py). Work lies in $WORK (default /tmp/small).
# MPS=0 leaves out CUDA's multi-process service, which lets the small kernels of several processes run at once.
set -u
cd "$(dirname "$0")/../.."
mode="$1" seconds="$2"
work="${WORK:-/tmp/small}" out="${OUT:?name a folder for the results}"
python="${PYTHON:-python3}"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD" OMP_NUM_THREADS=1
mkdir -p "$work" "$out"

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
    JOBS="${JOBS:-edm,flow,var,xar,imm}" # the processes take turns then: no room for repeats
}

stop_mps() { [[ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ]] && echo quit | timeout 10 nvidia-cuda-mps-control; }

# The whole measurement of a family on a model of two updates: finds what does not run here while the real models train.
smoke() {
    local family="$1" autoencoder="" dir="$work/smoke"
    case "$family" in var) autoencoder=var_tokeniser ;; xar) autoencoder=xar_vae ;; esac
    mkdir -p "$dir/$family"
    if [[ -n "$autoencoder" ]]; then
        "$python" -m neon train-autoencoder "configs/small/$autoencoder.toml" --set autoencoder.train.images=256 --out "$dir/a-$family" &&
            cp "$dir/a-$family/autoencoder.safetensors" "$dir/$family/" || return 1
        set -- --set "base.autoencoder=$dir/$family/autoencoder.safetensors"
    else
        set --
    fi
    "$python" -m neon train "configs/small/$family.toml" --set data.path=data/fashion_test.npz --set train.images=512 "$@" \
        --out "$dir/m-$family" && cp "$dir/m-$family/model.safetensors" "$dir/$family/" || return 1
    "$python" scripts/evidence/measure.py "$family" --models "$dir" --folder "$dir/neon" --out "$dir/out" --seconds 60 \
        --set synth.num_images=100 --set finetune.images=512 --set finetune.snapshot_images=256 --set select.num_images=100 \
        --set report.num_images=200 --set report.num_shown=100
}

jobs_of() { # every job that has a model
    for model in "$work"/*/model.safetensors; do [[ -f "$model" ]] && basename "$(dirname "$model")"; done
}

measure() { # measure JOB SECONDS LIMIT [option ...]
    local job="$1" limit="$3"
    timeout -k 5 "$limit" "$python" scripts/evidence/measure.py "$job" --models "$work" --folder "$work/neon" --out "$work/out" \
        --seconds "$2" "${@:4}" >>"$work/logs/measure-$job.log" 2>&1 || say "$job: measuring ended with $?"
}

pack() { # pack NAME: JSON, pictures and logs
    tar -czf "$out/$1.part" -C "$work" --ignore-failed-read out logs 2>/dev/null && mv "$out/$1.part" "$out/$1.tar.gz"
}

# Of several settings of a family, the one whose base is best.
chosen_jobs() {
    "$python" - "$work/out" <<'PY'
import json, sys
from pathlib import Path
sys.path.insert(0, ".")
from scripts.evidence.jobs import JOBS
best = {}
for name, job in JOBS.items():
    file = Path(sys.argv[1]) / f"{name}.json"
    base = json.loads(file.read_text()).get("base", {}) if file.is_file() else {}
    if "best" in base:
        value = base["best"]["metrics"][next(iter(base["best"]["metrics"]))]
        key = name if job.is_repeat else job.family
        if key not in best or value < best[key][0]:
            best[key] = (value, name)
print("\n".join(name for _, name in best.values()))
PY
}

mkdir -p "$work/logs" "$work/out"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
start_mps
say "$mode begins"
if [[ "$mode" == train ]]; then
    for family in edm flow var xar imm; do
        (timeout 150 bash -c "$(declare -f smoke); work=$work python=$python; smoke $family" >"$work/logs/smoke-$family.log" 2>&1 &&
            ! grep -q FAILED "$work/logs/smoke-$family.log" && say "smoke $family: ok" ||
            { say "smoke $family: FAILED"; grep -A1 -E "FAILED|Error" "$work/logs/smoke-$family.log" | tail -8; }) &
    done
    timeout -k 5 $((seconds + 40)) "$python" scripts/evidence/train.py --folder "$work" --seconds "$seconds" --pack "$out" ${JOBS:+--jobs "$JOBS"}
    say "trained; each base alone"
    for job in $(jobs_of); do measure "$job" 60 75 --base-only & done
    wait
    pack base
else
    for job in $(chosen_jobs); do measure "$job" "$seconds" $((seconds + 60)) & done
    while [[ -n "$(jobs -r)" ]]; do sleep 5; ((SECONDS % 60 < 5)) && pack measure; done
    pack measure
fi
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
