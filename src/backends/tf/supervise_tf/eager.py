"""The backend for eager TensorFlow and Keras: what has variables is a part, and optimizer iterations are the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import tensorflow as tf

from supervise_core.backend import Backend
from supervise_core.data_source import is_stateful
from supervise_core.errors import IncompatibleCheckpointError
from supervise_core.readiness import NotReady, Readiness, Ready
from supervise_core.snapshot import Parts, Snapshot, Staging, check_part_name

_OWN_PART: Final = "tf"


class EagerSession:
    """The parts by name, as attributes and as items, and the global step. They are the program's own objects."""

    def __init__(self, parts: Mapping[str, Any], backend: EagerBackend) -> None:
        self._parts = parts
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        try:
            return self._parts[name]
        except KeyError:
            raise AttributeError(f"the session has no part {name!r}; it has: {', '.join(self._parts)}") from None

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    @property
    def global_step(self) -> int:
        """How many steps the counting optimizer has made; 0 where nothing counts."""
        return self._backend.global_step(self) or 0


class EagerBackend(Backend[EagerSession]):
    """TensorFlow 2 training state, part by part: ``EagerBackend(model=model, optimizer=optimizer)``.

    A part is a Keras model, layer, optimizer or metric, a ``tf.Module``, a ``tf.Variable``, a ``tf.random.Generator``,
    or anything with ``state_dict`` and ``load_state_dict``. The global step is the iterations of the first optimizer;
    ``global_step=`` (a variable, or a function of no arguments) decides otherwise. Random states kept: those that are
    variables (Keras seed generators, ``tf.random.Generator``), and those of Python and NumPy. What a TensorFlow op
    draws without a generator is not reachable, and not kept.
    """

    name = "tf"
    recoverable: ClassVar[tuple[type[BaseException], ...]] = (tf.errors.AbortedError, tf.errors.UnavailableError)

    def __init__(self, *, global_step: tf.Variable | Callable[[], int] | None = None, **parts: Any) -> None:
        """
        :raises TypeError: if a part has no variables and no state.
        :raises ValueError: if a part cannot bear its name.
        """
        if not parts:
            raise TypeError("EagerBackend needs its parts by name: EagerBackend(model=model, optimizer=optimizer)")
        for name, part in parts.items():
            check_part_name(name)
            if name == _OWN_PART:
                raise ValueError(f"the part name {name!r} is taken by the backend itself; choose another one")
            if not (_has_variables(part) or is_stateful(part)):
                kind = type(part).__name__
                raise TypeError(f"{name}= has neither variables nor a state_dict; a {kind} cannot be saved")
        self._parts = parts
        self._global_step = global_step

    def create_session(self, master: str = "", config: Any = None) -> EagerSession:
        self._build_optimizers()
        return EagerSession(self._parts, self)

    def init(self, session: EagerSession) -> None:
        """Build optimizers that have no variables yet, for the models' trainable variables; Keras does the rest."""
        self._build_optimizers()

    def ready(self, session: EagerSession) -> Readiness:
        unbuilt = [name for name, part in self._parts.items() if not getattr(part, "built", True)]
        if not unbuilt:
            return Ready()
        return NotReady(f"not built: {', '.join(unbuilt)}; call build(...) on it, or run it once, in init_fn=")

    def global_step(self, session: EagerSession) -> int | None:
        counter: Any = self._global_step
        if counter is None:
            iterations = (getattr(part, "iterations", None) for part in self._parts.values())
            counter = next((variable for variable in iterations if variable is not None), None)
        if counter is None:
            return None
        read: Any = counter if callable(counter) else counter.numpy
        return int(read())

    def snapshot(self, session: EagerSession, staging: Staging) -> Snapshot:
        for name, part in self._parts.items():
            # a variable without dimensions gives a NumPy scalar, which would be no tensor in the checkpoint
            values = {path: np.asarray(variable.numpy()) for path, variable in _variables(part).items()}
            staging.put(name, values or _state(part))
        staging.put(_OWN_PART, {"random": self.random_state(session)})
        return staging.snapshot()

    def load(self, session: EagerSession, parts: Parts) -> None:
        self._build_optimizers()
        wanted = {*self._parts, _OWN_PART}
        if wanted != set(parts):
            part = min(wanted ^ set(parts))
            where = "in the checkpoint" if part in wanted else "in the program"
            raise IncompatibleCheckpointError(part, [f"it is missing {where}"])
        saved = {name: part.tree() for name, part in parts.items()}
        for name, part in self._parts.items():
            _check_fit(name, _variables(part), saved[name] if _has_variables(part) else {})
        for name, part in self._parts.items():
            if _has_variables(part):
                for path, variable in _variables(part).items():
                    variable.assign(saved[name][path])
            else:
                part.load_state_dict(saved[name])
        self.set_random_state(session, saved[_OWN_PART]["random"])

    def _build_optimizers(self) -> None:
        trainable: Sequence[Any] = [
            variable
            for part in self._parts.values()
            if not _is_optimizer(part)
            for variable in getattr(part, "trainable_variables", ())
        ]
        for part in self._parts.values():
            if _is_optimizer(part) and not part.built and trainable:
                part.build(trainable)


def _is_optimizer(part: Any) -> bool:
    return hasattr(part, "iterations") and hasattr(part, "apply_gradients")


def _has_variables(part: Any) -> bool:
    return isinstance(part, (tf.Variable, tf.random.Generator)) or hasattr(part, "variables")


def _variables(part: Any) -> dict[str, Any]:
    """The variables of a part, named by their number, and in a model by their own name.

    Not by their paths: Keras numbers the layers of one process, so a path tells which model was made first.
    """
    if isinstance(part, tf.Variable):
        return {"value": part}
    if isinstance(part, tf.random.Generator):
        return {"state": part.state}
    variables = enumerate(getattr(part, "variables", ()))
    if _is_optimizer(part):
        return {str(number): variable for number, variable in variables}
    return {f"{number}.{variable.name.partition(':')[0]}": variable for number, variable in variables}


def _state(part: Any) -> Any:
    return {} if _has_variables(part) else part.state_dict()


def _check_fit(part: str, variables: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """:raises IncompatibleCheckpointError: naming every variable that is missing, unexpected, or of another kind."""
    differences = [f"{path!r} is missing" for path in variables if path not in saved]
    differences += [f"{path!r} is unexpected" for path in saved if path not in variables]
    for path in variables.keys() & saved.keys():
        here, there = variables[path], saved[path]
        if tuple(here.shape) != there.shape:
            differences.append(f"{path!r} has shape {there.shape} there and {tuple(here.shape)} here")
        elif tf.as_dtype(here.dtype) != tf.as_dtype(there.dtype):
            differences.append(f"{path!r} has dtype {there.dtype} there and {here.dtype} here")
    if differences:
        raise IncompatibleCheckpointError(part, sorted(differences))
