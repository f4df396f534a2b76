"""setup.py on a small source tree, with compilers that are scripts: which flags and architectures
it chooses, and what it builds anew when they change."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

# Says in its bytes how it was compiled.
SOURCE = r"""
#include <Python.h>
#ifdef _OPENMP
#define OPENMP "yes"
#else
#define OPENMP "no"
#endif
#ifdef __SANITIZE_ADDRESS__
#define SANITIZED "yes"
#else
#define SANITIZED "no"
#endif
#ifndef COMPILER
#define COMPILER "plain"
#endif
extern "C" const char* archs();
#ifndef FUSEDOPT_CUDA
extern "C" const char* archs() { return "[archs=none]"; }
#endif
extern "C" const char* told() {
  return "[openmp=" OPENMP "][sanitized=" SANITIZED "][compiler=" COMPILER "]";
}
PyMODINIT_FUNC PyInit__C() { return archs() && told() ? nullptr : nullptr; }
"""

NVCC = r"""#!/bin/sh
case "$*" in
  *--dryrun*) echo '#$ TOP={home}/cuda' >&2; exit 0 ;;
  *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88'; exit 0 ;;
  *--list-gpu-code*) printf 'sm_%s\n' {known}; exit 0 ;;
  *--list-gpu-arch*) printf 'compute_%s\n' {known}; exit 0 ;;
