"""The tuning of the Triton driver, with a pretended GPU: what is measured, kept and agreed upon."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedopt import _native
from tests.separate import ROOT

pytestmark = pytest.mark.skipif(
    _native._C is None or importlib.util.find_spec("triton") is None, reason="needs triton"
)
CUDA = torch.device("cuda", 1)


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


@pytest.mark.parametrize("error", [RuntimeError("no compiler"), ValueError("no such block")])
def test_where_nothing_can_be_measured_the_default_serves_and_says_so(
    tune: Any, error: Exception, tmp_path: Path
) -> None:
    def measure(device: torch.device, candidates: Any) -> Any:
        raise error

    with pytest.warns(UserWarning, match=rf"cannot measure .*{error}.*{tune.DEFAULT.block}"):
        assert tune.config_for("adamw", CUDA, measure) == tune.DEFAULT
    assert not list(tmp_path.iterdir())  # the next process may be luckier
    assert tune.config_for("adamw", CUDA, Measure()) == tune.CANDIDATES[2]


def test_the_choice_is_among_those_that_work(tune: Any, tmp_path: Path) -> None:
    def measure(device: torch.device, candidates: Any) -> Any:
        return {candidates[3]: 2.0, candidates[1]: 1.0}

    assert tune.config_for("adamw", CUDA, measure) == tune.CANDIDATES[1]
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())["adamw"]["milliseconds"]) == 2


class Clock:
    """A pretended torch.cuda: its current device, and the time of each step by its events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.now = 0.0
        self.recorded_on: list[int] = []
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                clock.recorded_on.append(clock.current)
                self.at = clock.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        @contextmanager
        def device(device: torch.device) -> Any:
            before, self.current = self.current, device.index
            yield
            self.current = before

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", device)

    def step(self, milliseconds: float, fails_at: int = 0) -> Any:
        """A step that takes this long, on the params' device; its n-th call raises."""
        calls = 0

        def step() -> None:
            nonlocal calls
            calls += 1
            assert self.current == CUDA.index
            if calls == fails_at:
                raise RuntimeError("out of resource: shared memory")
            self.now += milliseconds

        return step


def test_events_are_those_of_the_params_device(tune: Any, monkeypatch: Any) -> None:
    clock = Clock(monkeypatch)
    a, b = tune.CANDIDATES[:2]
    assert tune.median_times({a: clock.step(3.0), b: clock.step(2.0)}, CUDA) == {a: 3.0, b: 2.0}
    assert set(clock.recorded_on) == {CUDA.index}
    assert clock.current == 0  # as it was


@pytest.mark.parametrize("fails_at", [1, 2, 9])
def test_a_candidate_that_fails_is_left_out(tune: Any, fails_at: int, monkeypatch: Any) -> None:
    clock = Clock(monkeypatch)
    a, b, c = tune.CANDIDATES[:3]
    steps = {a: clock.step(3.0), b: clock.step(1.0, fails_at), c: clock.step(2.0)}
    with pytest.warns(UserWarning, match=f"block={b.block}.*out of resource: shared memory"):
        assert tune.median_times(steps, CUDA) == {a: 3.0, c: 2.0}
    assert clock.current == 0


def test_all_candidates_fail(tune: Any, monkeypatch: Any) -> None:
    clock = Clock(monkeypatch)

    def measure(device: torch.device, candidates: Any) -> Any:
        return tune.median_times({c: clock.step(1.0, fails_at=1) for c in candidates}, device)

    with pytest.warns(UserWarning, match="fusedopt") as caught:
        assert tune.config_for("adamw", CUDA, measure) == tune.DEFAULT
    assert len(caught) == len(tune.CANDIDATES) + 1
    assert f"{tune.DEFAULT} serves" in str(caught[-1].message)


# Processes that begin together. Each finds another candidate fastest, and says which one it took
# and how often it measured.
PROCESS = """
import sys, time
import torch
from fusedopt.triton_kernels import tune

torch.cuda.get_device_name = lambda device: "A GPU"
number, rule = int(sys.argv[1]), sys.argv[2]
calls = 0

def measure(device, candidates):
    global calls
    calls += 1
    time.sleep(0.5)
    return {c: abs(i - number) + 1.0 for i, c in enumerate(candidates)}

print("ready", flush=True)
sys.stdin.readline()
best = tune.config_for(rule, torch.device("cuda", number), measure)
print(best.block, best.warps, calls, flush=True)
"""


