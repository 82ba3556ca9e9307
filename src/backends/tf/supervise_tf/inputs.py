"""What a graph tells about its inputs: which errors are the end of them, and what in it draws or reads on its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import tensorflow as tf

_INPUT_OPS: Final = (
    "IteratorGetNext", "IteratorGetNextSync", "IteratorGetNextAsOptional", "MultiDeviceIteratorGetNextFromShard",
    "QueueDequeue", "QueueDequeueV2", "QueueDequeueMany", "QueueDequeueManyV2", "QueueDequeueUpTo",
    "QueueDequeueUpToV2", "ReaderRead", "ReaderReadV2", "ReaderReadUpTo", "ReaderReadUpToV2", "OptionalGetValue",
)  # fmt: skip
_FROM_CLOSED_QUEUES: Final = ("QueueEnqueue", "QueueEnqueueV2", "QueueEnqueueMany", "QueueEnqueueManyV2")

_EAGER_OP: Final = re.compile(r"\[Op:([^\]]+)\]")
_WORDS_AT_THE_END: Final = ("End of sequence", "is closed and has insufficient elements")
"""What iterators and queues say inside a ``tf.function``, where the op that is told is the function."""

_DRAWING_OPS: Final = frozenset({
    "RandomUniform", "RandomUniformInt", "RandomStandardNormal", "ParameterizedTruncatedNormal", "TruncatedNormal",
    "RandomShuffle", "Multinomial", "RandomGamma", "RandomPoisson", "RandomPoissonV2", "RandomCrop",
    "UniformCandidateSampler", "LogUniformCandidateSampler", "LearnedUnigramCandidateSampler", "AllCandidateSampler",
    "FixedUnigramCandidateSampler", "ThreadUnsafeUnigramCandidateSampler", "SampleDistortedBoundingBox",
    "SampleDistortedBoundingBoxV2", "FractionalMaxPool", "FractionalAvgPool",
    "RandomShuffleQueue", "RandomShuffleQueueV2", "RandomDataset", "RandomDatasetV2", "ShuffleDataset",
    "ShuffleDatasetV2", "ShuffleDatasetV3", "ShuffleAndRepeatDataset", "ShuffleAndRepeatDatasetV2",
})  # fmt: skip
"""Ops that keep a random state of their own, which no session gives out and no checkpoint can hold."""

_CLOSED: Final = ("closed Session", "Session has been closed")
"""What ``session.run``, and what ``session.make_callable`` gives, say of a session that was closed."""


def is_end_of_input(error: BaseException) -> bool:
    """Whether an error says that the input is exhausted.

    An ``OutOfRangeError`` does if an op that reads inputs raised it, or the program itself. A file that ends too early
    while it is restored raises one, too; that is no end of a training run.
    """
    if not isinstance(error, tf.errors.OutOfRangeError):
        return False
    op = getattr(error, "op", None)
    if op is not None:
        return op.type in _INPUT_OPS or op.type in _FROM_CLOSED_QUEUES
    return _says_end_of_input(str(error))


def _says_end_of_input(said: str) -> bool:
    """The same of an eager error, which only tells in words which op it comes from, and of the program's own error."""
    op = _EAGER_OP.search(said)
    if op is None and "{{node " not in said:
        return True
    return (op is not None and op[1] in _INPUT_OPS) or any(words in said for words in _WORDS_AT_THE_END)


def is_end_of_session(error: BaseException) -> bool:
    """Whether an error only says that its session, or the queue that it waited at, was closed."""
    if isinstance(error, tf.errors.CancelledError):
        return True
    return type(error) is RuntimeError and any(text in str(error) for text in _CLOSED)


def ancestors(outputs: Iterable[Any]) -> set[Any]:
    """The operations that must run before these tensors or operations have their values, and themselves."""
    found: set[Any] = set()
    waiting = [output.op if hasattr(output, "op") else output for output in outputs]
    while waiting:
        operation = waiting.pop()
        if operation not in found:
            found.add(operation)
            waiting.extend(tensor.op for tensor in operation.inputs)
            waiting.extend(operation.control_inputs)
    return found


def placeholders_of(output: Any) -> list[str]:
    """The names of the placeholders that have to be fed for it."""
    return sorted(op.name for op in ancestors([output]) if op.type in ("Placeholder", "PlaceholderV2"))


def inputs_of(output: Any) -> list[str]:
    """The names of the ops that take an element of the input whenever it is computed."""
    return sorted(op.name for op in ancestors([output]) if op.type in _INPUT_OPS)


def drawing_ops(graph: Any) -> list[str]:
    """The names of the ops with a random state of their own that training may run: those that initialise do not count.

    An op counts as initialising if it and all that use it are needed for the first value of a variable only.
    """
    with graph.as_default():
        variables = [*tf.compat.v1.global_variables(), *tf.compat.v1.local_variables()]
    initialising = ancestors(variable.initializer for variable in variables if variable.initializer is not None)
    return sorted(
        operation.name
        for operation in _all_operations(graph)
        if operation.type in _DRAWING_OPS and not _is_only_in(operation, initialising)
    )


def _is_only_in(operation: Any, known: set[Any]) -> bool:
    return operation in known and all(user in known for user in _users(operation))


def _users(operation: Any) -> Iterator[Any]:
    for output in operation.outputs:
        yield from output.consumers()


def _all_operations(graph: Any) -> Iterator[Any]:
    get: Callable[[], Iterable[Any]] = graph.get_operations
    yield from get()
