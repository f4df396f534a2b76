"""Each example of a framework: the run with FusedAdamW equals that with AdamW of torch or of the
framework, and its clipping, in loss, gradient norm and params; and it resumes bitwise."""

from __future__ import annotations

import importlib
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

EXACT = 1e-5
# Under autocast the last bit of a float32 param can turn a 16-bit rounding of the next forward
# pass. The losses stay together; not each param: Adam makes a whole step of a rounding error.
AUTOCAST = 1e-2
# Example, what it needs, options, tolerance.
CASES: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "plain": ("plain_loop", "", {}, EXACT),
    "plain, autocast": ("plain_loop", "", {"dtype": "bfloat16"}, AUTOCAST),
    "plain, autocast, GradScaler": ("plain_loop", "", {"dtype": "float16"}, AUTOCAST),
    "optimizers container": ("optimizers_container", "", {}, EXACT),
    "transformers": ("hf_trainer", "transformers", {}, EXACT),
    "accelerate": ("accelerate_loop", "accelerate", {}, EXACT),
    "accelerate, bf16": ("accelerate_loop", "accelerate", {"mixed_precision": "bf16"}, AUTOCAST),
    "lightning": ("lightning_fit", "lightning", {}, EXACT),
    "lightning, bf16": ("lightning_fit", "lightning", {"precision": "bf16-mixed"}, AUTOCAST),
    "lightning clips": ("lightning_fit", "lightning", {"own_clipping": False}, EXACT),
    "lightning clips, bf16": (
        "lightning_fit", "lightning", {"precision": "bf16-mixed", "own_clipping": False}, AUTOCAST,
    ),
    "keras": ("keras_fit", "keras", {}, EXACT),
    "keras, clipnorm": (
        "keras_fit", "keras", {"global_clipnorm": None, "clipnorm": 0.1}, EXACT,
    ),
    "keras, clipvalue": (
        "keras_fit", "keras", {"global_clipnorm": None, "clipvalue": 0.01}, EXACT,
    ),
    "keras, amsgrad, loss scale": (
        "keras_fit", "keras", {"amsgrad": True, "loss_scale_factor": 8.0}, EXACT,
    ),
}  # fmt: skip


def trainer_of(case: str) -> Any:
    example, needs, options, _ = CASES[case]
    if needs:
        pytest.importorskip(needs)
    if needs == "accelerate":  # one precision for a process, it thinks
        state = importlib.import_module("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
    return partial(importlib.import_module(example).train, **options)


def values(model: Any) -> list[torch.Tensor]:
    return [value.detach() for value in model.state_dict().values()]


@pytest.mark.parametrize("case", CASES)
def test_the_run_equals_that_of_torch(case: str, tmp_path: Path) -> None:
    train, tolerance = trainer_of(case), CASES[case][3]
    for name in ("plain", "fused"):
        (tmp_path / name).mkdir()
    plain_log, plain = train(False, 20, tmp_path / "plain")
    log, model = train(True, 20, tmp_path / "fused")
    assert len(log) == len(plain_log) == 20
    expected = torch.tensor(plain_log)
    torch.testing.assert_close(torch.tensor(log), expected, rtol=tolerance, atol=tolerance)
    assert float(expected[:5, 1].min()) > 0.5  # it was clipped
    assert all(math.isfinite(loss) for loss, _ in log)
    assert log[-1][0] < log[0][0]  # it learns
    if tolerance == AUTOCAST:
        return
    for p, q in zip(values(model), values(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_it_resumes_bitwise(case: str, tmp_path: Path) -> None:
    train = trainer_of(case)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    log, whole = train(True, 20, tmp_path / "whole")
    train(True, 10, tmp_path / "parts")
    rest, resumed = train(True, 20, tmp_path / "parts", True)
    assert rest[-10:] == log[-10:]
    for p, q in zip(values(resumed), values(whole), strict=True):
        assert torch.equal(p, q)
