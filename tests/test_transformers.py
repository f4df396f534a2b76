"""The Trainer of Hugging Face transformers with FusedAdamW: the same losses and norms, and resuming
from its own checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fusedopt

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import hf_trainer  # noqa: E402

from fusedopt.integrations.transformers import optimizer_cls_and_kwargs  # noqa: E402


def test_the_run_equals_that_of_the_trainers_own_adamw(tmp_path: Path) -> None:
    runs = []
    for fused in (False, True):
        run = hf_trainer.trainer(fused, hf_trainer.arguments(tmp_path, 20, optim="adamw_torch"))
        run.train()
        runs.append(run)
    plain, ours = map(hf_trainer.logged, runs)
    assert len(ours) == 20
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-5, atol=1e-5)
    assert all(norm > 0.5 for _, norm in ours[:5])  # it was clipped
    for p, q in zip(runs[1].model.parameters(), runs[0].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_it_resumes_bitwise(tmp_path: Path) -> None:
    whole = hf_trainer.trainer(True, hf_trainer.arguments(tmp_path / "whole", 12))
    whole.train()
    args = {"save_strategy": "steps", "save_steps": 6}
    options = hf_trainer.arguments(tmp_path / "parts", 12)
    options.set_save(strategy=args["save_strategy"], steps=args["save_steps"])
    hf_trainer.trainer(True, options).train()
    resumed = hf_trainer.trainer(True, options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-6"))
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


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
    trainer = hf_trainer.FusedTrainer(
        model=hf_trainer.model(), args=args, train_dataset=hf_trainer.Tokens()
    )
    with pytest.raises(TypeError, match="FusedClippingMixin needs a fusedopt optimizer, got AdamW"):
        trainer.train()
    options = optimizer_cls_and_kwargs(args, max_grad_norm=None)
    trainer = hf_trainer.FusedTrainer(
        model=hf_trainer.model(),
        args=args,
        train_dataset=hf_trainer.Tokens(),
        optimizer_cls_and_kwargs=options,
    )
    with pytest.raises(ValueError, match="which has no max_grad_norm"):
        trainer.train()
