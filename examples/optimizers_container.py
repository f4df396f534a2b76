"""FusedAdamW in a container of optimizers, one for each part of a model, as torchtitan has them.

    python examples/optimizers_container.py

Such a container is the one optimizer that the trainer sees, whatever number of pipeline stages a
rank holds, and its state is keyed by the names of params, so that checkpoints do not depend on the
split. Trains twice with the same seed and data, and prints loss and gradient norm of both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from side_by_side import (
    BATCH,
    CONFIG,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Log,
    Tokens,
    make_model,
    print_table,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

import fusedopt

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class OptimizersContainer(torch.optim.Optimizer, Stateful):
    """One optimizer for each model part, used as one."""

    def __init__(
        self,
        model_parts: list[nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer],
        **options: Any,
    ) -> None:
        self.model_parts = model_parts
        self.optimizers = [
            # Trainers put keys of their own into the groups: they stay there.
            optimizer([{"params": list(part.parameters()), "part": i}], **options)
            for i, part in enumerate(model_parts)
        ]
        params = [p for part in model_parts for p in part.parameters()]
        super().__init__(params, options)

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for part, optimizer in zip(self.model_parts, self.optimizers, strict=True):
            merged |= get_optimizer_state_dict(part, optimizer, options=FLAT)
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, optimizer in zip(self.model_parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, state_dict, options=FLAT)


class Part(nn.Module):
    """A pipeline stage: some modules of a model, under their names in it."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def train(fused: bool, steps: int, folder: Path, resume: bool = False) -> tuple[Log, nn.Module]:
    model, data = make_model(), Tokens()
    parts: list[nn.Module] = [
        Part({"tokens": model.tokens}),
        Part({"blocks": model.blocks, "norm": model.norm}),
    ]
    kind = fusedopt.FusedAdamW if fused else torch.optim.AdamW
    container = OptimizersContainer(parts, kind, lr=CONFIG.lr, weight_decay=WEIGHT_DECAY)
    # The norm is that of all parts together, so the trainer clips, not one of the optimizers.
    clip = fusedopt.clip_grad_norm_ if fused else torch.nn.utils.clip_grad_norm_
    log: Log = []
    if resume:
        state = {"model": model.state_dict(), "optimizer": container.state_dict(), "log": log}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        model.load_state_dict(state["model"])
        container.load_state_dict(state["optimizer"])
        log = state["log"]

    for step in range(len(log), steps):
        pairs = [data[i] for i in range(step * BATCH, (step + 1) * BATCH)]
        loss = model.loss(*(torch.stack(part) for part in zip(*pairs, strict=True)))
        loss.backward()
        norm = clip(model.parameters(), MAX_GRAD_NORM)
        container.step()
        container.zero_grad()
        log.append((loss.item(), float(norm)))

    state = {"model": model.state_dict(), "optimizer": container.state_dict(), "log": log}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return log, model


if __name__ == "__main__":
    print_table(train)
