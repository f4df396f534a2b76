"""examples/train_gpt.py: a run, its report, and that a killed run continues bitwise."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import gpt_data  # noqa: E402
import gpt_trainer  # noqa: E402
import train_gpt  # noqa: E402
from gpt_model import GPT, SIZES, param_groups, rotary_table  # noqa: E402

import fusedopt  # noqa: E402

STEPS = 36
COMPARED = 12
COMMAND = (
    *(sys.executable, str(EXAMPLES / "train_gpt.py")),
    *("--steps", str(STEPS), "--batch-size", "2", "--compare-steps", str(COMPARED)),
    *("--checkpoint-every", "2", "--seed", "7"),
)
# Sleeping instead of spinning threads: beside other work spinning makes a run many times slower.
ENVIRONMENT = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(part) for part in (*COMMAND, *arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def assert_bitwise_equal(actual: object, expected: object, where: str = "checkpoint") -> None:
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            if not str(key).endswith("_ms"):  # timings differ
                assert_bitwise_equal(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_bitwise_equal(a, b, f"{where}[{i}]")
    else:
        assert actual == expected, where


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    finished = run("--out", out)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return out


@pytest.mark.slow
def test_run_writes_its_report(undisturbed: Path) -> None:
    assert (undisturbed / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = json.loads((undisturbed / "report.json").read_text())
    comparison, training = report["comparison"], report["training"]
    assert report["options"]["seed"] == 7
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["torch_threads"] >= 1
    assert training["optimizer"] == "fusedopt.FusedAdamW"
    assert comparison["reference"]["optimizer"].startswith("torch.optim.AdamW")
    for history, steps in ((training, STEPS), (comparison["reference"], COMPARED)):
        for key in ("loss", "step_ms", "optimizer_ms"):
            assert len(history[key]) == steps
        timings = zip(history["optimizer_ms"], history["step_ms"], strict=True)
        assert all(0 < optimizer < step for optimizer, step in timings)
    differences = np.abs(np.subtract(comparison["reference"]["loss"], training["loss"][:COMPARED]))
    assert comparison["largest_loss_difference"] == pytest.approx(differences.max(), rel=1e-6)
    assert differences.max() <= 1e-3
    assert training["loss"][0] > 5  # of 256 equally likely bytes: 5.5
    assert training["validation"][-1][0] == STEPS
    assert training["validation"][-1][1] < 3.2
    medians = {name: np.median(ms) for name, ms in comparison["interleaved_ms"].items()}
    assert comparison["ratio"] == pytest.approx(medians["torch"] / medians["fusedopt"])
    assert report["sample"].startswith("def ")


@pytest.mark.slow
def test_checkpoint_holds_plain_values(undisturbed: Path) -> None:
    state = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    assert state["step"] == STEPS
    assert len(state["history"]["loss"]) == STEPS
    model = GPT(SIZES["tiny"])
    model.load_state_dict(state["model"])
    torch.optim.AdamW(param_groups(model, 0.1)).load_state_dict(state["optimizer"])
    assert not list(undisturbed.glob("*.tmp"))


def kill_after_checkpoints(out: Path, count: int, delay: float, *arguments: str) -> None:
    """Start a run and send SIGKILL ``delay`` seconds after its ``count``-th checkpoint."""
    path = out / "checkpoint.pt"

    def version() -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    seen = version()
    command = [*COMMAND, "--out", str(out), *arguments]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        while count and process.poll() is None:
            time.sleep(0.001)
            if version() != seen:
                seen = version()
                count -= 1
        time.sleep(delay)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.mark.slow
def test_killed_run_resumes_bitwise(undisturbed: Path, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("kill moments drawn from", seed)  # shown when the test fails
    moments = random.Random(seed)
    path = tmp_path / "checkpoint.pt"
    kill_after_checkpoints(tmp_path, moments.randint(2, 9), moments.uniform(0, 0.1))
    kill_after_checkpoints(tmp_path, moments.randint(1, 4), moments.uniform(0, 0.1), "--resume")
    assert 0 < torch.load(path, weights_only=True)["step"] < STEPS
    # A checkpoint that was being written when its writer died.
    path.with_name("checkpoint.pt.tmp").write_bytes(path.read_bytes()[:1000])
    finished = run("--out", tmp_path, "--resume")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "resuming at step" in finished.stdout
    expected = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    assert_bitwise_equal(torch.load(path, weights_only=True), expected)
    sample = json.loads((tmp_path / "report.json").read_text())["sample"]
    assert sample == json.loads((undisturbed / "report.json").read_text())["sample"]


@pytest.mark.slow
def test_sgd_run(tmp_path: Path) -> None:
    finished = run("--out", tmp_path, "--optimizer", "sgd", "--steps", "12")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["training"]["optimizer"] == "fusedopt.FusedSGD"
    assert report["comparison"]["largest_loss_difference"] <= 1e-3
    assert report["training"]["validation"][-1][1] < 4.5
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]
    momentum = saved["param_groups"][0]["momentum"]
    assert momentum == pytest.approx(0.95, abs=5e-3)  # cycled: the constructor was given 0.9


class CalledOps(TorchDispatchMode):
    """The names of the ATen ops that were called on or returned more than one element."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        if any(t.numel() > 1 for t in tensors):
            self.names.add(op.overloadpacket.__name__.rstrip("_"))
        return result


