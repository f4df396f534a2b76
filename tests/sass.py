"""Reads what nvcc made of a kernel: registers and spills from ptxas, memory accesses from SASS."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Function:
    """One function of a cubin.

    Attributes:
        loops: for each innermost loop, its instructions' opcodes ("LDG.E.128.CONSTANT", ...).
    """

    name: str
    loops: list[Counter[str]] = field(default_factory=list)

    def vector_loops(self) -> list[Counter[str]]:
        """The loops that move 16 bytes at a time."""
        return [loop for loop in self.loops if any(".128" in op for op in loop)]


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?);")
_FUNCTION = re.compile(r"^\s+Function : (\S+)|^(?:\s*\.text\.|\s*)(\$\S+|\S+\$\S+):")


def functions(cuobjdump: str | Path, binary: str | Path, arch: str | None = None) -> list[Function]:
    """The functions of a cubin, or those for `arch` ("90") of a library, with their innermost
    loops."""
    command = [str(cuobjdump), "-sass", str(binary)]
    if arch is not None:
        command += ["-arch", f"sm_{arch}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = []
    for part in re.split(r"\n\s+Function : ", text)[1:]:
        name, _, body = part.partition("\n")
        instructions = [
            (int(m[1], 16), m[3], m[4]) for m in map(_INSTRUCTION.match, body.splitlines()) if m
        ]
        found.append(Function(name.strip(), _innermost_loops(instructions)))
    return found


def _innermost_loops(instructions: list[tuple[int, str, str]]) -> list[Counter[str]]:
    """A loop is what lies between a backward branch and its target; one that holds another is none
    of the innermost."""
    spans = []
    for address, opcode, operands in instructions:
        if not opcode.startswith("BRA"):
            continue
        target = re.search(r"0x([0-9a-f]+)", operands)
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    innermost = [
        s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)
    ]
    return [
        Counter(op for at, op, _ in instructions if start <= at <= end) for start, end in innermost
    ]
