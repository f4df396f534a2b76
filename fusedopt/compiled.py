"""step() inside a region of torch.compile: one custom op, `fusedopt::step_`, for the whole step.

Imported only there. Elsewhere step() calls the native driver itself: the dispatcher would cost
about half a microsecond a tensor. Dynamo runs `_init_group` of an optimizer while it traces, puts
the op into the graph, and guards the tensors and numbers that the op is given.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import distributed, show, step_count
from fusedopt.backends import Request
from fusedopt.plan import Host, is_sparse
from fusedopt.rule import hyper_keys

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

_optimizers: weakref.WeakValueDictionary[int, FusedOptimizer] = weakref.WeakValueDictionary()
_next_handle = itertools.count(1)


def handle_of(optimizer: FusedOptimizer) -> int:
    """The number by which the op finds an optimizer: its rule, backends and memory on devices."""
    if optimizer._handle is None:
        optimizer._handle = next(_next_handle)
        _optimizers[optimizer._handle] = optimizer
    return optimizer._handle


def init_group(
    optimizer: FusedOptimizer,
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
) -> bool:
    """Appends the tensors of a group's params that have gradients, and makes missing state. In
    `states` those of one param follow those of another.

    Returns:
        Whether the op can serve: not where the first update differs from later ones and the state
        is not there yet, nor for what is no plain tensor.
    """
    rule, host = optimizer.rule, Host(optimizer.rule)
    names = rule.state[: rule.states(group)]
    handle_of(optimizer)
    request = optimizer._request()
    optimizer.check_values(group, "a param group")
    every = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    if every:  # the figures are on the device of the first one
        if request.needs_norm:
            optimizer._norm_buffer(every[0].device)
        optimizer._skipped_buffer(every[0].device)
    shared = _step_uses(optimizer)
    for param in group["params"]:
        grad = param.grad
        if grad is None:
            continue
        if any(distributed.is_dtensor(t) or t.is_sparse for t in (param, grad)):
            return False
        entry = optimizer.state[param] if names or rule.has_step else {}
        if rule.first_differs(group) and any(entry.get(name) is None for name in names):
            return False
        for name in names:
            if entry.get(name) is None:
                entry[name] = host.new_state(param, name)
            elif is_sparse(entry[name]) and rule.sparse_error is None:
                entry[name] = entry[name].detach().to_dense()  # Dynamo cannot guard the other
        if rule.has_step:
            if "step" not in entry:
                entry["step"] = host.new_state(param, "step").to(param.device)
            elif not step_count.stays(entry["step"], param.device):
                entry["step"] = step_count.as_step(entry["step"]).to(param.device)
            if shared[entry["step"].data_ptr()] > 1:
                shared[entry["step"].data_ptr()] -= 1
                own = host.own_step(entry["step"])
                entry["step"] = entry["step"] if own is None else own
            steps.append(entry["step"])
        params.append(param)
        grads.append(grad)
        states.extend(entry[name] for name in names)
    return True


def _step_uses(optimizer: FusedOptimizer) -> Counter[int]:
    """How many params have their step count at an address."""
    entries = [e for e in optimizer.state.values() if isinstance(e, dict)]
    return Counter(e["step"].data_ptr() for e in entries if isinstance(e.get("step"), Tensor))


@torch.compiler.disable
def _outside_of_the_graph(optimizer: FusedOptimizer) -> None:
    optimizer._run(optimizer._request())


@torch.compiler.disable
def log(optimizer: FusedOptimizer) -> dict[str, float]:
    """FusedOptimizer.log(), with a graph break."""
    return show.figures(optimizer)


def step(optimizer: FusedOptimizer) -> None:
    """The step as Dynamo traces it: the op, or a graph break and a step in eager mode."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    states: list[Tensor] = []
    steps: list[Tensor] = []
    group_of: list[int] = []
    maximize: list[bool] = []
    hyper: list[float] = []
    hyper_tensors: list[Tensor] = []
    hyper_tensors_at: list[int] = []
    options = optimizer.param_groups[0]
    max_grad_norm, clip_grad_value = options["max_grad_norm"], options["clip_grad_value"]
    skip_nonfinite = options["skip_nonfinite"]
    # A tensor's value is not known here.
    served = options["process_group"] is None and not (
        isinstance(max_grad_norm, Tensor) or isinstance(clip_grad_value, Tensor)
    )
    for g, group in enumerate(optimizer.param_groups):
        lists: tuple[list[Tensor], ...] = ([], [], [], [])
        served = optimizer._init_group(group, *lists) and served
        params += lists[0]
        grads += lists[1]
        states += lists[2]
        steps += lists[3]
        group_of += [g] * len(lists[0])
        maximize.append(bool(group["maximize"]))
        for name, count in hyper_keys(optimizer.rule):
            for value in group[name] if count else (group[name],):
                if isinstance(value, Tensor):
                    hyper_tensors.append(value)
                    hyper_tensors_at.append(len(hyper))
                    hyper.append(0.0)
                else:
                    hyper.append(float(value))
    if not served or not params:
        _outside_of_the_graph(optimizer)
        return
    with torch.no_grad():
        step_(
            optimizer._handle,
            params,
            grads,
            states,
            steps,
            group_of,
            maximize,
            hyper,
            hyper_tensors,
            hyper_tensors_at,
            max_grad_norm,
            clip_grad_value,
            skip_nonfinite,
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
            optimizer._norm_tensor if max_grad_norm is not None or skip_nonfinite else None,
            optimizer._skipped_tensor,
        )


