"""Where the reference backend serves in place of a faster one, a warning says so once, and
`python -m fusedopt` on its last line: each with the reason and what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt import FusedAdamW, FusedSGD, backends, extension, fallback
from fusedopt import __main__ as report
from fusedopt._native import _C

ROOT = Path(__file__).parent.parent
# An editable install of the source tree, which the tests run with, would offer its extension.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
REPORT = ALONE + "import runpy; runpy.run_module('fusedopt', run_name='__main__')"
STEPS = (
    ALONE
    + """
import torch, fusedopt
net = torch.nn.Linear(2, 2)
net(torch.ones(2)).sum().backward()
optimizer = fusedopt.FusedAdamW(net.parameters())
optimizer.step()
optimizer.step()
fusedopt.FusedSGD(net.parameters(), lr=0.1).step()
print(optimizer.backend_in_use)
"""
)


def run(folder: Path, script: str, *arguments: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def package(folder: Path, built: bool = False) -> Path:
    """A copy of the package as in site-packages, with or without its extension."""
    skipped = shutil.ignore_patterns("__pycache__", *([] if built else ["_C.*"]))
    shutil.copytree(ROOT / "fusedopt", folder / "fusedopt", ignore=skipped)
    shutil.copytree(ROOT / "triton_kernels", folder / "fusedopt" / "triton_kernels")
    return folder


def tree(folder: Path) -> Path:
    """A clone that was not built."""
    skipped = shutil.ignore_patterns("__pycache__", "_C.*.so")
    shutil.copytree(ROOT / "fusedopt", folder / "fusedopt", ignore=skipped)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
    return folder


def the_warning(done: Any) -> str:
    assert done.stderr.count("RuntimeWarning: ") == 1, done.stderr
    line: str = done.stderr.partition("RuntimeWarning: ")[2].splitlines()[0]
    assert line.endswith(
        'backend="reference" or FUSEDOPT_BACKEND=reference asks for it without a warning'
    )
    return line


def last_line(done: Any) -> str:
    line: str = done.stdout.splitlines()[-1]
    assert line.startswith("warning: ")
    assert "circular" not in done.stdout
    assert "partially initialized" not in done.stdout
    return line


def assert_said(folder: Path, *parts: str, **environment: str) -> None:
    """By a program and by the report, whose exit code tells it with --strict."""
    done = run(folder, STEPS, **environment)
    assert done.stdout == "reference\n"
    shown = run(folder, REPORT, **environment)
    assert shown.returncode == 0
    assert shown.stderr == ""
    for text in (the_warning(done), last_line(shown)):
        for part in ("the reference backend serves params on cpu", *parts):
            assert part in text, text
    strict = run(folder, REPORT, "--strict", "--json", **environment)
    assert strict.returncode == 1
    data = json.loads(strict.stdout)
    assert data["ok"]
    assert data["chosen"] == {"cpu": "reference"}
    assert f"warning: {data['fallback']}" == last_line(shown)


@pytest.mark.slow
def test_an_install_without_a_compiler(tmp_path: Path) -> None:
    site = package(tmp_path / "site")
    assert_said(
        tmp_path,
        "the native extension is not there: fusedopt was installed without a C++17 compiler",
        "To mend it: install a C++17 compiler (Debian: apt install g++) and then fusedopt again",
        "pip install --force-reinstall --no-deps --no-cache-dir --no-binary=fusedopt ",
        PYTHONPATH=str(site),
    )


@pytest.mark.slow
@pytest.mark.parametrize("first", ["folder", "PYTHONPATH"])
def test_a_source_tree_that_shadows_the_installed_package(tmp_path: Path, first: str) -> None:
    clone, site = tree(tmp_path / "clone"), package(tmp_path / "site", built=True)
    paths = [str(site)] if first == "folder" else [str(clone), str(site)]
    assert_said(
        clone if first == "folder" else tmp_path,
        f"the source tree {clone}, which was not built, shadows the installed package {site}",
        "To mend it: run the program from another folder, with the tree neither in PYTHONPATH",
        f"or build the tree: with a C++17 compiler (Debian: apt install g++), run `pip install -e "
        f"{clone}`",
        PYTHONPATH=os.pathsep.join(paths),
    )
    outside = run(tmp_path, STEPS, PYTHONPATH=str(site))
    assert (outside.stdout, outside.stderr) == ("cpu\n", "")


def test_a_source_tree_that_shadows_an_editable_install(tmp_path: Path) -> None:
    """Whose finder is asked after the path."""
    clone = tree(tmp_path / "clone")
    finder = f"""
