"""The CUDA driver on a machine with two GPUs: which device, which stream, which thread. Runs on the
emulated machine (tests/cuda_emulator/machine.py), by test_cuda_emulator.py."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt import _native, backends
from fusedopt.__main__ import report
from fusedopt.backends import cuda, native

pytestmark = pytest.mark.skipif(
    "FUSEDOPT_EMULATED_GPUS" not in os.environ, reason="needs two emulated GPUs"
)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from tests.cuda_emulator.machine import Gpus

    before = _native._C.build_info()["tensor_access"]  # type: ignore[union-attr]
    _native.use_tensor_access("python")
    monkeypatch.setattr(cuda, "_clips", cuda._Clips())
    monkeypatch.setattr(cuda, "_captured", [])
    with Gpus(monkeypatch) as mode:
        yield mode
    _native.use_tensor_access(before)


def params_on(*devices: int, numel: int = 33) -> list[Parameter]:
    """A param with a gradient on each of the devices."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for device in devices:
        p = Parameter(torch.randn(numel, generator=generator).to(f"cuda:{device}"))
        p.grad = torch.randn(numel, generator=generator).to(f"cuda:{device}")
        params.append(p)
    return params


def on_cpu(params: list[Parameter]) -> list[Parameter]:
    twins = [Parameter(p.detach().to("cpu")) for p in params]
    for twin, p in zip(twins, params, strict=True):
        twin.grad = None if p.grad is None else p.grad.to("cpu")
    return twins


def in_thread(work: Callable[[], Any], mode: Any) -> Any:
    """Runs work in a fresh thread, in which torch's mode is active, too; its result or error."""
    results: list[Any] = []

    def run() -> None:
        with mode:
            try:
                results.append(work())
            except BaseException as error:
                results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert results, "the thread hangs"
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def adamw(params: Any, **options: Any) -> fusedopt.FusedAdamW:
    return fusedopt.FusedAdamW(params, **{"lr": 0.01, "backend": "cuda", **options})


# Reasons


@pytest.mark.parametrize(
    ("driver", "runtime", "reason"),
    [
        (13000, 13000, ""),
        (12020, 12040, ""),  # a later minor version of the toolkit
        (13000, 12040, ""),
        (12000, 12040, "the NVIDIA driver is for CUDA 12.0, and the kernels need 12.1"),
        (12080, 13000, "the NVIDIA driver is for CUDA 12.8, and the kernels need 13.0"),
        (0, 13000, "there is no NVIDIA driver"),
    ],
)
def test_a_driver_that_is_too_old(gpus: Any, driver: int, runtime: int, reason: str) -> None:
    gpus.machine.set("driver", driver)
    gpus.machine.set("runtime", runtime)
    assert cuda.unavailable().startswith(reason)
    assert bool(cuda.unavailable()) == bool(reason)
    if reason:
        with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot serve: {reason}"):
            adamw(params_on(0))


def test_a_machine_whose_devices_are_all_too_old(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cuda._BUILD, "cuda_archs", "80 90 +PTX")
    gpus.machine.set("capability", 75, 0)
    gpus.machine.set("capability", 70, 1)
    with pytest.raises(RuntimeError, match=r"compiled for sm_80 90 .*, and the device is sm_75"):
        adamw(params_on(0))
    gpus.machine.set("capability", 80, 1)
    assert cuda.unavailable() == ""
    assert gpus.machine.calls() == []  # to ask makes no context


@pytest.mark.parametrize(
    ("archs", "served", "not_served"),
    [
        ("80 90 +PTX", (80, 86, 89, 90, 100, 120), (70, 75)),
        ("90 +PTX", (90, 100), (75, 80, 89)),
        ("80 90", (80, 86, 90), (75, 100)),
        ("90a +PTX", (90,), (80, 100)),
        ("100f +PTX", (100, 103), (90, 120)),
    ],
)
def test_which_devices_the_kernels_are_compiled_for(
    monkeypatch: pytest.MonkeyPatch,
    archs: str,
    served: tuple[int, ...],
    not_served: tuple[int, ...],
) -> None:
    monkeypatch.setitem(cuda._BUILD, "cuda_archs", archs)
    assert [c for c in (*served, *not_served) if not cuda.not_compiled_for(c)] == [*served]


