"""step() in a compiled region: one graph, the same bits as in eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fusedopt

SHAPES = [(33, 65), (7,), (), (0, 3), (1030,)]


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def set_grads(step: int, *lists: list[nn.Parameter]) -> None:
    """The same gradients for each list of params."""
    for params in lists:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0, "lr": 3e-3}]


CASES: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda g: fusedopt.FusedAdamW(g),
    "adamw-clip": lambda g: fusedopt.FusedAdamW(g, max_grad_norm=1.0),
    "adamw-clip-value": lambda g: fusedopt.FusedAdamW(g, clip_grad_value=0.1),
    "adamw-amsgrad-maximize": lambda g: fusedopt.FusedAdamW(g, amsgrad=True, maximize=True),
    "adamw-reference": lambda g: fusedopt.FusedAdamW(g, backend="reference", max_grad_norm=1.0),
    "adam-l2": lambda g: fusedopt.FusedAdam(g, weight_decay=0.1),
    "sgd": lambda g: fusedopt.FusedSGD(g, lr=0.1),
    "sgd-nesterov": lambda g: fusedopt.FusedSGD(g, lr=0.1, momentum=0.9, nesterov=True),
}


def assert_same(compiled: Any, eager: Any) -> None:
    for group, other in zip(compiled.param_groups, eager.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(p, q)
            entry, expected = compiled.state.get(p, {}), eager.state.get(q, {})
            assert entry.keys() == expected.keys()
            assert all(torch.equal(entry[key], value) for key, value in expected.items())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_with_the_bits_of_eager_mode(case: str, dtype: torch.dtype) -> None:
    params, others = make_params(dtype), make_params(dtype)
    compiled, eager = CASES[case](groups_of(params)), CASES[case](groups_of(others))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.step, backend=counter, fullgraph=True)
    for i in range(4):
        set_grads(i, params, others)
        step()
        eager.step()
        assert_same(compiled, eager)
        assert hasattr(compiled, "grad_norm") == hasattr(eager, "grad_norm")
        if hasattr(eager, "grad_norm"):
            assert torch.equal(compiled.grad_norm, eager.grad_norm)
    assert counter.frame_count == 1
    ops = [n for graph in counter.graphs for n in graph.graph.nodes if "fusedopt" in str(n.target)]
    assert len(ops) == 1


def test_inductor() -> None:
    params, others = make_params(), make_params()
    compiled = fusedopt.FusedAdamW(groups_of(params), max_grad_norm=1.0)
    eager = fusedopt.FusedAdamW(groups_of(others), max_grad_norm=1.0)
    addresses = [p.data_ptr() for p in params]
    step = torch.compile(compiled.step, fullgraph=True)
    for i in range(3):
        set_grads(i, params, others)
        versions = [p._version for p in params]
        step()
        eager.step()
        assert_same(compiled, eager)
        assert all(p._version > v for p, v in zip(params, versions, strict=True))
    assert [p.data_ptr() for p in params] == addresses  # in place, no copies


def test_a_tensor_lr_gives_one_graph() -> None:
    params, others = make_params(), make_params()
    compiled = fusedopt.FusedAdamW(params, lr=torch.tensor(1e-3))
    eager = fusedopt.FusedAdamW(others, lr=torch.tensor(1e-3))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.step, backend=counter, fullgraph=True)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (compiled, eager)]
    for i in range(12):
        set_grads(i, params, others)
        step()
        eager.step()
        for scheduler in schedulers:
            scheduler.step()
        assert_same(compiled, eager)
    assert counter.frame_count == 1


def test_another_float_lr_is_used() -> None:
    params, others = make_params(), make_params()
    compiled, eager = fusedopt.FusedAdamW(params), fusedopt.FusedAdamW(others)
    step = torch.compile(compiled.step, backend="aot_eager")
    for i in range(12):  # more often than Dynamo recompiles
        set_grads(i, params, others)
        for optimizer in (compiled, eager):
            optimizer.param_groups[0]["lr"] = 1e-3 * (i + 1)
        step()
        eager.step()
        assert_same(compiled, eager)


def test_gradients_that_come_and_go() -> None:
    params, others = make_params(), make_params()
    compiled, eager = fusedopt.FusedAdamW(params), fusedopt.FusedAdamW(others)
    step = torch.compile(compiled.step, backend="aot_eager", fullgraph=True)
    for i, missing in enumerate([None, 1, 1, 0, None]):
        set_grads(i, params, others)
        if missing is not None:
            params[missing].grad = others[missing].grad = None
        step()
        eager.step()
        assert_same(compiled, eager)


def test_loaded_state_is_used() -> None:
    params, others = make_params(), make_params()
    compiled, eager = fusedopt.FusedAdamW(params), fusedopt.FusedAdamW(others)
    step = torch.compile(compiled.step, backend="aot_eager", fullgraph=True)
    saved = None
    for i in range(4):
        set_grads(i, params, others)
        step()
        eager.step()
        if i == 1:
            saved = copy.deepcopy(compiled.state_dict())
        if i == 2:
            compiled.load_state_dict(saved)
            eager.load_state_dict(saved)
        assert_same(compiled, eager)


KEPT = {
    "one float32": torch.zeros(1),
    "float64": torch.zeros((), dtype=torch.float64),
    "one int64": torch.zeros(1, dtype=torch.int64),
    "beyond float32": torch.full((), 2**24 + 5, dtype=torch.int64),
}


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KEPT)
def test_a_step_count_of_another_make_is_counted_in(kind: str, backend: str, mode: str) -> None:
    params, others = make_params(), make_params()
    compiled, eager = (fusedopt.FusedAdamW(p, backend=backend) for p in (params, others))
    steps = []
    for optimizer, owned in ((compiled, params), (eager, others)):
        for p in owned:
            own = KEPT[kind].clone()
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": own, **moments}
            steps.append(own)
    step = torch.compile(compiled.step, backend=mode, fullgraph=True)
    for i in range(3):
        set_grads(i, params, others)
        step()
        eager.step()
        assert_same(compiled, eager)
    assert all(own.item() == KEPT[kind].item() + 3 for own in steps)
    kept = [o.state[p]["step"] for o, ps in ((compiled, params), (eager, others)) for p in ps]
    assert all(a is b for a, b in zip(kept, steps, strict=True))


def test_a_step_count_that_cannot_stay_is_replaced() -> None:
    value = torch.full((1,), 255, dtype=torch.bfloat16)
    params, others = make_params(), make_params()
    compiled, eager = fusedopt.FusedAdamW(params), fusedopt.FusedAdamW(others)
    for optimizer, owned in ((compiled, params), (eager, others)):
        for p in owned:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": value.clone(), **moments}
    step = torch.compile(compiled.step, backend="aot_eager", fullgraph=True)
    for i in range(4):
        set_grads(i, params, others)
        step()
        eager.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q)
            assert compiled.state[p]["step"].item() == float(value) + i + 1
            assert eager.state[q]["step"].item() == float(value) + i + 1


def test_first_touch_of_dampened_momentum() -> None:
    params, others = make_params(), make_params()
    compiled = fusedopt.FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    eager = fusedopt.FusedSGD(others, lr=0.1, momentum=0.9, dampening=0.5)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.step, backend=counter)
    for i in range(4):
        set_grads(i, params, others)
        step()
        eager.step()
        assert_same(compiled, eager)
    assert counter.frame_count == 1  # from the second step on


def test_eager_steps_between_compiled_ones() -> None:
    params, others = make_params(), make_params()
    mixed, eager = fusedopt.FusedAdamW(params), fusedopt.FusedAdamW(others)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixed.step, backend=counter)
    for i, step in enumerate((compiled, mixed.step, mixed.step, compiled, mixed.step, compiled)):
        set_grads(i, params, others)
        step()
        eager.step()
        assert_same(mixed, eager)
    assert counter.frame_count == 1  # what an eager step leaves behind is not guarded


def test_skipped_steps() -> None:
    params = make_params()
    optimizer = fusedopt.FusedAdamW(params, skip_nonfinite=True)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    set_grads(0, params)
    step()
    before = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    params[0].grad[3, 4] = float("nan")
    step()
    assert int(optimizer.skipped_steps) == 1
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    after = optimizer.state_dict()
    assert all(
        torch.equal(after["state"][i][key], value)
        for i, entry in before["state"].items()
        for key, value in entry.items()
    )


def test_a_training_step_as_one_function() -> None:
    def run(compile_it: bool) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = fusedopt.FusedAdamW(model.parameters(), lr=1e-2, max_grad_norm=0.1)

        def train_step(x: Tensor, y: Tensor) -> Tensor:
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        function = torch.compile(train_step, backend="aot_eager") if compile_it else train_step
        losses = []
        for i in range(5):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(i))
            losses.append(float(function(x, x.sum(1, keepdim=True))))
        return losses, model

    (losses, model), (expected, other) = run(True), run(False)
    assert losses == pytest.approx(expected, rel=1e-6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_hooks_and_closures_run() -> None:
    params = make_params()
    optimizer = fusedopt.FusedAdamW(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    step = torch.compile(optimizer.step, backend="aot_eager")
    set_grads(0, params)
    step()
    assert calls == ["pre", "post"]


def test_under_a_grad_scaler() -> None:
    """GradScaler sets grad_scale and found_inf, and deletes them: the compiled step sees both."""
    results = []
    for compile_it in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        optimizer = fusedopt.FusedAdamW(model.parameters(), lr=1e-2, max_grad_norm=0.1)
        if compile_it:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=100)
        for i in range(5):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
            factor = 1e36 if i in (0, 3) else 1.0
            scaler.scale((model(x) * factor).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert int(optimizer.skipped_steps) == 2
        results.append(([p.detach().clone() for p in model.parameters()], scaler.get_scale()))
    (ours, scale), (eager, other_scale) = results
    assert scale == other_scale
    assert all(torch.equal(p, q) for p, q in zip(ours, eager, strict=True))


def op_arguments(optimizer: fusedopt.FusedAdamW) -> dict[str, Any]:
    from fusedopt import compiled

    lists: tuple[list[Tensor], ...] = ([], [], [], [])
    assert compiled.init_group(optimizer, optimizer.param_groups[0], *lists)
    return {
        "optimizer": compiled.handle_of(optimizer),
        "params": lists[0],
        "grads": lists[1],
        "states": lists[2],
        "steps": lists[3],
        "group_of": [0] * len(lists[0]),
        "maximize": [False],
        "hyper": [0.0, 0.9, 0.999, 1e-8, 0.01, 0.0, 1.0],
        "hyper_tensors": [torch.tensor(1e-3)],
        "hyper_tensors_at": [0],
        "max_grad_norm": 1.0,
        "clip_grad_value": None,
        "skip_nonfinite": True,
        "grad_scale": None,
        "found_inf": None,
        "grad_norm": torch.zeros(()),
        "skipped_steps": torch.zeros((), dtype=torch.int64),
    }


def test_opcheck() -> None:
    from fusedopt.compiled import step_

    params = [p.detach() for p in make_params()]
    set_grads(0, params)  # type: ignore[arg-type]
    optimizer = fusedopt.FusedAdamW(params)
    torch.library.opcheck(step_, (), op_arguments(optimizer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": 10**6}, "no optimizer with the handle"),
        ({"grads": []}, "must be equally long"),
        ({"group_of": [0, 0, 0, 0, 1]}, "below the number of groups"),
        ({"states": []}, "states and steps must have 10 and 5 tensors, got 0 and 5"),
        ({"steps": []}, "states and steps must have 10 and 5 tensors, got 10 and 0"),
    ],
)
def test_wrong_arguments_of_the_op(change: dict[str, Any], message: str) -> None:
    from fusedopt.compiled import step_

    params = make_params()
    set_grads(0, params)
    optimizer = fusedopt.FusedAdamW(params)
    arguments = {**op_arguments(optimizer), **change}
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        step_(**arguments)
