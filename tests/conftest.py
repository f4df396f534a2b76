from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusedopt import _native, backends
from fusedopt.backends import triton
from tests.helpers import in_use


def pytest_configure() -> None:
    # Blocks and threads of the CUDA driver's grid, such as 3x32: for the emulated GPU.
    geometry = os.environ.get("FUSEDOPT_TEST_GEOMETRY")
    if geometry and _native._C is not None:
        _native._C.cuda_set_geometry(*map(int, geometry.split("x")))

    if triton.interpreted():
        from tests import triton_interpreter

        triton_interpreter.install()


# Files of minutes. They come first, so that workers that take whole files end together.
LONG = ("test_triton", "test_cuda_emulator", "test_package", "test_train_gpt", "test_train_fsdp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=[*_native.BY_READER, "dlpack", "python"])
def tensor_access(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way in which C++ reads tensors, in turn, and each reader of the direct one."""
    with in_use(request.param):
        yield request.param


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each driver of a GPU, where it can run here."""
    reason: str = backends.BACKENDS[request.param].unavailable()
    if reason:
        pytest.skip(reason)
    name: str = request.param
    return name


@pytest.fixture
def large() -> Iterator[None]:
    """Tests that take tens of GB of a GPU: one at a time of all processes on the machine."""
    with (Path(tempfile.gettempdir()) / "fusedopt-large-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()
