#!/usr/bin/env bash
# What needs a CUDA GPU, in one command: the tests marked gpu and the rows that SPEED.md has from one.
#
#     bash tests/benchmarks/gpu.sh results/gpu                  all steps, about 15 minutes on an H100
#     bash tests/benchmarks/gpu.sh results/gpu tests step_128   some of them
#
# Each step leaves OUT/STEP.jsonl (a line of JSON a case; of the tests, pytest's report) and OUT/STEP.log (the rest). One that
# fails or takes more than 10 minutes is named at the end, and the others go on. Of two GPUs or more, the tests use two (NCCL).
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bash tests/benchmarks/gpu.sh OUT [STEP ...]" >&2; exit 2; }
out=$(realpath -m -- "$1")
shift
cd "$(dirname "$0")/../.."
declare -A steps=(
    [tests]="-m pytest -n 0 -rs -m gpu tests/test_gpu.py tests/test_train.py tests/test_processes.py"
    [step_128]="bench_train.py --cases plain fast --steps 30 --rounds 3 --beside --parts --profile fast"
    [step_1024]="bench_train.py --cases plain fast --steps 15 --rounds 3 --parts --profile fast --batch_size 1024"
    [variants_1024]="bench_train.py --cases fast own_limits no_fused_flow no_fused_lpips --steps 15 --rounds 3 --batch_size 1024"
    [fid]="bench_fid.py --images 25000 --rounds 1 --batch_size 500 --device cuda"
    [fid_variants]="bench_fid.py --images 5000 --rounds 2 --batch_size 500 --device cuda --variants"
    [precision_recall]="bench_pr.py --n 50000 --m 50000 --dims 2048 --device cuda --runs 2"
    [export]="bench_export.py --device cuda --images 10000 --threads 8 --repeat 2"
    [scaling]="bench_scaling.py --rounds 3 --device cuda"
)
order=(tests step_128 step_1024 fid fid_variants precision_recall export scaling variants_1024)
[ $# -eq 0 ] || order=("$@")
for step in "${order[@]}"; do
    [ -n "${steps[$step]:-}" ] || { echo "no step $step; there are: ${!steps[*]}" >&2; exit 2; }
done
mkdir -p "$out" || exit 2
failed=()
for step in "${order[@]}"; do
    read -ra command <<< "${steps[$step]}"
    [ "${command[0]}" = -m ] || command[0]="tests/benchmarks/${command[0]}"
    [ "$step" != scaling ] || command+=(--plot "$out/scaling.png")
    SECONDS=0
    timeout -k 10 600 python "${command[@]}" > "$out/$step.jsonl" 2> "$out/$step.log"
    code=$?
    echo "$step: ${SECONDS} s, exit code $code: python ${command[*]}"
    [ $code -eq 0 ] || { failed+=("$step"); tail -q -n 3 "$out/$step.jsonl" "$out/$step.log"; }
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
