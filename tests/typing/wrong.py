"""Mistakes, one a line: `mypy --strict` finds each where a comment says so."""

import torch
from torch import Tensor, nn

import fusedopt
from fusedopt import FusedAdamW, FusedSGD


def mistakes(model: nn.Module, loss: Tensor, word: str) -> None:
    params = list(model.parameters())
    optimizer = FusedAdamW(params, max_grad_norm=1.0)
    adamw, sgd = torch.optim.AdamW(params), torch.optim.SGD(params)

    optimizer.step(3)  # E
    optimizer.step(loss)  # E
    optimizer.step(lambda batch: loss)  # E
    optimizer.step(closure=0.5)  # E
    optimizer.step(grad_scaler=None)  # E
    FusedSGD(params).step("x")  # E

    FusedAdamW(params, backend="gpu")  # E
    FusedAdamW(params, backend="CPU")  # E
    FusedAdamW(params, backend=None)  # E
    FusedAdamW(params, backend=word)  # E
    FusedSGD(params, backend="gpu")  # E
    fusedopt.FusedAdam(params, backend="gpu")  # E
    fusedopt.fuse(adamw, backend="gpu")  # E
    optimizer.backend = "gpu"  # E
    optimizer.max_grad_norm = "1.0"  # E
    optimizer.skip_nonfinite = None  # E

    fusedopt.fuse(adamw, max_gradnorm=1.0)  # E
    fusedopt.fuse(sgd, max_norm=1.0)  # E
    fusedopt.fuse(torch.optim.Adam(params), skip_non_finite=True)  # E
    fusedopt.fuse(adamw, momentum=0.9)  # E
    fusedopt.fuse(sgd, betas=(0.9, 0.95))  # E
    fusedopt.fuse(adamw, max_grad_norm="1.0")  # E
    fusedopt.fuse(adamw, betas=0.9)  # E
    fusedopt.fuse(model)  # E
    fusedopt.fuse(torch.optim.AdamW)  # E
    a_sgd: FusedSGD = fusedopt.fuse(adamw)  # E
    an_adamw: FusedAdamW = fusedopt.fuse(torch.optim.Adam(params))  # E

    FusedAdamW(model)  # E
    FusedAdamW(params, max_gradnorm=1.0)  # E
    FusedAdamW(params, lr="1e-3")  # E
    FusedAdamW(params, betas=0.9)  # E
    FusedAdamW(params, max_grad_norm="1.0")  # E
    FusedAdamW(params, skip_nonfinite="yes")  # E
    FusedSGD(params, betas=(0.9, 0.95))  # E

    optimizer.load_state_dict("last.pt")  # E
    fusedopt.convert_state_dict("last.pt")  # E
    fusedopt.clip_grad_norm_(model, 1.0)  # E
    fusedopt.clip_grad_norm_(params, None)  # E
    fusedopt.clip_grad_value_(params, "1")  # E
    fusedopt.get_total_norm(model)  # E
    fusedopt.step_in_backward(optimizer, model)  # E
    optimizer.grad_norm.item()  # E
    optimizer.log()["grad_norm"].item()  # E
    optimizer.backend_in_use = "cpu"  # E
    print(a_sgd, an_adamw)