@pytest.mark.parametrize("lacks", ["image", "cooperative", "capability"])
def test_auto_goes_on_to_triton_on_the_device_without_kernels(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    monkeypatch.setitem(cuda._BUILD, "cuda_archs", "90 +PTX")
    gpus.machine.set(lacks, 75 if lacks == "capability" else 0, 0)
    asked: list[Any] = []
    monkeypatch.setattr(backends.triton, "unavailable", lambda: "")
    monkeypatch.setattr(backends.triton, "step", lambda optimizer, r: asked.append(optimizer) or "")
    in_use = []
    for devices in ((1,), (0,), (0, 1), (1, 0), (1, 1)):
        optimizer = adamw(params_on(*devices), backend="auto", max_grad_norm=1.0)
        for _ in range(2):
            optimizer.step()
        in_use.append(optimizer.backend_in_use)
        if devices == (1,):
            assert "context 0" not in gpus.machine.calls()
    assert in_use == ["cuda", "triton", "triton", "triton", "cuda"]
    named = adamw(params_on(0))
    with pytest.raises(RuntimeError, match=r"no backend can serve .*cuda: cuda:0: "):
        named.step()
    assert fusedopt.get_total_norm([p.grad for p in params_on(0)]) > 0  # by torch


def test_devices_are_asked_once(gpus: Any) -> None:
    for _ in range(3):
        optimizer = adamw(params_on(0))
        optimizer.step()
    assert gpus.machine.calls().count("load") == 1


def test_the_report_gives_the_reason_of_the_device_that_is_tested(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.triton, "unavailable", lambda: "not here")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    entry = report()["backends"]["cuda"]
    assert entry == {"available": True, "reason": None, "self_test": "passed"}
    cuda._unserved.clear()
    gpus.machine.set("image", 0, 0)
    data = report()
    assert "no kernel image" in data["backends"]["cuda"]["reason"]
    assert data["backends"]["cuda"]["self_test"] is None
    assert data["chosen"]["cuda"] == "reference"


# The current device


def test_a_fresh_thread_makes_no_context_on_device_0(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (native, cuda):  # which would change the device, too
        monkeypatch.setattr(module, "capturing", lambda device: False)
    optimizer = adamw(params_on(1), max_grad_norm=1.0)

    def work() -> int:
        for _ in range(3):
            optimizer.step()
        fusedopt.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
        return int(gpus.current_device())

    assert in_thread(work, gpus) == 0
    calls = gpus.machine.calls()
    assert "context 0" not in calls
    assert [c for c in calls if c.startswith("launch")] == ["launch 1 on 0"] * 4


def test_the_guard_of_the_extension_makes_no_context_on_device_0(gpus: Any) -> None:
    assert _native._C is not None
    ask = _native._C.cuda_unserved
    assert in_thread(lambda: ask("adamw", 1), gpus) == ""
    assert "context 0" not in gpus.machine.calls()

    def after_work_on_device_0() -> int:
        gpus.machine.set_device(0)
        assert ask("adamw", 1) == ""
        return int(gpus.machine.device())

    assert in_thread(after_work_on_device_0, gpus) == 0


def test_the_current_device_stays(gpus: Any) -> None:
    optimizer = adamw(params_on(0, 1), max_grad_norm=1.0)
    optimizer.step()
    assert gpus.current_device() == 0
    with torch.cuda.device(1):
        optimizer.step()
        assert gpus.current_device() == 1
    launches = [c for c in gpus.machine.calls() if c.startswith("launch")]
    assert sorted(launches) == ["launch 0 on 0"] * 4 + ["launch 1 on 0"] * 4


# Graph capture


def test_capture_is_that_of_the_params_device(gpus: Any) -> None:
    gpus.capturing = {0}
    adamw(params_on(1)).step()  # an eager step beside a capture on the current device
    gpus.capturing = {1}
    with pytest.raises(RuntimeError, match="run one step like it before a CUDA graph is captured"):
        adamw(params_on(1)).step()
    assert not native.capturing(torch.device("cuda", 0))
    assert native.capturing(torch.device("cuda", 1))
    with torch.cuda.device(1):
        assert native.capturing(torch.device("cuda"))
        assert not native.capturing(torch.device("cuda", 0))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])
