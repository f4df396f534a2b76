"""Params that are spread over ranks: DTensors, and plain tensors with a process group.

Every rank updates its own shards; only the squared norm of the gradients is summed over ranks. A
param's norm groups are the process groups whose ranks hold other elements of it: the mesh dims that
a DTensor is sharded over (not those that it is replicated over), or the optimizer's process_group.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
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


def is_fsdp1(param: Any) -> bool:
    """Whether a param is a flat param of FullyShardedDataParallel, or was made part of one."""
    return getattr(param, "_fsdp_flattened", False)


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


@dataclass(frozen=True)
class SavedGroup:
    """What a pickle holds of a process group.

    Attributes:
        default: whether it was the default group.
        name: that torch.distributed gave to another one.
        ranks: of the default group that were members.
    """

    default: bool
    name: str
    ranks: tuple[int, ...]

    def find(self) -> Any:
        """The group in this process: the default one, whatever its size now, or one of the same
        name and ranks; None where there is none."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        if self.default:
            return torch.distributed.group.WORLD
        resolve: Any = torch.distributed.distributed_c10d._resolve_process_group
        try:
            group = resolve(self.name)
        except (RuntimeError, ValueError, KeyError):
            return None  # no group of that name
        same = tuple(torch.distributed.get_process_group_ranks(group)) == self.ranks
        return group if same else None

    def find_or_raise(self) -> Any:
        group = self.find()
        if group is None:
            kind = "the default process group" if self.default else "a process group"
            raise ValueError(
                f"this optimizer was pickled with {kind} over the ranks {list(self.ranks)}, which "
                "is not in this process: set optimizer.process_group to the group over whose ranks "
                "the params are spread, or to None where each rank has them whole"
            )
        return group


class GroupReference:
    """Stands for a process group in the state of an optimizer: a deep copy shares the group, and a
    pickle holds a SavedGroup."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupReference:
        return self

    def __reduce__(self) -> tuple[type[SavedGroup], tuple[bool, str, tuple[int, ...]]]:
        default = self.group is torch.distributed.group.WORLD
        ranks = tuple(torch.distributed.get_process_group_ranks(self.group))
        return SavedGroup, (default, self.group.group_name, ranks)


def process_group_to_state(group: Any) -> Any:
    """What __getstate__ gives for a process group; anything else as it is."""
    if torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup):
        return GroupReference(group)
    return group


def process_group_from_state(value: Any) -> Any:
    """The process group in this process; a SavedGroup that is not there yet stays one."""
    if isinstance(value, GroupReference):
        return value.group
    if isinstance(value, SavedGroup):
        found = value.find()
        return value if found is None else found
    return value
