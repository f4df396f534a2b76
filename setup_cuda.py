"""The CUDA part of setup.py: which architectures to compile for, and how to call nvcc."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools.errors import OptionError
from setuptools.modified import newer_group

DEFAULT_ARCHS = "80 90 100 120"
VARIABLE = "FUSEDOPT_CUDA_ARCHS"


def output_of(*command: str) -> str:
    """What a command prints, or "" where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout + done.stderr


def notice(text: str) -> None:
    print(f"\nfusedopt: {text}\n", file=sys.stderr)


def say(text: str) -> None:
    """What the build is at, for whoever waits for it. Threads that compile say it at once."""
    print(f"fusedopt: {text}\n", end="", flush=True)


def required() -> bool:
    return os.environ.get("FUSEDOPT_REQUIRE_CUDA") == "1"


@dataclass(frozen=True, order=True)
class Arch:
    """A compute capability: 90, and "a" or "f" for code that runs on it (or its family) alone."""

    number: int
    suffix: str = ""

    def __str__(self) -> str:
        return f"{self.number}{self.suffix}"


def parse_archs(text: str) -> tuple[list[Arch], set[int]]:
    """The architectures of a text such as "80 90a", "8.0;9.0+PTX" or "sm_90", and those of them
    for which PTX is asked.

    Raises:
        OptionError: for a word that is none.
    """
    archs, ptx = set(), set()
    for word in re.split(r"[\s,;]+", text.strip()):
        match = re.fullmatch(r"(?:sm_)?(?:(\d\d?)\.(\d)|(\d{2,3}))([af]?)(\+ptx)?", word.lower())
        if match is None:
            raise OptionError(
                f"{VARIABLE} must be none, native, or architectures such as '80 90', "
                f"'8.0;9.0+PTX' or 'sm_90a', got {word!r} in {text!r}"
            )
        arch = Arch(int("".join(part or "" for part in match.groups()[:3])), match[4])
        archs.add(arch)
        if match[5]:
            ptx.add(arch.number)
    return sorted(archs), ptx


def asked() -> str:
    """What FUSEDOPT_CUDA_ARCHS says: architectures, "none", "native", or "" where it is not set.

    Raises:
        OptionError: a word that is no architecture.
    """
    text = os.environ.get(VARIABLE, "").strip(" \t\n,;")
    if text.lower() in ("none", "native"):
        return text.lower()
    if text:
        parse_archs(text)
    return text


class Cuda:
    """The CUDA toolkit of this machine.

    Raises:
        OSError: there is none.
    """

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        self.nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or f"{home}/bin/nvcc"
        # The nvcc on PATH may be a wrapper somewhere else: it says itself where the toolkit is.
        told = re.search(r"^#\$ TOP=(.*)$", output_of(self.nvcc, "--dryrun", "-c", "x.cu"), re.M)
        if told is None:
            raise OSError(f"nvcc was not found ({self.nvcc})")
        self.root = Path(told[1].strip()).resolve()
        release = re.search(r"release (\d+)\.(\d+)", output_of(self.nvcc, "--version"))
        self.version = (int(release[1]), int(release[2])) if release else (0, 0)

    def known(self) -> set[int]:
        """The compute capabilities that nvcc compiles for; empty for an nvcc that does not say."""
        told = output_of(self.nvcc, "--list-gpu-code") or output_of(self.nvcc, "--list-gpu-arch")
        return {int(number) for number in re.findall(r"(?:sm|compute)_(\d+)", told)}

    def runtime(self) -> str:
        """The static CUDA runtime: no library of CUDA is needed to import the extension."""
        places = [*self.root.glob("lib*"), *self.root.glob("targets/*/lib")]
        for place in places:
            if (place / "libcudart_static.a").exists():
                return str(place / "libcudart_static.a")
        raise OSError(f"libcudart_static.a is not below {self.root}")

    def macros(self) -> list[str]:
        """What host code and kernels must both know."""
        small = self.version < (12, 1)  # kernels take 4 KiB of arguments
        return ["FUSEDOPT_CUDA"] + ["FUSEDOPT_CUDA_SMALL_ARGS"] * small

    def flags(self, archs: list[Arch], ptx: set[int]) -> list[str]:
        """Contraction is off, as on the CPU: both compute the same bits."""
        flags = ["-std=c++17", "-O3", "-fmad=false", "-Icsrc"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", *(f"-D{name}" for name in self.macros())]
        for arch in archs:
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        # GPUs that come later run PTX, but not that of an "a" or "f" architecture.
        for number in sorted(ptx | {archs[-1].number}):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        names = " ".join(map(str, archs))
        return [*flags, f'-D{VARIABLE}="{names} +PTX"', "--threads", "0"]

    def compile(self, source: str, target: Path, flags: list[str], depends: list[str]) -> None:
        """Compiles, unless the target is there, newer than `depends`, and made by this nvcc with
        these flags."""
        command = [self.nvcc, "-c", source, "-o", str(target), *flags]
        stamp = target.with_suffix(".command")
        made_by = f"{self.version} {self.root}\n{shlex.join(command)}"
        same = stamp.exists() and stamp.read_text() == made_by
        if same and not newer_group([source, *depends], str(target)):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        names = re.findall(r"code=(\w+)", " ".join(flags))
        say(f"compiling {source} for {', '.join(names)}")
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)
        stamp.write_text(made_by)


def _here(known: set[int]) -> list[Arch]:
    """Those of this machine's GPUs. One that is newer than nvcc runs the PTX of the newest that
    nvcc knows."""
    told = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    numbers = {int(a + b) for a, b in re.findall(r"^\s*(\d+)\.(\d)\s*$", told, re.M)}
    newer = {number for number in numbers if known and number > max(known)}
    if newer:
        notice(f"nvcc does not know sm_{_list(newer)}: PTX of {max(known)} will serve there")
        numbers = numbers - newer | {max(known)}
    return [Arch(number) for number in sorted(numbers)]


def _list(names: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(names)))


def choose_archs(cuda: Cuda) -> tuple[list[Arch], set[int]]:
    """The architectures to compile for, and those for which PTX is asked.

    Raises:
        OptionError: FUSEDOPT_CUDA_ARCHS lists nothing that nvcc knows, or with
            FUSEDOPT_REQUIRE_CUDA=1 anything that it does not.
        OSError: nvcc knows none of the GPUs of this machine, or FUSEDOPT_CUDA_ARCHS is "native" and
            there is none.
    """
    known, explicit = cuda.known(), asked()
    if explicit == "native":
        archs, ptx = _here(known), set()
        if not archs:
            raise OSError("nvidia-smi finds no GPU on this machine")
    elif explicit:
        archs, ptx = parse_archs(explicit)
    else:
        archs, ptx = _here(known) or parse_archs(DEFAULT_ARCHS)[0], set()
    unknown = [arch for arch in archs if known and arch.number not in known]
    left = [arch for arch in archs if arch not in unknown]
    if unknown:
        reason = f"{cuda.nvcc} does not compile for {_list(unknown)}, only for {_list(known)}"
        if explicit and (required() or not left):
            raise OptionError(f"{VARIABLE}: {reason}")
        if not left:
            raise OSError(reason)
        notice(f"{reason}; left out")
    return left, ptx & {arch.number for arch in left}
