"""step_in_backward(): the same updates, without the gradients of the whole model at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusedopt

Class = type[fusedopt.FusedOptimizer]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    twice = nn.Linear(9, 9)
    net = nn.Sequential(nn.Linear(6, 9), twice, nn.Tanh(), twice, nn.Linear(9, 2))
    net[4].bias.requires_grad_(False)
    return net


def loss(net: nn.Module, step: int) -> Tensor:
    result: Tensor = net(torch.randn(4, 6, generator=torch.Generator().manual_seed(step)))
    return result.square().mean()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (fusedopt.FusedAdamW, {"lr": 0.01, "amsgrad": True}),
        (fusedopt.FusedAdam, {"lr": 0.01, "weight_decay": 0.1, "clip_grad_value": 0.01}),
        (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9}),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_updates_are_the_same_bits(cls: Class, options: dict[str, Any], backend: str) -> None:
    nets = model(), model()
    optimizers = [cls(net.parameters(), backend=backend, **options) for net in nets]
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in optimizers]
    handle = fusedopt.step_in_backward(nets[0], optimizers[0])
    for step in range(5):
        for net, optimizer, scheduler in zip(nets, optimizers, schedulers, strict=True):
            loss(net, step).backward()
            if net is nets[0]:
                assert all(p.grad is None for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    handle.remove()
    loss(nets[0], 5).backward()
    assert nets[0][0].weight.grad is not None  # as before the hooks
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_one_gradient_at_a_time() -> None:
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
    optimizer = fusedopt.FusedSGD(net.parameters(), lr=0.1)
    there = []
    step = optimizer.step

    def counted() -> None:
        there.append(sum(p.grad is not None for p in net.parameters()))
        step()

    optimizer.step = counted  # type: ignore[method-assign]
    fusedopt.step_in_backward(net, optimizer)
    net(torch.randn(2, 64)).sum().backward()
    assert there == [1] * 6


def refused(
    match: str, net: nn.Module, optimizer: Any, error: type[Exception] = ValueError
) -> None:
    with pytest.raises(error, match=match):
        fusedopt.step_in_backward(net, optimizer)
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())  # type: ignore[attr-defined]


def test_what_cannot_work_is_refused() -> None:
    net = model()
    adamw = fusedopt.FusedAdamW
    refused("max_grad_norm needs the norm", net, adamw(net.parameters(), max_grad_norm=1.0))
    refused("skip_nonfinite needs the norm", net, adamw(net.parameters(), skip_nonfinite=True))
    refused("must be a fusedopt", net, torch.optim.AdamW(net.parameters()), TypeError)
    refused("does not have the model's param '0.bias'", net, adamw([net[0].weight]))
    extra = nn.Parameter(torch.ones(3))
    refused("params that are not the model's", net, adamw([*net.parameters(), extra]))
    optimizer = adamw(net.parameters())
    loss(net, 0).backward()
    refused("cannot be accumulated", net, optimizer)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_params_of_several_ranks_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = model()
        optimizer = fusedopt.FusedAdamW(net.parameters())
        refused(
            "model must not be in DistributedDataParallel",
            nn.parallel.DistributedDataParallel(net),
            optimizer,
        )
        sharded = fully_shard(model(), mesh=init_device_mesh("cpu", (1,)))
        refused("is a DTensor", sharded, fusedopt.FusedAdamW(sharded.parameters()))
    finally:
        dist.destroy_process_group()


def test_a_grad_scaler_is_refused_in_backward() -> None:
    net = model()
    optimizer = fusedopt.FusedAdamW(net.parameters())
    fusedopt.step_in_backward(net, optimizer)
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="a GradScaler looks for overflows"):
        loss(net, 0).backward()


def test_an_option_that_is_set_later_is_refused_in_backward() -> None:
    net = model()
    optimizer = fusedopt.FusedAdamW(net.parameters())
    fusedopt.step_in_backward(net, optimizer)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="max_grad_norm needs the norm"):
        loss(net, 0).backward()
