"""One model with its optimizer and schedule: training steps, timings, checkpoints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import gpt_data
import torch
from gpt_model import GPT, SIZES, param_groups
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

import fusedopt

MAX_GRAD_NORM = 1.0
# Decoupled for AdamW; part of the gradient, so amplified by the momentum, for SGD.
WEIGHT_DECAY = {"adamw": 0.1, "sgd": 1e-4}
SGD_LR = 0.1
WARM_UP = 0.1  # of all steps
FINAL_LR = 0.1  # of the peak
VALIDATION_WINDOWS = 128
VALIDATION_BATCH = 8


@dataclass(frozen=True)
class Options:
    """What decides every number of a run: two runs with equal options give equal losses."""

    size: str
    device: str
    dtype: str
    optimizer: str
    steps: int
    batch_size: int
    compare_steps: int
    seed: int


Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """Mark this point of the device's work: the time on a CPU, a recorded event on a GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed_ms(start: Mark, end: Mark) -> float:
    """Milliseconds between two marks; waits until a GPU has reached the second."""
    if isinstance(start, float):
        return (end - start) * 1e3
    end.synchronize()
    return start.elapsed_time(end)


def cosine_with_warm_up(step: int, steps: int) -> float:
    """Factor of the peak learning rate at ``step`` (from 0) of ``steps``."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def peak_lr(options: Options) -> float:
    """Return the largest learning rate of the schedule."""
    return SGD_LR if options.optimizer == "sgd" else SIZES[options.size].lr


def make_optimizer(
    options: Options, groups: list[dict], reference: bool
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Build the optimizer (torch's own for the reference) and its learning rate schedule."""
    lr = peak_lr(options)
    ours = {} if reference else {"max_grad_norm": MAX_GRAD_NORM}
    if options.optimizer == "sgd":
        # torch's fused SGD skips most elements of low-precision params on a CPU (torch 2.13).
        fused = options.dtype == "float32" or not options.device.startswith("cpu")
        kind = torch.optim.SGD if reference else fusedopt.FusedSGD
        theirs = {"fused": fused} if reference else {}
        sgd = kind(groups, lr=lr, momentum=0.9, **ours, **theirs)
        return sgd, OneCycleLR(sgd, max_lr=lr, total_steps=options.steps)
    kind = torch.optim.AdamW if reference else fusedopt.FusedAdamW
    theirs = {"fused": True} if reference else {}
    adamw = kind(groups, lr=lr, betas=(0.9, 0.95), **ours, **theirs)
    return adamw, LambdaLR(adamw, lambda step: cosine_with_warm_up(step, options.steps))


