"""step_in_backward() beside what reduces gradients over ranks: refused, whichever came first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusedopt
from tests import ranks as gloo
from tests.test_distributed import adamw, data, mesh_of, model, train
from tests.test_distributed_shards import fsdp1

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed part")
registry = gloo.Registry()
IN_DDP = "model must not be in DistributedDataParallel"
ddp = nn.parallel.DistributedDataParallel


class Inside(nn.Module):
    """Has the model as a part, and does not call its forward."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class OwnDdp(nn.parallel.DistributedDataParallel):
    """As libraries derive theirs."""


def replicated(net: nn.Sequential) -> nn.Module:
    from torch.distributed._composable.replicate import replicate

    result: nn.Module = replicate(net)
    return result


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": ddp,
    "subclass": OwnDdp,
    "around_a_module_that_has_it": lambda net: ddp(Inside(net)),
    "static_graph": lambda net: ddp(net, static_graph=True),
    "gradients_as_views": lambda net: ddp(net, gradient_as_bucket_view=True),
    "replicate": replicated,
}


def step_in_backward(net: nn.Module) -> tuple[Any, Any]:
    optimizer = adamw(net, max_grad_norm=None)
    return fusedopt.step_in_backward(net, optimizer), optimizer


def assert_refused_in_backward(whole: nn.Module, net: nn.Module, rank: int, ranks: int) -> None:
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=IN_DDP):
        whole(data(0, rank, ranks)).square().mean().backward()
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)


def attached_first(rank: int, ranks: int, wrapper: str, backwards: int) -> None:
    net = model()
    _, optimizer = step_in_backward(net)
    for step in range(backwards):
        net(data(step)).square().mean().backward()  # the same on all ranks
    whole = WRAPPERS[wrapper](net)
    assert_refused_in_backward(whole, net, rank, ranks)
    assert all(entry["step"] == backwards for entry in optimizer.state.values())


def wrapped_first(rank: int, ranks: int, wrapper: str, forwards: int) -> None:
    net = model()
    whole = WRAPPERS[wrapper](net)
    for _ in range(forwards):
        whole(data(0, rank, ranks)).square().mean().backward()
        whole.zero_grad()
    if wrapper == "replicate" and not forwards:  # makes its DDP in the first forward
        step_in_backward(net)
        assert_refused_in_backward(whole, net, rank, ranks)
        return
    for part in (whole, net):
        with pytest.raises(ValueError, match=IN_DDP):
            fusedopt.step_in_backward(part, adamw(net, max_grad_norm=None))
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())  # type: ignore[attr-defined]


for _wrapper in WRAPPERS:
    for _times in (0, 2):
        _case = {"wrapper": _wrapper}
        registry.add(
            f"attached_before_{_wrapper}_{_times}",
            partial(attached_first, backwards=_times, **_case),
            2,
        )
        registry.add(
            f"attached_inside_of_{_wrapper}_{_times}",
            partial(wrapped_first, forwards=_times, **_case),
            2,
        )


@registry.on(2)
def beside_ddp_of_another_model(rank: int, ranks: int) -> None:
    net, alone, other = model(), model(), ddp(model())
    step_in_backward(net)
    optimizer = adamw(alone, max_grad_norm=None)
    for step in range(3):
        net(data(step)).square().mean().backward()
        alone(data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        other(data(step, rank, ranks)).square().mean().backward()
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)


@registry.on(2)
def after_ddp_has_gone(rank: int, ranks: int) -> None:
    net = model()
    whole = ddp(net)
    train(whole, adamw(whole), range(1), rank, ranks)
    net.zero_grad()
    del whole
    step_in_backward(net)
    net(data(0)).square().mean().backward()
    assert all(p.grad is None for p in net.parameters())


@registry.on(2)
def sharded_params(rank: int, ranks: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for originals in (False, True):
        net = fsdp1(model(), use_orig_params=originals)
        with pytest.raises(ValueError, match=r"is part of FSDP1's flat params, whose gradient"):
            step_in_backward(net)
    net = fully_shard(model(), mesh=mesh_of((ranks,)))
    with pytest.raises(ValueError, match="is a DTensor, whose gradient"):
        step_in_backward(net)


@pytest.mark.parametrize(("ranks", "name"), registry.names)
def test_on_ranks(ranks: int, name: str) -> None:
    outcome = registry.outcomes(ranks)[name]
    assert not outcome, outcome
