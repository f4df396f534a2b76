"""FusedOptimizer: what all fused optimizers share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from operator import is_
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)
from torch.utils._python_dispatch import _disable_current_modes

from fusedopt import (
    backends,
    checkpoint,
    checks,
    distributed,
    fake,
    fallback,
    mistakes,
    options,
    shards,
    show,
)
from fusedopt.backends import native
from fusedopt.backends.repeated import Whole, repeated_step
from fusedopt.rule import Rule, hyper_keys

options_doc = """        maximize: maximize the objective.
        capturable: accepted for drop-in use and without effect.
        foreach: the same.
        fused: the same.
        differentiable: accepted for drop-in use; True raises RuntimeError.
        max_grad_norm: clip the gradients of all groups together to this L2 norm, as
            torch.nn.utils.clip_grad_norm_ before the step, but in registers: `.grad` is never
            written. `inf` measures the norm without clipping; None, not 0, switches it off. This
            and the options below are those of the whole optimizer: they stand in each param group,
            with one value in all of them; each is an attribute that reads and writes all groups.
        clip_grad_value: clamp each gradient element to +-this value, > 0; not with max_grad_norm.
        skip_nonfinite: where the total norm is NaN or infinite, the step changes no param, no state
            and no step count, and `skipped_steps` goes up by one.
        process_group: a torch.distributed.ProcessGroup over whose ranks the params are spread: the
            norm is that of all ranks together.
        backend: "auto" (the environment variable FUSEDOPT_BACKEND, else the first that can serve of
            cuda, triton, cpu, reference), or one of them by name.
