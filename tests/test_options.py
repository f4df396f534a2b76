"""Options of the whole optimizer stand in each group, with one value; a value that is written after
construction is checked before the next step changes anything."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt import FusedAdamW, FusedOptimizer, options
from tests import life
from tests.helpers import assert_same, build, contents, groups_of, make_params, params_of, run

backend, cls = life.backend, life.cls

NAN = float("nan")

# An option, another value than the default, and one that it cannot have.
VALUES: list[tuple[str, Any, Any, type[Exception]]] = [
    ("max_grad_norm", 0.5, -1.0, ValueError),
    ("max_grad_norm", 0.5, NAN, ValueError),
    ("max_grad_norm", 0.5, 0, ValueError),
    ("clip_grad_value", 0.5, 0.0, ValueError),
    ("max_grad_norm", 2, "1", TypeError),
    ("max_grad_norm", torch.tensor(0.5), torch.ones(2), TypeError),
    ("clip_grad_value", 0.01, -1, ValueError),
    ("clip_grad_value", np.float32(0.01), [1.0], TypeError),
    ("skip_nonfinite", True, 1, TypeError),
    ("skip_nonfinite", True, None, TypeError),
    ("process_group", torch.distributed.ProcessGroup(0, 1), "world", TypeError),
    ("process_group", torch.distributed.ProcessGroup(0, 1), [0, 1], TypeError),
    ("backend", "reference", "gpu", ValueError),
    ("backend", "reference", None, ValueError),
]
IDS = [f"{name}-{wrong!r:.12}" for name, _, wrong, _ in VALUES]
option_values = pytest.mark.parametrize(("name", "value", "wrong", "error"), VALUES, ids=IDS)


def in_groups(optimizer: FusedOptimizer, name: str) -> list[Any]:
    return [group[name] for group in optimizer.param_groups]


@option_values
def test_an_option_stands_in_each_group(name: str, value: Any, wrong: Any, error: Any) -> None:
    optimizer = FusedAdamW(groups_of(make_params()), **{name: value})
    assert in_groups(optimizer, name) == [value, value]
    assert getattr(optimizer, name) is value
    again = type(optimizer)(optimizer.param_groups)
    assert getattr(again, name) is value
    again.add_param_group({"params": make_params(seed=1)})
    assert in_groups(again, name) == [value] * 3
    assert name in repr(again)


def test_a_rebuild_clips_as_before(cls: type[FusedOptimizer], backend: str) -> None:
    """As Horovod's wrapper does it: a subclass made on the spot, from the groups alone."""
    optimizers = [build(cls, backend, max_grad_norm=0.1, skip_nonfinite=True) for _ in range(2)]
    wrapper = type(cls.__name__, (cls,), {})
    optimizers[1] = wrapper(optimizers[1].param_groups)
    for optimizer in optimizers:
        run(optimizer, range(3))
    assert_same(contents(optimizers[0]), contents(optimizers[1]))
    assert optimizers[1].grad_norm is not None
    params_of(optimizers[1])[0].grad = torch.tensor(float("inf"))
    optimizers[1].step()
    assert int(optimizers[1].skipped_steps) == 1


@option_values
def test_an_attribute_writes_all_groups(name: str, value: Any, wrong: Any, error: Any) -> None:
    optimizer = FusedAdamW(groups_of(make_params()))
    setattr(optimizer, name, value)
    assert in_groups(optimizer, name) == [value, value]
    assert getattr(optimizer, name) is value
    optimizer.add_param_group({"params": make_params(seed=1)})
    assert in_groups(optimizer, name) == [value] * 3
    with pytest.raises(error, match=name):
        setattr(optimizer, name, wrong)
    assert getattr(optimizer, name) is value


def test_both_ways_to_clip_by_attribute() -> None:
    optimizer = FusedAdamW(make_params(), max_grad_norm=1.0)
    with pytest.raises(ValueError, match="cannot both be given"):
        optimizer.clip_grad_value = 1.0
    optimizer.max_grad_norm = None
    optimizer.clip_grad_value = 1.0
    run(optimizer, range(1))


@option_values
def test_groups_that_disagree(name: str, value: Any, wrong: Any, error: Any) -> None:
    groups = groups_of(make_params())
    for index in range(2):
        given = [dict(group) for group in groups]
        given[index][name] = value
        with pytest.raises(ValueError, match=rf'param_groups\[1\]\["{name}"\].*all groups'):
            FusedAdamW(given)
        agreeing = FusedAdamW(given, **{name: value})  # the keyword is that of the other group
        assert getattr(agreeing, name) is value
    optimizer = FusedAdamW(groups, **{name: value})
    other = options.DEFAULTS[name]
    with pytest.raises(ValueError, match=rf'param_groups\[2\]\["{name}"\].*param_groups\[0\]'):
        optimizer.add_param_group({"params": make_params(seed=1), name: other})
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[1][name] = other
    with pytest.raises(ValueError, match=f'"{name}"'):
        getattr(optimizer, name)


