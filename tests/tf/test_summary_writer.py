"""The summary writer that a program sees: TensorFlow's methods over an event file that loses nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_tf import SummaryWriter  # noqa: E402

v1 = tf.compat.v1


def summary(value: float) -> Any:
    return v1.Summary(value=[v1.Summary.Value(tag="loss", simple_value=value)])


def files(logdir: Path) -> list[Path]:
    return sorted(logdir.glob("events.out.tfevents.*"))


def values(path: Path) -> list[tuple[int, float]]:
    return [
        (event.step, event.summary.value[0].simple_value)
        for event in v1.train.summary_iterator(str(path))
        if event.WhichOneof("what") == "summary"
    ]


def test_it_is_a_file_writer_and_its_events_are_on_disk_at_once(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path / "new")
    assert isinstance(writer, v1.summary.FileWriter)
    assert writer.get_logdir() == str(tmp_path / "new")
    writer.add_summary(summary(1.5), 3)
    writer.add_summary(summary(2.5).SerializeToString(), 4)
    (path,) = files(tmp_path / "new")
    assert values(path) == [(3, 1.5), (4, 2.5)]
    writer.close()


def test_what_comes_after_the_session_goes_into_a_further_file(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path)
    writer.add_summary(summary(1.0), 1)
    writer.open_log().close()  # as the end of a session does
    writer.add_summary(summary(2.0), 2)
    writer.close()
    assert [values(path) for path in files(tmp_path)] == [[(1, 1.0)], [(2, 2.0)]]


def test_what_comes_after_its_own_close_is_dropped_with_a_warning(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path)
    writer.add_summary(summary(1.0), 1)
    writer.close()
    with pytest.warns(UserWarning, match="closed FileWriter"):
        writer.add_summary(summary(2.0), 2)
    writer.reopen()
    writer.add_summary(summary(3.0), 3)
    writer.close()
    assert [values(path) for path in files(tmp_path)] == [[(1, 1.0)], [(3, 3.0)]]
