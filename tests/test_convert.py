"""Checkpoints of other libraries, built by their documented layouts, go on as the same run."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

import fusedopt
from tests.life import make_params, run

OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = ((3,), (4, 5))


def apex(saved: dict[str, Any]) -> dict[str, Any]:
    """apex.optimizers.FusedAdam: the step count is the group's."""
    for group in saved["param_groups"]:
        group |= {"bias_correction": True, "step": 3}
        for key in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
            group.pop(key, None)
    for entry in saved["state"].values():
        del entry["step"]
    return saved


def deepspeed(saved: dict[str, Any]) -> dict[str, Any]:
    """deepspeed.ops.adam.FusedAdam: step counts as numbers, in the group, too."""
    for group in saved["param_groups"]:
        group |= {"bias_correction": True, "step": 3}
    for entry in saved["state"].values():
        entry["step"] = 3
    return saved


def bitsandbytes(saved: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes.optim.AdamW32bit: moments of other names."""
    for entry in saved["state"].values():
        entry |= {"step": 3, "state1": entry.pop("exp_avg"), "state2": entry.pop("exp_avg_sq")}
        entry["unorm_vec"] = torch.zeros(1)
    for group in saved["param_groups"]:
        group |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    return saved


def old_torch(saved: dict[str, Any]) -> dict[str, Any]:
    """torch.optim 1.11: step counts as numbers, few keys in the group."""
    for entry in saved["state"].values():
        entry["step"] = 3
    for group in saved["param_groups"]:
        for key in set(group) - {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"}:
            del group[key]
    return saved


@pytest.mark.parametrize("layout", [apex, deepspeed, bitsandbytes, old_torch])
@pytest.mark.parametrize("pair", ["AdamW", "Adam"])
def test_a_run_goes_on(layout: Callable[[Any], Any], pair: str) -> None:
    plain = getattr(torch.optim, pair)(
        make_params(torch.float64, shapes=SHAPES), **OPTIONS, foreach=False
    )
    run(plain, range(3))
    saved = layout(deepcopy(plain.state_dict()))
    before = {k: dict(entry) for k, entry in saved["state"].items()}
    ours = [torch.nn.Parameter(p.detach().clone()) for p in plain.param_groups[0]["params"]]
    subject = getattr(fusedopt, f"Fused{pair}")(ours, lr=1.0)
    subject.load_state_dict(fusedopt.convert_state_dict(saved))
    assert {k: dict(entry) for k, entry in saved["state"].items()} == before  # left alone
    run(plain, range(3, 6))
    run(subject, range(3, 6))
    for p, q in zip(ours, plain.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        assert subject.state[p]["step"].item() == 6


def test_momentum_of_apex_sgd() -> None:
    plain = torch.optim.SGD(make_params(shapes=SHAPES), lr=0.1, momentum=0.9)
    run(plain, range(2))
    saved = plain.state_dict()
    ours = [torch.nn.Parameter(p.detach().clone()) for p in plain.param_groups[0]["params"]]
    subject = fusedopt.FusedSGD(ours, lr=0.1, momentum=0.9)
    subject.load_state_dict(fusedopt.convert_state_dict(saved))
    for p, entry in zip(ours, saved["state"].values(), strict=True):
        assert torch.equal(subject.state[p]["momentum_buffer"], entry["momentum_buffer"])


def test_what_cannot_go_on_is_refused() -> None:
    plain = torch.optim.AdamW(make_params(shapes=SHAPES), **OPTIONS)
    run(plain, range(1))
    quantised = deepcopy(plain.state_dict())
    quantised["state"][1] |= {"absmax1": torch.ones(1), "qmap1": torch.ones(256)}
    with pytest.raises(ValueError, match=r"state\[1\] holds quantised moments"):
        fusedopt.convert_state_dict(quantised)
    uncorrected = deepcopy(plain.state_dict())
    uncorrected["param_groups"][0]["bias_correction"] = False
    with pytest.raises(ValueError, match=r"param_groups\[0\] was trained with bias_correction"):
        fusedopt.convert_state_dict(uncorrected)