"""

_UNCHECKED = object()

_Loss = TypeVar("_Loss")


class FusedOptimizer(options.InGroups, Optimizer):
    """Base class: a subclass gives its `rule`, its constructor and `check_group`.

    One `step()` is one pass over the memory of all params, whatever their number, groups and
    dtypes. `param_groups`, `state` and `state_dict()` are those of torch.optim.
    """

    rule: ClassVar[Rule]

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | Tensor | None,
        clip_grad_value: float | Tensor | None,
        skip_nonfinite: bool,
        process_group: Any,
        backend: backends.Backend,
    ) -> None:
        self.check_group(defaults)
        keywords = {
            "max_grad_norm": max_grad_norm,
            "clip_grad_value": clip_grad_value,
            "skip_nonfinite": skip_nonfinite,
            "process_group": process_group,
            "backend": backend,
        }
        options.check(keywords)
        if not isinstance(params, Tensor):  # which torch refuses
            given = mistakes.param_list(params)  # an iterator is walked once
            groups = [group for group in given if isinstance(group, dict)]
            keywords = options.settle(keywords, groups)
            options.check(keywords)
            if not isinstance(params, set):  # of which torch 2.15 warns
                params = given
        self._start(keywords)
        super().__init__(params, {**self._plain(defaults), **keywords})

    def _start(self, given: dict[str, Any]) -> None:
        """Sets what is not part of a checkpoint or a copy. Attributes of the instance: a wrapper
        that inherits from its class, and hands on what it lacks, must not find others."""
        self._candidates = backends.Candidates(backends.check_name(given["backend"]))
        self._candidates_for = given["backend"]
        self._checked_group: Any = _UNCHECKED  # the process_group of the last step with a norm
        self._checked_options = ()
        self._checked_keys = 0
        self._unknown_keys = set()
        self._backend_in_use: str | None = None  # which one served the last step
        self._last_request: backends.Request | None = None  # what that did
        self._norm_tensor: Tensor | None = None
        self._skipped_tensor: Tensor | None = None
        self._handle: int | None = None  # by which compiled graphs find this optimizer
        self._drivers: dict[Any, Any] = {}  # those of the native backends
        self._whole: Whole | None = None  # the last step, if one call of a driver did it
        # Does a step like the last one; and what that one was told.
        self._repeated: Callable[[dict[str, Any]], bool] | None = None
        self._repeated_for: tuple[Any, ...] = ()

    @classmethod
    def check_group(cls, group: dict[str, Any]) -> None:
        """Raises for hyperparameters out of range (ValueError) or of a wrong type (TypeError)."""
        raise NotImplementedError

    def check_values(self, group: dict[str, Any], where: str) -> None:
        """Raises for hyperparameters that step() and load_state_dict() do not take: those that the
        constructor refuses, but for a negative lr, which a scheduler may have set. Flags of other
        implementations have no effect there. `where` names the group in the message."""
        flags = {"foreach": None, "fused": None, "differentiable": False}
        try:
            checks.real("learning rate", group["lr"])
            self.check_group({**group, **flags, "lr": 0.0})
        except (ValueError, TypeError) as error:
            raise type(error)(f"{where}: {error}") from error

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim; its hyperparameters are checked first.

        Raises:
            TypeError: params that are none.
            ValueError: an option of the whole optimizer with another value than the groups have.
        """
        mistakes.check_group(param_group, len(self.param_groups))
        self.check_group({**self.defaults, **param_group})
        param_group.update(self._plain(param_group))
        self._hand_on_options(param_group)
        try:
            super().add_param_group(param_group)
        except TypeError as error:
            raise TypeError(f"{error}{mistakes.item_hint(param_group['params'])}") from None
        self._warn_of_unknown_keys(self.param_groups[-1:])
        self._checked_keys += len(self.param_groups[-1])
        self._checked_group = _UNCHECKED

    def _plain(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group with hyperparameters of numpy and the like in Python's types."""
        keys = [key for key, _ in hyper_keys(self.rule) if key in group]
        return {**group, **{key: checks.plain(group[key]) for key in keys}}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """step(closure=None): performs one step.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with grad enabled.

        Returns:
            The loss of the closure, or None.

        Raises:
            RuntimeError: tensors that the chosen backend cannot serve, with the reason.
            ValueError, TypeError: a hyperparameter, gradient or state that does not fit its param;
                a closure that is no function. Nothing has changed then.

        Warns:
            RuntimeWarning: once in a process, where the reference backend serves params that a
                faster one is made for, with the reason and what to do.
        """
        if not torch.compiler.is_compiling():  # asked first: Dynamo would guard what follows
            repeated = self._repeated  # once: another thread may change it
            if repeated is not None and not (args or kwargs) and repeated(self.__dict__):
                return None
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or (not torch.compiler.is_compiling() and torch.autograd._profiler_enabled())
        ) and not self._hooked_by_torch():
            return self._hooked_step(*args, **kwargs)
        return self._step(*args, **kwargs)

    # torch would wrap step() into a record_function of 23 us; step() does so itself where a hook or
    # a profiler can see the difference.
    step.hooked = True  # type: ignore[attr-defined]  # torch leaves it as it is

    def _hooked_by_torch(self) -> bool:
        """Whether this call of step() comes from a subclass's own, which torch has wrapped where an
        optimizer was constructed with it, and not where `__class__` was set."""
        for cls in type(self).__mro__[: type(self).__mro__.index(FusedOptimizer)]:
            if getattr(cls.__dict__.get("step"), "hooked", False):
                return True
        return False

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            mistakes.check_closure(closure)
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            from fusedopt import compiled  # 0.1 s that nobody else should wait for

            compiled.step(self)
        else:
            self._run(self._request())
        return loss

    def _run(self, request: backends.Request, tensors: Any = None) -> None:
        """A step by the first backend that can serve, on other `tensors` if given: an object with
        the attributes that backends use of this one."""
        tensors = tensors or self
        before, self._repeated = self._repeated, None
        self._whole = None
        if fake.concerns(tensors.param_groups):
            backends.reference.step(tensors, request)
            self._backend_in_use = "reference"
            return
        if request.needs_norm and request.process_group is not self._checked_group:
            shards.check_norm(self)
            request.process_group = self._checked_group = self.process_group
        reasons = []
        for name, module in self._candidates.of(tensors.param_groups):
            if module is backends.reference and self._candidates.auto:
                fallback.warn_once(self.rule.name, tensors.param_groups)
            reason = module.step(tensors, request)
            if not reason:
                self._backend_in_use = name
                self._last_request = request
                self._note_repeated(before)
                return
            reasons.append(f"{name}: {reason}")
        raise RuntimeError("no backend can serve this step; " + "; ".join(reasons))

    def _note_repeated(self, before: Callable[[dict[str, Any]], bool] | None) -> None:
        """Lets the next step repeat this one; `before` repeats the one before."""
        whole = self._whole
        if whole is None:
            return
        told: tuple[Any, ...] = (self._checked_options, self._checked_keys)
        told += (self._norm_tensor, self._skipped_tensor, whole.driver, whole.stream)
        if before is None or not all(map(is_, told, self._repeated_for)):
            before = repeated_step(self, whole)
            self._repeated_for = told
        self._repeated = before

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        steps: list[Tensor],
    ) -> bool:
        # Dynamo knows this name: it runs the function while it traces, with the tensors themselves.
        from fusedopt import compiled

        return compiled.init_group(self, group, params, grads, states, steps)

    _hooked_step = Optimizer.profile_hook_step(_step)
    step.__signature__ = inspect.signature(_step)  # type: ignore[attr-defined]

    @property
    def grad_norm(self) -> Tensor | None:
        """Total L2 norm of the gradients of the last step, before clipping and after unscaling.

        A 0-dim float32 tensor on the device of the first param with a gradient, the same tensor for
        each step until that is another device: clone it to keep a value. None before the first
        step that measures it.

        Raises:
            AttributeError: where no norm was measured, and neither `max_grad_norm` nor
                `skip_nonfinite` asks for one; getattr(optimizer, "grad_norm", None) is None there.
        """
        norm = self._norm_tensor
        if norm is None and self.max_grad_norm is None and not self.skip_nonfinite:
            raise AttributeError(
                f"this {type(self).__name__} measures no grad_norm: write max_grad_norm=1.0, to "
                'clip the gradients to that norm, or max_grad_norm=float("inf"), to measure it '
                "without clipping"
            )
        return norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps `skip_nonfinite` or a GradScaler's overflow has made a no-op.

        A 0-dim int64 tensor on the device of the first param with a gradient, the same tensor for
        each step until that is another device; before the first step on the CPU. Read the property
        again where that may have changed: the tensor that counts on is another one then.
        """
        return self._skipped_buffer() if self._skipped_tensor is None else self._skipped_tensor

    @property
    def backend_in_use(self) -> str | None:
        """The backend that served the last step: "cuda", "triton", "cpu" or "reference"; None
        before the first step."""
        return self._backend_in_use

    def log(self) -> dict[str, float]:
        """The figures of the last step, for a logger, in one read of the device.

        It waits for the device: call it as often as a log is written, not in each step.

        Returns:
            `skipped_steps` always; and where the step has measured a norm, which `max_grad_norm` or
            `skip_nonfinite` asks for, `grad_norm`, before clipping, and `clip_coef`, what clipping
            has multiplied the gradients with: min(1, max_grad_norm / (grad_norm + 1e-6)), and 1
            where nothing was to be clipped. Before the first step there is no norm.
        """
        if torch.compiler.is_compiling():
            from fusedopt import compiled

            return compiled.log(self)
        return show.figures(self)

    def __repr__(self) -> str:
        return show.as_text(self)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler hands the scale over instead of unscaling `.grad` itself: only where
        an option of our own needs it, because frameworks take it as "clips by itself"."""
        return (
            self.max_grad_norm is not None
            or self.clip_grad_value is not None
            or bool(self.skip_nonfinite)
        )

    def _norm_buffer(self, device: torch.device | str) -> Tensor:
        """`grad_norm` on a device, brought there with its value from another one."""
        self._norm_tensor = _figure(self._norm_tensor, torch.float32, device)
        return self._norm_tensor

    def _skipped_buffer(self, device: torch.device | str = "cpu") -> Tensor:
        """`skipped_steps` on a device, brought there with its value from another one."""
        self._skipped_tensor = _figure(self._skipped_tensor, torch.int64, device)
        return self._skipped_tensor

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim, with each `step` as a float32 CPU tensor, which every implementation of
        torch.optim takes, and without the options of the whole optimizer. Post hooks see it so."""
        return checkpoint.save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of fusedopt or of torch.optim, of any implementation of it.

        Every state tensor goes to its param's device and layout, and into its param's dtype unless
        the saved one is wider. State of another's making goes, as in torch.optim, to the param's
        device and dtype. All is checked before anything is changed.

        Raises:
            ValueError: groups, shapes, dtypes or values that do not fit; a checkpoint of another
                optimizer.
            TypeError: entries of a wrong type.
        """
        checkpoint.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state["defaults"] = options.without(self.defaults)
        state["param_groups"] = [options.without(group) for group in self.param_groups]
        group = distributed.process_group_to_state(self.process_group)
        state["options"] = {**self._options(), "process_group": group}
        state["_norm_tensor"] = self._norm_tensor
        state["_skipped_tensor"] = self._skipped_tensor
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        given = state.get("options")
        super().__setstate__({key: value for key, value in state.items() if key != "options"})
        if given is not None:  # a copy, which has had no constructor
            tensors = self._norm_tensor, self._skipped_tensor
            group = distributed.process_group_from_state(given["process_group"])
            given = {**given, "process_group": group}
            self._start(given)
            self._norm_tensor, self._skipped_tensor = tensors
            self.defaults.update(given)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)


def _figure(tensor: Tensor | None, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A 0-dim tensor on a device, with the value of `tensor` where that has one."""
    if tensor is not None and tensor.device == device:
        return tensor
    if native.capturing(torch.device(device)):  # which would make it when the graph is replayed
        raise RuntimeError(
            "run one step like it before a CUDA graph is captured: it makes grad_norm and "
            "skipped_steps on the device of the first gradient"
        )
    with _disable_current_modes():  # under a FakeTensorMode a fake one would be kept
        if tensor is None or tensor.is_meta:
            return torch.zeros((), dtype=dtype, device=device)
        return tensor.to(device)
