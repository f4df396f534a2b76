"""Promise 19: an optimizer is rewound, and a saved or killed run goes on bitwise."""

from __future__ import annotations

import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedopt import FusedOptimizer
from tests import life
from tests.helpers import OPTIONS, TORCH, assert_same, build, contents, groups_of, make_params, run
from tests.life import put_back, restored, through_a_file

backend, cls, driver = life.backend, life.cls, life.driver


def test_loading_into_a_used_optimizer_rewinds_it(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(3))
    saved, values = deepcopy(optimizer.state_dict()), contents(optimizer)["params"]
    start = contents(optimizer)
    run(optimizer, range(3, 6))
    first = contents(optimizer)
    optimizer.param_groups[0]["lr"] = 0.9
    run(optimizer, [77])
    optimizer.load_state_dict(saved)
    put_back(optimizer, values)
    assert_same(contents(optimizer), start)
    run(optimizer, range(3, 6))
    assert_same(contents(optimizer), first)


def test_a_checkpoint_from_before_the_first_step(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    saved, values = through_a_file(optimizer.state_dict()), contents(optimizer)["params"]
    run(optimizer, range(2))
    first = contents(optimizer)
    optimizer.load_state_dict(saved)
    assert not optimizer.state
    put_back(optimizer, values)
    run(optimizer, range(2))
    assert_same(contents(optimizer), first)


def test_a_file_resumes_bitwise(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(3))
    resumed = restored(optimizer, through_a_file(optimizer.state_dict()))
    assert_same(contents(resumed), contents(optimizer))
    for subject in (optimizer, resumed):
        run(subject, range(3, 6))
    assert_same(contents(resumed), contents(optimizer))


def test_a_state_dict_is_plain(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend, max_grad_norm=1.0)
    run(optimizer, [0])
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    oracle = TORCH[cls](groups_of(make_params()), **OPTIONS[cls])
    run(oracle, [0])
    expected = oracle.state_dict()
    assert saved["state"].keys() == expected["state"].keys()
    for entry, other in zip(saved["state"].values(), expected["state"].values(), strict=True):
        assert entry.keys() == other.keys()
        for key, value in entry.items():
            assert type(value) is Tensor
            assert (value.shape, value.dtype) == (other[key].shape, other[key].dtype)
            assert value.device.type == "cpu"
            assert not value.requires_grad
    for group, other in zip(saved["param_groups"], expected["param_groups"], strict=True):
        assert set(other) <= set(group)
        assert group["params"] == other["params"]


# Each combination of class and backend trains a model of its own, and writes all of them into one
# checkpoint after each step: aside, then renamed.
TRAINER = """
import os, sys
import torch
import fusedopt

folder, name, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
path = os.path.join(folder, name)
torch.set_num_threads(1)
OPTIONS = {
    fusedopt.FusedAdamW: {"lr": 0.01, "amsgrad": True, "max_grad_norm": 0.7},
    fusedopt.FusedAdam: {"lr": 0.01, "weight_decay": 0.1},
    fusedopt.FusedSGD: {"lr": 0.05, "momentum": 0.9, "dampening": 0.2},
}
runs = []
for cls, options in OPTIONS.items():
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(13, 31), torch.nn.Tanh(), torch.nn.Linear(31, 5).bfloat16()
        )
        try:
            optimizer = cls(model.parameters(), backend=backend, **options)
        except RuntimeError:  # without the native extension
            continue
        runs.append((model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)))
start = 0
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    start = saved["number"] + 1
    for parts, states in zip(runs, saved["runs"], strict=True):
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
print("started at", start, flush=True)
for number in range(start, last):
    for model, optimizer, scheduler in runs:
        x = torch.randn(8, 13, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model[2](model[1](model[0](x)).bfloat16()).float().square().sum().backward()
        optimizer.step()
        scheduler.step()
    states = [[part.state_dict() for part in parts] for parts in runs]
    torch.save({"number": number, "runs": states}, path + ".aside")
    os.replace(path + ".aside", path)
    print(number, flush=True)
"""


@pytest.fixture
def threads() -> Iterator[None]:
    """The trainer sets the number of threads, here and in its own processes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_killed_run_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)

    def start(name: str, last: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(tmp_path), name, str(last)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    victim = start("killed", 10**9)
    assert victim.stdout is not None
    for line in victim.stdout:
        if line.strip() == "2":
            break
    time.sleep(random.Random().uniform(0.0, 0.2))
    victim.send_signal(signal.SIGKILL)
    victim.stdout.close()
    assert victim.wait() == -signal.SIGKILL
    number = torch.load(tmp_path / "killed", weights_only=True)["number"]
    assert number >= 2
    resuming = start("killed", number + 12)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path), "undisturbed", str(number + 12)])
    runpy.run_path(str(script))
    output, _ = resuming.communicate(timeout=120)
    assert resuming.returncode == 0
    assert output.splitlines()[0] == f"started at {number + 1}"
    resumed, undisturbed = (
        torch.load(tmp_path / name, weights_only=True) for name in ("killed", "undisturbed")
    )
    assert undisturbed["number"] == number + 11
    assert len(undisturbed["runs"]) in (3, 6)
    assert_same(resumed, undisturbed)
