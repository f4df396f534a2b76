"""Imports the native extension beside the OpenMP runtime that torch has brought, and says why that
cannot be done, and what its user can do about it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import sys
from pathlib import Path
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


_COMPILER = "a C++17 compiler (Debian: apt install g++)"


def explain(error: ImportError) -> tuple[str, str]:
    """(what is wrong, what to do) where `import fusedopt._C` has raised `error`."""
    package = Path(__file__).absolute().parent
    if not isinstance(error, ModuleNotFoundError):
        return (
            f"the native extension cannot be loaded ({error})",
            f"install what it lacks, or with {_COMPILER} build it on this machine: `{_again()}`",
        )
    tree = package.parent if _is_source_tree(package.parent) else None
    installed = _package_with_extension(besides=package)
    others = sorted(f.name for f in package.glob("_C.*") if f.suffix in (".so", ".pyd"))
    build = f"with {_COMPILER}, run `pip install -e {tree}`"
    if tree is not None and installed is not None:
        cause = f"the source tree {tree}, which was not built, shadows the installed package"
        cause += f" {installed}"
        remedy = "run the program from another folder, with the tree neither in PYTHONPATH nor"
        remedy += f" around the script; or build the tree: {build}"
    elif installed is not None:
        cause = f"the package {package}, which has none, shadows the one in {installed}"
        remedy = f"uninstall it, or take {package.parent} off sys.path"
    elif others:
        here = f"{sys.implementation.cache_tag} on {sys.platform}"
        cause = f"{', '.join(others)} was built for another Python than this one ({here})"
        command = f"pip install -e {tree}" if tree is not None else _again()
        remedy = f"install fusedopt again with this Python: `{sys.executable} -m {command}`"
    elif tree is not None:
        cause = f"the source tree {tree} was not built"
        remedy = build
    else:
        cause = "fusedopt was installed without a C++17 compiler that works, or as a wheel for any "
        cause += "platform"
        remedy = f"install {_COMPILER} and then fusedopt again, with `{_again()}`"
    return f"the native extension is not there: {cause}", remedy


def _again() -> str:
    """The command that installs fusedopt once more, from where it came, and builds it."""
    try:
        record = importlib.metadata.distribution("fusedopt").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        record = None
    origin = json.loads(record or "{}")
    where = origin.get("url", "fusedopt")
    if "vcs_info" in origin:
        where = f"{origin['vcs_info']['vcs']}+{where}@{origin['vcs_info']['commit_id']}"
    return f"pip install --force-reinstall --no-deps --no-cache-dir --no-binary=fusedopt {where}"


def _is_source_tree(folder: Path) -> bool:
    return (folder / "setup.py").is_file() and (folder / "csrc").is_dir()


def _package_with_extension(besides: Path) -> Path | None:
    """Another folder of the package that this Python could have imported, extension and all."""
    folders = [Path(entry).absolute() / "fusedopt" for entry in sys.path]
    for finder in sys.meta_path:  # that of an editable install, for one
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec and find_spec("fusedopt", None)
        folders += [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    for folder in folders:
        suffixes = importlib.machinery.EXTENSION_SUFFIXES
        built = any((folder / f"_C{suffix}").is_file() for suffix in suffixes)
        if built and not os.path.samefile(folder, besides):
            return folder
    return None
