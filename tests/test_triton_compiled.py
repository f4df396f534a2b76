"""What Triton makes of its kernels for NVIDIA GPUs, compiled without one: the width of memory
accesses in the loops over full blocks, registers, local memory, and the rounding of the maths."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import sass
from tests.test_sass import cuobjdump

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or cuobjdump() is None, reason="needs triton"
)
F32, F64, BF16, F16 = range(4)
BYTES = (4, 8, 2, 2)
ARCHS = [80, 90, 100]
ELEMENTS = 8  # of a thread


def kind(variant: int, *dtypes: int) -> int:
    """Of rows with these dtypes of param, grad and states (csrc/host/triton_step.cpp)."""
    codes = sum(dtype << (8 * i) for i, dtype in enumerate(dtypes))
    return codes | variant << 40 | (len(dtypes) - 2) << 48


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
# All of them for Hopper, the usual ones for the others.
COMPILED = [(name, 90) for name in KERNELS] + [
    (name, arch)
    for arch in (80, 100)
    for name in ("adamw-float32", "adamw-mixed", "adamw-bfloat16")
]


@functools.cache
def compiled(name: str, arch: int, clip: bool) -> Any:
    """A whole step, with the norm and the barrier or without them."""
    import triton
    from fusedopt.triton_kernels.apply import step_kernel
    from fusedopt.triton_kernels.launch import CHUNK, DEFAULT, compiler_options
    from fusedopt.triton_kernels.rules import RULES
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rule, code = KERNELS[name]
    prepare, update = RULES[rule]
    constants = {"PREPARE": prepare, "UPDATE": update, "KINDS": (code,), "CHUNK": CHUNK}
    constants |= {"BLOCK": DEFAULT.block, "NORM": clip, "APPLY": True, "CLIP": clip}
    constants["SKIP_NONFINITE"] = clip
    names = step_kernel.arg_names
    signature = {n: "constexpr" if n in constants else "i64" for n in names}
    source = ASTSource(step_kernel, signature, {(names.index(n),): c for n, c in constants.items()})
    options = compiler_options("cuda", DEFAULT, barrier=clip)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


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
