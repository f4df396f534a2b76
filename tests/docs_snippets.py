"""Runs the snippets of a page of the documentation.

    python tests/docs_snippets.py PAGE          # in an empty folder

All `python` fences of a page run in order, in one namespace. Of a `diff` fence the old side runs,
then the new one, each behind the comment in front of it, if there is one. HTML comments, which
readers do not see, say what a fence cannot:

    <!-- python ... -->         code that runs in this place: a model, data, a check of a result
    <!-- file: NAME -->         the next fence is written to a file of this name
    <!-- needs: PACKAGE ... --> from here to the next heading of the second level these packages
                                are needed; where one is not installed, nothing of it runs
    <!-- not run: REASON -->    the next fence does not run
    <!-- ranks: N -->           the page runs on so many ranks, whose environment is torchrun's

`sh` fences are not run here: tests/test_docs.py checks their commands.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# A comment of one or several lines, or a fence, which may be indented (in a list or a tab).
_PARTS = re.compile(
    r"^<!--[ ](?P<comment>.*?)-->"
    r"|^(?P<indent>[ ]*)```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$"
    r"|^##[ ](?P<heading>.*?)$",
    re.M | re.S,
)
PYTHON = ("python", "diff", "hidden")


@dataclass
class Snippet:
    """A fence, or the code of a comment."""

    language: str  # of a comment: "hidden"
    code: str
    line: int  # of its first line of code, from 1
    file: str = ""
    not_run: str = ""
    needs: tuple[str, ...] = ()

    def sides(self) -> list[str]:
        """The sources that run: the two sides of a diff, or the code."""
        if self.language != "diff":
            return [self.code]
        lines = self.code.splitlines()  # a line of the other side becomes an empty one
        return [
            "\n".join(line[1:] if line[:1] in (" ", side) else "" for line in lines)
            for side in "-+"
        ]


@dataclass
class Page:
    snippets: list[Snippet] = field(default_factory=list)
    ranks: int = 1


def parse(text: str) -> Page:
    """The snippets of a page.

    Raises:
        ValueError: a comment about the next fence, where none follows.
    """
    page, marks, needs = Page(), {}, ()  # type: ignore[var-annotated]
    for match in _PARTS.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        if match["heading"] is not None:
            needs = ()
        elif match["language"] is not None:
            lines = match["code"].splitlines()
            code = "\n".join(line.removeprefix(match["indent"]) for line in lines) + "\n"
            page.snippets.append(Snippet(match["language"], code, line, needs=needs, **marks))
            marks = {}
        else:
            word, _, rest = match["comment"].partition("\n" if "\n" in match["comment"] else ":")
            rest = rest.strip() if word != "python" else rest
            if word == "python":
                page.snippets.append(Snippet("hidden", rest, line, needs=needs))
            elif word == "needs":
                needs = tuple(rest.split())
            elif word == "ranks":
                page.ranks = int(rest)
            elif word in ("file", "not run"):
                marks[word.replace(" ", "_")] = rest
    if marks:
        raise ValueError(f"no fence follows {marks}")
    return page


def missing(snippet: Snippet) -> list[str]:
    """The packages that a snippet needs and that are not installed."""
    return [name for name in snippet.needs if importlib.util.find_spec(name) is None]


def runnable(page: Page) -> Iterator[Snippet]:
    """What `run` executes or writes, in order."""
    for snippet in page.snippets:
        wanted = snippet.language in PYTHON or snippet.file
        if wanted and not snippet.not_run and not missing(snippet):
            yield snippet


def run(path: Path) -> list[int]:
    """Runs a page in this process and in the current folder; the lines of the snippets that ran."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module  # where pickle looks for the classes of a page
    done: list[int] = []
    before = None

    def execute(code: str, line: int) -> None:
        # Lines are those of the page, in an error's traceback, too.
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), module.__dict__)

    for snippet in runnable(parse(path.read_text())):
        if snippet.file:
            Path(snippet.file).write_text(snippet.code)
        else:
            for index, code in enumerate(snippet.sides()):
                if index and before is not None and before.language == "hidden":
                    execute(before.code, before.line)
                execute(code, snippet.line)
        before = snippet
        done.append(snippet.line)
    return done


def run_on_ranks(path: Path, ranks: int) -> int:
    """Runs a page in so many processes, with what torchrun sets; the worst exit code."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(path)],
            env={**os.environ, **common, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
                 "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    return max(abs(process.wait()) for process in processes)


def main(path: Path) -> int:
    ranks = parse(path.read_text()).ranks
    if ranks > 1 and "RANK" not in os.environ:
        return run_on_ranks(path, ranks)
    done = run(path)
    if os.environ.get("RANK", "0") == "0":
        Path("snippets.json").write_text(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.path.pop(0)  # tests/: a page sees what a user's script sees
    sys.exit(main(Path(sys.argv[1]).resolve()))
