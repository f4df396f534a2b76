#!/usr/bin/env bash
# Measures all that README.md and docs/performance.md quote for a CPU, and writes their tables and
# pictures: an hour on two quiet cores. Usage, in the root of the repository: bench/figures.sh [PYTHON]
set -euo pipefail

python=${1:-python3}
results=bench/results

bench() {
  "$python" -m bench "$@"
}

pair=(--contestant fusedopt --contestant torch-fused)
torch=("${pair[@]}" --contestant torch-foreach --contestant torch-for-loop)
sizes=(--workload 16x4096x1024 --workload 1000x64x64)
adamw=(--dtype float32 --optimizer adamw)

bench step "${sizes[@]}" --dtype float32 --dtype bfloat16 "${pair[@]}" --output $results/step-cpu.json
bench step "${sizes[@]}" --repeats 7 --output $results/step-cpu-peers.json
bench step --workload models --workload gpt2-124m "${adamw[@]}" "${torch[@]}" --contestant optimi \
  --contestant deepspeed-cpu --repeats 7 --output $results/step-cpu-models.json
bench step --workload sweep "${adamw[@]}" "${torch[@]}" --repeats 11 --output $results/step-cpu-sweep.json
# As on a CPU without AVX2 and FMA.
FUSEDOPT_CPU_LEVEL=baseline ATEN_CPU_CAPABILITY=default bench step "${sizes[@]}" --dtype float32 \
  "${pair[@]}" --repeats 7 --output $results/step-cpu-baseline.json
bench clip --repeats 11 --output $results/clip-cpu.json
bench host "${adamw[@]}" "${torch[@]}" --output $results/host-cpu.json
bench host "${adamw[@]}" --repeats 31 --output $results/host-cpu-peers.json
bench memory --optimizer adamw --output $results/memory-cpu.json
bench train --output $results/train-cpu.json
bench plot --out docs/figures
bench tables --write
