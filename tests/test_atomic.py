"""A step that raises has changed nothing, whatever it finds and however late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from tests.cases import make_params
from tests.helpers import assert_same, copied

BACKENDS = ("cpu", "reference", "auto")
Fault = Callable[[Any, Parameter], None]  # of an optimizer, and of the last param


def hyper(key: str, value: Any) -> Fault:
    def put(optimizer: Any, last: Parameter) -> None:
        optimizer.param_groups[1][key] = value

    return put


def without(key: str) -> Fault:
    def put(optimizer: Any, last: Parameter) -> None:
        del optimizer.param_groups[1][key]

    return put


def state(key: str, value: Any) -> Fault:
    def put(optimizer: Any, last: Parameter) -> None:
        optimizer.state[last] = {**optimizer.state.get(last, {}), key: value}

    return put


def gradient(value: Tensor) -> Fault:
    """Torch refuses to assign it: it comes by another road, as from a C++ hook."""

    def put(optimizer: Any, last: Parameter) -> None:
        last.grad = torch.ones_like(last)
        last.grad.data = value

    return put


def expanded(optimizer: Any, last: Parameter) -> None:
    last.data = torch.ones(1).expand(3, 4)
    last.grad = torch.ones(3, 4)


def scale(optimizer: Any, last: Parameter) -> None:
    optimizer.grad_scale, optimizer.found_inf = torch.ones(2), torch.zeros(())


ADAMW: dict[str, Fault] = {
    "lr is text": hyper("lr", "x"),
    "lr has elements": hyper("lr", torch.ones(3)),
    "betas are one": hyper("betas", (0.9,)),
    "betas are none": hyper("betas", None),
    "beta is text": hyper("betas", (0.9, "x")),
    "eps is an object": hyper("eps", object()),
    "weight_decay is a list": hyper("weight_decay", [0.1]),
    "no eps": without("eps"),
    "no lr": without("lr"),
    "exp_avg of another shape": state("exp_avg", torch.ones(2)),
    "exp_avg_sq that would broadcast": state("exp_avg_sq", torch.ones(1, 4)),
    "exp_avg of integers": state("exp_avg", torch.ones(3, 4, dtype=torch.int64)),
    "exp_avg is complex": state("exp_avg", torch.ones(3, 4, dtype=torch.complex64)),
    "exp_avg is meta": state("exp_avg", torch.ones(3, 4, device="meta")),
    "exp_avg is expanded": state("exp_avg", torch.ones(1).expand(3, 4)),
    "exp_avg is text": state("exp_avg", "x"),
    "step has elements": state("step", torch.ones(2)),
    "step is negative": state("step", torch.tensor(-1.0)),
    "step is nan": state("step", torch.tensor(float("nan"))),
    "sparse gradient": lambda o, last: setattr(last, "grad", torch.ones(3, 4).to_sparse()),
    "gradient of another shape": gradient(torch.ones(4, 3)),
    "gradient that would broadcast": gradient(torch.ones(1, 4)),
    "gradient of one element": gradient(torch.ones(1)),
    "gradient of no dims": gradient(torch.ones(())),
    "param is expanded": expanded,
    "grad_scale has elements": scale,
}


def inferred(optimizer: Any, last: Parameter) -> None:
    with torch.inference_mode():
        moments = {"exp_avg": torch.zeros(3, 4), "exp_avg_sq": torch.zeros(3, 4)}
    optimizer.state[last] = {"step": torch.zeros(()), **moments}


REFERENCE: dict[str, Fault] = {  # the kernels compute with what Python refuses
    "beta of one": hyper("betas", (1.0, 0.999)),
    "state of inference mode": inferred,
}
SGD: dict[str, Fault] = {
    "momentum is text": hyper("momentum", "x"),
    "no nesterov": without("nesterov"),
    "buffer of another shape": state("momentum_buffer", torch.ones(5)),
    "buffer is expanded": state("momentum_buffer", torch.ones(1).expand(3, 4)),
    "sparse buffer of another shape": state("momentum_buffer", torch.ones(3).to_sparse()),
    "gradient that would broadcast": gradient(torch.ones(1, 4)),
}
FAULTS = (
    [(fusedopt.FusedAdamW, name, fault, b) for name, fault in ADAMW.items() for b in BACKENDS]
    + [(fusedopt.FusedAdamW, name, fault, "reference") for name, fault in REFERENCE.items()]
    + [(fusedopt.FusedSGD, name, fault, b) for name, fault in SGD.items() for b in BACKENDS]
)


def snapshot(optimizer: Any, params: list[Parameter]) -> Any:
    entries = [dict(optimizer.state[p]) if p in optimizer.state else None for p in params]
    identities = [None if e is None else {k: id(v) for k, v in e.items()} for e in entries]
    plain = [
        None
        if e is None
        else {k: v for k, v in e.items() if not (isinstance(v, Tensor) and v.is_meta)}
        for e in entries
    ]
    dense = [
        None
        if e is None
        else {k: v.to_dense() if isinstance(v, Tensor) and v.is_sparse else v for k, v in e.items()}
        for e in plain
    ]
    return copied([[p.detach() for p in params], dense, identities])


@pytest.mark.parametrize("started", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(
    ("cls", "name", "fault", "backend"),
    FAULTS,
    ids=[f"{c.__name__}-{n}-{b}" for c, n, _, b in FAULTS],
)
def test_a_step_that_raises(cls: Any, name: str, fault: Fault, backend: str, started: bool) -> None:
    params = make_params([5, 700, (3, 4)], torch.float32)
    options = {"momentum": 0.9} if cls is fusedopt.FusedSGD else {}
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = cls(groups, lr=0.1, max_grad_norm=1.0, backend=backend, **options)
    if started:
        optimizer.step()
    fault(optimizer, params[-1])
    before = snapshot(optimizer, params)
    with pytest.raises((RuntimeError, TypeError, ValueError, KeyError, ZeroDivisionError)):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_fails_takes_the_state_back(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("a rank is gone")

    monkeypatch.setattr(fusedopt.distributed, "all_reduce_sum", fail)
    params = make_params([5, 7], torch.float32)
    optimizer = fusedopt.FusedAdamW(
        params,
        max_grad_norm=1.0,
        process_group=torch.distributed.ProcessGroup(0, 1),
        backend=backend,
    )
    before = snapshot(optimizer, params)
    with pytest.raises(ConnectionError):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    assert not optimizer.state


@pytest.mark.parametrize("value", [None, [], "x", torch.ones(2)])
def test_the_reference_names_a_hyperparameter_as_the_kernels_do(value: Any) -> None:
    params = make_params([5, 7], torch.float32)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = fusedopt.FusedAdamW(groups, backend="reference")
    optimizer.param_groups[1]["lr"] = value
    message = r"param_groups\[1\]\['lr'\] must be a number or a one-element tensor, got"
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    optimizer.param_groups[1].update(lr=0.1, betas=(0.9, value))
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['betas'\] must be"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("how", ["sum", "csr", "step"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sparse_momentum_buffer_becomes_dense(backend: str, how: str) -> None:
    """torch.optim.SGD keeps one for nn.Embedding(sparse=True)."""
    ours, theirs = (make_params([(10, 3), 7], torch.float32) for _ in range(2))
    subject = fusedopt.FusedSGD(ours, lr=0.1, momentum=0.9, backend=backend)
    plain = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    indices, values = torch.tensor([[1, 5, 1]]), torch.randn(3, 3)
    grad = torch.sparse_coo_tensor(indices, values, (10, 3))
    theirs[0].grad = grad.clone()
    theirs[1].grad = None
    plain.step()
    buffer = plain.state[theirs[0]]["momentum_buffer"]
    assert buffer.is_sparse
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    sparse = buffer.to_dense().to_sparse_csr() if how == "csr" else buffer.clone()
    subject.state[ours[0]]["momentum_buffer"] = sparse
    for number in range(2):
        new = torch.sparse_coo_tensor(indices, values * number, (10, 3))
        ours[0].grad = new.to_dense() if how == "step" else new.clone()
        theirs[0].grad = new.clone()
        ours[1].grad = theirs[1].grad = torch.full((7,), 0.5)
        subject.step()
        plain.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q)
        got = subject.state[ours[0]]["momentum_buffer"]
        assert got.layout == torch.strided
        torch.testing.assert_close(got, plain.state[theirs[0]]["momentum_buffer"].to_dense())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_skipped_step_leaves_the_sparse_buffer(backend: str) -> None:
    params = make_params([(10, 3)], torch.float32)
    optimizer = fusedopt.FusedSGD(params, lr=0.1, momentum=0.9, backend=backend)
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 5]]), torch.randn(2, 3), (10, 3))
    optimizer.state[params[0]]["momentum_buffer"] = sparse
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.state[params[0]]["momentum_buffer"] is sparse
