"""Builds fusedopt._C, the native part of fusedopt. torch is never imported here.

Without a C++ compiler the install still succeeds: the pure-PyTorch reference backend serves, and
`python -m fusedopt` says what is missing. Set FUSEDOPT_REQUIRE_NATIVE=1 to make that an error.

Environment: CXX (compiler), FUSEDOPT_SANITIZE=address,undefined (instrumented build for
`make sanitize`), FUSEDOPT_REQUIRE_NATIVE=1.
"""

import os
import platform
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = sorted(glob("csrc/**/*.cpp", recursive=True))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))


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
        compile_args += [*flags, "-g", "-O1"]
        link_args += flags
    return compile_args, link_args


class OptionalBuildExt(build_ext):
    """build_ext that turns a missing or failing compiler into a notice."""

    def run(self) -> None:
        self._or_notice(super().run)

    def build_extension(self, ext) -> None:
        self._or_notice(lambda: super(OptionalBuildExt, self).build_extension(ext))

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
        packages=["fusedopt", "fusedopt.backends", "fusedopt.triton_kernels"],
        package_dir={"fusedopt.triton_kernels": "triton_kernels"},
        package_data={"fusedopt": ["py.typed", "*.pyi"]},
        ext_modules=[extension],
        cmdclass={"build_ext": OptionalBuildExt},
    )
