from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fusedopt import _native


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=list(_native.WAYS))
def tensor_access(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way in which C++ reads tensors, in turn."""
    assert _native._C is not None
    before = _native._C.build_info()["tensor_access"]
    _native.use_tensor_access(request.param)
    yield request.param
    _native.use_tensor_access(before)
