"""step_in_backward(): the same updates, without the gradients of the whole model at once."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusedopt
from fusedopt import backward

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


# A GradScaler: it may be made, and scale its first loss, at any time.


def frozen(net: nn.Module, optimizer: fusedopt.FusedOptimizer) -> list[Any]:
    """What a refused step must leave as it is."""
    return [[p.detach().clone() for p in net.parameters()], len(optimizer.state)]


def assert_refused_in_backward(
    match: str, loss: Tensor, net: nn.Module, optimizer: fusedopt.FusedOptimizer
) -> None:
    params, states = frozen(net, optimizer)
    with pytest.raises(ValueError, match=match):
        loss.backward()
    for p, old in zip(net.parameters(), params, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None
    assert len(optimizer.state) == states


class OtherScaler(torch.amp.GradScaler):
    """As frameworks derive theirs."""


@pytest.mark.parametrize("cls", [torch.amp.GradScaler, OtherScaler])
@pytest.mark.parametrize("made", ["before", "after", "later"])
def test_a_grad_scaler_is_refused(cls: type[torch.amp.GradScaler], made: str) -> None:
    net = model()
    optimizer = fusedopt.FusedAdamW(net.parameters())
    scaler = cls("cpu") if made == "before" else None
    handle = fusedopt.step_in_backward(net, optimizer)
    if made == "after":
        scaler = cls("cpu")
    for step in range(2):
        loss(net, step).backward()  # unscaled so far
    scaler = scaler or cls("cpu")
    for _ in range(2):  # each time
        scaled = scaler.scale(loss(net, 2))
        assert_refused_in_backward("a GradScaler looks for overflows", scaled, net, optimizer)
    handle.remove()
    refused("a GradScaler looks for overflows", net, optimizer)
    scaler.scale(loss(net, 3)).backward()
    scaler.step(optimizer)
    scaler.update()


def test_a_grad_scaler_that_scales_nothing_of_ours() -> None:
    torch.amp.GradScaler("cpu").scale(torch.ones(1))  # is gone
    cycle = [torch.amp.GradScaler("cpu")]
    cycle[0].scale(torch.ones(1))
    cycle[0].itself = cycle  # type: ignore[attr-defined]
    del cycle  # is garbage
    disabled, idle = torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu")
    net = model()
    optimizer = fusedopt.FusedAdamW(net.parameters())
    fusedopt.step_in_backward(net, optimizer)
    disabled.scale(loss(net, 0)).backward()
    disabled.step(optimizer)
    assert idle.is_enabled()
    assert len(optimizer.state) == 5


def test_a_grad_scaler_of_another_model() -> None:
    nets = model(), model()
    optimizers = [fusedopt.FusedAdamW(net.parameters()) for net in nets]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(nets[1], 0)).backward()
    fusedopt.step_in_backward(nets[0], optimizers[0], unscaled=True)
    loss(nets[0], 0).backward()
    scaler.step(optimizers[1])
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_scale_that_the_optimizer_was_given_is_refused() -> None:
    net = model()
    optimizer = fusedopt.FusedAdamW(net.parameters())
    fusedopt.step_in_backward(net, optimizer)
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    assert_refused_in_backward("a GradScaler looks", loss(net, 0), net, optimizer)


# Checkpointing: with use_reentrant=True a layer that is used twice has two backwards.


class Checkpointed(nn.Module):
    """A layer that is used twice, another one once, and one outside."""

    def __init__(self, reentrant: bool, nested: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.once, self.head = (nn.Linear(5, 5) for _ in range(3))
        self.reentrant, self.nested = reentrant, nested

    def run(self, function: Any, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        result: Tensor = checkpoint(function, x, use_reentrant=self.reentrant)
        return result

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(lambda y: self.twice(y).tanh(), x)
        if self.nested:
            x = self.run(lambda y: self.run(self.once, y).tanh(), x)
        else:
            x = self.run(self.once, x).tanh()
        x = self.run(self.twice, x)
        result: Tensor = self.head(x)
        return result


def input_of(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 5, generator=generator).requires_grad_()


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_that_are_not_reentrant(nested: bool) -> None:
    nets = [Checkpointed(False, nested) for _ in range(2)]
    optimizers = [fusedopt.FusedAdamW(net.parameters(), lr=0.01) for net in nets]
    fusedopt.step_in_backward(nets[0], optimizers[0])
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            net(input_of(step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(entry["step"] == 3 for entry in optimizers[0].state.values())
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("earlier", [0, 1])
def test_reentrant_checkpoints_are_refused(nested: bool, twice: bool, earlier: int) -> None:
    # before the head is updated, too, whose turn comes first
    net = Checkpointed(False, nested)
    net.twice.requires_grad_(twice)
    optimizer = fusedopt.FusedAdamW(net.parameters())
    handle = fusedopt.step_in_backward(net, optimizer)
    for step in range(earlier):
        net(input_of(step)).sum().backward()
    net.reentrant = True
    for step in range(2):  # each time
        result = net(input_of(step)).sum()
        assert_refused_in_backward("pass use_reentrant=False", result, net, optimizer)
    net.reentrant = False
    net(input_of(2)).sum().backward()
    assert {entry["step"].item() for entry in optimizer.state.values()} == {earlier + 1}
    handle.remove()
    net.reentrant = True
    net(input_of(3)).sum().backward()
    assert net.once.weight.grad is not None


def test_a_layer_inside_and_outside_of_a_reentrant_checkpoint() -> None:
    net = Checkpointed(True)
    net.head = net.once
    optimizer = fusedopt.FusedAdamW(net.parameters())
    fusedopt.step_in_backward(net, optimizer)
    result = net(input_of(0)).sum()
    assert_refused_in_backward("pass use_reentrant=False", result, net, optimizer)
    if "GradientEdge" in str(torch.autograd.backward.__annotations__):
        root = torch.autograd.graph.get_gradient_edge(net(input_of(0)).sum())
        with pytest.raises(ValueError, match="pass use_reentrant=False"):
            torch.autograd.backward((root,), torch.ones(()))
    assert not optimizer.state


def test_reentrant_checkpoints_of_another_graph() -> None:
    net, other = model(), Checkpointed(True)
    optimizer = fusedopt.FusedAdamW(net.parameters())
    fusedopt.step_in_backward(net, optimizer)
    pending = other(input_of(0)).sum()
    loss(net, 0).backward()
    pending.backward()
    assert len(optimizer.state) == 5
    assert other.once.weight.grad is not None


@pytest.mark.gpu
def test_checkpoints_on_a_gpu() -> None:
    # Hooks run in a thread of the engine, which has no frame of backward().
    net = Checkpointed(True).cuda()
    optimizer = fusedopt.FusedAdamW(net.parameters())
    fusedopt.step_in_backward(net, optimizer)
    result = net(input_of(0).cuda()).sum()
    assert_refused_in_backward("pass use_reentrant=False", result, net, optimizer)
    net.reentrant = False
    net(input_of(0).cuda()).sum().backward()
    assert {entry["step"].item() for entry in optimizer.state.values()} == {1.0}
    layer = nn.Linear(5, 5).cuda()
    optimizer = fusedopt.FusedAdamW(layer.parameters())
    fusedopt.step_in_backward(layer, optimizer)
    x = OwnCheckpoint.apply(layer, OwnCheckpoint.apply(layer, input_of(0).cuda()))
    assert_refused_in_backward("called by the backward of an", x.sum(), layer, optimizer)


class OwnCheckpoint(torch.autograd.Function):
    """As libraries write theirs."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        result: Tensor = layer(x)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.layer(x)
        result.backward(grads[0])
        return None, x.grad


