"""Builds fusedopt with csrc/cuda compiled for the emulated GPU of this folder.

The result is a folder that holds the package and the tests: with it first on the path, the backend
"cuda" takes CPU tensors and runs the kernels' source on host threads.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.native_build import build_extension

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
    host = ("-std=c++20", "-pthread", f"-I{EMULATOR}")
    host += ("-DFUSEDOPT_CUDA", "-DFUSEDOPT_CUDA_EMULATOR", '-DFUSEDOPT_CUDA_ARCHS="emulated"')
    # Fused multiply-adds are slow calls without -mfma.
    kernel = ("-x", "c++", "-include", "cuda_runtime.h", "-mavx2", "-mfma", *kernel_flags)
    build_extension(
        sources,
        package,
        target / "objects",
        dict.fromkeys(sources.rglob("*.cpp"), host)
        | dict.fromkeys(sources.rglob("*.cu"), host + kernel),
        link_flags=kernel_flags,
        reuse=reuse and reuse / "objects",
        changed=lambda source: source.suffix == ".cu",
    )
    return target
