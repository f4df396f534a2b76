"""What torch itself cannot do before some version: tests that need it are skipped there, with the
reason. Each is asked of the torch that is there, not of its version."""

from __future__ import annotations

import inspect
import unittest

import pytest
import torch

needs_grads_of_other_dtypes = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"),
    reason=f"torch {torch.__version__} takes no gradient of another dtype than its param's",
)
needs_decoupled_adam = pytest.mark.skipif(
    "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters,
    reason=f"torch.optim.Adam of {torch.__version__} has no decoupled_weight_decay",
)


def _plateau_keeps_a_tensor_lr() -> bool:
    sgd = torch.optim.SGD([torch.ones(1)], lr=0.1)
    sgd.param_groups[0]["lr"] = torch.tensor(0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, patience=0)
    for metric in (1.0, 1.0, 1.0):
        scheduler.step(metric)
    return isinstance(sgd.param_groups[0]["lr"], torch.Tensor)


PLATEAU_KEEPS_A_TENSOR_LR = _plateau_keeps_a_tensor_lr()


def need_fsdp2_on_cpu() -> None:
    """For the ranks of a distributed test.

    Raises:
        SkipTest: FSDP2 calls what this torch's streams of the CPU do not have.
    """
    if not hasattr(torch.cpu.Stream, "record_event"):
        raise unittest.SkipTest(f"FSDP2 of torch {torch.__version__} does not run on a CPU")
