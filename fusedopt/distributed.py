"""The one reduction over ranks that a clipped step needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def all_reduce_sum(value: Tensor, process_group: Any) -> Tensor:
    """`value`, a 0-dim tensor, summed over the ranks of a torch.distributed process group."""
    torch.distributed.all_reduce(value, group=process_group)
    return value
