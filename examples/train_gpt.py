"""Train a small GPT on the source of Python's standard library with a fused optimizer.

    python examples/train_gpt.py --out runs/train_gpt

``make train`` does so; ``make train ARGS="--resume"`` hands arguments on. The same model is
first trained for some steps with torch.optim and clip_grad_norm_, from the same seed: the two loss
curves have to agree, and the time that each optimizer takes is compared. ``--out`` receives
checkpoint.pt, report.json and report.png.

A run that was stopped goes on bitwise with ``--resume`` where machine, versions and number of
threads are the same, because PyTorch's own results depend on these.

On a CPU that has other work to do, set OMP_WAIT_POLICY=PASSIVE: otherwise each thread of torch that
waits for another spins on the core that this other one needs, and a step takes ten times as long.
"""

from __future__ import annotations

import math
import pickle
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import gpt_load
import gpt_progress
import gpt_report
import torch
import typer
from gpt_data import Corpus, load_corpus
from gpt_model import SIZES
from gpt_trainer import Options, Trainer, load_checkpoint, save_checkpoint
from rich.console import Console

READ_EVERY_S = 0.5
VALIDATIONS = 4
INTERLEAVED_ROUNDS = 30
WARM_UP_ROUNDS = 3
SAMPLE_BYTES = 300
PROMPT = b"def "
CHECKPOINT = "checkpoint.pt"

console = Console()


