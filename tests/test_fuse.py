"""Promise 21, and fusedopt.fuse: going on from torch.optim, and back to it."""

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

import fusedopt
from fusedopt import FusedAdam, FusedAdamW, FusedOptimizer, FusedSGD
from tests.helpers import (
    CLASSES,
    OPTIONS,
    TORCH,
    assert_close_to,
    assert_same,
    build,
    contents,
    groups_of,
    make_params,
    params_of,
    run,
    use_driver,
)

backend = pytest.fixture(use_driver, params=("cpu-direct", "reference"))


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> type[FusedOptimizer]:
    return request.param


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


def copies_of(optimizer: Optimizer) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params_of(optimizer)]


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def mark(optimizer: Optimizer, flags: dict[str, Any]) -> None:
    """Writes the capturable flag, after the steps."""
    if flags.get("capturable"):
        for group in optimizer.param_groups:
            group["capturable"] = True


def unmark(optimizer: Optimizer, flags: dict[str, Any]) -> None:
    """Makes torch step in this flavour on the CPU, whatever flags the checkpoint had."""
    for group in optimizer.param_groups:
        group.update({"foreach": None, "fused": None, **flags, "capturable": False})


# Promise 21: checkpoints.


@flavour
def test_from_torch(cls: type[FusedOptimizer], backend: str, flags: dict[str, Any]) -> None:
    oracle = torch_optimizer(cls, flags)
    run(oracle, range(3))
    mark(oracle, flags)
    saved = through_a_file(oracle.state_dict())
    subject = cls(groups_of(copies_of(oracle)), lr=0.9, backend=backend)
    subject.load_state_dict(saved)
    for p, q in zip(params_of(subject), params_of(oracle), strict=True):
        assert_same(dict(subject.state[p]), dict(oracle.state[q]))
    for group, other in zip(subject.param_groups, saved["param_groups"], strict=True):
        assert {k: group[k] for k in other if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
    unmark(oracle, flags)
    for number in range(3, 6):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


@flavour
def test_to_torch(cls: type[FusedOptimizer], backend: str, flags: dict[str, Any]) -> None:
    subject = build(cls, backend, torch.float64, **flags)
    run(subject, range(3))
    saved = through_a_file(subject.state_dict())
    oracle = torch_optimizer(cls, flags, copies_of(subject))
    oracle.load_state_dict(saved)
    for p, q in zip(params_of(subject), params_of(oracle), strict=True):
        assert_same(dict(subject.state[p]), dict(oracle.state[q]))
    for group, other in zip(oracle.param_groups, subject.param_groups, strict=True):
        for key in ("lr", "betas", "momentum", "weight_decay", "amsgrad", "nesterov", "maximize"):
            assert group.get(key) == other.get(key)
    unmark(oracle, flags)
    for number in range(3, 6):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


def test_there_and_back_is_bitwise(cls: type[FusedOptimizer], backend: str) -> None:
    subject = build(cls, backend)
    run(subject, range(3))
    between = TORCH[cls](groups_of(copies_of(subject)))
    between.load_state_dict(through_a_file(subject.state_dict()))
    back = cls(groups_of(copies_of(subject)), backend=backend)
    back.load_state_dict(through_a_file(between.state_dict()))
    for optimizer in (subject, back):
        run(optimizer, range(3, 5))
    assert_same(contents(back)["params"], contents(subject)["params"])
    assert_same(contents(back)["state"], contents(subject)["state"])


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            for key in keys:
                group.pop(key, None)

    return change


def with_steps(make: Callable[[float], Any]) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for entry in saved["state"].values():
            if "step" in entry:
                entry["step"] = make(entry["step"].item())

    return change


NEWER = ("maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")


def oldest(saved: dict[str, Any]) -> None:
    without(*NEWER, "initial_lr")(saved)
    with_steps(int)(saved)


OLDER: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"no {key}": without(key) for key in NEWER},
    "none of the newer keys": without(*NEWER),
    "int step": with_steps(int),
    "float step": with_steps(float),
    "one-element step": with_steps(lambda value: torch.tensor([value])),
    "float64 step": with_steps(lambda value: torch.tensor(value, dtype=torch.float64)),
    "int64 step": with_steps(lambda value: torch.tensor(int(value))),
    "oldest": oldest,
}


