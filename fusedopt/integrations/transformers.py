"""For the Trainer of Hugging Face transformers: one pass clips, steps and measures the norm.

Examples:
    >>> class Trainer(FusedClippingMixin, transformers.Trainer):
    ...     pass
    >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusedopt.adamw import FusedAdamW
from fusedopt.optimizer import FusedOptimizer

if TYPE_CHECKING:
    from transformers import TrainingArguments


def optimizer_cls_and_kwargs(
    args: TrainingArguments, **options: Any
) -> tuple[type[FusedAdamW], dict[str, Any]]:
    """For Trainer(optimizer_cls_and_kwargs=...), which hands over no argument of its own.

    Args:
        args: learning_rate, adam_beta1, adam_beta2, adam_epsilon and max_grad_norm (0: no clipping)
            are taken from it. Trainer itself puts weight_decay into the param groups.
        options: further options of FusedAdamW, or other values for these.

    Returns:
        The class and its keyword arguments.
    """
    kwargs: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        # infinity: measured for the log, not clipped
        "max_grad_norm": args.max_grad_norm or float("inf"),
    }
    return FusedAdamW, {**kwargs, **options}


class FusedClippingMixin:
    """Put before Trainer among the bases: leaves clipping to a fusedopt optimizer that has
    max_grad_norm, and logs its norm. Trainer would read and write all gradients for that.

    Raises:
        TypeError: in the first step, where the optimizer is none of fusedopt.
        ValueError: in the first step, where it has no max_grad_norm.
    """

    optimizer: Any
    args: Any

    def _fused(self) -> FusedOptimizer:
        optimizer = self.optimizer
        while not isinstance(optimizer, FusedOptimizer):
            if not hasattr(optimizer, "optimizer"):
                raise TypeError(
                    "FusedClippingMixin needs a fusedopt optimizer, got "
                    f"{type(optimizer).__name__}; pass optimizer_cls_and_kwargs="
                    "optimizer_cls_and_kwargs(args) to the Trainer"
                )
            optimizer = optimizer.optimizer  # accelerate wraps it
        if optimizer.max_grad_norm is None:
            raise ValueError(
                "FusedClippingMixin leaves clipping to the optimizer, which has no max_grad_norm"
            )
        return optimizer

    def _clip_grad_norm(self, model: Any) -> None:
        self._fused()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Tensor:
        """The tensor that the step writes: Trainer reads it after the step, for the log."""
        optimizer = self._fused()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        # The step writes it on the device of the first param that has a gradient.
        devices = [p.device for p in params if p.grad is not None] or [p.device for p in params]
        return optimizer._norm_buffer(devices[0] if devices else "cpu")
