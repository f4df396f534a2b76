"""FusedAdamW in a plain training loop: accumulation, autocast, GradScaler, a schedule by hand.

    python examples/plain_loop.py

Trains twice with the same seed and data, and prints loss and gradient norm of both. `dtype` is that
of autocast: float16 brings in a GradScaler, which the optimizer unscales for in the same pass.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from gpt_model import GPT, param_groups
from gpt_trainer import cosine_with_warm_up, load_checkpoint, save_checkpoint
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

import fusedopt

ACCUMULATION = 2  # micro-batches a step
SCHEDULE_STEPS = 20


def train(
    fused: bool, steps: int, folder: Path, resume: bool = False, dtype: str = "float32"
) -> tuple[Log, GPT]:
    model, data = make_model(), Tokens()
    groups = param_groups(model, WEIGHT_DECAY)
    optimizer = (
        fusedopt.FusedAdamW(groups, lr=CONFIG.lr, max_grad_norm=MAX_GRAD_NORM)
        if fused
        else torch.optim.AdamW(groups, lr=CONFIG.lr)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == "float16")
    autocast = (
        contextlib.nullcontext()
        if dtype == "float32"
        else torch.autocast("cpu", dtype=getattr(torch, dtype))
    )
    log: Log = []
    if resume:
        state = load_checkpoint(folder / "checkpoint.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        log = [(loss, norm) for loss, norm in state["log"]]

    for step in range(len(log), steps):
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.lr * cosine_with_warm_up(step, SCHEDULE_STEPS)
        total = 0.0
        for micro in range(ACCUMULATION):
            first = (step * ACCUMULATION + micro) * BATCH
            pairs = [data[i % len(data)] for i in range(first, first + BATCH)]
            x, y = (torch.stack(part) for part in zip(*pairs, strict=True))
            with autocast:
                loss = model.loss(x, y) / ACCUMULATION
            scaler.scale(loss).backward()
            total += loss.item()
        if fused:  # unscales, measures, clips and steps in one pass
            scaler.step(optimizer)
            norm = optimizer.grad_norm
        else:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        log.append((total, float(norm)))

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(folder / "checkpoint.pt", {**state, "scaler": scaler.state_dict(), "log": log})
    return log, model


if __name__ == "__main__":
    print_table(train)
