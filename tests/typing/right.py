"""What users write: `mypy --strict` finds nothing in it. tests/test_typing.py runs it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fusedopt
from fusedopt import FusedAdam, FusedAdamW, FusedOptimizer, FusedSGD


def train(model: nn.Module, batches: Iterable[Tensor], saved: dict[str, Any]) -> dict[str, float]:
    optimizer = FusedAdamW(
        model.parameters(),
        lr=3e-4,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True,
        max_grad_norm=1.0,
        skip_nonfinite=True,
        process_group=None,
        backend="auto",
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.load_state_dict(saved)
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(batch).sum()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # so torch has it
        scaler.step(optimizer)
        scaler.update()
        optimizer.step()
        scheduler.step()
    norm = optimizer.grad_norm
    if norm is not None:
        print(norm.item(), int(optimizer.skipped_steps), optimizer.backend_in_use)
    assert_type(optimizer.backend_in_use, "str | None")
    optimizer.max_grad_norm = None
    optimizer.clip_grad_value = torch.tensor(0.5)
    optimizer.skip_nonfinite = False
    optimizer.backend = "reference"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "last.pt")
    return optimizer.log()


def closures(optimizer: FusedOptimizer, model: nn.Module, batch: Tensor) -> float:
    def as_tensor() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def as_float() -> float:
        return as_tensor().item()

    assert_type(optimizer.step(as_tensor), Tensor)
    assert_type(optimizer.step(closure=as_float), float)
    optimizer.step(None)
    return optimizer.step(lambda: 1.0)


def of_groups(model: nn.Module) -> list[FusedOptimizer]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizers: list[FusedOptimizer] = [
        FusedAdamW(groups, lr=torch.tensor(1e-3), backend="cpu"),
        FusedAdam(model.named_parameters(), 1e-3, amsgrad=True),
        FusedSGD(decayed, lr=0.1, momentum=0.9, nesterov=True, max_grad_norm=float("inf")),
    ]
    optimizers[0].add_param_group({"params": rest})
    return optimizers


def some_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def taken_over(model: nn.Module) -> None:
    params = list(model.parameters())
    adamw = fusedopt.fuse(torch.optim.AdamW(params), max_grad_norm=1.0, betas=(0.9, 0.95))
    adam = fusedopt.fuse(torch.optim.Adam(params), lr=0.1, decoupled_weight_decay=True)
    sgd = fusedopt.fuse(torch.optim.SGD(params), momentum=0.9, backend="cpu")
    assert_type(adamw, FusedAdamW)
    assert_type(adam, FusedAdam)
    assert_type(sgd, FusedSGD)
    assert_type(fusedopt.fuse(some_optimizer(model), max_grad_norm=1.0), FusedOptimizer)
    handle = fusedopt.step_in_backward(model, adamw)
    handle.remove()


def clipped(model: nn.Module, checkpoint: dict[str, Any]) -> tuple[Tensor, Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    total = fusedopt.clip_grad_norm_(model.parameters(), 1.0)
    fusedopt.clip_grad_value_(model.parameters(), 0.5)
    FusedAdamW(model.parameters()).load_state_dict(fusedopt.convert_state_dict(checkpoint))
    return total, fusedopt.get_total_norm(grads)


class Mine(FusedAdamW):
    """One of a user's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), max_grad_norm=1.0)
