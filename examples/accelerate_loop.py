"""FusedAdamW with Hugging Face Accelerate: prepared as any optimizer, and clipping by itself.

    python examples/accelerate_loop.py          # needs: pip install accelerate

Trains twice with the same seed and data, and prints loss and gradient norm of both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from gpt_model import GPT, param_groups
from gpt_trainer import cosine_with_warm_up
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
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import fusedopt

ACCUMULATION = 2  # micro-batches a step
SCHEDULE_STEPS = 20


def train(
    fused: bool, steps: int, folder: Path, resume: bool = False, mixed_precision: str = "no"
) -> tuple[Log, GPT]:
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=ACCUMULATION, mixed_precision=mixed_precision
    )
    model = make_model()
    groups = param_groups(model, WEIGHT_DECAY)
    optimizer = (
        fusedopt.FusedAdamW(groups, lr=CONFIG.lr, max_grad_norm=MAX_GRAD_NORM)
        if fused
        else torch.optim.AdamW(groups, lr=CONFIG.lr)
    )
    scheduler = LambdaLR(optimizer, lambda step: cosine_with_warm_up(step, SCHEDULE_STEPS))
    loader = DataLoader(Tokens(), batch_size=BATCH)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    done = 0
    if resume:
        accelerator.load_state(str(folder))
        done = scheduler.scheduler.last_epoch
        loader = accelerator.skip_first_batches(loader, done * ACCUMULATION)

    log: Log = []
    total = 0.0
    for x, y in loader:
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss = accelerator.unwrap_model(model).loss(x, y)
            accelerator.backward(loss)
            total += loss.item() / ACCUMULATION
            if not fused and accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            if fused:
                norm = optimizer.optimizer.grad_norm  # accelerate's wrapper holds ours
            log.append((total, float(norm)))
            total = 0.0
            if done + len(log) == steps:
                break
    accelerator.save_state(str(folder))
    return log, accelerator.unwrap_model(model)


if __name__ == "__main__":
    print_table(train)
