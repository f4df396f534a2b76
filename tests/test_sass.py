"""What nvcc made of the CUDA kernels: registers, spills, and the width of memory accesses in the
hot loops, read from the machine code in the extension that is installed. Needs cuobjdump, of a CUDA
toolkit or of Triton's wheel."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from fusedopt import _native
from tests import sass

BUILT = _native._C.build_info()["cuda_archs"].split() if _native._C is not None else []
ARCHS = [arch for arch in ("80", "90", "100", "120") if arch in BUILT]


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    return shutil.which("cuobjdump")


pytestmark = [
    pytest.mark.skipif(not ARCHS, reason="the extension has no kernels for those GPUs"),
    pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump"),
]


class Compiled:
    """The kernels for one architecture, as they lie in the extension."""

    def __init__(self, arch: str) -> None:
        tool = cuobjdump()
        assert tool is not None
        assert _native._C is not None
        extension = _native._C.__file__
        usage = subprocess.run(
            [tool, "-arch", f"sm_{arch}", "-res-usage", extension],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        self.registers = {
            kernel: int(count)
            for kernel, count in re.findall(r"Function (\w+):\s+REG:(\d+)", usage)
        }
        self.loops = {f.name: f.vector_loops() for f in sass.functions(tool, extension, arch)}

    def of(self, word: str) -> list[Counter[str]]:
        (name,) = [n for n in self.loops if word in n]
        return self.loops[name]

    def all_loops(self) -> list[Counter[str]]:
        return [loop for loops in self.loops.values() for loop in loops]


@pytest.fixture(scope="module", params=ARCHS)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    return Compiled(request.param)


def count(loop: Counter[str], *starts: str) -> int:
    return sum(n for opcode, n in loop.items() if opcode.startswith(starts))


def updates(loops: list[Counter[str]]) -> list[Counter[str]]:
    return [loop for loop in loops if count(loop, "ST") > 0]


def test_two_blocks_of_each_kernel_run_on_a_multiprocessor(compiled: Compiled) -> None:
    assert _native._C is not None
    assert len(compiled.registers) == len(_native._C.rules()) + 1  # and clipping
    assert all(used <= 128 for used in compiled.registers.values()), compiled.registers


# Accesses of one iteration of the update loops: loads of 16 and of 8 bytes, stores of 16 and of 8.
# Where states are wider than params, the accesses to params and gradients are those of 8 bytes.
# Each combination of dtypes has a loop of kUnroll vectors of each operand, and one of one.
Accesses = tuple[int, int, int, int]


def loops_of(dtypes: int, unroll: int, *accesses: int) -> Counter[Accesses]:
    one, several = (tuple(n * count for count in accesses) for n in (1, unroll))
    return Counter({one: dtypes, several: dtypes})  # type: ignore[dict-item]


ADAMW = sum(
    (
        loops_of(8, 2, 4, 0, 3, 0),  # four dtypes with state of their own, coupled or not
        loops_of(8, 2, 5, 0, 4, 0),  # with amsgrad
        loops_of(4, 2, 2, 2, 2, 1),  # two 16-bit dtypes with float32 state
        loops_of(4, 2, 3, 2, 3, 1),
    ),
    Counter(),
)
SGD = sum(
    (
        loops_of(4, 4, 2, 0, 1, 0),  # without momentum
        loops_of(4, 2, 3, 0, 2, 0),
        loops_of(2, 2, 1, 2, 1, 1),
    ),
    Counter(),
)


@pytest.mark.parametrize(("kernel", "expected"), [("AdamW", ADAMW), ("Sgd", SGD)])
def test_every_dtype_combination_has_loops_of_vectors(
    compiled: Compiled, kernel: str, expected: Counter[Accesses]
) -> None:
    found = Counter(
        tuple(count(loop, f"{kind}.E.{bits}") for kind in ("LDG", "STG") for bits in (128, 64))
        for loop in updates(compiled.of(kernel))
    )
    assert found == expected


def test_hot_loops_access_memory_by_vectors_alone(compiled: Compiled) -> None:
    assert all(len(loops) >= 8 for loops in compiled.loops.values())  # two a dtype for the norm
    for loop in compiled.all_loops():
        assert count(loop, "LD.", "ST.") == 0, loop  # generic
        assert count(loop, "LDG") == count(loop, "LDG.E.128", "LDG.E.64"), loop
        assert count(loop, "STG") == count(loop, "STG.E.128", "STG.E.64"), loop


def test_hot_loops_do_not_spill(compiled: Compiled) -> None:
    for loop in compiled.all_loops():
        assert count(loop, "LDL", "STL") == 0, loop
