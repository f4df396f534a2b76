"""The threads of a step: they compute in their caller's floating-point mode, and a forked child has
none of them."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fusedopt
from tests.cases import make_params
from tests.helpers import bits

NUMEL = 1_500_003  # 23 tasks
SMALL = 1e-39  # a subnormal float32


@pytest.fixture(autouse=True)
def _several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    # The threads are there, and know of no mode: those of torch's OpenMP and of ours, which may be
    # another.
    fusedopt.get_total_norm([torch.ones(NUMEL).mul(2)])
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush subnormal numbers here")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def rounding_up() -> Iterator[None]:
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    up = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())
    if up is None:
        pytest.skip("FE_UPWARD is not known here")
    assert libm.fesetround(up) == 0
    try:
        yield
    finally:
        libm.fesetround(0)


MODES = {"flush": flushing, "upward": rounding_up}


def results(threads: int, mode: str) -> list[Tensor]:
    """What each native entry computes of small values, with the caller in a mode."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(NUMEL, generator=generator) * SMALL
    params = [torch.nn.Parameter(values.clone()) for _ in range(2)]
    for p in params:
        p.grad = values * 3
    plain = fusedopt.FusedSGD(params, lr=0.3, momentum=0.9, backend="cpu")
    clipped = fusedopt.FusedAdamW(params, lr=1e-40, max_grad_norm=1e-36, backend="cpu")
    double = torch.randn(NUMEL, generator=generator, dtype=torch.float64)
    with MODES[mode]():
        plain.step()
        clipped.step()
        norm = fusedopt.get_total_norm([double, values.double() * 1e-275])
        fusedopt.clip_grad_norm_(params, 3e-7)  # by 0.3: 1e-6 outweighs the norm
        fusedopt.clip_grad_value_(params, 2e-39)
    out = [p.detach() for p in params] + [p.grad for p in params if p.grad is not None]
    for optimizer in (plain, clipped):
        for entry in optimizer.state.values():
            out += [entry[k] for k in sorted(entry)]
    assert clipped.grad_norm is not None
    return [*out, clipped.grad_norm.clone(), norm]


@pytest.mark.parametrize("mode", MODES)
def test_threads_take_the_mode_of_their_caller(mode: str) -> None:
    expected = results(1, mode)
    for _ in range(3):
        for a, b in zip(results(4, mode), expected, strict=True):
            assert torch.equal(bits(a), bits(b))


def test_a_flushed_step_leaves_no_subnormal_number() -> None:
    params = make_params([NUMEL], torch.float32)
    grad = torch.full((NUMEL,), SMALL)
    with torch.no_grad():
        params[0].copy_(grad)
    params[0].grad = grad
    optimizer = fusedopt.FusedSGD(params, lr=0.5, momentum=0.5, backend="cpu")
    optimizer.step()
    assert (optimizer.state[params[0]]["momentum_buffer"] != 0).all()
    with flushing():
        optimizer.step()
    assert (bits(optimizer.state[params[0]]["momentum_buffer"]) == 0).all()
    assert (bits(params[0]) == 0).all()


@pytest.mark.parametrize("entry", ["step", "norm", "clip"])
def test_threads_get_their_own_mode_back(entry: str) -> None:
    params = make_params([NUMEL], torch.float32)
    optimizer = fusedopt.FusedSGD(params, lr=0.5, backend="cpu")
    small = torch.full((NUMEL,), SMALL)
    for _ in range(5):
        with flushing():
            if entry == "step":
                optimizer.step()
            elif entry == "norm":
                fusedopt.get_total_norm([params[0].detach()])
            else:
                fusedopt.clip_grad_norm_(params, 0.5)
        assert (small * 0.5 != 0).all()  # by the same threads


# Forked children run in a process of their own, which is stopped where they hang.

FORKED = """
import os, sys, threading
import torch, fusedopt

generator = torch.Generator().manual_seed(0)
values = [torch.randn(2, n, generator=generator) for n in (300_000, 7, 200_000)]

def params():  # by torch's ops of one thread alone: a child has no other
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = [torch.nn.Parameter(v[0].clone()) for v in values]
    for p, v in zip(made, values):
        p.grad = v[1].clone()
    torch.set_num_threads(threads)
    return made

def new(cls=fusedopt.FusedAdamW, **options):
    return cls(params(), lr=0.01, backend={backend!r}, **options)

def sums(optimizer):
    return [p.double().sum().item() for g in optimizer.param_groups for p in g["params"]]

torch.set_num_threads(4)
{body}
"""

