"""The optimizers that the benchmarks compare: one table of small adapters.

A contestant takes part when its module can be imported and it steps without an error; otherwise it
is listed as absent with the reason. Adding one means adding a line to CONTESTANTS.
"""

import importlib
import math
import re
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from bench.quiet import quiet
from bench.workloads import MAX_NORM, InputSet, Workload, dtypes_of

HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "sgd": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-2},
}


@dataclass(frozen=True)
class Contestant:
    """One implementation. `clip_option` names the keyword by which it clips in its own step; one
    without it is clipped by torch.nn.utils.clip_grad_norm_ before the step."""

    name: str
    module: str
    classes: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    clip_option: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False  # the step under torch.compile, with a tensor lr: one graph
    float32_state: bool = False  # holds its moments in float32, and leaves alone what has others
    most_tensors: float = math.inf  # no part in workloads with more tensors,
    most_elements: float = math.inf  # or more elements of all together

    def load(self, optimizer: str) -> type[torch.optim.Optimizer]:
        """The class for "adamw" or "sgd". Raises what the import raises."""
        return getattr(importlib.import_module(self.module), self.classes[optimizer])

    def hushed(self) -> AbstractContextManager[None]:
        """Around its import and its first step: what others print is discarded."""
        return nullcontext() if self.module == SUBJECT else quiet()

    def clip_kind(self, clip: bool) -> str:
        """The word of workloads.bytes_per_param for how this contestant clips."""
        if not clip:
            return "none"
        return "fused" if self.clip_option else "separate"

    def build(
        self, optimizer: str, groups: list[dict], clip: bool, **overrides: Any
    ) -> tuple[torch.optim.Optimizer, Callable[[], Any]]:
        """(optimizer, the call to time): its step, or clip to MAX_NORM and step."""
        options = HYPERPARAMETERS[optimizer] | self.options | overrides
        if clip and self.clip_option:
            options[self.clip_option] = MAX_NORM
        if self.compiled:
            options["lr"] = torch.tensor(options["lr"])
        instance = self.load(optimizer)(groups, **options)
        step = compiled(instance.step) if self.compiled else instance.step
        if not clip or self.clip_option:
            return instance, step
        params = [param for group in groups for param in group["params"]]

        def clip_and_step() -> None:
            clip_grad_norm_(params, MAX_NORM, foreach=True)
            step()

        return instance, clip_and_step


def compiled(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step under torch.compile; an error where torch would go on without compiling it.

    That setting of torch holds for the whole process from then on.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(step)


TORCH_CLASSES = {"adamw": "AdamW", "sgd": "SGD"}
OUR_CLASSES = {"adamw": "FusedAdamW", "sgd": "FusedSGD"}
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(
            "fusedopt",
            "fusedopt",
            OUR_CLASSES,
            clip_option="max_grad_norm",
        ),
        Contestant("torch-fused", "torch.optim", TORCH_CLASSES, {"fused": True}),
        Contestant("torch-foreach", "torch.optim", TORCH_CLASSES, {"foreach": True}),
        Contestant(
            "torch-for-loop", "torch.optim", TORCH_CLASSES, {"foreach": False, "fused": False}
        ),
        Contestant(
            "torch-compiled",
            "torch.optim",
            TORCH_CLASSES,
            compiled=True,
            most_tensors=200,  # compiling takes 0.6 s a tensor on two cores
        ),
        *(
            Contestant(
                f"fusedopt-{backend}",
                "fusedopt",
                OUR_CLASSES,
                {"backend": backend},
                "max_grad_norm",
                devices,
                most_elements=limit,
            )
            for backend, devices, limit in (
                ("reference", ("cpu", "cuda"), 1 << 24),  # seconds a step: it is for checking
                ("triton", ("cuda",), math.inf),
            )
        ),
        Contestant("optimi", "optimi", TORCH_CLASSES),
        Contestant("torchao", "torchao.optim", {"adamw": "_AdamW"}),
        Contestant(
            "bitsandbytes",
            "bitsandbytes.optim",
            {"adamw": "AdamW32bit", "sgd": "SGD32bit"},
            float32_state=True,
        ),
        # AdamW as long as no update of a tensor is larger than usual: then it takes a smaller step.
        Contestant(
            "pytorch-optimizer", "pytorch_optimizer", {"adamw": "StableAdamW"}, {"foreach": True}
        ),
        Contestant(
            "deepspeed-cpu", "deepspeed.ops.adam", {"adamw": "DeepSpeedCPUAdam"}, devices=("cpu",)
        ),
        Contestant(
            "deepspeed-fused", "deepspeed.ops.adam", {"adamw": "FusedAdam"}, devices=("cuda",)
        ),
        Contestant(
            "apex",
            "apex.optimizers",
            {"adamw": "FusedAdam", "sgd": "FusedSGD"},
            devices=("cuda",),
        ),
        Contestant(
            "transformer-engine",
            "transformer_engine.pytorch.optimizers",
            {"adamw": "FusedAdam", "sgd": "FusedSGD"},
            devices=("cuda",),
        ),
    )
}
SUBJECT = "fusedopt"
BASELINE = "torch-fused"

# How far three steps may end from float64, see `step_error`. torch's for-loop, which rounds every
# intermediate, stays under 2 in every dtype; a bf16 element that was not updated is off by 100.
ERROR_LIMIT = 8.0


def widen_state(optimizer: torch.optim.Optimizer, dtype: str) -> None:
    """Give the moments of the params the state dtype that `dtype` names, where it is another."""
    _, wanted = dtypes_of(dtype)
    for state in optimizer.state.values():
        for name, value in state.items():
            if name != "step" and torch.is_tensor(value):
                state[name] = value.to(wanted)