@pytest.mark.parametrize("change", OLDER.values(), ids=OLDER.keys())
def test_older_checkpoints(cls: type[FusedOptimizer], backend: str, change: Any) -> None:
    oracle = torch_optimizer(cls, FLAVOURS["for-loop"])
    run(oracle, range(3))
    saved = deepcopy(oracle.state_dict())
    change(saved)
    subject = cls(groups_of(copies_of(oracle)), backend=backend)
    subject.load_state_dict(saved)
    for number in range(3, 6):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


def test_sgd_without_momentum_buffers(backend: str) -> None:
    # torch.optim.SGD saves None where momentum is off.
    oracle = torch.optim.SGD(make_params(torch.float64), lr=0.1, foreach=False)
    run(oracle, range(2))
    saved = deepcopy(oracle.state_dict())
    for number in range(len(params_of(oracle))):
        saved["state"][number] = {"momentum_buffer": None}
    subject = FusedSGD(copies_of(oracle), backend=backend)
    subject.load_state_dict(saved)
    for optimizer in (subject, oracle):
        optimizer.param_groups[0].update(momentum=0.9, dampening=0.4)
    for number in range(2, 5):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


def test_state_of_some_params_only(cls: type[FusedOptimizer], backend: str) -> None:
    oracle = torch_optimizer(cls, FLAVOURS["for-loop"])
    params = params_of(oracle)
    for p in params[::2]:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p)
    oracle.step()
    subject = cls(groups_of(copies_of(oracle)), backend=backend)
    subject.load_state_dict(through_a_file(oracle.state_dict()))
    assert len(subject.state) == 3
    for optimizer in (subject, oracle):
        run(optimizer, range(2))
    assert_close_to(subject, oracle)


def test_adam_and_adamw_checkpoints_in_the_other_class(backend: str) -> None:
    # As in torch: AdamW stays decoupled whatever it loads; Adam takes over the saved flag.
    for source, target in ((torch.optim.Adam, FusedAdamW), (torch.optim.AdamW, FusedAdam)):
        donor = source(groups_of(make_params(torch.float64)), **OPTIONS[target], foreach=False)
        run(donor, range(2))
        both = [
            target(groups_of(copies_of(donor)), backend=backend),
            TORCH[target](groups_of(copies_of(donor)), foreach=False),
        ]
        for optimizer in both:
            optimizer.load_state_dict(deepcopy(donor.state_dict()))
            run(optimizer, range(2, 5))
        assert_close_to(*both)


# fusedopt.fuse.


@flavour
@pytest.mark.parametrize("steps", [0, 3])
def test_fuse(cls: type[FusedOptimizer], backend: str, flags: dict[str, Any], steps: int) -> None:
    source, oracle = (torch_optimizer(cls, flags) for _ in range(2))
    for optimizer in (source, oracle):
        run(optimizer, range(steps))
    mark(source, flags)
    subject = fusedopt.fuse(source, backend=backend)
    assert type(subject) is cls
    assert subject.backend == backend
    assert [p is q for p, q in zip(params_of(subject), params_of(source), strict=True)] == [
        True
    ] * len(params_of(source))
    for group, other in zip(subject.param_groups, source.param_groups, strict=True):
        assert group is not other
        assert group["params"] is not other["params"]
        assert {k: group[k] for k in other if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
    for p in params_of(source):
        for key, value in source.state.get(p, {}).items():
            if key != "step" and value is not None:
                assert subject.state[p][key] is value
    for number in range(steps, steps + 3):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


def test_fuse_takes_options(cls: type[FusedOptimizer], backend: str) -> None:
    source, oracle = (torch_optimizer(cls, FLAVOURS["for-loop"]) for _ in range(2))
    for optimizer in (source, oracle):
        run(optimizer, range(2))
    subject = fusedopt.fuse(source, max_grad_norm=0.1, backend=backend)
    assert subject.max_grad_norm == 0.1
    oracle.register_step_pre_hook(
        lambda o, *_: nn.utils.clip_grad_norm_(params_of(o), 0.1) and None
    )
    for optimizer in (subject, oracle):
        run(optimizer, range(2, 5))
    assert_close_to(subject, oracle)
    plain = fusedopt.fuse(source)
    assert (plain.max_grad_norm, plain.clip_grad_value, plain.skip_nonfinite) == (None, None, False)


def test_fuse_keeps_group_keys(cls: type[FusedOptimizer], backend: str) -> None:
    model = nn.Linear(4, 3)
    named = list(model.named_parameters())
    source = TORCH[cls](
        [
            {"params": named[:1], "lr": torch.tensor(0.25), "name": "weights", "weight_decay": 0.5},
            {"params": named[1:], "lr": 0.1, "maximize": True},
        ],
        lr=0.01,
        foreach=False,
    )
    torch.optim.lr_scheduler.StepLR(source, 3)
    subject = fusedopt.fuse(source, backend=backend)
    first, second = subject.param_groups
    assert first["lr"] is source.param_groups[0]["lr"]
    assert (first["name"], first["weight_decay"]) == ("weights", 0.5)
    assert (second["lr"], second["initial_lr"], second["maximize"]) == (0.1, 0.1, True)
    assert first["param_names"] == ["weight"]
    assert second["param_names"] == ["bias"]
    extra = Parameter(torch.ones(3))
    subject.add_param_group({"params": [("extra", extra)]})
    assert subject.param_groups[2]["lr"] == 0.01


def test_fuse_with_tensor_hyperparameters(backend: str) -> None:
    options = {
        "lr": torch.tensor(0.01, dtype=torch.float64),
        "betas": (torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.75, dtype=torch.float64)),
    }
    source, oracle = (
        torch.optim.AdamW(make_params(torch.float64), **deepcopy(options), foreach=False)
        for _ in range(2)
    )
    for optimizer in (source, oracle):
        run(optimizer, range(2))
    subject = fusedopt.fuse(source, backend=backend)
    for optimizer in (subject, oracle):
        optimizer.param_groups[0]["lr"].fill_(0.3)
        run(optimizer, range(2, 5))
    assert_close_to(subject, oracle)


