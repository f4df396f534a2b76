"""Promise 45: distributed checkpoints, saved on some ranks and loaded on another number of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks as gloo
from tests.test_distributed import adamw, full, mesh_of, model, sharded, train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed part")
STEPS = 5  # two before the checkpoint


def net_on(ranks: int) -> Any:
    return model() if ranks == 1 else sharded(mesh_of((ranks,)))


def state_of(net: Any, optimizer: Any, **options: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model_state, optimizer_state = get_state_dict(
        net, optimizer, options=StateDictOptions(**options)
    )
    return {"model": model_state, "optimizer": optimizer_state}


def set_state(net: Any, optimizer: Any, state: dict[str, Any], **options: Any) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        net,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(**options),
    )


def save(rank: int, ranks: int, folder: str, asynchronous: bool, **options: Any) -> None:
    import torch.distributed.checkpoint as dcp

    net = net_on(ranks)
    optimizer = adamw(net, amsgrad=True)
    train(net, optimizer, range(2), rank, ranks)
    state = state_of(net, optimizer, **options)
    if asynchronous:
        apart = dist.new_group() if ranks > 1 else None  # of the thread that saves
        pending: Any = dcp.async_save(state, checkpoint_id=folder, process_group=apart)
        train(net, optimizer, range(2, 3), rank, ranks)  # must not change what is being saved
        pending.result()
    else:
        dcp.save(state, checkpoint_id=folder)


def load(rank: int, ranks: int, folder: str, **options: Any) -> None:
    import torch.distributed.checkpoint as dcp

    net = net_on(ranks)
    optimizer = adamw(net, amsgrad=True, lr=0.5)  # the checkpoint has another lr
    before = [full(p).clone() for p in net.parameters()]
    state = state_of(net, optimizer, **options)  # makes state by a step with lr 0
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(full(p), old)
    dcp.load(state, checkpoint_id=folder)
    set_state(net, optimizer, state, **options)
    continue_and_compare(rank, ranks, net, optimizer)


def continue_and_compare(rank: int, ranks: int, net: Any, optimizer: Any) -> None:
    assert optimizer.param_groups[0]["lr"] == 0.01
    norms = train(net, optimizer, range(2, STEPS), rank, ranks)
    alone = model()
    want = train(alone, adamw(alone, amsgrad=True), range(STEPS))
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(want[2:]), rtol=1e-6, atol=0)
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p), q.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("before", "after", "flatten", "asynchronous"),
    [(2, 4, False, False), (4, 2, True, True)],
)
def test_a_checkpoint_loads_on_another_number_of_ranks(
    tmp_path: Path, before: int, after: int, flatten: bool, asynchronous: bool
) -> None:
    options = {"folder": str(tmp_path), "flatten_optimizer_state_dict": flatten}
    gloo.run_one(before, functools.partial(save, asynchronous=asynchronous, **options))
    gloo.run_one(after, functools.partial(load, **options))


def save_full(rank: int, ranks: int, file: str) -> None:
    net = net_on(ranks)
    optimizer = adamw(net, amsgrad=True)
    train(net, optimizer, range(2), rank, ranks)
    state = state_of(net, optimizer, full_state_dict=True, cpu_offload=True)
    if rank == 0:
        torch.save(state, file)


def load_full(rank: int, ranks: int, file: str) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    net = net_on(ranks)
    optimizer = adamw(net, amsgrad=True, lr=0.5)
    state: dict[str, Any] = {"model": {}, "optimizer": {}}
    if rank == 0:
        state = torch.load(file, weights_only=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, state["model"], options=options)
    set_optimizer_state_dict(net, optimizer, state["optimizer"], options=options)
    continue_and_compare(rank, ranks, net, optimizer)


def test_a_full_state_dict(tmp_path: Path) -> None:
    file = str(tmp_path / "full.pt")
    gloo.run_one(2, functools.partial(save_full, file=file))
    gloo.run_one(4, functools.partial(load_full, file=file))
