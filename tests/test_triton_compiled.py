"""What Triton makes of its kernels for NVIDIA GPUs, compiled without one: the width of memory
accesses in the loops over full blocks, registers, local memory, and the rounding of the maths."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import sass, triton_compile
from tests.test_sass import cuobjdump
from tests.triton_compile import BF16, F16, F32, F64, STRIDED, kind

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or cuobjdump() is None, reason="needs triton"
)
ARCHS = [80, 90, 100]
ELEMENTS = 8  # of a thread

# name: (rule, kind)
KERNELS = {
    "adamw-float32": ("adamw", kind(0, F32, F32, F32, F32)),
    "adamw-bfloat16": ("adamw", kind(0, BF16, BF16, BF16, BF16)),
    "adamw-mixed": ("adamw", kind(0, BF16, BF16, F32, F32)),
    "adamw-amsgrad-float16": ("adamw", kind(1, F16, F16, F16, F16, F16)),
    "adam-l2-amsgrad-float32": ("adamw", kind(3, F32, F32, F32, F32, F32)),
    "sgd-float32": ("sgd", kind(0, F32, F32)),
    "sgd-momentum-float32": ("sgd", kind(1, F32, F32, F32)),
    "sgd-momentum-bfloat16": ("sgd", kind(1, BF16, BF16, BF16)),
}
# Those that do not keep to 128 registers.
SPILLING = {
    "adamw-float64": ("adamw", kind(0, F64, F64, F64, F64)),
    "adamw-float64-grad": ("adamw", kind(0, F32, F64, F32, F32)),
    "adam-l2-amsgrad-float64": ("adamw", kind(3, F64, F64, F64, F64, F64)),
    "adamw-strided": ("adamw", kind(0, F32, F32, F32, F32) | STRIDED),
}
# All of them for Hopper, the usual ones for the others.
COMPILED = [(name, 90) for name in KERNELS] + [
    (name, arch)
    for arch in (80, 100)
    for name in ("adamw-float32", "adamw-mixed", "adamw-bfloat16")
]
BYTES = (4, 8, 2, 2)


def compiled(name: str, arch: int, clip: bool, config: Any = None) -> Any:
    """A whole step, with the norm and the barrier or without them."""
    rule, code = (KERNELS | SPILLING)[name]
    flags = triton_compile.GUARDED_STEP if clip else triton_compile.STEP
    return triton_compile.compiled(rule, (code,), f"sm_{arch}", flags, config)


def machine_code(kernel: Any) -> tuple[sass.Function, str]:
    """The kernel's loops, and cuobjdump's report of resources."""
    tool = cuobjdump()
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        (function,) = sass.functions(tool, cubin)
        report = subprocess.run(
            [tool, "-res-usage", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    return function, report


def accesses(loop: Counter[str]) -> Counter[str]:
    """Reads and writes of global memory, by width in bits."""
    found: Counter[str] = Counter()
    for opcode, count in loop.items():
        match = re.match(r"(LD|ST)G?\.E", opcode)
        if match:
            width = re.search(r"\.(64|128)\b", opcode)
            found[f"{match[1]} {width[1] if width else 32}"] += count
    return found


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clip"])
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_full_blocks_take_128_bits_an_access(name: str, arch: int, clip: bool) -> None:
    _, code = KERNELS[name]
    dtypes = [(code >> (8 * i)) & 0xFF for i in range(2 + ((code >> 48) & 0xFF))]
    per_operand = [ELEMENTS * BYTES[d] // 16 for d in dtypes]
    function, report = machine_code(compiled(name, arch, clip))
    update = Counter({"LD 128": sum(per_operand), "ST 128": sum(per_operand) - per_operand[1]})
    # The others are the masked loops over tails.
    loops = [loop for loop in map(accesses, function.loops) if loop["LD 128"]]
    assert [loop for loop in loops if "ST 128" in loop] == [update]
    norms = [loop for loop in loops if "ST 128" not in loop]
    assert all(set(loop) == {"LD 128"} for loop in norms)
    assert bool(norms) == clip
    assert re.search(r"STACK:0 .*LOCAL:0 ", report), report
    registers = re.search(r"REG:(\d+)", report)
    assert registers is not None
    # Two programs of 256 threads on a multiprocessor: 64 KiB of float32 operands in flight.
    assert int(registers[1]) <= 128


@pytest.mark.parametrize("arch", ARCHS)
def test_the_maths_is_that_of_the_other_drivers(arch: int) -> None:
    # IEEE division and square root, fused multiply-adds only where they are meant, nearest even.
    for name in ("adamw-float32", "adamw-mixed"):
        ptx = compiled(name, arch, True).asm["ptx"]
        assert "div.rn.f32" in ptx
        assert "sqrt.rn.f32" in ptx
        assert "div.full" not in ptx
        assert ".approx" not in ptx
        assert ".ftz" not in ptx
        assert "fma.rn.f32" in ptx
        assert ("cvt.rn.bf16" in ptx) == (name == "adamw-mixed")


def test_the_barrier_is_one_of_the_whole_gpu() -> None:
    kernel = compiled("adamw-float32", 90, True)
    assert kernel.metadata.launch_cooperative_grid
    assert not compiled("adamw-float32", 90, False).metadata.launch_cooperative_grid
    scoped = re.findall(r"(?:atom|ld)\.global\.gpu\.(?:acq_rel|acquire)\S*", kernel.asm["ptx"])
    assert [access.split(".")[0] for access in scoped] == [
        "atom",
        "ld",
        "atom",
    ]  # arrive, wait, end


def full_blocks(name: str, arch: int, config: Any) -> list[Counter[str]]:
    """Accesses of the update's loop over full blocks; empty where it has none of 128 bits."""
    function, _ = machine_code(compiled(name, arch, False, config))
    return [loop for loop in map(accesses, function.loops) if "ST 128" in loop]


