"""Keeps what other packages print out of what the benchmarks print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

# Never closed: a package that logs keeps the stream that it found when it was imported.
NOTHING = open(os.devnull, "w")  # noqa: SIM115


@contextmanager
def quiet() -> Iterator[None]:
    """Discards all that is written to stdout and stderr, by C++ and by other processes as well.

    Importing an optimizer, and its first step, may tell of libraries that are not there, of
    accelerators, of compilers. What goes wrong is an exception, which passes.
    """
    with ExitStack() as stack:
        for stream, fd in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            saved = os.dup(fd)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, fd)
            os.dup2(NOTHING.fileno(), fd)
        stack.enter_context(redirect_stdout(NOTHING))
        stack.enter_context(redirect_stderr(NOTHING))
        yield
