"""Tensors without values: FakeTensorMode, memory estimates, make_fx."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fusedopt
from tests.cases import make_params
from tests.helpers import assert_same, contents

OPTIMIZERS: dict[str, Any] = {
    "adamw": (fusedopt.FusedAdamW, torch.optim.AdamW, {}),
    "amsgrad": (fusedopt.FusedAdamW, torch.optim.AdamW, {"amsgrad": True}),
    "adam": (fusedopt.FusedAdam, torch.optim.Adam, {"weight_decay": 0.1}),
    "sgd": (fusedopt.FusedSGD, torch.optim.SGD, {}),
    "momentum": (fusedopt.FusedSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
}
OURS: dict[str, Any] = {
    "plain": {},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "clip_grad_value": {"clip_grad_value": 1.0},
    "skip_nonfinite": {"skip_nonfinite": True},
    "both": {"max_grad_norm": 1.0, "skip_nonfinite": True},
    "maximize": {"maximize": True},
    "cpu": {"backend": "cpu"},
    "reference": {"backend": "reference", "max_grad_norm": 1.0},
}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4))


def backward(net: nn.Module) -> None:
    net(torch.randn(8, 64)).square().sum().backward()


def described(optimizer: torch.optim.Optimizer, params: list[Any]) -> Any:
    return [
        {k: (type(v), v.shape, v.dtype, v.device) for k, v in optimizer.state[p].items()}
        for p in params
        if p in optimizer.state
    ]


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fake_params_take_steps(name: str, ours: str) -> None:
    fused, plain, options = OPTIMIZERS[name]
    own = {k: v for k, v in OURS[ours].items() if k == "maximize"}
    with FakeTensorMode():
        nets = [model() for _ in range(2)]
        subject = fused(nets[0].parameters(), lr=0.1, **options, **OURS[ours])
        other = plain(nets[1].parameters(), lr=0.1, foreach=False, **options, **own)
        versions = [p._version for p in nets[0].parameters()]
        for _ in range(3):
            for net, optimizer in zip(nets, (subject, other), strict=True):
                optimizer.zero_grad()
                backward(net)
                optimizer.step()
        assert all(p._version > v for p, v in zip(nets[0].parameters(), versions, strict=True))
        assert all(isinstance(p, FakeTensor) for p in nets[0].parameters())
        expected = described(other, list(nets[1].parameters()))
        assert described(subject, list(nets[0].parameters())) == [
            {key: entry[key] for key in got}
            for got, entry in zip(
                described(subject, list(nets[0].parameters())), expected, strict=True
            )
        ]
        for got, entry in zip(
            described(subject, list(nets[0].parameters())), expected, strict=True
        ):
            assert got.keys() == entry.keys()
        subject.state_dict()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_params_outside_of_their_mode(device: str) -> None:
    """A device needs to be there for real tensors alone."""
    mode = FakeTensorMode()
    with mode:
        params = [nn.Parameter(torch.empty(5, 3, device=device))]
        params[0].grad = torch.empty(5, 3, device=device)
    optimizer = fusedopt.FusedAdamW(params, max_grad_norm=1.0, skip_nonfinite=True)
    for _ in range(2):
        optimizer.step()
    entry = optimizer.state[params[0]]
    assert isinstance(entry["exp_avg"], FakeTensor)
    assert entry["exp_avg"].device.type == device
    assert entry["step"] == 2
    with mode:
        optimizer.step()
    assert entry["step"] == 3


@pytest.mark.parametrize("lr", [torch.tensor(0.1), 0.1])
@pytest.mark.parametrize("scaled", [False, True])
def test_fake_hyperparameters_are_not_read(lr: Any, scaled: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = model()
        optimizer = fusedopt.FusedAdamW(net.parameters(), max_grad_norm=1.0)
        optimizer.param_groups[0]["lr"] = torch.empty(()) if isinstance(lr, torch.Tensor) else lr
        if scaled:
            optimizer.grad_scale = torch.empty(())  # type: ignore[attr-defined]
            optimizer.found_inf = torch.empty(())  # type: ignore[attr-defined]
        backward(net)
        optimizer.step()
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("started", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum"])
def test_real_params_under_the_mode_are_refused_as_by_torch(
    name: str, ours: str, started: bool
) -> None:
    fused, plain, options = OPTIMIZERS[name]
    params, twins, theirs = (make_params([5, (3, 4)], torch.float32) for _ in range(3))
    subject, twin = (fused(p, lr=0.1, **options, **OURS[ours]) for p in (params, twins))
    if started:
        subject.step()
        twin.step()
    before = contents(subject)
    message = "Please convert all Tensors to FakeTensors first"
    with FakeTensorMode():
        with pytest.raises(AssertionError, match=message):
            plain(theirs, lr=0.1, foreach=False, **options).step()
        with pytest.raises(AssertionError, match=message) as raised:
            subject.step()
    assert 'param_groups[0]["params"][0]' in str(raised.value)
    assert_same(contents(subject), before)
    subject.step()  # and nothing fake is left behind
    twin.step()
    assert_same(contents(subject), contents(twin))
    assert type(subject.skipped_steps) is torch.Tensor
    if subject.max_grad_norm is not None or subject.skip_nonfinite:
        assert type(subject.grad_norm) is torch.Tensor
        assert torch.equal(subject.grad_norm, twin.grad_norm)


def test_buffers_that_are_asked_for_under_the_mode_are_real() -> None:
    params = make_params([5], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, max_grad_norm=1.0)
    with FakeTensorMode():
        assert type(optimizer.skipped_steps) is torch.Tensor
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("ours", ["plain", "both", "clip_grad_value"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mem_tracker_reports_what_torch_fused_takes(name: str, ours: str, fake: bool) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    fused, plain, options = OPTIMIZERS[name]

    def peak(cls: Any, **kwargs: Any) -> dict[str, int]:
        net = model()
        optimizer = cls(net.parameters(), lr=0.1, **kwargs)
        tracker = MemTracker()
        tracker.track_external(net, optimizer)
        with tracker:
            for step in range(2):
                if step:
                    tracker.reset_mod_stats()
                backward(net)
                optimizer.step()
                optimizer.zero_grad()
        (snapshot,) = tracker.get_tracker_snapshot("current").values()
        (highest,) = tracker.get_tracker_snapshot("peak").values()
        optimizer_state = next(v for k, v in snapshot.items() if str(k).endswith("OPT"))
        return {"state": optimizer_state, "peak": highest["Total"]}

    if fake:
        with FakeTensorMode():
            got, expected = peak(fused, **options, **OURS[ours]), peak(plain, fused=True, **options)
    else:
        got, expected = peak(fused, **options, **OURS[ours]), peak(plain, fused=True, **options)
    # grad_norm and skipped_steps, of real steps; the norm's own temporary tensors are none.
    for key, value in expected.items():
        assert value <= got[key] <= value + 16, key


def test_clip_functions_under_the_mode() -> None:
    with FakeTensorMode():
        net = model()
        backward(net)
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        assert isinstance(fusedopt.clip_grad_norm_(net.parameters(), 1.0), FakeTensor)
        assert isinstance(fusedopt.get_total_norm(grads), FakeTensor)
        fusedopt.clip_grad_value_(net.parameters(), 1.0)
    assert isinstance(fusedopt.clip_grad_norm_(net.parameters(), 1.0), FakeTensor)
    params = make_params([5], torch.float32)
    assert params[0].grad is not None
    before = params[0].grad.clone()
    with FakeTensorMode():
        for clip in (fusedopt.clip_grad_norm_, fusedopt.clip_grad_value_):
            with pytest.raises(AssertionError, match="Please convert all Tensors"):
                clip(params, 0.1)
    assert torch.equal(params[0].grad, before)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_make_fx_records_the_update(tracing: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def train(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        leaf = param.detach().requires_grad_()
        leaf.grad = grad
        fusedopt.FusedAdamW([leaf], lr=0.1).step()
        return leaf.detach()

    param, grad = torch.randn(7), torch.randn(7)
    recorded = make_fx(train, tracing_mode=tracing)(torch.ones(7), torch.ones(7))
    torch.testing.assert_close(recorded(param, grad), train(param, grad))


def test_meta_params_with_every_option() -> None:
    for options in OURS.values():
        if options.get("backend") == "cpu":
            continue
        params = [nn.Parameter(torch.empty(5, 3, device="meta"))]
        params[0].grad = torch.empty(5, 3, device="meta")
        optimizer = fusedopt.FusedAdamW(params, **options)
        optimizer.step()
        optimizer.step()
        assert optimizer.state[params[0]]["exp_avg"].is_meta
        assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_meta_params_beside_real_ones(backend: str) -> None:
    real, twin = (make_params([5], torch.float32) for _ in range(2))
    meta = nn.Parameter(torch.empty(3, device="meta"))
    meta.grad = torch.empty(3, device="meta")
    fusedopt.FusedAdamW([*real, meta], backend=backend).step()
    fusedopt.FusedAdamW(twin, backend="reference").step()
    assert torch.equal(real[0], twin[0])