def test_capture_after_one_step(gpus: Any, cls: Any, options: dict[str, Any]) -> None:
    momentum = {"momentum": 0.9, "dampening": 0.5} if cls is fusedopt.FusedSGD else {}
    params = params_on(0, 0)
    twins = on_cpu(params)
    optimizer = cls(params, lr=0.1, backend="cuda", **momentum, **options)
    reference = cls(twins, lr=0.1, backend="cpu", **momentum, **options)
    optimizer.step()
    gpus.capturing = {0}
    optimizer.step()  # the emulator runs what it captures
    optimizer.step()
    for _ in range(3):
        reference.step()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach().to("cpu"), twin.detach())


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=str)
def test_a_refused_capture_makes_nothing(gpus: Any, options: dict[str, Any]) -> None:
    """What a refused capture has made is never filled: nothing replays it."""
    optimizer = adamw(params_on(0, 0), **options)
    gpus.capturing = {0}
    message = "run one step like it before a CUDA graph is captured"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    for buffer in (optimizer._norm_buffer, optimizer._skipped_buffer):  # of each backend
        with pytest.raises(RuntimeError, match=message):
            buffer("cuda:0")
    assert optimizer._norm_tensor is None
    assert optimizer._skipped_tensor is None
    assert not optimizer.state
    assert optimizer.skipped_steps.item() == 0  # one on the CPU
    gpus.capturing = set()
    optimizer.step()
    assert optimizer.skipped_steps.item() == 0


def test_a_norm_that_is_first_asked_for_under_capture(gpus: Any) -> None:
    optimizer = adamw(params_on(0))
    optimizer.step()
    optimizer.max_grad_norm = 1.0
    gpus.capturing = {0}
    with pytest.raises(RuntimeError, match="it makes grad_norm"):
        optimizer.step()
    assert optimizer._norm_tensor is None
    gpus.capturing = set()
    optimizer.step()
    gpus.capturing = {0}
    optimizer.step()
    assert optimizer.grad_norm is not None


def test_figures_that_would_move_under_capture(gpus: Any) -> None:
    params = params_on(0, 1)
    optimizer = adamw(params)
    optimizer.step()
    figure = optimizer.skipped_steps
    params[0].grad = None
    gpus.capturing = {1}
    with pytest.raises(RuntimeError, match="on the device of the first gradient"):
        optimizer.step()
    assert optimizer.skipped_steps is figure


@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="words beyond the arguments are copied")
def test_capture_of_a_step_over_ten_thousand_tensors(gpus: Any) -> None:
    params = params_on(*[0] * 5000, numel=1)
    optimizer = adamw(params)
    optimizer.step()
    for p in params:
        p.grad = torch.ones(1, device="cuda:0")  # as a backward pass under capture makes them
    gpus.capturing = {0}
    optimizer.step()


def test_capture_with_a_shared_step_count_is_refused(gpus: Any) -> None:
    params = params_on(0, 0)
    optimizer = adamw(params)
    optimizer.step()
    optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
    gpus.capturing = {0}
    with pytest.raises(RuntimeError, match="params share a step count"):
        optimizer.step()


# A tensor lr, and figures, on another device


