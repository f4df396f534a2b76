"""Promises 47, 49 and 50: wrong input is an exception that names it, and changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt import _native
from tests.cases import BACKENDS, make_params

_C = _native._C
assert _C is not None

ADAMS = [fusedopt.FusedAdamW, fusedopt.FusedAdam]
NAN = float("nan")


def param() -> torch.nn.Parameter:
    (p,) = make_params([7], torch.float32)
    return p


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": NAN}, ValueError, "Invalid learning rate: nan"),
        ({"lr": "1e-3"}, TypeError, "Invalid learning rate: '1e-3'"),
        ({"lr": None}, TypeError, "Invalid learning rate: None"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ({"lr": torch.ones(1, dtype=torch.complex64)}, TypeError, "Invalid learning rate"),
        ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
        ({"eps": NAN}, ValueError, "Invalid epsilon value: nan"),
        ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
        ({"betas": (0.9, NAN)}, ValueError, "Invalid beta parameter at index 1: nan"),
        ({"betas": 0.9}, TypeError, "Invalid betas: 0.9"),
        ({"betas": (0.9,)}, TypeError, "Invalid betas"),
        ({"betas": ("a", "b")}, TypeError, "Invalid beta parameter at index 0: 'a'"),
        ({"betas": (0.9, torch.tensor(0.9))}, ValueError, "both floats or both Tensors"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
        ({"weight_decay": NAN}, ValueError, "Invalid weight_decay value: nan"),
        ({"weight_decay": [0.1]}, TypeError, "Invalid weight_decay value"),
        ({"differentiable": True}, RuntimeError, "does not support `differentiable`"),
        ({"foreach": True, "fused": True}, RuntimeError, "cannot be `True` together"),
    ],
)
@pytest.mark.parametrize("cls", ADAMS)
def test_adam_constructor(cls: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as raised:
        cls([param()], **options)
    assert message in str(raised.value)
    with pytest.raises(error):  # a group of its own is held to the same
        cls([{"params": [param()], **options}])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1}, ValueError, "Invalid learning rate: -1"),
        ({"lr": NAN}, ValueError, "Invalid learning rate: nan"),
        ({"momentum": -0.5}, ValueError, "Invalid momentum value: -0.5"),
        ({"momentum": NAN}, ValueError, "Invalid momentum value: nan"),
        ({"momentum": "0.9"}, TypeError, "Invalid momentum value: '0.9'"),
        ({"dampening": "x"}, TypeError, "Invalid dampening value: 'x'"),
        ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
        ({"nesterov": True}, ValueError, "Nesterov momentum requires a momentum"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "zero dampening"),
    ],
)
def test_sgd_constructor(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as raised:
        fusedopt.FusedSGD([param()], **options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be a number > 0"),
        ({"max_grad_norm": NAN}, ValueError, "max_grad_norm"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm"),
        ({"max_grad_norm": True}, TypeError, "max_grad_norm"),
        ({"clip_grad_value": -1.0}, ValueError, "clip_grad_value"),
        ({"max_grad_norm": 1.0, "clip_grad_value": 1.0}, ValueError, "cannot both be given"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite must be a bool"),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, cuda, triton, cpu"),
        ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot serve"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' cannot serve"),
    ],
)
@pytest.mark.parametrize("cls", [*ADAMS, fusedopt.FusedSGD])
def test_own_options(cls: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        cls([param()], **options)


def test_params_argument_as_torch() -> None:
    for bad, error in (
        (torch.ones(2), TypeError),
        ([], ValueError),
        ([1, 2], TypeError),
        ({param()}, None),
        ([{"params": {param()}}], TypeError),
        ([torch.ones(2, requires_grad=True) * 2], ValueError),
    ):
        for cls in (fusedopt.FusedSGD, torch.optim.SGD):
            if error is None:
                cls(bad, lr=0.1)
            else:
                with pytest.raises(error):
                    cls(bad, lr=0.1)


def test_backend_from_the_environment() -> None:
    script = (
        "import torch, fusedopt\n"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "o = fusedopt.FusedSGD([p]); o.step(); print(o.backend_in_use)\n"
    )
    for backend, expected in (("reference", "reference"), ("auto", "cpu"), ("nonsense", None)):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "FUSEDOPT_BACKEND": backend},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if expected is None:
            assert "FUSEDOPT_BACKEND must be one of" in done.stderr
        else:
            assert done.stdout.strip() == expected, done.stderr


def test_sparse_gradients_as_torch() -> None:
    for fused, plain in (
        (fusedopt.FusedAdamW, torch.optim.AdamW),
        (fusedopt.FusedSGD, torch.optim.SGD),
    ):
        ours, theirs = param(), param()
        sparse = torch.sparse_coo_tensor([[1, 5, 1]], [1.0, 2.0, 3.0], (7,))
        ours.grad, theirs.grad = sparse, sparse
        if fused is fusedopt.FusedAdamW:
            for cls, p in ((fused, ours), (plain, theirs)):
                with pytest.raises(RuntimeError, match=r"AdamW? does not support sparse gradients"):
                    cls([p]).step()
        else:
            for backend in BACKENDS:
                fused([ours], lr=0.1, backend=backend).step()
                plain([theirs], lr=0.1).step()
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_integer_params_are_refused(backend: str) -> None:
    whole = torch.nn.Parameter(torch.arange(4), requires_grad=False)
    good = param()
    before = good.detach().clone()
    optimizer = fusedopt.FusedSGD([good, whole], lr=0.1, momentum=0.9, backend=backend)
    optimizer.step()  # without a gradient it is left alone
    whole.grad = torch.ones(4, dtype=torch.int64)
    moved, state = good.detach().clone(), optimizer.state[good]["momentum_buffer"].clone()
    assert not torch.equal(moved, before)
    with pytest.raises(RuntimeError, match=r'param_groups\[0\]\["params"\]\[1\]'):
        optimizer.step()
    assert torch.equal(good, moved)
    assert torch.equal(optimizer.state[good]["momentum_buffer"], state)
    assert whole not in optimizer.state


def test_meta_params_do_as_in_torch() -> None:
    meta = torch.nn.Parameter(torch.empty(3, device="meta"))
    meta.grad = torch.empty(3, device="meta")
    optimizer = fusedopt.FusedAdamW([meta])
    optimizer.step()
    assert optimizer.state[meta]["exp_avg"].is_meta
    with pytest.raises(RuntimeError, match="no backend can serve this step; cpu"):
        fusedopt.FusedAdamW([meta], backend="cpu").step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_of_another_shape_is_refused(backend: str) -> None:
    params = make_params([5, 7], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, backend=backend)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg_sq"] = torch.ones(8)
    before = [p.detach().clone() for p in params]
    message = (
        r'the exp_avg_sq of param_groups\[0\]\["params"\]\[1\] has shape \[8\], expected \[7\]'
    )
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, old)
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("key", ["lr", "eps", "betas", "weight_decay"])
@pytest.mark.parametrize("value", ["x", [], object(), torch.ones(3)])
def test_hyperparameters_broken_after_construction(key: str, value: Any) -> None:
    params = make_params([5], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, backend="cpu")
    before = params[0].detach().clone()
    optimizer.param_groups[0][key] = value
    with pytest.raises(TypeError, match=rf"param_groups\[0\]\['{key}'\] must be"):
        optimizer.step()
    del optimizer.param_groups[0][key]
    with pytest.raises(KeyError, match=key):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state


def test_a_param_listed_twice_steps_as_in_torch() -> None:
    ours, theirs = param(), param()
    with pytest.warns(UserWarning, match="duplicate"):
        subject = fusedopt.FusedSGD([ours, ours], lr=0.1)
    with pytest.warns(UserWarning, match="duplicate"):
        plain = torch.optim.SGD([theirs, theirs], lr=0.1, foreach=False)
    subject.step()
    plain.step()
    torch.testing.assert_close(ours, theirs)
    assert subject.backend_in_use == "reference"


class Host:
    """A host that answers nonsense, for the fuzzer."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def new_state(self, *_: Any) -> Any:
        return self.answer

    resolve = dense_state = borrow_step = new_state


