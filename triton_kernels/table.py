"""Reads the tensor table (csrc/core/table.h) as 64-bit words. csrc/host/triton_step.cpp checks
the offsets when it is compiled.

Addresses are int64 scalars; a null pointer is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROW_WORDS = tl.constexpr(10)
STEP, NUMEL, PLACE, KIND = (tl.constexpr(i) for i in (5, 6, 7, 8))  # words of a row
PARAM, GRAD, STATE0 = (tl.constexpr(i) for i in (0, 1, 2))  # operands, and words of a row
GROUP_WORDS = tl.constexpr(14)
LR, FLAGS = (tl.constexpr(i) for i in (12, 13))  # words of a group, after its hyperparameters
LAYOUT_WORDS = tl.constexpr(1 + 64 * 6)


@triton.jit
def word(address, index):
    """The int64 at words[index]."""
    return tl.load(address.to(tl.pointer_type(tl.int64)) + index)


@triton.jit
def number(address, index):
    """The float64 at words[index]."""
    return tl.load(address.to(tl.pointer_type(tl.float64)) + index)


@triton.jit
def load_scalar(address, code):
    """The scalar at an address, of the dtype with this code, as float64."""
    value = tl.zeros((), tl.float64)
    if code == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif code == 1:
        value = tl.load(address.to(tl.pointer_type(tl.float64)))
    elif code == 2:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16))).to(tl.float32).to(tl.float64)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float16))).to(tl.float64)
    return value


# What is known of a row when the kernel is compiled: its kind (csrc/host/triton_step.cpp).


@triton.constexpr_function
def dtype_of(kind, operand):
    code = (kind >> (8 * operand)) & 0xFF
    return (tl.float32, tl.float64, tl.bfloat16, tl.float16)[code]


@triton.constexpr_function
def bytes_of(kind, operand):
    return (4, 8, 2, 2)[(kind >> (8 * operand)) & 0xFF]


@triton.constexpr_function
def variant_of(kind):
    return (kind >> 40) & 0xFF


@triton.constexpr_function
def states_of(kind):
    return (kind >> 48) & 0xFF


@triton.constexpr_function
def is_strided(kind):
    return kind >> 56 != 0


@triton.constexpr_function
def maths_of(kind):
    """float64 where one of the operands is: float32 for all others."""
    operands = [0, 1] + [2 + k for k in range((kind >> 48) & 0xFF)]
    wide = any((kind >> (8 * k)) & 0xFF == 1 for k in operands)
    return tl.float64 if wide else tl.float32


@triton.constexpr_function
def gradient_mask():
    """The part of a kind that says all of a gradient: its dtype, and whether it is strided."""
    return (0xFF << 8) | (1 << 56)


@triton.constexpr_function
def gradient_kinds(kinds):
    return tuple(sorted({kind & ((0xFF << 8) | (1 << 56)) for kind in kinds}))


@triton.jit
def kind_of(row):
    """The kind of a row, at run time."""
    kind = word(row, KIND) & 0x00FFFFFFFFFFFFFF
    layout = word(row, PLACE) >> 32
    return tl.where(layout >= 0, kind | (1 << 56), kind)


@triton.jit
def layout_of(layouts, row):
    return layouts + (word(row, PLACE) >> 32) * (8 * LAYOUT_WORDS)


@triton.jit
def find_chunk(rows, chunks, words, c, CHUNK: tl.constexpr):
    """Of chunk c: address of its row, address of the row's gradient, first element, elements."""
    ref = word(chunks, c)
    index = ref & 0xFFFFFFFF
    row = rows + index * (8 * ROW_WORDS)
    begin = (ref >> 32) * CHUNK
    count = tl.minimum(word(row, NUMEL) - begin, CHUNK).to(tl.int32)
    return row, word(words, index), begin, count


@triton.jit
def strided_offsets(layout, index, STATES: tl.constexpr):
    """Offsets of the elements `index` of param, grad and three states, in elements; 0 for states
    that are not in use."""
    ndim = (word(layout, 0) & 0xFFFFFFFF).to(tl.int32)
    rest = index
    p, g, s0, s1, s2 = index * 0, index * 0, index * 0, index * 0, index * 0
    for i in range(ndim):
        d = ndim - 1 - i
        size = word(layout, 1 + d)
        coordinate = rest % size
        rest = rest // size
        p += coordinate * word(layout, 65 + d)
        g += coordinate * word(layout, 129 + d)
        if STATES > 0:
            s0 += coordinate * word(layout, 193 + d)
        if STATES > 1:
            s1 += coordinate * word(layout, 257 + d)
        if STATES > 2:
            s2 += coordinate * word(layout, 321 + d)
    return p, g, s0, s1, s2
