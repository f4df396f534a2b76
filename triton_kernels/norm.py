"""The squared norm of all gradients, and the barrier that the whole grid waits at for it."""

from __future__ import annotations

import triton
import triton.language as tl
from fusedopt.triton_kernels.table import (
    GRAD,
    bytes_of,
    dtype_of,
    find_chunk,
    gradient_kinds,
    gradient_mask,
    is_strided,
    kind_of,
    layout_of,
    strided_offsets,
)

# 64-bit words of the workspace, zeros at first. The two counters are 0 between launches.
ARRIVED = tl.constexpr(0)  # programs at the barrier
FINISHED = tl.constexpr(1)  # programs that have ended
SKIPPED = tl.constexpr(2)  # whether the last step was
SQUARED = tl.constexpr(3)  # float64: takes the squared norm between two launches
PARTIALS = tl.constexpr(4)  # float64: each program's share of the squared norm
MAX_PROGRAMS = tl.constexpr(4096)
WORKSPACE_WORDS = 4 + 4096


@triton.jit
def _add_dense(sums, grad, begin, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    G: tl.constexpr = tl.pointer_type(dtype_of(KIND, GRAD))
    address = grad + begin * bytes_of(KIND, GRAD)
    lanes = tl.arange(0, BLOCK)
    full = tl.where((address & 15) == 0, count // BLOCK * BLOCK, 0)
    for start in tl.range(0, full, BLOCK, loop_unroll_factor=4):
        x = tl.load(tl.multiple_of(address.to(G), 16) + start + lanes).to(tl.float64)
        sums += x * x
    for start in range(full, count, BLOCK):
        i = start + lanes
        x = tl.load(address.to(G) + i, mask=i < count, other=0.0).to(tl.float64)
        sums += x * x
    return sums


@triton.jit
def _add_strided(sums, grad, layout, begin, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    pointer = grad.to(tl.pointer_type(dtype_of(KIND, GRAD)))
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = strided_offsets(layout, begin + i, 0)
        x = tl.load(pointer + at[1], mask=i < count, other=0.0).to(tl.float64)
        sums += x * x
    return sums


@triton.jit
def program_squares(
    rows,
    layouts,
    chunks,
    words,
    chunk_count,
    KINDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's share of the squared norm: every num_programs-th chunk. In float64: exact
    squares of every 16- and 32-bit value, no overflow."""
    GRADIENTS: tl.constexpr = gradient_kinds(KINDS)
    sums = tl.zeros([BLOCK], tl.float64)
    for c in range(tl.program_id(0), chunk_count, tl.num_programs(0)):
        row, grad, begin, count = find_chunk(rows, chunks, words, c, CHUNK)
        kind = kind_of(row) & gradient_mask()
        for k in tl.static_range(len(GRADIENTS)):
            if kind == GRADIENTS[k]:
                if is_strided(GRADIENTS[k]):
                    layout = layout_of(layouts, row)
                    sums = _add_strided(sums, grad, layout, begin, count, GRADIENTS[k], BLOCK)
                else:
                    sums = _add_dense(sums, grad, begin, count, GRADIENTS[k], BLOCK)
    return tl.sum(sums)


@triton.jit
def store_partial(workspace, value):
    slot = workspace + (tl.program_id(0) + PARTIALS).to(tl.int64) * 8
    tl.store(slot.to(tl.pointer_type(tl.float64)), value)


@triton.jit
def sum_of_partials(workspace):
    """In the same order on each run: deterministic for a size of the grid."""
    i = tl.arange(0, MAX_PROGRAMS)
    partials = (workspace + 8 * PARTIALS).to(tl.pointer_type(tl.float64))
    # Written by other programs: not from this multiprocessor's cache.
    values = tl.load(partials + i, mask=i < tl.num_programs(0), other=0.0, cache_modifier=".cg")
    return tl.sum(values)


@triton.jit
def arrive(workspace, COUNTER: tl.constexpr):
    """Counts this program; what it has written before is seen by programs that count later.
    Returns how many have come before it."""
    tl.debug_barrier()
    counter = (workspace + 8 * COUNTER).to(tl.pointer_type(tl.int32))
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def grid_barrier(workspace):
    """Waits for all programs of a cooperative launch."""
    arrive(workspace, ARRIVED)
    counter = (workspace + 8 * ARRIVED).to(tl.pointer_type(tl.int32))
    while tl.atomic_add(counter, 0, sem="acquire") < tl.num_programs(0):
        pass
    tl.debug_barrier()
