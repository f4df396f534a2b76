"""Tokens a second of the training example, and the optimizer's share of a step.

    python -m bench train [--quick] [--size tiny] [--device cpu] [--batch 4] ...

The model of examples/train_gpt.py is trained twice from the same weights on the same batches, with
torch.optim.AdamW(fused=True) and clip_grad_norm_, and with FusedAdamW(max_grad_norm). Both take
turns in one process, a step each. Results, all samples and losses included, go to
runs/train-cpu.json or runs/train-gpu.json.

bfloat16 has params, grads and moments in that dtype; bfloat16-autocast has them in float32, and the
forward pass under torch.autocast.
"""

from __future__ import annotations

import gc
import sys
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from bench import cli
from bench.contestants import BASELINE, SUBJECT
from bench.goals import Row
from bench.machine import ROOT, describe_run
from bench.measure import paired_ratio, quartiles
from bench.progress import progress_bar
from bench.report import console, print_head, print_written, write_results
from bench.workloads import DTYPES

sys.path.append(str(ROOT / "examples"))  # as its modules find each other

from gpt_data import load_corpus
from gpt_model import SIZES

AUTOCAST = "bfloat16-autocast"


def measure(
    size: str, dtype: str, device: str, batch: int, repeats: int, warmup: int, progress: Any
) -> list[Row]:
    """A row for each of the two optimizers; its `losses` are nats a byte, one a step, those of the
    warm-up included."""
    from gpt_trainer import Options, Trainer  # imports fusedopt; the other commands run without it

    steps = warmup + repeats
    params_dtype = "float32" if dtype == AUTOCAST else dtype
    options = Options(size, device, params_dtype, "adamw", steps, batch, 0, 0)
    corpus = load_corpus()
    trainers = {
        BASELINE: Trainer(options, corpus, reference=True),
        SUBJECT: Trainer(options, corpus),
    }
    if dtype == AUTOCAST:
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
        for trainer in trainers.values():
            trainer.model.forward = autocast(trainer.model.forward)
    for step in progress.track(range(steps), description=f"{size} {dtype}"):
        for name in list(trainers) if step % 2 else reversed(trainers):
            trainers[name].train_step()
            trainers[name].read()
    tokens = batch * SIZES[size].context
    rows = []
    samples = {name: t.history["step_ms"][warmup:] for name, t in trainers.items()}
    for name, trainer in trainers.items():
        q1, median, q3 = quartiles(samples[name])
        own = trainer.history["optimizer_ms"][warmup:]
        rows.append(
            {
                "size": size,
                "dtype": dtype,
                "contestant": name,
                "batch": batch,
                "params": sum(p.numel() for p in trainer.params),
                "tokens_per_s": tokens / (median / 1e3),
                "step_median_s": median / 1e3,
                "step_q1_s": q1 / 1e3,
                "step_q3_s": q3 / 1e3,
                "optimizer_median_s": quartiles(own)[1] / 1e3,
                "optimizer_share": sum(own) / sum(samples[name]),
                "speedup": paired_ratio(samples[BASELINE], samples[name]),
                "final_loss": trainer.history["loss"][-1],
                "losses": trainer.history["loss"],
                "samples_s": [ms / 1e3 for ms in samples[name]],
                "optimizer_samples_s": [ms / 1e3 for ms in own],
            }
        )
    return rows


def print_rows(rows: list[Row]) -> None:
    """One table, a line for each size, dtype and optimizer."""
    columns = ("size", "dtype", "contestant", "params", "tokens/s", "step ms", "optimizer ms")
    table = Table(*columns, "share", "speedup", "loss", title="Training the GPT of examples/")
    for row in rows:
        table.add_row(
            row["size"],
            row["dtype"],
            row["contestant"],
            f"{row['params'] / 1e6:.1f}M",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['step_median_s'] * 1e3:.1f}",
            f"{row['optimizer_median_s'] * 1e3:.2f}",
            f"{row['optimizer_share']:.1%}",
            f"{row['speedup']:.3f}",
            f"{row['final_loss']:.4f}",
        )
    console.print(table)


def main(
    quick: cli.Quick = False,
    size: Annotated[cli.Names, cli.choice("--size", SIZES, default=["tiny", "small"])] = None,
    dtype: Annotated[
        cli.Names, cli.choice("--dtype", (*DTYPES, AUTOCAST), default=["float32"])
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Matrix products of float32 on the GPU's TF32 units.")
    ] = False,
    repeats: cli.Repeats = None,
    threads: cli.Threads = None,
    output: cli.Output = None,
) -> None:
    """Tokens a second of the training example with torch's optimizer and with fusedopt's."""
    assert size is not None  # the callbacks of the options fill these in
    assert dtype is not None
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no usable GPU here", param_hint="--device")
    if tf32:
        torch.set_float32_matmul_precision("high")
    path = cli.prepare("train-cpu" if device == "cpu" else "train-gpu", output, threads, quick)
    repeats, warmup = cli.rounds_of(quick, repeats, default=41)
    options = {"quick": quick, "repeats": repeats, "warmup_rounds": warmup, "size": size}
    run = describe_run(options | {"dtype": dtype, "batch": batch, "tf32": tf32})
    if device != "cpu":
        run["machine"]["gpu"] = {"name": torch.cuda.get_device_name(device)}
    print_head(run, [])
    rows: list[Row] = []
    with progress_bar() as progress:
        for size_name in size[:1] if quick else size:
            for dtype_name in dtype:
                rows += measure(size_name, dtype_name, device, batch, repeats, warmup, progress)
                gc.collect()  # the two models, before the next two
                write_results(path, {**run, "rows": rows})
    print_rows(rows)
    print_written(path)
    sys.exit(0)
