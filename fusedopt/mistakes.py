"""What is often passed where something else is meant: messages that say what to write instead.

Where torch.optim raises for the same mistake, its exception type and its words come first.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import Optimizer

from fusedopt.callers import callers_level

PARAMS = "model.parameters()"


def named(value: Any) -> str:
    """A wrong value in a message: by its class where its text would be long."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (bool, int, float, str, bytes, os.PathLike)):
        return repr(value)
    article = "an" if type(value).__name__[0] in "AEIOaeio" else "a"
    return f"{article} {type(value).__name__}"


# Params of an optimizer, and tensors to clip.


def _is_iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _is_list_of_params(model: Any) -> bool:
    """As torch.nn.ParameterList, and not torch.nn.Sequential."""
    return _is_iterable(model) and all(isinstance(item, (Tensor, dict, tuple)) for item in model)


def _refuse_container(what: str, expected: str, value: Any, of_model: str = PARAMS) -> None:
    """Raises TypeError for what holds no tensors, or as something else than `what` must be.

    Args:
        expected: what `what` must be.
        of_model: what to write instead of a model.
    """
    if isinstance(value, (list, tuple)):  # most often
        return
    if isinstance(value, (str, bytes, os.PathLike)):
        hint = of_model
    elif isinstance(value, Module):
        if _is_list_of_params(value):
            return
        hint = of_model
    elif isinstance(value, Mapping):
        trained = all(getattr(item, "requires_grad", False) for item in value.values())
        hint = "its values()" if trained else of_model  # those of a state_dict are no params
        if "params" in value:
            hint = "a list of groups, [group]"
    elif _is_iterable(value):
        return
    elif isinstance(value, Optimizer):
        hint = "[p for group in optimizer.param_groups for p in group['params']]"
    elif isinstance(value, type) and issubclass(value, Module):
        hint = f"{of_model} of an instance, model = {value.__name__}(...)"
    elif inspect.isroutine(value):
        hint = f"what it returns: {value.__name__}(), with parentheses"
    else:
        hint = of_model
    raise TypeError(f"{what} must be {expected}, got {named(value)}; pass {hint}")


def is_used_up(value: Any) -> bool:
    """Whether a generator has nothing left: it was walked before."""
    return inspect.isgenerator(value) and inspect.getgeneratorstate(value) == inspect.GEN_CLOSED


_USED_UP = "is a generator that was used before, and has nothing left; call model.parameters() "
_USED_UP += "again, or keep a list: params = list(model.parameters())"


def param_list(params: Any) -> list[Any]:
    """The items of the `params` that an optimizer is constructed with.

    Raises:
        TypeError: for what is no iterable of tensors or groups.
        ValueError: where there are none.
    """
    _refuse_container("params", "an iterable of tensors or of param groups", params)
    used_up = is_used_up(params)
    items = list(params)
    if items:
        return items
    why = ""
    if used_up:
        why = f": params {_USED_UP}"
    elif hasattr(params, "__next__"):
        why = ": the iterator gave none; the model has no params, or they were filtered out"
    raise ValueError(f"optimizer got an empty parameter list{why}")


def check_group(group: Any, index: int) -> None:
    """Raises for what cannot be a param group, the one at `index`.

    Raises:
        TypeError: for what is no dict; for "params" that are no tensor and no iterable of them.
        KeyError: without "params".
        ValueError: for a generator that was used up.
    """
    if not isinstance(group, dict):
        raise TypeError(
            f"param_group must be a dict, but got {type(group)}; groups look like "
            f'{{"params": {PARAMS}, "lr": 0.1}}'
        )
    if "params" not in group:
        raise KeyError(f"param_groups[{index}] has no 'params', the tensors of the group")
    params = group["params"]
    if isinstance(params, Tensor):
        return
    where = f'param_groups[{index}]["params"]'
    _refuse_container(where, "a tensor or an iterable of tensors", params)
    if is_used_up(params):
        raise ValueError(f"{where} {_USED_UP}")


def item_hint(items: Iterable[Any]) -> str:
    """What to write where one of the items is no tensor, after a semicolon, or ""."""
    wrong = [item for item in items if not isinstance(item, Tensor)][:1]
    return _hint_of_item(wrong[0]) if wrong else ""


def _hint_of_item(wrong: Any) -> str:
    if wrong is None:
        return "; leave out what is None"
    if isinstance(wrong, Module):
        return "; pass its parameters(): [p for m in modules for p in m.parameters()]"
    if isinstance(wrong, tuple) and len(wrong) == 2 and isinstance(wrong[1], Tensor):
        return f"; pass {PARAMS}, without the names"
    if isinstance(wrong, dict):
        return "; of a group, pass group['params']"
    if isinstance(wrong, str):
        return "; pass tensors, or pairs of a name and a tensor in this order"
    if isinstance(wrong, Iterable) and not hasattr(wrong, "dtype"):
        return '; pass one flat list, [*first, *second], or groups: [{"params": first}, ...]'
    return ""


