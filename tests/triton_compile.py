"""Compiles the Triton kernels for GPUs that are not there."""

from __future__ import annotations

import functools
from typing import Any

F32, F64, BF16, F16 = range(4)
STRIDED = 1 << 56


def kind(variant: int, *dtypes: int) -> int:
    """Of rows with these dtypes of param, grad and states (csrc/host/triton_step.cpp)."""
    codes = sum(dtype << (8 * i) for i, dtype in enumerate(dtypes))
    return codes | variant << 40 | (len(dtypes) - 2) << 48


def target_of(arch: str) -> Any:
    """Of "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


# NORM, APPLY, CLIP and SKIP_NONFINITE of each kernel that launch.py starts.
STEP = (False, True, False, False)
CLIPPED_STEP = (True, True, True, False)
GUARDED_STEP = (True, True, True, True)
NORM = (True, False, False, False)
APPLY = (False, True, True, True)


def source_of(rule: str, kinds: tuple[int, ...], flags: tuple[bool, ...], block: int) -> Any:
    """What triton.compile takes."""
    from fusedopt.triton_kernels.apply import step_kernel
    from fusedopt.triton_kernels.launch import CHUNK
    from fusedopt.triton_kernels.rules import RULES
    from triton.compiler import ASTSource

    prepare, update = RULES[rule]
    constants = {"PREPARE": prepare, "UPDATE": update, "KINDS": kinds, "CHUNK": CHUNK}
    constants["BLOCK"] = block
    constants |= dict(zip(("NORM", "APPLY", "CLIP", "SKIP_NONFINITE"), flags, strict=True))
    names = step_kernel.arg_names
    signature = {n: "constexpr" if n in constants else "i64" for n in names}
    return ASTSource(step_kernel, signature, {(names.index(n),): c for n, c in constants.items()})


@functools.cache
def compiled(
    rule: str, kinds: tuple[int, ...], arch: str, flags: tuple[bool, ...], config: Any = None
) -> Any:
    """The kernel of a launch, down to machine code."""
    import triton
    from fusedopt.triton_kernels.launch import DEFAULT, compiler_options

    target, config = target_of(arch), config or DEFAULT
    options = compiler_options(target.backend, config, barrier=flags[0] and flags[1])
    source = source_of(rule, kinds, flags, config.block)
    return triton.compile(source, target=target, options=options)


def ttir(rule: str, kinds: tuple[int, ...], arch: str, flags: tuple[bool, ...]) -> str:
    """The same as far as Triton's frontend gets, which finds what the language does not allow."""
    from fusedopt.triton_kernels.launch import DEFAULT, compiler_options
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    target = target_of(arch)
    backend = make_backend(target)
    barrier = flags[0] and flags[1]
    options = backend.parse_options(compiler_options(target.backend, DEFAULT, barrier))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementation = backend.get_codegen_implementation(options)
    module_map = backend.get_module_map()
    source = source_of(rule, kinds, flags, DEFAULT.block)
    return str(source.make_ir(target, options, implementation, module_map, context))