@pytest.mark.usefixtures("short_tail")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_no_number_of_a_run_comes_from_an_op_whose_first_call_can_be_inexact(
    optimizer: str,
) -> None:
    """The first call in a process of a function of MKL's vector library can be inexact
    (pytorch#188792): a resumed run would differ from an undisturbed one, once in many times."""
    options = gpt_trainer.Options("tiny", "cpu", "float32", optimizer, 4, 2, 0, 0)
    corpus = gpt_data.load_corpus()
    with CalledOps() as called:
        trainer = gpt_trainer.Trainer(options, corpus)
        trainer.train_step()
        trainer.validate()
        trainer.read()
    assert {"normal", "native_layer_norm", "native_layer_norm_backward"} <= called.names
    vector_library = (
        "acos acosh asin asinh atan atanh cos cosh erf erfc erfinv exp exp2 expm1 lgamma log log10 "
        "log1p log2 sin sinh sqrt tan tanh trunc"
    )
    inexact = called.names & set(vector_library.split())
    assert not inexact


def test_rotary_table_is_exact() -> None:
    for config in (SIZES["tiny"], SIZES["small"]):
        half = config.width // config.heads // 2
        cos, sin = rotary_table(config)
        assert cos.dtype == sin.dtype == torch.float32
        assert cos.shape == sin.shape == (config.context, half)
        angles = [[p * 10000.0 ** -(i / half) for i in range(half)] for p in range(config.context)]
        for table, function in ((cos, math.cos), (sin, math.sin)):
            exact = np.array([[function(a) for a in row] for row in angles])
            assert np.abs(table.double().numpy() - exact).max() <= 2**-24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_run(tmp_path: Path) -> None:
    finished = run("--out", tmp_path, "--device", "cuda")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["machine"]["gpu"] == torch.cuda.get_device_name()
    assert report["comparison"]["largest_loss_difference"] <= 1e-3


KILL_WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from gpt_trainer import load_checkpoint, save_checkpoint
torch.set_num_threads(1)  # a forked child has none of its parent's threads
path, moments = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
save_checkpoint(path, {"value": 0, "tensor": torch.zeros(300_000)})
for _ in range(40):
    writer = os.fork()
    for value in range(10**9 if writer == 0 else 0):
        save_checkpoint(path, {"value": value, "tensor": torch.full((300_000,), float(value))})
    time.sleep(moments.uniform(0, 0.03))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    state = load_checkpoint(path)
    assert state["tensor"].eq(state["value"]).all()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its writers")
