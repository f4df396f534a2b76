"""The Triton kernels with float64 operands, compiled for GPUs that are not there."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
from pathlib import Path

import pytest

from fusedopt import _native
from tests.separate import ROOT
from tests.triton_compile import (
    APPLY,
    BF16,
    CLIPPED_STEP,
    F16,
    F32,
    F64,
    GUARDED_STEP,
    NORM,
    STEP,
    STRIDED,
    compiled,
    kind,
    ttir,
)

pytestmark = pytest.mark.skipif(
    _native._C is None or importlib.util.find_spec("triton") is None, reason="needs triton"
)
ARCHS = ["sm_80", "sm_90", "sm_100", "gfx942"]
BINARY = {"sm": "cubin", "gf": "hsaco"}

# Each operand as the only float64, and all of them; each variant.
KINDS = {
    "adamw": ("adamw", kind(0, F64, F64, F64, F64)),
    "adamw-param": ("adamw", kind(0, F64, F32, F16, BF16)),
    "adamw-grad": ("adamw", kind(0, F32, F64, F32, F32)),
    "adamw-exp-avg": ("adamw", kind(0, BF16, BF16, F64, F32)),
    "adamw-exp-avg-sq": ("adamw", kind(0, F16, F16, F16, F64)),
    "adamw-amsgrad": ("adamw", kind(1, F64, F64, F64, F64, F64)),
    "adam": ("adamw", kind(2, F64, F64, F64, F64)),
    "adam-amsgrad-max": ("adamw", kind(3, F32, BF16, F32, F32, F64)),
    "adamw-strided": ("adamw", kind(0, F64, F64, F64, F64) | STRIDED),
    "sgd": ("sgd", kind(0, F64, F64)),
    "sgd-grad": ("sgd", kind(0, F16, F64)),
    "sgd-momentum": ("sgd", kind(1, F64, F64, F64)),
    "sgd-momentum-buffer": ("sgd", kind(1, BF16, BF16, F64)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_guarded_step_compiles(arch: str, name: str) -> None:
    rule, code = KINDS[name]
    assert compiled(rule, (code,), arch, GUARDED_STEP).asm[BINARY[arch[:2]]]


LAUNCHES = [("adamw", flags) for flags in (STEP, CLIPPED_STEP, NORM, APPLY)]
LAUNCHES += [("sgd-momentum", flags) for flags in (STEP, APPLY)]  # NORM knows no rule


@pytest.mark.parametrize(("rule", "flags"), LAUNCHES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_each_launch_compiles(arch: str, rule: str, flags: tuple[bool, ...]) -> None:
    name, code = KINDS[rule]
    assert compiled(name, (code,), arch, flags).asm[BINARY[arch[:2]]]


@pytest.mark.parametrize("arch", ARCHS)
def test_float32_and_float64_rows_in_one_kernel(arch: str) -> None:
    kinds = (kind(0, F32, F32, F32, F32), KINDS["adamw"][1])
    assert compiled("adamw", kinds, arch, GUARDED_STEP).asm[BINARY[arch[:2]]]


def mixtures(variant: int, operands: int) -> tuple[int, ...]:
    """All kinds with a float64 operand."""
    dtypes = itertools.product((F32, F64, BF16, F16), repeat=operands)
    return tuple(sorted(kind(variant, *d) for d in dtypes if F64 in d))


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("rule", "kinds"),
    [
        ("adamw", mixtures(0, 4)),
        ("adamw", mixtures(2, 4)),
        ("sgd", mixtures(0, 2)),
        ("sgd", mixtures(1, 3)),
    ],
    ids=["adamw", "adam", "sgd", "sgd-momentum"],
)
def test_every_mixture_with_float64(rule: str, kinds: tuple[int, ...], arch: str) -> None:
    # Each row has a branch of the kernel, in the language of which all of them are.
    code = ttir(rule, kinds, arch, GUARDED_STEP)
    assert "f64" in code
    branches = {int(number) for number in re.findall(r"arith\.constant (\d+) : i(?:32|64)", code)}
    assert set(kinds) <= branches


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["adamw", "adamw-grad"])
def test_the_maths_of_float64_is_ieee(arch: str, name: str) -> None:
    ptx = compiled("adamw", (KINDS[name][1],), arch, GUARDED_STEP).asm["ptx"]
    for operation in ("div.rn.f64", "sqrt.rn.f64", "fma.rn.f64"):
        assert operation in ptx
    assert ".approx" not in ptx


def statements_after_a_return(tree: ast.Module) -> list[str]:
    """Functions of kernels in which an `if` that returns is followed by more than its `else`."""
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        if not any("triton.jit" in ast.unparse(d) for d in function.decorator_list):
            continue
        for node in ast.walk(function):
            body = getattr(node, "body", [])
            found += [
                function.name
                for statement in (body[:-1] if isinstance(body, list) else [])
                if any(isinstance(inner, ast.Return) for inner in ast.walk(statement))
            ]
    return found


FILES = sorted((ROOT / "triton_kernels").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_follows_a_return(file: Path) -> None:
    # Triton compiles what follows a return, also where the condition is a constant: for dtypes for
    # which it was not written.
    assert not statements_after_a_return(ast.parse(file.read_text()))


def test_the_search_finds_what_it_is_for() -> None:
    code = "@triton.jit\ndef f(x):\n    if x.dtype == 1:\n        return x\n    return x + 1\n"
    assert statements_after_a_return(ast.parse(code)) == ["f"]
