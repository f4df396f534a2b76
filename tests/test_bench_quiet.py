"""bench/: what it prints and where it writes: nothing on stderr, nobody listed twice, no file that
git tracks."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench import cli, contestants, machine, plot, progress, report, tables
from bench.quiet import quiet

ROOT = Path(__file__).resolve().parents[1]
BENCH = [sys.executable, "-m", "bench"]


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the bench/ in `folder`, without a setting of the profiler from outside."""
    clean = {name: text for name, text in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run(
        [*BENCH, *arguments],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# What is printed


def test_a_quick_run_prints_nothing_on_stderr_and_lists_each_absentee_once(tmp_path: Path) -> None:
    """The profiler runs for each contestant; torch's optimizers refuse two of the four blocks."""
    output = str(tmp_path / "out.json")
    dtypes = ["--dtype", "float32", "--dtype", "bfloat16-float32-state"]
    done = run(ROOT, "step", "--quick", "--workload", "1000x64x64", *dtypes, "--output", output)
    assert done.stderr == ""
    listed = Counter(re.findall(r"^absent: ([\w-]+): ", done.stdout, re.M))
    assert {"apex", "torch-compiled", "torch-fused"} <= set(listed)
    assert set(listed.values()) == {1}
    (line,) = (line for line in done.stdout.splitlines() if "absent: torch-fused" in line)
    assert "adamw bfloat16-float32-state: " in line
    assert "sgd bfloat16-float32-state: " in line
    assert done.stdout.rstrip().endswith(f"written: {output}")


def test_a_run_without_a_terminal_tells_how_far_it_is(tmp_path: Path) -> None:
    arguments = ["--workload", "300-tiny-1-groups", "--contestant", "fusedopt"]
    output = ["--output", str(tmp_path / "out.json")]
    done = run(ROOT, "host", "--quick", "--dtype", "float32", *arguments, *output)
    assert done.stderr == ""
    assert re.findall(r"^float32 (\w+): 4 of 4 in \d+ s$", done.stdout, re.M) == ["adamw", "sgd"]


def test_long_blocks_are_told_of_before_they_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(0, 1000, 7))  # a round of 7 s, two readings of the clock where it is said
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    assert list(progress.Log().track(range(8), "block")) == list(range(8))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [
        "block: 4 of 8",
        "block: 8 of 8",
    ]


class Loud:
    """An optimizer whose import and steps print, by Python, by C and by another process."""

    def __init__(self) -> None:
        print("told by Python")
        print("warned by Python", file=sys.stderr)
        os.write(1, b"told by C\n")
        os.write(2, b"warned by C\n")
        subprocess.run(["sh", "-c", "echo told by a process; echo warned by it >&2"], check=True)
        logging.getLogger("loud").warning("logged")


def test_what_others_print_is_discarded_and_what_is_ours_is_not(
    capfd: pytest.CaptureFixture[str],
) -> None:
    print("before")
    with quiet():
        Loud()
    print("after")
    assert capfd.readouterr() == ("before\nafter\n", "")
    with pytest.raises(ValueError, match="told"), quiet():
        raise ValueError("told")
    print("still there")
    assert capfd.readouterr().out == "still there\n"


def test_a_contestant_is_hushed_at_its_import_and_first_step(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    load = contestants.Contestant.load

    def loud(self: contestants.Contestant, optimizer: str) -> type:
        Loud()
        return load(self, optimizer)

    monkeypatch.setattr(contestants.Contestant, "load", loud)
    present, _ = contestants.present_and_absent(["torch-fused"], ["sgd"])
    contestants.admit(present, "sgd", "float32")
    assert capfd.readouterr() == ("", "")
    present, _ = contestants.present_and_absent(["fusedopt"], ["sgd"])
    assert "warned by C" in capfd.readouterr().err


def test_reasons_of_one_contestant_stand_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = [("a", "has no sgd"), ("b", "[not] there"), ("a", "x" * 150), ("a", "has no sgd")]
    report.print_absent([{"contestant": name, "reason": reason} for name, reason in found])
    assert capsys.readouterr().out.splitlines() == [
        f"absent: a: has no sgd; {'x' * 150}",
        "absent: b: [not] there",
    ]


@pytest.mark.parametrize("command", ["step", "host", "memory"])
def test_a_run_without_any_contestant_says_why(command: str, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out.json")]
    done = subprocess.run(
        [*BENCH, command, "--quick", "--contestant", "apex", *output],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.count("absent: apex: does not run on a cpu") == 1
    assert done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="sends a signal of POSIX")
def test_an_interrupted_run_says_so_without_a_traceback(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    with subprocess.Popen(
        [*BENCH, "step", "--workload", "1000x64x64", "--dtype", "float32", "--repeats", "100000",
         "--contestant", "fusedopt", "--contestant", "apex", "--output", str(output)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # Python leaves SIGINT ignored where it was started so, as in a shell's background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline().startswith("absent: apex: ")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr == "interrupted: results are written at the end of a run alone\n"
    assert not output.exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    script = "import runpy, sys; sys.modules['typer'] = None; "
    script += "runpy.run_module('bench', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("bench: import of typer halted; ")
    assert done.stderr.endswith("pip install matplotlib numpy rich typer\n")


# Where it is written


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with bench/ and all that it may write to, committed."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("bench", "docs", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    identity = ["-c", "user.name=somebody", "-c", "user.email=nobody@example.com"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def changed(folder: Path) -> list[str]:
    """Files that git tracks and that differ from the commit, and new ones that it would track."""
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True
    )
    return sorted(line[3:] for line in status.stdout.splitlines())


HOST = ["--workload", "300-tiny-1-groups", "--variant", "steady", "--dtype", "float32"]
HOST += ["--optimizer", "sgd", "--contestant", "fusedopt", "--repeats", "1"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_no_command_writes_into_tracked_files_unless_asked(copy: Path) -> None:
    # Results, pictures and tables other than those of the documents.
    results = copy / "bench/results/step-cpu.json"
    data = json.loads(results.read_text())
    for row in data["rows"]:
        row["median_s"] *= 2
    other = copy / "runs/other"
    other.mkdir(parents=True)
    for path in (copy / "bench/results").iterdir():
        shutil.copy(path, other)

    done = run(copy, "host", *HOST)
    assert "written: runs/host-cpu.json" in done.stdout
    assert changed(copy) == []
    done = run(copy, "host", "--quick", *HOST)
    assert "written: runs/host-cpu-quick.json" in done.stdout
    run(copy, "plot", "--results", str(other))
    drawn = sorted(path.stem for path in (copy / "runs/figures").iterdir())
    assert drawn == sorted(n for n, (file, _) in plot.PICTURES.items() if (other / file).exists())
    assert changed(copy) == []

    results.write_text(json.dumps(data))
    printed = run(copy, "tables").stdout
    assert changed(copy) == ["bench/results/step-cpu.json"]
    written = run(copy, "tables", "--write").stdout.split()[1::2]
    assert written == list(tables.BLOCKS)
    documents = [path for path in changed(copy) if not path.startswith("bench/")]
    assert set(documents) <= set(written)
    added = subprocess.run(
        ["git", "diff", "-U0", *documents], cwd=copy, capture_output=True, text=True, check=True
    )
    lines = [line[1:] for line in added.stdout.splitlines() if line.startswith("+|")]
    assert lines
    assert all(line in printed.splitlines() for line in lines)
    run(copy, "plot", "--out", "docs/figures")
    pictures = [path for path in changed(copy) if path.startswith("docs/figures/")]
    assert {*changed(copy)} == {"bench/results/step-cpu.json", *documents, *pictures}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["step-cpu", "clip-cpu", "host-cpu", "memory-cpu", "step-gpu"])
def test_results_go_to_a_folder_that_git_ignores(name: str, quick: bool) -> None:
    path = cli.prepare(name, None, None, quick)
    assert path.is_relative_to(machine.ROOT / "runs")
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()
    assert cli.prepare(name, Path("x.json"), None, quick) == Path("x.json")


def test_the_script_of_the_figures_asks_for_the_files_of_the_documents() -> None:
    """It runs for an hour: what it passes is read here."""
    script = (ROOT / "bench/figures.sh").read_text().replace("\\\n", "")
    commands = re.findall(r"^(?:[A-Z_]+=\S+ )*bench (\w+)(.*)$", script, re.M)
    assert len(commands) > 8
    for command, arguments in commands:
        wanted = {"plot": "--out docs/figures", "tables": "--write"}
        assert wanted.get(command, "--output $results/") in arguments, command


def test_a_folder_without_results_is_an_error_and_a_missing_file_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run(
        [*BENCH, "plot", "--results", str(tmp_path), "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "has none of step-cpu-models.json" in done.stderr
    assert list(tmp_path.iterdir()) == []
    shutil.copy(ROOT / "bench/results/host-cpu.json", tmp_path)
    plot.main(tmp_path, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"written: {tmp_path / 'out/groups.png'}"
    assert "no step-cpu-sweep.json: left out roofline, tensors" in lines
    assert len(lines) == len(set(lines)) == 5
