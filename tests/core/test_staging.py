"""The memory of snapshots: what is copied, what is found unchanged, and when copies from a device are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervise_core import memory
from supervise_core import staging as staging_module
from supervise_core.checkpoint_files import read_checkpoint
from supervise_core.checkpoint_format import Base, CheckpointId
from supervise_core.disk import BLOCK
from supervise_core.hashing import digest_of
from supervise_core.manifest import Manifest
from supervise_core.memory import Move, address_of, bring_up_to_date, in_blocks, own_memory, view_at
from supervise_core.safetensors_format import parse
from supervise_core.snapshot import PartImage, Snapshot
from supervise_core.snapshot_files import write_snapshot
from supervise_core.staging import NoStaging, Outline, Staging
from supervise_core.tagged_json import Json
from supervise_core.tensors import Arrival, Stored, StoredTensor, TensorCodec
from supervise_core.testing.stores import MemoryStore


def take(staging: Staging, state: Any, codec: TensorCodec[Any] | None = None, *, hashed: bool = False) -> PartImage:
    """A snapshot of one part, finished; and hashed, as the writer does it, also what is too small for that."""
    staging.put("model", state, codec)
    snapshot = staging.snapshot()
    snapshot.finish()
    image = snapshot.parts["model"]
    if hashed:
        image.digests.update({name: digest_of(memoryview(content)) for name, content in contents(image).items()})
    return image


def contents(image: PartImage) -> dict[str, bytes]:
    """What is in the files to be, by the names of the tensors."""
    return {
        name: bytes(data)
        for file in image.files
        for name, (_, data) in parse(b"".join(bytes(chunk) for chunk in file.chunks())).items()
    }


def changed(image: PartImage, since: PartImage) -> set[str]:
    """The tensors that changed after an older snapshot, as far as the memory knows."""
    return {name for name, number in image.changed_at.items() if number > since.number}


def begin_of(image: PartImage) -> list[int]:
    return [address_of(file.blocks) for file in image.files if file.blocks is not None]


# ---- what changed


def test_what_changed_since_the_one_before() -> None:
    staging, state = Staging(), {"a": np.arange(10.0), "b": np.arange(10.0), "c": np.arange(10.0)}
    first = take(staging, state)
    assert set(first.changed_at.values()) == {first.number}
    state["b"][-1] += 1
    second = take(staging, state)
    assert changed(second, first) == {"b"}
    state["c"][0] += 1
    third = take(staging, state)
    assert changed(third, second) == {"c"}
    assert changed(third, first) == {"b", "c"}
    assert changed(second, first) == {"b"}, "what an older snapshot says must not move with newer ones"


def test_the_first_snapshot_is_complete_even_of_zeros() -> None:
    """New memory holds zeros, too, but nobody has written them anywhere yet."""
    staging, state = Staging(), {"zeros": np.zeros(1000), "ones": np.ones(1000)}
    first = take(staging, state)
    assert set(first.changed_at) == {"zeros", "ones"}
    assert set(first.changed_at.values()) == {first.number}
    assert contents(first) == {name: array.tobytes() for name, array in state.items()}
    wider = take(staging, {**state, "more": np.zeros(5)})
    assert changed(wider, first) == {"zeros", "ones", "more"}


def test_memory_is_kept_while_the_layout_is() -> None:
    staging, state = Staging(), {"a": np.arange(1000.0), "b": np.arange(10)}
    first = begin_of(take(staging, state))
    for _ in range(3):
        state["a"] += 1
        assert begin_of(take(staging, state)) == first
    assert [begin % BLOCK for begin in first] == [0]


def test_parts_have_memory_of_their_own() -> None:
    staging = Staging()
    staging.put("model", [np.zeros(3)])
    staging.put("other", [np.ones(3)])
    parts = staging.snapshot().parts
    assert parts["model"].number != parts["other"].number
    assert contents(parts["model"]) == {"0": np.zeros(3).tobytes()}
    assert contents(parts["other"]) == {"0": np.ones(3).tobytes()}


def test_a_snapshot_that_was_discarded_counts() -> None:
    staging, state = Staging(), {"a": np.zeros(10), "b": np.zeros(10)}
    first = take(staging, state)
    state["a"] += 1
    staging.put("model", state)
    staging.discard()
    assert changed(take(staging, state), first) == {"a"}


def test_without_memory_everything_counts_as_changed() -> None:
    staging, state = NoStaging(), {"a": np.arange(10.0), "turned": np.arange(6.0).reshape(2, 3).T}
    first, second = take(staging, state), take(staging, state)
    assert changed(second, first) == {"a", "turned"}
    assert contents(second) == {"a": state["a"].tobytes(), "turned": np.ascontiguousarray(state["turned"]).tobytes()}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_changed_by_a_model(data: st.DataObject) -> None:
    """It may say that something changed which did not, after a change of layout say, but never the contrary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_SAMPLE", 2)
        check_what_changed(data)


