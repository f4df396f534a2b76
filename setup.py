"""Builds fusedopt._C, the native part of fusedopt. torch is never imported here.

Without a C++ compiler the install still succeeds: the pure-PyTorch reference backend serves, and
`python -m fusedopt` says what is missing. Set FUSEDOPT_REQUIRE_NATIVE=1 to make that an error.

Where nvcc is, the CUDA kernels are compiled into it, for the architectures of the GPUs of this
machine, or without one for those of DEFAULT_ARCHS and, as PTX, for all that come later. The
extension imports and serves the CPU where there is no CUDA driver.

Environment: FUSEDOPT_CUDA_ARCHS (such as "80 90", or "none" to build without CUDA), NVCC (its
path), FUSEDOPT_REQUIRE_CUDA=1 (make a failing nvcc an error), CXX (compiler),
FUSEDOPT_SANITIZE=address,undefined (instrumented build for `make sanitize`),
FUSEDOPT_REQUIRE_NATIVE=1.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError
from setuptools.modified import newer_group

SOURCES = sorted(glob("csrc/**/*.cpp", recursive=True))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cu*", recursive=True))
DEFAULT_ARCHS = ["80", "90", "100", "120"]


def compile_flags() -> tuple[list[str], list[str]]:
    """(compile, link) flags. Contraction is off so that every machine computes the same bits;
    math-errno is off because g++ does not vectorise sqrtf with it."""
    if os.name == "nt":
        return ["/O2", "/fp:precise", "/openmp"], []
    compile_args = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
    compile_args += [
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-unswitch-loops",
    ]
    link_args: list[str] = []
    if platform.system() != "Darwin":
        compile_args.append("-fopenmp")
        link_args.append("-fopenmp")
    sanitizers = os.environ.get("FUSEDOPT_SANITIZE")
    if sanitizers:
        flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        compile_args += [*flags, "-g1", "-O1"]
        link_args += flags
    return compile_args, link_args


def output_of(*command: str) -> str:
    """What a command prints, or "" where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout + done.stderr


def cuda_archs() -> list[str]:
    """The compute capabilities to compile for, such as ["80", "90"]; [] for none."""
    asked = os.environ.get("FUSEDOPT_CUDA_ARCHS", "")
    if asked:
        return [] if asked == "none" else re.split(r"[\s,;]+", asked.strip())
    here = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return sorted(set(here.replace(".", "").split())) or DEFAULT_ARCHS


class Cuda:
    """The CUDA toolkit of this machine."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        self.nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or f"{home}/bin/nvcc"
        # The nvcc on PATH may be a wrapper somewhere else: it says itself where the toolkit is.
        told = re.search(r"^#\$ TOP=(.*)$", output_of(self.nvcc, "--dryrun", "-c", "x.cu"), re.M)
        self.root = Path(told[1].strip()).resolve() if told else None
        release = re.search(r"release (\d+)\.(\d+)", output_of(self.nvcc, "--version"))
        self.version = (int(release[1]), int(release[2])) if release else (0, 0)

    def runtime(self) -> str:
        """The static CUDA runtime: no library of CUDA is needed to import the extension."""
        assert self.root is not None
        places = [*self.root.glob("lib*"), *self.root.glob("targets/*/lib")]
        for place in places:
            if (place / "libcudart_static.a").exists():
                return str(place / "libcudart_static.a")
        raise OSError(f"libcudart_static.a is not below {self.root}")

    def compile(self, source: str, target: str, archs: list[str]) -> None:
        last = max(archs, key=int)
        command = [self.nvcc, "-c", source, "-o", target, *self.flags()]
        for arch in archs:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += ["-gencode", f"arch=compute_{last},code=compute_{last}"]
        command += [f'-DFUSEDOPT_CUDA_ARCHS="{" ".join(archs)} +PTX"', "--threads", "0"]
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)

    def flags(self) -> list[str]:
        """Contraction is off, as on the CPU: both compute the same bits."""
        flags = ["-std=c++17", "-O3", "-fmad=false", "-Icsrc"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        return flags + [f"-D{name}" for name in self.macros()]

    def macros(self) -> list[str]:
        """What host code and kernels must both know."""
        small = self.version < (12, 1)  # kernels take 4 KiB of arguments
        return ["FUSEDOPT_CUDA"] + ["FUSEDOPT_CUDA_SMALL_ARGS"] * small


class OptionalBuildExt(build_ext):
    """build_ext that compiles CUDA where it can, and turns a missing or failing compiler into a
    notice."""

    def run(self) -> None:
        self._or_notice(super().run)

    def build_extension(self, ext) -> None:
        self._add_cuda(ext)
        self._or_notice(lambda: super(OptionalBuildExt, self).build_extension(ext))

    def _add_cuda(self, ext) -> None:
        cuda, archs = Cuda(), cuda_archs()
        if not archs or os.environ.get("FUSEDOPT_SANITIZE"):
            return
        try:
            if cuda.root is None:
                raise OSError(f"nvcc was not found ({cuda.nvcc})")
            target = Path(self.build_temp) / "launch.cu.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            runtime = cuda.runtime()
            stamp = target.with_suffix(".archs")
            known = stamp.read_text() if stamp.exists() else ""
            if (
                self.force
                or known != " ".join(archs)
                or newer_group([*HEADERS, "setup.py"], str(target))
            ):
                cuda.compile("csrc/cuda/launch.cu", str(target), archs)
                stamp.write_text(" ".join(archs))
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("FUSEDOPT_REQUIRE_CUDA") == "1":
                raise
            print(f"\nfusedopt: building without CUDA: {error}\n", file=sys.stderr)
            return
        ext.define_macros += [(name, "1") for name in cuda.macros()]
        ext.extra_objects += [str(target), runtime]
        ext.depends = [*ext.depends, str(target)]  # newer than the extension: link it again
        ext.extra_link_args += ["-ldl", "-lrt", "-lpthread"]

    def _or_notice(self, build) -> None:
        try:
            build()
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            if os.environ.get("FUSEDOPT_REQUIRE_NATIVE") == "1":
                raise
            for ext in self.extensions:
                ext.optional = True  # so that a missing file is not an error of the copy step
            print(
                f"\nfusedopt: the native extension was not built: {error}\n"
                "fusedopt: a C++17 compiler is missing or failed (Debian: apt install g++).\n"
                "fusedopt: installing without it; the reference backend will serve.\n",
                file=sys.stderr,
            )


compile_args, link_args = compile_flags()
extension = Pybind11Extension(
    "fusedopt._C",
    SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=compile_args,
    extra_link_args=link_args,
)

with ParallelCompile("FUSEDOPT_BUILD_JOBS", default=os.cpu_count() or 1):
    setup(
        packages=[
            "fusedopt",
            "fusedopt.backends",
            "fusedopt.integrations",
            "fusedopt.triton_kernels",
        ],
        package_dir={"fusedopt.triton_kernels": "triton_kernels"},
        package_data={"fusedopt": ["py.typed", "*.pyi"]},
        ext_modules=[extension],
        cmdclass={"build_ext": OptionalBuildExt},
    )
