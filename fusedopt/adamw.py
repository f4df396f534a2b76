"""FusedAdamW and FusedAdam."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt import checks
from fusedopt.backends import Backend
from fusedopt.optimizer import FusedOptimizer, options_doc
from fusedopt.rule import Rule, precise


def bias_correction(beta: float, step: float) -> float:
    """1 - beta^step, without the cancellation of that subtraction."""
    return -math.expm1(step * math.log1p(beta - 1)) if beta > 0 else 1.0


def adamw_update(
    param: Tensor,
    grad: Tensor,
    state: list[Tensor],
    group: dict[str, Any],
    step: float,
    first: bool,
) -> tuple[Tensor, list[Tensor]]:
    """One step of Adam or AdamW in plain torch ops; see csrc/rules/adamw.h for the formula."""
    dtype = grad.dtype
    lr, eps, weight_decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    param, grad = precise(param), precise(grad)
    if group["decoupled_weight_decay"]:
        param = param * (1 - lr * weight_decay)
    elif weight_decay != 0:
        grad = grad + weight_decay * param
    old = [precise(s) for s in state]
    moments = [
        (old[0] + (grad - old[0]) * (1 - beta1)).to(dtype),
        (old[1] * beta2 + grad * (1 - beta2) * grad).to(dtype),
    ]
    if group["amsgrad"]:
        moments.append(torch.maximum(state[2], moments[1]))
    denom = precise(moments[-1]).sqrt() / bias_correction(beta2, step) ** 0.5 + eps
    step_size = lr / bias_correction(beta1, step)
    return param - step_size * (precise(moments[0]) / denom), moments


ADAMW = Rule(
    name="adamw",
    hyper=("lr", "betas[2]", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay"),
    state=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    has_step=True,
    states=lambda group: 3 if group["amsgrad"] else 2,
    update=adamw_update,
    sparse_error="Adam does not support sparse gradients, please consider SparseAdam instead",
)


class FusedAdam(FusedOptimizer):
    __doc__ = f"""Adam with L2 weight decay in the gradient, as torch.optim.Adam, fused.

    .. math::
        g &= g + \\lambda \\theta, \\quad
        m = \\beta_1 m + (1 - \\beta_1) g, \\quad v = \\beta_2 v + (1 - \\beta_2) g^2 \\\\
        \\theta &= \\theta - \\gamma \\frac{{m / (1 - \\beta_1^t)}}
                                         {{\\sqrt{{v / (1 - \\beta_2^t)}} + \\epsilon}}

    Kingma and Ba, https://arxiv.org/abs/1412.6980. amsgrad: Reddi et al.,
    https://openreview.net/forum?id=ryQu7f-RZ.

    Args:
        params: iterable of tensors, of (name, tensor) pairs or of param groups.
        lr: learning rate, a float or a one-element tensor.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the denominator.
        weight_decay: L2 penalty.
        amsgrad: use the largest second moment so far.
        decoupled_weight_decay: decay the param instead, as FusedAdamW does.
{options_doc}
    Raises:
        ValueError: a hyperparameter out of its range.
        TypeError: a hyperparameter of a wrong type.
    """

    rule = ADAMW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | Tensor | None = None,
        clip_grad_value: float | Tensor | None = None,
        skip_nonfinite: bool = False,
        process_group: Any = None,
        backend: Backend = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            clip_grad_value=clip_grad_value,
            skip_nonfinite=skip_nonfinite,
            process_group=process_group,
            backend=backend,
        )

    @classmethod
    def check_group(cls, group: dict[str, Any]) -> None:
        checks.drop_in_flags(group)
        checks.non_negative("learning rate", group["lr"])
        checks.non_negative("epsilon value", group["eps"])
        checks.betas(group["betas"])
        checks.non_negative("weight_decay value", group["weight_decay"])


class FusedAdamW(FusedAdam):
    __doc__ = f"""AdamW, Adam with decoupled weight decay, as torch.optim.AdamW, fused.

    .. math::
        \\theta &= \\theta - \\gamma \\lambda \\theta, \\quad
        m = \\beta_1 m + (1 - \\beta_1) g, \\quad v = \\beta_2 v + (1 - \\beta_2) g^2 \\\\
        \\theta &= \\theta - \\gamma \\frac{{m / (1 - \\beta_1^t)}}
                                         {{\\sqrt{{v / (1 - \\beta_2^t)}} + \\epsilon}}

    Loshchilov and Hutter, https://arxiv.org/abs/1711.05101.

    Args:
        params: iterable of tensors, of (name, tensor) pairs or of param groups.
        lr: learning rate, a float or a one-element tensor.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled weight decay coefficient.
        amsgrad: use the largest second moment so far.
{options_doc}
    Raises:
        ValueError: a hyperparameter out of its range.
        TypeError: a hyperparameter of a wrong type.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | Tensor | None = None,
        clip_grad_value: float | Tensor | None = None,
        skip_nonfinite: bool = False,
        process_group: Any = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            capturable=capturable,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            max_grad_norm=max_grad_norm,
            clip_grad_value=clip_grad_value,
            skip_nonfinite=skip_nonfinite,
            process_group=process_group,
            backend=backend,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # whatever the checkpoint says: this is AdamW
            group["decoupled_weight_decay"] = True
