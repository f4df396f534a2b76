"""The tensor lists that the benchmarks step, the bytes that a step of them has to move, their data.

A workload is a list of shapes. Its params, grads and moments are random, never zeros: zeros hide
the cost of rounding, of denormals and of pages that were never written.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from bench import models

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIXED = "bfloat16-float32-state"  # bfloat16 params and grads with float32 moments

# The L2 norm of every workload's gradient, so that clipping to MAX_NORM scales each one by 1/8.
# Gradient elements are then 0.7e-3 (124M elements) to 0.1 (4,800) in size.
GRAD_NORM = 8.0
MAX_NORM = 1.0

# Reads and writes of one step, in elements a param: every optimizer reads param and grad and writes
# param; AdamW reads and writes exp_avg and exp_avg_sq, SGD with momentum its momentum_buffer.
PARAM_PASSES = 3
STATE_PASSES = {"adamw": 4, "sgd": 2}
# Clipping reads the grad once more for its norm. clip_grad_norm_ then also reads it and writes it.
CLIP_PASSES = {"fused": 1, "separate": 3}


@dataclass(frozen=True)
class Workload:
    """Shapes of the params, in order; `groups` param groups of (nearly) equal length."""

    name: str
    shapes: tuple[models.Shape, ...]
    groups: int = 1

    @property
    def numel(self) -> int:
        """Elements of all params together."""
        return sum(math.prod(shape) for shape in self.shapes)


def step_workloads(quick: bool = False) -> dict[str, Workload]:
    """The standard workloads of `python -m bench step` by name; with `quick` the same names at a
    fraction of the size."""
    if quick:
        shapes = {
            "16x4096x1024": ((512, 512),) * 4,
            "1000x64x64": ((64, 64),) * 40,
            "gpt2-124m": models.gpt2(layers=2, width=64),
        }
    else:
        shapes = {
            "16x4096x1024": ((4096, 1024),) * 16,
            "1000x64x64": ((64, 64),) * 1000,
            "gpt2-124m": models.gpt2(),
        }
    return {name: Workload(name, tensors) for name, tensors in shapes.items()}


def model_workloads() -> dict[str, Workload]:
    """Tensor lists of real models; of the largest also what one rank of FSDP2 holds."""
    shapes = {
        "gpt2-1.5b": models.gpt2(layers=48, width=1600),
        "llama3-1b": models.LLAMA_1B.shapes(),
        "llama3-8b": models.LLAMA_8B.shapes(),
        "llama3-8b-of-64-ranks": models.shard(models.LLAMA_8B.shapes(), 64),
        "llama3-70b-of-256-ranks": models.shard(models.LLAMA_70B.shapes(), 256),
        "vit-large": models.vit_large(),
        "resnet50": models.resnet50(),
        "llama3-8b-lora": models.lora(),
        "olmoe-of-64-ranks": models.mixture_of_experts(),
    }
    found = {name: Workload(name, tensors) for name, tensors in shapes.items()}
    return found | {"465-groups": Workload("465-groups", models.layerwise_groups(465), 465)}


def sweep_workloads() -> dict[str, Workload]:
    """One tensor of 2^10 to 2^30 elements; 1 to 10,000 tensors of 1,024."""
    sizes = {f"1x2^{power}": ((1 << power,),) for power in range(10, 31, 2)}
    counts = {f"{count}x1024": ((1024,),) * count for count in (10, 100, 1000, 10_000)}
    return {name: Workload(name, tensors) for name, tensors in (sizes | counts).items()}


# What `--workload` takes besides single names.
SUITES = {"models": model_workloads(), "sweep": sweep_workloads()}


def host_workloads(quick: bool = False) -> dict[str, Workload]:
    """Workloads of `python -m bench host` by name: 300 tensors in 1, 10 and 300 groups; with
    `quick` the same names with a tenth of the tensors, in at most so many groups."""
    count = 30 if quick else 300
    names = {f"300-tiny-{groups}-groups": groups for groups in (1, 10, 300)}
    return {
        name: Workload(name, ((16,),) * count, min(groups, count)) for name, groups in names.items()
    }


def gpu_workloads() -> dict[str, Workload]:
    """Workloads of `python -m bench gpu` by name. 250m stands in for 1b where memory is short."""
    tiny = {f"1860-tiny-{groups}-groups": groups for groups in (1, 465)}
    return {
        "1b": Workload("1b", ((4096, 4096),) * 60),
        "250m": Workload("250m", ((4096, 4096),) * 15),
        "10x16.8M": Workload("10x16.8M", ((4096, 4096),) * 10),
        "200x1M": Workload("200x1M", ((1024, 1024),) * 200),
        "llama-7b-of-8-ranks": Workload(
            "llama-7b-of-8-ranks", models.shard(models.LLAMA_7B.shapes(), 8)
        ),
        "1000x1024": Workload("1000x1024", ((1024,),) * 1000),
        "10000x64": Workload("10000x64", ((64,),) * 10_000),
        **{name: Workload(name, ((16,),) * 1860, groups) for name, groups in tiny.items()},
    }


def dtypes_of(dtype: str) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of params and grads, dtype of the moments) by the name that the results use."""
    if dtype == MIXED:
        return torch.bfloat16, torch.float32
    return DTYPES[dtype], DTYPES[dtype]


