"""How C++ reads torch tensors: every way and reader, what is turned away, and what happens where
none works with the torch that is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedopt import FusedAdamW, _native, tensor_access
from tests.cases import make_params
from tests.helpers import in_use

_C = _native._C
assert _C is not None
SYMBOLS = tensor_access._SYMBOLS


class Dispatched(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a wrapper")


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def freed() -> Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3, 2)


def inside(transform: Callable[..., Any]) -> Tensor:
    """The tensor that torch.func hands to a function."""
    caught = []

    def function(x: Tensor) -> Tensor:
        caught.append(x)
        return x.sum()

    transform(function)(torch.ones(2, 3))
    return caught[0]


MEMORY: dict[str, Callable[[], Tensor]] = {
    "0-dim": lambda: torch.tensor(1.5),
    "one element": lambda: torch.tensor([1.5]),
    "empty": lambda: torch.zeros(0, 3),
    "empty tail": lambda: torch.zeros(3, 0),
    "seven dims": lambda: torch.ones(1, 2, 1, 3, 1, 2, 1),
    "transposed": lambda: torch.ones(3, 4).t(),
    "view with an offset": lambda: torch.ones(6, 4)[2:, 1::2],
    "expanded": lambda: torch.ones(1, 3).expand(4, 3),
    "channels_last": lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "cpu:0": lambda: torch.ones(3, device="cpu:0"),
    "float64": lambda: torch.ones(3, dtype=torch.float64),
    "float16": lambda: torch.ones(3, dtype=torch.float16),
    "bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "int64": lambda: torch.ones(3, dtype=torch.int64),
    "not a leaf": lambda: torch.nn.Parameter(torch.ones(3)) * 2,
    "inference": inference,
    "real part": lambda: torch.ones(3, dtype=torch.complex64).real,
    "detached": lambda: torch.nn.Parameter(torch.ones(3, 2)).detach(),
    "resized": lambda: torch.ones(3).resize_(100, 2),
    "moved": lambda: torch.ones(3).set_(torch.ones(5, 5).t()),
}
if hasattr(Tensor, "_lazy_clone"):
    MEMORY["copied on write"] = lambda: torch.ones(3)._lazy_clone()

NO_MEMORY: dict[str, Callable[[], Tensor]] = {
    "meta": lambda: torch.ones(3, device="meta"),
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "negated": lambda: torch.tensor([1 + 2j]).conj().imag,
    "conjugated": lambda: torch.tensor([1 + 2j]).conj(),
    "functional": lambda: torch._to_functional_tensor(torch.ones(3)),
    "zeros without memory": lambda: torch._efficientzerotensor(3),
    "freed": freed,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "wrapper": lambda: Tensor._make_wrapper_subclass(Dispatched, (3,), dtype=torch.float32),
    "fake": fake,
    "vmap": lambda: inside(lambda f: torch.vmap(f)),
    "func.grad": lambda: inside(lambda f: torch.func.grad(f)),
    **{
        str(dtype): lambda dtype=dtype: torch.zeros(3, dtype=dtype)
        for dtype in (torch.int32, torch.int8, torch.bool, torch.complex128, torch.float8_e5m2)
    },
}
if torch.backends.mkldnn.is_available():
    NO_MEMORY["mkldnn"] = lambda: torch.eye(3).to_mkldnn()


@pytest.mark.usefixtures("tensor_access")
@pytest.mark.parametrize("name", MEMORY)
def test_a_tensor_is_read_as_python_sees_it(name: str) -> None:
    tensor = MEMORY[name]()
    seen = _C.describe(tensor)
    code = {torch.int64: (0, 64), torch.float64: (2, 64), torch.float16: (2, 16)}
    code[torch.bfloat16] = (4, 16)
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    expected = (1, 0, *code.get(tensor.dtype, (2, 32)), shape, strides)
    assert seen == (tensor.data_ptr(), *expected)


@pytest.mark.usefixtures("tensor_access")
@pytest.mark.parametrize("name", NO_MEMORY)
def test_a_tensor_without_plain_memory_is_turned_away(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and deprecations of torch
        tensor = NO_MEMORY[name]()
        seen = _C.describe(tensor)
    assert tensor_access._usable(seen) is None


@pytest.mark.usefixtures("tensor_access")
def test_gradients_and_versions() -> None:
    param = torch.nn.Parameter(torch.ones(2, 3))
    assert _C.grad_pointer(param) is None
    for grad in (torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(1, 1).expand(2, 3)):
        param.grad = grad
        assert _C.grad_pointer(param) == grad.data_ptr()
    for odd in (torch.eye(3)[:2].to_sparse(), torch.ones(2, 3, dtype=torch.complex64).conj().imag):
        param.grad = odd
        assert _C.grad_pointer(param) is None
    param.grad = None
    assert _C.grad_pointer(param) is None
    # Backward makes the gradient in C++: no Python object of it is there before this.
    (param * torch.arange(3)).sum().backward()
    assert _C.grad_pointer(param) == param.grad.data_ptr()
    view = param.detach()
    before = param._version
    _C.bump_versions([param, view])
    assert param._version == view._version == before + 2
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor"):
        _C.describe(object())


@pytest.fixture
def shim() -> Any:
    """The reader that every torch has, on every torch."""
    with in_use("python"):
        yield "direct:shim"
        assert _C.build_info()["tensor_access"] == "python"  # what is refused is not in use


# Functions of the same signature, which do something else.
WRONG = {
    "sizes for strides": {"strides": SYMBOLS["sizes"]},
    "strides for sizes": {"sizes": SYMBOLS["strides"]},
    "the shape's address for the data's": {"data_ptr": SYMBOLS["sizes"]},
    "device type for dtype": {"dtype": SYMBOLS["device_type"]},
    "dtype for device type": {"device_type": SYMBOLS["dtype"]},
    "dtype for device index": {"device_index": SYMBOLS["dtype"]},
    "numel for dim": {"dim": ("torch_cpu", "aoti_torch_get_numel")},
    "conjugated for negated": {"is_neg": ("torch_cpu", "_ZN2at6native7is_conjERKNS_6TensorE")},
    "requires_grad for has_storage": {
        "has_storage": ("c10", "_ZNK3c1010TensorImpl13requires_gradEv")
    },
    "nothing for the version": {"bump_version": SYMBOLS["is_neg"]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_a_function_that_does_something_else_is_found_out(
    change: dict[str, tuple[str, str]], shim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, symbol in change.items():
        monkeypatch.setitem(SYMBOLS, name, symbol)
    with pytest.raises(RuntimeError, match="'direct:shim' does not work here: a "):
        _native.use_tensor_access(shim)


@pytest.mark.parametrize("wrong", ["dtypes", "devices"])
def test_wrong_numbers_are_found_out(
    wrong: str, shim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes, devices = tensor_access._shim_numbers()
    if wrong == "dtypes":
        half, brain = (next(n for n, c in dtypes.items() if c == k) for k in ((2, 16), (4, 16)))
        dtypes |= {half: (4, 16), brain: (2, 16)}
    else:
        devices = {number + 1: code for number, code in devices.items()}
    monkeypatch.setattr(tensor_access, "_shim_numbers", lambda: (dtypes, devices))
    with pytest.raises(RuntimeError, match=r"a tensor of .* was read as"):
        _native.use_tensor_access(shim)


def test_a_reader_that_fails_leaves_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_use("python"), monkeypatch.context() as patch:
        for name in ("to_dlpack", "to_dlpack_read_only"):  # as before torch 2.10
            patch.setitem(SYMBOLS, name, ("torch_cpu", "no_such_function"))
        _native.use_tensor_access("direct")
        assert _C.build_info()["tensor_reader"] == "shim"
        patch.setitem(SYMBOLS, "grad", ("c10", "no_such_function"))
        with pytest.raises(RuntimeError, match=r"'direct' does not .* libc10\S+ has no no_such"):
            _native.use_tensor_access("direct")
        patch.undo()
        with pytest.raises(ValueError, match="direct, dlpack, python, got 'telepathy'"):
            _native.use_tensor_access("telepathy")
        patch.setattr(tensor_access.sys, "platform", "win32")
        with pytest.raises(RuntimeError, match="functions on win32 are not known"):
            _native.use_tensor_access("direct")
        patch.undo()
        patch.setattr(tensor_access.torch, "__file__", "/nowhere/torch/__init__.py")
        with pytest.raises(RuntimeError, match="/nowhere/torch/lib/libc10"):
            _native.use_tensor_access("direct")


def test_the_offset_of_what_is_no_tensor() -> None:
    class Fake:
        _cdata = 12345

    with pytest.raises(RuntimeError, match="offsets, not one"):
        tensor_access._offset_of_tensor([object.__new__(Fake), torch.ones(1)])  # type: ignore[list-item]


READERS = {name: tensor_access._ALWAYS + own for name, own in tensor_access.READERS.items()}


@pytest.mark.parametrize(
    ("reader", "lacking"), [(r, name) for r, names in READERS.items() for name in names]
)
def test_no_function_is_called_under_another_name(reader: str, lacking: str) -> None:
    """Each reader takes the addresses of its own functions only, so that none is called with the
    arguments of another."""
    others = {name: 1 for name in SYMBOLS if name != lacking}
    for functions in (others, {**others, lacking: 0}):
        with pytest.raises(ValueError, match=f"needs the address of {lacking}$"):
            _C.use_direct(reader, 8, 1, functions, {}, {}, (0, 0, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reader": "three"}, "read_only, two_arguments or shim, got 'three'"),
        ({"tensor_offset": 0}, "a positive offset"),
        ({"tensor_offset": -8}, "a positive offset"),
        ({"undefined_impl": 0}, "an address that is not null"),
        ({"dtypes": {64: (2, 32)}}, "the dtype 64"),
        ({"dtypes": {-1: (2, 32)}}, "the dtype -1"),
        ({"devices": {32: 1}}, "the device type 32"),
        ({"devices": {-1: 1}}, "the device type -1"),
        ({"hints": (-8, 0, 0)}, "hints of 0 to 144"),
        ({"hints": (16, 24, 145)}, "hints of 0 to 144"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"reader": "shim", "tensor_offset": 8, "undefined_impl": 1}
    arguments |= {"functions": dict.fromkeys(SYMBOLS, 1), "dtypes": {}, "devices": {}}
    arguments["hints"] = (0, 0, 0)
    with pytest.raises(ValueError, match=message):
        _C.use_direct(**{**arguments, **change})


@pytest.mark.parametrize("hints", [(0, 0, 0), (144, 144, 144), (8, 40, 3)])
def test_hints_that_go_astray_change_nothing(
    hints: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    with in_use("direct"):
        found = tensor_access._hints(tensor_access._described())
        assert all(0 < hint <= 144 for hint in found)
        for given in (found, hints):
            monkeypatch.setattr(tensor_access, "_hints", lambda samples, given=given: given)
            _native.use_tensor_access("direct")
            params = make_params([3, 70] * 20, torch.float32)
            optimizer = FusedAdamW(params, lr=0.1, backend="cpu", max_grad_norm=1.0)
            for _ in range(3):
                optimizer.step()
            results.append([p.detach().clone() for p in params])
        monkeypatch.undo()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_the_compiler_keeps_the_hints() -> None:
    """g++ deletes those that stand in a function of their own."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(_C.__file__)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = dict(re.findall(r"^\S+ <(.*?)>:$(.*?)(?=^\S+ <|\Z)", listing, re.M | re.S))
    for function, least in (("ask_ahead", 12), ("find_states", 7), ("find_candidates", 6)):
        body = "".join(text for name, text in code.items() if f"Plan::{function}(" in name)
        assert len(re.findall(r"\b(?:prefetch\w*|prfm)\b", body)) >= least, function


