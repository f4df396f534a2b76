"""Every snippet of the documentation runs, and every command in it exists."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from bench.__main__ import app
from fusedopt import __main__ as report
from tests import docs_snippets

ROOT = Path(__file__).parent.parent
# CONTRIBUTING.md has a test of its own, tests/test_docs_contributing.py.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
PARSED = {name: docs_snippets.parse(text) for name, text in TEXTS.items()}
RUNNABLE = [name for name, page in PARSED.items() if any(docs_snippets.runnable(page))]

# Frameworks that the environment of the tests does not have. Their snippets run where they are.
ELSEWHERE = {
    *("fastai", "hydra", "ignite", "jsonargparse", "omegaconf", "opacus", "skorch"),
    *("stable_baselines3", "timm"),
}
# What nothing here can run: parts of other programs' own files.
NOT_RUN = {"docs/frameworks.md": 4}


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_snippets_of_a_page(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests/docs_snippets.py", ROOT / name],
        cwd=tmp_path,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ran = json.loads((tmp_path / "snippets.json").read_text())
    assert ran == [snippet.line for snippet in docs_snippets.runnable(PARSED[name])]
    missing = {m for snippet in PARSED[name].snippets for m in docs_snippets.missing(snippet)}
    if missing - ELSEWHERE:
        pytest.skip(f"the rest ran, but {', '.join(missing - ELSEWHERE)} is not installed")


def test_few_snippets_do_not_run() -> None:
    counts = {}
    for name, page in PARSED.items():
        left_out = [s.not_run for s in page.snippets if s.not_run]
        assert all(len(reason) > 20 for reason in left_out), left_out
        if left_out:
            counts[name] = len(left_out)
    assert counts == NOT_RUN
    needed = {name for page in PARSED.values() for s in page.snippets for name in s.needs}
    assert needed >= ELSEWHERE  # nothing is excused that no page needs


def test_every_fence_says_what_it_is() -> None:
    """What is not executed is a command, which is checked below, a file, or an output."""
    for name, page in PARSED.items():
        for snippet in page.snippets:
            executed = snippet.language in docs_snippets.PYTHON or snippet.file or snippet.not_run
            assert executed or snippet.language in ("sh", "text"), f"{name}:{snippet.line}"
        fences = TEXTS[name].count("```")
        assert fences == 2 * sum(s.language != "hidden" for s in page.snippets), name


def commands(name: str) -> list[str]:
    """The commands of a page's sh fences, and those that stand in code spans of its text."""
    lines = []
    for snippet in PARSED[name].snippets:
        if snippet.language == "sh" and not snippet.not_run:
            lines += snippet.code.replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```|<!--.*?-->", "", TEXTS[name], flags=re.S)
    spans = re.findall(r"`([^`]+)`", prose)
    lines += [s for s in spans if re.match(r"([A-Z_]+=\S+ )*(make|python -m|pip install) ", s)]
    return [" ".join(line.split()) for line in lines if line.strip()]


def extras() -> set[str]:
    (section,) = re.findall(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(),
        re.M | re.S,
    )  # fmt: skip
    return set(re.findall(r"^(\w+) = ", section, re.M))


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        variable, assigned, _ = word.partition("=")
        if assigned:
            assert f"$({variable})" in makefile, word
        else:
            assert re.search(rf"^{word}(?: [\w-]+)*:(?!=)", makefile, re.M), word


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    packages = {w.partition("==")[0] for w in (ROOT / "constraints.txt").read_text().split("\n")}
    for word in words[1:]:
        match = re.fullmatch(r"(\.|fusedopt|dist/[\w.*-]+\.whl)(?:\[([\w,]+)\])?", word)
        if match is None:
            assert word.startswith("-") or word in packages, word
        elif match[2]:
            assert set(match[2].split(",")) <= extras(), word


def check_module(module: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if module == "fusedopt":
        with pytest.raises(SystemExit):
            report.main(["--help"])
        known = capsys.readouterr().out
    elif module == "bench":
        command = typer.main.get_command(app)
        if words and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
        known = " ".join(option for p in command.params for option in p.opts)
    else:
        assert importlib.util.find_spec(module), module
        return
    for word in words:
        assert not word.startswith("--") or word in known.split() or f"[{word}]" in known, word


def check_command(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.S):
        variable = words.pop(0).partition("=")[0]
        assert f"`{variable}`" in TEXTS["docs/environment.md"], variable
    if not words:
        return
    program, *words = words
    if program == "make":
        check_make(words)
    elif program == "pip":
        check_pip(words)
    elif program == "python" and words[0] == "-m":
        check_module(words[1], words[2:], capsys)
    elif program in ("python", "torchrun"):
        (script,) = (word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file(), script
    else:
        raise AssertionError(f"not a command of this project: {line}")


@pytest.mark.parametrize("name", [name for name in PARSED if commands(name)])
def test_the_commands_of_a_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands(name):
        try:
            check_command(line, capsys)
        except (AssertionError, KeyError, ValueError) as error:
            raise AssertionError(f"{name}: `{line}`: {error}") from error


@pytest.mark.parametrize(
    "line",
    [
        *("make trian", "make test-torch TORCHES=2.9.1", "pip install fusedopt[gpu]"),
        *("python -m fusedopt --jsn", "python -m bench stp", "python -m bench step --quik"),
        *("FUSEDOPT_BACKENDS=cpu python -m fusedopt", "python examples/no.py", "cmake ."),
    ],
)
def test_a_wrong_command_is_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        check_command(line, capsys)


BROKEN = """# A page

<!-- python
value = 1
-->

```python
value += 1
```

<!-- python
value = 2
-->

```diff
-value = value.upper()
+value = value + 1
 assert value == 3
```
"""


def test_a_broken_snippet_is_found_with_its_line(tmp_path: Path) -> None:
    def run(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "page.md").write_text(text)
        command = [sys.executable, ROOT / "tests/docs_snippets.py", "page.md"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    broken = run(BROKEN)
    assert broken.returncode == 1
    assert 'page.md", line 16' in broken.stderr
    assert "has no attribute 'upper'" in broken.stderr
    mended = run(BROKEN.replace("value.upper()", "value + 1"))
    assert mended.returncode == 0, mended.stderr
    assert json.loads((tmp_path / "snippets.json").read_text()) == [4, 8, 12, 16]
