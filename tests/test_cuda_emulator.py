"""The source of the CUDA kernels, run on an emulated GPU: the parity cases of every other driver.

tests/cuda_emulator compiles csrc/cuda for the host; the cases run in a process of their own, in
which the backend "cuda" takes CPU tensors.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda_emulator.build import build
from tests.separate import passed, run_tests

CHECK = 'assert native._C.build_info()["cuda_archs"] == "emulated", native._C.__file__'


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulated"))


def run(
    site: Path, geometry: str, *arguments: str, measured: bool = False, **environment: str
) -> str:
    """Runs tests over the backend "cuda" with a grid of blocks x threads; returns the output."""
    return run_tests(
        site,
        *arguments,
        check=CHECK,
        measured=measured,
        FUSEDOPT_TEST_BACKENDS="cuda",
        FUSEDOPT_TEST_GEOMETRY=geometry,
        **environment,
    )


def test_all_parity_cases(emulated: Path) -> None:
    files = ["tests/test_numerics.py", "tests/test_layout.py", "tests/test_clip_amp.py"]
    cases = "not 32_bits and not instruction_set and not peak_memory"  # too large; the CPU's alone
    assert passed(run(emulated, "3x32", *files, "-k", cases)) > 200


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


def test_repeated_steps(emulated: Path) -> None:
    assert passed(run(emulated, "2x16", "tests/test_repeated_step.py", measured=True)) > 35


def test_two_devices(emulated: Path) -> None:
    output = run(
        emulated, "2x8", "tests/test_cuda_devices.py", measured=True, FUSEDOPT_EMULATED_GPUS="2"
    )
    assert passed(output) > 35
