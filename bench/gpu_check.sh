#!/usr/bin/env bash
# Builds fusedopt, and tests, sanitizes and measures it on a machine with an NVIDIA GPU. It needs
# nvcc and a Python with torch, pybind11 and pytest, and downloads nothing.
# Usage, in the root of the repository: [PYTHON=python3] bench/gpu_check.sh OUT_DIR
# FUSEDOPT_COMMIT tells a copy without .git which commit the benchmark's results name.
#
# Each part has a time limit and a log OUT_DIR/NN-name.log, and stops no other part. Tests and
# sanitizers run side by side, the benchmark alone. A line for each part goes to
# OUT_DIR/summary.txt as it ends: PASS, FAIL or SKIP, seconds, name. The exit code is 1 where a part
# failed. All parts together end within 8 minutes.
set -u
out=${1:?usage: bench/gpu_check.sh OUT_DIR}
python=${PYTHON:-python3}
mkdir -p "$out"
summary=$out/summary.txt
: >"$summary"
deadline=$((SECONDS + 470))
number=0

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# A part that is stopped has printed what it did; nothing is left in the repository.
pytest=("$python" -m pytest -p no:cacheprovider -q)

note() { # PASS|FAIL|SKIP, seconds, name
  echo "$1 $2 $3" | tee -a "$summary"
}

part() { # name, limit in seconds, command...
  number=$((number + 1))
  run_part "$(printf '%s/%02d-%s.log' "$out" "$number" "$1")" "$@"
}

part_beside() { # the same, beside those that follow, until `wait`
  number=$((number + 1))
  run_part "$(printf '%s/%02d-%s.log' "$out" "$number" "$1")" "$@" &
}

run_part() { # log, name, limit in seconds, command...
  local log=$1 name=$2 limit=$3 begin=$SECONDS
  shift 3
  if ((limit > deadline - begin)); then limit=$((deadline - begin)); fi
  if ((limit <= 0)); then
    note FAIL 0 "$name: no time was left"
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 </dev/null
  local status=$?
  if ((status == 0)); then
    note PASS $((SECONDS - begin)) "$name"
  elif ((status == 124 || status == 137)); then
    note FAIL $((SECONDS - begin)) "$name: stopped after $limit seconds"
  else
    note FAIL $((SECONDS - begin)) "$name: exit code $status"
  fi
}

has_module() { timeout 20 "$python" -c "import $1" >/dev/null 2>&1; }

sanitize() { # tool of compute-sanitizer
  if ! command -v compute-sanitizer >/dev/null; then
    note SKIP 0 "$1: compute-sanitizer is missing"
    return
  fi
  # Without torch's caching allocator each tensor has bounds of its own. API errors are those of
  # torch, which asks for optional functions of the driver; those of fusedopt are exceptions.
  part_beside "$1" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" \
    --error-exitcode 1 --report-api-errors no "$python" tests/gpu_sanitize.py
}

part device 60 "$python" -c '
import platform, torch
assert torch.cuda.is_available(), "torch finds no CUDA device"
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
print("torch", torch.__version__, "CUDA", torch.version.cuda, "Python", platform.python_version())'

# --force: an extension that was built without CUDA before counts as up to date.
part build 150 env FUSEDOPT_REQUIRE_CUDA=1 FUSEDOPT_REQUIRE_NATIVE=1 \
  "$python" setup.py build_ext --inplace --force

# fusedopt.triton_kernels lies in a folder of another name, which only an install maps.
part install 60 "$python" -m pip install --no-build-isolation --no-deps --no-index -e .

part fusedopt 60 "$python" -m fusedopt

workers=()
has_module xdist && workers=(-n 6)
gpu_tests=(tests/test_gpu.py)
for file in tests/test_gpu_*.py; do
  [[ $file == tests/test_gpu_check.py ]] || gpu_tests+=("$file")
done
# Triton compiles a kernel for each kind of row, and measures its configurations once.
part_beside gpu-tests 200 env OMP_NUM_THREADS=1 "${pytest[@]}" -rs "${gpu_tests[@]}" \
  ${workers[@]+"${workers[@]}"}

sanitize memcheck
sanitize racecheck

# Files that take long, and those that say nothing about this machine. The others that need a
# module that is not here are skipped one by one.
ignored=("${gpu_tests[@]/#/--ignore=}")
for name in cuda_emulator package wheel train_gpt bench bench_measure bench_quiet gpu_check triton \
  triton_launch triton_tune triton_float64; do
  ignored+=("--ignore=tests/test_$name.py")
done
for module in hypothesis expecttest; do
  has_module "$module" && continue
  for file in $(grep -lE "^(from|import) $module|importorskip\(\"$module\"" tests/test_*.py); do
    ignored+=("--ignore=$file")
    note SKIP 0 "$file: $module is missing"
  done
done
part_beside tests 200 env OMP_NUM_THREADS=1 "${pytest[@]}" tests -m "not slow and not timing" \
  "${ignored[@]}" ${workers[@]+"${workers[@]}"}
wait

if has_module typer && has_module rich && has_module matplotlib; then
  part benchmark 150 "$python" -m bench gpu --repeats 5 --contestant fusedopt \
    --contestant fusedopt-triton --contestant torch-fused --contestant torch-foreach \
    --output "$out/step-gpu.json"
else
  note SKIP 0 "benchmark: typer, rich or matplotlib is missing"
fi

! grep -q '^FAIL' "$summary"
