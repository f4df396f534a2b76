"""Writes the table of measured figures into the README, from bench/results/*.json.

python -m bench.readme
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures -->\n", "<!-- /figures -->"

_WORKLOADS = {"16x4096x1024": "16 x (4096 x 1024)", "1000x64x64": "1,000 x (64 x 64)"}
_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD, momentum"}


def _load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "bench" / "results" / name).read_text())
    return data


def _pairs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row of fusedopt with torch fused's row of the same workload."""
    keys = ("workload", "variant", "dtype", "optimizer", "clip")
    theirs = {tuple(r.get(k) for k in keys): r for r in rows if r["contestant"] == "torch-fused"}
    ours = [r for r in rows if r["contestant"] == "fusedopt"]
    return [(r, theirs[tuple(r.get(k) for k in keys)]) for r in ours]


def step_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| Tensors | dtype | Optimizer | Clip | fusedopt | torch `fused=True` | Ratio | Of floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ours, theirs in _pairs(data["rows"]):
        if theirs["step_error"] > 8:  # a wrong result: no comparison
            continue
        cells = [
            _WORKLOADS[ours["workload"]],
            ours["dtype"],
            _OPTIMIZERS[ours["optimizer"]],
            "yes" if ours["clip"] else "no",
            f"{ours['median_s'] * 1e3:.1f} ms",
            f"{theirs['median_s'] * 1e3:.1f} ms",
            f"{ours['ratio_vs_torch_fused']:.2f}",
            f"{ours['floor_fraction']:.0%}".replace("%", " %"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def host_table(data: dict[str, Any]) -> list[str]:
    lines = [
        "| Param groups | Clip | fusedopt | fusedopt, cold | torch `fused=True` | Ratio |",
        "|---|---|---|---|---|---|",
    ]
    for ours, theirs in _pairs(data["rows"]):
        if ours["variant"] != "steady":
            continue
        cells = [
            str(ours["groups"]),
            "yes" if ours["clip"] else "no",
            f"{ours['median_s'] * 1e6:,.0f} us",
            f"{ours['cold_median_s'] * 1e6:,.0f} us",
            f"{theirs['median_s'] * 1e6:,.0f} us",
            f"{ours['ratio_vs_torch_fused']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def block() -> str:
    """What stands between the README's markers."""
    step, host = _load("step-cpu.json"), _load("host-cpu.json")
    machine = step["machine"]
    lines = [
        f"{machine['threads']} threads of a shared virtual machine ({machine['cpu']}, "
        f"{machine['simd']}), torch {step['versions']['torch']}.",
        "The contestants take turns in one process; medians. `fused=True` is torch.optim's, with",
        "`clip_grad_norm_` before it where clipping is asked. The floor is the time that an",
        "in-place pass of the same run needs for the bytes of the step.",
        "",
        *step_table(step),
        "",
        "300 tensors of 16 elements, AdamW float32: a step in which almost all is host time. Cold",
        "is the first step after another contestant's, whose objects have taken the cache.",
        "",
        *host_table(host),
        "",
        "From `bench/results/step-cpu.json` and `bench/results/host-cpu.json`, which hold all",
        "samples, the versions and the commit; `bench/results/step-cpu-all.json` has torch's other",
        "implementations and the tensors of GPT-2 124M. `make bench` measures again.",
        "",
    ]
    return "\n".join(lines)


def updated(readme: str) -> str:
    """The README with its figures replaced."""
    begin, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return readme[:begin] + block() + readme[end:]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
