"""The source of the CUDA kernels, run on an emulated GPU: the parity cases of every other driver.

tests/cuda_emulator compiles csrc/cuda for the host; the cases run in a process of their own, in
which the backend "cuda" takes CPU tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import coverage
import pytest

from tests.cuda_emulator.build import build

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys, pytest
import fusedopt._native as native
assert native._C.build_info()["cuda_archs"] == "emulated", native._C.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulated"))


def run(site: Path, geometry: str, *arguments: str, measured: bool = False) -> str:
    """Runs tests over the backend "cuda" with a grid of blocks x threads; returns the output.
    With `measured`, the lines that they run count as covered by this process's tests."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "FUSEDOPT_TEST_BACKENDS": "cuda",
        "FUSEDOPT_TEST_GEOMETRY": geometry,
    }
    script = site / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable]
    if measured and coverage.Coverage.current() is not None:
        command += ["-m", "coverage", "run", "--parallel-mode", "--source=fusedopt"]
        command.append(f"--data-file={ROOT / '.coverage'}")
    command += [str(script), "-q", "-p", "no:cacheprovider", "-p", "no:cov"]
    done = subprocess.run(
        [*command, *arguments], cwd=site, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def passed(output: str) -> int:
    """How many tests passed, by pytest's last line."""
    return int(output.rpartition(" passed")[0].split()[-1])


def test_all_parity_cases(emulated: Path) -> None:
    files = ["tests/test_numerics.py", "tests/test_layout.py", "tests/test_clip_amp.py"]
    assert passed(run(emulated, "3x32", *files, "-k", "not 32_bits")) > 200


def test_life_and_checkpoints(emulated: Path) -> None:
    files = [str(p) for p in sorted((emulated / "tests").glob("test_life_*.py"))]
    files += [str(p) for p in sorted((emulated / "tests").glob("test_checkpoint_*.py"))]
    files.append("tests/test_fuse.py")
    assert passed(run(emulated, "2x16", *files, measured=True)) > 200


@pytest.mark.parametrize("geometry", ["1x1", "1x256", "4x64", "2x2"])
def test_grids_of_other_sizes(emulated: Path, geometry: str) -> None:
    cases = "cuda and (offsets or tiny or oracle) and not 10000 and not float64"
    files = ["tests/test_layout.py", "tests/test_clip_amp.py"]
    assert passed(run(emulated, geometry, *files, "-k", cases)) > 20


def test_the_driver(emulated: Path) -> None:
    assert passed(run(emulated, "4x32", "tests/test_cuda.py", measured=True)) > 50
