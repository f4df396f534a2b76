"""Promises 11 to 14 and 16: where the elements lie must not matter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fusedopt
from tests.cases import (
    BACKENDS,
    CASES,
    DTYPES,
    EXAMPLES,
    MANY,
    NATIVE,
    SHORT,
    Case,
    check_against_oracle,
    make_params,
    new_grads,
    signed,
)


def strided(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A view with the shape and values of a 2-D or 4-D tensor in some layout, and the whole memory
    that it lies in."""
    fill = torch.full((values.numel() * 8 + 64,), 7.0, dtype=values.dtype)
    shape = values.shape
    if layout == "transposed":
        view = (
            fill[: values.numel()]
            .view(tuple(reversed(shape)))
            .permute(*reversed(range(values.ndim)))
        )
    elif layout == "gaps":
        doubled = (*shape[:-1], shape[-1] * 2)
        view = fill[: values.numel() * 2].view(doubled)[..., ::2]
    elif layout == "outer-gaps":
        doubled = (shape[0] * 2, *shape[1:])
        view = fill[3 : 3 + values.numel() * 2].view(doubled)[::2]
    elif layout == "channels_last":
        view = fill[: values.numel()].view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    else:
        view = fill[: values.numel()].view(shape)
    view.copy_(values)
    return view, fill


