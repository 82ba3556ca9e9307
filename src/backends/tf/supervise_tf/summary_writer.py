"""TensorFlow's summary writer over the event file of the core, and the core's events over a writer of TensorFlow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tensorflow as tf

from supervise_core.clock import Clock, SystemClock
from supervise_core.summaries import EventLog, EventSink


class SummaryWriter(tf.compat.v1.summary.FileWriter):  # type: ignore[misc]
    """A ``tf.compat.v1.summary.FileWriter`` whose events are on disk at once, in a file of a name of its own.

    All of its methods are TensorFlow's; only what they hand the events to is not.
    """

    event_writer: _EventFiles

    def __init__(self, logdir: str | os.PathLike[str], clock: Clock | None = None) -> None:
        """Makes the directory and the event file."""
        files: Any = _EventFiles(Path(logdir), clock or SystemClock())
        super(tf.compat.v1.summary.FileWriter, self).__init__(files)  # its own would open a file of its own
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """Whether its event file is closed."""
        return self.event_writer.log.is_closed

    def open_log(self) -> EventLog:
        """The event file, opened anew if it was closed."""
        self.reopen()
        return self.event_writer.log


class _EventFiles:
    """What a ``FileWriter`` writes to: one event file, or, if it was closed, a further one."""

    def __init__(self, logdir: Path, clock: Clock) -> None:
        self._logdir = logdir
        self._clock = clock
        self._closed_by_program = False
        self.log = EventLog(logdir, clock)

    def get_logdir(self) -> str:
        return str(self._logdir)

    def reopen(self) -> None:
        self._closed_by_program = False
        if self.log.is_closed:
            self.log = EventLog(self._logdir, self._clock)

    def add_event(self, event: Any) -> None:
        """Append an event: after the end of the session to a further file, after ``close`` to none, as TensorFlow."""
        if self._closed_by_program:
            return
        self.reopen()
        if event.WhichOneof("what") == "summary":
            self.log.add_serialized(event.summary.SerializeToString(), event.step)
        else:
            self.log.add_event(event.SerializeToString())

    def flush(self) -> None:
        return None  # every event is handed to the operating system when it is added

    def close(self) -> None:
        self._closed_by_program = True
        self.log.close()


class ForeignEvents(EventSink):
    """The events of a run in a writer that the program made itself, and closes itself."""

    def __init__(self, writer: Any, clock: Clock) -> None:
        super().__init__(clock)
        self._writer = writer

    @property
    def is_closed(self) -> bool:
        return False

    def close(self) -> None:
        self._writer.flush()

    def _write(self, record: bytes) -> None:
        self._writer.add_event(tf.compat.v1.Event.FromString(record))