JUNK: list[Any] = [
    *(None, 0, -1, 1.5, "x", b"y", (), [], {}, object(), torch.Tensor, type, np.ones(3)),
    *(torch.ones(3), torch.nn.Parameter(torch.ones(3)), torch.ones(3, dtype=torch.int32)),
    *(torch.ones(2, 2).to_sparse(), torch.ones(3, device="meta")),
    *(torch.ones(3, dtype=torch.complex64), [torch.ones(3)]),
    *((torch.ones(()), print), (torch.ones(3), print), (torch.ones(()), 5)),
    *({"params": 3}, {"params": [None]}, [{"params": [torch.ones(3)]}], [{"params": [5]}]),
    *([{}], [3]),
]

_PLAN = _C.Plan("adamw")
_CUDA_PLAN = _C.CudaPlan("adamw")
ENTRY_POINTS = {
    "Plan": (_C.Plan, 1),
    "step": (_PLAN.step, 12),
    "refresh": (_PLAN.refresh, 3),
    "apply": (_PLAN.apply, 10),
    "plan.squared_norm": (_PLAN.squared_norm, 1),
    "CudaPlan": (_C.CudaPlan, 1),
    "cuda.step": (_CUDA_PLAN.step, 12),
    "cuda.refresh": (_CUDA_PLAN.refresh, 3),
    "cuda.squared_norm": (_CUDA_PLAN.squared_norm, 2),
    "cuda.apply": (_CUDA_PLAN.apply, 10),
    "cuda.clip": (_C.CudaClip().run, 8),
    "repeated_step": (_PLAN.repeated_step, 12),
    "cuda.repeated_step": (_CUDA_PLAN.repeated_step, 13),
    "describe": (_C.describe, 1),
    "grad_pointer": (_C.grad_pointer, 1),
    "bump_versions": (_C.bump_versions, 1),
    "squared_norm": (_C.squared_norm, 2),
    "scale_": (_C.scale_, 4),
    "use_direct": (_C.use_direct, 7),
    "use_dlpack": (_C.use_dlpack, 1),
    "set_types": (_C.set_types, 2),
}
EXPECTED = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, OverflowError)


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(sorted(ENTRY_POINTS)), st.data())
def test_entry_points_fuzzed(name: str, data: st.DataObject) -> None:
    function, arity = ENTRY_POINTS[name]
    junk = st.sampled_from(JUNK)
    arguments = [data.draw(junk) for _ in range(arity)]
    try:
        function(*arguments)
    except EXPECTED:
        pass
    finally:
        _PLAN.roll_back()
        _CUDA_PLAN.roll_back()


