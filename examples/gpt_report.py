"""What a run says of itself: the JSON of its figures, the summary on the screen, the status."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import gpt_plot
import torch
from gpt_trainer import Trainer, peak_lr, write_aside
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

# Rounding differs between the optimizers, and training amplifies it; a wrong update is visible
# within a few steps at a hundred times this.
TOLERANCE = 1e-3  # nats a byte

FIGURES = {
    "training": "the run with fusedopt; one value a step: loss in nats/byte of the step's batch "
    "before its update, step_ms of forward, backward, clipping and update, optimizer_ms of "
    "clipping and update alone; seconds is the sum of step_ms",
    "training.validation": "pairs of step and mean loss in nats/byte over fixed windows of files "
    "that are never trained on",
    "training.tokens_per_s": "batch_size x context / median step_ms; a token is a byte",
    "comparison.reference": "the first steps of the same training, from the same seed, with "
    "torch.optim after torch.nn.utils.clip_grad_norm_; fused=True, except for SGD of low-precision "
    "params on a CPU, where that is wrong in torch 2.13",
    "comparison.largest_loss_difference": "between the two losses of the same step, nats/byte",
    "comparison.optimizer_share": "median optimizer_ms / median step_ms over the compared steps",
    "comparison.training_ms": "median optimizer_ms over the compared steps, of two trainings one "
    "after the other: where the machine has other work, only interleaved_ms can be compared",
    "comparison.interleaved_ms": "clipping and update in turns (ABBA), both continuing from the "
    "final weights and state, each after its own forward and backward pass; warm-up left out",
    "comparison.quartiles_ms": "the first and the third quartile of interleaved_ms",
    "comparison.ratio": "median interleaved_ms of torch / median interleaved_ms of fusedopt",
    "comparison.ratio_quartiles": "of the ratios of the two times in each turn",
    "machine.load_average_before": "of the minute before the run; make's own work is in it",
    "machine.cores_busy": "how many cores this process kept busy, on average over the run",
    "machine.cores_busy_elsewhere": "and all others: where that is not near 0, times are not those "
    "of this machine at rest",
    "clock": "time.perf_counter on a CPU; events in the stream on a GPU",
}


def machine(device: torch.device) -> dict:
    """Describe what the timings depend on: processor, cores, torch's threads, GPU."""
    info = Path("/proc/cpuinfo")
    names = info.read_text().split("\n") if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def versions() -> dict:
    """Versions of Python and of the packages that the figures depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "fusedopt", "numpy")}
    return {"python": platform.python_version(), **packages, "cuda": torch.version.cuda}


def commit() -> dict | None:
    """The git commit of this file and whether tracked files differ from it; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        modified = git("status", "--porcelain", "--untracked-files=no")
        return {"sha": git("rev-parse", "HEAD"), "modified": bool(modified)}
    except (OSError, subprocess.CalledProcessError):
        return None


def quartiles(values: Iterable[float]) -> list[float]:
    """The first and the third."""
    first, _, third = statistics.quantiles(values, n=4)
    return [first, third]


def compare(trainer: Trainer, reference: dict, interleaved: dict[str, list[float]]) -> dict:
    """Set both optimizers side by side; ``reference`` is a history with its optimizer's name."""
    steps = len(reference["loss"])
    ours = {key: values[:steps] for key, values in trainer.history.items()}
    medians = {name: median(values) for name, values in interleaved.items()}
    differences = [abs(a - b) for a, b in zip(reference["loss"], ours["loss"], strict=True)]
    both = {"torch": reference, "fusedopt": ours}
    return {
        "steps": steps,
        # max() would drop a NaN that is not the first.
        "largest_loss_difference": torch.tensor(differences).max().item(),
        "tolerance": TOLERANCE,
        "optimizer_share": {
            name: median(h["optimizer_ms"]) / median(h["step_ms"]) for name, h in both.items()
        },
        "training_ms": {name: median(h["optimizer_ms"]) for name, h in both.items()},
        "interleaved_ms": interleaved,
        "median_ms": medians,
        "quartiles_ms": {name: quartiles(values) for name, values in interleaved.items()},
        "ratio": medians["torch"] / medians["fusedopt"],
        "ratio_quartiles": quartiles(
            a / b for a, b in zip(interleaved["torch"], interleaved["fusedopt"], strict=True)
        ),
        "reference": reference,
    }


