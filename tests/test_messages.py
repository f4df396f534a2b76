"""Mistakes that users make, each with what is raised: what is wrong and what to write instead.
Nothing has changed after one."""

from __future__ import annotations

import copy
import inspect
import pathlib
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR

import fusedopt
from fusedopt import FusedAdam, FusedAdamW, FusedSGD
from tests.helpers import assert_same, contents


class Bench:
    """A model with gradients, and optimizers that have made a step on it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.model(torch.randn(5, 3)).square().sum().backward()
        self.params = list(self.model.parameters())
        self.fused = FusedAdamW(self.params, lr=0.1)
        self.sgd = FusedSGD(self.params, lr=0.1, momentum=0.9)
        self.plain = AdamW(self.params)
        for optimizer in (self.fused, self.sgd, self.plain):
            optimizer.step()

    @property
    def used(self) -> Any:
        generator = self.model.parameters()
        assert len(list(generator)) == 4
        return generator

    @property
    def saved(self) -> dict[str, Any]:
        return self.fused.state_dict()

    def everything(self) -> Any:
        state = [contents(o) for o in (self.fused, self.sgd)]
        groups = [
            {k: v for k, v in g.items() if k != "params"}
            for o in (self.fused, self.sgd)
            for g in o.param_groups
        ]
        return copy.deepcopy(
            [state, groups, [p.grad for p in self.params], self.plain.state_dict()]
        )


def no_group() -> Any:
    return torch.distributed.GroupMember.NON_GROUP_MEMBER


def mesh() -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.__new__(DeviceMesh)


MODEL = "got a Sequential; pass model.parameters()"
GROUP = "must be a tensor or an iterable of tensors"
USED = "is a generator that was used before, and has nothing left; call model.parameters() again"
NOT_ONE = "optimizer can only optimize Tensors, but one of the params is"
SAVED = (
    "load_state_dict() takes what optimizer.state_dict() has given, and this dict has no 'state'"
)
A_DICT = "load_state_dict() takes the dict that optimizer.state_dict() has given, got"
PROCESS_GROUP = "process_group must be a torch.distributed.ProcessGroup or None, got"
FUSE = "optimizer must be one of torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, got"
BACKEND = "backend must be one of auto, cuda, triton, cpu, reference, got"
OFF = "write None to switch clipping off"

# What is written, what is raised, and parts of its message.
Mistake = tuple[Callable[[Bench], Any], type[Exception], tuple[str, ...]]
MISTAKES: dict[str, Mistake] = {
    # params
    "a model": (lambda b: FusedAdamW(b.model), TypeError, ("params must be", MODEL)),
    "a model that is no iterable": (
        lambda b: FusedSGD(b.model[0], lr=0.1), TypeError,
        ("got a Linear; pass model.parameters()",),
    ),
    "a used generator": (
        lambda b: FusedAdamW(b.used), ValueError,
        ("optimizer got an empty parameter list: params", USED, "list(model.parameters())"),
    ),
    "a filter that lets nothing through": (
        lambda b: FusedAdamW(filter(lambda p: False, b.params)), ValueError,
        ("empty parameter list: the iterator gave none", "filtered out"),
    ),
    "a used generator in a group": (
        lambda b: FusedAdam([{"params": b.params[:1]}, {"params": b.used}]), ValueError,
        (f'param_groups[1]["params"] {USED}',),
    ),
    "one generator for two groups": (
        lambda b: FusedAdam([{"params": p} for p in [b.model.parameters()] * 2]), ValueError,
        (f'param_groups[1]["params"] {USED}',),
    ),
    "a tensor": (
        lambda b: FusedAdamW(b.params[0]), TypeError,
        ("should be an iterable of Tensors or dicts, but got",),
    ),
    "a method": (
        lambda b: FusedAdamW(b.model.parameters), TypeError,
        ("got a method; pass what it returns: parameters(), with parentheses",),
    ),
    "a class": (
        lambda b: FusedAdamW(nn.Linear), TypeError,
        ("got the class Linear; pass model.parameters() of an instance",),
    ),
    "a group without its list": (
        lambda b: FusedAdamW({"params": b.params}), TypeError,
        ("got a dict; pass a list of groups, [group]",),
    ),
    "a dict of params": (
        lambda b: FusedAdamW(dict(b.model.named_parameters())), TypeError,
        ("got a dict; pass its values()",),
    ),
    "a model's state_dict as params": (
        lambda b: FusedAdamW(b.model.state_dict()), TypeError,
        ("got an OrderedDict; pass model.parameters()",),
    ),
    "a text": (lambda b: FusedAdamW("abc"), TypeError, ("got 'abc'; pass model.parameters()",)),
    "None": (lambda b: FusedAdamW(None), TypeError, ("got None; pass model.parameters()",)),
    "an optimizer": (
        lambda b: FusedAdamW(b.plain), TypeError,
        ("got an AdamW; pass [p for group in optimizer.param_groups for p in group['params']]",),
    ),
    "a list of models": (
        lambda b: FusedAdamW([b.model]), TypeError,
        (NOT_ONE, "Sequential; pass its parameters()"),
    ),
    "a list of lists": (
        lambda b: FusedAdamW([b.params[:2], b.params[2:]]), TypeError,
        (f"{NOT_ONE} list; pass one flat list, [*first, *second], or groups",),
    ),
    "a list with None": (
        lambda b: FusedAdamW([*b.params, None]), TypeError,
        (f"{NOT_ONE} NoneType; leave out what is None",),
    ),
    "pairs the wrong way round": (
        lambda b: FusedAdamW([(p, n) for n, p in b.model.named_parameters()]), TypeError,
        (f"{NOT_ONE} str; pass tensors, or pairs of a name and a tensor in this order",),
    ),
    "a group among tensors": (
        lambda b: FusedAdamW([b.params[0], {"params": b.params[1:]}]), TypeError,
        (f"{NOT_ONE} dict; of a group, pass group['params']",),
    ),
    "a tensor among groups": (
        lambda b: FusedAdamW([{"params": b.params[1:]}, b.params[0]]), TypeError,
        ("param_group must be a dict, but got <class", '{"params": model.parameters(), "lr": 0.1}'),
    ),
    "a model in a group": (
        lambda b: FusedAdamW([{"params": b.model}]), TypeError,
        (f'param_groups[0]["params"] {GROUP}, {MODEL}',),
    ),
    "names in a group": (
        lambda b: FusedAdamW([{"params": "weight"}]), TypeError,
        (f"{GROUP}, got 'weight'; pass model.parameters()",),
    ),
    "a group without params": (
        lambda b: FusedAdamW([{"lr": 0.1}]), KeyError, ("param_groups[0] has no 'params'",),
    ),
    "params added without a group": (
        lambda b: b.fused.add_param_group(b.model.parameters()), TypeError,
        ("param_group must be a dict, but got <class 'generator'>; groups look like",),
    ),
    "a model added": (
        lambda b: b.fused.add_param_group({"params": b.model}), TypeError,
        (f'param_groups[1]["params"] {GROUP}, {MODEL}',),
    ),
    # hyperparameters and options
    "lr as a text": (
        lambda b: FusedAdamW(b.params, lr="1e-3"), TypeError,
        ("Invalid learning rate: '1e-3'; expected a number", "; write float('1e-3')"),
    ),
    "one beta": (
        lambda b: FusedAdamW(b.params, betas=0.9), TypeError,
        ("Invalid betas: 0.9; expected a pair of numbers in [0, 1), as (0.9, 0.999)",),
    ),
    "weight_decay None": (
        lambda b: FusedAdamW(b.params, weight_decay=None), TypeError,
        ("Invalid weight_decay value: None", "; 0 switches it off"),
    ),
    "max_grad_norm 0": (
        lambda b: FusedAdamW(b.params, max_grad_norm=0), ValueError,
        ("max_grad_norm must be a number > 0 or None, got 0; 0 would make each gradient 0", OFF,
         'or float("inf") to measure the norm alone'),
    ),
    "max_grad_norm 0.0 in groups": (
        lambda b: FusedSGD([{"params": b.params, "max_grad_norm": 0.0}], lr=0.1), ValueError,
        ("max_grad_norm must be a number > 0 or None, got 0.0", OFF),
    ),
    "max_grad_norm 0 as a tensor": (
        lambda b: FusedAdamW(b.params, max_grad_norm=torch.tensor(0.0)), ValueError,
        ("max_grad_norm must be a number > 0 or None, got tensor(0.)", OFF),
    ),
    "max_grad_norm 0 by attribute": (
        lambda b: setattr(b.fused, "max_grad_norm", 0), ValueError, ("max_grad_norm must be", OFF),
    ),
    "max_grad_norm 0 given to fuse": (
        lambda b: fusedopt.fuse(b.plain, max_grad_norm=0), ValueError, ("got 0", OFF),
    ),
    "max_grad_norm negative": (
        lambda b: FusedAdamW(b.params, max_grad_norm=-1.0), ValueError,
        ("max_grad_norm must be a number > 0 or None, got -1.0",),
    ),
    "max_grad_norm as a text": (
        lambda b: FusedAdamW(b.params, max_grad_norm="1.0"), TypeError,
        ("max_grad_norm must be a number > 0 or None, got '1.0'",),
    ),
    "clip_grad_value 0": (
        lambda b: FusedAdamW(b.params, clip_grad_value=0.0), ValueError,
        ("clip_grad_value must be a number > 0 or None, got 0.0", OFF),
    ),
    "both ways to clip": (
        lambda b: FusedAdamW(b.params, max_grad_norm=1.0, clip_grad_value=1.0), ValueError,
        ("cannot both be given, got 1.0 and 1.0; write None for one of them",),
    ),
    "skip_nonfinite as a text": (
        lambda b: FusedAdamW(b.params, skip_nonfinite="yes"), TypeError,
        ("skip_nonfinite must be a bool, got 'yes'",),
    ),
    "backend gpu": (
        lambda b: FusedAdamW(b.params, backend="gpu"), ValueError,
        (f"{BACKEND} 'gpu'; \"auto\" chooses by where the params are",),
    ),
    "backend None": (
        lambda b: setattr(b.fused, "backend", None), ValueError, (f"{BACKEND} None",),
    ),
    "backend a list": (
        lambda b: FusedAdamW(b.params, backend=["cpu"]), ValueError, (f"{BACKEND} ['cpu']",),
    ),
    "process_group a name": (
        lambda b: FusedAdamW(b.params, max_grad_norm=1.0, process_group="world"), TypeError,
        (f"{PROCESS_GROUP} 'world'; pass torch.distributed.group.WORLD for all ranks",),
    ),
    "process_group a number": (
        lambda b: FusedAdamW(b.params, process_group=8), TypeError,
        (f"{PROCESS_GROUP} 8; pass what torch.distributed.new_group(ranks) gives",),
    ),
    "process_group ranks": (
        lambda b: FusedAdamW(b.params, process_group=[0, 1]), TypeError,
        (f"{PROCESS_GROUP} a list; pass what torch.distributed.new_group(ranks) gives",),
    ),
    "process_group a mesh": (
        lambda b: FusedAdamW(b.params, process_group=mesh()), TypeError,
        (f"{PROCESS_GROUP} a DeviceMesh; pass mesh.get_group()",),
    ),
    "process_group of other ranks": (
        lambda b: FusedAdamW(b.params, process_group=no_group()), TypeError,
        ("pass None on ranks that are not in the group",),
    ),
    "process_group the module": (
        lambda b: setattr(b.fused, "process_group", torch.distributed), TypeError,
        (f"{PROCESS_GROUP} a module; pass torch.distributed.group.WORLD",),
    ),
    "process_group in groups": (
        lambda b: FusedAdamW([{"params": b.params, "process_group": "gloo"}]), TypeError,
        (f"{PROCESS_GROUP} 'gloo'",),
    ),
    # step, figures
    "a loss for step": (
        lambda b: b.fused.step(torch.tensor(1.0)), TypeError,
        ("got a Tensor; for a loss, write loss.backward() and then optimizer.step()",),
    ),
    "a number for step": (
        lambda b: b.sgd.step(3), TypeError,
        ("closure must be a function that returns the loss, got 3; write optimizer.step()",),
    ),
    "grad_norm without the option": (
        lambda b: b.fused.grad_norm, AttributeError,
        ("this FusedAdamW measures no grad_norm: write max_grad_norm=1.0",
         'max_grad_norm=float("inf"), to measure it without clipping'),
    ),
    # checkpoints
    "a model's state_dict": (
        lambda b: b.fused.load_state_dict(b.model.state_dict()), ValueError,
        ("this is a model's state_dict, which has no 'state' and no 'param_groups'",
         "0.weight, 0.bias", "pass the one that was saved from the optimizer"),
    ),
    "a whole checkpoint": (
        lambda b: b.fused.load_state_dict({"model": b.model.state_dict(), "optimizer": b.saved}),
        ValueError,
        (SAVED, "its keys are model, optimizer",
         'write load_state_dict(checkpoint["optimizer"])'),
    ),
    "a checkpoint with two optimizers": (
        lambda b: b.sgd.load_state_dict({"d": b.saved, "g": b.saved, "epoch": 3}), ValueError,
        ('write load_state_dict(checkpoint["d"]) or load_state_dict(checkpoint["g"])',),
    ),
    "a checkpoint of Lightning": (
        lambda b: b.fused.load_state_dict({"epoch": 1, "optimizer_states": [b.saved]}), ValueError,
        ('write load_state_dict(checkpoint["optimizer_states"][0])',),
    ),
    "a checkpoint without an optimizer": (
        lambda b: b.fused.load_state_dict({"model": b.model.state_dict(), "epoch": 1}), ValueError,
        (f"{SAVED} and no 'param_groups': its keys are model, epoch",),
    ),
    "an empty dict": (
        lambda b: b.fused.load_state_dict({}), ValueError, (f"{SAVED} and no", "it is empty"),
    ),
    "a state_dict without its state": (
        lambda b: b.fused.load_state_dict({"param_groups": []}), ValueError,
        (f"{SAVED}: its keys are param_groups",),
    ),
    "a path": (
        lambda b: b.fused.load_state_dict("last.pt"), TypeError,
        (f"{A_DICT} 'last.pt'; write load_state_dict(torch.load('last.pt'))",),
    ),
    "a Path": (
        lambda b: b.sgd.load_state_dict(pathlib.PurePosixPath("runs/last.pt")), TypeError,
        ("; write load_state_dict(torch.load('runs/last.pt'))",),
    ),
    "an optimizer as a state_dict": (
        lambda b: b.fused.load_state_dict(b.plain), TypeError,
        (f"{A_DICT} an AdamW; write load_state_dict(optimizer.state_dict())",),
    ),
    "a list of state_dicts": (
        lambda b: b.fused.load_state_dict([b.saved]), TypeError,
        (f"{A_DICT} a list; write load_state_dict(checkpoint[0])",),
    ),
    "None as a state_dict": (
        lambda b: b.fused.load_state_dict(None), TypeError, (f"{A_DICT} None",),
    ),
    "a model's state_dict to convert": (
        lambda b: fusedopt.convert_state_dict(b.model.state_dict()), ValueError,
        ("convert_state_dict() takes what", "this is a model's state_dict"),
    ),
    "a whole checkpoint to convert": (
        lambda b: fusedopt.convert_state_dict({"model": {}, "optimizer": b.saved}), ValueError,
        ('write convert_state_dict(checkpoint["optimizer"])',),
    ),
    "a path to convert": (
        lambda b: fusedopt.convert_state_dict("last.pt"), TypeError,
        ("; write convert_state_dict(torch.load('last.pt'))",),
    ),
    # clipping
    "a model to clip": (
        lambda b: fusedopt.clip_grad_norm_(b.model, 1.0), TypeError, ("parameters must be", MODEL),
    ),
    "an optimizer to clip": (
        lambda b: fusedopt.clip_grad_norm_(b.fused, 1.0), TypeError,
        ("got a FusedAdamW; pass [p for group in optimizer.param_groups",),
    ),
    "named_parameters to clip": (
        lambda b: fusedopt.clip_grad_norm_(b.model.named_parameters(), 1.0), AttributeError,
        ("'tuple' object has no attribute 'grad'", "; pass model.parameters(), without the names"),
    ),
    "groups to clip": (
        lambda b: fusedopt.clip_grad_norm_(b.fused.param_groups, 1.0), AttributeError,
        ("'dict' object has no attribute 'grad'", "; of a group, pass group['params']"),
    ),
    "max_norm None": (
        lambda b: fusedopt.clip_grad_norm_(b.params, None), TypeError,
        ("max_norm must be a number >= 0, got None",
         'write float("inf") to measure the norm without clipping'),
    ),
    "max_norm negative": (
        lambda b: fusedopt.clip_grad_norm_(b.params, -1.0), ValueError,
        ("max_norm must be a number >= 0, got -1.0",),
    ),
    "max_norm NaN": (
        lambda b: fusedopt.clip_grad_norm_(b.params, float("nan")), ValueError, ("got nan",),
    ),
    "norm_type a word": (
        lambda b: fusedopt.clip_grad_norm_(b.params, 1.0, "fro"), ValueError,
        ("norm_type must be a number, got 'fro'",),
    ),
    "a model to clip by value": (
        lambda b: fusedopt.clip_grad_value_(b.model, 1.0), TypeError, (MODEL,),
    ),
    "clip_value None": (
        lambda b: fusedopt.clip_grad_value_(b.params, None), TypeError,
        ("clip_value must be a number >= 0, got None; leave the call out to clip nothing",),
    ),
    "clip_value negative": (
        lambda b: fusedopt.clip_grad_value_(b.params, -0.5), ValueError,
        ("clip_value must be a number >= 0, got -0.5",),
    ),
    "the norm of a model": (
        lambda b: fusedopt.get_total_norm(b.model), TypeError,
        ("pass the gradients: [p.grad for p in model.parameters() if p.grad is not None]",),
    ),
    "the norm of gradients with None": (
        lambda b: fusedopt.get_total_norm([b.params[0].grad, None]), RuntimeError,
        ("each of tensors must be a tensor; leave out what is None",),
    ),
    # fuse, step_in_backward
    "fuse a model": (
        lambda b: fusedopt.fuse(b.model), TypeError,
        (f"{FUSE} Sequential; build the fused optimizer itself: fusedopt.FusedAdamW(",),
    ),
    "fuse a class": (
        lambda b: fusedopt.fuse(AdamW), TypeError,
        (f"{FUSE} the class AdamW; fuse() takes an instance: fuse(AdamW(model.parameters()))",),
    ),
    "fuse params": (
        lambda b: fusedopt.fuse(b.model.parameters()), TypeError,
        (f"{FUSE} generator; build the fused optimizer itself",),
    ),
    "fuse what is fused": (
        lambda b: fusedopt.fuse(b.fused), TypeError,
        (f"{FUSE} FusedAdamW, which is fused: its options are attributes",),
    ),
    "fuse a scheduler": (
        lambda b: fusedopt.fuse(StepLR(SGD(b.params), 1)), TypeError,
        (f"{FUSE} StepLR; pass the optimizer that it holds",),
    ),
    "fuse with a misspelt option": (
        lambda b: fusedopt.fuse(b.plain, max_gradnorm=1.0), TypeError,
        ("FusedAdamW has no option 'max_gradnorm'; did you mean 'max_grad_norm'?",),
    ),
    "fuse with an option of another class": (
        lambda b: fusedopt.fuse(b.plain, momentum=0.9), TypeError,
        ("FusedAdamW has no option 'momentum'",),
    ),
    "step_in_backward the wrong way round": (
        lambda b: fusedopt.step_in_backward(b.fused, b.model), TypeError,
        ("got Sequential; write step_in_backward(model, optimizer)",),
    ),
    "step_in_backward with torch's": (
        lambda b: fusedopt.step_in_backward(b.model, b.plain), TypeError,
        ("optimizer must be a fusedopt optimizer, got AdamW; pass fusedopt.fuse(optimizer)",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_says_what_to_write(mistake: str) -> None:
    attempt, kind, parts = MISTAKES[mistake]
    bench = Bench()
    before = bench.everything()
    raised: type | None = None
    text = ""
    try:
        attempt(bench)
    except Exception as error:
        raised, text = type(error), str(error)
    assert raised is kind
    for part in parts:
        assert part in text or repr(part)[1:-1] in text, text
    assert_same(bench.everything(), before)


def test_there_are_enough_of_them() -> None:
    assert len(MISTAKES) >= 25


# Mistakes for which torch has a type of exception and a message, which come first here.
OF_TORCH = (
    *("a tensor", "a list of models", "a list of lists", "a list with None", "a used generator"),
    *("pairs the wrong way round", "a group among tensors", "params added without a group"),
)


@pytest.mark.parametrize("mistake", OF_TORCH)
def test_torchs_words_come_first(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt, kind, _ = MISTAKES[mistake]
    for name in ("FusedAdamW", "FusedSGD"):
        monkeypatch.setitem(globals(), name, {"FusedAdamW": AdamW, "FusedSGD": SGD}[name])
    bench = Bench()
    with pytest.raises(kind) as torchs:
        attempt(bench)
    monkeypatch.undo()
    with pytest.raises(kind) as ours:
        attempt(Bench())
    assert str(ours.value).startswith(str(torchs.value))


def test_a_group_value_that_becomes_zero_is_named_at_the_step() -> None:
    bench = Bench()
    limit = torch.tensor(1.0)
    optimizer = FusedAdamW(bench.params, max_grad_norm=limit)
    optimizer.step()
    before = contents(optimizer)
    limit.zero_()
    with pytest.raises(ValueError, match=OFF):
        optimizer.step()
    assert_same(contents(optimizer), before)


def test_zero_stays_what_it_is_in_torchs_functions() -> None:
    bench = Bench()
    fusedopt.clip_grad_norm_(bench.params, 0.0)
    assert all(not p.grad.any() for p in bench.params)  # type: ignore[union-attr]
    fusedopt.clip_grad_value_(bench.params, 0)


def test_what_torch_takes_is_taken() -> None:
    bench = Bench()
    model = bench.model
    for params in (
        nn.ParameterList(bench.params),
        dict(model.named_parameters()).values(),
        iter(bench.params),
        filter(lambda p: p.ndim > 1, model.parameters()),
        model.named_parameters(),
        tuple(bench.params),
        [{"params": filter(None, [])}, {"params": bench.params[0]}, {"params": []}],
        [{"params": nn.ParameterList(bench.params[:2])}, {"params": iter(())}],
    ):
        FusedAdamW(params)  # type: ignore[arg-type]
    fusedopt.clip_grad_norm_(nn.ParameterList(bench.params), torch.tensor(1.0))
    fusedopt.clip_grad_norm_(bench.params[0], "2.0", "inf")  # type: ignore[arg-type]
    bench.fused.load_state_dict(OrderedDict(bench.saved))


def test_a_used_generator_clips_nothing_and_says_so() -> None:
    bench = Bench()
    for clip in (fusedopt.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        with pytest.warns(UserWarning, match="empty generator, no gradient clipping") as caught:
            clip(bench.used, 1.0)
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"call model\.parameters\(\) again") as caught:
        fusedopt.clip_grad_value_(bench.used, 1.0)
    assert caught[0].filename == __file__


def test_a_hook_may_unpack_the_checkpoint() -> None:
    bench = Bench()
    bench.fused.register_load_state_dict_pre_hook(lambda _, given: given["optimizer"])
    saved = bench.saved
    bench.fused.load_state_dict({"model": {}, "optimizer": saved})
    assert_same(bench.saved["state"], saved["state"])


def test_grad_norm_where_it_is_asked_for() -> None:
    bench = Bench()
    for options in ({"max_grad_norm": 1.0}, {"max_grad_norm": float("inf")},
                    {"skip_nonfinite": True}):  # fmt: skip
        optimizer = FusedSGD(bench.params, lr=0.1, **options)  # type: ignore[arg-type]
        assert optimizer.grad_norm is None
        optimizer.step()
        norm = optimizer.grad_norm
        assert norm is not None
        optimizer.max_grad_norm, optimizer.skip_nonfinite = None, False
        assert optimizer.grad_norm is norm  # that of the last step that measured it
    for options in ({}, {"clip_grad_value": 1.0}):
        optimizer = FusedSGD(bench.params, lr=0.1, **options)  # type: ignore[arg-type]
        for _ in range(2):
            assert getattr(optimizer, "grad_norm", None) is None
            assert not hasattr(optimizer, "grad_norm")
            assert "grad_norm" not in dict(inspect.getmembers(optimizer))
            optimizer.step()


class Wrapper:
    """As Lightning's and Fabric's: of a subclass of the optimizer's class, it hands on what it does
    not find."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def wrappers() -> list[Callable[[Any], Any]]:
    found: list[Callable[[Any], Any]] = [Wrapper]
    try:
        from lightning.fabric.wrappers import _FabricOptimizer
        from lightning.pytorch.core.optimizer import LightningOptimizer
    except ImportError:
        return found
    return [*found, lambda o: _FabricOptimizer(o, None), LightningOptimizer]


@pytest.mark.parametrize("wrap", wrappers())
def test_a_wrapper_hands_the_message_on(wrap: Callable[[Any], Any]) -> None:
    bench = Bench()
    for optimizer in (bench.fused, wrap(bench.fused)):
        with pytest.raises(AttributeError, match=re.escape("write max_grad_norm=1.0, to clip")):
            _ = optimizer.grad_norm
        assert getattr(optimizer, "grad_norm", None) is None
