"""FusedAdamW in the Trainer of Hugging Face transformers, beside the Trainer's own AdamW.

Trains a small, randomly initialised GPT-2 on the CPU, twice with the same seed and data, and prints
loss and gradient norm of both. Needs `pip install transformers accelerate`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from torch.utils.data import Dataset

from fusedopt.integrations.transformers import FusedClippingMixin, optimizer_cls_and_kwargs


class Tokens(Dataset):
    """Sequences with a pattern to learn."""

    def __init__(self, count: int = 64, length: int = 16, vocabulary: int = 50) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(vocabulary, (count, 1), generator=generator)
        self.tokens = (start + 3 * torch.arange(length)) % vocabulary

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def model() -> transformers.GPT2LMHeadModel:
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def arguments(folder: Path, steps: int, **options: object) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


class FusedTrainer(FusedClippingMixin, transformers.Trainer):
    """The one line that differs, beside optimizer_cls_and_kwargs below."""


def trainer(fused: bool, args: transformers.TrainingArguments) -> transformers.Trainer:
    if not fused:
        return transformers.Trainer(model=model(), args=args, train_dataset=Tokens())
    return FusedTrainer(
        model=model(),
        args=args,
        train_dataset=Tokens(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
    )


def logged(run: transformers.Trainer) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    return [(e["loss"], e["grad_norm"]) for e in run.state.log_history if "grad_norm" in e]


def main() -> None:
    transformers.logging.set_verbosity_error()
    histories = []
    for fused in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            run = trainer(fused, arguments(Path(folder), 20))
            run.remove_callback(transformers.PrinterCallback)
            run.train()
            histories.append(logged(run))
    print("step   Trainer: loss  norm     fusedopt: loss  norm")
    for step, (plain, fused_values) in enumerate(zip(*histories, strict=True)):
        print(f"{step:4}   {plain[0]:13.6f}  {plain[1]:.4f}   {fused_values[0]:14.6f}  "
              f"{fused_values[1]:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
