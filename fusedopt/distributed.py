"""Params that are spread over ranks: DTensors, and plain tensors with a process group.

Every rank updates its own shards; only the squared norm of the gradients is summed over ranks. A
param's norm groups are the process groups whose ranks hold other elements of it: the mesh dims that
a DTensor is sharded over (not those that it is replicated over), or the optimizer's process_group.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NormGroups = tuple[Any, ...]


def _dtensor() -> type | None:
    """The class DTensor, None where nobody can have made one."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)  # also while the module is being imported


def is_dtensor(tensor: Any) -> bool:
    cls = _dtensor()
    return cls is not None and isinstance(tensor, cls)


def any_dtensor(param_groups: list[dict[str, Any]]) -> bool:
    cls = _dtensor()
    return cls is not None and any(isinstance(p, cls) for g in param_groups for p in g["params"])


@torch.no_grad()
def local_tensor(tensor: Any, param: Any) -> Tensor:
    """This rank's shard of a DTensor, in the placements of `param`; any other tensor as it is."""
    if not is_dtensor(tensor):
        plain: Tensor = tensor
        return plain
    if is_dtensor(param) and tensor.placements != param.placements:
        tensor = tensor.redistribute(param.device_mesh, param.placements)
    local: Tensor = tensor.to_local()
    return local


def norm_groups(param: Tensor, process_group: Any) -> NormGroups:
    """The process groups whose ranks hold other elements of a param."""
    if not is_dtensor(param):
        return () if process_group is None else (process_group,)
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def sum_over_ranks(squares: Tensor, kinds: Iterable[NormGroups]) -> Tensor:
    """The total of squared norms, one for each kind of params, over all ranks: one all-reduce for
    each process group.

    Args:
        squares: 1-dim, on the params' device; overwritten.
        kinds: the norm groups of the params that each entry belongs to, in an order that is the
            same on all ranks.
    """
    kinds = list(kinds)
    for group in dict.fromkeys(g for kind in kinds for g in kind):
        members = [i for i, kind in enumerate(kinds) if group in kind]
        part = squares if len(members) == len(kinds) else squares[members]
        all_reduce_sum(part, group)
        if part is not squares:
            squares[members] = part
    return squares.sum()


def all_reduce_sum(value: Tensor, process_group: Any) -> None:
    """Sums a tensor over the ranks of a torch.distributed process group, in place."""
    torch.distributed.all_reduce(value, group=process_group)