def check_what_changed(data: st.DataObject) -> None:
    staging = Staging(shard_bytes=data.draw(st.sampled_from([10**9, 100])))
    arrays = {name: np.zeros(size, np.int16) for name, size in zip("abcdef", (1, 7, 0, 40, 3, 200), strict=True)}
    history: list[tuple[PartImage, dict[str, bytes]]] = []
    for _ in range(data.draw(st.integers(2, 8))):
        for name in data.draw(st.sets(st.sampled_from("abdef"))):
            arrays[name][data.draw(st.integers(0, arrays[name].size - 1))] ^= data.draw(st.sampled_from([0, 1, 256]))
        names = data.draw(st.sampled_from(["abcdef", "abcdef", "abcdef", "abde", "fedcba"]))
        state = {name: arrays[name] for name in names}
        image = take(staging, state, hashed=data.draw(st.booleans()))
        now = {name: array.tobytes() for name, array in state.items()}
        assert contents(image) == now
        for older, then in history:
            said = changed(image, older)
            assert {name for name in now if now[name] != then.get(name)} <= said
        history.append((image, now))


class Interruption(BaseException):
    """Ctrl-C, where the program has no supervisor that heeds it."""


@pytest.mark.parametrize("copied", [0, 1, 2])
def test_a_copy_that_was_broken_off_leaves_nothing_that_counts_as_unchanged(
    copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had been copied was noted nowhere: compared with what is there now, it looks as if it had not changed."""
    staging, state = Staging(), {"a": np.arange(10.0), "b": np.arange(10.0)}
    first = take(staging, state, hashed=True)
    for array in state.values():
        array += 1

    def broken_off(moves: Sequence[Move], digests: dict[int, bytes]) -> list[bool]:
        bring_up_to_date(moves[:copied], digests)
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(staging_module, "bring_up_to_date", broken_off)
        with pytest.raises(Interruption):
            staging.put("model", state)
    staging.discard()
    second = take(staging, state)
    assert changed(second, first) == {"a", "b"}
    assert contents(second) == {name: array.tobytes() for name, array in state.items()}


def test_the_hash_of_what_has_changed_is_forgotten() -> None:
    def turned(array: Any) -> Any:
        return array.reshape(5, 2).T  # it has no address of its own: it is copied, and not compared

    arrays = {"same": np.arange(10.0), "changes": np.arange(10.0), "turned": np.arange(10.0)}
    staging = Staging()
    state = {**arrays, "turned": turned(arrays["turned"])}
    first = take(staging, state, hashed=True)
    assert set(first.digests) == {"same", "changes", "turned"}
    arrays["changes"][4] += 1
    arrays["turned"][4] += 1
    second = take(staging, state)
    assert second.digests == {"same": digest_of(memoryview(arrays["same"].tobytes()))}
    assert changed(second, first) == {"changes", "turned"}


# ---- memory that is made beforehand


def outline_of(state: Any) -> Outline:
    outline = Outline()
    outline.put("model", state)
    return outline


def test_memory_that_was_reserved_is_used() -> None:
    staging = Staging()
    state = {"m": np.zeros(1000), "v": np.ones(1000)}
    staging.reserve(outline_of(state))
    staging.reserve(outline_of(state))
    first = take(staging, state)
    assert contents(first) == {name: array.tobytes() for name, array in state.items()}
    staging.reserve(outline_of(state))
    assert begin_of(take(staging, state)) == begin_of(first)


def test_what_is_reserved_while_a_snapshot_is_there_counts_as_changed() -> None:
    """Zeros in new memory are no news of what an older snapshot held."""
    staging = Staging()
    small = {"w": np.ones(10)}
    first = take(staging, small)
    large = {"w": np.zeros(10), "m": np.zeros(10)}
    staging.reserve(outline_of(large))
    assert contents(first) == {"w": np.ones(10).tobytes()}
    second = take(staging, large)
    assert changed(second, first) == {"w", "m"}
    assert changed(take(staging, large), second) == set()


def test_a_snapshot_taken_in_the_midst_of_reserving() -> None:
    """By the training thread, of the old form, while another thread makes memory for the new one."""
    staging = Staging()
    old, new = {"w": np.ones(10)}, {"w": np.zeros(10), "m": np.zeros(10)}
    images: list[PartImage] = []

    class Interrupted(Outline):
        @property
        def forms(self) -> Any:  # type: ignore[override]
            images.append(take(staging, old))
            return outline_of(new).forms

        @forms.setter
        def forms(self, value: Any) -> None:
            pass

    staging.reserve(Interrupted())
    assert contents(images[-1]) == {"w": np.ones(10).tobytes()}
    assert changed(take(staging, new), images[-1]) == {"w", "m"}


# ---- copies from a device, which arrive later


class OnDevice:
    """A tensor that has no address here."""

    def __init__(self, values: Any) -> None:
        self.values = np.array(values, np.float64)


class DeviceCodec(TensorCodec[OnDevice]):
    """Copies at once into memory of its own, and from there when it is waited for, as a copy stream does."""

    def __init__(self) -> None:
        self.waited_for: list[int] = []
        self._copies = 0

    def recognises(self, value: Any) -> bool:
        return isinstance(value, OnDevice)

    def describe(self, value: OnDevice) -> Stored:
        return Stored("F64", value.values.shape)

    def copy_out(self, pairs: Sequence[tuple[OnDevice, memoryview]]) -> Arrival:
        pinned = [(np.array(tensor.values), place) for tensor, place in pairs]
        self._copies += 1
        number = self._copies

        def arrive(move: Callable[[Sequence[Move]], object]) -> None:
            self.waited_for.append(number)
            move([Move(address_of(place), array.ctypes.data, array.nbytes) for array, place in pinned])
            for array, _ in pinned:
                array[...] = -1  # from now on it is free

        return arrive

    def empty(self, stored: StoredTensor) -> OnDevice:
        return OnDevice(np.zeros(stored.spec.shape))

    def copy_in(self, tensor: OnDevice, data: memoryview) -> None:
        tensor.values[...] = np.frombuffer(data).reshape(tensor.values.shape)

    def encode_constant(self, value: Any) -> Json:
        raise TypeError(f"{value!r} is no state")


def put(staging: Staging, state: Any) -> Snapshot:
    staging.put("model", state, DeviceCodec())
    return staging.snapshot()


def device_state() -> dict[str, Any]:
    return {"frozen": OnDevice(np.arange(90.0)), "trained": OnDevice(np.zeros(10)), "beside": np.zeros(3)}


each_hashed = pytest.mark.parametrize("hashed", [False, True], ids=["compared", "hashed"])


@each_hashed
def test_frozen_tensors_of_a_device_are_found_when_they_have_arrived(hashed: bool) -> None:
    staging, state = Staging(), device_state()
    first = take(staging, state, DeviceCodec(), hashed=hashed)
    state["trained"].values += 1
    snapshot = put(staging, state)
    second = snapshot.parts["model"]
    assert changed(second, first) == {"frozen", "trained"}, "nobody knows yet"
    snapshot.finish()
    assert changed(second, first) == {"trained"}
    assert np.frombuffer(contents(second)["trained"]).tolist() == [1.0] * 10
    snapshot.finish()
    assert changed(second, first) == {"trained"}
    assert changed(take(staging, state, DeviceCodec()), second) == set()


def test_later_changes_do_not_reach_a_copy_that_is_under_way() -> None:
    staging, state = Staging(), device_state()
    snapshot = put(staging, state)
    state["trained"].values[:] = 5
    state["beside"][:] = 5
    snapshot.finish()
    found = contents(snapshot.parts["model"])
    assert set(np.frombuffer(found["trained"])) == set(np.frombuffer(found["beside"])) == {0.0}


@each_hashed
def test_what_never_arrived_counts_as_changed(hashed: bool) -> None:
    """The memory still holds the bytes of the snapshot before; that says nothing."""
    staging, state = Staging(), device_state()
    first = take(staging, state, DeviceCodec(), hashed=hashed)
    state["trained"].values += 1
    lost = put(staging, state).parts["model"]
    assert changed(lost, first) == {"frozen", "trained"}
    state["trained"].values -= 1
    third = take(staging, state, DeviceCodec())
    assert {"frozen", "trained"} <= changed(third, first)
    assert changed(take(staging, state, DeviceCodec()), third) == set()


def test_each_arrival_is_waited_for_once() -> None:
    staging, codec = Staging(), DeviceCodec()
    for part in ("model", "optimizer"):
        staging.put(part, device_state(), codec)
    snapshot = staging.snapshot()
    assert codec.waited_for == []
    snapshot.finish()
    snapshot.finish()
    assert codec.waited_for == [1, 2]
    assert staging.snapshot().parts == {}


def test_parts_are_told_of_until_a_device_still_sends_something() -> None:
    staging, told = Staging(), list[PartImage]()
    with staging.taking(told.append):
        staging.put("first", [np.zeros(3)])
        staging.put("second", device_state(), DeviceCodec())
        staging.put("third", [np.zeros(3)])
        assert staging.snapshot().parts.keys() == {"first", "second", "third"}
    assert [part.name for part in told] == ["first"]
    staging.put("first", [np.zeros(3)])
    assert len(told) == 1


def test_frozen_tensors_of_a_device_are_not_written_again() -> None:
    """The wait comes before it is decided what is shared."""
    store, staging, state, base = MemoryStore(), Staging(), device_state(), None
    with store.writing():
        for step in range(3):
            draft = store.begin(CheckpointId(step))
            written = write_snapshot(draft, put(staging, state), None, base)
            base = Base(draft.commit(Manifest(step, "numpy", 1.0, ("model",), written.files)), written.placed)
            with store.open(base.checkpoint) as reader:
                found = read_checkpoint(reader).parts["model"].tree(DeviceCodec())
            assert found["trained"].values.tolist() == state["trained"].values.tolist()
            assert found["frozen"].values.tolist() == list(range(90))
            shards = [set(shard.tensors) for shard in written.placed["model"].shards]
            assert shards == ([{"frozen", "trained", "beside"}] if not step else [{"frozen", "beside"}, {"trained"}])
            state["trained"].values += 1


# ---- copying what differs


def address(array: Any, at: int = 0) -> int:
    return int(array.ctypes.data) + at


def check_brought_up_to_date(
    sizes: Sequence[int], flips: Sequence[tuple[int, int]], hashed: Sequence[int] = ()
) -> None:
    """``flips`` are the moves and the places in them that differ; of those ``hashed``, the hash is known."""
    gap = 3
    total = sum(sizes) + gap * len(sizes)
    source = np.arange(total, dtype=np.uint8)
    target = source.copy()
    begins = [sum(sizes[:number]) + gap * number for number in range(len(sizes))]
    between = np.ones(total, bool)
    for begin, size in zip(begins, sizes, strict=True):
        between[begin : begin + size] = False
    target[between] = 77
    differ = set()
    for number, at in flips:
        source[begins[number] + at] ^= 1 << at % 8
    for number, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        if (source[begin : begin + size] != target[begin : begin + size]).any():
            differ.add(number)
    moves = [Move(address(target, b), address(source, b), s) for b, s in zip(begins, sizes, strict=True)]
    digests = {moves[number].target: digest_of(view_at(moves[number].target, sizes[number])) for number in hashed}
    assert bring_up_to_date(moves, digests) == [number in differ for number in range(len(sizes))]
    assert (target[~between] == source[~between]).all()
    assert (target[between] == 77).all(), "nothing else is written to"
    assert bring_up_to_date(moves) == [False] * len(sizes)


_SIZES = st.lists(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129, 300]), max_size=12)


@given(data=st.data(), sizes=_SIZES)
@settings(max_examples=300, deadline=None)
def test_what_differs_is_copied(data: st.DataObject, sizes: list[int]) -> None:
    flips: list[tuple[int, int]] = []
    if sizes:
        for number in data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=6)):
            last = sizes[number] - 1
            flips.append((number, data.draw(st.one_of(st.just(0), st.just(last), st.integers(0, last)))))
    hashed = data.draw(st.lists(st.integers(0, len(sizes) - 1), unique=True)) if sizes else []
    with pytest.MonkeyPatch.context() as patch:  # boundaries that come sooner
        patch.setattr(memory, "_STRIDE", 16)
        patch.setattr(memory, "_SAMPLE", 8)
        patch.setattr(memory, "_TASK", 48)
        patch.setattr(memory, "_WORTH_A_THREAD", 64)
        check_brought_up_to_date(sizes, flips, hashed)


MIB = 1 << 20


@pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 3 * MIB + 1])
@pytest.mark.parametrize("place", ["first", "last", "at a stride", "none"])
def test_around_a_stride(size: int, place: str) -> None:
    at = {"first": 0, "last": size - 1, "at a stride": min(MIB, size - 1)}.get(place)
    check_brought_up_to_date([5, size, 7], [] if at is None else [(1, at)])


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("place", ["before the cut", "at the cut", "last", "none"])
@pytest.mark.parametrize("hashed", [[], [1], [0, 2]], ids=str)
def test_cut_in_pieces(extra: int, place: str, hashed: list[int]) -> None:
    """So much that a second thread takes some of it: cuts go through the one large tensor."""
    size = 64 * MIB + extra
    at = {"before the cut": 32 * MIB - 5, "at the cut": 32 * MIB, "last": size - 1}.get(place)
    check_brought_up_to_date([3, size, 9], [] if at is None else [(1, at)], hashed)


def test_nothing_to_copy() -> None:
    assert bring_up_to_date([]) == []


# ---- gathered into blocks


@given(chunks=st.lists(st.integers(0, 3 * BLOCK), max_size=8), readonly=st.booleans())
@settings(max_examples=100, deadline=None)
def test_chunks_in_whole_blocks(chunks: list[int], readonly: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_GATHERED", 2 * BLOCK)
        content = np.random.default_rng(sum(chunks)).bytes(sum(chunks))
        given_: list[memoryview] = []
        at = 0
        for size in chunks:
            piece = content[at : at + size]
            given_.append(memoryview(piece if readonly else bytearray(piece)))
            at += size
        blocks = b""
        if not content:
            return
        before: tuple[memoryview, bytes] | None = None
        for block in in_blocks([chunk for chunk in given_ if len(chunk)], len(content)):
            assert len(block) % BLOCK == 0
            assert address_of(block) % BLOCK == 0
            assert before is None or bytes(before[0]) == before[1], "one is still written when the next is filled"
            before = block, bytes(block)
            blocks += bytes(block)
        assert blocks[: len(content)] == content
        assert len(blocks) == -(-len(content) // BLOCK) * BLOCK


@pytest.mark.parametrize("nbytes", [1, BLOCK - 1, BLOCK, 3 * MIB + 5])
def test_own_memory_is_there_and_begins_at_a_page(nbytes: int) -> None:
    view = own_memory(nbytes)
    assert len(view) == nbytes
    assert address_of(view) % BLOCK == 0
    assert not view.readonly
    assert bytes(view) == bytes(nbytes)