def test_a_backward_in_a_backward_is_refused() -> None:
    layer = nn.Linear(5, 5)
    optimizer = fusedopt.FusedSGD(layer.parameters(), lr=0.1)
    fusedopt.step_in_backward(layer, optimizer)
    x = OwnCheckpoint.apply(layer, OwnCheckpoint.apply(layer, input_of(0)))
    assert_refused_in_backward("called by the backward of an", x.sum(), layer, optimizer)


class Nested(torch.autograd.Function):
    """Its backward runs another one, on a graph of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            ctx.layer(torch.ones(5)).sum().backward()
        return grads[0], None


def test_a_nested_backward_in_another_thread_of_the_engine() -> None:
    # As for params on another GPU than the checkpoint: the hook's thread does not call backward().
    layer, nested, nodes = nn.Linear(5, 5), [], []

    def in_a_thread_of_its_own(param: Tensor) -> None:
        with ThreadPoolExecutor(1) as pool:
            nested.append(pool.submit(backward._is_nested).result())
            nodes.append(pool.submit(lambda: list(backward._nodes_of_this_backward())).result())

    layer.weight.register_post_accumulate_grad_hook(in_a_thread_of_its_own)
    result = layer(torch.ones(5)).sum()
    result.backward()
    Nested.apply(torch.ones(5, requires_grad=True), layer).sum().backward()
    assert nested == [False, True]
    assert nodes[0][0] is result.grad_fn
    assert any(type(node).__name__ == "NestedBackward" for node in nodes[1])


def test_a_step_that_raises_leaves_no_gradient_behind() -> None:
    net = model()
    optimizer = fusedopt.FusedAdamW(net.parameters())
    fusedopt.step_in_backward(net, optimizer)
    optimizer.param_groups[0]["lr"] = "fast"
    params, states = frozen(net, optimizer)
    with pytest.raises(TypeError):
        loss(net, 0).backward()
    for p, old in zip(net.parameters(), params, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None
    assert len(optimizer.state) == states
    optimizer.param_groups[0]["lr"] = 0.01
    loss(net, 0).backward()
    assert len(optimizer.state) == 5


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_do_not_step_in_backward(copy: Any) -> None:
    net = model()
    optimizer = fusedopt.FusedAdamW(net.parameters())
    fusedopt.step_in_backward(net, optimizer)
    loss(net, 0).backward()
    other_net, other = copy((net, optimizer))
    loss(other_net, 1).backward()
    assert other_net[0].weight.grad is not None
    other.step()
    loss(net, 1).backward()
    for p, q in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_option_that_is_set_later_is_refused_in_backward() -> None:
    net = model()
    optimizer = fusedopt.FusedAdamW(net.parameters())
    fusedopt.step_in_backward(net, optimizer)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="max_grad_norm needs the norm"):
        loss(net, 0).backward()
