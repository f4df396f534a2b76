"""How mkdocs reads docstrings: what they are at run time, with formulas as MathML."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

_FORMULA = re.compile(r"^\.\. math::\n((?:[ ]+.*\n|\n)+)", re.M)


def _mathml(match: re.Match[str]) -> str:
    latex = textwrap.dedent(match[1]).strip()
    html = convert(f"\\begin{{align*}}{latex}\\end{{align*}}", display="block")
    return f'<div class="formula">{html}</div>\n\n'


class Docstrings(griffe.Extension):
    """Classes put their docstring together when they are imported (`__doc__ = f"..."`), and step()
    has the signature that it states (`__signature__`): reading the source shows neither. Markdown
    knows no `.. math::`."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if cls.docstring is None and "__doc__" in cls.members:
            module = importlib.import_module(cls.module.path)
            text = inspect.getdoc(getattr(module, cls.name))
            cls.docstring = griffe.Docstring(text, parent=cls, lineno=cls.lineno)
            cls.del_member("__doc__")
        if cls.docstring is not None:
            cls.docstring.value = _FORMULA.sub(_mathml, cls.docstring.value)

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        anything = any(p.kind is griffe.ParameterKind.var_positional for p in func.parameters)
        if func.path == "fusedopt.optimizer.FusedOptimizer.step" and anything:
            step: Any = importlib.import_module("fusedopt").FusedOptimizer.step
            parameters = inspect.signature(step).parameters.values()
            func.parameters = griffe.Parameters(*map(_parameter, parameters))


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    empty = parameter.empty
    return griffe.Parameter(
        parameter.name,
        annotation=None if parameter.annotation is empty else str(parameter.annotation),
        kind=griffe.ParameterKind[parameter.kind.name.lower()],
        default=None if parameter.default is empty else repr(parameter.default),
    )
