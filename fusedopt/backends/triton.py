"""Triton kernels. This version has none; triton is never imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedopt.backends import Request
    from fusedopt.optimizer import FusedOptimizer

NO_KERNELS = "this version of fusedopt has no Triton kernels"


def unavailable() -> str:
    return NO_KERNELS


def step(optimizer: FusedOptimizer, request: Request) -> str:
    return NO_KERNELS
