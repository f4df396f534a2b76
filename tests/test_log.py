"""What a user looks at: log(), one read of the device; repr(); backend_in_use."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt import FusedAdamW, FusedOptimizer, show
from tests import life
from tests.helpers import build, groups_of, make_params, params_of, run
from tests.test_messages import wrappers

backend, cls = life.backend, life.cls

READS = ("_local_scalar_dense", "_to_copy", "copy_")


class Reads(TorchDispatchMode):
    """Counts the ops that bring values from a device to the host, and calls of tolist()."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        tolist = torch.Tensor.tolist

        def counted(tensor: torch.Tensor) -> Any:
            self.count += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(func) for name in READS)
        return func(*args, **(kwargs or {}))


def set_norm(optimizer: FusedOptimizer, norm: float) -> None:
    params = params_of(optimizer)
    for p in params:
        p.grad = torch.zeros_like(p)
    params[0].grad = torch.tensor(norm)


def test_the_figures_of_a_step(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend, max_grad_norm=0.5, skip_nonfinite=True)
    assert optimizer.log() == {"skipped_steps": 0.0}
    set_norm(optimizer, 2.0)
    optimizer.step()
    assert optimizer.log() == {
        "clip_coef": 0.5 / (2.0 + 1e-6), "grad_norm": 2.0, "skipped_steps": 0.0,
    }  # fmt: skip
    set_norm(optimizer, 0.25)  # is not clipped
    optimizer.step()
    assert optimizer.log() == {"clip_coef": 1.0, "grad_norm": 0.25, "skipped_steps": 0.0}
    set_norm(optimizer, math.inf)
    optimizer.step()
    assert optimizer.log() == {"clip_coef": 0.0, "grad_norm": math.inf, "skipped_steps": 1.0}
    assert all(type(value) is float for value in optimizer.log().values())


def test_clip_coef_is_what_the_gradients_were_scaled_with(backend: str) -> None:
    (param,) = make_params()[2:3]
    optimizer = fusedopt.FusedSGD([param], lr=1.0, max_grad_norm=0.5, backend=backend)
    for seed in range(3):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
        before = param.detach().clone()
        optimizer.step()
        coef = ((before - param) / param.grad).median().item()
        figures = optimizer.log()
        assert figures["clip_coef"] == pytest.approx(coef, rel=1e-4)
        assert figures["grad_norm"] == pytest.approx(param.grad.norm().item(), rel=1e-6)
        assert figures["clip_coef"] < 1


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, {"skipped_steps"}),
        ({"clip_grad_value": 0.1}, {"skipped_steps"}),
        ({"max_grad_norm": float("inf")}, {"skipped_steps", "grad_norm", "clip_coef"}),
        ({"skip_nonfinite": True}, {"skipped_steps", "grad_norm", "clip_coef"}),
        ({"max_grad_norm": torch.tensor(0.5)}, {"skipped_steps", "grad_norm", "clip_coef"}),
    ],
    ids=["nothing", "clip_grad_value", "infinity", "skip_nonfinite", "tensor"],
)
def test_what_is_not_measured_is_left_out(backend: str, options: Any, keys: set[str]) -> None:
    optimizer = build(FusedAdamW, backend, **options)
    set_norm(optimizer, 2.0)
    optimizer.step()
    figures = optimizer.log()
    assert figures.keys() == keys
    if "clip_coef" in keys:
        clips = isinstance(optimizer.max_grad_norm, torch.Tensor)
        assert figures["clip_coef"] == (0.5 / (2.0 + 1e-6) if clips else 1.0)


def test_options_that_change_count_from_the_next_step(backend: str) -> None:
    optimizer = build(FusedAdamW, backend, max_grad_norm=0.5)
    set_norm(optimizer, 2.0)
    optimizer.step()
    before = optimizer.log()
    optimizer.max_grad_norm = 0.25  # as a schedule does between the step and the log
    assert optimizer.log() == before
    optimizer.max_grad_norm = None
    assert optimizer.log() == before
    optimizer.step()
    assert optimizer.log() == {"skipped_steps": 0.0}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_one_read(backend: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = build(FusedAdamW, backend, **options)
    set_norm(optimizer, math.nan)
    optimizer.step()
    if options:
        assert optimizer.log()["skipped_steps"] == 1
    with Reads(monkeypatch) as reads:
        optimizer.log()
    assert reads.count <= 1
    assert reads.count == 1 or not options


def test_reads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with Reads(monkeypatch) as reads:
        torch.ones(()).item()
        torch.ones(()).tolist()
        float(torch.ones(()).double())
    assert reads.count >= 3


def test_figures_on_two_devices() -> None:
    """A skip is counted on the device of its first param, the norm on that of another one."""
    tensors = {"a": torch.tensor(2.5), "b": torch.tensor(3), "c": torch.tensor(7)}
    assert show._read(tensors) == {"a": 2.5, "b": 3.0, "c": 7.0}
    assert show._read({}) == {}
    assert show._read({"count": torch.tensor(3)}) == {"count": 3.0}


def test_a_copy_has_the_figures(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend, max_grad_norm=0.5)
    run(optimizer, range(2))
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(optimizer), torch.load(buffer, weights_only=False)):
        assert again.log() == optimizer.log()
        assert again.log().keys() == {"clip_coef", "grad_norm", "skipped_steps"}