class Trainer:
    """A model in training, with fusedopt's optimizer or, as the reference, with torch's.

    Both kinds start from the same weights (drawn on the CPU from the seed) and see the same
    batches. ``history`` holds, a step each, ``loss`` (nats a byte), ``step_ms`` and
    ``optimizer_ms`` (clipping and update), and ``validation``: pairs of step and loss.
    """

    def __init__(self, options: Options, corpus: gpt_data.Corpus, reference: bool = False) -> None:
        self.options = options
        self.corpus = corpus
        self.reference = reference
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.model = GPT(SIZES[options.size]).to(self.device, getattr(torch, options.dtype))
        self.params = list(self.model.parameters())
        groups = param_groups(self.model, WEIGHT_DECAY[options.optimizer])
        self.optimizer, self.scheduler = make_optimizer(options, groups, reference)
        self.step = 0
        self.grad_norm = torch.zeros(())
        self.history: dict[str, list] = {
            "loss": [],
            "step_ms": [],
            "optimizer_ms": [],
            "validation": [],
        }
        self._unread: list[tuple[Tensor, Mark, Mark, Mark]] = []

    @property
    def name(self) -> str:
        """The optimizer, as a reader of the report knows it."""
        kind = type(self.optimizer).__name__
        if not self.reference:
            return f"fusedopt.{kind}"
        fused = bool(self.optimizer.defaults["fused"])
        return f"torch.optim.{kind}(fused={fused}) + clip_grad_norm_"

    def backward(self, step: int) -> Tensor:
        """Leave the gradients of the batch of ``step`` in the params; returns the loss, 0-dim."""
        context = self.model.config.context
        batch = gpt_data.batch(
            self.corpus.train, self.options.seed, step, self.options.batch_size, context
        )
        self.optimizer.zero_grad()
        loss = self.model.loss(*(part.to(self.device) for part in batch))
        loss.backward()
        return loss.detach()

    def clip_and_update(self) -> tuple[Mark, Mark]:
        """Clip the gradients' norm and update the params; returns marks around just that."""
        start = mark(self.device)
        if self.reference:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
            self.optimizer.step()
        else:
            self.optimizer.step()
            self.grad_norm = self.optimizer.grad_norm
        return start, mark(self.device)

    def timed_update(self, step: int) -> float:
        """Update on the batch of ``step``, outside of schedule and history: its milliseconds."""
        self.backward(step)
        return elapsed_ms(*self.clip_and_update())

    def train_step(self) -> None:
        """Train one step. It never waits for a GPU: ``read`` fetches what was measured."""
        begin = mark(self.device)
        loss = self.backward(self.step)
        self._unread.append((loss, begin, *self.clip_and_update()))
        self.scheduler.step()
        self.step += 1

    def read(self) -> None:
        """Move the losses and timings of the steps since the last call to the history."""
        for loss, begin, start, end in self._unread:
            self.history["loss"].append(loss.item())
            self.history["step_ms"].append(elapsed_ms(begin, end))
            self.history["optimizer_ms"].append(elapsed_ms(start, end))
        self._unread.clear()

    @torch.no_grad()
    def validate(self) -> float:
        """Loss in nats a byte over fixed windows of the held-out files; kept in the history."""
        batches = gpt_data.validation_batches(
            self.corpus.validation,
            VALIDATION_WINDOWS // VALIDATION_BATCH,
            VALIDATION_BATCH,
            self.model.config.context,
        )
        losses = [self.model.loss(x.to(self.device), y.to(self.device)) for x, y in batches]
        mean = torch.stack(losses).mean().item()
        self.history["validation"].append([self.step, mean])
        return mean

    def state_dict(self) -> dict:
        """All that ``load_state_dict`` needs to continue bitwise; plain tensors and values.

        There is no random state in it: batches are a function of the seed and the step, and the
        model has no dropout. Nor are the rotary tables: they are a function of the size.
        """
        self.read()
        return {
            "options": asdict(self.options),
            "corpus": self.corpus.sha256,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a ``state_dict``; ``ValueError`` when it is of another run or program."""
        missing = {"options", "corpus", "step", "model", "optimizer", "scheduler", "history"}
        missing -= state.keys() if isinstance(state, dict) else set()
        if missing:
            raise ValueError(f"not a checkpoint of this program, it lacks {sorted(missing)}")
        for option, value in asdict(self.options).items():
            if state["options"].get(option) != value:
                raise ValueError(
                    f"the checkpoint was written with {option}={state['options'].get(option)!r}, "
                    f"this run has {option}={value!r}"
                )
        if state["corpus"] != self.corpus.sha256:
            raise ValueError(
                "the checkpoint was trained on another version of the standard library"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]
        self.history = state["history"]


def write_aside(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace ``path`` by what ``write`` writes, in one instant.

    Whoever is killed at whatever moment leaves the old file or the new one, whole, and at most
    a ``.tmp`` beside it that the next write overwrites. It has to be in the same folder: a
    rename across file systems is a copy, which is not atomic.
    """
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write ``state`` to ``path`` so that a kill at any moment leaves a whole checkpoint."""
    write_aside(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint; refuses anything but tensors and plain values. Tensors on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)