@pytest.mark.parametrize("plain", [[], [torch.Tensor, int], [torch.nn.Parameter], 3])
def test_set_types_refuses_what_is_not_torch(plain: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        _C.set_types(torch.Tensor, plain)
    with pytest.raises(ValueError, match="plain must hold base"):
        _C.set_types(type, [])


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(JUNK), st.sampled_from(JUNK), st.sampled_from(JUNK), st.booleans())
def test_refresh_fuzzed_inside_a_valid_group(
    in_params: Any, in_state: Any, answer: Any, empty_state: bool
) -> None:
    good = param()
    group = {
        "params": [good, in_params],
        "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0,
        "amsgrad": False, "maximize": False, "decoupled_weight_decay": True,
    }  # fmt: skip
    entry = {"exp_avg": in_state, "exp_avg_sq": in_state, "step": in_state}
    state: dict[Any, Any] = {} if empty_state else {good: entry}
    before = good.detach().clone()
    try:
        reason = _PLAN.refresh([group], state, Host(answer))
        if not reason:
            _PLAN.apply(-1.0, True, 1.0, 1e9, 1.0, False, False, 2, None, None)
    except EXPECTED:
        assert torch.equal(good, before)
    finally:
        _PLAN.roll_back()


def test_outputs_of_a_wrong_type_are_refused() -> None:
    params = make_params([5], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, max_grad_norm=1.0, backend="cpu")
    optimizer.step()
    before = params[0].detach().clone()
    optimizer._norm_tensor = torch.zeros(3)
    with pytest.raises(TypeError, match="grad_norm must be a 0-dim CPU tensor of float32"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_clip_functions_refuse_as_torch() -> None:
    with pytest.raises(AttributeError):
        fusedopt.clip_grad_norm_([1, 2], 1.0)  # type: ignore[list-item]
    with pytest.raises((ValueError, TypeError)):
        fusedopt.clip_grad_norm_([param()], "x")  # type: ignore[arg-type]


def test_fuse_refuses_what_it_cannot_take_over() -> None:
    with pytest.raises(TypeError, match=r"torch\.optim\.AdamW, .* got Adagrad"):
        fusedopt.fuse(torch.optim.Adagrad([param()]))
    with pytest.raises(RuntimeError, match="differentiable"):
        fusedopt.fuse(torch.optim.AdamW([param()], differentiable=True))
