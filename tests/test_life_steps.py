"""Step counts that a program keeps by itself: other shapes and dtypes, shared between processes."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import distributed, step_count
from tests.cases import BACKENDS, make_params, new_grads
from tests.helpers import assert_same, contents

KEPT = {
    "one float32": torch.zeros(1),
    "two dims float32": torch.zeros(1, 1),
    "float64": torch.zeros((), dtype=torch.float64),
    "one float64": torch.zeros(1, dtype=torch.float64),
    "int64": torch.zeros((), dtype=torch.int64),
    "one int64": torch.zeros(1, dtype=torch.int64),
    "int32": torch.zeros((), dtype=torch.int32),
    "uint32": torch.zeros((), dtype=torch.uint32),
    "int8": torch.zeros((), dtype=torch.int8),
    "bfloat16": torch.zeros((), dtype=torch.bfloat16),
    "one float16": torch.zeros(1, dtype=torch.float16),
    "float8": torch.zeros((), dtype=torch.float8_e4m3fn),
    "leaf": torch.zeros(1, dtype=torch.float64, requires_grad=True),
    "in the middle": torch.full((5,), 7, dtype=torch.int64)[2:3].zero_(),
}
SIZES: list[Any] = [5, 70, (3, 4)]


def adamw(backend: str, **options: Any) -> tuple[fusedopt.FusedAdamW, list[Parameter]]:
    params = make_params(SIZES, torch.float32)
    return fusedopt.FusedAdamW(params, lr=0.01, backend=backend, **options), params


def make_state(optimizer: fusedopt.FusedAdamW, step: Any) -> list[Any]:
    """As SharedAdam: state for each param, with a step of its own; returns the steps."""
    steps = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            own = step.detach().clone() if isinstance(step, Tensor) else step
            if isinstance(step, Tensor) and step.requires_grad:
                own.requires_grad_()
            optimizer.state[p] = {
                "step": own,
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            steps.append(own)
    return steps


def set_grads(params: list[Parameter], number: int) -> None:
    new_grads(params, torch.Generator().manual_seed(number))


def steps_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [entry["step"] for entry in optimizer.state.values()]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_count_is_written_back_into_its_tensor(
    backend: str, kind: str, clip: float | None
) -> None:
    (subject, params), (twin, twins) = (adamw(backend, max_grad_norm=clip) for _ in range(2))
    steps = make_state(subject, KEPT[kind])
    make_state(twin, torch.zeros(()))
    addresses = [s.data_ptr() for s in steps]
    for number in range(1, 4):
        set_grads(params, number)
        set_grads(twins, number)
        subject.step()
        twin.step()
        for p, q, own, address in zip(params, twins, steps, addresses, strict=True):
            assert subject.state[p]["step"] is own
            assert own.data_ptr() == address
            assert (own.dtype, own.shape) == (KEPT[kind].dtype, KEPT[kind].shape)
            assert own.float().item() == number
            assert torch.equal(p, q)
            assert torch.equal(subject.state[p]["exp_avg_sq"], twin.state[q]["exp_avg_sq"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_count_goes_on_where_float32_ends(backend: str, dtype: torch.dtype) -> None:
    optimizer, params = adamw(backend)
    plain = [Parameter(p.detach().double()) for p in params]
    oracle = torch.optim.AdamW(plain, lr=0.01, foreach=False)
    last = 2**24
    steps = make_state(optimizer, torch.tensor([last - 1], dtype=dtype))
    for p in plain:
        oracle.state[p] = {
            "step": torch.tensor(last - 1, dtype=torch.float64),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    for number in range(4):
        set_grads(params, number)
        for p, q in zip(params, plain, strict=True):
            assert p.grad is not None
            q.grad = p.grad.double()
        optimizer.step()
        oracle.step()
    assert [s.item() for s in steps] == [last + 3] * len(params)
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "last"), [(torch.bfloat16, 256), (torch.int8, 127), (torch.float16, 2048)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dtype_that_ends_hands_over_to_float32(
    backend: str, dtype: torch.dtype, last: int
) -> None:
    optimizer, params = adamw(backend)
    steps = make_state(optimizer, torch.tensor(last - 1, dtype=dtype))
    for number in range(3):
        set_grads(params, number)
        optimizer.step()
        assert [s.item() for s in steps_of(optimizer)] == [last + number] * len(params)
    assert [s.item() for s in steps] == [last] * len(params)
    assert {s.dtype for s in steps_of(optimizer)} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_becomes_a_tensor_with_the_step(backend: str) -> None:
    optimizer, params = adamw(backend)
    make_state(optimizer, 4)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert [float(s) for s in steps_of(optimizer)] == [4] * len(params)
    del optimizer.found_inf  # type: ignore[attr-defined]
    optimizer.step()
    for step in steps_of(optimizer):
        assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 5)


@pytest.mark.parametrize("how", ["found_inf", "nan", "error"])
@pytest.mark.parametrize("kind", ["one float32", "int64"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_not_done_is_not_counted(backend: str, kind: str, how: str) -> None:
    optimizer, params = adamw(backend, skip_nonfinite=how == "nan")
    steps = make_state(optimizer, KEPT[kind])
    optimizer.step()
    if how == "found_inf":
        optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    elif how == "nan":
        assert params[1].grad is not None
        params[1].grad[3] = float("nan")
    else:
        good = optimizer.state[params[-1]]["exp_avg"]
        optimizer.state[params[-1]]["exp_avg"] = torch.zeros(2)
    before = contents(optimizer)
    if how == "error":
        with pytest.raises(ValueError, match="exp_avg"):
            optimizer.step()
    else:
        optimizer.step()
    assert_same(contents(optimizer), before)
    assert [s.item() for s in steps] == [1] * len(params)
    if how == "found_inf":
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif how == "error":
        optimizer.state[params[-1]]["exp_avg"] = good
    set_grads(params, 0)
    optimizer.step()
    assert [s.item() for s in steps] == [2] * len(params)
    assert all(a is b for a, b in zip(steps, steps_of(optimizer), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_count_with_a_norm_over_ranks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda t, group: t.mul_(4))
    optimizer, params = adamw(
        backend, max_grad_norm=1.0, process_group=torch.distributed.ProcessGroup(0, 1)
    )
    steps = make_state(optimizer, torch.zeros(1, dtype=torch.int64))
    for _ in range(2):
        optimizer.step()
    assert [s.tolist() for s in steps] == [[2]] * len(params)
    assert all(a is b for a, b in zip(steps, steps_of(optimizer), strict=True))


BROKEN = {
    "two": (torch.zeros(2), TypeError),
    "none": (torch.zeros(0), TypeError),
    "negative": (torch.tensor([-1.0]), ValueError),
    "negative int64": (torch.tensor(-3), ValueError),
    "nan": (torch.tensor(float("nan"), dtype=torch.float64), ValueError),
    "nan float32": (torch.tensor([float("nan")]), ValueError),
    "infinite": (torch.tensor(float("inf"), dtype=torch.float64), ValueError),
    "bool": (torch.tensor(True), TypeError),
    "complex": (torch.tensor(1j), TypeError),
    "meta": (torch.zeros((), device="meta"), TypeError),
    "text": ("3", TypeError),
    "number": (-1, ValueError),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_count_is_refused(backend: str, kind: str) -> None:
    value, error = BROKEN[kind]
    optimizer, params = adamw(backend)
    optimizer.step()
    optimizer.state[params[1]]["step"] = value
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=r'the step of param_groups\[0\]\["params"\]\[1\]'):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert optimizer.state[params[1]]["step"] is value
    assert optimizer.state[params[0]]["step"].item() == 1


@pytest.mark.parametrize("kind", ["one float32", "int64", "one float64"])
def test_checkpoints_have_counts_that_every_torch_optimizer_takes(kind: str) -> None:
    optimizer, params = adamw("reference" if "cpu" not in BACKENDS else "cpu")
    steps = make_state(optimizer, KEPT[kind])
    optimizer.step()
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        assert (entry["step"].dtype, entry["step"].shape) == (torch.float32, ())
    assert all(a is b for a, b in zip(steps, steps_of(optimizer), strict=True))
    for flavour in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        theirs = torch.optim.AdamW([Parameter(p.detach().clone()) for p in params], **flavour)
        theirs.load_state_dict(copy.deepcopy(saved))
        for group in theirs.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        theirs.step()
        assert [float(s) for s in steps_of(theirs)] == [2] * len(params)


def test_fuse_shares_the_count() -> None:
    param = Parameter(torch.ones(3))
    source = torch.optim.Adam([param], foreach=False)
    param.grad = torch.ones(3)
    source.step()
    source.state[param]["step"] = own = torch.ones(1, dtype=torch.int64)
    fused = fusedopt.fuse(source)
    fused.step()
    assert fused.state[param]["step"] is own
    assert own.item() == 2


def _steps_in_turn(
    optimizer: fusedopt.FusedAdamW, params: list[Parameter], turn: Any, me: int, rounds: int
) -> None:
    for number in range(rounds):
        while turn.value != 2 * number + me:
            time.sleep(1e-3)
        set_grads(params, int(turn.value))
        optimizer.step()
        turn.value += 1


@pytest.mark.parametrize("kind", ["one float32", "one float64", "int64", "one int64"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cuda"])  # no GPU after a fork
def test_processes_that_share_their_state(backend: str, kind: str) -> None:
    """A3C: params and state in shared memory, each process with gradients of its own."""
    context = torch.multiprocessing.get_context("fork")
    (optimizer, params), (twin, twins) = (adamw(backend) for _ in range(2))
    make_state(optimizer, KEPT[kind])
    make_state(twin, torch.zeros(()))
    for p, entry in optimizer.state.items():
        p.share_memory_()
        for tensor in entry.values():
            tensor.share_memory_()
    turn, rounds = context.Value("i", 0), 3
    workers = [
        context.Process(target=_steps_in_turn, args=(optimizer, params, turn, me, rounds))
        for me in range(2)
    ]
    try:
        for w in workers:
            w.start()
        for w in workers:
            w.join(timeout=60)
        assert [w.exitcode for w in workers] == [0, 0]
    finally:
        for w in workers:
            if w.is_alive():
                w.kill()
    for number in range(2 * rounds):
        set_grads(twins, number)
        twin.step()
    for p, q in zip(params, twins, strict=True):
        assert optimizer.state[p]["step"].item() == 2 * rounds
        assert torch.equal(p, q)


def test_where_a_count_stays() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for value in (torch.zeros(()), torch.zeros(1, dtype=torch.int64)):
        assert step_count.stays(value, cpu)
        assert not step_count.stays(value, gpu)  # the kernels count on the device
        assert step_count.stays(value.clone().share_memory_(), gpu)
    for value in (3, None, torch.zeros(2), torch.zeros((), dtype=torch.bfloat16), torch.tensor(1j)):
        assert not step_count.stays(value, cpu)