@option_values
def test_a_group_value_beside_another_keyword(
    name: str, value: Any, wrong: Any, error: Any
) -> None:
    others = {"max_grad_norm": 0.7, "clip_grad_value": 0.7, "backend": "cpu"}
    other = others.get(name, torch.distributed.ProcessGroup(0, 1))
    if name == "skip_nonfinite":
        pytest.skip("has two values, and False is the default")
    groups = [{**group, name: value} for group in groups_of(make_params())]
    with pytest.raises(ValueError, match=f"{name} is .*leave one of the two out"):
        FusedAdamW(groups, **{name: other})


def test_a_step_with_groups_that_disagree(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend, max_grad_norm=0.5)
    run(optimizer, range(2))
    before = contents(optimizer)
    for index in range(2):
        optimizer.param_groups[index]["max_grad_norm"] = 0.25
        with pytest.raises(ValueError, match=r'"max_grad_norm"\] is 0\.\d+'):
            optimizer.step()
        optimizer.param_groups[index]["max_grad_norm"] = 0.5
        assert_same(contents(optimizer), before)
    del optimizer.param_groups[0]["max_grad_norm"]  # says nothing: the other group does
    optimizer.step()
    assert optimizer.grad_norm is not None


def test_what_a_tool_writes_into_all_groups_counts(cls: type[FusedOptimizer], backend: str) -> None:
    optimizers = [build(cls, backend), build(cls, backend, max_grad_norm=0.1)]
    for group in optimizers[0].param_groups:
        group["max_grad_norm"] = 0.1
    assert optimizers[0].max_grad_norm == 0.1
    for optimizer in optimizers:
        run(optimizer, range(2))
    assert_same(contents(optimizers[0]), contents(optimizers[1]))
    before = contents(optimizers[0])
    for wrong, error in ((-1.0, ValueError), ("1", TypeError), (NAN, ValueError)):
        for group in optimizers[0].param_groups:
            group["max_grad_norm"] = wrong
        with pytest.raises(error, match="max_grad_norm must be a number > 0"):
            optimizers[0].step()
        assert_same(contents(optimizers[0]), before)


def test_a_state_dict_has_none_of_them(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend, max_grad_norm=0.5, skip_nonfinite=True, process_group=None)
    run(optimizer, range(1))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        assert not set(group) & set(options.DEFAULTS)
    assert optimizer.param_groups[0]["max_grad_norm"] == 0.5
    fresh = build(cls, backend, max_grad_norm=2.0)
    for group in saved["param_groups"]:
        group["max_grad_norm"] = 7.0  # of another's making: those of the constructor stay
    fresh.load_state_dict(saved)
    assert in_groups(fresh, "max_grad_norm") == [2.0, 2.0]
    assert fresh.skip_nonfinite is False


def test_copies_keep_them(cls: type[FusedOptimizer]) -> None:
    optimizer = build(cls, "reference", max_grad_norm=0.5, skip_nonfinite=True)
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(optimizer), torch.load(buffer, weights_only=False)):
        assert in_groups(again, "max_grad_norm") == [0.5, 0.5]
        assert again.skip_nonfinite is True
        assert again.backend == "reference"
        assert again.defaults["max_grad_norm"] == 0.5


def test_the_backend_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = FusedAdamW(make_params())
    assert optimizer.backend_in_use is None
    optimizer.backend = "reference"
    run(optimizer, range(1))
    assert optimizer.backend_in_use == "reference"
    monkeypatch.setattr("fusedopt.backends.cuda.unavailable", lambda: "not here")
    with pytest.raises(RuntimeError, match="'cuda' cannot serve"):
        optimizer.backend = "cuda"
    assert optimizer.backend == "reference"
    for group in optimizer.param_groups:
        group["backend"] = "auto"
    run(optimizer, range(1))
    assert optimizer.backend_in_use == fusedopt.backends.candidates("auto", "cpu")[0][0]


