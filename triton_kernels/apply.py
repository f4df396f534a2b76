"""The kernel of a step: all tensors of all param groups in one launch.

A persistent grid walks the chunks of all rows. With a norm it walks them twice: pass 1 sums the
squares; a grid barrier; every program derives clip_coef from the partial sums, in the same order;
pass 2 updates, backwards, so that the gradients that were read last are still in the L2 cache. The
last program to end advances the step counts and writes the figures. Nothing of a step needs the
host. Bytes per element are those of docs/cpu.md: 28 for AdamW in float32, 32 with a norm.

Where programs cannot wait for each other (the interpreter runs one after the other), the same code
is launched twice: with NORM alone, then with APPLY alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fusedopt.triton_kernels.norm import (
    ARRIVED,
    FINISHED,
    SKIPPED,
    arrive,
    grid_barrier,
    program_squares,
    store_partial,
    sum_of_partials,
)
from fusedopt.triton_kernels.table import (
    FLAGS,
    GROUP_WORDS,
    KIND,
    LR,
    PLACE,
    ROW_WORDS,
    STEP,
    bytes_of,
    dtype_of,
    find_chunk,
    is_strided,
    kind_of,
    layout_of,
    load_scalar,
    maths_of,
    number,
    states_of,
    strided_offsets,
    variant_of,
    word,
)


@triton.jit
def _load(pointer, mask, T: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0).to(T)
    else:  # noqa: RET505  what follows a return is compiled, too
        return tl.load(pointer).to(T)


@triton.jit
def _round_to_odd(x):
    """float64 to float32 such that a second rounding, to 16 bits, cannot tip a tie."""
    nearest = x.to(tl.float32)
    back = nearest.to(tl.float64)
    bits = nearest.to(tl.int32, bitcast=True)
    exact = (back == x) | (x != x) | ((bits & 0x7F800000) == 0x7F800000)
    odd = tl.where(tl.abs(back) > tl.abs(x), bits - 1, bits + 1)
    keep = exact | ((bits & 1) != 0)
    return tl.where(keep, bits, odd).to(tl.float32, bitcast=True)


@triton.jit
def _narrowed(value, DTYPE: tl.constexpr):
    if value.dtype == tl.float64 and DTYPE.primitive_bitwidth == 16:
        return _round_to_odd(value).to(DTYPE)
    else:  # noqa: RET505  what follows a return is compiled, too
        return value.to(DTYPE)


@triton.jit
def _store(pointer, value, mask, MASKED: tl.constexpr):
    narrowed = _narrowed(value, pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer, narrowed, mask=mask)
    else:
        tl.store(pointer, narrowed)


@triton.jit
def _update_block(
    param,
    grad,
    state0,
    state1,
    state2,
    mask,
    scalars,
    factor,
    limit,
    UPDATE: tl.constexpr,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load, transform the gradient, rule, store: blocks of pointers to each operand."""
    T: tl.constexpr = maths_of(KIND)
    STATES: tl.constexpr = states_of(KIND)
    p = _load(param, mask, T, MASKED)
    g = _load(grad, mask, T, MASKED)
    s0 = _load(state0, mask, T, MASKED) if STATES > 0 else tl.zeros_like(p)
    s1 = _load(state1, mask, T, MASKED) if STATES > 1 else tl.zeros_like(p)
    s2 = _load(state2, mask, T, MASKED) if STATES > 2 else tl.zeros_like(p)
    bound = limit.to(T)
    g = g * factor.to(T)
    g = tl.where(g > bound, bound, tl.where(g < -bound, -bound, g))  # a NaN stays
    p, s0, s1, s2 = UPDATE(p, g, s0, s1, s2, scalars, variant_of(KIND))
    _store(param, p, mask, MASKED)
    if STATES > 0:
        _store(state0, s0, mask, MASKED)
    if STATES > 1:
        _store(state1, s1, mask, MASKED)
    if STATES > 2:
        _store(state2, s2, mask, MASKED)


@triton.constexpr_function
def _operand(index, kind):
    """The operand itself, or the param in place of a state that is not in use."""
    return index if index < 2 + states_of(kind) else 0


@triton.constexpr_function
def _type(index, kind):
    return tl.pointer_type(dtype_of(kind, _operand(index, kind)))


