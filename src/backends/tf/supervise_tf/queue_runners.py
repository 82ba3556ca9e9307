"""The queue runners of a graph as a service: their threads stop with the run, and never hold its end up."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from supervise_core.coordinator import StopSignal
from supervise_core.services import Service, ServiceContext


class QueueRunners(Service):
    """Starts the queue runners in the collection ``QUEUE_RUNNERS``.

    When the run stops, a thread of each cancels its queue, so that the others, blocked in an enqueue, end at once.
    """

    name = "queue runners"

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def start(self, context: ServiceContext) -> None:
        start_queue_runners(context.session, self._graph, _ContextCoordinator(context))


def start_queue_runners(
    session: Any, graph: Any, coordinator: Any, queue_runners: Iterable[Any] | None = None
) -> list[threading.Thread]:
    """Start those given, or those in the graph's collection; their threads. Those that run already are left alone."""
    collected = graph.get_collection(tf.compat.v1.GraphKeys.QUEUE_RUNNERS) if queue_runners is None else queue_runners
    return [
        thread
        for runner in collected
        for thread in runner.create_threads(session, coord=coordinator, daemon=True, start=True)
    ]


class _ContextCoordinator:
    """What a queue runner asks of a coordinator, answered by the run that it works for."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._stop: StopSignal = context.stop_signal

    def should_stop(self) -> bool:
        return self._stop.should_stop()

    def wait_for_stop(self, timeout: float | None = None) -> bool:
        return self._stop.wait_for_stop(timeout)

    def request_stop(self, ex: BaseException | None = None) -> None:
        self._context.request_stop(ex, source=f"queue runner {threading.current_thread().name!r}")

    def register_thread(self, thread: threading.Thread) -> None:
        self._context.join_at_end(thread)
