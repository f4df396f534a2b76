"""The commands of `python -m bench`, one module each."""

from __future__ import annotations

import typer

from bench import clip, gpu_step, host, memory, plot, step, tables, train

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Benchmarks of fusedopt.")
app.command("step")(step.main)
app.command("clip")(clip.main)
app.command("host")(host.main)
app.command("memory")(memory.main)
app.command("train")(train.main)
app.command("gpu")(gpu_step.main)
app.command("plot")(plot.main)
app.command("tables")(tables.main)

if __name__ == "__main__":
    app(prog_name="python -m bench")
