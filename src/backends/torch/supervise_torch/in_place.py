"""Loading what was saved into the very tensors that the program has, with as few copies and calls as that takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch.nn.parameter import is_lazy

from supervise_core.data_source import is_stateful
from supervise_torch.dtensors import are_dtensors_used, own_of, shards_like

_PLAIN_VALUES: Final = frozenset({int, float, bool, type(None)})


def present(part: Any) -> Any:
    """The state to be overwritten in place: that of which a load by ``load_state_dict`` would make the same.

    What loads in a way of its own may take only some of what was saved, or compare it with what is there; it gets
    tensors of their own. Of a module it is the parameters themselves: ``load_state_dict`` then copies each onto itself,
    which costs nothing.
    """
    if isinstance(part, torch.nn.Module):
        if not are_dtensors_used():
            return dict(_plainly_loaded(part))
        here = part.state_dict()  # which has FSDP go back to the shards that it keeps its parameters in
        plain = dict(_plainly_loaded(part))
        return shards_like({name: tensor for name, tensor in here.items() if name not in plain}) | plain
    if not isinstance(part, torch.optim.Optimizer):
        return shards_like(part.state_dict()) if are_dtensors_used() and is_stateful(part) else None
    if not is_plain_optimizer(part):
        return None
    taken = {_storage_of(parameter) for parameter in parameters_of(part)}
    state = part.state_dict()["state"].items()
    return {
        "state": {key: entry for key, entry in state if not any(_storage_of(t) in taken for t in tensors_in(entry))}
    }


def _plainly_loaded(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """By their names in the state, in its order; nothing of modules, and of those in them, with a load of their own."""
    if not _is_plain_module(module):
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module._modules.items():
        if child is not None:
            yield from _plainly_loaded(child, f"{prefix}{name}.")


def _is_plain_module(module: torch.nn.Module) -> bool:
    """Whether its state, without that of the modules in it, is loaded as PyTorch's own modules do it."""
    kind, plain = type(module), torch.nn.Module
    if kind.state_dict is not plain.state_dict or kind.load_state_dict is not plain.load_state_dict:
        return False
    for method in (kind._save_to_state_dict, kind._load_from_state_dict):
        if not method.__module__.startswith("torch.nn.modules."):
            return False
    hooks = (module._state_dict_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks)
    return all(_is_of_fsdp(hook) for kind_of_hook in hooks for hook in kind_of_hook.values())


def _is_of_fsdp(hook: Any) -> bool:
    """Whether a hook is one by which ``fully_shard`` goes back to its shards, and that changes no state."""
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp._fully_shard.")


def is_plain_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its state is given and loaded as PyTorch's own optimizers do it."""
    kind, plain = type(optimizer), torch.optim.Optimizer
    return (
        kind.state_dict is plain.state_dict
        and kind.load_state_dict is plain.load_state_dict
        and not optimizer._optimizer_state_dict_post_hooks
        and not optimizer._optimizer_load_state_dict_pre_hooks
    )


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Of all its groups, in their order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All that a tree of state holds."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _storage_of(tensor: torch.Tensor) -> int:
    tensor = own_of(tensor)
    return 0 if is_lazy(tensor) or tensor.layout is not torch.strided else tensor.untyped_storage().data_ptr()


def is_all_there(part: Any, saved: Any) -> bool:
    """Whether the tensors of what was saved are the part's own ones, all of them, and loading does nothing else."""
    if are_dtensors_used():
        return False
    if isinstance(part, torch.nn.Module):
        return _is_module_there(part, saved)
    return isinstance(part, torch.optim.Optimizer) and _is_optimizer_there(part, saved)


def _is_module_there(module: torch.nn.Module, saved: Mapping[str, Any]) -> bool:
    own = dict(_plainly_loaded(module))
    return (
        own.keys() == saved.keys()
        and all(saved[name] is tensor for name, tensor in own.items())
        and all(_is_plain_module(each) and not each._load_state_dict_post_hooks for each in module.modules())
    )


def _is_optimizer_there(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> bool:
    if not is_plain_optimizer(optimizer) or optimizer._optimizer_load_state_dict_post_hooks:
        return False
    parameters = parameters_of(optimizer)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = saved["state"]
    if len(numbers) != len(parameters) or len(state) != len(optimizer.state) or not state.keys() <= set(numbers):
        return False
    for number, parameter in zip(numbers, parameters, strict=True):
        here, there = optimizer.state.get(parameter), state.get(number)
        if here is None or there is None:
            if here is not there:
                return False
        elif here.keys() != there.keys() or any(
            there[name] is not value if isinstance(value, torch.Tensor) else type(value) not in _PLAIN_VALUES
            for name, value in here.items()
        ):
            return False
    return True


def load_into(part: Any, saved: Any, *, is_all_there: bool = False) -> None:
    """Have a part take what was saved; of tensors that are its own ones and were read in place, it has the values."""
    if isinstance(part, torch.Generator):
        part.set_state(saved["state"])
    elif not is_all_there:
        part.load_state_dict(saved)
    elif isinstance(part, torch.optim.Optimizer):
        _load_all_but_tensors(part, saved)


def _load_all_but_tensors(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    of_parameter = dict(zip(parameters_of(optimizer), numbers, strict=True))
    state = {parameter: saved["state"][of_parameter[parameter]] for parameter in optimizer.state}
    optimizer.load_state_dict({**saved, "state": {}})
    optimizer.state.update(state)
