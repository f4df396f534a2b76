"""A gate that does not depend on the machine's speed: instructions for each element of the CPU
kernels, counted by callgrind at the AVX2 level (valgrind knows no AVX-512)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Rule, dtype, clip: what g++ 12 needs for an element, and half of an instruction a vector of 8.
LIMITS = {
    ("adamw", "float32", 0): 2.45,
    ("adamw", "float32", 1): 5.89,
    ("adamw", "bfloat16", 0): 5.83,
    ("adamw", "bfloat16", 1): 9.3,
    ("sgd", "float32", 0): 2.08,
    ("sgd", "float32", 1): 5.52,
}


def compiler_version() -> str | None:
    """The major version of g++."""
    if shutil.which("g++") is None:
        return None
    done = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True)
    return done.stdout.strip().split(".")[0]


pytestmark = [
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed"),
    pytest.mark.skipif(compiler_version() != "12", reason="the limits are those of g++ 12"),
    pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text(), reason="needs AVX2"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels with setup.py's flags, and one step on one tensor."""
    folder = tmp_path_factory.mktemp("instructions")
    flags = ["-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-fno-trapping-math", "-fno-unswitch-loops", "-w", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]

    def compile_one(source: Path) -> str:
        other = source.name in ("level_baseline.cpp", "level_avx512.cpp")  # linked, not run
        target = folder / f"{source.stem}.o"
        command = ["g++", *flags, "-O0" if other else "-O3", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    sources = [ROOT / "bench/instructions.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    path = folder / "instructions"
    subprocess.run(["g++", "-fopenmp", *objects, "-o", str(path)], check=True)
    return path


def instructions(program: Path, rule: str, dtype: str, numel: int, clip: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    command += ["--toggle-collect=fusedopt::cpu::apply*", str(program)]
    done = subprocess.run(
        [*command, rule, dtype, str(numel), str(clip)],
        env={**os.environ, "FUSEDOPT_CPU_LEVEL": "avx2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    collected = re.search(r"Collected : (\d+)", done.stderr)
    assert collected, done.stderr
    return int(collected[1])


@pytest.mark.parametrize(("rule", "dtype", "clip"), LIMITS)
def test_instructions_for_each_element(program: Path, rule: str, dtype: str, clip: int) -> None:
    small, large = 1 << 16, 1 << 18
    counts = [instructions(program, rule, dtype, numel, clip) for numel in (small, large)]
    per_element = (counts[1] - counts[0]) / (large - small)
    assert per_element <= LIMITS[rule, dtype, clip]
