"""A user's script under `mypy --strict`: no error in a right one, each mistake at its line."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import fusedopt
from fusedopt import _native, backends, keywords

pytest.importorskip("mypy")

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "typing"


def errors_in(script: Path, folder: Path) -> dict[int, str]:
    """By line: what mypy says of a user's script; the package is one that was installed."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-pretty",
         "--no-error-summary", f"--config-file={os.devnull}", f"--cache-dir={folder}", str(script)],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^.*?\.py:(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    assert len(found) == len(re.findall(": error: ", done.stdout)), done.stdout
    return {int(line): message for line, message in found}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mypy's cache of torch, which takes longest."""
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.slow
def test_a_right_script(cache: Path) -> None:
    assert errors_in(SCRIPTS / "right.py", cache) == {}


@pytest.mark.slow
def test_each_mistake_is_found_at_its_line(cache: Path) -> None:
    lines = (SCRIPTS / "wrong.py").read_text().splitlines()
    wrong = {number: line for number, line in enumerate(lines, 1) if line.endswith("  # E")}
    assert len(wrong) > 40
    found = errors_in(SCRIPTS / "wrong.py", cache)
    assert {n: line for n, line in wrong.items() if n not in found} == {}
    assert {n: message for n, message in found.items() if n not in wrong} == {}


TAKEN = {
    fusedopt.FusedAdamW: keywords.AdamWKeywords,
    fusedopt.FusedAdam: keywords.AdamKeywords,
    fusedopt.FusedSGD: keywords.SGDKeywords,
}


@pytest.mark.parametrize("cls", TAKEN)
def test_the_keywords_of_fuse_are_those_of_the_class(cls: Any) -> None:
    parameters = set(inspect.signature(cls).parameters) - {"params"}
    assert set(typing.get_type_hints(TAKEN[cls])) == parameters


@pytest.mark.parametrize("cls", TAKEN)
def test_the_types_of_a_constructor_can_be_read(cls: Any) -> None:
    """As the CLI of Lightning does, which makes options of them."""
    hints = typing.get_type_hints(cls.__init__)
    assert hints["backend"] == backends.Backend
    assert typing.get_args(backends.Backend) == ("auto", *backends.BACKENDS)


def test_step_keeps_its_signature() -> None:
    assert list(inspect.signature(fusedopt.FusedAdamW.step).parameters) == ["self", "closure"]


def test_the_stubs_have_what_the_extension_has() -> None:
    tree = ast.parse((ROOT / "fusedopt" / "_C.pyi").read_text())
    stubs = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    native = _native._C
    assert native is not None
    assert {node.name for node in stubs} == {n for n in vars(native) if not n.startswith("__")}
    for node in stubs:
        members = [node] if isinstance(node, ast.FunctionDef) else node.body
        for member in members:
            assert isinstance(member, ast.FunctionDef)
            owner = native if member is node else getattr(native, node.name)
            found = getattr(owner, member.name)
            if isinstance(found, property):
                continue
            # As pybind11 writes it: "step(self: fusedopt._C.Plan, state: object, ...) -> str"
            signature = found.__doc__.splitlines()[0]
            names = re.findall(r"[(,] ?(\w+):", re.sub(r"\[[^()]*?\]", "", signature))
            assert names == [a.arg for a in member.args.args], signature
