"""Values, events, and the event file, as TensorBoard's own reader sees them."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supervise_core import EverySteps, Histogram, Image, SessionStateError, Supervisor
from supervise_core.summaries import EventLog, read_value
from supervise_core.testing.clock import FakeClock
from supervise_numpy import ArrayBackend


def read(logdir: Path) -> Any:
    """What TensorBoard reads in a directory."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = module.EventAccumulator(str(logdir), size_guidance={"scalars": 0, "tensors": 0})
    return accumulator.Reload()


def points(logdir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(logdir).Scalars(tag)]


def session_logs(path: Path) -> list[tuple[str, int, str]]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    names = {0: "UNSPECIFIED", 1: "START", 2: "STOP", 3: "CHECKPOINT"}
    return [
        (names[event.session_log.status], event.step, event.session_log.checkpoint_path)
        for event in loader.LegacyEventFileLoader(str(path)).Load()
        if event.HasField("session_log")
    ]


def supervisor(logdir: Path, **options: Any) -> Supervisor[Any]:
    return Supervisor(ArrayBackend({"w": np.zeros(3)}), logdir, save_every=None, **options)


class Number:
    """A number of a framework: something that ``float`` takes, and that can be watched."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return self.value


def test_scalars_histograms_images_and_texts_are_readable(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    log = EventLog(tmp_path, FakeClock())
    values = {
        "scalar": 0.25,
        "histogram": Histogram([[1.0, 2.0], [3.0, float("nan")]]),
        "grey": Image(np.zeros((4, 5))),
        "colour": Image(np.full((4, 5, 3), 255, np.uint8)),
        "text": "**bold**",
    }
    log.add({tag: read_value(value) for tag, value in values.items()}, 7)
    log.close()
    seen = read(tmp_path)
    assert points(tmp_path, "scalar") == [(7, 0.25)]
    histogram = seen.Histograms("histogram")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (3, 1.0, 3.0, 6.0)
    assert [(image.width, image.height) for tag in ("grey", "colour") for image in seen.Images(tag)] == [(5, 4), (5, 4)]
    [text] = [tag for tag in seen.Tags()["tensors"] if tag.startswith("text")]
    assert seen.Tensors(text)[0].tensor_proto.string_val[0] == b"**bold**"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e300, 3, True, np.float32(0.5), np.array(2)])
def test_every_number_is_a_scalar(value: Any) -> None:
    assert repr(read_value(value)) == repr(float(value))


@pytest.mark.parametrize("value", [None, [1.0], object(), {"a": 1}, np.zeros(3)])
def test_what_is_no_summary_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"is no summary: use a number, a string, Histogram\(...\)"):
        read_value(value)


def test_a_histogram_without_a_finite_value_is_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path, FakeClock())
    values = {"empty": Histogram([]), "nan": Histogram([float("nan")]), "there": 1.0}
    log.add({tag: read_value(value) for tag, value in values.items()}, 1)
    log.close()
    assert points(tmp_path, "there") == [(1, 1.0)]


def test_a_file_opened_within_the_same_second_is_a_later_one(tmp_path: Path) -> None:
    clock = FakeClock()
    paths: list[Path] = []
    for number in range(12):
        log = EventLog(tmp_path, clock)
        log.add({"a": float(number)}, number)
        log.close()
        paths.append(log.path)
    assert len(set(paths)) == 12
    assert sorted(paths) == paths
    assert points(tmp_path, "a") == [(number, float(number)) for number in range(12)]


def test_a_clock_that_was_put_back_makes_no_earlier_file(tmp_path: Path) -> None:
    first = EventLog(tmp_path, FakeClock(wall=1_700_000_000.0))
    second = EventLog(tmp_path, FakeClock(wall=1_600_000_000.0))
    assert first.path < second.path
    first.close()
    second.close()


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path, FakeClock())
    log.add({"a": 0.0}, 0)
    write = os.write
    taken = 0

    def full(descriptor: int, data: Any) -> int:
        nonlocal taken
        taken += 1
        if taken % 2:
            return write(descriptor, bytes(data)[:5])  # the last that went onto it
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for step in range(1, 4):
        log.add({"a": float(step)}, step)
    assert points(tmp_path, "a") == [(0, 0.0)]
    monkeypatch.undo()
    log.add({"a": 4.0}, 4)
    log.close()
    assert points(tmp_path, "a") == [(step, float(step)) for step in range(5)]


def test_closing_twice_is_fine_and_writing_after_it_is_not(tmp_path: Path) -> None:
    log = EventLog(tmp_path, FakeClock())
    log.close()
    log.close()
    with pytest.raises(ValueError, match="is closed; write summaries before the session ends"):
        log.add({"a": 1.0}, 1)


def test_a_session_says_when_it_starts_saves_and_stops(tmp_path: Path) -> None:
    sv = supervisor(tmp_path)
    with sv.managed_session() as sess:
        assert sv.summary_writer is not None
        path = sv.summary_writer.path
        sess.global_step = 5
    assert session_logs(path) == [
        ("START", 0, ""),
        ("CHECKPOINT", 0, str(tmp_path / "model.ckpt-0")),
        ("CHECKPOINT", 5, str(tmp_path / "model.ckpt-5")),
        ("STOP", 5, ""),
    ]


def test_a_value_is_that_of_its_step_even_if_it_changes_before_the_boundary(tmp_path: Path) -> None:
    sv = supervisor(tmp_path, summarize_every=EverySteps(2))
    loss = np.zeros(())
    with sv.managed_session() as sess:
        while sess.global_step < 6 and not sv.should_stop():
            sess.global_step += 1
            loss[...] = sess.global_step
            sv.scalars(loss=loss)
            loss[...] = -1.0
    assert points(tmp_path, "loss") == [(2, 2.0), (4, 4.0), (6, 6.0)]


def test_a_value_is_read_only_when_it_is_due_and_not_kept(tmp_path: Path) -> None:
    sv = supervisor(tmp_path, summarize_every=EverySteps(10))
    reads = 0
    kept: list[weakref.ref[Number]] = []
    with sv.managed_session() as sess:
        for _ in sv.batches(range(40)):
            sess.global_step += 1
            value = Number(float(sess.global_step))
            sv.scalars(loss=value)
            reads += value.reads
            kept.append(weakref.ref(value))
            del value
            gc.collect(0)
            assert kept[-1]() is None
    assert 4 <= reads <= 8  # at the step that is due, and perhaps at the one before
    assert points(tmp_path, "loss") == [(step, float(step)) for step in (10, 20, 30, 40)]


def test_a_value_on_an_autograd_graph_is_read_and_let_go(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    sv = supervisor(tmp_path, summarize_every=EverySteps(1))
    weight = torch.ones(3, requires_grad=True)
    with sv.managed_session() as sess:
        for _ in sv.batches(range(3)):
            loss = (weight * 2).sum()
            sess.global_step += 1
            sv.scalars(loss=loss)
            watched = weakref.ref(loss)
            del loss
            assert watched() is None
    assert [value for _, value in points(tmp_path, "loss")] == [6.0, 6.0, 6.0]


def test_summary_computed_takes_a_mapping_a_message_and_its_bytes(tmp_path: Path) -> None:
    from tensorboardX.proto.summary_pb2 import Summary

    message = Summary()
    message.value.add(tag="m", simple_value=2.0)
    sv = supervisor(tmp_path, summarize_every=None)
    with sv.managed_session() as sess:
        sess.global_step = 3
        sv.summary_computed(sess, {"m": 1.0})
        sv.summary_computed(sess, message, 4)
        sv.summary_computed(sess, message.SerializeToString(), 5)
        for wrong in (None, "text", b"\xff\xff", 7, object()):
            with pytest.raises(TypeError, match="is no summary"):
                sv.summary_computed(sess, wrong)
    assert points(tmp_path, "m") == [(3, 1.0), (4, 2.0), (5, 2.0)]


def test_a_message_of_another_library_is_taken(tmp_path: Path) -> None:
    summary_pb2 = pytest.importorskip("tensorboard.compat.proto.summary_pb2")
    message = summary_pb2.Summary()
    message.value.add(tag="m", simple_value=2.0)
    sv = supervisor(tmp_path)
    with sv.managed_session() as sess:
        sv.summary_computed(sess, message, 1)
    assert points(tmp_path, "m") == [(1, 2.0)]


def test_without_an_event_file_a_summary_is_refused() -> None:
    sv = Supervisor(ArrayBackend({"w": np.zeros(3)}))
    with sv.managed_session() as sess, pytest.raises(SessionStateError, match="no summaries are written"):
        sv.summary_computed(sess, {"m": 1.0})
