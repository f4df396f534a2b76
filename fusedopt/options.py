"""Options of the whole optimizer: what a step does beside its rule.

They stand in each param group, too, since a rebuild `type(optimizer)(optimizer.param_groups)` hands
over nothing else, and since tools set them there; but they are one value for all groups. A
state_dict leaves them out: a resumed run has the options of its constructor.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from operator import is_
from typing import Any

from torch import Tensor

from fusedopt import backends, checks, distributed, mistakes
from fusedopt._native import _C
from fusedopt.callers import callers_level

# Name and value where it is not given.
DEFAULTS: dict[str, Any] = {
    "max_grad_norm": None,
    "clip_grad_value": None,
    "skip_nonfinite": False,
    "process_group": None,
    "backend": "auto",
}

_MISSING = object()
_ABSENT = (_MISSING,) * len(DEFAULTS)

# Keys that torch itself puts into groups.
_OF_TORCH = {
    *("params", "param_names", "name", "initial_lr", "swa_lr"),
    *("max_lr", "min_lr", "max_momentum", "base_momentum"),
}


def check(options: dict[str, Any]) -> None:
    """Raises unless all values are right.

    Raises:
        ValueError: a value out of its range, or both ways to clip at once.
        TypeError: a value of a wrong type.
    """
    checks.clip_options(options["max_grad_norm"], options["clip_grad_value"])
    skip = options["skip_nonfinite"]
    if not isinstance(skip, bool):
        raise TypeError(f"skip_nonfinite must be a bool, got {skip!r}")
    group = options["process_group"]
    if not isinstance(group, distributed.SavedGroup):  # of a pickle, found at the next step
        mistakes.check_process_group(group)
    backends.check_name(options["backend"])


def same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def agreed(groups: list[dict[str, Any]], name: str, default: Any) -> Any:
    """The value that all groups have which have one, or the default.

    Raises:
        ValueError: groups that disagree.
    """
    found, found_in = _MISSING, 0
    for index, group in enumerate(groups):
        value = group.get(name, _MISSING)
        if value is _MISSING:
            continue
        if found is _MISSING:
            found, found_in = value, index
        elif not same(value, found):
            raise _disagreement(name, (index, value), (found_in, found))
    return default if found is _MISSING else found


def _disagreement(name: str, a: tuple[int, Any], b: tuple[int, Any]) -> ValueError:
    """Of two groups, given by index and value."""
    first, second = (f'param_groups[{index}]["{name}"] is {value!r}' for index, value in (a, b))
    return ValueError(
        f"{first} and {second}: {name} is an option of the whole optimizer, and must be the same "
        "in all groups"
    )


def settle(given: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The options of a new optimizer: its keywords, or where they are not given what its groups
    say.

    Raises:
        ValueError: groups that disagree with each other or with a keyword.
    """
    options = {}
    for name, keyword in given.items():
        values = [{name: group.get(name, keyword)} for group in groups]
        options[name] = value = agreed(values, name, keyword)
        if not same(keyword, DEFAULTS[name]) and not same(value, keyword):
            raise ValueError(
                f'{name} is {keyword!r}, and param_groups[0]["{name}"] is {value!r}: it is an '
                "option of the whole optimizer; leave one of the two out"
            )
    return options