def test_candidates_of_16_bit_params_take_128_bits_an_access() -> None:
    from fusedopt.triton_kernels.tune import CANDIDATES

    for config in CANDIDATES[:3]:
        (loop,) = full_blocks("adamw-bfloat16", 90, config)
        assert set(loop) == {"LD 128", "ST 128"}


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="the candidate of blocks of 1,024 elements and 8 warps has 4 elements a thread: 64 bits "
    "an access of 16-bit operands",
)
def test_all_candidates_of_16_bit_params_take_128_bits_an_access() -> None:
    from fusedopt.triton_kernels.tune import CANDIDATES

    widths = {c: full_blocks("adamw-bfloat16", 90, c) for c in CANDIDATES}
    assert all(widths.values()), widths


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="a warp of AMD has 64 threads, so that 8 of them leave 4 elements of a block of 2,048 "
    "to a thread: 8 bytes an access of 16-bit operands",
)
@pytest.mark.parametrize("name", ["adamw-bfloat16", "sgd-momentum-bfloat16"])
def test_16_bit_params_take_128_bits_an_access_on_amd(name: str) -> None:
    rule, code = KERNELS[name]
    kernel = triton_compile.compiled(rule, (code,), "gfx942", triton_compile.STEP)
    written = 1 + ((code >> 48) & 0xFF)  # param and states
    stores = Counter(re.findall(r"global_store_\w+", kernel.asm["amdgcn"]))
    assert stores["global_store_dwordx4"] >= written, stores


def spilled(name: str, arch: int, clip: bool) -> int:
    """Bytes of local memory a thread."""
    _, report = machine_code(compiled(name, arch, clip))
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", report)))


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="128 registers are too few for AdamW's float64 maths and for the offsets of strided "
    "rows: 8 to 250 bytes of a thread are spilled",
)
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clip"])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SPILLING)
def test_no_kernel_spills(name: str, arch: int, clip: bool) -> None:
    assert spilled(name, arch, clip) == 0


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="8 bytes are spilled where AMSGrad's third state of 16 bits meets the norm",
)
def test_amsgrad_with_a_norm_does_not_spill_on_ampere() -> None:
    assert spilled("adamw-amsgrad-float16", 80, True) == 0