def tensors_of(what: str, given: Any, of_model: str = PARAMS) -> list[Any]:
    """The tensors that a function of clipping is given, one or an iterable of them.

    Args:
        of_model: what to write instead of a model.

    Raises:
        TypeError: for what is no iterable.
    """
    if isinstance(given, Tensor):
        return [given]
    _refuse_container(what, "a tensor or an iterable of tensors", given, of_model)
    items = list(given)
    if not items and inspect.isgenerator(given):
        warnings.warn(
            f"`{what}` is an empty generator, no gradient clipping will occur. One that was used "
            f"before is empty: call {PARAMS} again",
            stacklevel=callers_level(),
        )
    return items


def no_tensor(what: str, items: list[Any], error: Exception) -> Exception:
    """`error`, with what to write where one of the items is no tensor."""
    if all(isinstance(item, Tensor) for item in items):
        return error
    return type(error)(f"{error}: each of {what} must be a tensor{item_hint(items)}")


def number(name: str, value: Any, least: float = -math.inf, none: str = "") -> float:
    """The number `value`, read now where it is a tensor, as torch's functions of clipping read it.

    Args:
        none: what to write instead of None.

    Raises:
        TypeError: for what is no number.
        ValueError: for a text that is none, NaN or a number below `least`.
        RuntimeError: for a tensor of several elements.
    """
    bound = f"a number >= {least:g}" if least > -math.inf else "a number"
    try:
        result = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        hint = f"; {none}" if value is None and none else ""
        raise type(error)(f"{name} must be {bound}, got {named(value)}{hint}") from None
    if not result >= least:
        raise ValueError(f"{name} must be {bound}, got {result}")
    return result


# Other arguments.


def check_process_group(value: Any) -> None:
    """Raises TypeError for what is no process group of torch.distributed; None is right."""
    if value is None or not torch.distributed.is_available():
        return
    distributed: Any = torch.distributed
    if isinstance(value, distributed.ProcessGroup):
        return
    not_in = distributed.GroupMember.NON_GROUP_MEMBER  # what new_group() gives to other ranks
    hint = ""
    if hasattr(value, "get_group"):  # a DeviceMesh
        hint = "mesh.get_group()"
    elif type(value) is type(not_in) and value == not_in:
        hint = "None on ranks that are not in the group, or a group that they are in"
    elif isinstance(value, (list, tuple, set, range)):
        hint = "what torch.distributed.new_group(ranks) gives"
    elif isinstance(value, (str, bytes)) or value is distributed or value is distributed.group:
        hint = "torch.distributed.group.WORLD for all ranks"
    elif isinstance(value, (int, float)):
        hint = "what torch.distributed.new_group(ranks) gives, or torch.distributed.group.WORLD"
    raise TypeError(
        f"process_group must be a torch.distributed.ProcessGroup or None, got {named(value)}"
        + (f"; pass {hint}" if hint else "")
    )


def check_closure(closure: Any) -> None:
    """Raises TypeError for what step() cannot call."""
    if callable(closure):
        return
    hint = "write optimizer.step(), which takes nothing else"
    if isinstance(closure, Tensor):
        hint = "for a loss, write loss.backward() and then optimizer.step()"
    raise TypeError(
        f"closure must be a function that returns the loss, got {named(closure)}; {hint}"
    )


def check_option_names(given: Iterable[str], known: list[str], cls: str) -> None:
    """Raises TypeError for an option that the class `cls` has not."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known[1:])}"
            raise TypeError(f"{cls} has no option {name!r}{hint}")


def hint_for_fuse(given: Any) -> str:
    """What to write where fuse() is given no optimizer of torch.optim that it takes."""
    if isinstance(given, type) and issubclass(given, Optimizer):
        return f"; fuse() takes an instance: fuse({given.__name__}({PARAMS}))"
    if hasattr(given, "backend_in_use"):
        return ", which is fused: its options are attributes"
    if isinstance(getattr(given, "optimizer", None), Optimizer):  # a scheduler, or a wrapper
        return "; pass the optimizer that it holds, its attribute `optimizer`"
    if isinstance(given, Module) or inspect.isgenerator(given):
        return f"; build the fused optimizer itself: fusedopt.FusedAdamW({PARAMS})"
    return ""