class _Step:
    """An optimizer as the backends see it, made of the op's arguments."""

    def __init__(
        self,
        optimizer: FusedOptimizer,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        grad_norm: Tensor | None,
        skipped_steps: Tensor,
    ) -> None:
        self.rule = optimizer.rule
        self.check_values = optimizer.check_values
        self._drivers = optimizer._drivers
        self.param_groups = param_groups
        self.state = state
        self._grad_norm = grad_norm
        self._skipped_steps = skipped_steps

    def _norm_buffer(self, device: torch.device | str) -> Tensor | None:
        return self._grad_norm

    def _skipped_buffer(self, device: torch.device | str) -> Tensor:
        return self._skipped_steps


# A replayed CUDA graph would repeat the uploads of the step that was captured.
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
_TAGS: dict[str, Any] = {} if _UNSAFE is None else {"tags": (_UNSAFE,)}


@torch.library.custom_op(
    "fusedopt::step_",
    mutates_args=("params", "states", "steps", "grad_norm", "skipped_steps"),
    schema="(int optimizer, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, "
    "Tensor(c!)[] steps, int[] group_of, bool[] maximize, float[] hyper, Tensor[] hyper_tensors, "
    "int[] hyper_tensors_at, float? max_grad_norm, float? clip_grad_value, bool skip_nonfinite, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor(d!)? grad_norm, Tensor(e!) skipped_steps) -> ()",
    **_TAGS,
)
def step_(
    optimizer: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    group_of: list[int],
    maximize: list[bool],
    hyper: list[float],
    hyper_tensors: list[Tensor],
    hyper_tensors_at: list[int],
    max_grad_norm: float | None,
    clip_grad_value: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    grad_norm: Tensor | None,
    skipped_steps: Tensor,
) -> None:
    """One step of the optimizer with this handle, on these tensors instead of its own.

    Args:
        optimizer: from `handle_of`.
        params, grads: those that take part, of all groups, of equal shapes in pairs.
        states: the state tensors of the first param, then those of the second, in the rule's order.
        steps: the 0-dim step count of each param, or none where the rule has no step.
        group_of: the index of each param's group.
        maximize: of each group.
        hyper: the numbers of each group in the order of `Rule.hyper`; those at the positions
            `hyper_tensors_at` are the one-element `hyper_tensors`.
        max_grad_norm, ..., found_inf: as `backends.Request`.
        grad_norm: 0-dim float32 that takes the total norm; needed where a norm is asked for.
        skipped_steps: 0-dim int64 that a skipped step adds 1 to.

    Raises:
        ValueError: no such optimizer; lists of lengths that do not fit.
    """
    owner = _optimizers.get(optimizer)
    if owner is None:
        raise ValueError(f"there is no optimizer with the handle {optimizer}")
    rule = owner.rule
    _check_lengths(params, grads, group_of, maximize)
    numbers: list[Any] = list(hyper)
    for position, tensor in zip(hyper_tensors_at, hyper_tensors, strict=True):
        numbers[position] = tensor
    values = iter(numbers)
    groups: list[dict[str, Any]] = []
    for flag in maximize:
        group: dict[str, Any] = {"params": [], "maximize": flag}
        for name, count in hyper_keys(rule):
            group[name] = tuple(next(values) for _ in range(count)) if count else next(values)
        groups.append(group)
    names_of = [rule.state[: rule.states(group)] for group in groups]
    expected = sum(len(names_of[g]) for g in group_of)
    if len(states) != expected or len(steps) != len(params) * rule.has_step:
        raise ValueError(
            f"states and steps must have {expected} and {len(params) * rule.has_step} tensors, "
            f"got {len(states)} and {len(steps)}"
        )
    state: dict[Tensor, dict[str, Any]] = {}
    left, left_steps = iter(states), iter(steps)
    for param, grad, g in zip(params, grads, group_of, strict=True):
        alias = param.detach()
        alias.grad = grad
        groups[g]["params"].append(alias)
        state[alias] = {name: next(left) for name in names_of[g]}
        if rule.has_step:
            state[alias]["step"] = next(left_steps)
    request = Request(max_grad_norm, clip_grad_value, skip_nonfinite, grad_scale, found_inf, None)
    owner._run(request, _Step(owner, groups, state, grad_norm, skipped_steps))


def _check_lengths(
    params: list[Tensor], grads: list[Tensor], group_of: list[int], maximize: list[bool]
) -> None:
    if not len(params) == len(grads) == len(group_of):
        raise ValueError(
            f"params, grads and group_of must be equally long, got {len(params)}, {len(grads)} and "
            f"{len(group_of)}"
        )
    if any(not 0 <= g < len(maximize) for g in group_of):
        raise ValueError(f"group_of must be below the number of groups, {len(maximize)}")


@step_.register_fake
def _(
    optimizer: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    group_of: list[int],
    maximize: list[bool],
    *rest: Any,
) -> None:
    _check_lengths(params, grads, group_of, maximize)