# What a child does; it must get the numbers that the parent gets for the same. The parent's threads
# are in use before the fork; a child that hangs is killed after 10 s.
FORKING = """
import signal, time
from fusedopt import distributed

distributed.all_reduce_sum = lambda t, group: None
sparse = torch.sparse_coo_tensor([[1, 5]], [1.0, 2.0], (300_000,))
used = new()

def head(made):
    return [p[:7].tolist() for p in made]

def step():
    used.step()
    return head(used.param_groups[0]["params"])

def first_steps(cls=fusedopt.FusedAdamW, **options):
    optimizer = new(cls, **options)
    optimizer.step()
    optimizer.step()
    norm = getattr(optimizer, "grad_norm", None)
    return head(optimizer.param_groups[0]["params"]), None if norm is None else norm.item()

def densified():
    optimizer = new(fusedopt.FusedSGD, momentum=0.9)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"] = sparse
    optimizer.step()
    return head(optimizer.param_groups[0]["params"])

def clip_norm():
    made = params()
    return fusedopt.clip_grad_norm_(made, 0.1).item(), head([p.grad for p in made])

def clip_other_norm():
    made = params()
    return round(fusedopt.clip_grad_norm_(made, 0.1, norm_type=1.0).item(), -2)

def clip_value():
    made = params()
    fusedopt.clip_grad_value_(made, 0.1)
    return head([p.grad for p in made])

a_group = torch.distributed.ProcessGroup(0, 1)
deeds = {
    "step": step,
    "first steps": first_steps,
    "clipping": lambda: first_steps(max_grad_norm=0.1),
    "momentum": lambda: first_steps(fusedopt.FusedSGD, momentum=0.9, skip_nonfinite=True),
    "norm over ranks": lambda: first_steps(max_grad_norm=0.1, process_group=a_group),
    "sparse momentum": densified,
    "clip_grad_norm_": clip_norm,
    "another norm": clip_other_norm,
    "clip_grad_value_": clip_value,
    "get_total_norm": lambda: fusedopt.get_total_norm([p.grad for p in params()]).item(),
}

def run_forked(name, deed):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        result = deed()
        assert torch.get_num_threads() == 4
        os.write(write, repr(result).encode())
        os._exit(0)
    deadline = time.time() + 10
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.time() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.01)
    got, expected = os.read(read, 1 << 16).decode(), repr(deed())
    return "" if status == 0 and got == expected else f"{status}: {got} instead of {expected}"

used.step()
torch.ones(2_000_000).mul(2)
faults = {name: fault for name, deed in deeds.items() if (fault := run_forked(name, deed))}
if threading.active_count() == 1:  # and forked by another thread than the one that steps
    helper = threading.Thread(target=lambda: [used.step() for _ in range(3)])
    helper.start()
    helper.join()
    if fault := run_forked("after a thread", step):
        faults["after a thread"] = fault
assert not faults, faults
"""

WORKERS = """
import torch.multiprocessing as mp

def work(seed):
    optimizer = new(max_grad_norm=0.5)
    optimizer.step()
    optimizer.step()
    return optimizer.grad_norm.item()

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return work(i)

torch.ones(2_000_000).mul(2)
expected = work(0)
with mp.get_context("fork").Pool(2) as pool:
    got = pool.map_async(work, range(4)).get(timeout=40)
loader = torch.utils.data.DataLoader(
    Data(), num_workers=2, timeout=40, multiprocessing_context="fork", batch_size=None
)
got += list(loader)
assert len(got) == 8 and all(abs(g - expected) < 1e-6 * expected for g in got), (got, expected)
assert torch.get_num_threads() == 4
"""

PARENT = """
used = new()
pid = os.fork()
if pid == 0:
    used.step()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
before = len(os.listdir("/proc/self/task"))
used.step()
assert len(os.listdir("/proc/self/task")) >= before + 3, "the step took no threads"
"""


def run(body: str, backend: str = "cpu") -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED.format(body=body, backend=backend)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@forks
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_forked_child_works_on_one_thread(backend: str) -> None:
    run(FORKING, backend)


@forks
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_multiprocessing_and_data_loader_workers(backend: str) -> None:
    run(WORKERS, backend)


@forks
def test_the_parent_keeps_its_threads() -> None:
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted through /proc")
    run(PARENT)
