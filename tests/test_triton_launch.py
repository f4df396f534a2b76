"""How the Triton driver starts its kernels, with a pretended GPU: launches, addresses, graph
capture, and what a compiled kernel is specialised on."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import _native
from fusedopt.adamw import ADAMW
from fusedopt.backends import triton
from fusedopt.backends.native import Options

pytestmark = pytest.mark.skipif(
    _native._C is None or importlib.util.find_spec("triton") is None, reason="needs triton"
)
CUDA = torch.device("cuda", 0)
HIGH = 0xFFFF_8000_0000_0000  # where Intel GPUs have their memory


class FakeKernel:
    """What the compiler returns, for a machine without a GPU; launching it is recorded."""

    run = None
    n_regs = 97
    metadata = SimpleNamespace(shared=4096)

    def __init__(self, log: list[Any], options: dict[str, Any]) -> None:
        self.log, self.options = log, options

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.log.append((grid[0], self.options, arguments))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any], tuple[Any, ...]]]:
    """The launches on a pretended H100: programs, compiler options, arguments."""
    from fusedopt.triton_kernels import launch

    log: list[Any] = []

    def warmup(*arguments: Any, grid: Any, **options: Any) -> FakeKernel:
        return FakeKernel(log, options)

    limits = SimpleNamespace(
        multi_processor_count=132,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        shared_memory_per_multiprocessor=233_472,
    )
    monkeypatch.setattr(launch, "target", lambda: "cuda")
    monkeypatch.setattr(launch, "step_kernel", SimpleNamespace(warmup=warmup))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limits)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return log


def table(chunks: int) -> Any:
    from fusedopt.triton_kernels.launch import Table

    return Table(16, 32, 48, 64, row_count=3, chunk_count=chunks, kinds=(5,))


def test_the_launches_of_a_step_on_a_gpu(h100: Any) -> None:
    from fusedopt.triton_kernels.launch import DEFAULT, Launcher, Scalars

    launcher = Launcher("adamw", CUDA)
    for chunks in (7, 10_000):
        for clip in (False, True):
            launcher.step(table(chunks), Scalars(max_norm=1.0), 1 << 20, clip, False)
    # One launch each; with a norm, no more programs than run at once: two on a multiprocessor, at
    # 97 registers of 256 threads.
    assert [programs for programs, _, _ in h100] == [7, 7, 264, 264]
    for (_, options, arguments), clip in zip(h100, (False, True) * 2, strict=True):
        assert options.get("launch_cooperative_grid", False) == clip
        assert options["num_warps"] == DEFAULT.warps
        assert not options["enable_fp_fusion"]
        assert arguments[-4:] == (clip, True, clip, False)
    h100.clear()
    launcher.norm(table(7), 1 << 20, 1 << 21)
    launcher.apply(table(7), Scalars(), 1 << 20, 1 << 21, True, True)
    assert [arguments[-4:] for _, _, arguments in h100] == [
        (True, False, False, False),
        (False, True, True, True),
    ]
    assert all("launch_cooperative_grid" not in options for _, options, _ in h100)


def test_two_launches_where_programs_cannot_wait(h100: Any, monkeypatch: Any) -> None:
    from fusedopt.triton_kernels import launch

    monkeypatch.setattr(launch, "target", lambda: "xpu")
    launcher = launch.Launcher("sgd", CUDA)
    launcher.step(table(7), launch.Scalars(max_norm=1.0), 1 << 20, True, False)
    assert [arguments[-4:-1] for _, _, arguments in h100] == [
        (True, False, False),
        (False, True, True),
    ]
    squared = {arguments[9] for _, _, arguments in h100}
    assert squared == {(1 << 20) + 8 * 3}  # a word of the workspace
    assert all("maxnreg" not in options for _, options, _ in h100)


# Of the kernel's arguments, those that are addresses.
ADDRESSES = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]


def fits(value: int) -> bool:
    return -(1 << 63) <= value < 1 << 63


@pytest.mark.parametrize("base", [HIGH, 1 << 63, (1 << 64) - (1 << 20), (1 << 63) - 4096, 1 << 47])
@pytest.mark.parametrize("target", ["cuda", "xpu"])
def test_addresses_of_64_bits(h100: Any, base: int, target: str, monkeypatch: Any) -> None:
    from fusedopt.triton_kernels import launch

    monkeypatch.setattr(launch, "target", lambda: target)
    launcher = launch.Launcher("adamw", CUDA)
    at = [base + 64 * i for i in range(9)]
    high = launch.Table(*at[:4], row_count=3, chunk_count=7, kinds=(5,))
    scalars = launch.Scalars(*at[4:8], max_norm=1.0)
    launcher.step(high, scalars, at[8], True, True)
    launcher.norm(high, at[8], base + 4096)
    launcher.apply(high, scalars, at[8], base + 4096, True, True)
    assert len(h100) == (3 if target == "cuda" else 4)
    for _, _, arguments in h100:
        assert all(fits(a) for a in arguments[:14])
    seen = [[arguments[i] % (1 << 64) for i in ADDRESSES] for _, _, arguments in h100]
    assert seen[-2] == [*at[:4], at[8], 0, 0, base + 4096, 0, 0]
    assert seen[-1] == [*at[:4], at[8], at[4], at[5], base + 4096, at[6], at[7]]
    if target == "cuda":
        assert seen[0] == [*at[:4], at[8], at[4], at[5], 0, at[6], at[7]]
    else:
        squared = at[8] + 8 * 3
        assert seen[0] == [*at[:4], at[8], 0, 0, squared, 0, 0]
        assert seen[1] == [*at[:4], at[8], at[4], at[5], squared, at[6], at[7]]


class HighTensor:
    """Stands in for a tensor in an Intel GPU's memory."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def data_ptr(self) -> int:
        return HIGH + self.offset


