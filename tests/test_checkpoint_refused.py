"""Promise 48: a checkpoint with any mistake is refused, and nothing has changed then."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from fusedopt import FusedAdam, FusedOptimizer, FusedSGD
from tests import life
from tests.helpers import CLASSES, assert_same, contents, params_of, run
from tests.life import restored, used

backend, cls = life.backend, life.cls

# Each mistake is in the last param of the last group, so that all before it would already be in
# place if loading were not checked as a whole.

Break = Callable[[Any], Any]
BAD_TENSORS: dict[str, Break] = {
    "short": lambda t: t.flatten()[:-1].clone(),
    "long": lambda t: torch.cat([t.flatten(), t.flatten()]),
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.transpose(0, 2),
    "unsqueezed": lambda t: t[None],
    "empty": lambda t: t.new_empty(0),
    "0-dim": lambda t: t.sum(),
    "string": lambda t: "exp_avg",
    "number": lambda t: 0.0,
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "complex": lambda t: t.to(torch.complex64),
    "integer": lambda t: t.to(torch.int64),
    "bool": lambda t: t > 0,
    "meta": lambda t: t.to("meta"),
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded number": lambda t: t.new_tensor(1.0).expand(t.shape),
    "sparse": lambda t: t.to_sparse(),
}
BAD_STEPS: dict[str, Any] = {
    "NaN": float("nan"),
    "NaN tensor": torch.tensor(float("nan")),
    "infinite": torch.tensor(float("inf")),
    "negative": -1,
    "negative tensor": torch.tensor(-1.0),
    "two elements": torch.tensor([1.0, 2.0]),
    "no element": torch.tensor([]),
    "string": "3",
    "list": [3.0],
    "bool": True,
    "complex": 3j,
    "complex tensor": torch.tensor(3j),
    "meta": torch.empty((), device="meta"),
}
BAD_HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "lr string": {"lr": "0.1"},
    "lr None": {"lr": None},
    "lr NaN": {"lr": float("nan")},
    "lr two elements": {"lr": torch.tensor([0.1, 0.2])},
    "lr complex": {"lr": torch.tensor(1j)},
    "lr meta": {"lr": torch.empty((), device="meta")},
    "lr list": {"lr": [0.1]},
    "weight_decay negative": {"weight_decay": -1.0},
    "weight_decay string": {"weight_decay": "0"},
    "weight_decay NaN": {"weight_decay": float("nan")},
}
BAD_ADAM: dict[str, dict[str, Any]] = {
    "betas over 1": {"betas": (0.9, 1.5)},
    "betas of 1": {"betas": (1.0, 0.9)},
    "betas negative": {"betas": (-0.1, 0.9)},
    "betas NaN": {"betas": (0.9, float("nan"))},
    "betas string": {"betas": "0.9"},
    "betas of strings": {"betas": ("0.9", "0.99")},
    "betas three": {"betas": (0.9, 0.9, 0.9)},
    "betas one": {"betas": (0.9,)},
    "betas number": {"betas": 0.9},
    "betas two elements": {"betas": (torch.tensor([0.9, 0.8]), torch.tensor(0.9))},
    "eps negative": {"eps": -1e-8},
    "eps string": {"eps": "1e-8"},
}
BAD_SGD: dict[str, dict[str, Any]] = {
    "momentum negative": {"momentum": -0.9},
    "momentum string": {"momentum": "0.9"},
    "momentum NaN": {"momentum": float("nan")},
    "dampening string": {"dampening": "0"},
    "nesterov with dampening": {"nesterov": True, "dampening": 0.5},
    "nesterov without momentum": {"nesterov": True, "momentum": 0.0, "dampening": 0.0},
}


def drop(saved: Any, *path: Any) -> None:
    for key in path[:-1]:
        saved = saved[key]
    del saved[path[-1]]


BAD_SHAPES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no groups": lambda s: drop(s, "param_groups"),
    "no state": lambda s: drop(s, "state"),
    "one group less": lambda s: s["param_groups"].pop(),
    "one group more": lambda s: s["param_groups"].append(deepcopy(s["param_groups"][-1])),
    "one param less": lambda s: s["param_groups"][-1]["params"].pop(),
    "one param more": lambda s: s["param_groups"][-1]["params"].append(99),
    "params missing": lambda s: drop(s, "param_groups", -1, "params"),
    "params no list": lambda s: s["param_groups"][-1].update(params=3),
    "lr missing": lambda s: drop(s, "param_groups", -1, "lr"),
    "group no dict": lambda s: s["param_groups"].__setitem__(-1, "group"),
    "groups no list": lambda s: s.update(param_groups=7),
    "state no dict": lambda s: s.update(state=[1, 2]),
    "entry no dict": lambda s: s["state"].__setitem__(5, torch.ones(7, 3, 4)),
    "entry of no param": lambda s: s["state"].__setitem__(99, s["state"][5]),
}


def assert_refused(
    optimizer: FusedOptimizer, saved: dict[str, Any], match: str | None = None
) -> None:
    """Loading raises and nothing changes: no value, no object, and not the next step."""
    before, given = contents(optimizer), list(saved)
    groups, state = optimizer.param_groups, optimizer.state
    objects = [*groups, *state.values(), *(v for e in state.values() for v in e.values())]
    versions = [p._version for p in params_of(optimizer)]
    twin = restored(optimizer, optimizer.state_dict())
    with pytest.raises((TypeError, ValueError, KeyError), match=match):
        optimizer.load_state_dict(saved)
    assert list(saved) == given
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    now = [*groups, *state.values(), *(v for e in state.values() for v in e.values())]
    assert all(a is b for a, b in zip(now, objects, strict=True))
    assert [p._version for p in params_of(optimizer)] == versions
    assert_same(contents(optimizer), before)
    run(optimizer, [8])
    run(twin, [8])
    assert_same(contents(optimizer), contents(twin))


def test_the_good_checkpoint_is_loaded(cls: type[FusedOptimizer], backend: str) -> None:
    # The tests below break one thing in it each.
    optimizer, saved = used(cls, backend)
    optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict()["state"], saved["state"])


@pytest.mark.parametrize("bad", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_bad_state_tensors(cls: type[FusedOptimizer], bad: Break) -> None:
    if cls is FusedSGD and bad is BAD_TENSORS["sparse"]:
        pytest.skip("torch.optim.SGD makes sparse buffers")
    optimizer, saved = used(cls)
    for key in [key for key in saved["state"][5] if key != "step"]:
        broken = deepcopy(saved)
        broken["state"][5][key] = bad(saved["state"][5][key])
        assert_refused(optimizer, broken, match=key + r'.*param_groups\[1\]\["params"\]\[2\]')


@pytest.mark.parametrize("step", BAD_STEPS.values(), ids=BAD_STEPS.keys())
@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_bad_steps(cls: type[FusedOptimizer], step: Any) -> None:
    optimizer, saved = used(cls)
    saved["state"][5]["step"] = step
    assert_refused(optimizer, saved, match=r'param_groups\[1\]\["params"\]\[2\].*step')


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        pytest.param(c, change, id=f"{c.__name__}-{name}")
        for c in CLASSES
        for table in (BAD_HYPERPARAMETERS, BAD_SGD if c is FusedSGD else BAD_ADAM)
        for name, change in table.items()
    ],
)
def test_bad_hyperparameters(cls: type[FusedOptimizer], change: dict[str, Any]) -> None:
    optimizer, saved = used(cls)
    saved["param_groups"][1].update(change)
    assert_refused(optimizer, saved, match=r"param_groups\[1\]")


@pytest.mark.parametrize("bad", BAD_SHAPES.values(), ids=BAD_SHAPES.keys())
def test_bad_structure(cls: type[FusedOptimizer], bad: Any) -> None:
    optimizer, saved = used(cls)
    bad(saved)
    assert_refused(optimizer, saved)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_a_state_that_lacks_a_key(cls: type[FusedOptimizer], key: str) -> None:
    optimizer, saved = used(cls)
    del saved["state"][5][key]
    assert_refused(optimizer, saved, match=rf"lacks {key}")


def test_a_checkpoint_without_amsgrad_is_refused_where_it_is_on(backend: str) -> None:
    optimizer, saved = used(FusedAdam, backend)
    for entry in saved["state"].values():
        del entry["max_exp_avg_sq"]
    assert_refused(optimizer, saved, match="lacks max_exp_avg_sq")
    for group in saved["param_groups"]:
        group["amsgrad"] = False
    optimizer.load_state_dict(saved)
    run(optimizer, [3])
