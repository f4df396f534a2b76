"""FusedOptimizer: what all fused optimizers share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from fusedopt import backends, checkpoint, checks
from fusedopt.rule import Rule

options_doc = """        maximize: maximize the objective.
        capturable, foreach, fused: accepted for drop-in use and without effect.
        differentiable: accepted for drop-in use; True raises RuntimeError.
        max_grad_norm: clip the gradients of all groups together to this L2 norm, as
            torch.nn.utils.clip_grad_norm_ before the step, but in registers: `.grad` is never
            written. `inf` measures the norm without clipping.
        clip_grad_value: clamp each gradient element to +-this value; not with max_grad_norm.
        skip_nonfinite: where the total norm is NaN or infinite, the step changes no param, no state
            and no step count, and `skipped_steps` goes up by one.
        process_group: a torch.distributed group over whose ranks the params are spread: the norm is
            that of all ranks together.
        backend: "auto" (the environment variable FUSEDOPT_BACKEND, else the first that can serve of
            cuda, triton, cpu, reference), or one of them by name.
"""


class FusedOptimizer(Optimizer):
    """Base class: a subclass gives its `rule`, its constructor and `check_group`.

    One `step()` is one pass over the memory of all params, whatever their number, groups and
    dtypes. `param_groups`, `state` and `state_dict()` are those of torch.optim.
    """

    rule: ClassVar[Rule]

    # Not part of a checkpoint or a copy: made anew where missing.
    _backend_in_use: str | None = None  # which one served the last step
    _norm_tensor: Tensor | None = None
    _skipped_tensor: Tensor | None = None
    _handle: int | None = None  # by which compiled graphs find this optimizer

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None,
        clip_grad_value: float | None,
        skip_nonfinite: bool,
        process_group: Any,
        backend: str,
    ) -> None:
        self.check_group(defaults)
        checks.clip_options(max_grad_norm, clip_grad_value)
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite must be a bool, got {skip_nonfinite!r}")
        self._candidates = backends.Candidates(backends.check_name(backend))
        self.max_grad_norm = max_grad_norm
        self.clip_grad_value = clip_grad_value
        self.skip_nonfinite = skip_nonfinite
        self.process_group = process_group
        self.backend = backend
        self._drivers: dict[Any, Any] = {}  # those of the native backends
        super().__init__(params, defaults)

    @classmethod
    def check_group(cls, group: dict[str, Any]) -> None:
        """Raises for hyperparameters out of range (ValueError) or of a wrong type (TypeError)."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as torch.optim; its hyperparameters are checked first."""
        if isinstance(param_group, dict):
            self.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """step(closure=None): performs one step.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with grad enabled.

        Returns:
            The loss of the closure, or None.

        Raises:
            RuntimeError: tensors that the chosen backend cannot serve, with the reason.
            ValueError, TypeError: a hyperparameter, gradient or state that does not fit its param.
                Nothing has changed then.
        """
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or (not torch.compiler.is_compiling() and torch.autograd._profiler_enabled())
        ) and type(self).step is FusedOptimizer.step:  # torch wraps a subclass's own step()
            return self._hooked_step(*args, **kwargs)
        return self._step(*args, **kwargs)

    # torch would wrap step() into a record_function of 23 us; step() does so itself where a hook or
    # a profiler can see the difference.
    step.hooked = True  # type: ignore[attr-defined]  # torch leaves it as it is

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        request = backends.Request(
            self.max_grad_norm,
            self.clip_grad_value,
            self.skip_nonfinite,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self.process_group,
        )
        if torch.compiler.is_compiling():
            from fusedopt import compiled  # 0.1 s that nobody else should wait for

            compiled.step(self, request)
        else:
            self._run(request)
        return loss

    def _run(self, request: backends.Request, tensors: Any = None) -> None:
        """A step by the first backend that can serve, on other `tensors` if given: an object with
        the attributes that backends use of this one."""
        reasons = []
        subject = tensors or self
        for name, module in self._candidates.of(subject.param_groups):
            reason = module.step(subject, request)
            if not reason:
                self._backend_in_use = name
                return
            reasons.append(f"{name}: {reason}")
        raise RuntimeError("no backend can serve this step; " + "; ".join(reasons))

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
        step, and where neither `max_grad_norm` nor `skip_nonfinite` asks for a norm.
        """
        return self._norm_tensor

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps `skip_nonfinite` or a GradScaler's overflow has made a no-op.

        A 0-dim int64 tensor on the device of the first param with a gradient, the same tensor for
        each step until that is another device; before the first step on the CPU. Read the property
        again where that may have changed: the tensor that counts on is another one then.
        """
        return self._skipped_buffer() if self._skipped_tensor is None else self._skipped_tensor

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
        if self._norm_tensor is None:
            self._norm_tensor = torch.zeros((), dtype=torch.float32, device=device)
        elif self._norm_tensor.device != device:
            self._norm_tensor = self._norm_tensor.to(device)
        return self._norm_tensor

    def _skipped_buffer(self, device: torch.device | str = "cpu") -> Tensor:
        """`skipped_steps` on a device, brought there with its value from another one."""
        if self._skipped_tensor is None:
            self._skipped_tensor = torch.zeros((), dtype=torch.int64, device=device)
        elif self._skipped_tensor.device != device:
            self._skipped_tensor = self._skipped_tensor.to(device)
        return self._skipped_tensor

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim, with each `step` as a float32 CPU tensor, which every implementation of
        torch.optim takes."""
        return checkpoint.with_steps_on_cpu(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of fusedopt or of torch.optim, of any implementation of it.

        Every tensor keeps its saved dtype and goes to its param's device and layout. All is
        checked before anything is changed.

        Raises:
            ValueError: groups, shapes, dtypes or values that do not fit.
            TypeError: entries of a wrong type.
        """
        checkpoint.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        for name in ("max_grad_norm", "clip_grad_value", "skip_nonfinite", "process_group"):
            state[name] = getattr(self, name)
        state["backend"] = self.backend
        state["_norm_tensor"] = self._norm_tensor
        state["_skipped_tensor"] = self._skipped_tensor
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_drivers", {})
        self._candidates = backends.Candidates(backends.check_name(self.backend))
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
