"""Each example of a framework: the run with FusedAdamW equals that with torch's (or the framework's)
AdamW and the framework's clipping, in loss, gradient norm and params; and it resumes bitwise."""

from __future__ import annotations

import importlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

# Example, what it needs, options, tolerance. Under autocast a last bit of a float32 param can turn
# a bfloat16 rounding, 4e-3, in the next forward pass.
CASES: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "plain": ("plain_loop", "", {}, 1e-5),
    "plain, autocast": ("plain_loop", "", {"dtype": "bfloat16"}, 1e-2),
    "plain, autocast, GradScaler": ("plain_loop", "", {"dtype": "float16"}, 1e-2),
    "optimizers container": ("optimizers_container", "", {}, 1e-5),
    "transformers": ("hf_trainer", "transformers", {}, 1e-5),
    "accelerate": ("accelerate_loop", "accelerate", {}, 1e-5),
    "accelerate, bf16": ("accelerate_loop", "accelerate", {"mixed_precision": "bf16"}, 1e-2),
    "lightning": ("lightning_fit", "lightning", {}, 1e-5),
    "lightning, bf16": ("lightning_fit", "lightning", {"precision": "bf16-mixed"}, 1e-2),
    "lightning clips": ("lightning_fit", "lightning", {"own_clipping": False}, 1e-5),
    "lightning clips, bf16": (
        "lightning_fit", "lightning", {"precision": "bf16-mixed", "own_clipping": False}, 1e-2,
    ),
    "keras": ("keras_fit", "keras", {}, 1e-5),
    "keras, clipnorm": (
        "keras_fit", "keras", {"global_clipnorm": None, "clipnorm": 0.1}, 1e-5,
    ),
    "keras, clipvalue": (
        "keras_fit", "keras", {"global_clipnorm": None, "clipvalue": 0.01}, 1e-5,
    ),
    "keras, accumulation": ("keras_fit", "keras", {"gradient_accumulation_steps": 2}, 1e-5),
    "keras, amsgrad, loss scale": (
        "keras_fit", "keras", {"amsgrad": True, "loss_scale_factor": 8.0}, 1e-5,
    ),
}  # fmt: skip


def trainer_of(case: str) -> Any:
    example, needs, options, _ = CASES[case]
    if needs:
        pytest.importorskip(needs)
    return partial(importlib.import_module(example).train, **options)


def values(model: Any) -> list[torch.Tensor]:
    return [value.detach() for value in model.state_dict().values()]


@pytest.mark.parametrize("case", CASES)
def test_the_run_equals_that_of_torch(case: str, tmp_path: Path) -> None:
    train, tolerance = trainer_of(case), CASES[case][3]
    plain_log, plain = train(False, 20, tmp_path / "plain")
    log, model = train(True, 20, tmp_path / "fused")
    assert len(log) == len(plain_log) == 20
    expected = torch.tensor(plain_log)
    torch.testing.assert_close(torch.tensor(log), expected, rtol=tolerance, atol=tolerance)
    assert float(expected[:5, 1].min()) > 0.5  # it was clipped
    assert all(math.isfinite(loss) for loss, _ in log)
    assert log[-1][0] < log[0][0]  # it learns
    for p, q in zip(values(model), values(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_it_resumes_bitwise(case: str, tmp_path: Path) -> None:
    train = trainer_of(case)
    log, whole = train(True, 20, tmp_path / "whole")
    train(True, 10, tmp_path / "parts")
    rest, resumed = train(True, 20, tmp_path / "parts", True)
    assert rest[-10:] == log[-10:]
    for p, q in zip(values(resumed), values(whole), strict=True):
        assert torch.equal(p, q)
