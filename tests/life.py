"""What the tests of life, checkpoints and fuse share beyond helpers.py: fixtures and builders."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedopt import FusedOptimizer
from tests.helpers import (
    CLASSES,
    DRIVERS,
    OPTIONS,
    TORCH,
    build,
    build_torch,
    groups_of,
    make_params,
    params_of,
    run,
    use_driver,
)

# A module takes a fixture over by assignment, `driver = life.driver`. Imported by name, it would be
# redefined, says the linter, by each argument of that name.
driver = pytest.fixture(use_driver, params=DRIVERS)
backend = pytest.fixture(use_driver, params=("cpu-direct", "reference"))


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> type[FusedOptimizer]:
    return request.param


Both = tuple[FusedOptimizer, Optimizer]


def pair(cls: type[FusedOptimizer], driver: str, **options: Any) -> Both:
    """The fused optimizer and torch's, in float64 and at the same place."""
    return build(cls, driver, torch.float64, **options), build_torch(cls, **options)


def twin_of(subject: FusedOptimizer) -> FusedOptimizer:
    """A new optimizer over new params in new memory, with the values of `subject`."""
    groups = [
        {**group, "params": [Parameter(p.detach().clone()) for p in group["params"]]}
        for group in subject.param_groups
    ]
    twin = type(subject)(groups, backend=subject.backend)
    twin.load_state_dict(deepcopy(subject.state_dict()))
    # Loading widens state that is narrower than its param; here it is to stay as it is.
    for p, q in zip(params_of(twin), params_of(subject), strict=True):
        for key, value in subject.state.get(q, {}).items():
            if isinstance(value, Tensor):
                twin.state[p][key] = value.clone()
    return twin


# Networks, for what goes through backward.


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def backward(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = model(x).square().sum()
    loss.backward()
    return loss.detach()


def networks(cls: type[FusedOptimizer], driver: str) -> tuple[list[nn.Sequential], Both]:
    models = [network(), network()]
    subject = cls(models[0].parameters(), **OPTIONS[cls], backend=driver)
    oracle = TORCH[cls](models[1].parameters(), **OPTIONS[cls], foreach=False)
    return models, (subject, oracle)


# Other memory for the same values.


def with_gaps(values: Tensor) -> Tensor:
    return torch.stack([values, values], dim=-1)[..., 0]


def at_offset(values: Tensor) -> Tensor:
    storage = torch.empty(values.numel() + 3, dtype=values.dtype)
    return storage[3:].view(values.shape).copy_(values)


def transposed(values: Tensor) -> Tensor:
    axes = list(range(values.dim()))[::-1]
    return values.permute(axes).clone(memory_format=torch.contiguous_format).permute(axes)


STORAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": torch.clone,
    "bfloat16": Tensor.bfloat16,
    "float16": Tensor.half,
    "float64": Tensor.double,
    "offset": at_offset,
    "transposed": transposed,
    "gaps": with_gaps,
}


# Checkpoints.


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@torch.no_grad()
def put_back(optimizer: FusedOptimizer, values: list[Tensor]) -> None:
    for p, value in zip(params_of(optimizer), values, strict=True):
        p.copy_(value)


def restored(optimizer: FusedOptimizer, saved: dict[str, Any]) -> FusedOptimizer:
    """A new optimizer over the same values of params, with `saved` loaded."""
    groups = groups_of([Parameter(p.detach().clone()) for p in params_of(optimizer)])
    fresh = type(optimizer)(groups, lr=0.7, backend=optimizer.backend)
    fresh.load_state_dict(saved)
    return fresh


def used(cls: type[FusedOptimizer], backend: str = "auto") -> tuple[FusedOptimizer, dict[str, Any]]:
    """A used optimizer, and a good checkpoint of another with other values throughout."""
    optimizer, other = build(cls, backend), build(cls, backend, lr=0.003)
    run(optimizer, range(2))
    run(other, range(10, 13))
    return optimizer, deepcopy(other.state_dict())


# torch's optimizers as the source of a checkpoint or of fuse.

# capturable is written as a GPU run leaves it: torch does not step with it on the CPU.
FLAVOURS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"foreach": False, "capturable": True},
}
flavour = pytest.mark.parametrize(
    ("cls", "flags"),
    [
        pytest.param(cls, flags, id=f"{cls.__name__}-{name}")
        for cls in CLASSES
        for name, flags in FLAVOURS.items()
        if "capturable" in TORCH[cls](make_params()).defaults or name != "capturable"
    ],
)


def torch_optimizer(
    cls: type[FusedOptimizer], flags: dict[str, Any], params: list[Parameter] | None = None
) -> Optimizer:
    params = make_params(torch.float64) if params is None else params
    options = {**OPTIONS[cls], **flags}
    options.pop("capturable", None)
    return TORCH[cls](groups_of(params), **options)


def mark(optimizer: Optimizer, flags: dict[str, Any]) -> None:
    """Writes the capturable flag, after the steps."""
    if flags.get("capturable"):
        for group in optimizer.param_groups:
            group["capturable"] = True
