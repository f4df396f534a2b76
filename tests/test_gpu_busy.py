"""Steps end, and are right, while other kernels hold a part of the GPU: tests/gpu_busy.py, with a
time limit. A grid whose blocks wait for each other would hang where not all of them can run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_busy import SCENARIOS

pytestmark = pytest.mark.gpu
SECONDS = 90  # the start of torch, Triton's compiler and a busy machine included; alone it takes 10


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_steps_on_a_busy_gpu(scenario: str, backend: str) -> None:
    if scenario == "collective_that_waits" and importlib.util.find_spec("triton") is None:
        pytest.skip("the other kernel is written in Triton")
    if scenario == "clipping_while_others_sleep" and backend == "triton":
        pytest.skip("clip_grad_norm_ has no Triton kernel")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpu_busy", scenario, backend],
            cwd=Path(__file__).parent.parent,
            # A hardware queue for each stream: none waits for another by chance.
            env={**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "32"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"did not end within {SECONDS} seconds: {error.output!r}")
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.endswith("ended\n")
