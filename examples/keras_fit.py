"""FusedAdamW in the compile() of Keras 3 on its torch backend.

    python examples/keras_fit.py                # needs: pip install keras

Trains twice with the same seed and data, and prints loss (the mean of the epoch so far, as Keras
logs it) and gradient norm of both.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
import keras
import torch
from side_by_side import BATCH, CONFIG, MAX_GRAD_NORM, WEIGHT_DECAY, Log, Tokens, print_table

from fusedopt.integrations.keras import FusedAdamW

BATCHES = 5  # an epoch


class Logged(keras.callbacks.Callback):
    """Loss and gradient norm of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.log: Log = []

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        norm = getattr(self.model.optimizer, "grad_norm", None)
        if norm is None:  # Keras keeps the gradients as they were before clipping
            grads = [v.value.grad for v in self.model.trainable_variables]
            scale = self.model.optimizer.loss_scale_factor or 1.0
            norm = torch.nn.utils.get_total_norm(grads) / scale
        self.log.append((float(logs["loss"]), float(norm)))


def make_model(fused: bool, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((CONFIG.context,), dtype="int32"),
            keras.layers.Embedding(CONFIG.vocab, CONFIG.width),
            keras.layers.Dense(4 * CONFIG.width, activation="gelu"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(CONFIG.vocab),
        ]
    )
    schedule = keras.optimizers.schedules.CosineDecay(CONFIG.lr, 20)
    options = {"weight_decay": WEIGHT_DECAY, "global_clipnorm": MAX_GRAD_NORM, **options}
    optimizer = (FusedAdamW if fused else keras.optimizers.AdamW)(schedule, **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    return model


def train(
    fused: bool, steps: int, folder: Path, resume: bool = False, **options: Any
) -> tuple[Log, keras.Model]:
    path = folder / "model.keras"
    model = keras.saving.load_model(path) if resume else make_model(fused, **options)
    data = Tokens(BATCHES * BATCH).tokens
    logged = Logged()
    epochs = {"epochs": steps // BATCHES}
    if resume:
        epochs["initial_epoch"] = int(model.optimizer.iterations) // BATCHES
    model.fit(
        data[:, :-1],
        data[:, 1:],
        batch_size=BATCH,
        shuffle=False,
        callbacks=[logged],
        verbose=0,
        **epochs,
    )
    model.save(path)
    return logged.log, model


if __name__ == "__main__":
    print_table(train)
