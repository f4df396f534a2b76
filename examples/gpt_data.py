"""The text: Python's own standard library, as bytes, with a held-out part."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Every 16th file is held out: whole files, so that no validation text is seen in training.
HELD_OUT = 16


@dataclass(frozen=True)
class Corpus:
    """``train`` and ``validation`` are 1-dim uint8 arrays; ``sha256`` identifies both."""

    train: np.ndarray
    validation: np.ndarray
    files: int
    sha256: str


def load_corpus(folder: Path | None = None) -> Corpus:
    """Read the ``.py`` files directly in ``folder`` (default: the standard library) by name.

    Raises ``FileNotFoundError`` where there are too few of them to hold one out.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata holds the paths and flags of one machine's build: not a text to learn.
    paths = [p for p in sorted(folder.glob("*.py")) if not p.name.startswith("_sysconfigdata")]
    if len(paths) < HELD_OUT:
        raise FileNotFoundError(
            f"{folder} holds {len(paths)} .py files; at least {HELD_OUT} needed"
        )
    texts = [p.read_bytes() for p in paths]
    train = b"".join(t for i, t in enumerate(texts) if (i + 1) % HELD_OUT)
    validation = b"".join(texts[HELD_OUT - 1 :: HELD_OUT])
    return Corpus(
        train=np.frombuffer(train, dtype=np.uint8),
        validation=np.frombuffer(validation, dtype=np.uint8),
        files=len(paths),
        sha256=hashlib.sha256(train + b"\0" + validation).hexdigest(),
    )


def windows(data: np.ndarray, starts: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    """Cut inputs and targets, int64 [len(starts), context]; targets are one byte further on."""
    cut = torch.from_numpy(data[starts[:, None] + np.arange(context + 1)]).long()
    return cut[:, :-1], cut[:, 1:]


def batch(data: np.ndarray, seed: int, step: int, size: int, context: int) -> tuple[Tensor, Tensor]:
    """Draw the batch of one step, int64 [size, context] twice.

    It is a pure function of (seed, step), so a resumed run needs no saved random state to see
    the batches that an undisturbed run sees.
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(data) - context, size=size)
    return windows(data, starts, context)


def validation_batches(
    data: np.ndarray, count: int, size: int, context: int
) -> list[tuple[Tensor, Tensor]]:
    """Cut ``count`` batches of ``size`` windows, evenly spaced over the data: always the same."""
    starts = np.linspace(0, len(data) - context - 1, count * size).astype(np.int64)
    return [windows(data, part, context) for part in np.split(starts, count)]
