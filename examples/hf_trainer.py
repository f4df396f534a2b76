"""FusedAdamW in the Trainer of Hugging Face transformers, beside the Trainer's own AdamW.

    python examples/hf_trainer.py               # needs: pip install transformers accelerate

Trains a small, randomly initialised GPT-2 twice with the same seed and data, and prints loss and
gradient norm of both.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from side_by_side import BATCH, CONFIG, MAX_GRAD_NORM, WEIGHT_DECAY, Log, Tokens, print_table
from torch.utils.data import Dataset

from fusedopt.integrations.transformers import FusedClippingMixin, optimizer_cls_and_kwargs


class LabelledTokens(Dataset):
    """As Trainer feeds them to a model for causal language modelling."""

    def __init__(self) -> None:
        self.tokens = Tokens().tokens[:, :-1]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def make_model() -> transformers.GPT2LMHeadModel:
    """The same weights on each call."""
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=CONFIG.vocab,
        n_positions=CONFIG.context,
        n_embd=CONFIG.width,
        n_layer=CONFIG.layers,
        n_head=CONFIG.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def arguments(folder: Path, steps: int, **options: object) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=CONFIG.lr,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=steps,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


class FusedTrainer(FusedClippingMixin, transformers.Trainer):
    """The one line that differs, beside optimizer_cls_and_kwargs below."""


def make_trainer(fused: bool, args: transformers.TrainingArguments) -> transformers.Trainer:
    common = {"model": make_model(), "args": args, "train_dataset": LabelledTokens()}
    if not fused:
        return transformers.Trainer(**common)
    return FusedTrainer(**common, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args))


def train(
    fused: bool, steps: int, folder: Path, resume: bool = False
) -> tuple[Log, transformers.GPT2LMHeadModel]:
    transformers.logging.set_verbosity_error()
    trainer = make_trainer(fused, arguments(folder, steps))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    log = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e]
    return log, trainer.model


if __name__ == "__main__":
    print_table(train)
