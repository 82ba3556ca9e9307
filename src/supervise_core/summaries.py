"""Summaries as TensorBoard reads them: values, events, and the file they are appended to.

tensorboardX makes the protocol messages. The file is our own affair, because there a run that is killed loses events,
and two files opened within one second are one: each record is written at once, with no thread and no buffer; a record
that the disk takes only in part is cut off again, and waits in memory for the next try.
"""

# pyright: reportAttributeAccessIssue=false
# (protobuf makes the classes of its messages at run time)

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import os
import platform
import re
import struct
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

from supervise_core.clock import Clock

_log = logging.getLogger(__name__)

_EVENT_FILE: Final = re.compile(r"events\.out\.tfevents\.(\d+)\..*")
_MOST_WAITING: Final = 64 << 20
_KEPT_FOR_RESUME: Final = 16 << 20

SessionStatus = Literal["START", "STOP", "CHECKPOINT"]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Numbers of any shape, to be shown as a distribution."""

    values: Any


@dataclass(frozen=True, slots=True)
class Image:
    """An image of shape (height, width), (height, width, 1), (…, 3) or (…, 4): uint8, or floats from 0 to 1."""

    pixels: Any


@dataclass(frozen=True, slots=True)
class Text:
    """A text; Markdown is shown as such. A plain string does the same."""

    content: str


def read_value(value: Any) -> Any:
    """What is written of a value, copied now, so that nothing that changes later or holds a graph is kept.

    Numbers (of any framework: what ``float()`` takes) become floats, a string becomes ``Text``.

    :raises TypeError: for anything else.
    """
    match value:
        case Histogram(values):
            return Histogram(_array(values).copy())
        case Image(pixels):
            return Image(_array(pixels).copy())
        case Text():
            return value
        case str():
            return Text(value)
        case _:
            try:
                return float(value.detach() if hasattr(value, "detach") else value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"{value!r} is no summary: use a number, a string, Histogram(...), Image(...) or Text(...)"
                ) from error


def read_number(name: str, value: Any) -> float:
    """A number of any framework as a float.

    :raises TypeError: if it is none; names it.
    """
    try:
        return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"the metric {name!r} is no number but {value!r}") from error


class EventSink(ABC):
    """Where the events of a run go, from any thread, and the memory of those of the present step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._recent: list[bytes] = []
        self._recent_step = -1
        self._begun = False

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Whether nothing can be appended any more."""

    @abstractmethod
    def close(self) -> None:
        """Write what still waits, and close; safe to call twice.

        :raises OSError: if the disk does not take it.
        """

    @abstractmethod
    def _write(self, record: bytes) -> None:
        """Append one serialized ``Event``."""

    def begin(self, events: Iterable[bytes]) -> None:
        """Append serialized ``Event`` messages that this file begins with; nothing if that was done before."""
        if not self._begun:
            self._begun = True
            for event in events:
                self._write(event)

    def add_event(self, event: bytes) -> None:
        """Append a serialized ``Event`` message."""
        self._write(event)

    def add(self, values: Mapping[str, Any], step: int, *, repeat: bool = True) -> None:
        """Append values (as ``read_value`` gives them) of a step.

        ``repeat``: whether they belong to what a run resumed at this very step shows again (rates do not).
        """
        summary = _tensorboard("proto.summary_pb2").Summary()
        for tag, value in values.items():
            _summarise(summary, tag, value)
        self.add_summary(summary, step, repeat=repeat)

    def add_summary(self, summary: Any, step: int, *, repeat: bool = True) -> None:
        """Append a ready ``Summary`` message."""
        record = _event(self._clock, step=step, summary=summary)
        with self._lock:
            if step > self._recent_step:
                self._recent, self._recent_step = [], step
            if repeat and step == self._recent_step:
                self._recent.append(record)
        self._write(record)

    def add_serialized(self, summary: Any, step: int) -> None:
        """Append a ``Summary`` of any library that makes them, as a message or as its bytes.

        :raises TypeError: if it is no such thing.
        """
        content = summary if isinstance(summary, bytes) else getattr(summary, "SerializeToString", lambda: None)()
        try:
            message = _tensorboard("proto.summary_pb2").Summary.FromString(content)
        except Exception as error:
            raise TypeError(f"{summary!r} is no summary: pass a mapping of values, a Summary or its bytes") from error
        self.add_summary(message, step)

    def add_session_log(self, status: SessionStatus, step: int, checkpoint_path: str = "", message: str = "") -> None:
        """Append a START (readers drop what an earlier file has of this step and later), STOP or CHECKPOINT."""
        SessionLog = _tensorboard("proto.event_pb2").SessionLog  # noqa: N806 - a class
        log = SessionLog(status=SessionLog.SessionStatus.Value(status), checkpoint_path=checkpoint_path, msg=message)
        self._write(_event(self._clock, step=step, session_log=log))

    def events_of(self, step: int) -> list[bytes]:
        """The values written for this step so far. A checkpoint of the step keeps them, as a START at it drops them."""
        with self._lock:
            if step != self._recent_step:
                return []
            if sum(map(len, self._recent)) > _KEPT_FOR_RESUME:
                _log.warning("the summaries of step %d are too large to be kept in its checkpoint", step)
                return []
            return list(self._recent)

    def repeat(self, records: list[bytes], step: int) -> None:
        """Append what ``events_of`` gave in an earlier run."""
        with self._lock:
            self._recent, self._recent_step = list(records), step
        for record in records:
            self._write(record)


class EventLog(EventSink):
    """One event file in a directory."""

    def __init__(self, logdir: Path, clock: Clock) -> None:
        """Opens a new file, later in name than every other one there, and announces the format in it.

        The directory is made if it is not there.
        """
        super().__init__(clock)
        logdir.mkdir(parents=True, exist_ok=True)
        self._waiting: list[bytes] = []
        self._failing = False
        self.path, self._descriptor = _create_event_file(logdir, clock)
        self._size = 0
        self._write(_event(clock, file_version="brain.Event:2"))

    @property
    def is_closed(self) -> bool:
        return self._descriptor < 0

    def close(self) -> None:
        with self._lock:
            if self._descriptor < 0:
                return
            try:
                self._flush()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    def _write(self, record: bytes) -> None:
        with self._lock:
            if self._descriptor < 0:
                raise ValueError(f"the event file {self.path} is closed; write summaries before the session ends")
            self._waiting.append(_framed(record))
            try:
                self._flush()
                self._failing = False
            except OSError as error:
                self._keep_waiting(error)

    def _flush(self) -> None:
        while self._waiting:
            record = self._waiting[0]
            try:
                view = memoryview(record)
                while view:
                    view = view[os.write(self._descriptor, view) :]
            except OSError:
                os.ftruncate(self._descriptor, self._size)
                raise
            self._size += len(record)
            del self._waiting[0]

    def _keep_waiting(self, error: OSError) -> None:
        if sum(map(len, self._waiting)) > _MOST_WAITING:
            raise error
        if not self._failing:
            self._failing = True
            _log.error("%s does not take summaries (%s); keeping them in memory for now", self.path, error)


def _create_event_file(logdir: Path, clock: Clock) -> tuple[Path, int]:
    """Readers go through event files in the order of their names, so a later file gets a later second, true or not."""
    seconds = [int(match[1]) for name in os.listdir(logdir) if (match := _EVENT_FILE.fullmatch(name))]
    first = max([int(clock.time()), *(second + 1 for second in seconds)])
    for second in itertools.count(first):
        path = logdir / f"events.out.tfevents.{second:010d}.{platform.node() or 'localhost'}.{os.getpid()}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            return path, os.open(path, flags, 0o644)
        except FileExistsError:
            continue
    raise AssertionError("counting ends never")


def _event(clock: Clock, **fields: Any) -> bytes:
    event = _tensorboard("proto.event_pb2").Event(wall_time=clock.time(), **fields)
    return bytes(event.SerializeToString())


def _tensorboard(module: str) -> Any:
    """A module of tensorboardX, without what the package itself imports: all of PyTorch, where it is installed."""
    name = f"tensorboardX.{module}"
    if not sys.modules.keys().isdisjoint({name, "tensorboardX"}):
        return importlib.import_module(name)
    found = importlib.util.find_spec("tensorboardX")
    if found is None:
        return importlib.import_module(name)  # which says so
    stand_in = ModuleType("tensorboardX")
    stand_in.__path__ = list(found.submodule_search_locations or ())
    sys.modules["tensorboardX"] = stand_in
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["tensorboardX"]


def _framed(record: bytes) -> bytes:
    """A TFRecord: length, masked crc32c of the length, data, masked crc32c of the data."""
    crc32c = _tensorboard("crc32c").crc32c

    def masked(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(record))
    return length + masked(length) + record + masked(record)


def _summarise(summary: Any, tag: str, value: Any) -> None:
    make = _tensorboard("summary")
    match value:
        case float():
            summary.value.add(tag=tag, simple_value=value)
        case Histogram(values):
            _add_histogram(summary, tag, values, make.histogram)
        case Image(pixels):
            _add_image(summary, tag, pixels, make.image)
        case Text(content):
            summary.value.extend(make.text(tag, content).value)
        case _:
            raise TypeError(f"the summary {tag!r} has no written form for {value!r}")


def _add_histogram(summary: Any, tag: str, values: Any, make: Callable[..., Any]) -> None:
    """The finite values in TensorBoard's buckets, each a tenth wider than the one before; none, if none is finite."""
    import numpy

    finite = values[numpy.isfinite(values)] if values.dtype.kind == "f" else values.reshape(-1)
    if finite.size:
        positive = 1e-12 * 1.1 ** numpy.arange(774)
        edges = numpy.concatenate([-positive[::-1], [0.0], positive])
        summary.value.add().CopyFrom(make(tag, finite, bins=edges).value[0])
        summary.value[-1].tag = tag


def _add_image(summary: Any, tag: str, pixels: Any, make: Callable[..., Any]) -> None:
    dataformats = "HW" if pixels.ndim == 2 else "HWC"
    try:
        summary.value.add().CopyFrom(make(tag, pixels, dataformats=dataformats).value[0])
        summary.value[-1].tag = tag
    except ImportError as error:
        raise ImportError("image summaries need Pillow; type: pip install 'supervise-core[images]'") from error


def _array(values: Any) -> Any:
    import numpy

    detached = values.detach().cpu() if hasattr(values, "detach") else values
    return numpy.asarray(detached)
