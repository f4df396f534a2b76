"""Promises 17, 18, 24, 25 and 26: what may happen to an optimizer between and around its steps."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fusedopt import FusedOptimizer, FusedSGD
from tests.helpers import (
    CLASSES,
    DRIVERS,
    OPTIONS,
    TORCH,
    assert_close,
    assert_close_to,
    assert_same,
    bits,
    build,
    build_torch,
    contents,
    groups_of,
    make_params,
    params_of,
    random_grads,
    run,
    use_driver,
)

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
    return twin


# Promise 17: hyperparameters, groups and gradients change.

ALL_CHANGES: list[dict[str, Any]] = [
    {},
    {"lr": 0.1},
    {"weight_decay": 0.0},
    {"weight_decay": 0.3, "lr": torch.tensor(0.004, dtype=torch.float64)},
    {"maximize": True},
    {"lr": 0.0},
    {"lr": 0.02, "maximize": False},
]
ADAM_CHANGES = [{"betas": (0.5, 0.9)}, {"eps": 1e-3}, {"amsgrad": False}, {}, {"amsgrad": True}]
SGD_CHANGES = [
    {"momentum": 0.0},
    {},
    {"momentum": 0.5},
    {"dampening": 0.9},
    {"dampening": 0.0, "nesterov": True},
    {"momentum": 0.99},
]


def test_hyperparameters_changed_between_steps(cls: type[FusedOptimizer], backend: str) -> None:
    both = pair(cls, backend)
    own = SGD_CHANGES if cls is FusedSGD else ADAM_CHANGES
    for number, change in enumerate(ALL_CHANGES + own):
        for optimizer in both:
            optimizer.param_groups[number % 2].update(change)
            run(optimizer, [number])
        assert_close_to(*both)


def test_momentum_that_comes_later_starts_with_the_gradient(backend: str) -> None:
    both = pair(FusedSGD, backend, momentum=0.0, dampening=0.5)
    for number in range(4):
        for optimizer in both:
            if number == 2:
                optimizer.param_groups[0]["momentum"] = 0.9
            run(optimizer, [number])
        assert_close_to(*both)


def test_group_dicts_replaced(cls: type[FusedOptimizer], backend: str) -> None:
    both = pair(cls, backend)
    for number in range(6):
        for optimizer in both:
            old = optimizer.param_groups
            # Another order of the keys, foreign keys before and after the known ones.
            new = [
                {"name": f"{number}", **dict(reversed(group.items())), 7: "seven"} for group in old
            ]
            new[number % 2]["lr"] = 0.01 * (number + 1)
            if number % 3:
                optimizer.param_groups = new
            else:
                optimizer.param_groups[:] = new
            for group in old if number % 3 else []:
                group["lr"] = float("nan")  # the old dicts are out of use
            run(optimizer, [number])
        assert_close_to(*both)


def test_param_lists_changed(cls: type[FusedOptimizer], driver: str) -> None:
    both = pair(cls, driver)
    removed: dict[int, list[Tensor]] = {}
    for number in range(6):
        for which, optimizer in enumerate(both):
            first, second = (group["params"] for group in optimizer.param_groups)
            if number == 1:  # moves to another group, with its state
                second.append(first.pop(2))
            elif number == 2:
                second.reverse()
            elif number == 3:
                removed[which] = [second.pop(1), second.pop(1)]
                kept = [bits(p) for p in removed[which]]
            elif number == 4:
                optimizer.param_groups[0]["params"] = first[::-1]
            elif number == 5:
                second += removed[which]
            run(optimizer, [number])
            if number == 3:
                for p, before in zip(removed[which], kept, strict=True):
                    assert torch.equal(bits(p), before)
        assert_close_to(*both)


def test_groups_added(cls: type[FusedOptimizer], backend: str) -> None:
    both = pair(cls, backend)
    for optimizer in both:
        run(optimizer, [0, 1])
        added = make_params(torch.float64, seed=1, shapes=((40,), (3, 3)))
        optimizer.add_param_group({"params": added, "lr": 0.5, "weight_decay": 0.7})
        run(optimizer, [2, 3])
        optimizer.add_param_group({"params": Parameter(torch.ones(5, dtype=torch.float64))})
        run(optimizer, [4])
    assert_close_to(*both)


def test_a_group_that_is_refused_is_not_added(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, [0])
    before = contents(optimizer)
    new = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optimizer.add_param_group({"params": [new], "lr": -1.0})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"][0]]})
    assert_same(contents(optimizer), before)


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


@pytest.mark.parametrize("set_to_none", [True, False])
def test_params_frozen_and_unfrozen(
    cls: type[FusedOptimizer], backend: str, set_to_none: bool
) -> None:
    models, both = networks(cls, backend)
    for number in range(8):
        for model, optimizer in zip(models, both, strict=True):
            model[0].requires_grad_(number not in (0, 3, 4))
            model[2].bias.requires_grad_(number < 5)
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(model, number)
            optimizer.step()
        assert_close_to(*both)


def test_a_frozen_param_with_a_gradient_is_stepped(cls: type[FusedOptimizer], driver: str) -> None:
    both = pair(cls, driver)
    for optimizer in both:
        for p in params_of(optimizer)[::2]:
            p.requires_grad_(False)
        run(optimizer, [0, 1])
    assert_close_to(*both)


def test_gradients_coming_and_going(cls: type[FusedOptimizer], driver: str) -> None:
    subject, oracle = pair(cls, driver)
    chooser = random.Random(0)
    counts = [0] * len(params_of(subject))
    for number in range(14):
        before = [bits(p) for p in params_of(subject)]
        # The first gradient of param i arrives in step i or later.
        present = [number >= i and chooser.random() < 0.6 for i in range(len(counts))]
        for optimizer in (subject, oracle):
            params = params_of(optimizer)
            for p, grad, there in zip(params, random_grads(params, number), present, strict=True):
                p.grad = grad if there else None
            optimizer.step()
        assert_close_to(subject, oracle)
        for i, p in enumerate(params_of(subject)):
            counts[i] += present[i]
            if not present[i]:
                assert torch.equal(bits(p), before[i])
            if counts[i] == 0:
                assert p not in subject.state
            elif cls is not FusedSGD:
                assert subject.state[p]["step"].item() == counts[i]
    assert len(set(counts)) > 3  # the params really differ in their counts


def test_first_momentum_is_the_gradient_whatever_the_dampening(driver: str) -> None:
    params = make_params()
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.7, backend=driver)
    for late in range(len(params)):
        for i, (p, grad) in enumerate(zip(params, random_grads(params, late), strict=True)):
            p.grad = grad if i <= late else None
        optimizer.step()
        assert torch.equal(optimizer.state[params[late]]["momentum_buffer"], params[late].grad)


def test_steps_from_within_backward(cls: type[FusedOptimizer], driver: str) -> None:
    # An optimizer for each param, stepped as soon as its gradient is there.
    models = [network(), network()]
    both: list[list[Optimizer]] = [
        [cls([p], **OPTIONS[cls], backend=driver) for p in models[0].parameters()],
        [TORCH[cls]([p], **OPTIONS[cls], foreach=False) for p in models[1].parameters()],
    ]
    for model, optimizers in zip(models, both, strict=True):
        for p, optimizer in zip(model.parameters(), optimizers, strict=True):

            def hook(_: Tensor, optimizer: Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(hook)
        for number in range(4):
            backward(model, number)
    for subject, oracle in zip(*both, strict=True):
        assert_close_to(subject, oracle)


def test_another_default_device(cls: type[FusedOptimizer], driver: str) -> None:
    optimizers = [build(cls, driver, max_grad_norm=0.1) for _ in range(2)]
    for number in range(4):
        grads = random_grads(params_of(optimizers[0]), number)
        for optimizer in optimizers:
            for p, grad in zip(params_of(optimizer), grads, strict=True):
                p.grad = grad
        optimizers[0].step()
        with torch.device("meta"):
            optimizers[1].step()
            optimizers[1].load_state_dict(optimizers[1].state_dict())
        assert_same(contents(optimizers[1]), contents(optimizers[0]))


def test_a_step_without_gradients_is_nothing(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    before = contents(optimizer)
    optimizer.step()
    assert_same(contents(optimizer), before)
    assert not optimizer.state
    run(optimizer, [0])
    before = contents(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(contents(optimizer), before)


def test_a_step_that_raises_changes_nothing(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    params = params_of(optimizer)
    for p, grad in zip(params[2:], random_grads(params[2:], 0), strict=True):
        p.grad = grad
    optimizer.step()
    key = next(k for k in optimizer.state[params[-1]] if k != "step")
    good = optimizer.state[params[-1]][key]
    optimizer.state[params[-1]][key] = good[:-1].clone()
    before = contents(optimizer)
    for p, grad in zip(params, random_grads(params, 1), strict=True):
        p.grad = grad
    with pytest.raises(ValueError, match=f"{key}.*" + r"param_groups\[1\].*shape"):
        optimizer.step()
    assert_same(contents(optimizer), before)
    assert params[0] not in optimizer.state
    optimizer.state[params[-1]][key] = good
    twin = twin_of(optimizer)
    run(optimizer, [2])
    run(twin, [2])
    assert_same(contents(optimizer), contents(twin))


@pytest.mark.parametrize("missing", ["lr", "weight_decay", "params"])
def test_a_group_that_lacks_a_key(cls: type[FusedOptimizer], backend: str, missing: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, [0])
    value = optimizer.param_groups[0].pop(missing)
    params = optimizer.param_groups[1]["params"]
    before = [bits(p) for p in params]
    with pytest.raises(KeyError, match=missing):
        optimizer.step()
    optimizer.param_groups[0][missing] = value
    for p, bytes_before in zip(params, before, strict=True):
        assert torch.equal(bits(p), bytes_before)


# Promise 18: other storage.


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


def test_new_gradient_buffers_on_each_step(cls: type[FusedOptimizer], driver: str) -> None:
    reused, renewed = build(cls, driver), build(cls, driver)
    run(reused, [0])
    old = []
    for number in range(5):
        params = params_of(reused)
        for p, grad in zip(params, random_grads(params, number), strict=True):
            p.grad.copy_(grad)
        if number:
            reused.step()
        run(renewed, [number])
        # Kept alive and poisoned: a step that read an old buffer would show it.
        old += [p.grad for p in params_of(renewed)]
        for grad in old:
            grad.fill_(float("nan"))
        assert_same(contents(reused)["params"], contents(renewed)["params"])
        assert_same(contents(reused)["state"], contents(renewed)["state"])


@pytest.mark.parametrize("change", STORAGE.values(), ids=STORAGE.keys())
def test_param_data_swapped(cls: type[FusedOptimizer], driver: str, change: Any) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(3))
    params = params_of(optimizer)
    old = [p.data for p in params]
    for p in params:
        p.data = change(p.data)
    new = [p.data for p in params]
    kept, started = [bits(t) for t in old], [bits(t) for t in new]
    twin = twin_of(optimizer)
    run(optimizer, range(3, 6))
    run(twin, range(3, 6))
    assert_same(contents(optimizer), contents(twin))
    for p, now, before, then, bytes_before in zip(params, new, old, started, kept, strict=True):
        assert torch.equal(bits(before), bytes_before)
        assert (p.data_ptr(), p.stride()) == (now.data_ptr(), now.stride())
        # A few elements alone may round back to what they were, in a short dtype.
        assert p.numel() < 10 or not torch.equal(bits(now), then)


@pytest.mark.parametrize(
    ("how", "change"),
    [
        *(pytest.param("replaced", change, id=name) for name, change in STORAGE.items()),
        *(pytest.param("data", STORAGE[name], id=f"data-{name}") for name in ("clone", "gaps")),
    ],
)
def test_state_tensors_swapped(
    cls: type[FusedOptimizer], driver: str, how: str, change: Any
) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(3))
    old, new = [], []
    for entry in optimizer.state.values():
        for key in [k for k in entry if k != "step"]:
            old.append(entry[key].data)
            new.append(change(entry[key].data))
            if how == "replaced":
                entry[key] = new[-1]
            else:
                entry[key].data = new[-1]
    kept, started = [bits(t) for t in old], [bits(t) for t in new]
    twin = twin_of(optimizer)
    run(optimizer, range(3, 6))
    run(twin, range(3, 6))
    assert_same(contents(optimizer), contents(twin))
    now = [v for entry in optimizer.state.values() for k, v in entry.items() if k != "step"]
    for tensor, buffer, then, before, bytes_before in zip(
        now, new, started, old, kept, strict=True
    ):
        assert torch.equal(bits(before), bytes_before)
        assert tensor.data_ptr() == buffer.data_ptr()
        assert tensor.numel() < 10 or not torch.equal(bits(buffer), then)


STEPS = {
    "int": 7,
    "float": 7.0,
    "float32": torch.tensor(7.0),
    "one-element": torch.tensor([7.0]),
    "float64": torch.tensor(7.0, dtype=torch.float64),
    "int64": torch.tensor(7),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_step_replaced(cls: type[FusedOptimizer], driver: str, step: Any) -> None:
    optimizer, plain = build(cls, driver), build(cls, driver)
    for subject in (optimizer, plain):
        run(subject, range(3))
    old = [entry["step"] for entry in optimizer.state.values()]
    for entry, other in zip(optimizer.state.values(), plain.state.values(), strict=True):
        entry["step"] = deepcopy(step)
        other["step"] = torch.tensor(7.0)
    for subject in (optimizer, plain):
        run(subject, [3, 4])
    assert_same(contents(optimizer)["params"], contents(plain)["params"])
    assert [float(entry["step"]) for entry in optimizer.state.values()] == [9.0] * len(old)
    assert [tensor.item() for tensor in old] == [3.0] * len(old)


@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_step_data_swapped(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(3))
    old = [entry["step"].data for entry in optimizer.state.values()]
    for entry in optimizer.state.values():
        entry["step"].data = torch.tensor(7.0)
    run(optimizer, [3])
    assert [entry["step"].item() for entry in optimizer.state.values()] == [8.0] * len(old)
    assert [tensor.item() for tensor in old] == [3.0] * len(old)


def test_state_dicts_in_any_order(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer, plain = build(cls, driver), build(cls, driver)
    chooser = random.Random(0)
    for number in range(8):
        for p in optimizer.state:
            items = [*optimizer.state[p].items(), (f"note {chooser.random()}", None), (5, "five")]
            known = [(k, v) for k, v in items if k in ("step", *cls.rule.state)]
            items = items if chooser.random() < 0.5 else known
            chooser.shuffle(items)
            # A key that is equal to the usual one, but is another object.
            optimizer.state[p] = {"".join(k) if isinstance(k, str) else k: v for k, v in items}
        for subject in (optimizer, plain):
            run(subject, [number])
        assert_same(contents(optimizer)["params"], contents(plain)["params"])


def test_swap_tensors(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(3))
    params, others = params_of(optimizer), make_params(torch.bfloat16, seed=5)
    for p, other in zip(params, others, strict=True):
        torch.utils.swap_tensors(p, other)
    kept = [bits(t) for t in others]
    assert all(t.dtype == torch.float32 for t in others)
    twin = twin_of(optimizer)
    run(optimizer, range(3, 6))
    run(twin, range(3, 6))
    assert_same(contents(optimizer), contents(twin))
    assert all(p.dtype == torch.bfloat16 for p in params)
    for other, before in zip(others, kept, strict=True):
        assert torch.equal(bits(other), before)


def test_module_converted_after_construction(cls: type[FusedOptimizer], backend: str) -> None:
    model = network().float()
    optimizer = cls(model.parameters(), **OPTIONS[cls], backend=backend)
    run(optimizer, [0])
    model.double()
    optimizer.zero_grad()
    twin = twin_of(optimizer)
    run(optimizer, [1, 2])
    run(twin, [1, 2])
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert_same(contents(optimizer), contents(twin))


# Promise 24: version counters.


@pytest.mark.parametrize("layout", ["clone", "transposed", "gaps"])
def test_backward_through_an_overwritten_weight_raises(
    cls: type[FusedOptimizer], driver: str, layout: str
) -> None:
    weights = [Parameter(STORAGE[layout](t.data)) for t in make_params(shapes=((9, 7), (9, 7)))]
    stepped, idle = weights
    optimizer = cls(weights, **OPTIONS[cls], backend=driver)
    for number in range(2):
        losses = [w.square().sum() for w in weights]  # each keeps its w for backward
        stepped.grad = random_grads([stepped], number)[0]
        idle.grad = None
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses[0].backward()
        losses[1].backward()


def test_version_counters_of_a_large_step(cls: type[FusedOptimizer], backend: str) -> None:
    # Large enough that the native driver lets other threads run meanwhile.
    weight = Parameter(make_params(shapes=((1 << 20) + 3,))[0].data)
    optimizer = cls([weight], **OPTIONS[cls], backend=backend)
    loss = weight.square().sum()
    weight.grad = random_grads([weight], 0)[0]
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Promise 25: gradients.

GRAD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "norm": {"max_grad_norm": 0.5},
    "value": {"clip_grad_value": 0.1},
    "skip": {"skip_nonfinite": True},
}


@pytest.mark.parametrize("options", GRAD_OPTIONS.values(), ids=GRAD_OPTIONS.keys())
def test_gradients_are_not_modified(
    cls: type[FusedOptimizer], driver: str, options: dict[str, Any]
) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    params = [p for dtype in dtypes for p in make_params(dtype)]
    optimizer = cls(params, **OPTIONS[cls], backend=driver, **options)
    for number, change in enumerate([torch.clone, transposed, with_gaps, at_offset]):
        for p, grad in zip(params, random_grads(params, number), strict=True):
            p.grad = change(grad)
        for p in params[4::6]:
            p.grad = random_grads([p[:1]], number)[0].expand(p.shape)
        if "max_grad_norm" in options:
            optimizer.grad_scale = torch.tensor(2.0)  # as GradScaler hands it over
        grads = [p.grad for p in params]
        before = [(bits(g), g.data_ptr(), g.stride(), g._version) for g in grads]
        optimizer.step()
        for p, grad, (values, *rest) in zip(params, grads, before, strict=True):
            assert p.grad is grad
            assert torch.equal(bits(grad), values)
            assert [grad.data_ptr(), grad.stride(), grad._version] == rest


# Promise 26: closures and hooks.


@pytest.fixture
def hooked() -> Iterator[None]:
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    yield
    handle.remove()


@pytest.mark.parametrize("hook", [False, True], ids=["", "hooked"])
@pytest.mark.parametrize("keyword", [False, True], ids=["", "keyword"])
def test_closure_called_once_with_grad_enabled(
    cls: type[FusedOptimizer], backend: str, keyword: bool, hook: bool, request: Any
) -> None:
    if hook:
        request.getfixturevalue("hooked")
    models, both = networks(cls, backend)
    for number in range(3):
        for model, optimizer in zip(models, both, strict=True):
            calls = []

            def closure(model: Any = model, optimizer: Any = optimizer, calls: Any = calls) -> Any:
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                calls.append(backward(model, number))  # noqa: B023
                return calls[-1]

            with torch.no_grad():
                loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
                assert not torch.is_grad_enabled()
            assert len(calls) == 1
            assert loss is calls[0]
        assert_close_to(*both)
    assert both[0].step() is None


def test_closure_that_raises(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, [0])
    before = contents(optimizer)

    def closure() -> None:
        raise ZeroDivisionError("in the closure")

    with pytest.raises(ZeroDivisionError, match="in the closure"):
        optimizer.step(closure)
    assert_same(contents(optimizer), before)
    assert torch.is_grad_enabled()


CALLS: dict[str, Callable[[Optimizer, Any], Any]] = {
    "nothing": lambda optimizer, closure: optimizer.step(),
    "positional": lambda optimizer, closure: optimizer.step(closure),
    "keyword": lambda optimizer, closure: optimizer.step(closure=closure),
}


def hook_log(optimizer: Optimizer, call: Callable[[Optimizer, Any], Any]) -> list[Any]:
    """What the hooks of one step see, in their order."""
    log: list[Any] = []
    run(optimizer, [0])
    before = [bits(p) for p in params_of(optimizer)]

    def note(name: str) -> Callable[..., None]:
        def hook(subject: Optimizer, args: Any, kwargs: Any) -> None:
            assert subject is optimizer
            changed = any(
                not torch.equal(bits(p), b) for p, b in zip(params_of(subject), before, strict=True)
            )
            log.append((name, changed, [a is optimizer for a in args], sorted(kwargs)))

        return hook

    handles = [
        optimizer.register_step_post_hook(note("post 1")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre 1")),
        register_optimizer_step_pre_hook(note("global pre")),
        optimizer.register_step_post_hook(note("post 2")),
        optimizer.register_step_pre_hook(note("pre 2")),
    ]
    try:
        call(optimizer, lambda: log.append("closure"))
    finally:
        for handle in handles:
            handle.remove()
    call(optimizer, lambda: None)  # removed hooks are silent
    return log


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_hooks_in_order(cls: type[FusedOptimizer], backend: str, call: Any) -> None:
    subject, oracle = pair(cls, backend)
    log = hook_log(subject, call)
    assert log == hook_log(oracle, call)
    names = [entry[0] for entry in log if entry != "closure"]
    assert names == ["global pre", "pre 1", "pre 2", "post 1", "post 2", "global post"]
    assert_close_to(subject, oracle)


@pytest.mark.parametrize("kind", ["pre", "post", "global pre", "global post"])
def test_a_single_hook_is_called(cls: type[FusedOptimizer], backend: str, kind: str) -> None:
    optimizer = build(cls, backend)
    calls = []
    register = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[kind]
    handle = register(lambda *_: calls.append(kind))
    run(optimizer, [0, 1])
    handle.remove()
    run(optimizer, [2])
    assert calls == [kind, kind]


def test_a_pre_hook_changes_the_arguments(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, [0])
    optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: "other"), {}))
    assert optimizer.step(lambda: "given") == "other"
    assert optimizer.step() == "other"
    optimizer.register_step_pre_hook(lambda *_: "neither None nor a pair")
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    assert_same(contents(optimizer), before)


def test_a_pre_hook_that_sets_the_gradients(cls: type[FusedOptimizer], backend: str) -> None:
    both = pair(cls, backend)
    for optimizer in both:

        def clip(subject: Optimizer, args: Any, kwargs: Any) -> None:
            nn.utils.clip_grad_norm_(params_of(subject), 0.1)

        optimizer.register_step_pre_hook(clip)
        run(optimizer, range(3))
    assert_close_to(*both)


def test_the_profiler_sees_a_step(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, [0])
    with torch.autograd.profiler.profile() as profile:
        run(optimizer, [1, 2])
    name = f"Optimizer.step#{cls.__name__}.step"
    assert [event.name for event in profile.function_events].count(name) == 2


def test_zero_grad(cls: type[FusedOptimizer], backend: str) -> None:
    both = pair(cls, backend)
    for optimizer in both:
        run(optimizer, [0, 1])
        grads = [p.grad for p in params_of(optimizer)]
        optimizer.zero_grad(set_to_none=False)
        for p, grad in zip(params_of(optimizer), grads, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, torch.zeros_like(grad))
        optimizer.step()  # moments decay under zero gradients
        optimizer.zero_grad()
        assert all(p.grad is None for p in params_of(optimizer))
        optimizer.step()
        run(optimizer, [2])
    assert_close_to(*both)


# Learning-rate schedulers and averaging.

Scheduler = Callable[[Optimizer], Any]
SCHEDULERS: dict[str, Scheduler] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=1e-3, max_lr=0.1, step_size_up=3, base_momentum=0.6, max_momentum=0.95
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.005, anneal_epochs=4),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.filterwarnings("ignore:The epoch parameter in")
def test_schedulers(
    cls: type[FusedOptimizer], backend: str, make: Scheduler, tensor_lr: bool
) -> None:
    few = [make_params(torch.float64, shapes=((3, 5), (17,))) for _ in range(2)]
    subject = cls(groups_of(few[0]), **OPTIONS[cls], backend=backend)
    oracle = TORCH[cls](groups_of(few[1]), **OPTIONS[cls], foreach=False)
    both = (subject, oracle)
    # A lr of its own for each group; tensors in float64, so that torch's maths stays in it.
    if tensor_lr:
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    schedulers = [make(optimizer) for optimizer in both]
    seen = set()
    for number in range(8):
        rates = []
        for optimizer, scheduler in zip(both, schedulers, strict=True):
            run(optimizer, [number])
            with warnings.catch_warnings():
                # "lr_scheduler.step() before optimizer.step()": the step was not noticed.
                warnings.filterwarnings("error", message="Detected call of")
                metric = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
                scheduler.step(*metric)
            keys = ("momentum",) if cls is FusedSGD else ("betas",)
            rates.append([(float(g["lr"]), *(g[k] for k in keys)) for g in optimizer.param_groups])
            assert all(isinstance(g["lr"], Tensor) == tensor_lr for g in optimizer.param_groups)
        assert rates[0] == rates[1]
        seen.add(tuple(rates[0]))
        assert_close_to(*both)
    assert len(seen) > 1
    if make in (SCHEDULERS["CyclicLR"], SCHEDULERS["OneCycleLR"]):
        assert len({pair[0][1] for pair in seen}) > 3  # the momentum cycles, too


@pytest.mark.parametrize("ema", [False, True], ids=["mean", "ema"])
def test_averaged_model(cls: type[FusedOptimizer], backend: str, ema: bool) -> None:
    models, both = networks(cls, backend)
    average = swa_utils.get_ema_multi_avg_fn(0.7) if ema else None
    averages = [swa_utils.AveragedModel(m, multi_avg_fn=average) for m in models]
    schedulers = [swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=2) for o in both]
    for number in range(6):
        for model, optimizer, mean, scheduler in zip(
            models, both, averages, schedulers, strict=True
        ):
            optimizer.zero_grad()
            backward(model, number)
            before = [bits(p) for p in mean.parameters()]
            optimizer.step()
            for p, b in zip(mean.parameters(), before, strict=True):
                assert torch.equal(bits(p), b)
            mean.update_parameters(model)
            scheduler.step()
        for p, q in zip(*(mean.parameters() for mean in averages), strict=True):
            assert_close(p.detach(), q.detach())
    assert_close_to(*both)
    assert not torch.equal(next(models[0].parameters()), next(averages[0].parameters()))


def test_hooks_of_a_subclass_with_a_step_of_its_own_run_once(
    cls: type[FusedOptimizer], backend: str
) -> None:
    class Own(cls):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    param = torch.nn.Parameter(torch.randn(3))
    param.grad = torch.randn(3)
    optimizer = Own([param], lr=0.1, backend=backend)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]
