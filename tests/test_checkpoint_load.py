"""Promises 22 and 23: dtypes survive loading, as do layouts, names, other entries and gradients."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from fusedopt import FusedAdamW, FusedOptimizer
from tests import life
from tests.helpers import (
    CLASSES,
    OPTIONS,
    assert_same,
    bits,
    build,
    contents,
    make_params,
    params_of,
    random_grads,
    run,
)
from tests.life import put_back, restored, through_a_file, used

backend, cls, driver = life.backend, life.cls, life.driver


def with_float32_state(cls: type[FusedOptimizer], driver: str) -> FusedOptimizer:
    """bfloat16 params; their state in float32, as after training with another optimizer."""
    optimizer = build(cls, driver, torch.bfloat16)
    run(optimizer, [0])
    for entry in optimizer.state.values():
        for key, value in entry.items():
            entry[key] = value.float() + 1e-5 if key != "step" else value
    run(optimizer, [1])
    return optimizer


def test_saved_dtypes_survive(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = with_float32_state(cls, driver)
    resumed = restored(optimizer, through_a_file(optimizer.state_dict()))
    for entry in resumed.state.values():
        assert all(value.dtype == torch.float32 for value in entry.values())
    assert_same(contents(resumed), contents(optimizer))
    # The values do not fit bfloat16: a detour through it would have shown.
    values = torch.cat([v.flatten() for entry in resumed.state.values() for v in entry.values()])
    assert not torch.equal(values.bfloat16().float(), values)
    for subject in (optimizer, resumed):
        run(subject, range(2, 5))
    assert_same(contents(resumed), contents(optimizer))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_step_stays_float32(cls: type[FusedOptimizer], driver: str, default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        optimizer = build(cls, driver, torch.float32)
        run(optimizer, range(2))
        saved = through_a_file(optimizer.state_dict())
        for entry in saved["state"].values():
            assert entry["step"].dtype == torch.float32
            entry["step"] = 300  # as older checkpoints have it
        resumed = restored(optimizer, saved)
        run(resumed, [2])
        for entry in resumed.state.values():
            assert entry["step"].dtype == torch.float32
            assert entry["step"].item() == 301
            entry["step"] = 302
        run(resumed, [3])
        for entry in resumed.state.values():
            assert entry["step"].dtype == torch.float32
            assert entry["step"].item() == 303
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "step", [5, 5.0, torch.tensor(5), torch.tensor([5.0]), torch.tensor(5.0, dtype=torch.float64)]
)
def test_a_step_of_another_type_is_loaded_as_float32(backend: str, step: Any) -> None:
    optimizer = build(FusedAdamW, backend)
    run(optimizer, range(5))
    saved = deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = step
    assert_same(contents(restored(optimizer, saved)), contents(optimizer))


# What else is kept.


def test_other_entries_are_kept(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, range(2))
    saved = deepcopy(optimizer.state_dict())
    note = torch.tensor([1.0, 2.0])
    saved["state"][0].update({"note": note, "word": "kept"})
    saved["param_groups"][0].update({"initial_lr": 0.3, "name": "first", "notes": [1, 2]})
    resumed = restored(optimizer, saved)
    entry = resumed.state[params_of(resumed)[0]]
    assert torch.equal(entry["note"], note)
    assert entry["note"] is not note
    assert entry["word"] == "kept"
    assert resumed.param_groups[0]["initial_lr"] == 0.3
    assert resumed.param_groups[0]["name"] == "first"
    assert resumed.param_groups[0]["notes"] == [1, 2]
    run(resumed, [2])
    run(optimizer, [2])
    assert_same(contents(resumed)["params"], contents(optimizer)["params"])


def test_loaded_state_takes_the_layout_of_its_param(cls: type[FusedOptimizer], driver: str) -> None:
    values = make_params(shapes=((5, 7, 2, 3),))[0].data
    optimizers = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        param = Parameter(values.clone(memory_format=memory_format))
        optimizers.append(cls([param], **OPTIONS[cls], backend=driver))
    plain, channels_last = optimizers
    run(plain, range(2))
    saved = through_a_file(plain.state_dict())
    put_back(channels_last, params_of(plain))
    channels_last.load_state_dict(saved)
    for optimizer in optimizers:
        run(optimizer, range(2, 5))
    assert_same(contents(channels_last), contents(plain))
    (param,) = params_of(channels_last)
    for key, value in channels_last.state[param].items():
        assert key == "step" or value.stride() == param.stride()


def test_named_params(cls: type[FusedOptimizer], backend: str) -> None:
    model = nn.Linear(3, 4)
    optimizer = cls(model.named_parameters(), **OPTIONS[cls], backend=backend)
    run(optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    del saved["param_groups"][0]["param_names"]  # from a run without names
    before = contents(optimizer)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert_same(contents(optimizer)["state"], before["state"])


def test_load_hooks(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, range(2))
    saved = deepcopy(optimizer.state_dict())
    other = deepcopy(saved)
    other["param_groups"][0]["lr"] = 0.123
    log = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, given: log.append(("pre", given["param_groups"][0]["lr"])) or other
    )
    optimizer.register_load_state_dict_post_hook(
        lambda subject: log.append(("post", subject.param_groups[0]["lr"]))
    )
    optimizer.load_state_dict(saved)
    assert log == [("pre", saved["param_groups"][0]["lr"]), ("post", 0.123)]
    before = contents(optimizer)

    def refuse(*_: Any) -> None:
        raise ZeroDivisionError

    optimizer.register_load_state_dict_pre_hook(refuse, prepend=True)
    with pytest.raises(ZeroDivisionError):
        optimizer.load_state_dict(saved)
    assert_same(contents(optimizer), before)


def test_the_gradients_are_left_alone_by_loading(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer, saved = used(cls, backend)
    params = params_of(optimizer)
    for p, grad in zip(params, random_grads(params, 9), strict=True):
        p.grad = grad
    grads = [p.grad for p in params]
    before = [bits(g) for g in grads]
    optimizer.load_state_dict(saved)
    for p, grad, kept in zip(params, grads, before, strict=True):
        assert p.grad is grad
        assert torch.equal(bits(grad), kept)
