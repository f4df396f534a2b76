"""What a checkpoint holds beside the rule's own is kept as torch.optim keeps it; the checkpoint of
another class of optimizer is refused."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt import FusedAdam, FusedAdamW, FusedOptimizer, FusedSGD
from tests import life
from tests.helpers import (
    CLASSES,
    OPTIONS,
    TORCH,
    assert_same,
    build,
    contents,
    groups_of,
    make_params,
    params_of,
    run,
)
from tests.life import restored, through_a_file, used
from tests.test_checkpoint_refused import assert_refused

backend, cls = life.backend, life.cls


def trac() -> dict[str, Any]:
    """State of the optimizer as a whole, as wrappers put it under a key of their own."""
    return {"s": torch.tensor([0.5, 0.25]), "iter_count": 3, "refs": [torch.ones(2), "word"]}


# Hooks around state_dict(), and state that is no dict of a param.


def test_state_of_no_param(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, range(2))
    optimizer.state["test"] = 1
    optimizer.state["trac"] = trac()
    saved = through_a_file(optimizer.state_dict())
    assert saved["state"]["test"] == 1
    assert_same(saved["state"]["trac"], trac())
    resumed = restored(optimizer, saved)
    copies = [resumed, deepcopy(resumed), pickle.loads(pickle.dumps(resumed))]
    run(optimizer, [2])
    for other in copies:
        assert other.state["test"] == 1
        assert_same(other.state["trac"], trac())
        run(other, [2])
        assert_same(contents(other), contents(optimizer))
    resumed.state["trac"]["refs"][0].zero_()  # loading copied it
    assert_same(saved["state"]["trac"], trac())
    torch_one = TORCH[cls](groups_of(make_params()), **OPTIONS[cls])
    torch_one.load_state_dict(saved)
    assert_same(torch_one.state["trac"], trac())


def test_state_of_an_int_key_that_no_group_lists(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer, saved = used(cls, backend)
    saved["state"][99] = {"note": 1}
    optimizer.load_state_dict(saved)
    assert optimizer.state[99] == {"note": 1}  # type: ignore[index]
    saved["state"][99] = saved["state"][5]  # of a param that is missing here
    with pytest.raises(ValueError, match="state for 99, which no group lists"):
        optimizer.load_state_dict(saved)


def test_a_state_dict_pre_hook_may_add_to_the_state(cls: type[FusedOptimizer]) -> None:
    optimizer = build(cls)
    optimizer.register_state_dict_pre_hook(lambda o: o.state.update(test=1))
    assert optimizer.state_dict()["state"]["test"] == 1


def test_what_a_post_hook_returns_is_the_state_dict(cls: type[FusedOptimizer]) -> None:
    optimizer = build(cls)
    run(optimizer, [0])
    seen = []

    def count(_: Optimizer, state_dict: dict[str, Any]) -> None:
        seen.append(state_dict)

    def replace(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {"all of it": state_dict}

    optimizer.register_state_dict_post_hook(count)
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    optimizer.register_state_dict_post_hook(replace)
    assert optimizer.state_dict() == {"all of it": seen[-1]}
    optimizer.register_state_dict_post_hook(lambda *_: {}, prepend=True)
    assert optimizer.state_dict() == {"all of it": {}}


@pytest.mark.parametrize("step", [torch.tensor([3.0]), torch.tensor(3, dtype=torch.int64)])
@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_post_hooks_see_plain_step_counts(cls: type[FusedOptimizer], step: Tensor) -> None:
    optimizer = build(cls)
    run(optimizer, [0])
    first = params_of(optimizer)[0]
    optimizer.state[first]["step"] = step
    seen = []
    optimizer.register_state_dict_post_hook(
        lambda _, saved: seen.append([entry["step"] for entry in saved["state"].values()])
    )
    optimizer.state_dict()
    for count in seen[0]:
        assert (count.shape, count.dtype, count.device.type) == ((), torch.float32, "cpu")
    assert seen[0][0].item() == 3
    assert optimizer.state[first]["step"] is step


# State of another's making under a param.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_other_state_goes_where_torch_brings_it(cls: type[FusedOptimizer], dtype: Any) -> None:
    plain = TORCH[cls](groups_of(make_params(dtype)), **OPTIONS[cls], foreach=False)
    run(plain, [0])
    saved = deepcopy(plain.state_dict())
    for entry in saved["state"].values():
        entry["slow"] = torch.randn(3, dtype=torch.float64)
        entry["z"] = torch.randn(4).half()
        entry["mask"] = torch.tensor([True, False])
        entry["nested"] = {
            "step": torch.tensor(3, dtype=torch.int64),
            "list": [torch.ones(2, dtype=torch.float64), 5],
            "pair": (torch.ones(1).half(), None),
        }
        entry["number"] = 7
        entry["nothing"] = None
    before = deepcopy(saved)
    ours, theirs = (
        kind(groups_of(make_params(dtype)), **OPTIONS[cls]) for kind in (cls, TORCH[cls])
    )
    ours.load_state_dict(saved)
    theirs.load_state_dict(deepcopy(saved))
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert_same(dict(ours.state[p]), dict(theirs.state[q]))
        assert ours.state[p]["z"].dtype == dtype
        ours.state[p]["z"].zero_()
        ours.state[p]["nested"]["list"][0].zero_()
    assert_same(saved, before)


def test_other_state_of_a_complex_param_keeps_its_dtype(cls: type[FusedOptimizer]) -> None:
    ours, theirs = (kind([Parameter(torch.ones(3) + 1j)], lr=0.1) for kind in (cls, TORCH[cls]))
    run(ours, [0])
    saved = deepcopy(ours.state_dict())
    wide, narrow = torch.ones(3, dtype=torch.complex128), torch.ones(2).half()
    saved["state"].setdefault(0, {}).update({"z": wide, "real": narrow})
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(deepcopy(saved))
    assert_same(*(dict(o.state[params_of(o)[0]]) for o in (ours, theirs)))


def test_a_param_with_other_state_only(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer, twin = build(cls, backend), build(cls, backend)
    saved = deepcopy(optimizer.state_dict())
    for number, p in enumerate(params_of(optimizer)):
        saved["state"][number] = {"slow_buffer": p.detach().double()}
    resumed = restored(optimizer, through_a_file(saved))
    for p in params_of(resumed):
        assert set(resumed.state[p]) == {"slow_buffer"}
        assert resumed.state[p]["slow_buffer"].dtype == torch.float32
    for subject in (resumed, twin):
        run(subject, range(3))
    assert_same(contents(resumed)["params"], contents(twin)["params"])
    for p, q in zip(params_of(resumed), params_of(twin), strict=True):
        assert set(resumed.state[p]) == {"slow_buffer", *twin.state[q]}


def test_a_state_with_other_entries_must_still_be_whole(backend: str) -> None:
    optimizer, saved = used(FusedAdamW, backend)
    saved["state"][5]["slow_buffer"] = torch.ones(7, 3, 4)
    del saved["state"][5]["exp_avg"]
    with pytest.raises(ValueError, match="lacks exp_avg"):
        optimizer.load_state_dict(saved)


def test_a_step_under_sgd_is_of_another_making(backend: str) -> None:
    optimizer, saved = used(FusedSGD, backend)
    count = torch.tensor([1, 2])
    saved["state"][0]["step"] = count
    optimizer.load_state_dict(saved)
    assert_same(optimizer.state[params_of(optimizer)[0]]["step"], count)


def test_group_keys_of_any_kind(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer, saved = used(cls, backend)
    saved["param_groups"][0].update({7: "seven", "lookahead_k": 6, "momentum_decay": 0.1})
    optimizer.load_state_dict(saved)
    group: dict[Any, Any] = optimizer.param_groups[0]
    assert (group[7], group["lookahead_k"], group["momentum_decay"]) == ("seven", 6, 0.1)


# Checkpoints of another class.

OTHERS: dict[str, Any] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.123),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.123, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.123),
    "SGD-momentum": lambda params: torch.optim.SGD(params, lr=0.123, momentum=0.9),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=0.123),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.123),
    "RMSprop-momentum": lambda params: torch.optim.RMSprop(params, lr=0.123, momentum=0.9),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.123),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=0.123),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.123),
    "ASGD": lambda params: torch.optim.ASGD(params, lr=0.123),
    "FusedAdamW": lambda params: FusedAdamW(params, lr=0.123),
    "FusedSGD": lambda params: FusedSGD(params, lr=0.123, momentum=0.9),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("target", "name"),
    [
        (cls, name)
        for cls in CLASSES
        for name in OTHERS
        if ("SGD" in name and name != "ASGD") != (cls is FusedSGD)
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_another_class_is_refused(target: type[FusedOptimizer], name: str, steps: int) -> None:
    if name == "Adamax" and target is not FusedSGD and not steps:
        pytest.skip("a group of Adamax is one of Adam")
    if target is not FusedSGD and name in ("AdamW", "Adam", "FusedAdamW"):
        pytest.skip("the same state")
    donor = OTHERS[name](groups_of(make_params()))
    run(donor, range(steps))
    optimizer = build(target)
    run(optimizer, [5])
    assert_refused(optimizer, deepcopy(donor.state_dict()))


def test_the_refusal_names_what_was_found_and_what_fits() -> None:
    adamw, sgd = build(FusedAdamW), build(FusedSGD)
    for optimizer in (adamw, sgd):
        run(optimizer, [0])
    with pytest.raises(ValueError, match="loaded state dict") as raised:
        sgd.load_state_dict(adamw.state_dict())
    for part in ("param_groups[0]", "no momentum, dampening", "FusedSGD", "betas", "FusedAdamW"):
        assert part in str(raised.value)
    with pytest.raises(ValueError, match="loaded state dict") as raised:
        adamw.load_state_dict(sgd.state_dict())
    for part in ("param_groups[0]", "no betas, eps", "FusedAdamW", "momentum", "FusedSGD"):
        assert part in str(raised.value)


@pytest.mark.parametrize("kept", ["groups of the new optimizer", "groups of both"])
def test_state_of_another_class_under_groups_that_fit(kept: str) -> None:
    # As where someone loads the state alone, to keep the hyperparameters of the new run.
    adamw, sgd = build(FusedAdamW), build(FusedSGD)
    for optimizer in (adamw, sgd):
        run(optimizer, [0])
    for donor, target, part in ((adamw, sgd, "FusedAdam or"), (sgd, adamw, "which FusedSGD")):
        groups = deepcopy(target.state_dict()["param_groups"])
        if kept == "groups of both":
            for group, other in zip(groups, donor.state_dict()["param_groups"], strict=True):
                group.update({k: v for k, v in other.items() if k not in group})
        saved = {"state": deepcopy(donor.state_dict()["state"]), "param_groups": groups}
        assert_refused(target, saved, match=r'param_groups\[0\]\["params"\]\[0\].*' + part)


def test_later_groups_are_looked_at_too() -> None:
    optimizer, saved = used(FusedSGD)
    del saved["param_groups"][1]["momentum"]
    assert_refused(optimizer, saved, match=r"param_groups\[1\].*no momentum")


@pytest.mark.parametrize("target", [FusedAdam, FusedAdamW], ids=lambda cls: cls.__name__)
def test_the_same_state_under_another_name_is_taken(target: type[FusedOptimizer]) -> None:
    # As in torch: the moments of these are those of Adam.
    for source in (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam):
        donor = source(groups_of(make_params()), lr=0.01)
        run(donor, range(2))
        optimizer = target(groups_of(make_params()))
        optimizer.load_state_dict(deepcopy(donor.state_dict()))
        for p, q in zip(params_of(optimizer), params_of(donor), strict=True):
            assert torch.equal(optimizer.state[p]["exp_avg_sq"], donor.state[q]["exp_avg_sq"])
        run(optimizer, [2])


def test_a_state_of_sgd_that_keeps_statistics(backend: str) -> None:
    # Keys that Adam uses, but not the state of Adam.
    optimizer = FusedSGD(make_params(), lr=0.1, backend=backend)
    for p in params_of(optimizer):
        optimizer.state[p]["exp_avg_sq"] = torch.ones_like(p)
    optimizer.load_state_dict(optimizer.state_dict())
    for p in params_of(optimizer):
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], torch.ones_like(p))


# convert_state_dict and fuse take the same.


def test_convert_and_fuse_take_state_of_no_param(cls: type[FusedOptimizer], backend: str) -> None:
    source = TORCH[cls](groups_of(make_params()), **OPTIONS[cls])
    run(source, [0])
    source.state["test"] = 1
    source.state["trac"] = trac()
    converted = fusedopt.convert_state_dict(source.state_dict())
    assert converted["state"]["test"] == 1
    assert converted["state"]["trac"] is source.state["trac"]
    subject = build(cls, backend)
    subject.load_state_dict(converted)
    fused = fusedopt.fuse(source, backend=backend)
    assert fused.state["trac"] is source.state["trac"]
    for optimizer in (subject, fused):
        assert optimizer.state["test"] == 1
        assert_same(optimizer.state["trac"], trac())
        run(optimizer, [1])
        assert optimizer.state_dict()["state"]["test"] == 1