LAYOUTS = ["contiguous", "transposed", "gaps", "outer-gaps", "channels_last"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_every_layout_of_param_and_gradient(
    case: Case, param_layout: str, grad_layout: str, backend: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (6, 5, 7, 9)
    for dtype in (torch.float32, torch.bfloat16):
        params, memory = [], []
        for _ in range(2):
            view, whole = strided(signed(shape, generator).to(dtype), param_layout)
            params.append(torch.nn.Parameter(view))
            memory.append(whole)
        optimizer = case.fused(params, backend=backend, **case.options)
        for _ in range(2):
            new_grads(params, generator)
            for p in params:
                assert p.grad is not None
                p.grad = strided(p.grad, grad_layout)[0]
            touched = [
                torch.as_strided(m, p.shape, p.stride(), p.storage_offset())
                for m, p in zip(memory, params, strict=True)
            ]
            outside = [m.clone() for m in memory]
            check_against_oracle(case, optimizer, params)
            for m, p, before, view in zip(memory, params, outside, touched, strict=True):
                assert view.data_ptr() == p.data_ptr()
                after = m.clone()
                for tensor in (after, before):
                    torch.as_strided(tensor, p.shape, p.stride(), p.storage_offset()).zero_()
                assert torch.equal(after, before), "memory between the elements was written"


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_storage_offsets_of_param_gradient_and_state(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    params, memory = [], []
    generator = torch.Generator().manual_seed(0)
    for offset in range(1, 17):
        base = torch.full((130 + offset + 5,), 3.0, dtype=dtype)
        base[offset : offset + 130] = signed((130,), generator).to(dtype)
        memory.append((base, offset))
        params.append(torch.nn.Parameter(base[offset : offset + 130]))
    optimizer = case.fused(params, backend=backend, **case.options)
    new_grads(params, generator)
    optimizer.step()
    for i, p in enumerate(params):
        for name in case.fused.rule.state:
            if name in optimizer.state[p]:
                state = torch.full((160,), 5.0, dtype=dtype)
                at = (i * 7) % 16 + 1
                state[at : at + 130] = optimizer.state[p][name]
                optimizer.state[p][name] = state[at : at + 130]
                memory.append((state, at))
    new_grads(params, generator)
    for i, p in enumerate(params):
        assert p.grad is not None
        grad = torch.zeros(160, dtype=dtype)
        at = (i * 5) % 16 + 1
        grad[at : at + 130] = p.grad
        p.grad = grad[at : at + 130]
    check_against_oracle(case, optimizer, params)
    for base, offset in memory:
        filler = 5.0 if base.numel() == 160 else 3.0
        assert (base[:offset] == filler).all()
        assert (base[offset + 130 :] == filler).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_expanded_gradient_and_size_one_dims(case: Case, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.rand(4, 1, 6, generator=generator))
    odd = torch.as_strided(torch.rand(64, generator=generator), (4, 1, 6), (6, 37, 1))
    twin = torch.nn.Parameter(odd)
    one = torch.nn.Parameter(torch.as_strided(torch.rand(8, generator=generator), (1,), (5,)))
    optimizer = case.fused([param, twin, one], backend=backend, **case.options)
    for _ in range(2):
        param.grad = torch.rand(6, generator=generator).expand(4, 1, 6)
        twin.grad = torch.rand(4, 1, 1, generator=generator).expand(4, 1, 6)
        one.grad = torch.rand(1, generator=generator)
        check_against_oracle(case, optimizer, [param, twin, one])


@pytest.mark.parametrize("shape", [(), (1,), (4, 3)])
def test_negated_gradients_without_gaps(shape: tuple[int, ...], tensor_access: str) -> None:
    values = torch.rand(shape, dtype=torch.complex64)
    for grad in (torch._neg_view(torch.rand(shape)), values.conj().imag):
        assert grad.is_neg()
        param = torch.nn.Parameter(torch.zeros(shape))
        param.grad = grad
        fusedopt.FusedSGD([param], lr=1.0, backend="cpu").step()
        assert torch.equal(param, -grad.resolve_neg())


@pytest.mark.parametrize("backend", NATIVE)
def test_lazily_negated_and_conjugated_gradients(backend: str) -> None:
    real = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(2)]
    values = torch.randn(5, 3, dtype=torch.complex64)
    real[0].grad = values.conj().imag  # a view with the negative bit
    assert real[0].grad.is_neg()
    real[1].grad = real[0].grad.resolve_neg().clone()
    whole = [torch.nn.Parameter(torch.randn(5, 3, dtype=torch.complex64)) for _ in range(2)]
    whole[0].grad = values.conj()
    whole[1].grad = values.conj().resolve_conj()
    for pair in (real, whole):
        with torch.no_grad():
            pair[1].copy_(pair[0])
        for p in pair:
            fusedopt.FusedAdamW([p], lr=0.1, backend=backend).step()
        assert torch.equal(pair[0], pair[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_complex_params_as_torch(case: Case, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 3, dtype=torch.complex64, generator=generator)
    ours, theirs = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.clone())
    options = {k: v for k, v in case.options.items() if k != "amsgrad"}
    subject = case.fused([ours], backend=backend, **options)
    plain = case.plain([theirs], foreach=False, **options)
    for _ in range(3):
        grad = torch.randn(40, 3, dtype=torch.complex64, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        subject.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_empty_tensors_anywhere(case: Case, backend: str) -> None:
    shapes: list[Any] = [0, (3, 0), 17, (), 0, (0, 5), 4, 0]
    params = make_params(shapes, torch.float32)
    groups = [
        {"params": params[:4]},
        {"params": []},
        {"params": params[4:]},
    ]
    optimizer = case.fused(groups, backend=backend, max_grad_norm=1e9, **case.options)
    for _ in range(2):
        check_against_oracle(case, optimizer, params)


@pytest.mark.parametrize("backend", NATIVE)
def test_many_tiny_tensors_with_empties(backend: str) -> None:
    sizes = [0 if i % 7 == 0 else 1 + (i * 37) % 50 for i in range(MANY // 10)]
    params = make_params(sizes, torch.float32)
    optimizer = fusedopt.FusedAdamW(params, lr=0.01, backend=backend)
    check_against_oracle(CASES[0], optimizer, params)


@pytest.mark.parametrize("backend", NATIVE)
def test_many_tensors_equal_one(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    whole, grad = (torch.randn(MANY, 13, generator=generator) for _ in range(2))
    one = torch.nn.Parameter(whole.clone())
    one.grad = grad.clone()
    many = [torch.nn.Parameter(row.clone()) for row in whole]
    for p, g in zip(many, grad, strict=True):
        p.grad = g.clone()
    for params in ([one], many):
        optimizer = fusedopt.FusedAdamW(params, lr=0.01, max_grad_norm=1e9, backend=backend)
        optimizer.step()
        assert optimizer.grad_norm is not None
        torch.testing.assert_close(optimizer.grad_norm, grad.norm(), rtol=1e-6, atol=0)
    assert torch.equal(torch.stack([p.detach() for p in many]), one.detach())


# Shapes, strides, dtypes and groups that nobody thought of.
@st.composite
def models(draw: st.DrawFn) -> list[list[tuple[tuple[int, ...], torch.dtype, list[int], bool]]]:
    tensor = st.tuples(
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
        st.sampled_from(DTYPES),
        st.permutations(range(4)),
        st.booleans(),
    )
    return draw(st.lists(st.lists(tensor, max_size=6), min_size=1, max_size=4))


def permuted(values: Tensor, order: list[int], gaps: bool) -> Tensor:
    order = [d for d in order if d < values.ndim]
    memory = torch.empty([values.shape[d] * (2 if gaps else 1) for d in order], dtype=values.dtype)
    if gaps:
        memory = memory[tuple(slice(None, None, 2) for _ in order)]
    inverse = [order.index(d) for d in range(values.ndim)]
    return memory.permute(inverse).copy_(values)


@pytest.mark.parametrize("backend", NATIVE)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models(), st.sampled_from(SHORT), st.randoms(use_true_random=False))
def test_any_model_matches_the_oracle(backend: str, model: Any, case: Case, random: Any) -> None:
    generator = torch.Generator().manual_seed(random.getrandbits(30))
    groups = []
    for tensors in model:
        params = []
        for shape, dtype, order, gaps in tensors:
            (p,) = make_params([shape], dtype, seed=random.getrandbits(30))
            params.append(torch.nn.Parameter(permuted(p.detach(), order, gaps)))
        groups.append({"params": params, "lr": random.uniform(0, 0.1)})
    flat = [p for g in groups for p in g["params"]]
    optimizer = case.fused(groups, backend=backend, **case.options)
    for _ in range(2):
        new_grads(flat, generator)
        for p in flat:
            order = list(range(p.ndim))
            random.shuffle(order)
            assert p.grad is not None
            p.grad = permuted(p.grad, order, random.random() < 0.5)
        check_against_oracle(case, optimizer, flat)


# In a process of its own, where nothing else moves the peak.
MEMORY_SCRIPT = """
import resource, torch, fusedopt
params = [torch.nn.Parameter(torch.randn(4_000_000)) for _ in range(6)]
for p in params:
    p.grad = torch.randn_like(p)
optimizer = fusedopt.FusedAdamW(params, max_grad_norm=1.0)
for _ in range({warm}):
    optimizer.step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(3):
    optimizer.step()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / sum(p.numel() * 4 for p in params))
"""


def test_peak_memory_of_a_step() -> None:
    # The first step makes the state; what later steps add at their peak is the step's own.
    script = MEMORY_SCRIPT.format(warm=1)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) < 0.01


def available_memory() -> int:
    """Bytes that a process can still take, 0 where the system does not say."""
    lines = Path("/proc/meminfo").read_text().splitlines() if os.name == "posix" else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("numel", [2**31 + 1, 2**32 + 1])
def test_more_elements_than_32_bits_can_count(numel: int, backend: str) -> None:
    if numel > 2**32 and "FUSEDOPT_TEST_HUGE" not in os.environ:
        pytest.skip("takes minutes; set FUSEDOPT_TEST_HUGE=1 to run it")
    if available_memory() < 2 * 2 * numel + 3e9:
        pytest.skip(f"needs {(4 * numel + 3e9) / 1e9:.0f} GB of memory")
    pattern = torch.randn(1_000_003).bfloat16()  # no power of two: no two chunks alike
    grad = torch.empty(numel, dtype=torch.bfloat16)
    for begin in range(0, numel, pattern.numel()):
        grad[begin : begin + pattern.numel()] = pattern[: numel - begin]
    param = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16))
    param.grad = grad
    fusedopt.FusedSGD([param], lr=1.0, backend=backend).step()
    for new, old in zip(param.detach().split(2**28), grad.split(2**28), strict=True):
        assert torch.equal(new, -old)


@pytest.mark.parametrize("backend", NATIVE)
def test_an_expanded_param_is_refused(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(1).expand(4))
    param.grad = torch.ones(4)
    optimizer = fusedopt.FusedAdamW([param], backend=backend)
    with pytest.raises(RuntimeError, match=r'param_groups\[0\]\["params"\]\[0\] is expanded'):
        optimizer.step()
    assert not optimizer.state
