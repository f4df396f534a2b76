#!/usr/bin/env bash
# The core tests with another version of torch, in an environment of its own: several GB where that
# build of torch brings CUDA. Writes runs/torch-VERSION: report.txt (python -m fusedopt), tests.txt,
# host.json (a step of 300 tiny tensors beside torch's fused one) and summary.txt, a line for
# docs/versions.md.
# Usage: tests/torch_version.sh VERSION [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
version=$1
out=$PWD/runs/torch-$version
venv=$PWD/.venv-torch-$version
python=$venv/bin/python
test -x "$python" || "${2:-python3}" -m venv "$venv"
rm -rf "$out" && mkdir -p "$out/lib"
# The other packages are those of CI; triton comes with torch.
grep -v -E '^(torch|triton)==' constraints.txt >"$out/constraints.txt"
"$python" -m pip install -q "torch==$version" -c "$out/constraints.txt"
"$python" -m pip install -q -c "$out/constraints.txt" \
  expecttest hypothesis matplotlib ninja numpy pybind11 pytest pytest-xdist rich setuptools typer wheel

FUSEDOPT_CUDA_ARCHS=${FUSEDOPT_CUDA_ARCHS:-none} FUSEDOPT_REQUIRE_NATIVE=1 \
  "$python" setup.py -q build --build-base "$out/base" --build-lib "$out/lib"
cp -r bench csrc examples tests pyproject.toml setup.py setup_cuda.py "$out/lib/"
cd "$out/lib"
export PYTHONPATH=$PWD
"$python" -m fusedopt | tee "$out/report.txt"
grep -q '^tensor_access *direct$' "$out/report.txt"

core=(atomic backward bad_input checkpoint_copies checkpoint_foreign checkpoint_load
  checkpoint_refused checkpoint_resume checkpoint_torch checkpoint_values clip_amp compile convert
  distributed distributed_backward distributed_checkpoint distributed_shards fake fuse
  fuse_behaviour layout life_gradients life_groups life_hooks life_schedulers life_steps
  life_storage numerics optim_db options plan tensor_access threads)
core=("${core[@]/#/tests/test_}")
OMP_WAIT_POLICY=passive "$python" -m pytest -q -rs -p no:cacheprovider -n 2 --dist loadfile \
  "${core[@]/%/.py}" 2>&1 | tee "$out/tests.txt" | tail -n 40

"$python" -m bench host --workload 300-tiny-1-groups --variant steady --dtype float32 \
  --optimizer adamw --contestant fusedopt --contestant torch-fused --output "$out/host.json"
"$python" - "$out" <<'PYTHON' | tee "$out/summary.txt"
import json, sys
from pathlib import Path

from fusedopt import _native
from fusedopt.__main__ import versions

out = Path(sys.argv[1])
run = json.loads((out / "host.json").read_text())
reader = _native._C.build_info()["tensor_reader"]
passed = (out / "tests.txt").read_text().splitlines()[-1].strip("= ")
cells = [run["versions"]["torch"], versions()["triton"] or "-", f"direct, {reader}", passed]
for clip in (False, True):
    rows = {r["contestant"]: r for r in run["rows"] if r["clip"] is clip}
    ours, theirs = (rows[name]["median_s"] * 1e6 for name in ("fusedopt", "torch-fused"))
    ratio = rows["fusedopt"]["ratio_vs_torch_fused"]
    cells.append(f"{ours:.0f} us, {theirs:,.0f} us, {ratio:.1f}")
print("| " + " | ".join(cells) + " |")
PYTHON
