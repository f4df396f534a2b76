"""Fused optimizers for PyTorch: one step, one pass over memory.

Examples:
    >>> import fusedopt
    >>> optimizer = fusedopt.FusedAdamW(model.parameters(), lr=3e-4, max_grad_norm=1.0)
"""

from importlib.metadata import PackageNotFoundError, version

from fusedopt.adamw import FusedAdam, FusedAdamW
from fusedopt.backward import step_in_backward
from fusedopt.clip import clip_grad_norm_, clip_grad_value_, get_total_norm
from fusedopt.convert import convert_state_dict
from fusedopt.fuse import fuse
from fusedopt.optimizer import FusedOptimizer
from fusedopt.sgd import FusedSGD

try:
    __version__ = version("fusedopt")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "FusedAdam",
    "FusedAdamW",
    "FusedOptimizer",
    "FusedSGD",
    "__version__",
    "clip_grad_norm_",
    "clip_grad_value_",
    "convert_state_dict",
    "fuse",
    "get_total_norm",
    "step_in_backward",
]
