"""The keywords of the constructors, for type checkers: what fuse() takes beside the optimizer."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

from fusedopt.backends import Backend


class Keywords(TypedDict, total=False):
    """Those that all fused optimizers have."""

    lr: float | Tensor
    weight_decay: float
    maximize: bool
    capturable: bool
    foreach: bool | None
    differentiable: bool
    fused: bool | None
    max_grad_norm: float | Tensor | None
    clip_grad_value: float | Tensor | None
    skip_nonfinite: bool
    process_group: Any
    backend: Backend


class AdamWKeywords(Keywords, total=False):
    betas: tuple[float | Tensor, float | Tensor]
    eps: float
    amsgrad: bool


class AdamKeywords(AdamWKeywords, total=False):
    decoupled_weight_decay: bool


class SGDKeywords(Keywords, total=False):
    momentum: float
    dampening: float
    nesterov: bool
