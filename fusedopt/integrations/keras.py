"""For Keras 3 on its torch backend, whose compile() takes no torch optimizer.

Examples:
    >>> from fusedopt.integrations.keras import FusedAdamW  # KERAS_BACKEND=torch
    >>> model.compile(optimizer=FusedAdamW(1e-3, global_clipnorm=1.0), loss="mse")
"""

from __future__ import annotations

from typing import Any

import keras
import torch
from torch import Tensor

import fusedopt

if keras.backend.backend() != "torch":
    raise ImportError(
        f"fusedopt needs Keras on its torch backend, and this is {keras.backend.backend()}; set "
        "KERAS_BACKEND=torch before keras is imported"
    )


@keras.saving.register_keras_serializable(package="fusedopt")
class FusedAdamW(keras.optimizers.AdamW):
    """keras.optimizers.AdamW, fused: the same arguments, variables, checkpoints and updates.

    `weight_decay`, `global_clipnorm` and `clipvalue` are part of the one pass over memory;
    `clipnorm`, which clips each gradient by its own norm, is done by Keras before it. `epsilon` is
    added to the root of the second moment before its bias correction, as Keras defines it.

    Raises:
        ValueError, TypeError: as keras.optimizers.AdamW, and as fusedopt.FusedAdamW at the first
            step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Behind a list, so that Keras does not take the tensors in it for variables of its own.
        self._fused: list[fusedopt.FusedAdamW] = []
        self._steps: list[Tensor] = []
        self._count: tuple[Tensor, int, int] | None = None

    @property
    def grad_norm(self) -> Tensor | None:
        """Total L2 norm of the last step's gradients before clipping, a 0-dim float32 tensor on
        their device; None before the first step.

        Raises:
            AttributeError: without global_clipnorm, which asks for it.
        """
        if not self.global_clipnorm:
            raise AttributeError(
                "this FusedAdamW measures no grad_norm: write global_clipnorm=1.0 to clip the "
                'gradients to that norm, or global_clipnorm=float("inf") to measure it'
            )
        return self._fused[0].grad_norm if self._fused else None

    def _clip_gradients(self, grads: list[Tensor]) -> list[Tensor]:
        return super()._clip_gradients(grads) if self.clipnorm else grads

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        """Left to the step, which comes next."""

    def _applied(self) -> int:
        """How often apply() was called, without waiting for a GPU where nobody else counted."""
        value = self._iterations.value
        if self._count is None or self._count[0] is not value or self._count[1] != value._version:
            return int(value)
        return self._count[2]

    @torch.compiler.disable
    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """As keras.optimizers.Optimizer.apply: one step on variables that have gradients."""
        after = self._applied() + 1
        super().apply(grads, trainable_variables)
        value = self._iterations.value
        self._count = (value, value._version, after)

    def _backend_update_step(self, grads: list[Tensor], variables: list[Any], lr: Any) -> None:
        params = [variable.value for variable in variables]
        lr = lr.value if isinstance(lr, keras.Variable) else lr
        before = self._applied() // (self.gradient_accumulation_steps or 1)
        device = params[0].device
        steps = torch.full((len(params),), before, dtype=torch.float32, device=device).unbind()
        if not self._fused:
            self._fused.append(
                fusedopt.FusedAdamW(
                    params,
                    max_grad_norm=self.global_clipnorm or None,
                    clip_grad_value=self.clipvalue or None,
                )
            )
        fused = self._fused[0]
        fused.state.clear()
        for variable, param, step in zip(variables, params, steps, strict=True):
            index = self._get_variable_index(variable)
            moments = {"exp_avg": self._momentums, "exp_avg_sq": self._velocities}
            if self.amsgrad:
                moments["max_exp_avg_sq"] = self._velocity_hats
            state = {name: of[index].value.detach() for name, of in moments.items()}
            fused.state[param] = {**state, "step": step}
        correction = 1 - float(self.beta_2) ** (before + 1)
        common = {
            **fused.defaults,
            "lr": lr,
            "betas": (float(self.beta_1), float(self.beta_2)),
            "eps": float(self.epsilon) / correction**0.5,
            "amsgrad": self.amsgrad,
        }
        decays = [self._use_weight_decay(variable) for variable in variables]
        fused.param_groups = [
            {
                **common,
                "params": [p for p, d in zip(params, decays, strict=True) if d == decayed],
                "weight_decay": self.weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]
        own_grads = [p.grad for p in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        try:
            fused.step()
        finally:
            for param, grad in zip(params, own_grads, strict=True):
                param.grad = grad
            fused.state.clear()
