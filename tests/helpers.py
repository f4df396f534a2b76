"""What the tests of an optimizer's life share: small models, bitwise comparison, the drivers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedopt import FusedAdam, FusedAdamW, FusedOptimizer, FusedSGD, _native

CLASSES = (FusedAdamW, FusedAdam, FusedSGD)
TORCH = {FusedAdamW: torch.optim.AdamW, FusedAdam: torch.optim.Adam, FusedSGD: torch.optim.SGD}

# Hyperparameters under which every state tensor of a class is in use.
OPTIONS: dict[type[FusedOptimizer], dict[str, Any]] = {
    FusedAdamW: {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "amsgrad": True},
    FusedAdam: {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "amsgrad": True},
    FusedSGD: {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
}

SHAPES = ((), (1,), (17,), (0, 3), (16, 5), (7, 3, 4))

# A backend, and for the native one each way in which it reads tensors.
_ASKED = os.environ.get("FUSEDOPT_TEST_BACKENDS")
DRIVERS = (
    tuple(_ASKED.split(",")) if _ASKED else ("cpu-direct", "cpu-dlpack", "cpu-python", "reference")
)

# torch.optim in float64 differs by the rounding of single operations only.
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


# Why a way of reading tensors is not there; any other reason fails the test.
ABSENT = re.compile(
    r"has no _ZN2at17toDLPackNonOwning|has no attribute '__dlpack_c_exchange_api__'"
)


@contextmanager
def in_use(way: str) -> Iterator[None]:
    """With a way of reading tensors in use; the test is skipped where this torch does not have
    it."""
    if _native._C is None:
        pytest.skip(_native.missing)
    info = _native._C.build_info()
    before = ":".join(info[key] for key in ("tensor_access", "tensor_reader") if key in info)
    try:
        _native.use_tensor_access(way)
    except RuntimeError as error:
        if not ABSENT.search(str(error)):
            raise
        pytest.skip(f"torch {torch.__version__}: {error}")
    try:
        yield
    finally:
        _native.use_tensor_access(before)


def use_driver(request: pytest.FixtureRequest) -> Iterator[str]:
    """Body of a fixture: the backend's name, with its way of reading tensors in use."""
    backend, _, way = request.param.partition("-")
    with in_use(way) if way else nullcontext():
        yield backend


def make_params(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shapes: Iterable[tuple[int, ...]] = SHAPES,
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def random_grads(params: Iterable[Tensor], seed: int) -> list[Tensor]:
    """New gradients, the same values in whatever dtype the params have."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in params]


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(optimizer: Optimizer, steps: Iterable[int]) -> None:
    """One step for each number, which also is the seed of its gradients."""
    for number in steps:
        params = params_of(optimizer)
        for p, grad in zip(params, random_grads(params, number), strict=True):
            p.grad = grad
        optimizer.step()


def groups_of(params: list[Parameter]) -> list[dict[str, Any]]:
    half = len(params) // 2
    return [{"params": params[:half]}, {"params": params[half:], "lr": 0.002}]


def build(
    cls: type[FusedOptimizer],
    backend: str = "reference",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> FusedOptimizer:
    """Two groups over SHAPES, with every state tensor in use."""
    groups = groups_of(make_params(dtype))
    return cls(groups, **{**OPTIONS[cls], "backend": backend, **options})


def build_torch(cls: type[FusedOptimizer], **options: Any) -> Optimizer:
    """torch's for-loop in float64 for the same groups as `build`."""
    groups = groups_of(make_params(torch.float64))
    return TORCH[cls](groups, **{**OPTIONS[cls], "foreach": False, **options})


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's elements, in order: equal for NaNs, other for -0.0 and 0.0."""
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal down to the bit, in dtype and in shape; dicts and lists are walked."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert torch.equal(bits(a), bits(b)), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def copied(value: Any) -> Any:
    """As deepcopy, for tensors in dicts and lists, and faster."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v) for v in value)
    return value


def contents(optimizer: Optimizer) -> dict[str, Any]:
    """A copy of all that a step can change or depends on: groups, params, state."""
    params = params_of(optimizer)
    return {
        "groups": copied(optimizer.state_dict()["param_groups"]),
        "params": copied(params),
        "state": [copied(optimizer.state.get(p, {})) for p in params],
    }


def assert_close(a: Tensor, b: Tensor, where: str = "") -> None:
    """Equal in dtype and shape, and element by element up to the rounding of single operations."""
    # allclose is ten times as fast; assert_close says what differs.
    if (a.dtype, a.shape) != (b.dtype, b.shape) or not torch.allclose(a, b, **CLOSE):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text: f"{where}: {text}")


@torch.no_grad()
def assert_close_to(subject: Optimizer, oracle: Optimizer) -> None:
    """Params and state in float64 equal torch.optim's up to the rounding of single operations."""
    for i, (p, q) in enumerate(zip(params_of(subject), params_of(oracle), strict=True)):
        assert_close(p, q, f"param {i}")
        expected = {k: v for k, v in oracle.state.get(q, {}).items() if v is not None}
        entry = subject.state.get(p, {})
        assert entry.keys() == expected.keys(), i
        for key, value in expected.items():
            assert_close(entry[key], value, f"{key} of param {i}")
