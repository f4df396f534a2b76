"""The Triton driver without a GPU: the parity cases of every other driver, run by Triton's
interpreter in processes of their own; when it is imported, and why it cannot serve."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import _native, backends
from fusedopt.backends import triton
from tests.separate import ROOT, passed, run_tests

pytestmark = pytest.mark.skipif(
    _native._C is None or importlib.util.find_spec("triton") is None, reason="needs triton"
)
INTERPRETER = {"TRITON_INTERPRET": "1", "FUSEDOPT_TEST_BACKENDS": "triton"}


def test_all_parity_cases() -> None:
    runs = {  # file, how many tests there are at least
        "tests/test_numerics.py": 70,
        "tests/test_layout.py": 100,
        "tests/test_clip_amp.py": 60,
    }

    def run(file: str) -> str:
        # One core each: the other runs another file.
        chosen = (file, "-k", "triton and not 32_bits")
        return run_tests(ROOT, *chosen, OMP_NUM_THREADS="1", **INTERPRETER)

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(run, runs))
    for output, least in zip(outputs, runs.values(), strict=True):
        assert passed(output) >= least


def test_the_driver() -> None:
    output = run_tests(ROOT, "tests/test_triton_interpreted.py", measured=True, **INTERPRETER)
    assert passed(output) >= 52


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "", **environment},
        check=True,
    )
    return done.stdout


# (torch.optim.Optimizer's own constructor imports triton where it is there.)
STEP = """
import sys, torch, fusedopt
print("triton" in sys.modules)
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
optimizer = fusedopt.FusedAdamW([p])
optimizer.step()
print(optimizer.backend_in_use, "fusedopt.triton_kernels" in sys.modules)
"""


def test_triton_is_imported_only_where_it_serves() -> None:
    assert python(STEP).split() == ["False", "cpu", "False"]
    # Someone who debugs kernels of their own does not want this optimizer interpreted.
    assert python(STEP, TRITON_INTERPRET="1").split() == ["False", "cpu", "False"]
    asked = python(STEP, TRITON_INTERPRET="1", FUSEDOPT_BACKEND="triton")
    assert asked.split() == ["False", "triton", "True"]


@pytest.mark.parametrize("missing", ["triton", "device"])
def test_a_reason_is_given(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "torch finds no CUDA, ROCm or XPU device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: missing == "triton")
    if missing == "triton":
        expected = "triton is not installed"
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.unavailable() == expected
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot serve: {expected}"):
        fusedopt.FusedAdamW([torch.nn.Parameter(torch.ones(3))], backend="triton")


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


OLD = ["2.3.1", "3.0.0", "3.1.0", "3.3.0.post1", "3.4.0", "3.4.0+git663e04e8"]
NEW = ["3.5.0", "3.5.1", "3.7.1+git1234", "3.10.0", "4.0.0"]


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("version", OLD + NEW)
def test_a_version_that_is_too_old_is_a_reason(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton as installed

    monkeypatch.setattr(installed, "__version__", version)
    reason = triton.unavailable()
    if version in NEW:
        assert reason == ""
        return
    assert reason == f"triton {version} is installed; 3.5 or newer is needed"
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(RuntimeError, match=re.escape(f"'triton' cannot serve: {reason}")):
        fusedopt.FusedAdamW(params, backend="triton")
    assert "triton" not in dict(backends.candidates("auto"))


# What goes wrong before fusedopt's kernels are imported: code that is run first, the reason.
BROKEN = {
    "no-frontend": (
        "import triton; del triton.constexpr_function",
        r"the kernels cannot be imported with triton [\d.]+ \(AttributeError: .*constexpr_function"
        r".*\); 3.5 or newer is needed",
    ),
    "no-interpreter": (
        "import sys, triton; sys.modules['triton.runtime.interpreter'] = None",
        r"the kernels cannot be imported with triton [\d.]+ \(ModuleNotFoundError: .*interpreter.*",
    ),
    "an-error-of-another-kind": (
        "import triton; triton.constexpr_function = lambda f: 1 // 0",
        r"the kernels cannot be imported with triton [\d.]+ \(ZeroDivisionError: .*",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_an_error_of_the_import_is_a_reason(broken: str) -> None:
    before, expected = BROKEN[broken]
    assert re.fullmatch(expected, python(before + REASON).partition("\n")[0])


# On a machine with a GPU, by what torch says; "auto" has another backend for these params.
REASON = """
import torch, fusedopt
from fusedopt.backends import triton
torch.cuda.is_available = lambda: True
print(triton.unavailable())
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
optimizer = fusedopt.FusedAdamW([p])
optimizer.step()
assert optimizer.backend_in_use == "cpu"
"""


def test_a_triton_that_cannot_be_imported_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text('raise ImportError("libtriton.so: no such file")')
    (tmp_path / "triton-3.4.0.dist-info").mkdir()
    (tmp_path / "triton-3.4.0.dist-info" / "METADATA").write_text("Name: triton\nVersion: 3.4.0\n")
    assert python(REASON, PYTHONPATH=str(tmp_path)) == (
        "triton 3.4.0 cannot be imported (ImportError: libtriton.so: no such file); "
        "3.5 or newer is needed\n"
    )


@pytest.mark.usefixtures("pretended_gpu")
def test_a_module_in_place_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    stub: Any = ModuleType("triton")  # has no spec, which find_spec takes for an error
    stub.__version__ = "3.4.0"
    monkeypatch.setitem(sys.modules, "triton", stub)
    assert triton.unavailable() == "triton 3.4.0 is installed; 3.5 or newer is needed"
    del stub.__version__
    assert "AttributeError" in triton.unavailable()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton.unavailable() == "triton is not installed"