HYPER: dict[str, list[tuple[Any, type[Exception]]]] = {
    "lr": [(None, TypeError), ("0.1", TypeError), (NAN, ValueError), ([0.1], TypeError)],
    "weight_decay": [(-0.1, ValueError), (NAN, ValueError), (None, TypeError), ("x", TypeError)],
    "eps": [(-1e-8, ValueError), (None, TypeError)],
    "momentum": [(-0.1, ValueError), (None, TypeError), (NAN, ValueError)],
    "dampening": [("x", TypeError), (NAN, ValueError)],
    "betas": [
        ((1.0, 0.9), ValueError),
        ((0.9, -0.1), ValueError),
        ((0.9, NAN), ValueError),
        ((0.9,), TypeError),
        ((0.9, None), TypeError),
        (0.9, TypeError),
        ("ab", TypeError),
        (None, TypeError),
    ],
}


@pytest.mark.parametrize("key", HYPER)
def test_values_written_after_construction(
    cls: type[FusedOptimizer], backend: str, key: str
) -> None:
    optimizer = build(cls, backend)
    if key not in optimizer.defaults:
        pytest.skip("has no such hyperparameter")
    run(optimizer, range(2))
    before = contents(optimizer)
    for number in range(2):
        right = optimizer.param_groups[number][key]
        for wrong, error in HYPER[key]:
            optimizer.param_groups[number][key] = wrong
            with pytest.raises(error, match=rf"param_groups\[{number}\]"):
                optimizer.step()
            optimizer.param_groups[number][key] = right
            assert_same(contents(optimizer), before)
    optimizer.step()


