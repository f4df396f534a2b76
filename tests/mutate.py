"""Breaks the kernels in ways that a wrong edit could, and checks that the tests notice.

Usage: python tests/mutate.py [--part K/N]. Each mutation is one replacement in one file; the core
is rebuilt with it and the numeric tests must fail. Mutations of csrc/cuda are run on the emulated
GPU, those of triton_kernels/ by Triton's interpreter. The exit code is 1 where one survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fusedopt._native import _C
from tests.cuda_emulator import build as emulator
from tests.native_build import build_extension

ROOT = Path(__file__).parent.parent
TESTS = [
    "tests/test_numerics.py::test_three_steps_match_the_oracle",
    "tests/test_clip_amp.py::test_clipping_matches_the_oracle",
    "tests/test_layout.py::test_every_layout_of_param_and_gradient",
    "tests/test_clip_amp.py::test_a_skipped_step_changes_nothing",
    "tests/test_layout.py::test_storage_offsets_of_param_gradient_and_state",
    "tests/test_numerics.py::test_tensor_lr_equals_float_lr",
]

# name: (file, what stands there, what it becomes)
MUTATIONS = {
    "decay after the update": (
        "rules/adamw.h",
        "param = fma(-s.step_size, exp_avg / (square_root(second) + s.eps), param);",
        "param = fma(-s.step_size, exp_avg / (square_root(second) + s.eps), param / s.decay)"
        " * s.decay;",
    ),
    "decay not decoupled from lr": ("rules/adamw.h", "exact_product(h.lr,", "exact_product(1.0,"),
    "stale lr": (
        "host/group_reader.cpp",
        "out->hyper[slot++] = number(value, key);",
        "{ static double seen = number(value, key);"
        " out->hyper[slot] = slot == 0 ? seen : number(value, key); ++slot; }",
    ),
    "no bias correction of the first moment": ("rules/adamw.h", " * h.lr / correction1", " * h.lr"),
    "no bias correction of the second moment": (
        "rules/adamw.h",
        "square_root(one_minus_power(h.beta2, step))",
        "DoubleDouble(1)",
    ),
    "no step increment": ("cpu/apply.cpp", "*row.step += 1;", "*row.step += 0;"),
    "tail elements skipped": (
        "cpu/kernels.h",
        "for (int64_t i = 0; i < count; ++i) {\n    T p",
        "for (int64_t i = 0; i < count / 8 * 8; ++i) {\n    T p",
    ),
    "tail of the norm skipped": (
        "cpu/kernels.h",
        "for (; i < count; ++i) sum +=",
        "for (; i + 1 < count; ++i) sum +=",
    ),
    "eps inside the root": (
        "rules/adamw.h",
        "square_root(second) + s.eps",
        "square_root(second + s.eps)",
    ),
    "first touch dampened": ("rules/sgd.h", "select(s.first, grad, ", "select(T(0), grad, "),
    "nesterov ignored": ("rules/sgd.h", "select(s.nesterov, buffer, T(0))", "T(0)"),
    "amsgrad forgets": ("rules/adamw.h", "      state[2] = second;\n", ""),
    "maximize ignored": ("cpu/apply.cpp", "maximize ? -factor : factor", "factor"),
    "strides of the gradient ignored": (
        "host/layout.h",
        "if (views[k]->stride(d) != expected) return false;",
        "if (k != kGrad && views[k]->stride(d) != expected) return false;",
    ),
    "second chunk paired with the first": (
        "cpu/kernels.h",
        "states[k] = static_cast<S*>(row.data[kState0 + k]) + begin;",
        "states[k] = static_cast<S*>(row.data[kState0 + k]);",
    ),
    "truncating bfloat16 stores": (
        "core/dtype.h",
        "const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);",
        "const uint32_t rounded = bits;",
    ),
    "odd element behind the pairs skipped": (
        "cpu/kernels.h",
        "if (count % 2 == 0) return;",
        "return;",
    ),
    "halves of a pair swapped": (
        "core/dtype.h",
        "rounded_bits(x.first) >> 16 | (rounded_bits(x.second) & 0xffff0000u)",
        "rounded_bits(x.second) >> 16 | (rounded_bits(x.first) & 0xffff0000u)",
    ),
    "skipped step counted": (
        "cpu/apply.cpp",
        "if (!result.skipped)\n",
        "if (true)\n",
    ),
}

CUDA_TESTS = [
    "tests/test_clip_amp.py::test_the_norm_is_the_same_on_each_run",
    "tests/test_clip_amp.py::test_a_norm_that_is_reduced_over_ranks",
    "tests/test_cuda.py",
    "tests/test_layout.py::test_storage_offsets_of_param_gradient_and_state",
    "tests/test_layout.py::test_more_elements_than_32_bits_can_count",
]
CUDA_MUTATIONS = {
    "CUDA: a wrong tail": (
        "cuda/update.cuh",
        "const int rest = count - (end - first);",
        "const int rest = count - (end - first) - 1;",
    ),
    "CUDA: a barrier of the block missing": (
        "cuda/reduce.cuh",
        "half /= 2) {\n    __syncthreads();",
        "half /= 2) {",
    ),
    "CUDA: the grid barrier missing": (
        "cuda/step.cuh",
        "    cooperative_groups::this_grid().sync();\n",
        "",
    ),
    "CUDA: blocks race for a partial sum": (
        "cuda/step.cuh",
        "if (threadIdx.x == 0) a.workspace->partial[blockIdx.x] = mine;\n    cooperative",
        "if (threadIdx.x == 0) a.workspace->partial[blockIdx.x / 2] = mine;\n    cooperative",
    ),
    "CUDA: 32-bit overflow of the chunk offset": (
        "cuda/step.cuh",
        "static_cast<int64_t>(ref.index) * kChunk",
        "static_cast<int32_t>(static_cast<uint32_t>(ref.index) * kChunk)",
    ),
    "CUDA: no step increment": ("cuda/step.cuh", "*a.rows[r].step += 1;", "*a.rows[r].step += 0;"),
    "CUDA: state stays new": ("cuda/step.cuh", "a.rows[r].first = 0;", ""),
}

TRITON_TESTS = [
    "tests/test_numerics.py::test_three_steps_match_the_oracle",
    "tests/test_clip_amp.py::test_clipping_matches_the_oracle",
    "tests/test_layout.py::test_storage_offsets_of_param_gradient_and_state",
    "tests/test_triton_interpreted.py",
]
TRITON_MUTATIONS = {
    "Triton: no bias correction of the first moment": (
        "rules.py",
        "step_size = lr * correction / one_minus_power(beta1, step)",
        "step_size = lr * correction",
    ),
    "Triton: nesterov ignored": ("rules.py", "tl.where(nesterov != 0, buffer, 0.0)", "buffer * 0"),
    "Triton: the tail mask lets one element too many through": (
        "apply.py",
        "            s2.to(S2) + i,\n            i < count,",
        "            s2.to(S2) + i,\n            i <= count,",
    ),
    "Triton: the tail mask leaves one element out": (
        "apply.py",
        "            s2.to(S2) + i,\n            i < count,",
        "            s2.to(S2) + i,\n            i < count - 1,",
    ),
    "Triton: tail of the norm skipped": (
        "norm.py",
        "x = tl.load(address.to(G) + i, mask=i < count,",
        "x = tl.load(address.to(G) + i, mask=i < count - 1,",
    ),
    "Triton: second chunk paired with the first": (
        "table.py",
        "begin = (ref >> 32) * CHUNK",
        "begin = (ref >> 32) * 0",
    ),
    "Triton: no step increment": ("apply.py", "tl.load(counter, there, 0.0) + 1,", "0.0 * i + 1,"),
}

NAMES = [*MUTATIONS, *CUDA_MUTATIONS, *TRITON_MUTATIONS]

# What no mutation reaches, and the instruction-set level that this machine runs.
UNTOUCHED = ("bindings", "tensor_access", "level", "none", "cuda_step")
LEVEL = _C.build_info()["cpu_level"] if _C is not None else ""


def build(csrc: Path, package: Path, objects: Path, reuse: Path | None = None) -> None:
    """Links the CPU part of `csrc` into `package`. Objects that no mutation reaches are taken from
    `reuse`."""
    build_extension(
        csrc,
        package,
        objects,
        dict.fromkeys(csrc.rglob("*.cpp"), ("-std=c++17",)),
        reuse=reuse,
        changed=reached,
    )


def reached(source: Path) -> bool:
    """Whether a mutation can change what this machine runs of `source`."""
    idle_level = source.stem.startswith("level_") and source.stem != f"level_{LEVEL}"
    return source.stem not in UNTOUCHED and not idle_level


def run_tests(site: Path, tests: list[str], *options: str, **environment: str) -> int:
    script = (
        "import sys, fusedopt._native as n, pytest;"
        f"assert n._C.__file__.startswith({str(site)!r}), n._C.__file__;"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "-x", "-q", "-p", "no:cacheprovider", *options, *tests]
    done = subprocess.run(
        command,
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        capture_output=True,
    )
    if done.returncode > 1:  # neither passed nor failed: the check itself is broken
        raise RuntimeError(done.stdout.decode() + done.stderr.decode())
    return 0 if done.returncode == 0 else 1  # a signal is a failure, too


def mutated(
    sources: Path, name: str, file: str, old: str, new: str, original: Path = ROOT / "csrc"
) -> Path:
    """A copy of `original` at `sources`, with one mutation."""
    shutil.copytree(original, sources)
    text = (sources / file).read_text()
    if text.count(old) != 1:
        raise RuntimeError(f"{name}: {file} holds the text {text.count(old)} times")
    (sources / file).write_text(text.replace(old, new))
    return sources


def check_core(work: Path) -> Iterator[tuple[str, bool]]:
    """(mutation, whether the tests noticed) for each of MUTATIONS."""
    site = work / "site"
    shutil.copytree(ROOT / "fusedopt", site / "fusedopt", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "tests", site / "tests")
    shutil.copy(ROOT / "pyproject.toml", site)
    build(ROOT / "csrc", site / "fusedopt", work / "whole")
    options = ("-k", "not reference")
    yield "nothing broken", run_tests(site, TESTS, *options) == 0
    for number, (name, mutation) in enumerate(MUTATIONS.items()):
        sources = mutated(work / f"csrc{number}", name, *mutation)
        build(sources, site / "fusedopt", work / f"objects{number}", work / "whole")
        yield name, run_tests(site, TESTS, *options) == 1


def check_cuda(work: Path) -> Iterator[tuple[str, bool]]:
    """The same for CUDA_MUTATIONS, on the emulated GPU. (That its tests pass on the unbroken core
    is a test of its own: test_cuda_emulator.py.)"""
    environment = {"FUSEDOPT_TEST_BACKENDS": "cuda", "FUSEDOPT_TEST_GEOMETRY": "4x32"}
    whole = emulator.build(work / "emulated")
    for number, (name, mutation) in enumerate(CUDA_MUTATIONS.items()):
        sources = mutated(work / f"cuda{number}", name, *mutation)
        site = emulator.build(work / f"emulated{number}", sources, reuse=whole)
        yield name, run_tests(site, CUDA_TESTS, **environment) == 1


def check_triton(work: Path) -> Iterator[tuple[str, bool]]:
    """The same for TRITON_MUTATIONS, under Triton's interpreter."""
    environment = {"FUSEDOPT_TEST_BACKENDS": "triton", "TRITON_INTERPRET": "1"}
    site = work / "triton"
    shutil.copytree(ROOT / "fusedopt", site / "fusedopt")
    shutil.copytree(ROOT / "tests", site / "tests")
    shutil.copy(ROOT / "pyproject.toml", site)
    kernels = site / "fusedopt" / "triton_kernels"
    shutil.copytree(ROOT / "triton_kernels", kernels)
    yield "Triton: nothing broken", run_tests(site, TRITON_TESTS[-1:], **environment) == 0
    shutil.rmtree(kernels)
    for name, mutation in TRITON_MUTATIONS.items():
        mutated(kernels, name, *mutation, original=ROOT / "triton_kernels")
        yield name, run_tests(site, TRITON_TESTS, "-k", "triton", **environment) == 1
        shutil.rmtree(kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1", help="K/N: each N-th mutation, from the K-th on")
    first, step = map(int, parser.parse_args().part.split("/"))
    checks = {check_core: MUTATIONS, check_cuda: CUDA_MUTATIONS, check_triton: TRITON_MUTATIONS}
    for table in checks.values():
        for name in list(table):
            if NAMES.index(name) % step != first:
                del table[name]
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name, good in chain(*(check(work) for check, table in checks.items() if table)):
            print(f"{'as it should' if good else 'SURVIVED    '}  {name}", flush=True)
            results[name] = good
    survivors = [name for name, good in results.items() if not good]
    print(f"{len(results) - len(survivors)} of {len(results)} as they should be")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
