"""Imports the native extension beside the OpenMP runtime that torch has brought."""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType

RUNTIME = "libgomp.so.1"


def load() -> ModuleType:
    """The extension module, after torch was imported.

    g++ compiles a parallel region into calls of libgomp, and setup.py links none: they reach
    whichever runtime torch has loaded for all, under whatever file name, so that there is one pool
    of threads in the process. Where torch has none, or keeps it to itself, the system's is loaded.

    Raises:
        ImportError: the extension was not built, or there is no OpenMP runtime.
    """
    try:
        return importlib.import_module("fusedopt._C")
    except ImportError as error:
        if "undefined symbol: GOMP_" not in str(error):
            raise
        try:
            ctypes.CDLL(RUNTIME, mode=ctypes.RTLD_GLOBAL)
        except OSError as reason:
            raise ImportError(f"torch brings no OpenMP runtime, and {reason}") from error
    return importlib.import_module("fusedopt._C")