def test_a_tensor_lr_on_another_device_is_read_by_value(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[float] = []
    fetch = native.DeviceHost.fetch_lr

    def watched(self: Any, lr: torch.Tensor, group: int) -> float:
        reads.append(fetch(self, lr, group))
        return reads[-1]

    monkeypatch.setattr(native.DeviceHost, "fetch_lr", watched)
    values = []
    for place in ("cuda:0", "cuda:1", "float"):
        params = params_on(1)
        lr: Any = 0.0625 if place == "float" else torch.tensor(0.0625).to(place)
        adamw(params, lr=lr).step()
        values.append(params[0].detach().to("cpu"))
    assert reads == [0.0625]  # that on cuda:0
    assert torch.equal(values[0], values[2])
    assert torch.equal(values[1], values[2])


def test_a_tensor_lr_with_params_on_two_devices(gpus: Any) -> None:
    params = params_on(0, 1)
    twins = on_cpu(params)
    lr = torch.tensor(0.5).to("cuda:1")
    ours = fusedopt.FusedSGD(params, lr=lr, backend="cuda")
    same = fusedopt.FusedSGD(twins, lr=0.5, backend="cpu")
    for value in (0.5, 0.25):
        lr.fill_(value)
        same.param_groups[0]["lr"] = value
        ours.step()
        same.step()
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(p.detach().to("cpu"), twin.detach())


def test_capture_with_a_tensor_lr_on_another_device_is_refused(gpus: Any) -> None:
    params = params_on(1)
    optimizer = fusedopt.FusedSGD(params, lr=torch.tensor(0.1).to("cuda:0"), backend="cuda")
    optimizer.step()
    before = params[0].detach().to("cpu")
    gpus.capturing = {1}
    message = r'param_groups\[0\]\["lr"\] is on cuda:0 and its params are on cuda:1'
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(params[0].detach().to("cpu"), before)


def test_an_lr_of_a_group_without_gradients_is_left_alone(gpus: Any) -> None:
    idle, active = params_on(0, 1)
    idle.grad = None
    lr = torch.tensor(0.1).to("cuda:0")
    optimizer = fusedopt.FusedSGD(
        [{"params": [idle], "lr": lr}, {"params": [active], "lr": 0.1}], backend="cuda"
    )
    optimizer.step()
    gpus.capturing = {1}
    optimizer.step()  # an lr that is needed would be refused


def test_figures_move_with_the_gradients(gpus: Any) -> None:
    params = params_on(0, 1)
    optimizer = adamw(params, max_grad_norm=1.0, skip_nonfinite=True)
    grads = [p.grad for p in params]
    params[0].grad = torch.full((33,), float("inf")).to("cuda:0")
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    norms = []
    for active in ((0, 1), (1,), (0,)):
        for i, p in enumerate(params):
            p.grad = grads[i] if i in active else None
        optimizer.step()
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.device == torch.device("cuda", active[0])
        assert optimizer.skipped_steps.device == torch.device("cuda", active[0])
        assert optimizer.skipped_steps.item() == 1
        norms.append(optimizer.grad_norm.item())
    each = [g.norm().item() for g in grads if g is not None]
    assert norms == pytest.approx([(each[0] ** 2 + each[1] ** 2) ** 0.5, each[1], each[0]])


def test_the_device_without_an_index_is_the_current_one(gpus: Any) -> None:
    optimizer = adamw(params_on(1), max_grad_norm=1.0)
    optimizer.step()
    buffers = optimizer._norm_buffer("cuda:1"), optimizer._skipped_buffer("cuda:1")
    with torch.cuda.device(1):
        assert optimizer._norm_buffer("cuda") is buffers[0]
        assert optimizer._skipped_buffer("cuda") is buffers[1]
    moved = optimizer._norm_buffer("cuda")  # now the current one is another one
    assert moved.device == torch.device("cuda", 0)
    assert torch.equal(moved, buffers[0])


# Streams


def test_a_step_on_another_stream_waits_for_the_last_one(gpus: Any) -> None:
    optimizer = adamw(params_on(0), max_grad_norm=1.0)
    gpus.use_stream(0, 7)
    first = gpus.launches() + 1
    optimizer.step()
    optimizer.step()
    assert gpus.log == []
    gpus.use_stream(0, 9)
    gpus.destroyed.add(7)  # without having been waited for
    optimizer.step()
    waits = f"9 waits for step {first + 1} on 7"
    assert gpus.log[0] == waits
    kept = sorted(line.partition(" x ")[0] for line in gpus.log[1:])
    assert kept == ["9 keeps torch.float32", "9 keeps torch.int64"] + ["9 keeps torch.uint8"] * 2
    optimizer.step()
    assert len(gpus.log) == 5
    on = [c for c in gpus.machine.calls() if c.startswith("launch")]
    assert on == ["launch 0 on 7"] * 2 + ["launch 0 on 9"] * 2


def test_a_step_that_fails_is_waited_for(gpus: Any) -> None:
    params = params_on(0)
    optimizer = adamw(params, max_grad_norm=1.0)
    gpus.use_stream(0, 7)
    optimizer.step()
    gpus.log.clear()
    optimizer.param_groups[0]["lr"] = "none"
    gpus.use_stream(0, 9)
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    gpus.use_stream(0, 7)
    optimizer.step()
    waits = [line for line in gpus.log if "waits" in line]
    assert [line.split()[0] for line in waits] == ["9", "7"]


def test_streams_of_two_devices_are_told_apart(gpus: Any) -> None:
    optimizer = adamw(params_on(0, 1), max_grad_norm=1.0)
    gpus.use_stream(0, 7)
    gpus.use_stream(1, 8)
    optimizer.step()
    gpus.use_stream(1, 9)
    optimizer.step()
    assert {line.split()[0] for line in gpus.log} == {"9"}
    launches = [c for c in gpus.machine.calls() if c.startswith("launch")]
    assert sorted(launches) == ["launch 0 on 7"] * 4 + ["launch 1 on 8"] * 2 + ["launch 1 on 9"] * 2


def test_a_captured_step_waits_for_nothing(gpus: Any) -> None:
    optimizer = adamw(params_on(0))
    gpus.use_stream(0, 7)
    optimizer.step()
    gpus.use_stream(0, 5)
    gpus.capturing = {0}
    optimizer.step()
    gpus.use_stream(0, 7)
    gpus.capturing = set()
    optimizer.step()
    assert gpus.log == []
    launches = [c for c in gpus.machine.calls() if c.startswith("launch")]
    assert launches == ["launch 0 on 7", "launch 0 on 5", "launch 0 on 7"]


def test_a_second_thread_that_steps_is_refused_and_changes_nothing(gpus: Any) -> None:
    optimizer = adamw(params_on(0), skip_nonfinite=True)
    gpus.use_stream(0, 7)
    seen: list[str] = []

    def meanwhile() -> None:
        gpus.use_stream(0, 9)
        with pytest.raises(RuntimeError, match="running already, maybe in another thread"):
            optimizer.step()
        seen.append("refused")

    while_waiting(gpus, "synchronize", optimizer.step, meanwhile)
    assert seen == ["refused"]
    gpus.log.clear()
    gpus.use_stream(0, 9)
    optimizer.step()
    assert gpus.log[0].endswith(" on 7")  # the step that was done


# Repeated steps (csrc/host/repeated_step.h)


def repeats(optimizer: fusedopt.FusedAdamW) -> bool:
    """Whether another step is a repeated one, which it then was."""
    return optimizer._repeated is not None and optimizer._repeated(optimizer.__dict__)


def on_another_stream(gpus: Any, params: list[Parameter]) -> None:
    gpus.use_stream(0, 9)


def on_another_device(gpus: Any, params: list[Parameter]) -> None:
    gpus.exchange(1)


def under_capture(gpus: Any, params: list[Parameter]) -> None:
    gpus.capturing = {0}


def after_params_moved(gpus: Any, params: list[Parameter]) -> None:
    for p in params:
        value, grad = p.detach().to("cuda:1"), p.grad
        assert grad is not None
        p.data, p.grad = value, grad.to("cuda:1")


def with_a_param_on_another_device(gpus: Any, params: list[Parameter]) -> None:
    params += params_on(1)


def without_gradients(gpus: Any, params: list[Parameter]) -> None:
    for p in params:
        p.grad = None


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        *(on_another_stream, on_another_device, under_capture),
        *(after_params_moved, with_a_param_on_another_device, without_gradients),
    ],
)
def test_what_is_not_repeated(gpus: Any, change: Any, options: dict[str, Any]) -> None:
    optimizer = adamw(params_on(0, 0), **options)
    optimizer.step()
    assert repeats(optimizer)
    params = optimizer.param_groups[0]["params"]
    change(gpus, params)
    states = {id(p): dict(e) for p, e in optimizer.state.items()}
    values = [p.detach().to("cpu") for p in params]
    before = gpus.launches()
    assert not repeats(optimizer)
    assert gpus.launches() == before
    assert {id(p): dict(e) for p, e in optimizer.state.items()} == states
    for p, value in zip(params, values, strict=True):
        assert torch.equal(p.detach().to("cpu"), value)


