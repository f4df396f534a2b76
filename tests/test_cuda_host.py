"""The CUDA driver where there is no GPU, nor an emulated one: what must not ask for CUDA, and what
the compiler refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Everything that could start the CUDA driver raises.
FORBIDDEN = """
import torch
import torch._dynamo  # which torch.optim imports; what that asks is torch's

def forbidden(*arguments, **options):
    raise AssertionError("CUDA was asked")

for name in ("is_available", "device_count", "current_device", "current_stream", "init",
             "is_current_stream_capturing", "is_initialized", "_lazy_init", "get_device_properties",
             "get_device_capability", "synchronize"):
    setattr(torch.cuda, name, forbidden)
for name in ("is_available", "device_count", "current_device"):
    setattr(torch.xpu, name, forbidden)
if hasattr(torch._C, "_cuda_getDeviceCount"):  # says that torch was built with CUDA
    torch._C._cuda_getDeviceCount = forbidden
if hasattr(torch, "accelerator"):
    torch.accelerator.is_available = torch.accelerator.current_accelerator = forbidden
import fusedopt
from fusedopt import _native, backends
if _native._C is not None:
    for name in ("cuda_unavailable", "cuda_capabilities", "cuda_unserved", "cuda_clip_unserved"):
        setattr(_native._C, name, forbidden)

def params(*sizes):
    made = [torch.nn.Parameter(torch.randn(n)) for n in sizes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made
"""

USES = {
    "step": """
for cls in (fusedopt.FusedAdamW, fusedopt.FusedAdam, fusedopt.FusedSGD):
    optimizer = cls(params(5, 70), lr=0.1, max_grad_norm=1.0)
    for _ in range(2):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm == 0 and optimizer.skipped_steps == 0
""",
    "backends": """
for backend in ("cpu", "reference"):
    fusedopt.FusedAdamW(params(5), backend=backend, skip_nonfinite=True).step()
""",
    "checkpoints": """
import copy, pickle
optimizer = fusedopt.FusedAdamW(params(5, 70))
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
    other.step()
""",
    "clip": """
fusedopt.clip_grad_norm_(params(5, 70), 0.1)
fusedopt.clip_grad_value_(params(5, 70), 0.1)
fusedopt.get_total_norm([p.grad for p in params(5, 70)])
""",
    "state": """
optimizer = fusedopt.FusedSGD(params(5, 70), lr=0.1)
optimizer.step()
assert not torch.cuda._initialized
""",
}


@pytest.mark.parametrize("use", list(USES))
def test_an_optimizer_over_cpu_params_asks_nothing_of_cuda(use: str) -> None:
    subprocess.run([sys.executable, "-c", FORBIDDEN + USES[use]], cwd=ROOT, check=True)


@pytest.mark.parametrize("macros", ["", "-DFUSEDOPT_CUDA_SMALL_ARGS"])
def test_arguments_beyond_what_a_kernel_takes_do_not_compile(tmp_path: Path, macros: str) -> None:
    step = (ROOT / "csrc" / "cuda" / "step.h").read_text()
    words = "480" if macros else "4000"
    for more, compiles in ((0, True), (100, False)):
        changed = step.replace(f"kInlineWords = {words};", f"kInlineWords = {words} + {more};")
        assert more == 0 or changed != step
        source = tmp_path / f"step{more}.cpp"
        source.write_text(changed)
        command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", *macros.split()]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        assert (done.returncode == 0) is compiles, done.stderr
        assert compiles or "kInlineWords must leave room" in done.stderr
