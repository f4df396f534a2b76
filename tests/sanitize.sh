#!/usr/bin/env bash
# Builds the C++ core with AddressSanitizer and UndefinedBehaviorSanitizer beside the sources, and
# runs the tests that reach memory in every shape, the fuzzers among them, under it.
# Usage: tests/sanitize.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
out=build/sanitize
rm -rf "$out" && mkdir -p "$out"
FUSEDOPT_SANITIZE=address,undefined FUSEDOPT_REQUIRE_NATIVE=1 \
  "$python" setup.py -q build --build-base "$out/base" --build-lib "$out/lib"
cp -r tests "$out/lib/"
cp pyproject.toml "$out/lib/"
cd "$out/lib"
# The interpreter is not instrumented: the runtimes go in first, and its own leaks are its own.
preload=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)
run() {
  LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH=. OMP_NUM_THREADS=2 "$python" -m pytest -p no:cacheprovider -q "$@"
}
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. "$python" -c \
  'import fusedopt._native as n; assert "sanitize" in n._C.__file__, n._C.__file__'
for level in baseline avx2 avx512; do
  grep -q "${level/baseline/processor}" /proc/cpuinfo || continue
  echo "level $level"
  FUSEDOPT_CPU_LEVEL=$level run tests/test_layout.py -k 'offsets or empty or tiny or any_model'
done
run tests/test_bad_input.py tests/test_plan.py tests/test_clip_amp.py tests/test_atomic.py \
  tests/test_life_steps.py -k 'not know_no_torch and not processes'
run tests/test_tensor_access.py -k 'read_as or turned_away or versions or refused or another_name'

# The source of the CUDA kernels, on the emulated GPU.
cd ../../..
rm -rf "$out/emulated"
"$python" - "$out/emulated" <<'PYTHON'
import sys
from pathlib import Path
sys.path.insert(0, ".")
from tests.cuda_emulator.build import build
sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
build(Path(sys.argv[1]), kernel_flags=sanitizers)
PYTHON
cd "$out/emulated"
FUSEDOPT_TEST_BACKENDS=cuda FUSEDOPT_TEST_GEOMETRY=3x16 run \
  tests/test_cuda.py tests/test_layout.py -k 'cuda and not 32_bits and not thousand'
