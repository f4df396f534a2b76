"""Promises 43 to 46: params that are spread over ranks. What runs on ranks are the functions that
`registry` lists; the tests at the end report on them."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusedopt
from tests import old_torch
from tests import ranks as gloo

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed part")

WIDTHS = (12, 32, 6, 5)  # uneven over 2 and 4 ranks; 5 leaves an empty shard on 4
STEPS = 4
registry = gloo.Registry()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers).double()


def data(step: int, share: int = 0, shares: int = 1) -> Tensor:
    """A share of a step's batch of 8."""
    generator = torch.Generator().manual_seed(100 + step)
    whole = torch.randn(8, WIDTHS[0], generator=generator, dtype=torch.float64)
    return whole.chunk(shares)[share]


def train(
    net: nn.Module, optimizer: Any, steps: range = range(STEPS), share: int = 0, shares: int = 1
) -> list[float]:
    """The total norm of each step."""
    norms = []
    for step in steps:
        optimizer.zero_grad()
        net(data(step, share, shares)).square().mean().backward()
        optimizer.step()
        norm = getattr(optimizer, "grad_norm", None)
        norms.append(0.0 if norm is None else norm.item())
    return norms


def adamw(net: nn.Module, **options: Any) -> fusedopt.FusedAdamW:
    options = {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.05, **options}
    return fusedopt.FusedAdamW(net.parameters(), **options)


def full(tensor: Any) -> Tensor:
    plain: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return plain.detach()


def assert_equals_alone(net: nn.Module, norms: list[float], **options: Any) -> None:
    """The params of all ranks and the norms are those of one process."""
    alone = model()
    want = train(alone, adamw(alone, **options))
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(want), rtol=1e-6, atol=0)
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p), q.detach(), rtol=1e-12, atol=1e-14)


def sharded(mesh: Any) -> nn.Sequential:
    """The model under FSDP2, each layer apart."""
    from torch.distributed.fsdp import fully_shard

    old_torch.need_fsdp2_on_cpu()
    net = model()
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def mesh_of(shape: tuple[int, ...], *names: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names or None)


def fsdp2(rank: int, ranks: int, **options: Any) -> None:
    net = sharded(mesh_of((ranks,)))
    optimizer = adamw(net, **options)
    norms = train(net, optimizer, share=rank, shares=ranks)
    assert optimizer.backend_in_use == options.get("backend", "cpu")
    for entry in optimizer.state.values():
        assert hasattr(entry["exp_avg"], "placements")
        assert not hasattr(entry["step"], "placements")
    assert_equals_alone(net, norms, **options)


for _name, _options in {
    "clip": {},
    "plain": {"max_grad_norm": None},
    "reference": {"backend": "reference"},
    "amsgrad_by_value": {"max_grad_norm": None, "clip_grad_value": 1e-3, "amsgrad": True},
}.items():
    registry.add(f"fsdp2_{_name}", functools.partial(fsdp2, **_options), 2, 4)


@registry.on(4)
def hsdp_does_not_count_replicas_twice(rank: int, ranks: int) -> None:
    net = sharded(mesh_of((2, 2), "replicate", "shard"))
    for backend in ("cpu", "reference"):
        net = sharded(mesh_of((2, 2), "replicate", "shard"))
        norms = train(net, adamw(net, backend=backend), share=rank, shares=ranks)
        assert_equals_alone(net, norms)