esac
echo "$*" >> {home}/nvcc.log
{fail}
for word in "$@"; do
  case "$word" in -DFUSEDOPT_CUDA_ARCHS=*) archs=${{word#*=}} ;; esac
  test "$last" = -o && out=$word
  last=$word
done
echo "extern \"C\" const char* archs() {{ return \"[archs=\" $archs \"]\"; }}" > {home}/stub.cpp
exec g++ -fPIC -c {home}/stub.cpp -o "$out"
"""


VERSION_99 = """#!/bin/sh
case "$*" in *--version) echo 99 ;; esac
exec g++ "$@"
"""
NO_LIBGOMP = """#!/bin/sh
case " $* " in *" -shared "*" -fopenmp "*) exit 1 ;; esac
exec g++ "$@"
"""


class Tree:
    """A copy of setup.py with a small csrc, and programs that come first on PATH."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = home / "tree"
        self.bin = home / "bin"
        for folder in ("tree/csrc/cuda", "tree/fusedopt", "bin", "cuda/lib64"):
            (home / folder).mkdir(parents=True)
        for name in ("setup.py", "setup_cuda.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.root)
        (self.root / "csrc/bindings.cpp").write_text(SOURCE)
        (self.root / "csrc/cuda/launch.cu").write_text("// compiled by the script\n")
        subprocess.run(["ar", "rc", str(home / "cuda/lib64/libcudart_static.a")], check=True)
        self.gpus()
        self.nvcc()

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def nvcc(self, known: str = "75 80 90 100 120", fail: str = "") -> None:
        self.program("nvcc", NVCC.format(home=self.home, known=known, fail=fail))

    def gpus(self, *capabilities: str) -> None:
        lines = "".join(f"echo '{c}'\n" for c in capabilities)
        self.program("nvidia-smi", f"#!/bin/sh\n{lines or 'exit 9'}\n")

    def cxx(self, refused: str = "no such option", extra: str = "") -> str:
        """A C++ compiler that refuses an option, or adds some."""
        refuse = f'case " $* " in *" {refused} "*) echo refused >&2; exit 1 ;; esac'
        return str(self.program("cxx", f'#!/bin/sh\n{refuse}\nexec g++ {extra} "$@"\n'))

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDOPT_")}
        for name in ("CC", "CXX", "NVCC", "CUDA_HOME"):
            clean.pop(name, None)
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", **environment}
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext"],
            cwd=self.root,
            env={**clean, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def build(self, **environment: str) -> str:
        """All that a build prints."""
        done = self.run(**environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def refused(self, **environment: str) -> str:
        """What a build that fails prints; no traceback."""
        done = self.run(**environment)
        assert done.returncode != 0, done.stdout
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr

    @property
    def extension(self) -> Path | None:
        return next(iter(self.root.glob("build/lib*/fusedopt/_C*.so")), None)

    def told(self, key: str) -> str:
        assert self.extension is not None
        found = re.search(rf"\[{key}=([^]]*)\]".encode(), self.extension.read_bytes())
        assert found is not None
        return found[1].decode()

    @property
    def gencode(self) -> list[str]:
        """What each run of nvcc was to compile for: "90:sm_90" is code, "90:compute_90" PTX."""
        log = self.home / "nvcc.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [" ".join(":".join(m) for m in re.findall(r"arch=compute_(\w+),code=(\w+)", line))
                for line in lines]  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize(
    ("asked", "compiled", "told"),
    [
        ("80 90", "80:sm_80 90:sm_90 90:compute_90", "80 90 +PTX"),
        ("9.0", "90:sm_90 90:compute_90", "90 +PTX"),
        ("sm_90", "90:sm_90 90:compute_90", "90 +PTX"),
        ("90a", "90a:sm_90a 90:compute_90", "90a +PTX"),
        ("9.0a;8.0", "80:sm_80 90a:sm_90a 90:compute_90", "80 90a +PTX"),
        ("100f,90a", "90a:sm_90a 100f:sm_100f 100:compute_100", "90a 100f +PTX"),
        ("12.0, 10.0;8.0", "80:sm_80 100:sm_100 120:sm_120 120:compute_120", "80 100 120 +PTX"),
        ("8.0+PTX 9.0+PTX", "80:sm_80 90:sm_90 80:compute_80 90:compute_90", "80 90 +PTX"),
        ("8.0+PTX;9.0", "80:sm_80 90:sm_90 80:compute_80 90:compute_90", "80 90 +PTX"),
        ("90 9.0 sm_90 90+ptx", "90:sm_90 90:compute_90", "90 +PTX"),
        (" 100\t80\n", "80:sm_80 100:sm_100 100:compute_100", "80 100 +PTX"),
        ("90 90a", "90:sm_90 90a:sm_90a 90:compute_90", "90 90a +PTX"),
    ],
)
def test_architectures(asked: str, compiled: str, told: str, tree: Tree) -> None:
    tree.build(FUSEDOPT_CUDA_ARCHS=asked, FUSEDOPT_REQUIRE_CUDA="1")
    assert tree.gencode == [compiled]
    assert tree.told("archs") == told


@pytest.mark.parametrize(
    "asked",
    [
        "sm90x",
        "9",
        "hopper",
        "90 none",
        "all",
        "90b",
        "9.00",
        "compute-90",
        "80 9O",
        "-90",
        "native 90",
    ],
)
def test_what_is_no_architecture(asked: str, tree: Tree) -> None:
    message = tree.refused(FUSEDOPT_CUDA_ARCHS=asked)
    assert (
        "error: FUSEDOPT_CUDA_ARCHS must be none, native, or architectures such as '80 90'"
        in message
    )
    # Without nvcc, too: it is a mistake all the same.
    assert "FUSEDOPT_CUDA_ARCHS must be" in tree.refused(FUSEDOPT_CUDA_ARCHS=asked, NVCC="/none")


def test_an_architecture_that_nvcc_does_not_know(tree: Tree) -> None:
    shown = tree.build(FUSEDOPT_CUDA_ARCHS="70 8.0+PTX 90")
    assert re.search("nvcc does not compile for 70, only for 75, 80, 90, 100, 120; left out", shown)
    assert tree.gencode == ["80:sm_80 90:sm_90 80:compute_80 90:compute_90"]
    assert tree.told("archs") == "80 90 +PTX"
    message = tree.refused(FUSEDOPT_CUDA_ARCHS="70 90", FUSEDOPT_REQUIRE_CUDA="1")
    assert re.search("error: FUSEDOPT_CUDA_ARCHS: .* does not compile for 70, only for", message)
    message = tree.refused(FUSEDOPT_CUDA_ARCHS="130a 70")
    assert re.search("error: FUSEDOPT_CUDA_ARCHS: .* does not compile for 70, 130a", message)


def test_an_nvcc_that_does_not_list_what_it_knows(tree: Tree) -> None:
    text = (tree.bin / "nvcc").read_text()
    tree.program("nvcc", re.sub(r".*--list-gpu-.*\n", "", text))
    tree.build(FUSEDOPT_CUDA_ARCHS="70")
    assert tree.gencode[-1] == "70:sm_70 70:compute_70"


@pytest.mark.parametrize(
    ("gpus", "compiled", "noticed"),
    [
        ([], "80:sm_80 90:sm_90 100:sm_100 120:sm_120 120:compute_120", ""),
        (["9.0", "8.0", "9.0"], "80:sm_80 90:sm_90 90:compute_90", ""),
        (["7.0", "9.0"], "90:sm_90 90:compute_90", "does not compile for 70, .*; left out"),
        (["13.0"], "120:sm_120 120:compute_120", "not know sm_130: PTX of 120 will serve"),
        (["13.0", "8.0"], "80:sm_80 120:sm_120 120:compute_120", "not know sm_130"),
        (["[N/A]"], "80:sm_80 90:sm_90 100:sm_100 120:sm_120 120:compute_120", ""),
    ],
)
def test_the_gpus_of_this_machine(gpus: list[str], compiled: str, noticed: str, tree: Tree) -> None:
    tree.gpus(*gpus)
    shown = tree.build(FUSEDOPT_REQUIRE_CUDA="1")
    assert tree.gencode == [compiled]
    assert re.search(noticed, shown) if noticed else "left out" not in shown


def test_only_for_the_gpus_of_this_machine(tree: Tree) -> None:
    shown = tree.build(FUSEDOPT_CUDA_ARCHS="native")
    assert "fusedopt: building without CUDA: nvidia-smi finds no GPU on this machine" in shown
    assert (tree.told("archs"), tree.gencode) == ("none", [])
    message = tree.refused(FUSEDOPT_CUDA_ARCHS="native", FUSEDOPT_REQUIRE_CUDA="1")
    assert "FUSEDOPT_REQUIRE_CUDA=1, and nvidia-smi finds no GPU" in message
    tree.gpus("9.0", "8.0")
    tree.build(FUSEDOPT_CUDA_ARCHS="native", FUSEDOPT_REQUIRE_CUDA="1")
    assert tree.gencode == ["80:sm_80 90:sm_90 90:compute_90"]


def test_says_what_it_compiles(tree: Tree) -> None:
    shown = tree.build(FUSEDOPT_CUDA_ARCHS="80 90").splitlines()
    cuda = "fusedopt: compiling csrc/cuda/launch.cu for sm_80, sm_90, compute_90"
    assert shown.index(cuda) < shown.index("fusedopt: compiling csrc/bindings.cpp")


def test_an_older_nvcc_compiles_what_it_knows_of_the_default(tree: Tree) -> None:
    tree.nvcc("70 80 90")
    assert "does not compile for 100, 120, only for 70, 80, 90; left out" in tree.build()
    assert tree.gencode == ["80:sm_80 90:sm_90 90:compute_90"]


def test_no_gpu_that_nvcc_knows(tree: Tree) -> None:
    tree.gpus("7.0")
    shown = tree.build()
    assert re.search("building without CUDA: .* does not compile for 70", shown)
    assert tree.told("archs") == "none"
    assert "does not compile for 70" in tree.refused(FUSEDOPT_REQUIRE_CUDA="1")


def test_a_failing_or_missing_nvcc(tree: Tree) -> None:
    tree.nvcc(fail="exit 3")
    assert "building without CUDA: " in tree.build(FUSEDOPT_CUDA_ARCHS="90")
    assert tree.told("archs") == "none"
    message = tree.refused(FUSEDOPT_CUDA_ARCHS="90", FUSEDOPT_REQUIRE_CUDA="1")
    assert "error: FUSEDOPT_REQUIRE_CUDA=1, and Command" in message
    assert "building without CUDA: nvcc was not found (/none)" in tree.build(NVCC="/none")
    message = tree.refused(NVCC="/none", FUSEDOPT_REQUIRE_CUDA="1")
    assert "error: FUSEDOPT_REQUIRE_CUDA=1, and nvcc was not found (/none)" in message
    tree.nvcc()
    tree.build(FUSEDOPT_CUDA_ARCHS="90")
    assert tree.told("archs") == "90 +PTX"


def test_a_build_folder_of_other_options(tree: Tree) -> None:
    """Everything that an option changes is built anew, and nothing else."""
    tree.build(FUSEDOPT_CUDA_ARCHS="80")
    assert tree.told("archs") == "80 +PTX"

    def unchanged(**environment: str) -> None:
        assert tree.extension is not None
        before, runs = tree.extension.stat().st_mtime_ns, len(tree.gencode)
        tree.build(**environment)
        assert tree.extension is not None
        assert (tree.extension.stat().st_mtime_ns, len(tree.gencode)) == (before, runs)

    unchanged(FUSEDOPT_CUDA_ARCHS="80")
    unchanged(FUSEDOPT_CUDA_ARCHS="8.0")  # another word for the same
    for archs, told in (
        ("90", "90 +PTX"),
        ("none", "none"),
        ("90", "90 +PTX"),
        ("80 90", "80 90 +PTX"),
        ("none", "none"),
        ("80 90", "80 90 +PTX"),
    ):
        tree.build(FUSEDOPT_CUDA_ARCHS=archs)
        assert tree.told("archs") == told
        unchanged(FUSEDOPT_CUDA_ARCHS=archs)
    # Back from "none" nvcc's object is still that of the same architectures.
    assert [line.split()[0] for line in tree.gencode] == ["80:sm_80", "90:sm_90", "80:sm_80"]

    tree.build(FUSEDOPT_CUDA_ARCHS="none", FUSEDOPT_SANITIZE="address")
    assert tree.told("sanitized") == "yes"
    tree.build(FUSEDOPT_CUDA_ARCHS="none")
    assert tree.told("sanitized") == "no"
    tree.build(FUSEDOPT_CUDA_ARCHS="80 90", FUSEDOPT_SANITIZE="address")
    assert (tree.told("sanitized"), tree.told("archs")) == ("yes", "none")

    other = tree.cxx(extra="""-DCOMPILER='"other"'""")
    tree.build(FUSEDOPT_CUDA_ARCHS="none", CXX=other)
    assert (tree.told("compiler"), tree.told("sanitized")) == ("other", "no")
    tree.build(FUSEDOPT_CUDA_ARCHS="none")
    assert tree.told("compiler") == "plain"

    # The same command, but another compiler behind it.
    tree.build(FUSEDOPT_CUDA_ARCHS="none", CXX=other)
    tree.program("cxx", VERSION_99)
    tree.build(FUSEDOPT_CUDA_ARCHS="none", CXX=other)
    assert tree.told("compiler") == "plain"


def test_changed_sources(tree: Tree) -> None:
    tree.build(FUSEDOPT_CUDA_ARCHS="80")
    source = tree.root / "csrc/cuda/launch.cu"
    os.utime(source, (source.stat().st_atime, source.stat().st_mtime + 100))
    tree.build(FUSEDOPT_CUDA_ARCHS="80")
    assert len(tree.gencode) == 2


def test_a_failed_build_leaves_no_extension_of_an_earlier_one(tree: Tree) -> None:
    tree.build(FUSEDOPT_CUDA_ARCHS="none")
    shown = tree.build(FUSEDOPT_CUDA_ARCHS="none", CXX="/nonexistent/c++", CC="/nonexistent/cc")
    assert "the native extension was not built" in shown
    assert "OpenMP" not in shown  # that is not what is wrong
    assert tree.extension is None
    tree.build(FUSEDOPT_CUDA_ARCHS="none")
    assert tree.extension is not None


@pytest.mark.parametrize("refused", ["-fopenmp", "linking", "no omp.h"])
def test_a_compiler_without_openmp(refused: str, tree: Tree) -> None:
    cxx = tree.cxx("-fopenmp")
    if refused == "linking":
        cxx = str(tree.program("cxx", NO_LIBGOMP))
    elif refused == "no omp.h":
        (tree.home / "omp").mkdir()
        (tree.home / "omp/omp.h").write_text("#error not here\n")
        cxx = tree.cxx(extra=f"-I{tree.home}/omp")
    shown = tree.build(FUSEDOPT_CUDA_ARCHS="none", CXX=cxx, FUSEDOPT_REQUIRE_NATIVE="1")
    assert "building without OpenMP; a step will run on one thread" in shown
    assert tree.told("openmp") == "no"
    shown = tree.build(FUSEDOPT_CUDA_ARCHS="none", FUSEDOPT_REQUIRE_NATIVE="1")
    assert "OpenMP" not in shown
    assert tree.told("openmp") == "yes"


def test_a_flag_of_gcc_alone(tree: Tree) -> None:
    flag = "-fno-unswitch-loops"
    assert flag in tree.build(FUSEDOPT_CUDA_ARCHS="none")
    shown = tree.build(FUSEDOPT_CUDA_ARCHS="none", CXX=tree.cxx(flag), FUSEDOPT_REQUIRE_NATIVE="1")
    assert flag not in shown


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang is not installed")
def test_clang(tree: Tree) -> None:
    shown = tree.build(FUSEDOPT_CUDA_ARCHS="none", CXX="clang++", FUSEDOPT_REQUIRE_NATIVE="1")
    assert "-fno-unswitch-loops" not in shown  # a warning of clang, in every file
    assert (tree.told("openmp") == "yes") == ("building without OpenMP" not in shown)
