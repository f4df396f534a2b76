"""`python -m fusedopt [--json] [--strict]`: what is installed, which backend serves and why not
each other one, and a self-test of every backend that runs here. Where the reference backend serves
in place of a faster one, the last line says why, and what to do. The exit code is 0 where the
self-test passes; with --strict, where no faster backend is missing, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from typing import Any

import torch

import fusedopt
from fusedopt import backends, fallback
from fusedopt._native import _C, missing, rejected_access


def versions() -> dict[str, str | None]:
    try:
        from importlib.metadata import version

        triton: str | None = version("triton")
    except ImportError:
        triton = None
    return {
        "fusedopt": fusedopt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": triton,
        "cuda of torch": torch.version.cuda,
    }


def devices() -> list[str]:
    names = [f"cpu ({torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        names += [
            f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
        ]
    if torch.xpu.is_available():
        names += [
            f"xpu:{i} ({torch.xpu.get_device_name(i)})" for i in range(torch.xpu.device_count())
        ]
    return names


def self_test(backend: str, device: str) -> str:
    """Three clipped steps against float64 maths of torch.optim; "" or what went wrong."""
    generator = torch.Generator().manual_seed(0)
    pairs: tuple[tuple[Any, Any, dict[str, Any]], ...] = (
        (fusedopt.FusedAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
        (fusedopt.FusedSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    )
    for fused, plain, options in pairs:
        values = [torch.randn(shape, generator=generator) for shape in ((), (33,), (70, 50))]
        ours = [torch.nn.Parameter(v.to(device)) for v in values]
        exact = [torch.nn.Parameter(v.double()) for v in values]
        subject = fused(ours, lr=0.01, max_grad_norm=1.0, backend=backend, **options)
        oracle = plain(exact, lr=0.01, foreach=False, **options)
        for _ in range(3):
            for p, q in zip(ours, exact, strict=True):
                q.grad = torch.randn(q.shape, generator=generator).double()
                p.grad = q.grad.to(p)
            torch.nn.utils.clip_grad_norm_(exact, 1.0)
            subject.step()
            oracle.step()
        for p, q in zip(ours, exact, strict=True):
            error = (p.double().cpu() - q).abs().max().item()
            if not error < 1e-5:
                return f"{fused.__name__} is off by {error:.1e}"
    return ""


def chosen(device: str) -> tuple[str, str]:
    """The backend that backend="auto" picks for float32 params on a device, "none" where
    FUSEDOPT_BACKEND asks for one that cannot serve; and where that is not the fastest that there is
    for such a device, why, and what to do."""
    param = torch.nn.Parameter(torch.ones(3, device=device))
    param.grad = torch.ones_like(param)
    try:
        optimizer = fusedopt.FusedSGD([param], lr=0.1)
    except (RuntimeError, ValueError) as error:
        return "none", f"FUSEDOPT_BACKEND is {os.environ['FUSEDOPT_BACKEND']!r}: {error}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the report says it itself
        optimizer.step()
    name = str(optimizer.backend_in_use)
    asked_for = backends.check_name("auto") == name
    if name != "reference" or asked_for:
        return name, ""
    return name, fallback.cause(optimizer.rule.name, param.device)


def report() -> dict[str, Any]:
    """All that `python -m fusedopt` prints, as plain data."""
    device = "xpu" if torch.xpu.is_available() else "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    on_cpu = {"cpu", "triton"} if backends.triton.interpreted() else {"cpu"}
    entries = {}
    for name, module in backends.BACKENDS.items():
        reason = module.unavailable()
        if name == "cuda" and not reason:  # of several devices, not all may be too old
            reason = backends.cuda.unserved("adamw", torch.device(device))
        result = None if reason else self_test(name, "cpu" if name in on_cpu else device)
        entries[name] = {
            "available": not reason,
            "reason": reason or None,
            "self_test": None if result is None else (result or "passed"),
        }
    served = {name: chosen(name) for name in dict.fromkeys(("cpu", device))}
    passed = all(e["self_test"] in (None, "passed") for e in entries.values())
    return {
        "versions": versions(),
        "devices": devices(),
        "native": _C.build_info() if _C is not None else {"missing": missing},
        "rejected tensor access": rejected_access,
        "backends": entries,
        "chosen": {name: backend for name, (backend, _) in served.items()},
        # Where both lack one, the reason is the same; else it is the GPU that lacks one.
        "fallback": next((why for _, why in reversed(served.values()) if why), None),
        "ok": passed and all(name != "none" for name, _ in served.values()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedopt", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 where a faster backend is missing, too"
    )
    arguments = parser.parse_args(argv)
    data = report()
    code = 0 if data["ok"] and not (arguments.strict and data["fallback"]) else 1
    if arguments.json:
        print(json.dumps(data, indent=2))
        return code
    for name, value in data["versions"].items():
        print(f"{name:15} {value or 'not there'}")
    print(f"{'devices':15} {', '.join(data['devices'])}")
    for name, value in data["native"].items():
        if name == "openmp" and value is None:
            value = "no: the compiler had none; a step runs on one thread"
        if name != "cuda_device_type":
            print(f"{name:15} {value}")
    for way, reason in data["rejected tensor access"].items():
        print(f"tensor access {way} was rejected: {reason}")
    print("\nbackends, in the order in which they are tried:")
    for name, entry in data["backends"].items():
        verdict = entry["reason"] or f"available, self-test {entry['self_test']}"
        print(f"  {name:10} {verdict}")
    print()
    for device, name in data["chosen"].items():
        print(f"params on {device} are served by: {name}")
    if data["fallback"]:
        print(f"\nwarning: {data['fallback']}")
    return code


if __name__ == "__main__":
    sys.exit(main())