from importlib.machinery import PathFinder
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(ROOT)!r}]) if name == "fusedopt" else None
sys.meta_path.append(Editable)
"""
    done = run(clone, ALONE + finder + STEPS.removeprefix(ALONE))
    assert f"shadows the installed package {ROOT / 'fusedopt'}" in the_warning(done)


@pytest.mark.slow
def test_a_package_that_shadows_another(tmp_path: Path) -> None:
    pure, site = package(tmp_path / "pure"), package(tmp_path / "site", built=True)
    assert_said(
        tmp_path,
        f"the package {pure / 'fusedopt'}, which has none, shadows the one in {site / 'fusedopt'}",
        f"To mend it: uninstall it, or take {pure} off sys.path",
        PYTHONPATH=os.pathsep.join([str(pure), str(site)]),
    )


@pytest.mark.slow
def test_a_source_tree_that_was_not_built(tmp_path: Path) -> None:
    clone = tree(tmp_path / "clone")
    assert_said(
        clone,
        f"the native extension is not there: the source tree {clone} was not built",
        f"To mend it: with a C++17 compiler (Debian: apt install g++), run `pip install -e {clone}",
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["clone", "site"])
def test_an_extension_of_another_python(tmp_path: Path, where: str) -> None:
    site = (tree if where == "clone" else package)(tmp_path / where)
    name = "_C.cpython-38-x86_64-linux-gnu.so"
    (site / "fusedopt" / name).touch()
    how = f"-e {site}" if where == "clone" else "--force-reinstall"
    assert_said(
        tmp_path,
        f"the native extension is not there: {name} was built for another Python than this one",
        f"install fusedopt again with this Python: `{sys.executable} -m pip install {how}",
        PYTHONPATH=str(site),
    )


@pytest.mark.slow
def test_an_extension_that_cannot_be_loaded(tmp_path: Path) -> None:
    site = package(tmp_path / "site")
    assert _C is not None
    (site / "fusedopt" / Path(_C.__file__).name).write_text("not a library")
    assert_said(
        tmp_path,
        "the native extension cannot be loaded (",
        "To mend it: install what it lacks, or with a C++17 compiler",
        PYTHONPATH=str(site),
    )


def test_a_backend_that_is_asked_for_says_the_remedy(tmp_path: Path) -> None:
    script = STEPS.replace(".parameters())", ".parameters(), backend='cpu')", 1)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree(tmp_path / "clone"), capture_output=True, text=True
    )
    error = done.stderr.splitlines()[-1]
    assert error.startswith("RuntimeError: backend 'cpu' cannot serve: the native extension is not")
    assert "; with a C++17 compiler (Debian: apt install g++), run `pip install -e" in error


@pytest.mark.slow
def test_the_reference_by_name_needs_no_warning(tmp_path: Path) -> None:
    site = str(package(tmp_path / "site"))
    done = run(tmp_path, STEPS, PYTHONPATH=site, FUSEDOPT_BACKEND="reference")
    assert (done.stdout, done.stderr) == ("reference\n", "")
    by_option = STEPS.replace("()).step()", "(), backend='reference').step()")
    by_option = by_option.replace(".parameters()", ".parameters(), backend='reference'")
    done = run(tmp_path, by_option, PYTHONPATH=site)
    assert (done.stdout, done.stderr) == ("reference\n", "")
    shown = run(tmp_path, REPORT, "--strict", PYTHONPATH=site, FUSEDOPT_BACKEND="reference")
    assert shown.returncode == 0
    assert "warning" not in shown.stdout


@pytest.mark.slow
def test_where_it_is_installed_from(tmp_path: Path) -> None:
    """The remedy is a command that can be pasted."""
    site = package(tmp_path / "site")
    info = site / "fusedopt-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fusedopt\nVersion: 0.1.0\n")
    vcs = {"vcs_info": {"vcs": "git", "commit_id": "ab12"}}
    for origin, where in (
        ({"url": "file:///src/fusedopt", "dir_info": {}}, "file:///src/fusedopt"),
        ({"url": "https://host/it.git", **vcs}, "git+https://host/it.git@ab12"),
        (None, "fusedopt"),
    ):
        record = info / "direct_url.json"
        record.unlink(missing_ok=True)
        if origin is not None:
            record.write_text(json.dumps(origin))
        line = last_line(run(tmp_path, REPORT, PYTHONPATH=str(site)))
        assert line.endswith(f"--no-binary=fusedopt {where}`")


# In this process: what a machine lacks is made up.


@pytest.fixture(autouse=True)
def _not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_warned", False)


@pytest.fixture
def no_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.cpu, "unavailable", lambda: "no kernels")
    monkeypatch.setattr(backends.triton, "unavailable", lambda: "no triton")
    monkeypatch.setattr(backends.cuda, "unavailable", lambda: "no nvcc")


def stepped(param: torch.Tensor, **options: Any) -> list[str]:
    """The warnings of two steps."""
    if param.grad is None:
        param.grad = torch.ones_like(param)
    optimizer = FusedSGD([param], lr=0.1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step()
    assert optimizer.backend_in_use == "reference"
    assert all(w.category is RuntimeWarning for w in caught)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


class Subclass(torch.Tensor):
    pass


@pytest.mark.usefixtures("no_cpu_kernels")
def test_once_in_a_process() -> None:
    for count in (1, 0, 0):
        assert len(stepped(nn.Parameter(torch.ones(3)))) == count


@pytest.mark.usefixtures("no_cpu_kernels")
def test_what_only_the_reference_takes_brings_no_warning() -> None:
    assert stepped(nn.Parameter(torch.ones(3)), backend="reference") == []
    assert stepped(nn.Parameter(torch.ones(3, device="meta"))) == []
    assert stepped(torch.ones(3).as_subclass(Subclass)) == []
    assert stepped(nn.Parameter(torch.ones(3, dtype=torch.float8_e4m3fn), False)) == []
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3).as_subclass(Subclass)
    assert stepped(param) == []
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert stepped(nn.Parameter(torch.ones(3))) == []
    twice = nn.Parameter(torch.ones(3))
    twice.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = FusedSGD([twice, twice], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        FusedSGD([nn.Parameter(torch.ones(3))], lr=0.1).step()  # without a gradient
    assert len(stepped(nn.Parameter(torch.ones(3)))) == 1


def test_where_a_faster_backend_runs_there_is_none() -> None:
    assert stepped(torch.ones(3).as_subclass(Subclass)) == []
    assert fallback.cause("adamw", torch.device("cpu")) == ""


@pytest.mark.usefixtures("no_cpu_kernels")
def test_as_an_error_it_comes_before_the_step() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = FusedAdamW([param])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(RuntimeWarning, match="the reference backend serves params on cpu"):
            optimizer.step()
        assert torch.equal(param, torch.ones(3))
        assert not optimizer.state
        optimizer.step()
    assert not torch.equal(param, torch.ones(3))


@pytest.mark.usefixtures("no_cpu_kernels")
def test_in_a_compiled_region() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = FusedAdamW([param])
    step = torch.compile(optimizer.step, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            step()
    found = [w for w in caught if "the reference backend serves params on cpu" in str(w.message)]
    assert len(found) == 1


CUDA = "fusedopt was built without CUDA (no nvcc, or FUSEDOPT_CUDA_ARCHS left it out)"


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_gpu_without_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.cuda, "unserved", lambda rule, device: CUDA)
    monkeypatch.setattr(backends.triton, "unavailable", lambda: "triton is not installed")
    properties = type("Properties", (), {"has_fp64": True})
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    text = fallback.cause("adamw", torch.device(device, 0))
    assert f"triton: triton is not installed; the reference backend serves params on {device}," in (
        text
    )
    assert "To mend it: install triton 3.5 or newer" in text
    assert (f"cuda: {CUDA}; " in text) == (device == "cuda")
    assert ("or fusedopt again with nvcc on PATH" in text) == (device == "cuda")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "nvcc on PATH" not in fallback.cause("adamw", torch.device(device, 0))
    monkeypatch.setattr(backends.triton, "unavailable", lambda: "")
    assert fallback.cause("adamw", torch.device(device, 0)) == ""
    monkeypatch.setattr(backends.triton, "unavailable", lambda: "the XPU device has no float64")
    properties.has_fp64 = False  # type: ignore[attr-defined]
    assert bool(fallback.cause("adamw", torch.device(device, 0))) == (device == "cuda")


def test_devices_without_any_kernel_bring_no_warning() -> None:
    for device in ("mps", "meta", "hpu"):
        assert fallback.cause("adamw", torch.device(device)) == ""


def test_the_report_where_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--strict"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert report.main(["--strict", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fallback"] is None


@pytest.mark.usefixtures("no_cpu_kernels")
def test_the_report_warns_however_often(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert report.main([]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("warning: ")


@pytest.mark.parametrize("asked", ["cuda", "nonsense"])
def test_the_report_where_the_environment_asks_for_what_is_not_there(
    asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends.cuda, "unavailable", lambda: CUDA)
    monkeypatch.setenv("FUSEDOPT_BACKEND", asked)
    assert report.main([]) == 1
    shown = capsys.readouterr().out
    assert "params on cpu are served by: none" in shown
    assert shown.splitlines()[-1].startswith(f"warning: FUSEDOPT_BACKEND is {asked!r}: ")


def test_an_entry_of_the_path_that_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "/nonexistent", __file__, *sys.path])
    found = extension._package_with_extension(besides=Path(fusedopt.__file__).parent)
    assert found is None
