"""Whether saved state fits the program's objects, found out before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from supervise_core.errors import IncompatibleCheckpointError
from supervise_core.parts import Parts


def check_parts(wanted: Iterable[str], parts: Parts) -> None:
    """:raises IncompatibleCheckpointError: if a part is missing, or one is there that the program does not have."""
    names = list(wanted)
    for name in names:
        if name not in parts:
            raise IncompatibleCheckpointError(name, [f"it is missing; the checkpoint has {sorted(parts)}"])
    for name in parts:
        if name not in names:
            raise IncompatibleCheckpointError(name, [f"it is in the checkpoint, and the program has only {names}"])


def check_module(part: str, module: torch.nn.Module, saved: Mapping[str, Any]) -> None:
    """:raises IncompatibleCheckpointError: naming every tensor that is missing, unexpected, or of another kind."""
    here = module.state_dict()
    differences = [f"{name!r} is missing" for name in here if name not in saved]
    differences += [f"{name!r} is unexpected" for name in saved if name not in here]
    for name in (name for name in here if name in saved):
        mine, theirs = here[name], saved[name]
        if is_lazy(mine) or not isinstance(mine, torch.Tensor):
            continue
        if not isinstance(theirs, torch.Tensor):
            differences.append(f"{name!r} is no tensor there")
        elif mine.shape != theirs.shape:
            differences.append(f"{name!r} has shape {tuple(theirs.shape)} there and {tuple(mine.shape)} here")
        elif mine.dtype != theirs.dtype:
            differences.append(f"{name!r} has dtype {theirs.dtype} there and {mine.dtype} here")
    if differences:
        raise IncompatibleCheckpointError(part, differences)


def check_optimizer(part: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """:raises IncompatibleCheckpointError: if the groups differ in their sizes, or a state is not of its parameter."""
    here = [len(group["params"]) for group in optimizer.param_groups]
    if not isinstance(saved, Mapping) or not {"param_groups", "state"} <= saved.keys():
        raise IncompatibleCheckpointError(part, ["it was no optimizer when it was saved"])
    there = [len(group["params"]) for group in saved["param_groups"]]
    if here != there:
        raise IncompatibleCheckpointError(part, [f"its groups have {there} parameters there and {here} here"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    differences = [
        f"{name!r} of parameter {number} has shape {tuple(value.shape)}, and the parameter {tuple(parameter.shape)}"
        for number, parameter in zip(numbers, parameters, strict=True)
        if not is_lazy(parameter)
        for name, value in saved["state"].get(number, {}).items()
        if name in ("exp_avg", "exp_avg_sq", "momentum_buffer", "max_exp_avg_sq", "square_avg")
        and isinstance(value, torch.Tensor)
        and value.shape != parameter.shape
    ]
    if differences:
        raise IncompatibleCheckpointError(part, differences)
