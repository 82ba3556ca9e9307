"""Which box of a ``DTensor`` a process has, and how a checkpoint describes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no DTensor")

import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard  # noqa: E402
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset  # noqa: E402

from supervise_core import UnsupportedStateError  # noqa: E402
from supervise_core.staging import Staging  # noqa: E402
from supervise_torch import TorchBackend, TorchCodec  # noqa: E402
from supervise_torch.dtensors import cut_out, is_dtensor, is_shared_out, new_like, own_of, shards_like  # noqa: E402
from supervise_torch.in_place import present as present_of  # noqa: E402


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of 2 by 2 as its last process sees it; the others do not exist, and nothing may wait for them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=3, world_size=4, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2, 2))
    finally:
        dist.destroy_process_group()


def piece(mesh: Any, whole: tuple[int, ...], local: tuple[int, ...], *placements: Any) -> Any:
    stride = torch.empty(whole).stride()
    return DTensor.from_local(torch.ones(local), mesh, placements, run_check=False, shape=whole, stride=stride)


@settings(deadline=None)
@given(st.data())
def test_cuts_are_those_of_torch(data: Any) -> None:
    whole = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    sides = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    place = [data.draw(st.integers(0, side - 1)) for side in sides]
    dimensions = [data.draw(st.none() | st.integers(0, len(whole) - 1)) for _ in sides]
    placements = [Replicate() if dimension is None else Shard(dimension) for dimension in dimensions]
    shape, at = _compute_local_shape_and_global_offset(whole, sides, place, placements)
    cuts = [cut for cut in zip(dimensions, place, sides, strict=True) if cut[0] is not None]
    box = cut_out(whole, cuts)  # type: ignore[arg-type]
    assert box.shape == tuple(shape)
    if box.size:
        assert box.at == tuple(at)


def test_a_piece_is_described_with_its_place(mesh: Any) -> None:
    codec = TorchCodec()
    described = codec.describe(piece(mesh, (5, 6), (2, 3), Shard(0), Shard(1)))
    assert described[:3] == ("F32", (2, 3), {"box": {"of": [5, 6], "at": [3, 3]}})
    described = codec.describe(piece(mesh, (5, 6), (2, 6), Replicate(), Shard(0)))
    assert described[:3] == ("F32", (2, 6), {"box": {"of": [5, 6], "at": [3, 0]}})
    described = codec.describe(piece(mesh, (1, 6), (0, 6), Replicate(), Shard(0)))
    assert described[:3] == ("F32", (0, 6), {"box": {"of": [1, 6], "at": [1, 0]}})
    assert codec.describe(piece(mesh, (5, 6), (5, 6), Replicate(), Replicate()))[:3] == ("F32", (5, 6), {})


def test_what_is_no_box_is_refused(mesh: Any) -> None:
    staging = Staging()
    with pytest.raises(UnsupportedStateError, match="neither a shard nor a copy"):
        staging.put("model", {"w": piece(mesh, (4,), (4,), Partial(), Replicate())}, TorchCodec(), per_rank=True)
    uneven = DTensor.from_local(torch.ones(3), mesh, (Replicate(), Shard(0)), run_check=False, shape=(4,), stride=(1,))
    with pytest.raises(UnsupportedStateError, match="distribute_tensor or fully_shard"):
        staging.put("model", {"w": uneven}, TorchCodec(), per_rank=True)


def test_who_has_only_a_piece(mesh: Any) -> None:
    assert is_shared_out(piece(mesh, (4,), (2,), Replicate(), Shard(0)))
    assert not is_shared_out(piece(mesh, (4,), (4,), Replicate(), Replicate()))
    assert not is_shared_out(torch.ones(4))
    row = init_device_mesh("cpu", (4, 1))
    assert not is_shared_out(piece(row, (4,), (4,), Replicate(), Shard(0)))


def test_new_ones_are_shared_out_in_the_same_way(mesh: Any) -> None:
    old = piece(mesh, (5, 6), (2, 3), Shard(0), Shard(1))
    new = new_like(old, torch.float64)
    assert (new.shape, new.placements, new.dtype) == (old.shape, old.placements, torch.float64)
    assert own_of(new).shape == (2, 3)
    assert own_of(new).data_ptr() != own_of(old).data_ptr()
    assert list(shards_like({"a": old, "b": 1, "c": {"d": [torch.ones(1), old]}})) == ["a", "c"]


def test_what_fully_shard_keeps_is_restored_in_place(mesh: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7))
    fully_shard(module, mesh=init_device_mesh("cpu", (4,)))
    with torch.no_grad():
        module(torch.ones(2, 5))  # after which the parameters are whole, for a while
    present = present_of(module)
    assert list(present) == list(module.state_dict())
    for name, parameter in module.named_parameters():
        assert own_of(present[name]).data_ptr() == own_of(parameter).data_ptr()
        assert is_dtensor(parameter)


def test_what_loads_in_a_way_of_its_own_gets_shards_of_its_own(mesh: Any) -> None:
    module = torch.nn.Linear(5, 7)
    fully_shard(module, mesh=init_device_mesh("cpu", (4,)))
    module.register_state_dict_post_hook(lambda *_: None)
    present = present_of(module)
    assert present["weight"].placements == module.weight.placements
    assert own_of(present["weight"]).data_ptr() != own_of(module.weight).data_ptr()


def test_a_model_on_the_meta_device_is_not_made_by_one_rank_alone(mesh: Any) -> None:
    module = torch.nn.Linear(4, 4, device="meta")
    local = torch.empty(2, 4, device="meta")
    module.weight = torch.nn.Parameter(
        DTensor.from_local(local, mesh, (Replicate(), Shard(0)), run_check=False, shape=(4, 4), stride=(4, 1))
    )
    backend = TorchBackend(model=module)
    session = backend.create_session()
    backend.init(session)
    assert "model.weight (on the meta device and shared out" in str(backend.ready(session))
    backend.close_session(session)