def train(
    trainer: Trainer,
    until: int,
    checkpoint_every: int = 1,
    save: Callable[[], None] | None = None,
) -> None:
    """Train to step ``until`` under a progress bar; call ``save`` at checkpoints and at the end.

    The reference validates nothing and saves nothing: it only has a loss curve to give.
    """
    validate_every = max(1, trainer.options.steps // VALIDATIONS)
    last_read = -math.inf  # so that the first step is seen as soon as it is done
    label = "torch.optim" if trainer.reference else "fusedopt"
    with gpt_progress.StepProgress(console, label, until, trainer.step) as progress:
        while trainer.step < until:
            trainer.train_step()
            done = trainer.step == until
            # Reading waits for a GPU, so it is rare: between reads the host runs ahead.
            if done or time.perf_counter() - last_read > READ_EVERY_S:
                trainer.read()
                last_read = time.perf_counter()
                progress.update(trainer.step, gpt_report.status(trainer))
            if save is None:
                continue
            if done or trainer.step % validate_every == 0:
                loss = trainer.validate()
                progress.print(f"step {trainer.step}: validation loss {loss:.3f} nats/byte")
            if done or trainer.step % checkpoint_every == 0:
                save()


def train_reference(options: Options, corpus: Corpus) -> dict | None:
    """Train the first steps with torch's optimizer; returns its name and history."""
    if options.compare_steps == 0:
        return None
    reference = Trainer(options, corpus, reference=True)
    train(reference, min(options.compare_steps, options.steps))
    return {"optimizer": reference.name, **reference.history}


def time_interleaved(trained: Trainer) -> dict[str, list[float]]:
    """Optimizer milliseconds of both optimizers in turns, on the trained model's gradients.

    Both continue from the final weights and state, each with its own forward and backward pass
    before each step, so caches and queues are as they are in training. In turns (ABBA), because
    on a shared machine only neighbours in time can be compared.
    """
    reference = Trainer(trained.options, trained.corpus, reference=True)
    reference.model.load_state_dict(trained.model.state_dict())
    # The state alone: the groups of the other optimizer would switch fused=True off.
    state = reference.optimizer.state_dict()
    state["state"] = trained.optimizer.state_dict()["state"]
    reference.optimizer.load_state_dict(state)
    contestants = {"torch": reference, "fusedopt": trained}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(WARM_UP_ROUNDS + INTERLEAVED_ROUNDS):
        for name in list(contestants) if turn % 2 else reversed(contestants):
            milliseconds = contestants[name].timed_update(trained.options.steps + turn)
            if turn >= WARM_UP_ROUNDS:
                times[name].append(milliseconds)
    return times


def wrong(option: str, reason: str) -> typer.BadParameter:
    return typer.BadParameter(reason, param_hint=option)


def check_device(device: str) -> None:
    """Raises for a device that this program or this machine does not have."""
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise wrong("--device", f"must be cpu, cuda or cuda:N, got {device!r}")
    if device == "cpu":
        return
    if torch.version.cuda is None and torch.version.hip is None:
        raise wrong("--device", f"torch {torch.__version__} is a build for CPUs: --device cpu")
    if not torch.cuda.is_available():
        raise wrong("--device", "torch finds no usable GPU here: --device cpu")
    count = torch.cuda.device_count()
    if match[1] is not None and int(match[1]) >= count:
        raise wrong("--device", f"got {device}, and the last GPU here is cuda:{count - 1}")


def check_out(out: Path, may_hold_run: bool) -> None:
    """Makes the folder; raises where it cannot be one, or holds a run that would be lost."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # whether files can be written there
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror
        raise wrong("--out", f"{out} cannot be the folder of a run: {reason}") from None
    if (out / CHECKPOINT).exists() and not may_hold_run:
        raise wrong(
            "--out",
            f"{out / CHECKPOINT} is of an earlier run: --resume goes on from it, --overwrite "
            'starts anew (make train ARGS="--resume")',
        )


def resume_from(path: Path, trainer: Trainer) -> dict | None:
    """Continues from a checkpoint; returns what the reference gave before it."""
    try:
        state = load_checkpoint(path)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise wrong("--resume", f"{path} is not a whole checkpoint: {error}") from None
    try:
        trainer.load_state_dict(state)
    except ValueError as error:
        raise wrong("--resume", f"{path}: {error}") from None
    return state["reference"]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the report.")],
    size: Annotated[Literal[tuple(SIZES)], typer.Option(help="Size of the model.")] = "tiny",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of params, gradients and moments.")
    ] = "float32",
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        typer.Option(help="adamw with a cosine schedule, or sgd with OneCycleLR."),
    ] = "adamw",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 8,
    compare_steps: Annotated[
        int, typer.Option(min=0, help="Steps trained with torch.optim to compare; 0: none.")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, batches and sample.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew where --out holds a checkpoint.")
    ] = False,
) -> None:
    """Train a small GPT on Python's standard library, and compare with torch.optim.

    Exits with 1 when the loss curves of float32 AdamW differ by more than 1e-3.
    """
    check_device(device)
    check_out(out, resume or overwrite)
    options = Options(size, device, dtype, optimizer, steps, batch_size, compare_steps, seed)
    path = out / CHECKPOINT
    trainer = Trainer(options, load_corpus())
    try:
        run(trainer, path, resume, checkpoint_every)
    except (KeyboardInterrupt, RuntimeError) as error:
        if not isinstance(error, KeyboardInterrupt) and not isinstance(
            error.__context__, KeyboardInterrupt
        ):
            raise
        # torch.save turns an interrupt in the middle of it into an error of its own.
        console.print(f"\ninterrupted at step {trainer.step} of {steps}")
        console.print(
            f"{path} holds the last checkpoint: the same command with --resume goes on from it "
            '(make train ARGS="--resume")'
            if path.exists() and trainer.step
            else "nothing is saved of this run yet",
            soft_wrap=True,
        )
        raise typer.Exit(130) from None


def run(trainer: Trainer, path: Path, resume: bool, checkpoint_every: int) -> None:
    """The training of ``trainer`` with its checkpoint at ``path``, and the report beside it."""
    options, out = trainer.options, path.parent
    load = gpt_load.Load()
    gpt_report.print_header(console, trainer)
    if resume and path.exists():
        reference = resume_from(path, trainer)
        console.print(f"resuming at step {trainer.step} of {options.steps}")
    else:
        if resume:
            console.print(f"no checkpoint in {out}: starting at step 0")
        reference = train_reference(options, trainer.corpus)

    def save() -> None:
        save_checkpoint(path, {**trainer.state_dict(), "reference": reference})

    if trainer.step == 0:
        save()
    train(trainer, options.steps, checkpoint_every, save)

    sample = trainer.model.generate(PROMPT, SAMPLE_BYTES, options.seed)
    interleaved = time_interleaved(trainer) if reference else None
    report = gpt_report.build(trainer, reference, interleaved, sample, load.figures())
    gpt_report.write(out, report)
    gpt_report.print_summary(console, report)
    console.print(f"written to {out}: {CHECKPOINT}, report.json, report.png")
    if reference and options.dtype == "float32" and options.optimizer == "adamw":
        difference = report["comparison"]["largest_loss_difference"]
        if not difference <= gpt_report.TOLERANCE:  # a NaN fails too
            console.print("the two loss curves do not agree")
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
