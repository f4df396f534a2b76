"""The command-line options that the benchmarks share."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.contestants import CONTESTANTS, HYPERPARAMETERS
from bench.machine import RUNS
from bench.workloads import DTYPES, MIXED

Names = list[str] | None  # None, not given, becomes all names in the callback of `choice`


def choice(option: str, names: Iterable[str], default: list[str] | None = None) -> Any:
    """A repeatable option that takes some of `names`; without it `default`, or all of them."""
    allowed = list(names)

    def check(values: list[str] | None) -> list[str]:
        for value in values or []:
            if value not in allowed:
                raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}")
        return list(dict.fromkeys(values or default or allowed))

    what = ", ".join(default) if default else "all"
    text = f"One of {', '.join(allowed)}; repeat for several. Default: {what}."
    return typer.Option(option, help=text, callback=check, show_default=False)


Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="Within two minutes: fewer rounds, smaller tensors; not for figures."
    ),
]
Dtypes = Annotated[Names, choice("--dtype", DTYPES)]
MixedDtypes = Annotated[Names, choice("--dtype", (*DTYPES, MIXED))]
Optimizers = Annotated[Names, choice("--optimizer", HYPERPARAMETERS)]
Contestants = Annotated[Names, choice("--contestant", CONTESTANTS)]
Repeats = Annotated[
    int | None, typer.Option(min=1, help="Timed rounds; each times every contestant once.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of torch. Default: what torch takes.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="Results file. Default: runs/<name>.json, or runs/<name>-quick.json.",
        show_default=False,
    ),
]


def prepare(name: str, output: Path | None, threads: int | None, quick: bool) -> Path:
    """Set the threads and return the results file. What git tracks, bench/results, is written only
    where --output says so, and quick figures never replace measured ones."""
    if threads is not None:
        torch.set_num_threads(threads)
    if output is not None:
        return output
    return RUNS / f"{name}{'-quick' if quick else ''}.json"


def rounds_of(quick: bool, repeats: int | None, default: int) -> tuple[int, int]:
    """(rounds that are timed, rounds before them that are not kept)."""
    return repeats or (3 if quick else default), 1 if quick else 3