def test_fuse_of_decoupled_adam(backend: str) -> None:
    source, oracle = (
        torch.optim.Adam(
            make_params(torch.float64), weight_decay=0.3, decoupled_weight_decay=True, foreach=False
        )
        for _ in range(2)
    )
    for optimizer in (source, oracle):
        run(optimizer, range(2))
    subject = fusedopt.fuse(source, backend=backend)
    assert type(subject) is FusedAdam
    subject.add_param_group({"params": make_params(torch.float64, seed=2)})
    oracle.add_param_group({"params": make_params(torch.float64, seed=2)})
    for optimizer in (subject, oracle):
        run(optimizer, range(2, 5))
    assert_close_to(subject, oracle)


def test_fuse_of_sgd_whose_momentum_comes_and_goes(backend: str) -> None:
    source, oracle = (
        torch.optim.SGD(
            [{"params": params[:3]}, {"params": params[3:], "momentum": 0.9}],
            lr=0.1,
            foreach=False,
        )
        for params in (make_params(torch.float64), make_params(torch.float64))
    )
    for optimizer in (source, oracle):
        run(optimizer, range(2))
    for p in params_of(source)[:3]:
        source.state[p]["momentum_buffer"] = None  # as older torch leaves it
    subject = fusedopt.fuse(source, backend=backend)
    assert "momentum_buffer" not in subject.state.get(params_of(subject)[0], {})
    for optimizer in (subject, oracle):
        optimizer.param_groups[0].update(momentum=0.5, dampening=0.5)
        run(optimizer, range(2, 5))
    assert_close_to(subject, oracle)


def test_fuse_of_a_subclass(backend: str) -> None:
    class Mine(torch.optim.AdamW):
        pass

    assert type(fusedopt.fuse(Mine(make_params()), backend=backend)) is FusedAdamW


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.RMSprop(params),
        lambda params: torch.optim.NAdam(params),
        lambda params: FusedAdamW(params),
        lambda params: None,
    ],
    ids=["RMSprop", "NAdam", "FusedAdamW", "None"],
)
def test_fuse_refuses_other_classes(make: Callable[[list[Parameter]], Any]) -> None:
    optimizer = make(make_params())
    with pytest.raises(TypeError, match=r"torch\.optim\.AdamW.*got " + type(optimizer).__name__):
        fusedopt.fuse(optimizer)


def test_fuse_refuses_differentiable(cls: type[FusedOptimizer]) -> None:
    params: list[Tensor] = [p.detach().clone() for p in make_params()]
    with pytest.raises(RuntimeError, match="differentiable"):
        fusedopt.fuse(TORCH[cls](params, differentiable=True))


def test_fuse_refuses_unknown_options(cls: type[FusedOptimizer]) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        fusedopt.fuse(TORCH[cls](make_params()), no_such_option=1)
