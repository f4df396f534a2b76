"""FusedSGD."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt import checks
from fusedopt.backends import Backend
from fusedopt.optimizer import FusedOptimizer, options_doc
from fusedopt.rule import Rule, precise


def sgd_update(
    param: Tensor,
    grad: Tensor,
    state: list[Tensor],
    group: dict[str, Any],
    step: float,
    first: bool,
) -> tuple[Tensor, list[Tensor]]:
    """One step of SGD in plain torch ops; see csrc/rules/sgd.h for the formula."""
    dtype = grad.dtype
    lr, momentum = float(group["lr"]), float(group["momentum"])
    weight_decay = float(group["weight_decay"])
    param, grad = precise(param), precise(grad)
    if weight_decay != 0:
        grad = grad + weight_decay * param
    if momentum == 0:
        return param - lr * grad, []
    dampened = (1 - float(group["dampening"])) * grad
    buffer = (grad if first else momentum * precise(state[0]) + dampened).to(dtype)
    direction = (grad + momentum * precise(buffer)).to(dtype) if group["nesterov"] else buffer
    return param - lr * precise(direction), [buffer]


SGD = Rule(
    name="sgd",
    hyper=("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    state=("momentum_buffer",),
    has_step=False,
    states=lambda group: 1 if float(group["momentum"]) != 0 else 0,
    update=sgd_update,
    first_differs=lambda group: float(group["dampening"]) != 0,
)


class FusedSGD(FusedOptimizer):
    __doc__ = f"""SGD with momentum, dampening and Nesterov momentum, as torch.optim.SGD, fused.

    .. math::
        g &= g + \\lambda \\theta, \\quad
        b = \\mu b + (1 - \\tau) g \\quad (b = g \\text{{ at first}}) \\\\
        \\theta &= \\theta - \\gamma b \\quad (\\text{{nesterov: }} \\theta - \\gamma (g + \\mu b))

    Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013.

    Args:
        params: iterable of tensors, of (name, tensor) pairs or of param groups.
        lr: learning rate, a float or a one-element tensor.
        momentum: momentum factor.
        dampening: dampening of the momentum.
        weight_decay: L2 penalty.
        nesterov: use Nesterov momentum.
{options_doc}
    Raises:
        ValueError: a hyperparameter out of its range, or nesterov with dampening or without
            momentum.
        TypeError: a hyperparameter of a wrong type.
    """

    rule = SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
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
        # torch.optim.SGD takes a tensor lr with foreach=True, and has no capturable.
        checks.drop_in_flags({**group, "capturable": True})
        checks.non_negative("learning rate", group["lr"])
        checks.non_negative("momentum value", group["momentum"])
        checks.non_negative("weight_decay value", group["weight_decay"])
        checks.real("dampening value", group["dampening"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
