"""Whether the process group of a norm is that of the params: what can be seen of shards that look
like plain tensors, those of FullyShardedDataParallel and of ZeroRedundancyOptimizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import distributed
from fusedopt.instances import live
from fusedopt.plan import name_of

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

_FSDP1_HINT = (
    "set optimizer.process_group = model.process_group, model being the FullyShardedDataParallel, "
    "or clip by its clip_grad_norm_()"
)


def check_norm(optimizer: FusedOptimizer) -> None:
    """Finds a process group again that was pickled, and compares it with the ranks that the params
    are spread over. It takes milliseconds where there is FSDP1 or a ZeroRedundancyOptimizer.

    Raises:
        ValueError: the norm would not be that of the whole model, or count params several times.
    """
    if isinstance(optimizer.process_group, distributed.SavedGroup):
        optimizer.process_group = optimizer.process_group.find_or_raise()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1:
        return
    group = optimizer.process_group
    given = None if group is None else set(torch.distributed.get_process_group_ranks(group))
    _check_zero(optimizer, given)
    _check_fsdp1(optimizer, given)


def _option(optimizer: FusedOptimizer) -> str:
    return "skip_nonfinite" if optimizer.max_grad_norm is None else "max_grad_norm"


def _check_zero(optimizer: FusedOptimizer, given: set[int] | None) -> None:
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return
    for zero in live(module.ZeroRedundancyOptimizer):
        if zero.__dict__.get("optim") is not optimizer:
            continue
        ranks = set(torch.distributed.get_process_group_ranks(zero.process_group))
        if len(ranks) > 1 and not ranks <= (given or set()):
            raise ValueError(
                f"{_option(optimizer)} needs a process_group over the ranks "
                f"{sorted(ranks)}, over which ZeroRedundancyOptimizer spreads the params, got "
                f"{_ranks(given)}; set zero.optim.process_group = zero.process_group"
            )


def _check_fsdp1(optimizer: FusedOptimizer, given: set[int] | None) -> None:
    named = {
        name_of(g, i): param
        for g, group in enumerate(optimizer.param_groups)
        for i, param in enumerate(group["params"])
        if not distributed.is_dtensor(param)
    }
    if not any(distributed.is_fsdp1(param) for param in named.values()):
        return
    option, handles = _option(optimizer), _fsdp1_handles()
    whole: list[str] = []
    sharded: list[str] = []
    for name, param in named.items():
        handle = handles.get(id(param))
        if handle is None and not distributed.is_fsdp1(param):
            whole.append(name)
            continue
        if handle is None:  # under gc.freeze(): which ranks is not known
            sharded.append(name)
            if given is None:
                raise ValueError(
                    f"{option} needs a process_group over the ranks over which "
                    f"FullyShardedDataParallel shards {name}; {_FSDP1_HINT}"
                )
            continue
        ranks = set(torch.distributed.get_process_group_ranks(handle.process_group))
        if not handle.uses_sharded_strategy:
            whole.append(name)
            if given is not None and len(ranks & given) > 1:
                raise ValueError(
                    f"{option} would count {name} several times: FullyShardedDataParallel has it "
                    f"whole on each of the ranks {sorted(ranks)}, and process_group spans "
                    f"{_ranks(given)}; leave process_group out"
                )
            continue
        sharded.append(name)
        # Groups over more ranks count replicas of hybrid sharding several times; without replicas
        # they may span tensor parallel shards, too.
        hybrid = "HYBRID" in handle._sharding_strategy.name
        if given is None or not ranks <= given or (hybrid and ranks != given):
            raise ValueError(
                f"{option} needs a process_group over the ranks {sorted(ranks)}, over which "
                f"FullyShardedDataParallel shards {name}, got {_ranks(given)}; {_FSDP1_HINT}"
            )
    if whole and sharded:
        raise ValueError(
            f"{option} cannot tell the shards of FullyShardedDataParallel, such as {sharded[0]}, "
            f"from params that each rank has whole, such as {whole[0]}: process_group is for both; "
            "clip by FullyShardedDataParallel's clip_grad_norm_()"
        )


def _fsdp1_handles() -> dict[int, Any]:
    """By id of the flat or original param that an optimizer has: the FlatParamHandle of it."""
    module = sys.modules.get("torch.distributed.fsdp._flat_param")
    if module is None:
        return {}
    return {
        id(param): handle
        for handle in live(module.FlatParamHandle)
        for param in _params_of(handle.flat_param)
    }


def _params_of(flat_param: Any) -> Iterator[Tensor]:
    yield flat_param
    yield from flat_param._params or ()
    yield from flat_param._shared_params or ()


def _ranks(given: set[int] | None) -> str:
    return "none" if given is None else f"one over {sorted(given)}"