def bytes_per_param(optimizer: str, dtype: str, clip: str = "none") -> int:
    """The least bytes that a step moves for each param when it is stored in `dtype`.

    `clip` is "none", "fused" (one more read of the grad) or "separate" (clip_grad_norm_ first).
    """
    param, state = dtypes_of(dtype)
    passes = PARAM_PASSES + CLIP_PASSES.get(clip, 0)
    return passes * param.itemsize + STATE_PASSES[optimizer] * state.itemsize


def memory_bytes(workload: Workload, dtype: str) -> int:
    """Memory that the contestants of a workload need in turn: params, grads and a copy of them, the
    shared moments of AdamW, those that a contestant makes before it shares them, and float32
    temporaries of torch's foreach."""
    param, state = dtypes_of(dtype)
    return workload.numel * (3 * param.itemsize + 4 * state.itemsize + 2 * 4)


class InputSet:
    """Params with grads: random tensors of a workload's shapes, on one device, in one dtype.

    params: leaf tensors, 0.02 * randn. grads: `p.grad` of each, randn scaled to GRAD_NORM.
    pristine: copies of the grads, because clip_grad_norm_ rewrites them.
    """

    def __init__(self, workload: Workload, dtype: str, seed: int, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(seed)
        param_dtype, _ = dtypes_of(dtype)
        randn = partial(torch.randn, generator=generator, dtype=param_dtype, device=device)
        grad_scale = GRAD_NORM / math.sqrt(workload.numel)
        self.workload = workload
        self.params = [torch.nn.Parameter(randn(s).mul_(0.02)) for s in workload.shapes]
        self.pristine = [randn(s).mul_(grad_scale) for s in workload.shapes]
        self.renew_grads()

    def renew_grads(self) -> None:
        """Give every param a newly allocated grad, as a backward after zero_grad does."""
        # The new ones are made while the old ones still live, so no address can come back at once.
        fresh = [grad.clone() for grad in self.pristine]
        for param, grad in zip(self.params, fresh, strict=True):
            param.grad = grad
        self.grads = fresh

    def restore_grads(self) -> None:
        """Undo what clip_grad_norm_ wrote into the grads, in place."""
        torch._foreach_copy_(self.grads, self.pristine)

    def param_groups(self) -> list[dict]:
        """The params in `workload.groups` groups, as the constructor of an optimizer takes them."""
        groups, count = self.workload.groups, len(self.params)
        bounds = [i * count // groups for i in range(groups + 1)]
        return [{"params": self.params[a:b]} for a, b in pairwise(bounds)]


def sets_to_defeat_cache(
    workload: Workload, optimizer: str, dtype: str, cache_bytes: int, turns: int
) -> int:
    """How many input sets to rotate among so that none is in the cache when its turn comes.

    Enough to be 6 caches in size, or 2 * `turns`, where `turns` is that of a round: as the in-place
    pass takes one turn in each round, it then lies between any two turns of a set. At most 4 GB in
    all; one set of a workload that is large enough by itself.
    """
    param, state = dtypes_of(dtype)
    moments = {"adamw": 2, "sgd": 1}[optimizer]
    set_bytes = workload.numel * (2 * param.itemsize + moments * state.itemsize)
    enough = min(math.ceil(6 * cache_bytes / set_bytes), 2 * turns)
    return max(1, min(enough, int(4e9 // set_bytes)))
