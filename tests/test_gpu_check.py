"""bench/gpu_check.sh and `bench gpu` as far as they run without a GPU: the script over a stub of
Python, the benchmark over stubs of what asks the device."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import typer

from bench import contestants, goals, gpu, gpu_step, workloads
from tests import gpu_sanitize

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu_check.sh"

PARTS = [
    "device",
    "build",
    "install",
    "fusedopt",
    "gpu-tests",
    "memcheck",
    "racecheck",
    "tests",
    "benchmark",
]

# Fails, or hangs, for the one command that $FAIL or $HANG names; $MISSING cannot be imported.
STUB_PYTHON = """#!/bin/sh
echo "called with: $*"
[ -n "$MISSING" ] && case "$*" in "-c import $MISSING") exit 1;; esac
[ -n "$HANG" ] && case "$*" in *"$HANG"*) sleep 60;; esac
[ -n "$FAIL" ] && case "$*" in *"$FAIL"*) exit 3;; esac
exit 0
"""

# Runs what comes after its options.
STUB_SANITIZER = """#!/bin/sh
while [ "${1#*python}" = "$1" ]; do shift; done
exec "$@"
"""


# bench/gpu_check.sh


def run_check(tmp_path, path=None, script=SCRIPT, **environment):
    """(exit code, summary as [(verdict, name and reason)], the logs' texts by part)."""
    stubs, out = tmp_path / "stubs", tmp_path / "out"
    stubs.mkdir()
    for name, text in (("python-stub", STUB_PYTHON), ("compute-sanitizer", STUB_SANITIZER)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": path or f"{stubs}:{os.environ['PATH']}",
        "PYTHON": str(stubs / "python-stub"),
        **environment,
    }
    done = subprocess.run(
        ["/bin/bash", str(script), str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = (out / "summary.txt").read_text().splitlines()
    assert sorted(done.stdout.splitlines()) == sorted(lines)  # some parts run side by side
    verdicts = []
    for line in lines:
        verdict, seconds, rest = line.split(" ", 2)
        assert int(seconds) < 30
        verdicts.append((verdict, rest))
    logs = {log.stem.split("-", 1)[1]: log.read_text() for log in sorted(out.glob("*.log"))}
    return done.returncode, verdicts, logs


def test_the_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_all_parts_run_and_pass(tmp_path):
    code, verdicts, logs = run_check(tmp_path)
    assert sorted(verdicts) == sorted(("PASS", name) for name in PARTS)  # as they end
    assert code == 0
    assert list(logs) == PARTS
    assert "setup.py build_ext --inplace" in logs["build"]
    assert "tests/test_gpu.py" in logs["gpu-tests"]
    assert "tests/gpu_sanitize.py" in logs["memcheck"]
    assert "tests/test_gpu_graphs.py" in logs["gpu-tests"]
    assert "test_gpu_check.py" not in logs["gpu-tests"]
    assert "--ignore=tests/test_gpu.py" in logs["tests"]
    assert f"--output {tmp_path}/out/step-gpu.json" in logs["benchmark"]


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("setup.py", "build"),
        ("-m pip", "install"),
        ("-m fusedopt", "fusedopt"),
        ("-rs tests/test_gpu.py", "gpu-tests"),
        ("-m bench", "benchmark"),
        ("--ignore", "tests"),
    ],
)
def test_a_failing_part_stops_no_other(tmp_path, command, part):
    code, verdicts, _ = run_check(tmp_path, FAIL=command)
    assert code == 1
    expected = [("FAIL", f"{n}: exit code 3") if n == part else ("PASS", n) for n in PARTS]
    assert sorted(verdicts) == sorted(expected)


def test_what_the_sanitizer_finds_fails_its_parts(tmp_path):
    code, verdicts, _ = run_check(tmp_path, FAIL="gpu_sanitize")
    assert code == 1
    assert {name for verdict, name in verdicts if verdict == "FAIL"} == {
        "memcheck: exit code 3",
        "racecheck: exit code 3",
    }


def test_a_part_that_hangs_is_stopped(tmp_path):
    short = tmp_path / "gpu_check.sh"
    short.write_text(SCRIPT.read_text().replace("part build 150", "part build 1"))
    code, verdicts, _ = run_check(tmp_path, script=short, HANG="setup.py")
    assert code == 1
    assert verdicts[1] == ("FAIL", "build: stopped after 1 seconds")
    assert {name for verdict, name in verdicts if verdict == "PASS"} == {PARTS[0], *PARTS[2:]}


def test_the_whole_ends_in_time(tmp_path):
    short = tmp_path / "gpu_check.sh"
    short.write_text(SCRIPT.read_text().replace("SECONDS + 470", "SECONDS + 2"))
    start = time.monotonic()
    code, verdicts, _ = run_check(tmp_path, script=short, HANG="setup.py")
    assert time.monotonic() - start < 20
    assert code == 1
    expected = [("FAIL", f"{name}: no time was left") for name in PARTS[2:]]
    assert sorted(verdicts[2:]) == sorted(expected)


def test_a_missing_module_skips_its_test_files(tmp_path):
    code, verdicts, logs = run_check(tmp_path, MISSING="hypothesis")
    assert code == 0
    skipped = [rest for verdict, rest in verdicts if verdict == "SKIP"]
    assert skipped == [
        "tests/test_bad_input.py: hypothesis is missing",
        "tests/test_clip_amp.py: hypothesis is missing",
        "tests/test_layout.py: hypothesis is missing",
    ]
    assert "--ignore=tests/test_layout.py" in logs["tests"]


def test_expecttest_is_needed_by_the_table_of_torch_alone(tmp_path):
    _, verdicts, _ = run_check(tmp_path, MISSING="expecttest")
    skipped = [rest for verdict, rest in verdicts if verdict == "SKIP"]
    assert skipped == ["tests/test_optim_db.py: expecttest is missing"]


def test_without_the_sanitizer_its_parts_are_skipped(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sh", "mkdir", "tee", "timeout", "grep", "env", "sleep"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    code, verdicts, _ = run_check(tmp_path, path=str(tools))
    assert code == 0
    assert [rest for verdict, rest in verdicts if verdict == "SKIP"] == [
        "memcheck: compute-sanitizer is missing",
        "racecheck: compute-sanitizer is missing",
    ]


def test_what_the_sanitizer_runs_is_right_on_the_cpu(capsys):
    gpu_sanitize.main("cpu")
    assert capsys.readouterr().out == "all steps ran\n"


# bench gpu


def run_step(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench", "gpu", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_dry_run_prints_all_workloads_with_their_bytes():
    done = run_step("--dry-run")
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.strip("│\n").split("│")]
        for line in done.stdout.splitlines()
        if line.startswith("│")
    ]
    found = {(row[0], row[3], row[4]): row[5] for row in rows}
    large = {
        ("1b", "float32", "adamw"): "28, 32, 40",
        ("1b", "float32", "sgd"): "20, 24, 32",
        ("1b", "bfloat16", "adamw"): "14, 16, 20",
        ("1b", "bfloat16", "sgd"): "10, 12, 16",
        ("1b", "bfloat16-float32-state", "adamw"): "22, 24, 28",
        ("1b", "bfloat16-float32-state", "sgd"): "14, 16, 20",
    }
    large |= {
        ("10x16.8M", dtype, optimizer): large["1b", dtype, optimizer]
        for dtype in ("float32", "bfloat16")
        for optimizer in ("adamw", "sgd")
    }
    small = {
        (name, "float32", optimizer): large["1b", "float32", optimizer]
        for name in (
            "200x1M",
            "llama-7b-of-8-ranks",
            "1000x1024",
            "10000x64",
            "1860-tiny-1-groups",
            "1860-tiny-465-groups",
        )
        for optimizer in ("adamw", "sgd")
    }
    assert found == {**large, **small}
    assert "contestants: fusedopt, torch-fused, torch-foreach" in done.stdout
    assert "torch-foreach" not in run_step("--dry-run", "--quick").stdout


def test_without_a_gpu_it_says_so(tmp_path):
    output = tmp_path / "out.json"
    done = run_step("--output", str(output))
    assert done.returncode == 1
    assert "an NVIDIA GPU is needed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_short_memory_takes_a_quarter_of_the_large_workload():
    large, small = gpu_step.WORKLOADS["1b"], gpu_step.WORKLOADS["1000x1024"]
    need = workloads.memory_bytes(large, "float32")
    assert need == 36 * large.numel  # 12 params, grads and copies; 16 moments; 8 temporaries
    assert gpu_step.fitting(large, "float32", need) is large
    assert gpu_step.fitting(large, "float32", need - 1).name == "250m"
    assert gpu_step.fitting(large, "bfloat16", need - 1) is large
    assert gpu_step.fitting(small, "float32", 0) is small


class Event:
    """A CUDA event that reads the host's clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def device_stub(monkeypatch):
    """Runs the benchmark on the CPU, on workloads of its sizes' names."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "COPY_ELEMENTS", 1 << 20)
    monkeypatch.setattr(gpu, "missing_device", lambda: "")
    monkeypatch.setattr(gpu, "free_memory", lambda: 1 << 60)
    monkeypatch.setattr(gpu, "describe_gpu", lambda copy: {"name": "none"})
    figures = {"launches": 1, "copies": 0, "device_s": 1e-3}
    monkeypatch.setattr(gpu, "launches_of", lambda step: figures)
    monkeypatch.setattr(gpu, "extra_memory", lambda step: 12)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sizes = {
        name: workloads.Workload(name, ((16,),) * 8, min(workload.groups, 4))
        for name, workload in workloads.gpu_workloads().items()
    }
    monkeypatch.setattr(gpu_step, "WORKLOADS", sizes)


def run_main(*arguments):
    application = typer.Typer()
    application.command()(gpu_step.main)
    application(arguments, standalone_mode=False)


def measured(tmp_path, *arguments):
    output = tmp_path / "out.json"
    arguments = ["--quick", "--repeats", "3", "--output", str(output), *arguments]
    run_main(*arguments)
    return json.loads(output.read_text())


@pytest.mark.usefixtures("device_stub")
def test_the_benchmark_on_a_stub_of_the_device(tmp_path, capsys):
    results = measured(tmp_path)
    rows, floors = results["rows"], results["floors"]
    assert {(f["block"], f["dtype"], f["optimizer"]) for f in floors} == {
        (name, dtype, optimizer)
        for name, (_, dtypes) in gpu_step.BLOCKS.items()
        for dtype in dtypes
        for optimizer in ("adamw", "sgd")
    }
    own = [row for row in rows if row["contestant"] == "fusedopt"]
    assert len(own) == (6 + 4 + 2 + 2 + 2 + 2 + 4) * 2
    for row in own:
        assert len(row["samples_s"]) == len(row["host_samples_s"]) == 3
        assert row["q1_s"] <= row["median_s"] <= row["q3_s"]
        assert 0 < row["host_median_s"] <= row["median_s"] * 1.5
        assert (row["launches"], row["extra_bytes"]) == (1, 12)
        state = "bfloat16" if row["dtype"] == "bfloat16" else "float32"
        assert row["state_dtypes"] == [state]
        if not row["clip"]:
            assert row["ratio_to_no_clip"] == 1
        expected = workloads.bytes_per_param(
            row["optimizer"], row["dtype"], "fused" if row["clip"] else "none"
        )
        assert row["bytes_per_param"] == expected
    many = [row for row in own if row["workload"] == "1860-tiny-465-groups"]
    assert all(row["ratio_to_one_group"] > 0 for row in many)
    assert {row["groups"] for row in many} == {4}
    assert results["machine"]["gpu"] == {"name": "none"}
    assert "of copy" in capsys.readouterr().out


@pytest.mark.usefixtures("device_stub")
def test_a_contestant_that_fails_at_one_size_costs_no_other_its_figures(tmp_path, monkeypatch):
    build = contestants.Contestant.build

    def fails_when_large(self, optimizer, groups, clip, **overrides):
        if self.name == "torch-fused" and clip and len(groups[0]["params"]) == 8:
            raise torch.OutOfMemoryError("no memory is left")
        return build(self, optimizer, groups, clip, **overrides)

    monkeypatch.setattr(contestants.Contestant, "build", fails_when_large)
    results = measured(tmp_path, "--workload", "200x1M", "--optimizer", "sgd")
    found = [(row["contestant"], row["clip"]) for row in results["rows"]]
    assert found == [("fusedopt", False), ("torch-fused", False), ("fusedopt", True)]
    reason = "200x1M float32 sgd, clip: OutOfMemoryError: no memory is left"
    assert results["absent"] == [{"contestant": "torch-fused", "reason": reason}]


@pytest.mark.usefixtures("device_stub")
def test_a_run_that_is_stopped_leaves_the_blocks_that_it_finished(tmp_path, monkeypatch):
    measure, calls = gpu_step.measure, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return measure(*arguments)

    monkeypatch.setattr(gpu_step, "measure", stopped)
    output = tmp_path / "out.json"
    with pytest.raises(MemoryError):
        run_main("--quick", "--optimizer", "sgd", "--dtype", "float32", "--output", str(output))
    floors = json.loads(output.read_text())["floors"]
    assert [floor["block"] for floor in floors] == ["1b", "10x16.8M"]


@pytest.mark.usefixtures("device_stub")
def test_what_does_not_fit_the_device_is_skipped_with_the_reason(tmp_path, monkeypatch, capsys):
    sizes = workloads.gpu_workloads()
    for name in ("200x1M", "llama-7b-of-8-ranks"):
        monkeypatch.setitem(gpu_step.WORKLOADS, name, sizes[name])
    need = workloads.memory_bytes(sizes["200x1M"], "float32")
    monkeypatch.setattr(gpu, "free_memory", lambda: need - 1)
    names = ("--workload", "groups", "--workload", "llama-7b-of-8-ranks")
    results = measured(tmp_path, *names, "--optimizer", "sgd")
    reason = "needs 28 GiB of device memory in float32"
    assert results["skipped"] == [{"workload": "llama-7b-of-8-ranks", "reason": reason}]
    assert [floor["block"] for floor in results["floors"]] == ["groups"]
    assert f"skipped: llama-7b-of-8-ranks: {reason}" in capsys.readouterr().out


@pytest.mark.usefixtures("device_stub")
def test_a_compiled_step_is_compiled_for_the_shared_moments_alone(monkeypatch):
    compiled, graphs = contestants.compiled, []

    def counting(step):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        return compiled(step)

    monkeypatch.setattr(contestants, "compiled", counting)
    workload = workloads.Workload("x", ((16,),) * 8)
    torch.compiler.reset()
    for name in ("adamw", "sgd"):
        entries = [(contestants.CONTESTANTS["torch-compiled"], False, 0.0)]
        lanes, failed = gpu_step.build_lanes(workload, "float32", name, entries, 0.001)
        assert failed == []
        assert [lane.key["contestant"] for lane in lanes] == ["torch-compiled"]
    assert len(graphs) == 2


def test_gpu_goals_name_the_workloads_and_their_bounds():
    sizes = workloads.gpu_workloads()
    for goal in goals.GPU_GOALS:
        assert sizes[goal.where["workload"]].numel == goal.where["numel"]
        assert goal.figure in goals.FIGURES
        value = goal.at_least if goal.at_least is not None else goal.at_most
        row = {"contestant": "fusedopt", **goal.where, goal.figure: value}
        assert [judged["met"] for judged in goals.evaluate([row], [goal])] == [True]
    assert {name: len(sizes[name].shapes) for name in goals.GPU_TENSORS} == goals.GPU_TENSORS
    hosts = {g.where["workload"]: g.at_most for g in goals.GPU_GOALS if g.figure == "host_median_s"}
    assert hosts["1000x1024"] == pytest.approx(380e-6)
