"""A kernel that holds its place on a GPU until it is told to end. For tests/gpu_busy.py."""

import triton  # type: ignore[import-untyped]
import triton.language as tl


@triton.jit
def spin(flag):
    """Waits until flag[0] is not 0; each program adds 1 to flag[1]."""
    while tl.atomic_add(flag, 0, sem="acquire") == 0:
        pass
    tl.atomic_add(flag + 1, 1)
