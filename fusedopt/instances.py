"""The live instances of a class, for what a tensor or an optimizer cannot tell: what wraps it."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any


def with_subclasses(*classes: type) -> list[type]:
    """The classes and all that derive from them, each once."""
    found = dict.fromkeys(classes)
    pending = list(classes)
    while pending:
        derived: list[type] = type.__subclasses__(pending.pop())
        new = [cls for cls in derived if cls not in found]
        found.update(dict.fromkeys(new))
        pending += new
    return list(found)


def live(*classes: type) -> list[Any]:
    """The instances of the classes in this process, by a walk over all objects that the garbage
    collector knows: tens of milliseconds. Those under gc.freeze() are not seen."""
    wanted = {id(cls) for cls in with_subclasses(*classes)}
    return [found for found in gc.get_objects() if id(type(found)) in wanted]


class Watch:
    """The live instances of some classes, for a microsecond where there is no new one.

    An instance holds a reference to its class, and a subclass to its bases: while no count of
    references has changed, and no known instance has gone, all are known.
    """

    def __init__(self, *classes: type) -> None:
        self._roots = classes
        self._classes: list[type] = []
        self._counts: list[int] = []
        self._known: list[weakref.ref[Any]] = []

    def instances(self) -> list[Any]:
        """All live instances, garbage that was not collected yet included."""
        found = [known() for known in self._known]
        if not self._classes or None in found or self._reference_counts() != self._counts:
            found = live(*self._roots)
            self._known = [weakref.ref(instance) for instance in found]
            self._classes = with_subclasses(*self._roots)
            self._counts = self._reference_counts()
        return found

    def _reference_counts(self) -> list[int]:
        return [sys.getrefcount(cls) for cls in self._classes]