# What takes a way of reading away from a torch, before fusedopt is imported.
BREAK = {
    "direct": "torch.__file__ = '/nowhere/torch/__init__.py'",
    "dlpack": "torch.Tensor.__dlpack_c_exchange_api__ = None",
    "python": "torch.autograd.graph.increment_version = lambda tensors: None",
}
STEP = """
import fusedopt
model = torch.nn.Linear(4, 4)
model(torch.ones(2, 4)).sum().backward()
optimizer = fusedopt.FusedAdamW(model.parameters(), max_grad_norm=1.0)
optimizer.step()
fusedopt.clip_grad_norm_(model.parameters(), 1.0)
print("served by", optimizer.backend_in_use)
"""
REPORT = "import runpy; runpy.run_module('fusedopt', run_name='__main__')"


def alone(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", "import torch\n" + script],
        env={**os.environ, "FUSEDOPT_TENSOR_ACCESS": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_where_no_way_works_the_reference_serves() -> None:
    broken = "\n".join(BREAK.values()) + "\n"
    done = alone(
        broken + STEP + "try: fusedopt.FusedSGD(model.parameters(), backend='cpu')\n"
        "except RuntimeError as error: print(error)\n" + REPORT
    )
    assert done.stderr.count("Warning") == 1, done.stderr
    assert "the reference backend serves params on cpu" in done.stderr
    assert "To mend it: install a newer fusedopt, or a torch of a version that" in done.stderr
    shown = done.stdout
    assert shown.startswith("served by reference\n")
    version = re.escape(torch.__version__)
    reason = rf"cannot read tensors of torch {version}: direct: .* a version counter was not bumped"
    assert_matches(rf"missing +the native extension {reason}", shown)
    assert_matches(rf"  cpu +the native extension {reason}", shown)
    for way in ("direct", "dlpack", "python"):
        assert f"tensor access {way} was rejected: " in shown
    assert_matches("  reference +available, self-test passed", shown)
    assert "\nbackend 'cpu' cannot serve: the native extension cannot read tensors of" in shown


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


@pytest.mark.parametrize("way", BREAK)
def test_a_way_that_is_asked_for_and_fails(way: str) -> None:
    done = alone(f"{BREAK[way]}\n{STEP}{REPORT}", FUSEDOPT_TENSOR_ACCESS=way)
    assert done.stdout.startswith("served by reference\n")
    reason = f"FUSEDOPT_TENSOR_ACCESS: tensor access '{way}' does not work here: "
    assert_matches(rf"missing +{reason}", done.stdout)
    assert_matches(rf"RuntimeWarning: {reason}.*; the reference backend serves", done.stderr)
    assert done.stderr.count("Warning") == 1, done.stderr
    assert "To mend it: unset FUSEDOPT_TENSOR_ACCESS." in done.stderr
    assert "Traceback" not in done.stderr


def test_the_other_ways_do_not_matter() -> None:
    broken = f"{BREAK['dlpack']}\n{BREAK['python']}\n"
    assert alone(broken + STEP).stdout == "served by cpu\n"


def test_a_word_that_is_no_way() -> None:
    done = alone(STEP + REPORT, FUSEDOPT_TENSOR_ACCESS="x")
    assert done.stdout.startswith("served by reference\n")
    reason = "FUSEDOPT_TENSOR_ACCESS: tensor access must be one of direct, dlpack, python, got 'x'"
    assert_matches(rf"missing +{reason}", done.stdout)
    assert f"RuntimeWarning: {reason}; the reference backend serves" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("way", ["", "direct:shim", "dlpack"])
def test_an_import_prints_nothing(way: str) -> None:
    with in_use(way or "direct"):  # skips where this torch does not have it
        pass
    script = "from fusedopt import _native; print(_native._C.build_info()['tensor_access'])"
    done = alone(script, FUSEDOPT_TENSOR_ACCESS=way)
    assert done.stdout == (way.partition(":")[0] or "direct") + "\n"
    assert done.stderr == ""


MODES = {
    "default device": "torch.set_default_device('meta')",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "no grad": "torch.set_grad_enabled(False)",
    "inference": "mode = torch.inference_mode(); mode.__enter__()",
    "fake tensors": "from torch._subclasses.fake_tensor import FakeTensorMode\n"
    "mode = FakeTensorMode(); mode.__enter__()",
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_the_mode_of_the_first_import_does_not_matter(mode: str) -> None:
    script = f"{mode}\nfrom fusedopt import _native\nprint(_native.rejected_access)"
    assert alone(script).stdout == "{}\n"
