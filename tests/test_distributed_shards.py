"""Norms over shards that look like plain tensors: FullyShardedDataParallel (FSDP1) and
ZeroRedundancyOptimizer. Right with process_group, refused without. And what copies and pickles of
an optimizer keep of the group."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import fusedopt
from fusedopt import distributed
from tests import ranks as gloo
from tests.test_distributed import adamw, data, mesh_of, model, train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed part")
registry = gloo.Registry()


def fsdp1(net: nn.Module, strategy: str = "FULL_SHARD", **options: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    return FullyShardedDataParallel(
        net,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=lambda module, recurse, nonwrapped_numel: (
            recurse or isinstance(module, nn.Linear)
        ),
        device_id=torch.device("cpu"),
        **options,
    )


def assert_trains_as_alone(
    net: Any, optimizer: Any, share: int, shares: int, **options: Any
) -> None:
    """Params and norms of one process."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    norms = train(net, optimizer, share=share, shares=shares)
    alone = model()
    want = train(alone, adamw(alone, **options))
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(want), rtol=1e-6, atol=0)
    with FullyShardedDataParallel.summon_full_params(net):
        got = [p.detach().reshape(-1).clone() for p in net.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in alone.parameters()])
    torch.testing.assert_close(torch.cat(got), flat, rtol=1e-12, atol=1e-14)


def assert_refused(match: str, net: Any, optimizer: Any) -> None:
    """The step raises and changes nothing."""
    optimizer.zero_grad()
    net(data(0)).square().mean().backward()
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):  # each time
        with pytest.raises(ValueError, match=match):
            optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)
    optimizer.zero_grad()


def fsdp1_clips(rank: int, ranks: int, strategy: str, originals: bool, backend: str) -> None:
    net = fsdp1(model(), strategy, use_orig_params=originals)
    optimizer = adamw(net, process_group=net.process_group, backend=backend)
    assert_trains_as_alone(net, optimizer, rank, ranks)


def fsdp1_refused(rank: int, ranks: int, strategy: str, originals: bool) -> None:
    net = fsdp1(model(), strategy, use_orig_params=originals)
    where = r'shards param_groups\[0\]\["params"\]\[0\], got none; set optimizer.process_group'
    assert_refused("max_grad_norm needs a process_group.*" + where, net, adamw(net))
    skipping = adamw(net, max_grad_norm=None, skip_nonfinite=True)
    assert_refused("skip_nonfinite needs a process_group.*" + where, net, skipping)
    for clip in (None, 1e-3):
        options = {"max_grad_norm": None, "clip_grad_value": clip}
        plain = fsdp1(model(), strategy, use_orig_params=originals)
        assert_trains_as_alone(plain, adamw(plain, **options), rank, ranks, **options)
    late = adamw(net, max_grad_norm=None)
    train(net, late, range(1), rank, ranks)
    late.max_grad_norm = 0.05
    assert_refused(where, net, late)
    late.process_group = net.process_group
    train(net, late, range(1), rank, ranks)
    late.process_group = None
    assert_refused(where, net, late)


for _strategy in ("FULL_SHARD", "SHARD_GRAD_OP"):
    for _originals in (False, True):
        _how = {"strategy": _strategy, "originals": _originals}
        _name = f"{_strategy.lower()}{'_original_params' * _originals}"
        for _backend in ("cpu", "reference"):
            registry.add(
                f"fsdp1_{_name}_{_backend}", partial(fsdp1_clips, backend=_backend, **_how), 2
            )
        registry.add(f"fsdp1_{_name}_refused", partial(fsdp1_refused, **_how), 2)


@registry.on(2)
def fsdp1_without_sharding_needs_nothing(rank: int, ranks: int) -> None:
    for originals in (False, True):
        net = fsdp1(model(), "NO_SHARD", use_orig_params=originals)
        assert_trains_as_alone(net, adamw(net), rank, ranks)
        counting = adamw(net, process_group=net.process_group)
        assert_refused("would count .* several times.*leave process_group out", net, counting)


@registry.on(2)
def fsdp1_beside_whole_params_is_refused(rank: int, ranks: int) -> None:
    net = model()
    net = fsdp1(net, ignored_modules=[net[0]], use_orig_params=True)
    for group in (None, net.process_group):
        match = "cannot tell the shards" if group else "needs a process_group"
        assert_refused(match, net, adamw(net, process_group=group))


@registry.on(4)
def fsdp1_hybrid(rank: int, ranks: int) -> None:
    mesh = mesh_of((2, 2), "replicate", "shard")
    for originals in (False, True):
        net = fsdp1(model(), "HYBRID_SHARD", device_mesh=mesh, use_orig_params=originals)
        assert net.process_group.size() == 2
        optimizer = adamw(net, process_group=net.process_group)
        assert_trains_as_alone(net, optimizer, rank, ranks)
        for group in (None, dist.group.WORLD, mesh.get_group("replicate")):
            refused = adamw(net, process_group=group)
            assert_refused("needs a process_group over the ranks", net, refused)


@registry.on(2)
def fsdp1_on_one_rank_needs_nothing(rank: int, ranks: int) -> None:
    mine = [dist.new_group([r]) for r in range(ranks)][rank]
    net = fsdp1(model(), process_group=mine)
    assert_trains_as_alone(net, adamw(net), 0, 1)


