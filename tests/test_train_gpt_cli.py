"""examples/train_gpt.py as a program: what it says on the way, and to whom uses it wrongly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import gpt_load  # noqa: E402
import gpt_progress  # noqa: E402
import train_gpt  # noqa: E402
from rich.console import Console  # noqa: E402

SHORT = ("--steps", "6", "--batch-size", "2", "--compare-steps", "2", "--checkpoint-every", "2")
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"}


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLES / "train_gpt.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(*arguments: str | Path) -> tuple[int, str]:
    """The exit code, and all that the program says."""
    process = start(*arguments)
    said, _ = process.communicate()
    return process.returncode, said


@pytest.mark.slow
def test_run_again_keeps_the_checkpoint_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, said = run("--out", out, *SHORT)
    assert code == 0, said
    lines = said.splitlines()
    assert any(re.match(r"torch.optim: step 1 of 2, \d+ s left  loss 5", line) for line in lines)
    assert any(re.match(r"fusedopt: step 1 of 6, \d+ s left  loss 5", line) for line in lines)
    assert any(line.startswith("fusedopt: step 6 of 6, 0 s left") for line in lines)
    report = json.loads((out / "report.json").read_text())
    threads = report["machine"]["torch_threads"]
    assert f"{threads} threads on {os.cpu_count()} cores, OMP_WAIT_POLICY passive" in said
    assert "torch.optim.AdamW(fused=True) + clip_grad_norm_" in said
    low, high = report["comparison"]["ratio_quartiles"]
    assert f"(quartiles {low:.2f} to {high:.2f})" in said
    for name, (first, third) in report["comparison"]["quartiles_ms"].items():
        assert min(report["comparison"]["interleaved_ms"][name]) <= first < third

    written = {path: path.read_bytes() for path in out.iterdir()}
    code, said = run("--out", out, *SHORT)
    assert code == 2
    assert "is of an earlier run" in said
    assert "--resume goes on from it, --overwrite starts anew" in said
    assert {path: path.read_bytes() for path in out.iterdir()} == written
    train_gpt.check_out(out, True)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False, True])
def test_interrupted_run_says_how_to_go_on(tmp_path: Path, saved: bool) -> None:
    process = start("--out", tmp_path, *SHORT[2:], "--steps", "100000")
    assert process.stdout is not None
    awaited = "fusedopt: step" if saved else "Python's standard library"
    for line in process.stdout:
        if awaited in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert re.search(r"interrupted at step \d+ of 100000", said)
    assert "Traceback" not in said
    if not (tmp_path / "checkpoint.pt").exists():
        assert not saved
        assert "nothing is saved of this run yet" in said
    elif saved:
        assert f"{tmp_path / 'checkpoint.pt'} holds the last checkpoint" in said
        assert "--resume" in said


def test_wrong_device() -> None:
    for device in ("gpu", "cuda:", "cuda:x", "CPU", "mps", ""):
        with pytest.raises(
            typer.BadParameter, match=rf"must be cpu, cuda or cuda:N, got '{device}'"
        ):
            train_gpt.check_device(device)
    train_gpt.check_device("cpu")
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:0"):
            with pytest.raises(typer.BadParameter, match=r"torch .* --device cpu"):
                train_gpt.check_device(device)


def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    train_gpt.check_device("cuda:1")
    with pytest.raises(typer.BadParameter, match="got cuda:2, and the last GPU here is cuda:1"):
        train_gpt.check_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(typer.BadParameter, match="no usable GPU here"):
        train_gpt.check_device("cuda")


def test_wrong_out(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(typer.BadParameter, match="it is a file") as error:
        train_gpt.check_out(file, True)
    assert error.value.param_hint == "--out"
    with pytest.raises(typer.BadParameter, match="Not a directory"):
        train_gpt.check_out(file / "below", True)
    with pytest.raises(typer.BadParameter, match="cannot be the folder of a run"):
        train_gpt.check_out(Path("/proc/nothing"), True)
    assert file.read_text() == "kept"
    train_gpt.check_out(tmp_path / "new" / "deep", False)
    assert list((tmp_path / "new" / "deep").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_resume_from_what_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(typer.BadParameter, match="is not a whole checkpoint") as error:
        train_gpt.main(tmp_path, steps=2, resume=True)
    assert error.value.param_hint == "--resume"
    assert (tmp_path / "checkpoint.pt").read_bytes() == content


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(2)])
def test_resume_from_the_checkpoint_of_another_program(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(typer.BadParameter, match="not a checkpoint of this program"):
        train_gpt.main(tmp_path, steps=2, resume=True)


def test_progress_on_a_terminal_is_a_bar_with_the_time_left(tmp_path: Path) -> None:
    with open(tmp_path / "terminal", "w+") as file:
        console = Console(file=file, force_terminal=True, width=120, legacy_windows=False)
        with gpt_progress.StepProgress(console, "training", 100, 0) as progress:
            for step in (25, 50):
                time.sleep(0.15)
                progress.update(step, "loss 3.5")
            progress.print("a line")
        file.seek(0)
        said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.read())
    assert re.search(r"training .*50/100 0\d:\d\d loss 3.5", said)
    assert "step 50 of" not in said
    assert "a line" in said


def test_progress_elsewhere_is_a_line_now_and_then(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w+") as file:
        console = Console(file=file, width=20)
        with gpt_progress.StepProgress(console, "training", 100, 10) as progress:
            progress.started = time.perf_counter() - 30.0  # as if the first step took so long
            progress.update(11, "loss 3.5")
            progress.update(12, "loss 3.4")
            progress.update(100, "loss 1.0")
        file.seek(0)
        said = file.read().splitlines()
    first, last = said
    assert re.fullmatch(r"training: step 11 of 100, 267\d s left  loss 3.5", first)
    assert last == "training: step 100 of 100, 0 s left  loss 1.0"


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="reads /proc/stat")
def test_load_tells_other_processes_apart() -> None:
    load = gpt_load.Load()
    spin = "import time\nend = time.perf_counter() + 1.0\nwhile time.perf_counter() < end: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    figures = load.figures()
    assert figures["cores_busy"] < 0.5  # it waits
    assert figures["cores_busy_elsewhere"] > 0.4
