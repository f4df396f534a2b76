"""Makes Triton's interpreter fit for tests: it rounds as a GPU does, and is not slow without need.

- Its fma rounds twice, and its cast from float32 to bfloat16 truncates. (What a GPU does is seen in
  the compiled kernels: test_triton_compiled.py.)
- It prepares triton.language anew for each call of a function inside a kernel, which takes longer
  than most functions. Once for a module and launch is enough. It makes a table of all dtypes for
  each operation, to look up one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter


def fma_of_float64(x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once: the product and the sum are pairs of numbers, exact in all but the
    last bits of their low halves (Dekker, Knuth). Extended precision serves where a half overflows
    or vanishes."""
    with np.errstate(all="ignore"):
        product = x * y
        halves = [(a, a * 134217729.0) for a in (x, y)]
        (xh, xl), (yh, yl) = ((c - (c - a), a - (c - (c - a))) for a, c in halves)
        low = ((xh * yh - product) + xh * yl + xl * yh) + xl * yl
        total = product + z
        part = total - product
        rest = (product - (total - part)) + (z - part)
        exact = total + (rest.astype(np.longdouble) + low).astype(np.float64)
        wide = np.longdouble(1) * x * y + z
        usable = np.isfinite(exact) & (np.abs(product) > 1e-270)
        return np.where(usable, exact, wide.astype(np.float64))


def install() -> None:
    cast = interpreter.InterpreterBuilder.cast_impl
    launch = interpreter.GridExecutor.__call__
    look_up = interpreter._get_np_dtype
    numpy_dtypes: dict[str, Any] = {}
    prepared: set[str] = set()

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype == np.float64:
            result = fma_of_float64(x.data, y.data, z.data)
        else:  # float64 holds the product exactly
            wide = x.data.astype(np.float64) * y.data.astype(np.float64)
            result = (wide + z.data.astype(np.float64)).astype(z.data.dtype)
        return interpreter.TensorHandle(result, z.dtype.scalar)

    def cast_rounded(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, dst_type.scalar)
        return cast(self, src, dst_type)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    def numpy_dtype(kind: Any) -> Any:
        element = kind.scalar
        if element.is_ptr():
            return look_up(element)
        if element.name not in numpy_dtypes:
            numpy_dtypes[element.name] = look_up(element)
        return numpy_dtypes[element.name]

    interpreter.InterpreterBuilder.create_fma = fma
    interpreter.InterpreterBuilder.cast_impl = cast_rounded
    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = numpy_dtype