def test_a_repeated_step_is_waited_for(gpus: Any) -> None:
    optimizer = adamw(params_on(0))
    gpus.use_stream(0, 7)
    optimizer.step()
    for fails in (False, True, False):
        assert repeats(optimizer)
        if fails:
            optimizer.param_groups[0]["lr"] = "none"
            with pytest.raises(TypeError, match="lr"):
                repeats(optimizer)
            optimizer.param_groups[0]["lr"] = 0.1
        last = f"{gpus.launches()} on 7"
        gpus.use_stream(0, 9)
        optimizer.step()
        assert gpus.log[0] == f"9 waits for step {last}"
        assert repeats(optimizer)
        last = f"{gpus.launches()} on 9"
        gpus.log.clear()
        gpus.use_stream(0, 7)
        optimizer.step()
        assert gpus.log[0] == f"7 waits for step {last}"
        gpus.log.clear()
    on = [c.split()[-1] for c in gpus.machine.calls() if c.startswith("launch")]
    assert on == ["7", *["7", "9", "9", "7"] * 3]


def test_a_repeated_step_that_fails_after_an_upload_is_waited_for(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = adamw(params_on(0))
    gpus.use_stream(0, 7)
    optimizer.step()
    host = optimizer._drivers["cuda", torch.device("cuda", 0), ()].host
    params = optimizer.param_groups[0]["params"]
    params[0].data = params[0].detach().clone()  # another table
    upload = host.upload

    def failing(*arguments: Any) -> int:
        upload(*arguments)
        raise MemoryError

    monkeypatch.setattr(host, "upload", failing)
    host._last_step.recorded = ""
    with pytest.raises(MemoryError):
        repeats(optimizer)
    assert host._last_step.recorded


def test_a_step_in_parts_is_not_repeated(gpus: Any) -> None:
    params = params_on(0, 1)
    grads = [p.grad for p in params]
    optimizer = adamw(params, max_grad_norm=1.0)
    for active in ((0, 1), (0,), (0, 1), (1,), (0, 1)):
        for i, p in enumerate(params):
            p.grad = grads[i] if i in active else None
        optimizer.step()
        assert (optimizer._repeated is None) is (len(active) == 2)


def test_steps_are_repeated_on_each_device_and_after_a_capture(gpus: Any) -> None:
    for device in (0, 1):
        gpus.exchange(device)
        optimizer = adamw(params_on(device, device), max_grad_norm=1.0)
        twins = on_cpu(optimizer.param_groups[0]["params"])
        same = adamw(twins, max_grad_norm=1.0, backend="cpu")
        for step in range(6):
            gpus.capturing = {device} if step == 3 else set()
            assert repeats(optimizer) is (step in (1, 2, 5))
            if step not in (1, 2, 5):
                optimizer.step()
            same.step()
        for p, twin in zip(optimizer.param_groups[0]["params"], twins, strict=True):
            torch.testing.assert_close(p.detach().to("cpu"), twin.detach())
        assert optimizer.log() == pytest.approx(same.log())


# clip_grad_norm_ and threads


def clip(params: list[Parameter]) -> float:
    return fusedopt.clip_grad_norm_(params, 0.1).item()


def test_clipping_keeps_one_memory_a_thread_and_device(gpus: Any) -> None:
    params = params_on(0)
    for handle in range(1, 50):  # as many streams, of which none lives on
        gpus.use_stream(0, handle)
        gpus.destroyed = set(range(1, handle))
        clip(params)
    assert list(cuda._clips.free) == [torch.device("cuda", 0)]
    assert sum("waits" in line for line in gpus.log) == 48
    mine = cuda._clips.free[torch.device("cuda", 0)]

    def other() -> Any:
        clip(params)
        return list(cuda._clips.free.values())

    (theirs,) = in_thread(other, gpus)
    assert theirs[0] is not mine[0]
    assert theirs[1] is not mine[1]


def test_a_call_in_between_has_memory_of_its_own(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, inner = params_on(*[0] * 4100, numel=1), params_on(0, numel=77)
    expected = [
        torch.cat([p.grad for p in params if p.grad is not None]).norm()
        for params in (outer, inner)
    ]
    clip(params_on(0))
    upload = native.DeviceMemory.upload
    norms: list[float] = []

    def interrupted(self: Any, address: int, size: int, slot: str) -> int:
        if slot == "words":  # the arguments of the launch are being written
            monkeypatch.setattr(native.DeviceMemory, "upload", upload)
            assert not cuda._clips.free  # nobody else can rewrite them
            norms.append(clip(inner))
        return upload(self, address, size, slot)

    monkeypatch.setattr(native.DeviceMemory, "upload", interrupted)
    norms.insert(0, clip(outer))
    assert norms == pytest.approx([e.item() for e in expected])
    assert clip(outer) == pytest.approx(0.1, rel=1e-4)
    assert clip(inner) == pytest.approx(0.1, rel=1e-4)


def test_threads_clip_side_by_side(gpus: Any) -> None:
    sizes = [17, 300, 5000]
    failures: list[str] = []

    def work(numel: int) -> None:
        with gpus:
            params = params_on(0, 0, numel=numel)
            grads = [p.grad.clone() for p in params if p.grad is not None]
            norm = torch.cat(grads).norm().item()
            for _ in range(20):
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad.clone()
                if clip(params) != pytest.approx(norm):
                    failures.append(f"norm of {numel}")

    threads = [threading.Thread(target=work, args=(n,)) for n in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_captured_clipping_is_the_graphs_alone(gpus: Any) -> None:
    params = params_on(0)
    clip(params)
    device = torch.device("cuda", 0)
    entry = cuda._clips.free[device]
    gpus.capturing = {0}
    clip(params)
    assert cuda._captured == [entry]
    assert device not in cuda._clips.free
    gpus.capturing = set()
    clip(params)
    assert cuda._clips.free[device] is not entry


def while_waiting(
    gpus: Any, call: str, work: Callable[[], Any], meanwhile: Callable[[], Any] = lambda: None
) -> None:
    """Runs work in a thread, in which `call` waits until this thread has done something else."""
    gpus.machine.set(f"wait {call}", 1)
    before = sum(c.startswith(call) for c in gpus.machine.calls())
    errors: list[BaseException] = []

    def run() -> None:
        with gpus:
            try:
                work()
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while sum(c.startswith(call) for c in gpus.machine.calls()) == before and thread.is_alive():
        time.sleep(0.001)
    try:
        meanwhile()
    finally:
        gpus.machine.set(f"wait {call}", 0)
    thread.join()
    assert not errors, errors
    assert "stuck" not in gpus.machine.calls()


def test_other_threads_run_while_a_step_waits(gpus: Any) -> None:
    # A first step that may be skipped asks the device for the verdict.
    while_waiting(gpus, "synchronize", adamw(params_on(0), skip_nonfinite=True).step)
    # Kernels are loaded when a device is first asked.
    cuda._unserved.clear()
    while_waiting(gpus, "load", adamw(params_on(0)).step)
    # The queue of a stream is full, and what drains it is another thread's to start.
    adamw(params_on(1)).step()
    while_waiting(gpus, "launch", adamw(params_on(0)).step)
    while_waiting(gpus, "launch", lambda: clip(params_on(0)))
