"""Learning-rate schedulers and averaged models work as with torch's optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler, swa_utils

from fusedopt import FusedOptimizer, FusedSGD
from tests import life, old_torch
from tests.helpers import (
    OPTIONS,
    TORCH,
    assert_close,
    assert_close_to,
    bits,
    groups_of,
    make_params,
    run,
)
from tests.life import backward, networks

backend, cls = life.backend, life.cls

Scheduler = Callable[[Optimizer], Any]
SCHEDULERS: dict[str, Scheduler] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=1e-3, max_lr=0.1, step_size_up=3, base_momentum=0.6, max_momentum=0.95
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.005, anneal_epochs=4),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.filterwarnings("ignore:The epoch parameter in")
def test_schedulers(
    cls: type[FusedOptimizer], backend: str, make: Scheduler, tensor_lr: bool
) -> None:
    plateau = make is SCHEDULERS["ReduceLROnPlateau"]
    if plateau and tensor_lr and not old_torch.PLATEAU_KEEPS_A_TENSOR_LR:
        pytest.skip(f"ReduceLROnPlateau of torch {torch.__version__} makes a float of a tensor lr")
    few = [make_params(torch.float64, shapes=((3, 5), (17,))) for _ in range(2)]
    subject = cls(groups_of(few[0]), **OPTIONS[cls], backend=backend)
    oracle = TORCH[cls](groups_of(few[1]), **OPTIONS[cls], foreach=False)
    both = (subject, oracle)
    # A lr of its own for each group; tensors in float64, so that torch's maths stays in it.
    if tensor_lr:
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    schedulers = [make(optimizer) for optimizer in both]
    seen = set()
    for number in range(8):
        rates = []
        for optimizer, scheduler in zip(both, schedulers, strict=True):
            run(optimizer, [number])
            with warnings.catch_warnings():
                # "lr_scheduler.step() before optimizer.step()": the step was not noticed.
                warnings.filterwarnings("error", message="Detected call of")
                metric = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
                scheduler.step(*metric)
            keys = ("momentum",) if cls is FusedSGD else ("betas",)
            rates.append([(float(g["lr"]), *(g[k] for k in keys)) for g in optimizer.param_groups])
            assert all(isinstance(g["lr"], Tensor) == tensor_lr for g in optimizer.param_groups)
        assert rates[0] == rates[1]
        seen.add(tuple(rates[0]))
        assert_close_to(*both)
    assert len(seen) > 1
    if make in (SCHEDULERS["CyclicLR"], SCHEDULERS["OneCycleLR"]):
        assert len({pair[0][1] for pair in seen}) > 3  # the momentum cycles, too


@pytest.mark.parametrize("ema", [False, True], ids=["mean", "ema"])
def test_averaged_model(cls: type[FusedOptimizer], backend: str, ema: bool) -> None:
    models, both = networks(cls, backend)
    average = swa_utils.get_ema_multi_avg_fn(0.7) if ema else None
    averages = [swa_utils.AveragedModel(m, multi_avg_fn=average) for m in models]
    schedulers = [swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=2) for o in both]
    for number in range(6):
        for model, optimizer, mean, scheduler in zip(
            models, both, averages, schedulers, strict=True
        ):
            optimizer.zero_grad()
            backward(model, number)
            before = [bits(p) for p in mean.parameters()]
            optimizer.step()
            for p, b in zip(mean.parameters(), before, strict=True):
                assert torch.equal(bits(p), b)
            mean.update_parameters(model)
            scheduler.step()
        for p, q in zip(*(mean.parameters() for mean in averages), strict=True):
            assert_close(p.detach(), q.detach())
    assert_close_to(*both)
    assert not torch.equal(next(models[0].parameters()), next(averages[0].parameters()))