@triton.jit
def _address(row, begin, INDEX: tl.constexpr, KIND: tl.constexpr):
    """Of element `begin` of the param or a state."""
    return word(row, _operand(INDEX, KIND)) + begin * bytes_of(KIND, _operand(INDEX, KIND))


@triton.jit
def _update_dense(
    row,
    grad,
    begin,
    count,
    scalars,
    factor,
    limit,
    UPDATE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    P: tl.constexpr = _type(0, KIND)
    G: tl.constexpr = _type(1, KIND)
    S0: tl.constexpr = _type(2, KIND)
    S1: tl.constexpr = _type(3, KIND)
    S2: tl.constexpr = _type(4, KIND)
    p = _address(row, begin, 0, KIND)
    g = grad + begin * bytes_of(KIND, 1)
    s0 = _address(row, begin, 2, KIND)
    s1 = _address(row, begin, 3, KIND)
    s2 = _address(row, begin, 4, KIND)
    aligned = ((p | g | s0 | s1 | s2) & 15) == 0
    lanes = tl.arange(0, BLOCK)
    # Full blocks of aligned operands: no mask, and 16 bytes an access. The hint stands where the
    # pointer is made: it would be lost on the way out of a function.
    full = tl.where(aligned, count // BLOCK * BLOCK, 0)
    for start in range(0, full, BLOCK):
        i = start + lanes
        _update_block(
            tl.multiple_of(p.to(P), 16) + i,
            tl.multiple_of(g.to(G), 16) + i,
            tl.multiple_of(s0.to(S0), 16) + i,
            tl.multiple_of(s1.to(S1), 16) + i,
            tl.multiple_of(s2.to(S2), 16) + i,
            i < count,
            scalars,
            factor,
            limit,
            UPDATE,
            KIND,
            False,
        )
    for start in range(full, count, BLOCK):
        i = start + lanes
        _update_block(
            p.to(P) + i,
            g.to(G) + i,
            s0.to(S0) + i,
            s1.to(S1) + i,
            s2.to(S2) + i,
            i < count,
            scalars,
            factor,
            limit,
            UPDATE,
            KIND,
            True,
        )


@triton.jit
def _update_strided(
    row,
    grad,
    layout,
    begin,
    count,
    scalars,
    factor,
    limit,
    UPDATE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = _address(row, 0, 0, KIND).to(_type(0, KIND))
    g = grad.to(_type(1, KIND))
    s0 = _address(row, 0, 2, KIND).to(_type(2, KIND))
    s1 = _address(row, 0, 3, KIND).to(_type(3, KIND))
    s2 = _address(row, 0, 4, KIND).to(_type(4, KIND))
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = strided_offsets(layout, begin + i, states_of(KIND))
        _update_block(
            p + at[0],
            g + at[1],
            s0 + at[2],
            s1 + at[3],
            s2 + at[4],
            i < count,
            scalars,
            factor,
            limit,
            UPDATE,
            KIND,
            True,
        )


@triton.jit
def _update_chunk(
    rows,
    layouts,
    chunks,
    words,
    row_count,
    c,
    factor,
    limit,
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    KINDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, grad, begin, count = find_chunk(rows, chunks, words, c, CHUNK)
    group = words + 8 * (row_count + (word(row, PLACE) & 0xFFFFFFFF) * GROUP_WORDS)
    flags = word(group, FLAGS)
    lr = number(group, 0)
    if word(group, LR) != 0:
        lr = load_scalar(word(group, LR), flags & 0xFF)
    if (flags >> 8) & 0xFF != 0:  # maximize
        factor = -factor
    step = tl.zeros((), tl.float64) + 1
    if word(row, STEP) != 0:
        step += tl.load(word(row, STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)
    first = (word(row, KIND) >> 56) & 0xFF
    kind = kind_of(row)
    for k in tl.static_range(len(KINDS)):
        if kind == KINDS[k]:
            scalars = PREPARE(group, lr, step, first, maths_of(KINDS[k]))
            if is_strided(KINDS[k]):
                _update_strided(
                    row,
                    grad,
                    layout_of(layouts, row),
                    begin,
                    count,
                    scalars,
                    factor,
                    limit,
                    UPDATE,
                    KINDS[k],
                    BLOCK,
                )
            else:
                _update_dense(
                    row, grad, begin, count, scalars, factor, limit, UPDATE, KINDS[k], BLOCK
                )


@triton.jit
def _advance_steps(rows, row_count, BLOCK: tl.constexpr):
    for start in range(0, row_count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        row = rows + i.to(tl.int64) * (8 * ROW_WORDS)
        address = tl.load((row + 8 * STEP).to(tl.pointer_type(tl.int64)), i < row_count, 0)
        there = (i < row_count) & (address != 0)
        counter = address.to(tl.pointer_type(tl.float32))
        tl.store(counter, tl.load(counter, there, 0.0) + 1, there)


# A kernel that was compiled once serves every table. By default Triton would compile it for what
# the arguments of its first launch happen to be, multiples of 16 or 1.
@triton.jit(
    do_not_specialize=[
        "rows",
        "layouts",
        "chunks",
        "words",
        "row_count",
        "chunk_count",
        "workspace",
        "grad_scale",
        "found_inf",
        "squared_norm",
        "grad_norm",
        "skipped_steps",
        "max_norm",
        "clip_value",
    ]
)
def step_kernel(
    rows: tl.int64,
    layouts: tl.int64,
    chunks: tl.int64,
    words: tl.int64,
    row_count: tl.int64,
    chunk_count: tl.int64,
    workspace: tl.int64,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    squared_norm: tl.int64,
    grad_norm: tl.int64,
    skipped_steps: tl.int64,
    max_norm: tl.int64,
    clip_value: tl.int64,
    PREPARE: tl.constexpr,
    UPDATE: tl.constexpr,
    KINDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    APPLY: tl.constexpr,
    CLIP: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
):
    """One step, or with NORM or APPLY alone a half of it. CLIP: the update uses the norm.

    Args:
        rows, layouts, chunks, words: addresses of the table (csrc/host/device_table.h).
        workspace: address of WORKSPACE_WORDS words.
        grad_scale, found_inf, grad_norm, skipped_steps: as in csrc/cuda/step.h; 0 for none.
        squared_norm: address of a float64 that NORM alone writes, and APPLY alone reads.
        max_norm, clip_value: the bits of a float64.
        PREPARE, UPDATE: the rule. KINDS: the distinct kinds of rows.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    total = tl.zeros((), tl.float64)
    skipped = total != 0  # no
    if NORM:
        mine = program_squares(rows, layouts, chunks, words, chunk_count, KINDS, CHUNK, BLOCK)
        store_partial(workspace, mine)
    if APPLY:
        factor = total + 1.0
        if grad_scale != 0:
            factor = 1.0 / tl.load(grad_scale.to(tl.pointer_type(tl.float32))).to(tl.float64)
        if found_inf != 0:
            skipped = tl.load(found_inf.to(tl.pointer_type(tl.float32))) != 0
        if CLIP:
            if NORM:
                grid_barrier(workspace)
                squared = sum_of_partials(workspace)
            else:
                squared = number(squared_norm, 0)
            total = tl.sqrt(squared) * factor
            if SKIP_NONFINITE:
                skipped = skipped | ((total - total) != 0)
            coef = max_norm.to(tl.float64, bitcast=True) / (total + 1e-6)
            factor = factor * tl.where(coef > 1, 1.0, coef)  # a NaN stays, as in torch
        limit = clip_value.to(tl.float64, bitcast=True)
        if not skipped:
            chunks_of_this = (chunk_count - program + programs - 1) // programs
            for i in range(chunks_of_this):
                _update_chunk(
                    rows,
                    layouts,
                    chunks,
                    words,
                    row_count,
                    program + (chunks_of_this - 1 - i) * programs,
                    factor,
                    limit,
                    PREPARE,
                    UPDATE,
                    KINDS,
                    CHUNK,
                    BLOCK,
                )
    if arrive(workspace, FINISHED) == programs - 1:
        counters = workspace.to(tl.pointer_type(tl.int64))
        tl.store(counters + ARRIVED, 0)
        tl.store(counters + FINISHED, 0)
        if APPLY:
            tl.store(counters + SKIPPED, skipped.to(tl.int64))
            if grad_norm != 0:
                tl.store(grad_norm.to(tl.pointer_type(tl.float32)), total.to(tl.float32))
            if not skipped:
                _advance_steps(rows, row_count, 1024)
            elif skipped_steps != 0:
                counter = skipped_steps.to(tl.pointer_type(tl.int64))
                tl.store(counter, tl.load(counter) + 1)
        else:
            total_squares = sum_of_partials(workspace)
            tl.store(squared_norm.to(tl.pointer_type(tl.float64)), total_squares)