@pytest.fixture
def high_driver(h100: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A driver whose memory, and whose params, lie at high addresses; what it uploads."""
    from fusedopt.triton_kernels import launch

    native: Any = _native._C
    monkeypatch.setattr(launch, "resident_programs", lambda kernel, warps, device: 132)
    driver = triton.TritonDriver(ADAMW, torch.device("cpu"), launch.DEFAULT)
    uploads: dict[str, bytes] = {}

    def upload(address: int, size: int, slot: str) -> int:
        uploads[slot] = ctypes.string_at(address, size)
        return HIGH + (1 << 20) * len(uploads)

    def describe(tensor: torch.Tensor) -> Any:
        description = _native.describe(tensor)
        assert description is not None
        if tensor.dim() == 0:  # a step count, which is read
            return description
        return (description[0] | HIGH, *description[1:])

    monkeypatch.setattr(driver.host, "upload", upload)
    monkeypatch.setattr(driver.host, "workspace", lambda size: HighTensor(1 << 30))
    before = native.build_info()["tensor_access"]
    native.use_python(describe)
    yield driver, uploads
    _native.use_tensor_access(before)


def test_a_step_whose_memory_lies_at_high_addresses(h100: Any, high_driver: Any) -> None:
    driver, uploads = high_driver
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    groups = fusedopt.FusedAdamW([param]).param_groups
    scalars: list[Any] = [HighTensor(i) for i in (0, 4, 8, 16, 24)]
    scale, inf, norm, skipped, squared = scalars
    options = Options(
        torch.device("cpu"), True, 1.0, float("inf"), scale, inf, False, norm, skipped
    )
    state: dict[Any, Any] = {param: {}}
    for name in ("exp_avg", "exp_avg_sq"):
        state[param][name] = torch.zeros(5)
    state[param]["step"] = torch.tensor(1.0)
    assert driver.step(groups, state, options) == ""
    assert driver.refresh(groups, state) == ""
    driver.squared_norm(squared)
    driver.apply(squared, options)
    assert len(h100) == 3
    for _, _, arguments in h100:
        assert all(fits(a) for a in arguments[:14])
        assert all(arguments[i] < 0 for i in (0, 1, 2, 3, 6))
    (_, _, step), (_, _, only_norm), (_, _, apply) = h100
    low = 1 << 64
    assert [step[i] % low - HIGH for i in (7, 8, 10, 11)] == [0, 4, 8, 16]
    assert only_norm[9] % low == apply[9] % low == HIGH + 24
    # The table has the addresses of the tensors, all 64 bits of them.
    entry = state[param]
    row = [int.from_bytes(uploads["table"][8 * i : 8 * i + 8], "little") for i in range(6)]
    wanted = [param, entry["exp_avg"], entry["exp_avg_sq"]]
    assert [row[i] for i in (0, 2, 3)] == [t.data_ptr() | HIGH for t in wanted]
    assert row[5] == entry["step"].data_ptr()
    assert int.from_bytes(uploads["words"][:8], "little") == param.grad.data_ptr() | HIGH


def test_a_kernel_is_not_loaded_under_graph_capture(h100: Any, monkeypatch: Any) -> None:
    from fusedopt.triton_kernels.launch import Launcher, Scalars

    launcher = Launcher("adamw", CUDA)
    launcher.step(table(7), Scalars(), 1 << 20, False, False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launcher.step(table(7), Scalars(), 1 << 20, False, False)
    assert len(h100) == 2
    message = "run one step like it before a CUDA graph is captured"
    with pytest.raises(RuntimeError, match=message):  # the clipping has a kernel of its own
        launcher.step(table(7), Scalars(max_norm=1.0), 1 << 20, True, False)
    with pytest.raises(RuntimeError, match=message):
        launcher.norm(table(7), 1 << 20, 1 << 21)
    assert len(h100) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launcher.step(table(7), Scalars(max_norm=1.0), 1 << 20, True, False)
    assert len(h100) == 3


def test_nothing_is_tuned_under_graph_capture(h100: Any, monkeypatch: Any) -> None:
    from fusedopt.triton_kernels import tune

    measured: list[Any] = []

    def config_for(rule: str, device: torch.device, measure: Any) -> Any:
        measured.append(device)
        return tune.DEFAULT

    monkeypatch.setattr(tune, "config_for", config_for)
    monkeypatch.setattr(triton, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run one step before a CUDA graph is captured"):
        triton.TritonDriver(ADAMW, CUDA)
    assert not measured
    monkeypatch.setattr(triton, "capturing", lambda device: False)
    triton.TritonDriver(ADAMW, CUDA)
    assert measured == [CUDA]


class PretendedGpu:
    """What Triton's compiler asks a driver for, of an H100 that is not there."""

    def get_current_device(self) -> int:
        return 77

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compiles the kernel as a launch with these numbers would, by Triton's own launch path."""
    from fusedopt.triton_kernels import launch
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", PretendedGpu())
    kernel = launch.step_kernel
    prepare, update = launch.RULES["sgd"]
    kind = 1 << 48 | 1 << 40  # float32, with momentum

    def warmup(*numbers: int) -> Any:
        options = launch.compiler_options("cuda", launch.DEFAULT, barrier=False)
        constants = (prepare, update, (kind,), launch.CHUNK, 2048, False, True, False, False)
        return kernel.warmup(*numbers, *constants, grid=(1,), **options)

    yield warmup
    kernel.device_caches.pop(77, None)


ARGUMENTS = 14  # before the constants


def test_a_kernel_serves_all_numbers(compiles: Any) -> None:
    first = compiles(*[16] * ARGUMENTS)
    ttir = first.asm["ttir"]
    (signature,) = re.findall(r"tt\.func public @step_kernel\((.*?)\) attributes", ttir)
    assert signature.count("i64") == ARGUMENTS
    assert "divisibility" not in signature
    for value in (1, 0, -(1 << 63), (1 << 63) - 1, 17, 32):
        assert compiles(*[value] * ARGUMENTS) is first
        for i in range(ARGUMENTS):
            numbers = [16] * ARGUMENTS
            numbers[i] = value
            assert compiles(*numbers) is first


def test_every_number_of_the_kernel_is_meant() -> None:
    from fusedopt.triton_kernels.apply import step_kernel

    numbers = [p for p in step_kernel.params if not p.is_constexpr]
    assert len(numbers) == ARGUMENTS
    assert all(p.do_not_specialize for p in numbers)
    assert all(p.annotation == "i64" for p in numbers)


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="a kernel is compiled for one set of kinds: 2 to 5 seconds in the middle of training, "
    "where a param is frozen or a gradient comes late",
)
@pytest.mark.parametrize("later", [(5,), (7,), (5, 9)])
def test_a_kernel_serves_a_subset_of_its_kinds(h100: Any, later: tuple[int, ...]) -> None:
    from fusedopt.triton_kernels import launch

    launcher = launch.Launcher("adamw", CUDA)
    for kinds in ((5, 7, 9), later, (5, 7, 9)):
        some = launch.Table(16, 32, 48, 64, row_count=3, chunk_count=7, kinds=kinds)
        launcher.step(some, launch.Scalars(), 1 << 20, False, False)
    assert len(h100) == 3
    assert len({id(options) for _, options, _ in h100}) == 1  # one compiled kernel
