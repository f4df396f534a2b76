"""The picture of a run: losses of both optimizers, their difference, validation, timings."""

from __future__ import annotations

from statistics import quantiles
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Blue and vermilion of Okabe and Ito's palette: distinct for every kind of colour vision, and in
# grey. The reference is dashed as well, so that two curves that coincide are both visible.
FUSED, TORCH, GREY = "#0072B2", "#D55E00", "#666666"
SMOOTHED = 20  # steps


def plot_compared(curves: Axes, difference: Axes, report: dict) -> None:
    """Draw both loss curves, and the difference between them under the tolerance."""
    comparison = report["comparison"]
    torch_loss = np.array(comparison["reference"]["loss"])
    fused_loss = np.array(report["training"]["loss"][: len(torch_loss)])
    steps = np.arange(1, len(torch_loss) + 1)
    curves.plot(steps, fused_loss, color=FUSED, lw=3, alpha=0.6, label="fusedopt")
    curves.plot(steps, torch_loss, color=TORCH, lw=1.2, ls="--", label="torch.optim")
    curves.set(title=f"First {len(steps)} steps, same seed", ylabel="loss, nats/byte")
    curves.legend(frameon=False)
    # Equal losses have no place on a logarithmic axis: they are drawn at half an ULP of the loss.
    gaps = np.maximum(np.abs(torch_loss - fused_loss), 1e-7)
    difference.semilogy(steps, gaps, color=GREY, lw=1, label="difference")
    difference.axhline(comparison["tolerance"], color="black", lw=1, ls=":", label="tolerance")
    difference.set(title="Difference of the two", xlabel="step", ylabel="nats/byte (log scale)")
    difference.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.9))


def plot_training(axes: Axes, report: dict) -> None:
    """Draw the whole training: each step's loss, its running mean, the validation loss."""
    loss = np.array(report["training"]["loss"])
    axes.plot(np.arange(1, len(loss) + 1), loss, color=FUSED, lw=0.5, alpha=0.35, label="a step")
    if len(loss) >= SMOOTHED:
        mean = np.convolve(loss, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")
        steps = np.arange(SMOOTHED, len(loss) + 1)
        axes.plot(steps, mean, color=FUSED, lw=1.8, label=f"mean of {SMOOTHED} steps")
    at, validation = zip(*report["training"]["validation"], strict=True)
    axes.plot(at, validation, "o", color="black", ms=5, label="validation")
    axes.annotate(
        f"{validation[-1]:.2f}", (at[-1], validation[-1]), (0, 8), textcoords="offset points"
    )
    name = report["training"]["optimizer"]
    axes.set(title=f"Training with {name}", xlabel="step", ylabel="loss, nats/byte")
    axes.legend(frameon=False)


def plot_times(axes: Axes, report: dict) -> None:
    """Draw the medians and quartiles of both optimizers' time a step, taken in turns."""
    comparison = report["comparison"]
    names = (comparison["reference"]["optimizer"], report["training"]["optimizer"])
    labels = [name.replace("(", "\n(").replace(" + ", " +\n") for name in names]
    for y, (name, color) in enumerate((("torch", TORCH), ("fusedopt", FUSED))):
        low, middle, high = quantiles(comparison["interleaved_ms"][name], n=4)
        axes.barh(y, middle, color=color, height=0.6)
        axes.plot([low, high], [y, y], color="black", lw=1.5, marker="|")
        axes.annotate(
            f"{middle:.2f} ms", (high, y), (6, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks((0, 1), labels)
    axes.invert_yaxis()
    axes.set_xlim(right=axes.get_xlim()[1] * 1.2)
    axes.set(
        title=f"Clipping and update, in turns: {comparison['ratio']:.2f}x",
        xlabel="milliseconds a step: median, quartiles",
    )


def plot(report: dict, file: BinaryIO) -> None:
    """Write the PNG of a report to ``file``."""
    figure = Figure(figsize=(11, 7), dpi=120, layout="constrained")
    if report["comparison"]:
        ((curves, training), (difference, times)) = figure.subplots(2, 2)
        difference.sharex(curves)
        plot_compared(curves, difference, report)
        plot_times(times, report)
    else:
        training = figure.subplots()
    plot_training(training, report)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    options, machine = report["options"], report["machine"]
    figure.suptitle(
        f"GPT {options['size']}, {options['dtype']}, batch {options['batch_size']} x "
        f"{report['model']['context']} bytes, {machine['gpu'] or machine['processor']}",
        fontsize=11,
    )
    figure.savefig(file, format="png")
