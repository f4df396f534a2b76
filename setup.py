"""Builds fusedopt._C, the native part of fusedopt. torch is never imported here.

Without a C++ compiler the install still succeeds: the pure-PyTorch reference backend serves, and
`python -m fusedopt` says what is missing. Set FUSEDOPT_REQUIRE_NATIVE=1 to make that an error. A
wheel without the extension is tagged py3-none-any: it serves every platform. FUSEDOPT_PURE=1 asks
for it where there is a compiler.

Where nvcc is, the CUDA kernels are compiled into it, for the architectures of the GPUs of this
machine, or without one for those of DEFAULT_ARCHS and, as PTX, for all that come later. The
extension imports and serves the CPU where there is no CUDA driver.

Environment: FUSEDOPT_CUDA_ARCHS (such as "80 90", "9.0+PTX" or "sm_90a"; "native" for the GPUs of
this machine and nothing else; "none" to build without CUDA), NVCC (its path),
FUSEDOPT_REQUIRE_CUDA=1 (make a failing nvcc, or one that does not know an architecture, an error),
CXX (compiler), FUSEDOPT_SANITIZE=address,undefined (instrumented build for `make sanitize`),
FUSEDOPT_REQUIRE_NATIVE=1, FUSEDOPT_PURE=1.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, OptionError, PlatformError
from setuptools.modified import newer_group

sys.path.insert(0, os.getcwd())  # pip's isolated build does not look here
import setup_cuda
from setup_cuda import notice, output_of, say

SOURCES = sorted(glob("csrc/**/*.cpp", recursive=True))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cu*", recursive=True))
BUILD_FILES = ["setup.py", "setup_cuda.py"]


def compile_flags() -> tuple[list[str], list[str]]:
    """(compile, link) flags that every compiler takes. Contraction is off so that every machine
    computes the same bits; math-errno is off because g++ does not vectorise sqrtf with it."""
    if os.name == "nt":
        return ["/O2", "/fp:precise", "/openmp"], []
    compile_args = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
    compile_args += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    link_args: list[str] = []
    sanitizers = os.environ.get("FUSEDOPT_SANITIZE")
    if sanitizers:
        flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        compile_args += [*flags, "-g1", "-O1"]
        link_args += flags
    return compile_args, link_args


class OptionalBuildExt(build_ext):
    """build_ext that compiles CUDA where it can, and turns a missing or failing compiler into a
    notice."""

    def run(self) -> None:
        self._or_notice(super().run)

    def built(self, ext) -> Path:
        """Where the extension is, if it was built."""
        return Path(self.get_ext_fullpath(ext.name))

    def copy_extensions_to_source(self) -> None:
        """For an editable install; what an earlier one has left goes where nothing was built."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            if not (Path(self.build_lib) / self.get_ext_filename(ext.name)).exists():
                self.built(ext).unlink(missing_ok=True)

    def build_extension(self, ext) -> None:
        if PURE:
            ext.optional = True  # so that a missing file is not an error of the copy step
            self.built(ext).unlink(missing_ok=True)
            return
        self._add_flags(ext)
        self._add_cuda(ext)
        # What an earlier run has built, with other options, another compiler or of older sources,
        # must not be taken for the outcome of this one: not even where this one fails.
        built = self.built(ext)
        stamp = Path(self.build_temp) / f"{ext.name}.options"
        options = self._options(ext)
        known = stamp.read_text() if stamp.exists() else ""
        if self.force or known != options or newer_group(ext.depends + ext.sources, str(built)):
            built.unlink(missing_ok=True)
            stamp.unlink(missing_ok=True)
        self._announce()
        self._or_notice(lambda: super(OptionalBuildExt, self).build_extension(ext))
        if built.exists():
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(options)

    def _announce(self) -> None:
        """Says which file is compiled."""
        compile_one = self.compiler._compile

        def announced(obj, source, *arguments):
            say(f"compiling {source}")
            compile_one(obj, source, *arguments)

        self.compiler._compile = announced

    def _options(self, ext) -> str:
        """All that the extension depends on besides files."""
        commands = {
            name: getattr(self.compiler, name, None)
            for name in ("compiler_so_cxx", "compiler_cxx", "linker_so_cxx")
        }
        version = output_of(*commands["compiler_so_cxx"] or [], "--version")
        flags = [ext.extra_compile_args, ext.extra_link_args, ext.define_macros, ext.extra_objects]
        return json.dumps([commands, version, pybind11.__version__, flags])

    def _add_flags(self, ext) -> None:
        """The flags that some compilers refuse."""
        if os.name == "nt" or not self._accepts([]):
            return  # without any flag: the build itself will say what is wrong
        if self._accepts(["-fno-unswitch-loops"]):  # g++, which unswitches loops that we wrote out
            ext.extra_compile_args += ["-fno-unswitch-loops"]
        # Apple's compiler has no OpenMP of its own: one thread there.
        if platform.system() == "Darwin":
            return
        if self._accepts(["-fopenmp"], "#include <omp.h>", "omp_get_max_threads()"):
            ext.extra_compile_args += ["-fopenmp"]
            # g++'s code takes the libgomp that torch has loaded (fusedopt/extension.py), whose file
            # name may hold a hash: linked to libgomp.so.1, it would run a second one beside it.
            # clang's code calls functions that libgomp does not have: it has LLVM's runtime beside.
            if not self._accepts(["-fopenmp"], "#ifdef __clang__\n#error\n#endif"):
                ext.extra_link_args += ["-fopenmp"]
        else:
            notice(
                "the compiler refuses -fopenmp, or its OpenMP runtime is missing: building without "
                "OpenMP; a step will run on one thread (Debian: g++, or libomp-dev for clang)"
            )

    def _accepts(self, flags: list[str], include: str = "", value: str = "0") -> bool:
        """Whether the compiler compiles and links a small file with these flags, and no warning."""
        source = f"{include}\nint probe(int n) {{\n#pragma omp parallel for\n"
        source += f"for (int i = 0; i < n; ++i) n += {value};\nreturn n; }}\n"
        with tempfile.TemporaryDirectory() as folder:
            cpp, obj, out = (f"{folder}/probe.{suffix}" for suffix in ("cpp", "o", "so"))
            Path(cpp).write_text(source)
            compile_it = [*self.compiler.compiler_so_cxx, "-Werror", "-Wno-unknown-pragmas", *flags]
            commands = (
                [*compile_it, "-c", cpp, "-o", obj],
                [*self.compiler.compiler_cxx, "-shared", obj, *flags, "-o", out],
            )
            try:
                for command in commands:
                    subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                return False
        return True

    def _add_cuda(self, ext) -> None:
        if setup_cuda.asked() == "none" or os.environ.get("FUSEDOPT_SANITIZE"):
            return
        try:
            cuda = setup_cuda.Cuda()
            archs, ptx = setup_cuda.choose_archs(cuda)
            runtime = cuda.runtime()
            target = Path(self.build_temp) / "launch.cu.o"
            depends = [*HEADERS, *BUILD_FILES]
            cuda.compile("csrc/cuda/launch.cu", target, cuda.flags(archs, ptx), depends)
        except (OSError, subprocess.CalledProcessError) as error:
            if setup_cuda.required():  # not an OSError, which run() would take for a notice
                raise OptionError(f"FUSEDOPT_REQUIRE_CUDA=1, and {error}") from error
            notice(f"building without CUDA: {error}")
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
                ext.optional = True
            notice(
                f"the native extension was not built: {error}\n"
                "fusedopt: a C++17 compiler is missing or failed (Debian: apt install g++).\n"
                "fusedopt: installing without it; the reference backend will serve."
            )


class Wheel(bdist_wheel):
    """bdist_wheel whose tag says whether there is an extension in the wheel."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command != "build":
            return
        build = self.get_finalized_command("build_ext")
        if not any(build.built(ext).exists() for ext in self.distribution.ext_modules):
            self.distribution.ext_modules = []
            self.root_is_pure = True


PURE = os.environ.get("FUSEDOPT_PURE") == "1"
if PURE and os.environ.get("FUSEDOPT_REQUIRE_NATIVE") == "1":
    raise SystemExit("error: FUSEDOPT_PURE=1 and FUSEDOPT_REQUIRE_NATIVE=1 contradict each other")

compile_args, link_args = compile_flags()
extension = Pybind11Extension(
    "fusedopt._C",
    SOURCES,
    depends=[*HEADERS, *BUILD_FILES],
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
        cmdclass={"build_ext": OptionalBuildExt, "bdist_wheel": Wheel},
    )