def together(folder: Path, rules: list[str]) -> list[list[int]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i), rule],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={"PATH": "", "FUSEDOPT_CACHE": str(folder)},
        )
        for i, rule in enumerate(rules)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [list(map(int, output.split())) for output in outputs]


def test_processes_that_tune_at_once_choose_alike(tmp_path: Path) -> None:
    results = together(tmp_path, ["adamw"] * 4)
    assert len({(block, warps) for block, warps, _ in results}) == 1
    assert sorted(calls for _, _, calls in results) == [0, 0, 0, 1]
    assert len(list(tmp_path.iterdir())) == 1


def test_processes_that_tune_at_once_keep_each_others_entries(tmp_path: Path) -> None:
    rules = ["adamw", "sgd", "lion", "adan"]
    results = together(tmp_path, rules)
    assert [calls for _, _, calls in results] == [1] * 4
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert {
        rule: (block, warps) for rule, (block, warps, _) in zip(rules, results, strict=True)
    } == {rule: (entry["block"], entry["warps"]) for rule, entry in kept.items()}


def test_a_lock_that_a_dead_process_left_holds_nobody(tune: Any, tmp_path: Path) -> None:
    tune.cache_file(CUDA).with_suffix(".lock").write_text("")
    assert tune.config_for("adamw", CUDA, Measure()) == tune.CANDIDATES[2]
    assert [tune.cache_file(CUDA)] == list(tmp_path.iterdir())


def as_ranks(monkeypatch: pytest.MonkeyPatch, world: int, here: str | None) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    if here is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)


def test_who_waits_too_long(tune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "PATIENCE", 0.1)
    with tune._lock(tune.cache_file(CUDA)) as locked:
        assert locked
        as_ranks(monkeypatch, 2, "2")
        with pytest.warns(UserWarning, match="by which ranks agree"):
            assert tune.config_for("adamw", CUDA, Measure()) == tune.DEFAULT
        as_ranks(monkeypatch, 1, None)  # alone: need not agree with anyone
        assert tune.config_for("adamw", CUDA, Measure()) == tune.CANDIDATES[2]
    assert [tune.cache_file(CUDA)] == list(tmp_path.iterdir())


def test_threads_measure_once(tune: Any) -> None:
    measure, found = Measure(), []
    threads = [
        threading.Thread(target=lambda: found.append(tune.config_for("adamw", CUDA, measure)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tune.CANDIDATES[2]] * 4
    assert measure.calls == 1


@pytest.mark.parametrize("here", ["2", None, "1"])
def test_ranks_on_several_machines_take_the_default(
    tune: Any, here: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each machine would choose by its own times, also by those that it has kept: the last bits of
    # the norm would differ between replicas.
    measure = Measure()
    tune.config_for("adamw", CUDA, measure)
    as_ranks(monkeypatch, 4, here)
    assert tune.config_for("adamw", CUDA, measure) == tune.DEFAULT
    assert measure.calls == 1
    as_ranks(monkeypatch, 4, "4")
    assert tune.config_for("adamw", CUDA, measure) == tune.CANDIDATES[2]


def test_ranks_agree_on_what_could_not_be_measured(
    tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(device: torch.device, candidates: Any) -> Any:
        raise torch.cuda.OutOfMemoryError

    as_ranks(monkeypatch, 2, "2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tune.config_for("adamw", CUDA, measure) == tune.DEFAULT
    other = Measure()  # the other rank, which has the memory
    assert tune.config_for("adamw", CUDA, other) == tune.DEFAULT
    assert other.calls == 0
    as_ranks(monkeypatch, 1, None)  # another run
    assert tune.config_for("adamw", CUDA, other) == tune.CANDIDATES[2]


def test_pending_work_is_waited_for_before_the_lock(
    tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A collective that waits for a rank which waits for the lock would never end.
    seen: list[Any] = []
    lock = tune._lock
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    monkeypatch.setattr(tune, "_lock", lambda path: seen.append("lock") or lock(path))
    tune.config_for("adamw", CUDA, Measure())
    assert seen == [CUDA, "lock"]
    tune.config_for("adamw", CUDA, Measure())
    assert len(seen) == 2  # kept: no wait
