"""Builds fusedopt with csrc/cuda compiled for the emulated GPU of this folder.

The result is a folder that holds the package and the tests: with it first on the path, the backend
"cuda" takes CPU tensors and runs the kernels' source on host threads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).parent.parent.parent
EMULATOR = Path(__file__).parent


def build(
    target: Path,
    sources: Path = ROOT / "csrc",
    kernel_flags: tuple[str, ...] = (),
    reuse: Path | None = None,
) -> Path:
    """Fills `target` with the package, its emulated extension and the tests; returns it.

    Args:
        sources: csrc or a copy of it.
        kernel_flags: compiler and linker flags for the kernels alone, such as sanitizers.
        reuse: a folder that was built before, from sources that differ only in csrc/cuda.
    """
    package = target / "fusedopt"
    shutil.copytree(
        ROOT / "fusedopt", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(ROOT / "tests", target / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)
    objects = target / "objects"
    objects.mkdir()
    common = ["-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-pthread"]
    common += ["-ffp-contract=off", "-fno-math-errno", "-w", "-Wno-psabi"]
    common += ["-DFUSEDOPT_CUDA", "-DFUSEDOPT_CUDA_EMULATOR", '-DFUSEDOPT_CUDA_ARCHS="emulated"']
    common += [f"-I{sources}", f"-I{EMULATOR}", f"-I{pybind11.get_include()}"]
    common.append(f"-I{sysconfig.get_paths()['include']}")

    def compile_one(source: Path) -> str:
        result = objects / ("-".join(source.relative_to(sources).parts) + ".o")
        if reuse is not None and source.suffix != ".cu":
            return str(reuse / "objects" / result.name)
        # Fused multiply-adds are slow calls without -mfma.
        cuda = ["-x", "c++", "-include", "cuda_runtime.h", "-mavx2", "-mfma", *kernel_flags]
        extra = cuda if source.suffix == ".cu" else []
        subprocess.run(["g++", *common, *extra, "-c", str(source), "-o", str(result)], check=True)
        return str(result)

    files = sorted([*sources.rglob("*.cpp"), *sources.rglob("*.cu")])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(compile_one, files))
    extension = package / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    link = ["g++", "-shared", "-fopenmp", "-pthread", *kernel_flags, *parts, "-o", str(extension)]
    subprocess.run(link, check=True)
    return target
