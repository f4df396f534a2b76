"""What is special in the Trainer of transformers; test_frameworks.py trains with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedopt

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import hf_trainer

from fusedopt.integrations.transformers import FusedClippingMixin, optimizer_cls_and_kwargs


def test_arguments_are_taken_over(tmp_path: Path) -> None:
    args = hf_trainer.arguments(tmp_path, 1, adam_beta2=0.95, adam_epsilon=1e-6)
    cls, kwargs = optimizer_cls_and_kwargs(args, amsgrad=True)
    assert cls is fusedopt.FusedAdamW
    assert kwargs == {
        "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "max_grad_norm": 0.5, "amsgrad": True,
    }  # fmt: skip
    args.max_grad_norm = 0.0
    assert optimizer_cls_and_kwargs(args)[1]["max_grad_norm"] == float("inf")


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    args = hf_trainer.arguments(tmp_path, 1)
    common = {
        "model": hf_trainer.make_model(),
        "args": args,
        "train_dataset": hf_trainer.LabelledTokens(),
    }
    trainer = hf_trainer.FusedTrainer(**common)
    with pytest.raises(TypeError, match="FusedClippingMixin needs a fusedopt optimizer, got AdamW"):
        trainer.train()
    options = optimizer_cls_and_kwargs(args, max_grad_norm=None)
    trainer = hf_trainer.FusedTrainer(**common, optimizer_cls_and_kwargs=options)
    with pytest.raises(ValueError, match="which has no max_grad_norm"):
        trainer.train()


@pytest.mark.parametrize("trained", [".bias", "wte.weight"], ids=["biases", "weights"])
def test_only_some_params_are_trained(tmp_path: Path, trained: str) -> None:
    # Trainer makes two groups, and one has no params then.
    norms = []
    for fused in (True, False):
        args = hf_trainer.arguments(tmp_path, 2)
        trainer = hf_trainer.make_trainer(fused, args)
        for name, param in trainer.model.named_parameters():
            param.requires_grad_(name.endswith(trained))
        trainer.train()
        groups = trainer.optimizer.param_groups
        assert [not group["params"] for group in groups] == [trained == ".bias", trained != ".bias"]
        norms.append([e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e])
    assert len(norms[0]) == 2
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


class Clipping(FusedClippingMixin):
    def __init__(self, optimizer: fusedopt.FusedOptimizer) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_the_norm_that_is_logged_is_that_of_the_step(backend: str, empty: int) -> None:
    param = nn.Parameter(torch.ones(4))
    elsewhere = nn.Parameter(torch.ones(4, device="meta"))  # has no gradient
    groups = [{"params": []} for _ in range(empty)] + [{"params": [elsewhere, param]}]
    optimizer = fusedopt.FusedSGD(groups, lr=0.1, max_grad_norm=1.0, backend=backend)
    for value in (1.0, 3.0):
        param.grad = torch.full((4,), value)
        norm = Clipping(optimizer)._get_grad_norm(None)
        optimizer.step()
        assert norm is optimizer.grad_norm
        assert norm.item() == 2 * value


def test_the_norm_of_no_params() -> None:
    optimizer = fusedopt.FusedSGD([{"params": []}], lr=0.1, max_grad_norm=1.0)
    norm = Clipping(optimizer)._get_grad_norm(None)
    optimizer.step()
    assert norm is optimizer.grad_norm
    assert norm.item() == 0
