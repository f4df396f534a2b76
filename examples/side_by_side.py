"""What the examples of frameworks share: a small GPT, data with a pattern to learn, and a table of
two runs, one with torch.optim.AdamW and the framework's clipping, one with FusedAdamW."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from gpt_model import GPT, GPTConfig
from torch import Tensor, nn
from torch.utils.data import Dataset

CONFIG = GPTConfig(layers=2, heads=2, width=32, context=16, lr=1e-3, vocab=64)
BATCH = 4
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 0.5

Log = list[tuple[float, float]]  # loss and gradient norm before clipping, of each step
# train(fused, steps, folder, resume): steps in all; with resume, from the checkpoint in the folder.
Train = Callable[[bool, int, Path, bool], tuple[Log, nn.Module]]


class Tokens(Dataset):
    """Sequences, int64 [context], and what follows each of their tokens: always 3 more."""

    def __init__(self, count: int = 1024) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(CONFIG.vocab, (count, 1), generator=generator)
        self.tokens = (start + 3 * torch.arange(CONFIG.context + 1)) % CONFIG.vocab

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index, :-1], self.tokens[index, 1:]


def make_model() -> GPT:
    """The same weights on each call."""
    torch.manual_seed(0)
    return GPT(CONFIG)


def print_table(train: Train, steps: int = 20) -> None:
    """Trains twice and prints loss and gradient norm of each step."""
    logs = []
    for fused in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            logs.append(train(fused, steps, Path(folder), False)[0])
    print("step      torch: loss    norm   fusedopt: loss    norm")
    for step, (plain, ours) in enumerate(zip(*logs, strict=True)):
        print(f"{step:4} {plain[0]:16.6f} {plain[1]:7.4f} {ours[0]:16.6f} {ours[1]:7.4f}")
