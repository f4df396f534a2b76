"""Steps whose blocks wait for each other, on a GPU that is busy with kernels of others. A process
of its own for each (test_gpu_busy.py), which a time limit can end.

    python -m tests.gpu_busy SCENARIO BACKEND
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fusedopt
from tests import gpu_params

NUMELS = [300, (1 << 24) + 5, 7, 40_000, 1 << 22]
STEPS = 10


def twins_of(backend: str, **options: Any) -> tuple[fusedopt.FusedAdamW, fusedopt.FusedAdamW]:
    """Two optimizers after a step each; all kernels are loaded."""
    params = gpu_params.make(NUMELS)
    ours, same = (
        fusedopt.FusedAdamW(ps, lr=1e-2, max_grad_norm=0.5, backend=backend, **options)
        for ps in (params, gpu_params.copies(params))
    )
    for optimizer in (ours, same):
        optimizer.step()
    torch.cuda.synchronize()
    return ours, same


def check(ours: fusedopt.FusedAdamW, same: fusedopt.FusedAdamW, steps: int = STEPS) -> None:
    """The steps that `ours` has taken, on a GPU of its own."""
    torch.cuda.synchronize()
    for _ in range(steps):
        same.step()
    gpu_params.assert_same(ours, same)


def sleeping_kernels(backend: str) -> None:
    """A block each on 16 streams that sleeps; a grid that fills the device waits for it."""
    ours, same = twins_of(backend)
    streams = [torch.cuda.Stream() for _ in range(16)]
    for _ in range(STEPS):
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
        ours.step()
    check(ours, same)


def huge_grids(backend: str) -> None:
    """Kernels of hundreds of thousands of blocks before, beside and after each step."""
    ours, same = twins_of(backend)
    values = torch.zeros(1 << 30, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(STEPS):
        for stream in streams:
            with torch.cuda.stream(stream):
                for part in values.chunk(4):
                    part.add_(1)
        ours.step()
    check(ours, same)
    # Of unordered additions some may be lost, but none is made twice.
    assert 0 < values.max().item() <= 3 * STEPS


def two_steps_at_once(backend: str) -> None:
    """Each wants the whole device, and neither may hold a part of it for good."""
    pairs = [twins_of(backend) for _ in range(3)]
    streams = [torch.cuda.Stream() for _ in pairs]
    for _ in range(STEPS):
        for stream, (ours, _) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                ours.step()
    for ours, same in pairs:
        check(ours, same)


def threads_of_their_own(backend: str) -> None:
    """As two_steps_at_once, from threads, with clipping in place between the steps."""
    pairs = [twins_of(backend) for _ in range(3)]
    ended: list[int] = []

    def work(index: int) -> None:
        ours = pairs[index][0]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(STEPS):
                ours.step()
                fusedopt.get_total_norm([p.grad for p in ours.param_groups[0]["params"]])
            torch.cuda.current_stream().synchronize()
        ended.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == [0, 1, 2]
    for ours, same in pairs:
        check(ours, same)


def replays_beside_steps(backend: str) -> None:
    """A captured step on one stream, eager ones of another optimizer on another."""
    captured, captured_twin = twins_of(backend, capturable=True)
    ours, same = twins_of(backend)
    captured.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(STEPS):
        with torch.cuda.stream(stream):
            graph.replay()
        with torch.cuda.stream(other):
            ours.step()
    check(captured, captured_twin, STEPS + 1)
    check(ours, same)


def collective_that_waits(backend: str) -> None:
    """As NCCL beside a step: 24 blocks of 512 threads that spin until the CPU ends them. A step
    may wait for them, or run beside them; it must end after them."""
    from tests.gpu_spin import spin

    ours, same = twins_of(backend)
    flag = torch.zeros(2, dtype=torch.int32, device="cuda")
    one = torch.ones(1, dtype=torch.int32).pin_memory()
    spinning, stepping, ending = (torch.cuda.Stream() for _ in range(3))
    flag_one = flag[:1]
    with torch.cuda.stream(spinning):  # loads the kernel
        flag_one.fill_(1)
        spin[(24,)](flag, num_warps=16)
    torch.cuda.synchronize()
    beside = 0
    for _ in range(STEPS):
        flag.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(spinning):
            spin[(24,)](flag, num_warps=16)
        done = torch.cuda.Event()
        with torch.cuda.stream(stepping):
            ours.step()
            done.record()
        time.sleep(0.05)
        beside += done.query()
        with torch.cuda.stream(ending):  # by the copy engine: no block of it waits for a place
            flag_one.copy_(one, non_blocking=True)
        torch.cuda.synchronize()
        assert flag[1].item() == 24
    print(f"{beside} of {STEPS} steps ended while the other kernel was spinning")
    check(ours, same)


def clipping_while_others_sleep(backend: str) -> None:
    """clip_grad_norm_, whose kernel has a barrier, too."""
    del backend
    params = gpu_params.make(NUMELS)
    twins = gpu_params.copies(params)
    fusedopt.clip_grad_norm_(params, 1e9)
    streams = [torch.cuda.Stream() for _ in range(16)]
    torch.cuda.synchronize()
    for i in range(STEPS):
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
        fusedopt.clip_grad_norm_(params, 1.0 / (1 + i))
    torch.cuda.synchronize()
    for i in range(STEPS):
        fusedopt.clip_grad_norm_(twins, 1.0 / (1 + i))
    grads: list[tuple[Tensor | None, Tensor | None]] = [
        (p.grad, t.grad) for p, t in zip(params, twins, strict=True)
    ]
    for a, b in grads:
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


SCENARIOS: dict[str, Callable[[str], None]] = {
    f.__name__: f
    for f in (
        sleeping_kernels,
        huge_grids,
        two_steps_at_once,
        threads_of_their_own,
        replays_beside_steps,
        collective_that_waits,
        clipping_while_others_sleep,
    )
}


if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](sys.argv[2])
    print("ended")
