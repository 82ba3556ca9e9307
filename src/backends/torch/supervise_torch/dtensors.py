"""Tensors that are shared out among processes (``DTensor``): which box of the whole this process has, and new ones.

Nothing here talks to other processes. Nothing of ``torch.distributed`` is imported before the program has done so.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import torch

from supervise_core.boxes import Box, boxed
from supervise_core.tagged_json import Json

PLAIN_TYPES: Final = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""Of tensors that have their values here, and do as PyTorch does."""


def are_dtensors_used() -> bool:
    """Whether the program can have any: they belong to a mesh, and that to process groups.

    That their module was imported says nothing. PyTorch itself does it when the first optimizer is made.
    """
    return "torch.distributed.tensor" in sys.modules and torch.distributed.is_initialized()


def is_dtensor(value: Any) -> bool:
    """Whether a value is a tensor of which each process of a mesh has a part, or a copy."""
    if type(value) in PLAIN_TYPES:
        return False  # nearly all of them, and this is asked for each several times
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_shared_out(value: Any) -> bool:
    """Whether each process has only a piece of it. They all give the same answer."""
    return is_dtensor(value) and any(
        not placement.is_replicate() and side > 1
        for placement, side in zip(value.placements, value.device_mesh.shape, strict=True)
    )


def own_of(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor is in this process: its piece, or its copy, or all there is."""
    if not is_dtensor(tensor):
        return tensor
    local: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return local


def layout_of(tensor: Any) -> Hashable:
    """The same for tensors of one shape that are shared out in the same way."""
    return tuple(tensor.shape), tensor.placements


def describe_piece(tensor: Any) -> dict[str, Json]:
    """What a checkpoint is to know of a piece beside the piece itself; nothing if it is all there is.

    :raises TypeError: if it is no box; says what it is.
    """
    box = box_of(tuple(tensor.shape), tensor.device_mesh, tensor.placements)
    if box.shape != tuple(own_of(tensor).shape):
        raise TypeError(
            f"its piece here has the shape {tuple(own_of(tensor).shape)}, and {box.shape} is what {tensor.placements} "
            f"of {tuple(tensor.shape)} give; make it by distribute_tensor or fully_shard"
        )
    return {} if box.shape == tuple(tensor.shape) else boxed(tensor.shape, box.at)


@functools.lru_cache(maxsize=4096)  # a snapshot asks for each tensor of the model, and the answers stay the same
def box_of(whole: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Box:
    """The box of a tensor of that shape that this process has.

    :raises TypeError: if it is none, or the process is not of that mesh.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise TypeError("this process does not take part in its mesh")
    cuts: list[tuple[int, int, int]] = []
    strided: list[tuple[int, int, int]] = []
    for placement, place, count in zip(placements, coordinate, mesh.shape, strict=True):
        if type(placement).__name__ == "_StridedShard":  # cut after those that stand behind it
            strided.append((placement.dim, place, count))
        elif placement.is_shard():
            cuts.append((placement.dim, place, count))
        elif not placement.is_replicate():
            raise TypeError(f"it is placed as {placement}, which is neither a shard nor a copy of the whole")
    box = cut_out(whole, [*cuts, *reversed(strided)])
    if strided:
        _check_strided(whole, mesh, placements, box)
    return box


def cut_out(whole: Sequence[int], cuts: Sequence[tuple[int, int, int]]) -> Box:
    """What is left of a whole after cuts along dimensions: each into so many equal pieces, of which the last ones may
    be smaller or empty, and of which the one at that place is kept. A cut is ``(dimension, place, count)``."""
    at, shape = [0] * len(whole), list(whole)
    for dimension, place, count in cuts:
        piece = math.ceil(shape[dimension] / count)
        begin = min(place * piece, shape[dimension])
        at[dimension] += begin
        shape[dimension] = min(piece, shape[dimension] - begin)
    return Box(tuple(at), tuple(shape))


def _check_strided(whole: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], box: Box) -> None:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, at = compute_local_shape_and_global_offset(whole, mesh, placements)
    if tuple(shape) != box.shape or (box.size and tuple(at) != box.at):
        raise TypeError(f"it is placed as {placements}, which is no box where {whole} is not divisible by the mesh")


def new_like(tensor: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor shared out as another one is, its values undefined."""
    local = own_of(tensor)
    return type(tensor).from_local(
        torch.empty_like(local, dtype=dtype, requires_grad=False),
        tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def shards_like(state: Any) -> Any:
    """The tree of a state with new tensors in place of those that are shared out, and without its other leaves."""
    if is_dtensor(state):
        return new_like(state)
    if isinstance(state, Mapping):
        return {key: kept for key, item in state.items() if (kept := shards_like(item)) is not None}
    if isinstance(state, (list, tuple)):
        return type(state)(shards_like(item) for item in state) if type(state) in (list, tuple) else None
    return None


def shards_of_state(optimizer: torch.optim.Optimizer, saved: Any, present: Any) -> dict[str, Any]:
    """Where to restore the state of an optimizer to: what is there already (``present``), and for what else has a
    parameter's shape (``saved``) new tensors that are shared out as the parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    there = {} if present is None else present["state"]
    return {
        "state": {
            number: _shards_for(parameter, saved["state"].get(number)) | dict(there.get(number, {}))
            for number, parameter in zip(numbers, parameters, strict=False)
        }
    }


def _shards_for(parameter: torch.Tensor, entry: Any) -> dict[str, Any]:
    if not is_dtensor(parameter) or not isinstance(entry, Mapping):
        return {}
    return {
        name: new_like(parameter, value.dtype)
        for name, value in entry.items()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
    }
