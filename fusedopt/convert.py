"""convert_state_dict(): checkpoints of other libraries' optimizers, in torch.optim's layout."""

from __future__ import annotations

from typing import Any

from fusedopt import foreign

# bitsandbytes' names of the moments.
_RENAMED = {"state1": "exp_avg", "state2": "exp_avg_sq"}


def convert_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of another library's Adam, AdamW or SGD as `load_state_dict` takes it.

    Takes the layouts of apex (FusedAdam, FusedSGD: one step count a group), of DeepSpeed's
    FusedAdam, and of bitsandbytes with 32-bit moments; one of torch.optim is returned as it is.
    Whether weight decay was decoupled is in none of them: choose FusedAdamW or FusedAdam by how the
    other optimizer was built.

    Args:
        state_dict: what the other optimizer's state_dict() gave. It is not changed; tensors are
            shared with the result.

    Returns:
        The same in the layout of torch.optim, for `load_state_dict`.

    Raises:
        ValueError: moments in 8 bits or with scales, or a group without bias correction: no
            optimizer of fusedopt goes on from them; a dict that is no optimizer's state_dict.
        TypeError: for what is no dict.
    """
    foreign.check_state_dict(state_dict, "convert_state_dict")
    groups, state = [], dict(state_dict["state"])
    for index, saved in enumerate(state_dict["param_groups"]):
        group = dict(saved)
        step = group.pop("step", None)
        if not group.pop("bias_correction", True):
            raise ValueError(f"param_groups[{index}] was trained with bias_correction=False")
        for key in group["params"]:
            entry = state.get(key)
            if isinstance(entry, dict):
                state[key] = _convert_entry(entry, step, f"state[{key!r}]")
        groups.append(group)
    return {**state_dict, "state": state, "param_groups": groups}


def _convert_entry(entry: dict[str, Any], group_step: Any, where: str) -> dict[str, Any]:
    for key in ("absmax1", "qmap1", "__bnb_optimizer_quant_state__"):
        if key in entry:
            raise ValueError(f"{where} holds quantised moments ({key}), expected 32-bit ones")
    converted = {}
    for key, value in entry.items():
        if key in _RENAMED:
            converted[_RENAMED[key]] = value
        elif key not in ("unorm_vec", "gnorm_vec"):  # bitsandbytes' clipping
            converted[key] = value
    # SGD has no step count; an Adam that counts steps in its group has none here.
    if group_step is not None and "exp_avg" in converted:
        converted.setdefault("step", group_step)
    return converted
