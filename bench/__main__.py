"""The commands of `python -m bench`, one module each."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # as shells have it, and typer

try:  # seconds, of which the import of torch is most
    import typer

    from bench import clip, gpu_step, host, memory, plot, step, tables, train
except KeyboardInterrupt:
    sys.exit(INTERRUPTED)
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "numpy", "rich", "typer"):
        raise
    sys.exit(f"bench: {error}; the benchmarks need: pip install matplotlib numpy rich typer")

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
    try:
        app(prog_name="python -m bench")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("interrupted: results are written at the end of a run alone", file=sys.stderr)
        raise
