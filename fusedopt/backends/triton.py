"""The Triton driver (triton_kernels/) for params on NVIDIA, AMD and Intel GPUs.

triton is imported where there is such a device, in the first step over params on one. Under
TRITON_INTERPRET=1 its interpreter runs the kernels over CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt._native import _C, DEVICES, missing
from fusedopt.backends.native import DeviceHost, Driver, Native, Options, capturing
from fusedopt.rule import Rule, hyper_keys

if TYPE_CHECKING:
    from fusedopt._C import TritonPlan
    from fusedopt.backends import Request
    from fusedopt.optimizer import FusedOptimizer
    from fusedopt.triton_kernels.launch import Config, Scalars, Table


OLDEST = (3, 5)  # the first version with constexpr_function

_INFINITY = float("inf")
_TUNING_ELEMENTS = 1 << 24  # 64 MiB in float32: more than any L2 cache holds of four operands


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable() -> str:
    if _C is None:
        return missing
    if not _installed():
        return "triton is not installed"
    if not (interpreted() or torch.cuda.is_available()):
        if not torch.xpu.is_available():
            return "torch finds no CUDA, ROCm or XPU device"
        if not torch.xpu.get_device_properties().has_fp64:
            return "the XPU device has no float64"
    return _import_kernels()


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module that is there already, and was not found by a spec
        return True


def _import_kernels() -> str:
    """Imports them; "" or why that fails. Kernels need Triton's frontend as of OLDEST; any other
    error of an import is a reason, too: another backend can serve."""
    needed = f"{OLDEST[0]}.{OLDEST[1]} or newer is needed"
    try:
        import triton  # type: ignore[import-untyped]

        version = str(triton.__version__)
    except Exception as error:
        return f"{_distribution()} cannot be imported ({type(error).__name__}: {error}); {needed}"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"triton {version} is installed; {needed}"
    try:
        import fusedopt.triton_kernels.tune  # noqa: F401  and with it all others
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        return f"the kernels cannot be imported with triton {version} ({what}); {needed}"
    return ""


def _distribution() -> str:
    """The installed triton, by its metadata."""
    try:
        return f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:  # ROCm's and Intel's have other names
        return "triton"


def step(optimizer: FusedOptimizer, request: Request) -> str:
    from fusedopt.triton_kernels.rules import RULES

    if optimizer.rule.name not in RULES:
        return f"{optimizer.rule.name} has no Triton kernel"
    return _native().step(optimizer, request)


@functools.cache
def _native() -> Native:
    device_type = "cuda" if torch.cuda.is_available() else "xpu"
    return Native("triton", "cpu" if interpreted() else device_type, TritonDriver)


class TritonHost(DeviceHost):
    """Starts the kernels when the plan has brought its table to the device."""

    start: Callable[[Table, int], None]  # the kernels of this part of the step
    may_skip = False

    def launch(
        self,
        rows: int,
        layouts: int,
        chunks: int,
        words: int,
        row_count: int,
        chunk_count: int,
        kinds: tuple[int, ...],
        may_take_back: bool,
    ) -> bool:
        """What csrc/host/triton_step.h says."""
        from fusedopt.triton_kernels import launch, norm

        workspace = self.workspace(8 * norm.WORKSPACE_WORDS)
        table = launch.Table(rows, layouts, chunks, words, row_count, chunk_count, kinds)
        self.start(table, workspace.data_ptr())
        if not (may_take_back and self.may_skip):
            return False
        return bool(workspace.view(torch.int64)[norm.SKIPPED.value].item())


class TritonDriver(Driver):
    def __init__(self, rule: Rule, device: torch.device, config: Config | None = None) -> None:
        from fusedopt.triton_kernels import launch, tune

        assert _C is not None
        self.plan: TritonPlan = _C.TritonPlan(rule.name, DEVICES[device.type], launch.CHUNK)
        self.host: TritonHost = TritonHost(rule, device)
        if config is None:
            if capturing(device):
                raise RuntimeError(
                    "run one step before a CUDA graph is captured: it compiles the kernels"
                )
            config = tune.config_for(rule.name, device, functools.partial(_measure, rule))
        self.launcher = launch.Launcher(rule.name, device, config)

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], options: Options) -> str:
        clip, skip = options.norm, options.skip_nonfinite
        scalars = _scalars(options)
        self.host.start = lambda table, workspace: self.launcher.step(
            table, scalars, workspace, clip, skip
        )
        self.host.may_skip = skip or options.found_inf is not None
        return self.plan.step(groups, state, self.host)

    def refresh(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> str:
        return self.plan.refresh(groups, state, self.host)

    def squared_norm(self, out: Tensor) -> None:
        self.host.start = lambda table, workspace: self.launcher.norm(
            table, workspace, out.data_ptr()
        )
        self.host.may_skip = False
        self.plan.launch()

    def apply(self, squared_norm: Tensor | None, options: Options) -> None:
        squared, scalars = _address(squared_norm), _scalars(options)
        clip, skip = options.norm, options.skip_nonfinite
        self.host.start = lambda table, workspace: self.launcher.apply(
            table, scalars, workspace, squared, clip, skip
        )
        self.host.may_skip = skip or options.found_inf is not None
        self.plan.apply()

    def roll_back(self) -> None:
        self.plan.roll_back()


def _measure(
    rule: Rule, device: torch.device, candidates: tuple[Config, ...]
) -> dict[Config, float]:
    """Milliseconds of a step with each of the candidates that work, for tune.config_for."""
    from fusedopt.triton_kernels import tune

    generator = torch.Generator(device).manual_seed(0)  # the user's own is left alone
    param, param.grad = (
        torch.randn(_TUNING_ELEMENTS, dtype=torch.float32, device=device, generator=generator)
        for _ in range(2)
    )
    values = {"lr": 1e-3, "betas": (0.9, 0.999), "momentum": 0.9, "eps": 1e-8}
    keys = [key for key, _ in hyper_keys(rule)]
    group = {**{key: values.get(key, 0.0) for key in keys}, "maximize": False, "params": [param]}
    state: dict[Any, Any] = {}
    options = Options(device, False, _INFINITY, _INFINITY, None, None, False, None, None)

    def step_of(driver: TritonDriver) -> None:
        reason = driver.step([group], state, options)
        assert not reason, reason

    drivers = {config: TritonDriver(rule, device, config) for config in candidates}
    steps = {config: functools.partial(step_of, driver) for config, driver in drivers.items()}
    return tune.median_times(steps, device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _scalars(options: Options) -> Scalars:
    from fusedopt.triton_kernels.launch import Scalars

    return Scalars(
        _address(options.grad_scale),
        _address(options.found_inf),
        _address(options.grad_norm),
        _address(options.skipped_steps),
        options.max_norm,
        options.clip_value,
    )
