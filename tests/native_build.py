"""Compiles a copy of csrc into an extension, for tests that change the sources or the compiler."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

# As setup.py has them, with less time spent on optimisation.
FLAGS = ["-O1", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-w", "-Wno-psabi"]


def build_extension(
    csrc: Path,
    package: Path,
    objects: Path,
    sources: Mapping[Path, Sequence[str]],
    link_flags: Sequence[str] = (),
    reuse: Path | None = None,
    changed: Callable[[Path], bool] = lambda source: True,
) -> None:
    """Compiles `sources`, files below `csrc` with flags of their own, and links them as _C in
    `package`.

    Args:
        objects: a folder for the object files; it is made here.
        reuse: the `objects` of an earlier build, taken for every source that is not `changed`.
    """
    objects.mkdir(parents=True)
    include = [f"-I{csrc}", f"-I{pybind11.get_include()}"]
    include.append(f"-I{sysconfig.get_paths()['include']}")

    def compile_one(source: Path) -> str:
        name = "-".join(source.relative_to(csrc).parts) + ".o"
        if reuse is not None and not changed(source):
            return str(reuse / name)
        command = ["g++", *FLAGS, *include, *sources[source], "-c", str(source)]
        subprocess.run([*command, "-o", str(objects / name)], check=True)
        return str(objects / name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(compile_one, sorted(sources)))
    extension = package / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    link = ["g++", "-shared", "-fopenmp", "-pthread", *link_flags, *parts, "-o", str(extension)]
    subprocess.run(link, check=True)
