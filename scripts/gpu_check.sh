#!/usr/bin/env bash
# Checks the CUDA path on one GPU within ten minutes, and times what docs/benchmarks.md predicts.
#
#     bash scripts/gpu_check.sh [FOLDER]
#
# Needs python3 with torch (PYTHON=... for another one), for the tests also pytest, and no network. Each step writes
# NAME.log, with its exit status at the end, and JSON lines into FOLDER (default: $OUT, or gpu_check). A step that fails
# or runs past its time does not stop the others. GPU_CHECK_DRY=1: the same commands on the CPU at tiny sizes, eager.
set -u
folder=${1:-${OUT:-gpu_check}}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
failed=0

# step NAME SECONDS COMMAND...
step() {
    local name=$1 seconds=$2 begin=$SECONDS status
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$folder/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=$((failed + 1))
    echo "exit status $status" >>"$folder/$name.log"
    echo "$name: exit status $status, $((SECONDS - begin)) s"
}

device=cuda shape=llama-2-7b context=8192 rows="1 16 128 1024" layers="4 12" column="bifurcated, compiled" collect=""
if [ -n "${GPU_CHECK_DRY:-}" ]; then
    device=cpu shape=tiny context=33 rows="1 3" layers="1 2" column="bifurcated" collect="--collect-only"
    export TORCHDYNAMO_DISABLE=1
fi
few=${layers% *} many=${layers#* }
cells() { echo "$folder/cells-$1.jsonl"; }
rm -f "$(cells "$few")" "$(cells "$many")" "$folder/gpt-fast.jsonl"

step versions 40 "$python" scripts/gpu_check.py rates --device $device
step test_cuda 70 "$python" -m pytest -q $collect tests/test_cuda.py
compgen -G "tests/test_triton*.py" >/dev/null && step test_triton 50 "$python" -m pytest -q $collect tests/test_triton*.py
step runs 70 "$python" scripts/gpu_check.py runs --device $device
step layer 60 "$python" scripts/gpu_check.py layer --device $device --shape $shape --context $context
for count in $few $many; do
    step "layers-$count" 70 "$python" scripts/benchmark.py --device $device --shape $shape --set n_layer="$count" \
        --context $context -n $rows --columns "$column" --budget 1 --out "$(cells "$count")"
done
step extrapolated 20 "$python" scripts/gpu_check.py extrapolate "$(cells "$few")" "$(cells "$many")" \
    --layers "$few" "$many" --shape $shape
step gpt-fast 140 "$python" scripts/benchmark.py --preset quantised --device $device --shape $shape --context 5 -n 1 \
    --budget 1 --out "$folder/gpt-fast.jsonl"
exit $((failed > 0))