def test_a_scheduler_may_set_any_real_lr(cls: type[FusedOptimizer], backend: str) -> None:
    for lr in (-0.1, 0, np.float32(0.25), np.array(0.25), torch.tensor(-0.5)):
        ours, theirs = (Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
        optimizer = cls([ours], lr=0.1, backend=backend)
        plain = {"FusedAdamW": torch.optim.AdamW, "FusedAdam": torch.optim.Adam}
        oracle = plain.get(cls.__name__, torch.optim.SGD)([theirs], lr=0.1, foreach=False)
        for p, o in ((ours, optimizer), (theirs, oracle)):
            p.grad = torch.tensor([0.5, 0.25, -1.0])
            o.param_groups[0]["lr"] = lr
            o.step()
        torch.testing.assert_close(ours, theirs)


class Listed(Sequence):  # type: ignore[type-arg]
    """As omegaconf's ListConfig: a sequence that is neither a list nor a tuple."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __repr__(self) -> str:
        return f"Listed{self.values}"


@pytest.mark.parametrize("in_group", [False, True], ids=["keyword", "group"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("betas", Listed(0.8, 0.95)),
        ("betas", [0.8, 0.95]),
        ("betas", np.array([0.8, 0.95])),
        ("betas", (np.float64(0.8), np.array(0.95))),
        ("betas", torch.tensor([0.8, 0.95], dtype=torch.float64)),
        ("lr", np.array(0.01)),
        ("lr", np.float64(0.01)),
        ("lr", torch.tensor([0.01], dtype=torch.float64)),
        ("eps", np.float64(1e-6)),
        ("weight_decay", np.array(0.1)),
    ],
    ids=repr,
)
def test_what_torch_takes_is_taken(backend: str, key: str, value: Any, in_group: bool) -> None:
    params, plain = make_params(), make_params()
    number = (0.8, 0.95) if key == "betas" else float(np.asarray(value).reshape(()))
    groups = [{"params": params, key: value}] if in_group else params
    optimizer = FusedAdamW(groups, backend=backend, **({} if in_group else {key: value}))
    oracle = FusedAdamW(plain, backend=backend, **{key: number})
    run(optimizer, range(2))
    run(oracle, range(2))
    assert_same([p.data for p in params], [p.data for p in plain])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    optimizer.param_groups[0][key] = value  # once more, after construction
    torch.save(optimizer.state_dict(), buffer)
    run(optimizer, range(2, 3))
    run(oracle, range(2, 3))
    assert_same([p.data for p in params], [p.data for p in plain])


def test_a_tensor_as_the_norm_is_read_in_each_step(backend: str) -> None:
    params = [Parameter(torch.zeros(4))]
    norm = torch.tensor(1.0)
    optimizer = fusedopt.FusedSGD(params, lr=1.0, max_grad_norm=norm, backend=backend)
    for wanted in (1.0, 0.25):
        norm.fill_(wanted)
        params[0].data.zero_()
        params[0].grad = torch.full((4,), 10.0)
        optimizer.step()
        torch.testing.assert_close(params[0].norm(), norm)
    norm.fill_(NAN)
    with pytest.raises(ValueError, match="max_grad_norm"):
        optimizer.step()


def named_in(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def test_unknown_keys_warn_once(cls: type[FusedOptimizer], backend: str) -> None:
    with pytest.warns(UserWarning, match="'weight_deacy'.*did you mean 'weight_decay'"):
        optimizer = cls([{"params": make_params(), "weight_deacy": 0.1}], backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, range(2))
        optimizer.add_param_group({"params": make_params(seed=1), "weight_deacy": 0.1})
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, range(2))
    assert not named_in(caught)
    optimizer.param_groups[1]["lr_scale"] = 0.5
    with pytest.warns(UserWarning, match="lr_scale") as later:
        run(optimizer, range(2))
    assert len(later) == 1
    assert later[0].filename == run.__code__.co_filename


def test_keys_of_torch_are_known(cls: type[FusedOptimizer]) -> None:
    named = [(f"p{i}", p) for i, p in enumerate(make_params())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = cls(named, lr=0.1)
        run(optimizer, range(1))
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
        torch.optim.swa_utils.SWALR(optimizer, 0.1)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()


class Wrapper:
    """As Lightning's and Fabric's: of a subclass of the optimizer's class, it hands on what it does
    not find."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def test_wrappers_that_hand_on_what_they_lack(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend, max_grad_norm=0.5, skip_nonfinite=True)
    wrapper: Any = Wrapper(optimizer)
    assert isinstance(wrapper, cls)
    assert wrapper.grad_norm is None
    run(wrapper, range(2))
    params_of(optimizer)[0].grad = torch.tensor(NAN)
    wrapper.step()
    assert wrapper.grad_norm is optimizer.grad_norm
    assert wrapper.skipped_steps is optimizer.skipped_steps
    assert int(wrapper.skipped_steps) == 1
    assert wrapper.backend_in_use == optimizer.backend_in_use == backend
    wrapper.max_grad_norm = 0.25
    wrapper.skip_nonfinite = False
    assert optimizer.max_grad_norm == 0.25
    wrapper.max_grad_norm = None
    assert not wrapper._step_supports_amp_scaling
    wrapper.backend = "reference"
    run(wrapper, range(2))
    assert optimizer.backend_in_use == "reference"


def test_the_wrappers_of_lightning() -> None:
    fabric = pytest.importorskip("lightning.fabric.wrappers")
    core = pytest.importorskip("lightning.pytorch.core.optimizer")
    for wrap in (lambda o: fabric._FabricOptimizer(o, None), core.LightningOptimizer):
        optimizer = FusedAdamW(make_params(), max_grad_norm=0.5)
        wrapper: Any = wrap(optimizer)
        run(optimizer, range(1))
        assert wrapper.grad_norm is optimizer.grad_norm is not None
        assert wrapper.skipped_steps is optimizer.skipped_steps
        wrapper.max_grad_norm = 0.25
        assert optimizer.max_grad_norm == 0.25


def with_own_step(base: type[FusedOptimizer], calls: list[str]) -> type[FusedOptimizer]:
    def step(self: Any, closure: Any = None) -> Any:
        calls.append("own")
        return super(cls, self).step(closure)

    cls = type("Clipping" + base.__name__, (base,), {"step": step})
    return cls


@pytest.mark.parametrize("constructed", [False, True], ids=["class set", "constructed"])
def test_hooks_of_an_instance_whose_class_was_set(
    cls: type[FusedOptimizer], backend: str, constructed: bool
) -> None:
    calls: list[str] = []
    own = with_own_step(cls, calls)
    if constructed:
        optimizer = own(groups_of(make_params()), lr=0.01, backend=backend)
    else:  # as detectron2 does it
        optimizer = cls(groups_of(make_params()), lr=0.01, backend=backend)
        optimizer.__class__ = own
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(optimizer, range(1))
    order = ["before", "own", "after"] if constructed else ["own", "before", "after"]
    assert calls == order
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(optimizer, range(1))
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.step#")]
    assert names == [f"Optimizer.step#{own.__name__}.step"]
    assert calls == order * 2


def test_compiled_steps_follow_the_options() -> None:
    optimizer = FusedAdamW(make_params(), max_grad_norm=torch.tensor(0.125))
    plain = FusedAdamW(make_params(), max_grad_norm=0.125)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for number in range(3):
        for o, go in ((optimizer, step), (plain, plain.step)):
            generator = torch.Generator().manual_seed(number)
            for p in params_of(o):
                p.grad = torch.randn(p.shape, generator=generator)
            if number == 2:
                o.max_grad_norm = 0.05
            go()
        assert_same(contents(optimizer), contents(plain))
    optimizer.param_groups[0]["max_grad_norm"] = -1.0
    with pytest.raises(Exception, match="max_grad_norm must be a number > 0"):
        step()
