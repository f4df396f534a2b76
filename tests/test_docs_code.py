"""Snippets outside of the pages: the new optimizer of CONTRIBUTING.md, and those of docstrings."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fusedopt
from tests import docs_snippets, oracle
from tests.cases import Case

os.environ["KERAS_BACKEND"] = "torch"
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
FENCES = docs_snippets.parse(PAGE).snippets
P = [0.5, -1.25, 3.0, 0.0]
G = [1e-3, -2.0, 0.7, 0.0]
M = [0.1, 1.5, -0.9, 0.0]
GROUP = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def fence(language: str, beginning: str) -> str:
    (code,) = (f.code for f in FENCES if f.language == language and beginning in f.code)
    return code


def exact_step() -> tuple[Any, Any]:
    """A step of the formula that section 4 gives."""
    namespace: dict[str, Any] = {"Any": Any, "Exact": Any, "np": np}
    exec(fence("python", "def lion("), namespace)
    p, g, m = (np.array(v, dtype=np.longdouble) for v in (P, G, M))
    param, (state,) = namespace["lion"](p, g, [m], GROUP, 1, False)
    return param, state


@pytest.fixture
def lion(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("fusedopt.lion")
    monkeypatch.setitem(sys.modules, "fusedopt.lion", module)
    exec(compile(fence("python", '"""FusedLion."""'), "lion.py", "exec"), module.__dict__)
    return module


def test_the_class_of_contributing_steps(lion: types.ModuleType) -> None:
    param = torch.nn.Parameter(torch.tensor(P, dtype=torch.float64))
    param.grad = torch.tensor(G, dtype=torch.float64)
    optimizer = lion.FusedLion([param], backend="reference", **GROUP)
    optimizer.state[param]["exp_avg"] = torch.tensor(M, dtype=torch.float64)
    optimizer.step()
    expected, state = (torch.tensor(v.astype(float)) for v in exact_step())
    torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], state, rtol=1e-14, atol=1e-16)
    assert not torch.equal(param.detach(), torch.tensor(P, dtype=torch.float64))
    with pytest.raises(ValueError, match="weight_decay"):
        lion.FusedLion([param], weight_decay=-1.0)
    assert "max_grad_norm" in lion.FusedLion.__doc__


def test_the_lines_of_contributing(lion: types.ModuleType, monkeypatch: Any) -> None:
    namespace: dict[str, Any] = {}
    exec(fence("python", "from fusedopt.lion import"), namespace)
    monkeypatch.setattr(fusedopt, "FusedLion", namespace["FusedLion"], raising=False)
    monkeypatch.setattr(oracle, "lion", lambda *arguments: None, raising=False)
    names = {"Case": Case, "fusedopt": fusedopt, "oracle": oracle}
    (case,) = eval(fence("python", "Case(").strip(), names)
    assert case.fused is lion.FusedLion
    registry = (ROOT / "csrc/rules/registry.h").read_text()
    for line in fence("cpp", "FUSEDOPT_RULES").splitlines():
        words = line.rstrip("\\ ")
        assert words in registry or "Lion" in words, words


HARNESS = """
#include <cstdio>
#include "rules/lion.h"
using fusedopt::Lion;
int main() {
  double p[] = {%s}, g[] = {%s}, m[] = {%s};
  const Lion::Hyper hyper{1e-2, 0.9, 0.99, 0.1};
  const auto scalars = Lion::prepare(hyper, 1, false);
  for (int i = 0; i < 4; ++i) {
    Lion::update<0, double>(p[i], g[i], &m[i], scalars);
    std::printf("%%.17g %%.17g\\n", p[i], m[i]);
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_rule_of_contributing(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules/lion.h").write_text(fence("cpp", "struct Lion"))
    values = (", ".join(map(repr, v)) for v in (P, G, M))
    (tmp_path / "main.cpp").write_text(HARNESS % tuple(values))
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-ffp-contract=off", f"-I{tmp_path}"]
    command += [f"-I{ROOT / 'csrc'}", "main.cpp", "-o", "lion"]
    subprocess.run(command, cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "lion"], capture_output=True, text=True, check=True).stdout
    rows = [[float(x) for x in line.split()] for line in printed.splitlines()]
    expected = torch.tensor(np.stack(exact_step(), axis=1).astype(float))
    torch.testing.assert_close(
        torch.tensor(rows, dtype=torch.float64), expected, rtol=1e-14, atol=1e-16
    )


EXAMPLES = ["fusedopt", "fusedopt.integrations.transformers", "fusedopt.integrations.keras"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring(name: str, tmp_path: Path) -> None:
    model: Any = torch.nn.Linear(2, 2)
    namespace = {}
    if name.endswith("transformers"):
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        namespace["transformers"] = transformers
        namespace["args"] = transformers.TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True
        )
    if name.endswith("keras"):
        keras = pytest.importorskip("keras")
        # Named, so that Keras' counters of names stay what other tests take them for.
        model = keras.Sequential([keras.layers.Dense(1, name="output")], name="model")
    module = importlib.import_module(name)
    namespace |= {**vars(module), "model": model}
    examples = doctest.DocTestParser().get_examples(module.__doc__ or "")
    assert examples
    for example in examples:
        exec(compile(example.source, name, "exec"), namespace)


def test_no_other_docstring_has_an_example() -> None:
    found = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for folder in ("fusedopt", "triton_kernels", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*>>> ", path.read_text(), re.M)
    ]
    assert sorted(found) == sorted(EXAMPLES)
