"""The native extension (csrc/bindings.cpp). Private."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

class Plan:
    def __init__(self, rule: str) -> None: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Any, Any],
        host: Any,
        norm: bool,
        max_norm: float,
        clip_value: float,
        grad_scale: float,
        found_inf: bool,
        skip_nonfinite: bool,
        threads: int,
        grad_norm: Tensor | None,
        skipped_steps: Tensor | None,
    ) -> str: ...
    def refresh(
        self, param_groups: list[dict[str, Any]], state: dict[Any, Any], host: Any
    ) -> str: ...
    def apply(
        self,
        squared_norm: float,
        norm: bool,
        max_norm: float,
        clip_value: float,
        grad_scale: float,
        found_inf: bool,
        skip_nonfinite: bool,
        threads: int,
        grad_norm: Tensor | None,
        skipped_steps: Tensor | None,
    ) -> None: ...
    def repeated_step(
        self,
        host: Any,
        options: tuple[Any, ...],
        keys: int,
        norm: bool,
        max_norm: float,
        clip_value: float,
        skip_nonfinite: bool,
        grad_norm: Tensor | None,
        skipped_steps: Tensor | None,
        empty: list[dict[Any, Any]],
        answers: list[tuple[Callable[[], Any], Any]],
        num_threads: Callable[[], int],
    ) -> Callable[[dict[str, Any]], bool]: ...
    def squared_norm(self, threads: int) -> float: ...
    def roll_back(self) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def flat_rows(self) -> int: ...

class CudaPlan:
    def __init__(self, rule: str) -> None: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Any, Any],
        host: Any,
        norm: bool,
        max_norm: float,
        clip_value: float,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        skip_nonfinite: bool,
        grad_norm: Tensor | None,
        skipped_steps: Tensor | None,
        stream: int,
    ) -> str: ...
    def refresh(
        self, param_groups: list[dict[str, Any]], state: dict[Any, Any], host: Any
    ) -> str: ...
    def repeated_step(
        self,
        host: Any,
        options: tuple[Any, ...],
        keys: int,
        norm: bool,
        max_norm: float,
        clip_value: float,
        skip_nonfinite: bool,
        grad_norm: Tensor | None,
        skipped_steps: Tensor | None,
        empty: list[dict[Any, Any]],
        answers: list[tuple[Callable[[], Any], Any]],
        stream: int,
        after: Callable[[], None] | None,
    ) -> Callable[[dict[str, Any]], bool]: ...
    def squared_norm(self, out: Tensor, stream: int) -> None: ...
    def apply(
        self,
        squared_norm: Tensor | None,
        norm: bool,
        max_norm: float,
        clip_value: float,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        skip_nonfinite: bool,
        grad_norm: Tensor | None,
        skipped_steps: Tensor | None,
        stream: int,
    ) -> None: ...
    def roll_back(self) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def uploads(self) -> int: ...

class TritonPlan:
    def __init__(self, rule: str, device_type: int, chunk: int) -> None: ...
    def step(self, param_groups: list[dict[str, Any]], state: dict[Any, Any], host: Any) -> str: ...
    def refresh(
        self, param_groups: list[dict[str, Any]], state: dict[Any, Any], host: Any
    ) -> str: ...
    def launch(self) -> None: ...
    def apply(self) -> None: ...
    def roll_back(self) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def uploads(self) -> int: ...

class CudaClip:
    def run(
        self,
        tensors: list[Tensor],
        host: Any,
        norm: bool,
        norm_only: bool,
        max_norm: float,
        clip_value: float,
        total_norm: Tensor | None,
        stream: int,
    ) -> str: ...

def cuda_unavailable() -> str: ...
def cuda_capabilities() -> list[int]: ...
def cuda_unserved(rule: str, device: int) -> str: ...
def cuda_clip_unserved(device: int) -> str: ...
def cuda_launches() -> int: ...
def cuda_set_geometry(blocks: int, threads: int) -> None: ...
def rules() -> dict[str, tuple[list[str], list[str], bool]]: ...
def count_keys(param_groups: list[dict[str, Any]]) -> int: ...
def build_info() -> dict[str, Any]: ...
def describe(tensor: Tensor) -> tuple[Any, ...] | None: ...
def grad_pointer(param: Tensor) -> int | None: ...
def bump_versions(tensors: list[Tensor]) -> None: ...
def squared_norm(tensors: list[Tensor], threads: int) -> float | str: ...
def scale_(tensors: list[Tensor], coef: float, limit: float, threads: int) -> str: ...
def limit_threads(threads: int) -> None: ...
def use_direct(
    reader: str,
    tensor_offset: int,
    undefined_impl: int,
    functions: dict[str, int],
    dtypes: dict[int, tuple[int, int]],
    devices: dict[int, int],
    hints: tuple[int, int, int],
) -> None: ...
def use_dlpack(capsule: object) -> None: ...
def use_python(describe: object) -> None: ...
def set_types(base: type, plain: tuple[type, ...]) -> None: ...
