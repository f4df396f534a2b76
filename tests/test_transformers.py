"""What is special in the Trainer of transformers; test_frameworks.py trains with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import fusedopt

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import hf_trainer

from fusedopt.integrations.transformers import optimizer_cls_and_kwargs


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