def test_checkpoint_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("kill moments drawn from", seed)
    command = [sys.executable, "-c", KILL_WRITERS, str(tmp_path / "checkpoint.pt"), str(seed)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(EXAMPLES)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    path = tmp_path / "checkpoint.pt"
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append(("replace", os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    gpt_trainer.write_aside(path, lambda file: file.write(b"few enough to stay in a buffer"))
    assert calls == [("fsync", 30), ("replace", 30)]


@pytest.fixture
def short_tail(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make what surrounds the training steps cheap, and the steps insensitive to other load."""
    monkeypatch.setattr(train_gpt, "SAMPLE_BYTES", 1)
    monkeypatch.setattr(train_gpt, "INTERLEAVED_ROUNDS", 2)
    monkeypatch.setattr(gpt_trainer, "VALIDATION_WINDOWS", gpt_trainer.VALIDATION_BATCH)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("short_tail")
def test_exits_with_1_when_the_curves_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(fusedopt.FusedAdamW):
        def __init__(self, params: list, lr: float, **options: object) -> None:
            super().__init__(params, lr=lr * 1.02, **options)

    monkeypatch.setattr(fusedopt, "FusedAdamW", Wrong)
    with pytest.raises(typer.Exit) as end:
        train_gpt.main(tmp_path, steps=6, compare_steps=6, batch_size=2)
    assert end.value.exit_code == 1
    assert (tmp_path / "report.json").exists()


@pytest.mark.usefixtures("short_tail")
def test_bfloat16_without_comparison_and_refusal_to_resume_another_run(tmp_path: Path) -> None:
    train_gpt.main(tmp_path, dtype="bfloat16", steps=2, compare_steps=0, batch_size=2)
    state = gpt_trainer.load_checkpoint(tmp_path / "checkpoint.pt")
    assert {p.dtype for p in state["model"].values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "report.json").read_text())["comparison"] is None
    with pytest.raises(typer.BadParameter, match=r"dtype='bfloat16'.*dtype='float32'"):
        train_gpt.main(tmp_path, steps=2, compare_steps=0, batch_size=2, resume=True)


def test_param_groups_split_every_param_once() -> None:
    model = GPT(SIZES["tiny"])
    decayed, others = param_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(param): name for name, param in model.named_parameters()}
    listed = [names[id(p)] for p in (*decayed["params"], *others["params"])]
    assert sorted(listed) == sorted(names.values())
    linear = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert {names[id(p)] for p in decayed["params"]} == linear
    assert len(linear) == 4 * SIZES["tiny"].layers


def test_batch_is_a_function_of_seed_and_step() -> None:
    data = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
    x, y = gpt_data.batch(data, 3, 5, 4, 16)
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    text = data.tobytes()
    assert all(bytes([*a.tolist(), b[-1]]) in text for a, b in zip(x, y.tolist(), strict=True))
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert torch.equal(gpt_data.batch(data, 3, 5, 4, 16)[0], x)
    assert not torch.equal(gpt_data.batch(data, 3, 6, 4, 16)[0], x)
    assert not torch.equal(gpt_data.batch(data, 4, 5, 4, 16)[0], x)


def test_windows_reach_both_ends_of_the_data() -> None:
    data = np.arange(18, dtype=np.uint8)
    drawn = {gpt_data.batch(data, 0, k, 1, 16)[0][0, 0].item() for k in range(50)}
    assert drawn == {0, 1}
    (x, y), *_ = gpt_data.validation_batches(data, 1, 2, 16)
    assert (x[0, 0], y[-1, -1]) == (0, 17)


def test_corpus_is_sorted_and_holds_whole_files_out(tmp_path: Path) -> None:
    for i in reversed(range(32)):
        (tmp_path / f"m{i:02d}.py").write_text(f"{i:02d}\n")
    (tmp_path / "_sysconfigdata_x.py").write_text("a path of this machine\n")
    corpus = gpt_data.load_corpus(tmp_path)
    assert corpus.files == 32
    assert corpus.validation.tobytes() == b"15\n31\n"
    kept = [i for i in range(32) if i not in (15, 31)]
    assert corpus.train.tobytes() == b"".join(f"{i:02d}\n".encode() for i in kept)
    (tmp_path / "m00.py").unlink()
    assert gpt_data.load_corpus(tmp_path).sha256 != corpus.sha256
    with pytest.raises(FileNotFoundError, match="at least 16"):
        gpt_data.load_corpus(tmp_path / "nothing")


def test_model_is_causal() -> None:
    torch.manual_seed(0)
    model = GPT(SIZES["tiny"])
    x = torch.randint(256, (2, 40))
    changed = x.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 256
    with torch.no_grad():
        a, b = model(x), model(changed)
    torch.testing.assert_close(a[:, :25], b[:, :25], rtol=0, atol=1e-6)
    moved = (a[:, 25:] - b[:, 25:]).abs().amax(dim=-1)
    assert moved.min() > 1e-4  # every later position sees the change
