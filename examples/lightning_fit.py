"""FusedAdamW in a LightningModule, clipping by itself instead of the Trainer's gradient_clip_val.

    python examples/lightning_fit.py            # needs: pip install lightning

Trains twice with the same seed and data, and prints loss and gradient norm of both.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import lightning
import torch
from gpt_model import GPT, param_groups
from lightning.pytorch.callbacks import ModelCheckpoint
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
from torch import Tensor
from torch.utils.data import DataLoader

import fusedopt

BATCHES = 5  # an epoch; each ends with a checkpoint


class LightningGPT(lightning.LightningModule):
    """`own_clipping` says who clips: the optimizer, or Lightning's Trainer."""

    def __init__(self, fused: bool, own_clipping: bool) -> None:
        super().__init__()
        self.fused = fused
        self.own_clipping = own_clipping
        self.model = make_model()
        self.losses: Log = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = param_groups(self.model, WEIGHT_DECAY)
        if not self.fused:
            return torch.optim.AdamW(groups, lr=CONFIG.lr)
        max_grad_norm = MAX_GRAD_NORM if self.own_clipping else None
        return fusedopt.FusedAdamW(groups, lr=CONFIG.lr, max_grad_norm=max_grad_norm)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.model.loss(*batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.own_clipping:  # the Trainer clips after this hook
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.norm = torch.nn.utils.get_total_norm(grads)

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: object, index: int) -> None:
        if self.own_clipping:
            self.norm = self.optimizers().optimizer.grad_norm
        self.log("grad_norm", self.norm)
        self.losses.append((float(outputs["loss"]), float(self.norm)))


def train(
    fused: bool,
    steps: int,
    folder: Path,
    resume: bool = False,
    precision: str = "32-true",
    own_clipping: bool = True,
) -> tuple[Log, GPT]:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    own_clipping = own_clipping and fused
    module = LightningGPT(fused, own_clipping)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=steps // BATCHES,
        gradient_clip_val=None if own_clipping else MAX_GRAD_NORM,
        logger=False,
        callbacks=[ModelCheckpoint(folder, "last", save_on_train_epoch_end=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Tokens(BATCHES * BATCH), batch_size=BATCH)
    trainer.fit(module, loader, ckpt_path=str(folder / "last.ckpt") if resume else None)
    return module.losses, module.model


if __name__ == "__main__":
    print_table(train)
