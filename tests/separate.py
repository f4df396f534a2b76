"""Runs tests in a process of their own, for what must be set up before fusedopt is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import coverage

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys, pytest
import fusedopt._native as native
{check}
sys.exit(pytest.main(sys.argv[1:]))
"""


def run_tests(
    site: Path,
    *arguments: str,
    check: str = "",
    measured: bool = False,
    **environment: str,
) -> str:
    """Runs pytest in the folder `site`, which is first on the path; returns the output.

    Args:
        check: Python code that fails where the process is not what it should be.
        measured: the lines that the tests run count as covered by this process's tests.
    """
    command = [sys.executable]
    if measured and coverage.Coverage.current() is not None:
        command += ["-m", "coverage", "run", "--parallel-mode", "--source=fusedopt"]
        command.append(f"--data-file={ROOT / '.coverage'}")
        command += ["-m", "pytest"]
    else:
        command += ["-c", SCRIPT.format(check=check)]
    command += ["-q", "-p", "no:cacheprovider", "-p", "no:cov"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def passed(output: str) -> int:
    """How many tests passed, by pytest's last line."""
    return int(output.rpartition(" passed")[0].split()[-1])