@pytest.mark.parametrize("wrap", wrappers())
def test_a_wrapper_hands_them_on(wrap: Callable[[Any], Any]) -> None:
    optimizer = FusedAdamW(make_params(), max_grad_norm=0.5)
    wrapper = wrap(optimizer)
    assert wrapper.log() == {"skipped_steps": 0.0}
    run(optimizer, range(1))
    assert wrapper.log() == optimizer.log()
    assert "grad_norm" in wrapper.log()
    assert wrapper.backend_in_use == optimizer.backend_in_use == "cpu"
    assert "max_grad_norm" in repr(wrapper)


def test_log_in_a_compiled_region() -> None:
    compiled, eager = (FusedAdamW(make_params(), max_grad_norm=0.5) for _ in range(2))

    def go(optimizer: FusedOptimizer) -> dict[str, float]:
        optimizer.step()
        return optimizer.log()

    step = torch.compile(go, backend="aot_eager")
    for number in range(3):
        for optimizer in (compiled, eager):
            set_norm(optimizer, 1.0 + number)
        assert step(compiled) == go(eager)
    compiled.max_grad_norm = eager.max_grad_norm = 0.125
    assert step(compiled) == go(eager)
    assert compiled.backend_in_use == "cpu"


def test_dynamo_does_not_look_into_log() -> None:
    """It would compile again where figures and max_grad_norm change."""
    optimizer = FusedAdamW(make_params(), max_grad_norm=0.5)
    log = torch.compile(lambda: optimizer.log(), backend="eager")
    torch._dynamo.utils.counters.clear()
    for number in range(14):
        optimizer.max_grad_norm = 0.5 + number
        set_norm(optimizer, 0.1 + number)
        optimizer.step()
        assert log() == optimizer.log()
    assert torch._dynamo.utils.counters["frames"]["total"] <= 2


OPTIONS = {
    "max_grad_norm": 0.5,
    "clip_grad_value": 0.25,
    "skip_nonfinite": True,
    "process_group": torch.distributed.ProcessGroup(0, 1),
    "backend": "reference",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_repr_shows_an_option_once(option: str) -> None:
    optimizer = FusedAdamW(groups_of(make_params()), **{option: OPTIONS[option]})
    text = repr(optimizer)
    assert text.count(f"\n    {option}: {OPTIONS[option]}\n") == 1
    assert text.count(f"{option}:") == 1
    others = set(OPTIONS) - {option, "backend"}
    assert not any(f"{other}:" in text for other in others)


def test_repr_is_that_of_torch_with_a_block_of_options(backend: str) -> None:
    optimizer = build(FusedAdamW, backend, max_grad_norm=0.5)
    plain = torch.optim.AdamW([{**g} for g in groups_of(make_params())])
    text, of_torch = repr(optimizer), repr(plain)
    groups, _, own = text.partition("\nOptions of all groups\n")
    assert groups.splitlines()[0] == of_torch.splitlines()[0].replace("AdamW", "FusedAdamW")
    for index in range(2):
        assert f"\nParameter Group {index}\n    amsgrad: True\n    betas: (0.8, 0.95)\n" in groups
    assert own == (f"    backend: {backend}\n    backend_in_use: None\n    max_grad_norm: 0.5\n)")
    run(optimizer, range(1))
    assert f"    backend_in_use: {backend}\n" in repr(optimizer)


def test_repr_shows_groups_that_disagree() -> None:
    optimizer = FusedAdamW(groups_of(make_params()), max_grad_norm=0.5)
    optimizer.param_groups[1]["max_grad_norm"] = 0.25
    text = repr(optimizer)
    assert text.index("max_grad_norm: 0.5") < text.index("Parameter Group 1")
    assert text.index("Parameter Group 1") < text.index("max_grad_norm: 0.25")
    assert "max_grad_norm" not in text.partition("Options of all groups")[2]


def test_backend_in_use(backend: str) -> None:
    optimizer = build(FusedAdamW, backend)
    assert optimizer.backend_in_use is None
    run(optimizer, range(1))
    assert optimizer.backend_in_use == backend
    with pytest.raises(AttributeError):
        optimizer.backend_in_use = "cpu"  # type: ignore[misc]
    assert copy.deepcopy(optimizer).backend_in_use is None  # has made no step