def parallel(net: nn.Module, mesh: Any) -> nn.Module:
    """Tensor parallel in the first two layers; the third stays a layer of plain params."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    return parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


@registry.on(2, 4)
def tensor_parallel_and_plain_params_in_one_optimizer(rank: int, ranks: int) -> None:
    for backend in ("cpu", "reference"):
        net = parallel(model(), mesh_of((ranks,)))
        kinds = {type(p).__name__ for p in net.parameters()}
        assert len(kinds) == 2, kinds
        norms = train(net, adamw(net, backend=backend))
        assert_equals_alone(net, norms)


@registry.on(4)
def fsdp2_over_tensor_parallel(rank: int, ranks: int) -> None:
    from torch.distributed.fsdp import fully_shard

    old_torch.need_fsdp2_on_cpu()
    mesh = mesh_of((2, 2), "data", "tensor")
    net = parallel(model(), mesh["tensor"])
    for layer in net:  # type: ignore[attr-defined]
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(net, mesh=mesh["data"])
    norms = train(net, adamw(net), share=mesh["data"].get_local_rank(), shares=2)
    assert_equals_alone(net, norms)


@registry.on(2)
def ddp(rank: int, ranks: int) -> None:
    net = nn.parallel.DistributedDataParallel(model())
    norms = train(net, adamw(net), share=rank, shares=ranks)
    assert_equals_alone(net, norms)


@registry.on(2)
def each_rank_owns_some_params(rank: int, ranks: int) -> None:
    # As ZeRO-1: the norm spans the params of all ranks.
    net = model()
    owned = list(net.parameters())[rank::ranks]
    optimizer = fusedopt.FusedAdamW(
        owned, lr=0.01, weight_decay=0.1, max_grad_norm=0.05, process_group=dist.group.WORLD
    )
    norms = []
    for step in range(STEPS):
        net.zero_grad()
        net(data(step)).square().mean().backward()
        optimizer.step()
        assert optimizer.grad_norm is not None
        norms.append(optimizer.grad_norm.item())
        for i, p in enumerate(net.parameters()):
            dist.broadcast(p.detach(), src=i % ranks)
    assert_equals_alone(net, norms)


@registry.on(2)
def zero_redundancy_optimizer(rank: int, ranks: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = model()
    optimizer = ZeroRedundancyOptimizer(
        net.parameters(),
        optimizer_class=fusedopt.FusedAdamW,
        lr=0.01,
        weight_decay=0.1,
        max_grad_norm=0.05,
    )
    # The wrapped optimizer sees its own share of the params.
    optimizer.optim.process_group = dist.group.WORLD  # type: ignore[attr-defined]
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        net(data(step)).square().mean().backward()
        optimizer.step()
        norms.append(optimizer.optim.grad_norm.item())  # type: ignore[attr-defined]
    assert_equals_alone(net, norms)


@registry.on(2)
def a_bad_gradient_on_one_rank_skips_the_step_on_all(rank: int, ranks: int) -> None:
    for backend in ("cpu", "reference"):
        net = sharded(mesh_of((ranks,)))
        optimizer = adamw(net, skip_nonfinite=True, backend=backend)
        train(net, optimizer, range(1), rank, ranks)
        before = [full(p).clone() for p in net.parameters()]
        net(data(1, rank, ranks)).square().mean().backward()
        if rank == 1:
            next(net.parameters()).grad.to_local().fill_(float("inf"))  # type: ignore[union-attr]
        optimizer.step()
        assert optimizer.skipped_steps.item() == 1
        for p, old in zip(net.parameters(), before, strict=True):
            assert torch.equal(full(p), old)
        assert all(entry["step"].item() == 1 for entry in optimizer.state.values())


@registry.on(2)
def a_rank_without_gradients_takes_part_in_the_norm(rank: int, ranks: int) -> None:
    for backend in ("cpu", "reference"):
        param = nn.Parameter(torch.ones(4))
        optimizer = fusedopt.FusedSGD(
            [param], lr=1.0, max_grad_norm=1.0, process_group=dist.group.WORLD, backend=backend
        )
        if rank == 0:
            param.grad = torch.full((4,), 3.0)
        optimizer.step()
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.item() == 6.0
        torch.testing.assert_close(param.detach(), torch.full((4,), 0.5 if rank == 0 else 1.0))


@registry.on(2)
def a_gradient_in_other_placements_is_redistributed(rank: int, ranks: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of((ranks,))
    values, grad = torch.arange(12.0).reshape(4, 3), torch.randn(4, 3).fill_(0.5)
    for backend in ("cpu", "reference"):
        param = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
        param.grad = distribute_tensor(grad, mesh, [Replicate()])
        fusedopt.FusedSGD([param], lr=1.0, backend=backend).step()
        assert torch.equal(full(param), values - grad)


@registry.on(2)
def clip_grad_norm_takes_dtensors(rank: int, ranks: int) -> None:
    net, alone = sharded(mesh_of((ranks,))), model()
    for _ in range(2):
        net(data(0, rank, ranks)).square().mean().backward()
        alone(data(0)).square().mean().backward()
        got = fusedopt.clip_grad_norm_(net.parameters(), 0.05)
        want = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
        torch.testing.assert_close(full(got), want, rtol=1e-12, atol=0)
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(full(p.grad), q.grad, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(("ranks", "name"), registry.names)
def test_on_ranks(ranks: int, name: str) -> None:
    gloo.judge(registry.outcomes(ranks)[name])