def without(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of a group that has no options."""
    return {key: value for key, value in group.items() if key not in DEFAULTS}


def needed_in_state_dict() -> bool:
    """Whether a flat distributed checkpoint is being made. To load one, torch looks up each key of
    the optimizer's groups in it: the options must be there, and their values do not count."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            info = frame.f_locals.get("info")
            return getattr(info, "flatten_optimizer_state_dict", False) is True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _count_keys(groups: list[dict[str, Any]]) -> int:
    # 2 ns a group in C++; here 45.
    return sum(map(len, groups)) if _C is None else _C.count_keys(groups)


def _option(name: str, doc: str) -> Any:
    """An attribute that reads and writes an option of the whole optimizer in all groups."""

    def get(self: InGroups) -> Any:
        return self._option(name)

    def set_(self: InGroups, value: Any) -> None:
        self._set_option(name, value)

    return property(get, set_, doc=doc)


class InGroups:
    """The part of an optimizer that keeps its options in all of its groups."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    _candidates: backends.Candidates
    _candidates_for: str
    _checked_options: tuple[Any, ...]  # the last ones that were found right
    _checked_keys: int  # how many all groups had when they were looked at
    _unknown_keys: set[str]  # that a warning has named

    max_grad_norm: float | Tensor | None = _option(
        "max_grad_norm", "The L2 norm that gradients are clipped to, or None."
    )
    clip_grad_value: float | Tensor | None = _option(
        "clip_grad_value", "What gradient elements are clamped to, or None."
    )
    skip_nonfinite: bool = _option(
        "skip_nonfinite", "Whether a non-finite norm makes a step a no-op."
    )
    process_group: Any = _option("process_group", "Over whose ranks the norm is summed, or None.")
    backend: backends.Backend = _option("backend", 'The backend that was asked for, or "auto".')

    def _options(self) -> dict[str, Any]:
        """Those of the whole optimizer.

        Raises:
            ValueError: groups that disagree.
        """
        return {name: self._option(name) for name in DEFAULTS}

    def _option(self, name: str) -> Any:
        default = self.defaults.get(name, DEFAULTS[name])
        value = agreed(self.param_groups, name, default)
        # ZeroRedundancyOptimizer writes its own groups, which have none, over those of the
        # optimizer in it, whose attribute was set.
        return default if name == "process_group" and value is None else value

    def _hand_on_options(self, new_group: dict[str, Any]) -> None:
        """Gives a new group the options of the others, or on construction those of the defaults.

        Raises:
            ValueError: a group that has another value.
        """
        first = self.param_groups[0] if self.param_groups else self.defaults
        for name in DEFAULTS:
            value = first.get(name, self.defaults.get(name))
            new_value = new_group.setdefault(name, value)
            if not same(new_value, value):
                raise _disagreement(name, (len(self.param_groups), new_value), (0, value))

    def _set_option(self, name: str, value: Any) -> None:
        others = {other: self._option(other) for other in DEFAULTS if other != name}
        check({**others, name: value})
        if name == "backend":
            backends.Candidates(backends.check_name(value))  # raises where it cannot serve
        for target in (self.defaults, *self.param_groups):
            target[name] = value

    def _warn_of_unknown_keys(self, groups: list[dict[str, Any]]) -> None:
        """Warns, once for each key, of keys of groups that mean nothing to this optimizer or to
        torch: they may be misspelt, though frameworks keep their own there, too."""
        known = {*self.defaults, *_OF_TORCH, *self._unknown_keys}
        new = list(dict.fromkeys(key for group in groups for key in group if key not in known))
        if not new:
            return
        self._unknown_keys.update(new)
        named = []
        for key in new:
            close = difflib.get_close_matches(str(key), list(self.defaults), 1)
            named.append(f"{key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        warnings.warn(
            f"{type(self).__name__} has no hyperparameter {', '.join(named)}: a key of a param "
            "group without effect",
            stacklevel=callers_level(),
        )

    def _request(self) -> backends.Request:
        """What this step does beside its rule.

        Raises:
            ValueError, TypeError: an option that was set to what is none.
        """
        if _count_keys(self.param_groups) != self._checked_keys:
            self._warn_of_unknown_keys(self.param_groups)
            self._checked_keys = _count_keys(self.param_groups)
        values: tuple[Any, ...] = ()
        if self.param_groups:  # the native drivers and collect() compare those of the other groups
            first = self.param_groups[0]
            values = tuple(map(first.get, DEFAULTS, _ABSENT))
        if not values or _MISSING in values:
            values = tuple(self._options().values())
        if not all(map(is_, values, self._checked_options)) or not self._checked_options:
            check(dict(zip(DEFAULTS, values, strict=True)))
            if values[-1] != self._candidates_for:
                self._candidates = backends.Candidates(backends.check_name(values[-1]))
                self._candidates_for = values[-1]
            self._checked_options = values
        max_grad_norm, clip_grad_value, skip_nonfinite, process_group, _ = values
        if process_group is None:  # see _option
            process_group = self.defaults.get("process_group")
        if max_grad_norm.__class__ is not float and max_grad_norm is not None:
            max_grad_norm = checks.limit("max_grad_norm", max_grad_norm)
        if clip_grad_value.__class__ is not float and clip_grad_value is not None:
            clip_grad_value = checks.limit("clip_grad_value", clip_grad_value)
        return backends.Request(
            max_grad_norm,
            clip_grad_value,
            skip_nonfinite,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            process_group,
        )