def state_dtypes(optimizer: torch.optim.Optimizer) -> list[str]:
    """The dtypes in which the optimizer holds its moments."""
    return sorted(
        {
            str(value.dtype).removeprefix("torch.")
            for state in optimizer.state.values()
            for name, value in state.items()
            if name != "step" and torch.is_tensor(value)
        }
    )


def step_error(
    contestant: Contestant, optimizer: str, dtype: str, clip: bool, device: str = "cpu"
) -> float:
    """Error of three steps against torch.optim's for-loop in float64 from the same values.

    The largest difference of an element in roundings of its value and way:
    |p - p64| / (eps(dtype) * (|p64| + |p64 - start|)).

    Benchmarks quote it because an optimizer that skips work is fast: torch 2.13's fused SGD
    leaves bf16 params of a full SIMD width wrong on the CPU.
    """
    workload = Workload("check", ((1000,), (64, 64), (7,)))
    lr = {"adamw": 0.1, "sgd": 1.0}[optimizer]  # so that a step is many roundings of a bf16 param
    tested = InputSet(workload, dtype, seed=1, device=device)
    exact = InputSet(workload, dtype, seed=1, device=device)
    starts = [param.detach().double() for param in exact.params]
    for param, grad in zip(exact.params, exact.pristine, strict=True):
        param.data = param.data.double()
        param.grad = grad.double()
    instance, step = contestant.build(optimizer, tested.param_groups(), clip, lr=lr)
    oracle, _ = CONTESTANTS["torch-for-loop"].build(optimizer, exact.param_groups(), False, lr=lr)
    if clip:
        clip_grad_norm_(exact.params, MAX_NORM)
    for _ in range(3):
        step()
        widen_state(instance, dtype)
        tested.restore_grads()
        oracle.step()
    eps = torch.finfo(dtypes_of(dtype)[0]).eps
    errors = []
    for tested_param, exact_param, start in zip(tested.params, exact.params, starts, strict=True):
        p, q = tested_param.detach().double(), exact_param.detach()
        errors.append((p - q).abs() / (eps * (q.abs() + (q - start).abs())))
    return torch.cat([error.flatten() for error in errors]).max().item()  # NaN where one is


def present_and_absent(
    names: list[str], optimizers: list[str], device: str = "cpu", quick: bool = False
) -> tuple[list[Contestant], list[dict[str, str]]]:
    """The named contestants whose classes can be imported, and {contestant, reason} of others.

    `quick` leaves out those whose steps are compiled first, which takes minutes.
    """
    present, absent = [], []
    for contestant in (CONTESTANTS[name] for name in names):
        if device not in contestant.devices:
            absent.append({"contestant": contestant.name, "reason": f"does not run on a {device}"})
            continue
        if quick and contestant.compiled:
            reason = "compiling takes longer than a quick run"
            absent.append({"contestant": contestant.name, "reason": reason})
            continue
        try:
            with contestant.hushed():
                for optimizer in optimizers:
                    if optimizer in contestant.classes:
                        contestant.load(optimizer)
        except Exception as error:  # an import may fail in any way
            absent.append({"contestant": contestant.name, "reason": reason_of(error)})
        else:
            present.append(contestant)
    return present, absent


def admit(
    contestants: list[Contestant], optimizer: str, dtype: str, device: str = "cpu"
) -> tuple[list[tuple[Contestant, bool, float]], list[dict[str, str]]]:
    """[(contestant, clip, step_error)], without clipping first, and {contestant, reason} of those
    that refuse to step: a run of minutes does not end in the middle because of one of them."""
    entries, refused = [], []
    able = []
    for contestant in contestants:
        if optimizer not in contestant.classes:
            reason = f"has no {optimizer}"
        elif contestant.float32_state and dtypes_of(dtype)[1] != torch.float32:
            reason = f"{dtype}: its moments are float32"
        else:
            able.append(contestant)
            continue
        refused.append({"contestant": contestant.name, "reason": reason})
    for clip in (False, True):
        for contestant in list(able):
            try:
                with contestant.hushed():
                    error = step_error(contestant, optimizer, dtype, clip, device)
            except Exception as failure:
                case = f"{optimizer} {dtype}{', clip' if clip else ''}"
                reason = f"{case}: {reason_of(failure)}"
                refused.append({"contestant": contestant.name, "reason": reason})
                able.remove(contestant)
            else:
                entries.append((contestant, clip, error))
    return entries, refused


def eligible(
    entries: list[tuple[Contestant, bool, float]], workload: Workload
) -> tuple[list[tuple[Contestant, bool, float]], list[dict[str, str]]]:
    """The entries that step this workload, and {contestant, reason} of the others."""
    taken, left = [], []
    for entry in entries:
        contestant = entry[0]
        if len(workload.shapes) > contestant.most_tensors:
            reason = f"{workload.name}: has more than {contestant.most_tensors} tensors"
        elif workload.numel > contestant.most_elements:
            reason = f"{workload.name}: has more than {contestant.most_elements:,} elements"
        else:
            taken.append(entry)
            continue
        left.append({"contestant": contestant.name, "reason": reason})
    return taken, left


def reason_of(error: Exception) -> str:
    """Type and message of an error in one short line, without file paths: results are published."""
    message = re.sub(r"\(?(?:[A-Za-z]:)?[\\/][\w.\\/+-]+\)?", "", str(error))
    return textwrap.shorten(f"{type(error).__name__}: {message}", 200)
