"""The state that an optimizer will make in its first step, known before that step."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from typing import Any, Final

import torch

from supervise_torch.dtensors import PLAIN_TYPES
from supervise_torch.in_place import is_plain_optimizer

_log = logging.getLogger(__name__)

_PLAINLY: Final = {"foreach": False, "fused": None, "capturable": False}
"""The ways of a step that the meta device does not know; none of them makes another state."""

_Kind = tuple[torch.Size, torch.dtype, tuple[int, ...]]


def foreseen_state(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """What its ``state_dict`` will be after the first step, if every parameter that can have a gradient has one then.

    Its tensors are on the meta device, where they have shapes and no values. None where that is not known: there is a
    state already, the step is not PyTorch's own, or cannot be made without values.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if optimizer.state or not is_plain_optimizer(optimizer):
        return None
    if not type(optimizer).step.__module__.startswith("torch.optim."):
        return None  # trying a step of the program's own on something else could do anything
    if any(type(parameter) not in PLAIN_TYPES or torch.nn.parameter.is_lazy(parameter) for parameter in parameters):
        return None
    try:
        by_group = [_states_after_a_step(optimizer, group) for group in optimizer.param_groups]
    except Exception as error:  # whatever a step without values ends with: nothing depends on it
        _log.debug("the state that %s makes in its first step is not foreseen: %s", type(optimizer).__name__, error)
        return None
    state = optimizer.state_dict()
    for group, packed, states in zip(optimizer.param_groups, state["param_groups"], by_group, strict=True):
        for number, parameter in zip(packed["params"], group["params"], strict=True):
            if parameter.requires_grad and (made := states[_kind_of(parameter)]):
                state["state"][number] = made
    return state


def _states_after_a_step(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[_Kind, dict[str, Any]]:
    """What the step makes for parameters of each shape, found by a step of a double that has one of each."""
    doubles: dict[_Kind, torch.nn.Parameter] = {}
    for parameter in group["params"]:
        if parameter.requires_grad and _kind_of(parameter) not in doubles:
            double = torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
            double.grad = torch.empty_like(double)
            doubles[_kind_of(parameter)] = double
    stand_in: Any = object.__new__(type(optimizer))
    stand_in.__dict__.update(optimizer.__dict__)
    stand_in.param_groups = [{**group, "params": list(doubles.values()), **_PLAINLY}]
    stand_in.state = defaultdict(dict)
    step: Any = inspect.unwrap(type(optimizer).step)  # without what calls the hooks
    with torch.no_grad():
        step(stand_in)
    return {kind: _without_values(stand_in.state.get(double, {})) for kind, double in doubles.items()}


def _without_values(state: dict[str, Any]) -> dict[str, Any]:
    """The counts of steps have some. As the same ones stand for many parameters, they would look tied."""
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def _kind_of(parameter: torch.Tensor) -> _Kind:
    return parameter.shape, parameter.dtype, parameter.stride()
