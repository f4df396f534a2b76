"""The Triton driver without a GPU: the parity cases of every other driver, run by Triton's
interpreter in processes of their own; when it is imported, and why it cannot serve; its tuning."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
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
    assert passed(output) >= 19


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


class FakeKernel:
    """What the compiler returns, for a machine without a GPU; launching it is recorded."""

    run = None
    n_regs = 97
    metadata = SimpleNamespace(shared=4096)

    def __init__(self, log: list[Any], options: dict[str, Any]) -> None:
        self.log, self.options = log, options

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.log.append((grid[0], self.options, arguments))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any], tuple[Any, ...]]]:
    """The launches on a pretended H100: programs, compiler options, arguments."""
    from fusedopt.triton_kernels import launch

    log: list[Any] = []

    def warmup(*arguments: Any, grid: Any, **options: Any) -> FakeKernel:
        return FakeKernel(log, options)

    limits = SimpleNamespace(
        multi_processor_count=132,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        shared_memory_per_multiprocessor=233_472,
    )
    monkeypatch.setattr(launch, "target", lambda: "cuda")
    monkeypatch.setattr(launch, "step_kernel", SimpleNamespace(warmup=warmup))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limits)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return log


def table(chunks: int) -> Any:
    from fusedopt.triton_kernels.launch import Table

    return Table(16, 32, 48, 64, row_count=3, chunk_count=chunks, kinds=(5,))


def test_the_launches_of_a_step_on_a_gpu(h100: Any) -> None:
    from fusedopt.triton_kernels.launch import DEFAULT, Launcher, Scalars

    launcher = Launcher("adamw", CUDA)
    for chunks in (7, 10_000):
        for clip in (False, True):
            launcher.step(table(chunks), Scalars(max_norm=1.0), 1 << 20, clip, False)
    # One launch each; with a norm, no more programs than run at once: two on a multiprocessor, at
    # 97 registers of 256 threads.
    assert [programs for programs, _, _ in h100] == [7, 7, 264, 264]
    for (_, options, arguments), clip in zip(h100, (False, True) * 2, strict=True):
        assert options.get("launch_cooperative_grid", False) == clip
        assert options["num_warps"] == DEFAULT.warps
        assert not options["enable_fp_fusion"]
        assert arguments[-4:] == (clip, True, clip, False)
    h100.clear()
    launcher.norm(table(7), 1 << 20, 1 << 21)
    launcher.apply(table(7), Scalars(), 1 << 20, 1 << 21, True, True)
    assert [arguments[-4:] for _, _, arguments in h100] == [
        (True, False, False, False),
        (False, True, True, True),
    ]
    assert all("launch_cooperative_grid" not in options for _, options, _ in h100)


def test_two_launches_where_programs_cannot_wait(h100: Any, monkeypatch: Any) -> None:
    from fusedopt.triton_kernels import launch

    monkeypatch.setattr(launch, "target", lambda: "xpu")
    launcher = launch.Launcher("sgd", CUDA)
    launcher.step(table(7), launch.Scalars(max_norm=1.0), 1 << 20, True, False)
    assert [arguments[-4:-1] for _, _, arguments in h100] == [
        (True, False, False),
        (False, True, True),
    ]
    squared = {arguments[9] for _, _, arguments in h100}
    assert squared == {(1 << 20) + 8 * 3}  # a word of the workspace
    assert all("maxnreg" not in options for _, options, _ in h100)