def build(
    trainer: Trainer,
    reference: dict | None,
    interleaved: dict[str, list[float]] | None,
    sample: bytes,
    load: dict,
) -> dict:
    """Collect the report, JSON-ready; ``load`` is that of gpt_load.

    Milliseconds, seconds, bytes and nats/byte throughout.
    """
    history, config = trainer.history, trainer.model.config
    shape = ("layers", "heads", "width", "context", "vocab")
    step_ms = median(history["step_ms"])
    return {
        "figures": FIGURES,
        "machine": {**machine(trainer.device), **load},
        "versions": versions(),
        "commit": commit(),
        "options": asdict(trainer.options),
        "model": {
            **{name: getattr(config, name) for name in shape},
            "params": sum(p.numel() for p in trainer.params),
            "tensors": len(trainer.params),
        },
        "corpus": {
            "files": trainer.corpus.files,
            "train_bytes": len(trainer.corpus.train),
            "validation_bytes": len(trainer.corpus.validation),
            "sha256": trainer.corpus.sha256,
        },
        "training": {
            **history,
            "optimizer": trainer.name,
            "peak_lr": peak_lr(trainer.options),
            "seconds": sum(history["step_ms"]) / 1e3,
            "median_step_ms": step_ms,
            "tokens_per_s": trainer.options.batch_size * config.context / step_ms * 1e3,
        },
        "comparison": compare(trainer, reference, interleaved) if reference else None,
        "sample": sample.decode(errors="replace"),
    }


def write(out: Path, report: dict) -> None:
    """Write report.json and report.png into ``out``."""
    write_aside(out / "report.json", lambda f: f.write(json.dumps(report, indent=1).encode()))
    picture = io.BytesIO()
    gpt_plot.plot(report, picture)
    write_aside(out / "report.png", lambda f: f.write(picture.getvalue()))


def status(trainer: Trainer) -> str:
    """One line for the progress bar: means of the last steps."""
    last = {key: values[-10:] for key, values in trainer.history.items()}
    step_ms = sum(last["step_ms"])
    tokens = len(last["step_ms"]) * trainer.options.batch_size * trainer.model.config.context
    loss, share = sum(last["loss"]) / len(last["loss"]), sum(last["optimizer_ms"]) / step_ms
    return (
        f"loss {loss:.3f}  {tokens / step_ms * 1e3:,.0f} tok/s  "
        f"norm {trainer.grad_norm.item():.2f}  optimizer {share:.1%}"
    )


def print_header(console: Console, trainer: Trainer) -> None:
    """Say what is about to be trained, on what."""
    params = sum(p.numel() for p in trainer.params)
    options, corpus = trainer.options, trainer.corpus
    console.print(
        f"{options.size}: {params / 1e6:.2f} M params in {len(trainer.params)} tensors, "
        f"{options.dtype}, {options.device}\n{corpus.files} files of Python's standard library: "
        f"{len(corpus.train) / 1e6:.1f} MB to train on, "
        f"{len(corpus.validation) / 1e6:.1f} MB held out"
    )


def machine_line(machine: dict) -> str:
    """What the timings depend on."""
    line = f"{machine['torch_threads']} threads on {machine['cores']} cores, OMP_WAIT_POLICY "
    line += f"{(machine['omp_wait_policy'] or 'not set').lower()}; "
    elsewhere = machine["cores_busy_elsewhere"]
    if elsewhere is None:
        return f"{line}load average before the run {machine['load_average_before'] or 'unknown'}"
    line += f"other processes kept {elsewhere:.1f} cores busy"
    return line + (": times are not those of a quiet machine" if elsewhere > 0.2 else "")


def print_summary(console: Console, report: dict) -> None:
    """Print the loss curves side by side, the timings and the sample."""
    training, comparison = report["training"], report["comparison"]
    if comparison:
        reference = comparison["reference"]["loss"]
        losses = Table("step", "torch.optim", "fusedopt", "difference", title="Loss, nats/byte")
        for step in sorted({round(i * (len(reference) - 1) / 5) for i in range(6)}):
            a, b = reference[step], training["loss"][step]
            losses.add_row(str(step + 1), f"{a:.5f}", f"{b:.5f}", f"{abs(a - b):.1e}")
        console.print(losses)
        difference = comparison["largest_loss_difference"]
        console.print(f"largest difference over {len(reference)} steps: {difference:.1e} nats/byte")
        times = Table(
            "optimizer, clipping included",
            "in training",
            "share",
            "in turns (quartiles)",
            title="Milliseconds a step, medians",
        )
        names = {"torch": comparison["reference"]["optimizer"], "fusedopt": training["optimizer"]}
        for key, name in names.items():
            times.add_row(
                name,
                f"{comparison['training_ms'][key]:.2f}",
                f"{comparison['optimizer_share'][key]:.1%}",
                "{:.2f} ({:.2f} to {:.2f})".format(
                    comparison["median_ms"][key], *comparison["quartiles_ms"][key]
                ),
            )
        console.print(times)
        low, high = comparison["ratio_quartiles"]
        console.print(
            f"ratio, in turns: {comparison['ratio']:.2f}x (quartiles {low:.2f} to {high:.2f})"
        )
    console.print(machine_line(report["machine"]))
    console.print(
        f"validation loss {training['validation'][-1][1]:.3f} nats/byte after "
        f"{len(training['loss'])} steps, {training['seconds']:.0f} s, "
        f"{training['tokens_per_s']:,.0f} tokens/s"
    )
    console.print(Panel(Text(report["sample"]), title="Sample"))
