"""The Triton driver without a GPU: the parity cases of every other driver, run by Triton's
interpreter in processes of their own; when it is imported, and why it cannot serve; its tuning."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import _native
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
    assert passed(output) >= 20


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
print(optimizer._backend_in_use, "fusedopt.triton_kernels" in sys.modules)
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


class Measure:
    """Stands in for the measured run: the third candidate is the fastest."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, device: torch.device, candidates: Any) -> Any:
        self.calls += 1
        return {c: abs(i - 2) + 1.0 for i, c in enumerate(candidates)}


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    from fusedopt.triton_kernels import tune

    monkeypatch.setenv("FUSEDOPT_CACHE", str(tmp_path))
    monkeypatch.delenv("FUSEDOPT_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU (80 GB)")
    return tune


CUDA = torch.device("cuda", 0)


def test_tuning_is_measured_once_and_kept(tune: Any, tmp_path: Path) -> None:
    measure = Measure()
    best = tune.config_for("adamw", CUDA, measure)
    assert best == tune.CANDIDATES[2]
    assert tune.config_for("adamw", CUDA, measure) == best
    assert measure.calls == 1
    assert tune.config_for("sgd", CUDA, measure) == best
    assert measure.calls == 2
    (file,) = tmp_path.iterdir()
    assert "A-GPU-80-GB-" in file.name
    kept = json.loads(file.read_text())
    assert sorted(kept) == ["adamw", "sgd"]
    assert kept["adamw"]["milliseconds"][f"{best.block}x{best.warps}"] == 1.0


@pytest.mark.parametrize("content", ["", "[]", '{"adamw": {"block": 7, "warps": 3}}', "\xff{"])
def test_a_damaged_cache_is_measured_anew(tune: Any, content: str) -> None:
    tune.cache_file(CUDA).write_text(content)
    measure = Measure()
    assert tune.config_for("adamw", CUDA, measure) == tune.CANDIDATES[2]
    assert tune.config_for("adamw", CUDA, measure) == tune.CANDIDATES[2]
    assert measure.calls == 1


@pytest.mark.parametrize("word", ["0", "off", "False"])
def test_tuning_can_be_switched_off(
    tune: Any, word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FUSEDOPT_AUTOTUNE", word)
    measure = Measure()
    assert tune.config_for("adamw", CUDA, measure) == tune.DEFAULT
    assert measure.calls == 0
    assert not list(tmp_path.iterdir())


def test_tuning_without_memory_or_a_folder(
    tune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(device: torch.device, candidates: Any) -> Any:
        raise torch.cuda.OutOfMemoryError

    assert tune.config_for("adamw", CUDA, measure) == tune.DEFAULT
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDOPT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep its Triton tuning"):
        assert tune.config_for("adamw", CUDA, Measure()) == tune.CANDIDATES[2]
