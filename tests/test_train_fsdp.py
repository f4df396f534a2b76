"""examples/train_fsdp.py goes on when a rank is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_fsdp.py"
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)


@contextlib.contextmanager
def torchrun(out: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    command += [
        str(EXAMPLE),
        f"--out={out}",
        "--batch-size=4",
        "--checkpoint-every=4",
        "--steps=12",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.terminate()  # its ranks with it
        process.communicate()


def finish(process: subprocess.Popen[str], out: Path) -> tuple[str, dict[str, Any]]:
    """What it printed, and its report."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return output, json.loads((out / "report.json").read_text())


def a_rank(launcher: int) -> int | None:
    """The process of a rank, a child of torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        try:
            command = Path(f"/proc/{child}/cmdline").read_text()
            environment = Path(f"/proc/{child}/environ").read_text()
        except OSError:
            continue
        if EXAMPLE.name in command and "\0RANK=1\0" in environment:
            return int(child)
    return None


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the rank in /proc")
def test_a_killed_rank(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    with torchrun(whole) as process:
        _, expected = finish(process, whole)
    assert len(expected["history"]) == 12
    with torchrun(out) as process:
        deadline = time.monotonic() + 120
        while not (out / "step-000004").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        victim = a_rank(process.pid)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        output, report = finish(process, out)
    assert "resuming at step 4" in output or "resuming at step 8" in output
    assert report == expected
    assert [path.name for path in out.glob("step-*")] == ["step-000012"]