@registry.on(2)
def fsdp1_that_the_garbage_collector_was_told_to_forget(rank: int, ranks: int) -> None:
    net = fsdp1(model())
    gc.freeze()
    try:
        assert_refused("max_grad_norm needs a process_group", net, adamw(net))
        assert_trains_as_alone(net, adamw(net, process_group=net.process_group), rank, ranks)
    finally:
        gc.unfreeze()


def zero(net: nn.Module, **options: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        net.parameters(), optimizer_class=fusedopt.FusedAdamW, lr=0.01, **options
    )


@registry.on(2)
def zero_redundancy_optimizer_without_a_group_is_refused(rank: int, ranks: int) -> None:
    net = model()
    match = r"needs a process_group over the ranks \[0, 1\], over which ZeroRedundancyOptimizer"
    for options in ({"max_grad_norm": 0.05}, {"skip_nonfinite": True}):
        assert_refused(f"{next(iter(options))} {match}", net, zero(net, **options))
    train(net, zero(net, clip_grad_value=0.1))
    alone = dist.new_group([0]), dist.new_group([1])
    optimizer = zero(net, max_grad_norm=0.05)
    optimizer.optim.process_group = alone[rank]
    assert_refused(match, net, optimizer)
    optimizer.optim.process_group = dist.group.WORLD
    train(net, optimizer)
    single = zero(net, max_grad_norm=0.05, process_group=alone[rank])
    train(net, single)


class Sharding(Optimizer):
    """Not ZeroRedundancyOptimizer, but with an inner optimizer of the same name."""

    def __init__(self, optim: Any) -> None:
        self.optim = optim
        super().__init__(optim.param_groups, {})


@registry.on(2)
def another_wrapper_is_not_taken_for_one(rank: int, ranks: int) -> None:
    net, other = model(), model()
    kept = zero(other, max_grad_norm=0.05)
    wrapper = Sharding(adamw(net))
    train(net, wrapper.optim)
    assert kept.optim.process_group is None


# A copy has the process group of its source; a pickle finds it again.


def owned(net: nn.Module, rank: int, **options: Any) -> fusedopt.FusedAdamW:
    return fusedopt.FusedAdamW(list(net.parameters())[rank::2], max_grad_norm=0.05, **options)


def saved(optimizer: Any) -> Any:
    """torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def norm_of_step(optimizer: Any, value: float) -> float:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, value)
    optimizer.step()
    norm: float = optimizer.grad_norm.item()
    return norm


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "torch.save": saved,
}


@registry.on(2)
def copies_keep_their_process_group(rank: int, ranks: int) -> None:
    part = dist.new_group([0, 1])
    for group in (dist.group.WORLD, part):
        optimizer = owned(model(), rank, process_group=group)
        want = norm_of_step(optimizer, 1.0)
        assert want == pytest.approx(math.sqrt(sum(p.numel() for p in model().parameters())))
        for way in WAYS.values():
            other = way(optimizer)
            assert other.process_group is group
            assert norm_of_step(other, 1.0) == want
        assert optimizer.process_group is group


@registry.on(2)
def a_group_that_is_not_there_when_unpickled_is_asked_for(rank: int, ranks: int) -> None:
    group = dist.new_group([0, 1])
    optimizer = owned(model(), rank, process_group=group)
    text = pickle.dumps(optimizer)
    default = pickle.dumps(owned(model(), rank, process_group=dist.group.WORLD))
    dist.destroy_process_group(group)
    other = pickle.loads(text)
    again = pickle.loads(pickle.dumps(copy.deepcopy(other)))
    for lost in (other, again):
        before = [p.detach().clone() for p in lost.param_groups[0]["params"]]
        for _ in range(2):
            with pytest.raises(ValueError, match=r"pickled with .* \[0, 1\].*process_group"):
                norm_of_step(lost, 1.0)
        for p, old in zip(lost.param_groups[0]["params"], before, strict=True):
            assert torch.equal(p, old)
        assert not lost.state
        lost.max_grad_norm = None
        lost.step()  # has no use for it
        lost.max_grad_norm = 0.05
        lost.process_group = dist.group.WORLD
        assert norm_of_step(lost, 1.0) == norm_of_step(pickle.loads(default), 1.0)


@registry.on(2)
def a_group_of_other_ranks_is_not_taken_for_it(rank: int, ranks: int) -> None:
    optimizer = owned(model(), rank)
    here = dist.new_group([0, 1])
    optimizer.process_group = distributed.SavedGroup(False, here.group_name, (0, 2))
    with pytest.raises(ValueError, match="pickled with a process group"):
        norm_of_step(optimizer, 1.0)


def before_the_default_group(file: str) -> None:
    optimizer = torch.load(file, weights_only=False)
    with pytest.raises(ValueError, match="pickled with the default process group"):
        norm_of_step(optimizer, 1.0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    norm_of_step(optimizer, 1.0)
    assert optimizer.process_group is dist.group.WORLD
    # torch 2.6 hangs where it drops a group whose thread still holds a tensor of Python.
    dist.barrier()
    dist.destroy_process_group()


def test_a_pickle_that_is_read_before_there_is_a_process_group(tmp_path: Path) -> None:
    file = str(tmp_path / "optimizer.pt")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.save(owned(model(), 0, process_group=dist.group.WORLD), file)
    finally:
        dist.destroy_process_group()
    before_the_default_group(file)


@pytest.mark.parametrize(("ranks", "name"), registry.names)
def test_on_ranks(ranks: int, name: str) -> None:
    outcome = registry.outcomes(ranks)[name]
    assert not outcome, outcome
