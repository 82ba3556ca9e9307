"""The backend for eager TensorFlow and Keras: what TensorFlow can save is a part; optimizer iterations are the step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

import tensorflow as tf

from supervise_core.backend import Backend
from supervise_core.data_source import BatchSource
from supervise_core.errors import IncompatibleCheckpointError
from supervise_core.parts import Parts
from supervise_core.readiness import NotReady, Readiness, Ready
from supervise_core.snapshot import Snapshot, check_part_name
from supervise_core.staging import Staging
from supervise_tf.datasets import shuffles_anew
from supervise_tf.inputs import is_end_of_input
from supervise_tf.trackables import (
    array_of,
    contents_of,
    is_container,
    is_optimizer,
    kind_of,
    kinds_of_state,
    leaves,
    put_back,
    take_state,
    uses_state_dict,
    value_of_variable,
)

_log = logging.getLogger(__name__)

_OWN_PART: Final = "tf"

Place = tuple[str, str]
"""A part, and the path of an object in it; the path is empty if the object is the part itself."""


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

    A part is a Keras model, layer, optimizer or metric, a ``tf.Module``, a variable, a ``tf.random.Generator``, a Keras
    ``SeedGenerator``, the iterator of a dataset, a table that changes, or anything else that ``tf.train.Checkpoint``
    can save; a dict, list, tuple or ``tf.train.Checkpoint`` of those; or anything with ``state_dict`` and
    ``load_state_dict``. The global step is the iterations of the first optimizer; ``global_step=`` (a variable, or a
    function of no arguments) decides otherwise.

    What is built late is built on restoring as it was: a model for the same inputs, an optimizer for the same
    variables. An optimizer inside a compiled model is kept only if it is a part: ``optimizer=model.optimizer``.

    The iterator of a dataset (``data=iter(dataset)``) goes on with the very next element, also in the middle of a
    shuffled one: the checkpoint then holds the elements in the shuffle buffer, or, with the option
    ``experimental_symbolic_checkpoint``, where they come from. Either is exact if ``shuffle`` has a seed (its own, or
    ``tf.random.set_seed`` before); without one only the elements come back, and not their order. TensorFlow cannot
    save an iterator over a Python function or generator, or one that draws with ``tf.random.uniform`` and the like
    (``tf.random.stateless_uniform`` is good), or one that shuffles inside ``interleave`` or ``flat_map`` unless it has
    that option; the first checkpoint then fails with ``UnsupportedStateError``, which says so. A dataset that is given
    to ``sv.batches`` as it is begins anew and is drawn from up to the position: exact where it has one order, but one
    that shuffles anew for each pass (``shuffle`` without ``reshuffle_each_iteration=False``) counts its passes in this
    process only. Make ``iter(dataset.repeat())`` a part instead.

    Random states kept: those that are in parts, and those of Python and NumPy. What a TensorFlow op draws without a
    generator is not reachable, and not kept.
    """

    name = "tf"
    recoverable: ClassVar[tuple[type[BaseException], ...]] = (tf.errors.AbortedError, tf.errors.UnavailableError)

    def __init__(self, *, global_step: tf.Variable | Callable[[], int] | None = None, **parts: Any) -> None:
        """
        :raises TypeError: if a part has no state that can be kept.
        :raises ValueError: if a part cannot bear its name.
        """
        if not parts:
            raise TypeError("EagerBackend needs its parts by name: EagerBackend(model=model, optimizer=optimizer)")
        for name, part in parts.items():
            check_part_name(name)
            if name == _OWN_PART:
                raise ValueError(f"the part name {name!r} is taken by the backend itself; choose another one")
            if not leaves(name, part):
                raise TypeError(f"{name}= is empty; there is nothing in it to save")
        self._parts = parts
        self._global_step = global_step
        self._restored: set[Place] = set()
        self._warned = False
        self._warned_of_order = False

    def create_session(self, master: str = "", config: Any = None) -> EagerSession:
        self._restored = set()
        return EagerSession(self._parts, self)

    def init(self, session: EagerSession) -> None:
        """Nothing: variables of TensorFlow and Keras have their first values when they are made."""

    def ready(self, session: EagerSession) -> Readiness:
        unbuilt = [
            _named(place)
            for place, leaf in self._leaves()
            if not (getattr(leaf, "built", True) or is_optimizer(leaf) or place in self._restored)
        ]
        if not unbuilt:
            return Ready()
        return NotReady(f"not built: {', '.join(unbuilt)}; call build(...) on it, or run it once, in init_fn=")

    def is_clean_stop(self, error: BaseException) -> bool:
        return is_end_of_input(error)

    def global_step(self, session: EagerSession) -> int | None:
        counter: Any = self._global_step
        if counter is None:
            counter = next((leaf.iterations for _, leaf in self._leaves() if is_optimizer(leaf)), None)
        if counter is None:
            return None
        read: Any = counter if callable(counter) else counter.numpy
        return int(read())

    def snapshot(self, session: EagerSession, staging: Staging) -> Snapshot:
        self._warn_of_lost_optimizers()
        trees: dict[str, Any] = {name: {} for name in self._parts}
        for (name, path), leaf in self._leaves():
            tree = _tree_of(_named((name, path)), leaf)
            if is_container(self._parts[name]):
                trees[name][path] = tree
            else:
                trees[name] = tree
        for name, tree in trees.items():
            staging.put(name, tree)
        own = {"random": self.random_state(session), "built": self._built_how(), "optimized": self._optimized()}
        staging.put(_OWN_PART, own, per_rank=True)
        return staging.snapshot()

    def load(self, session: EagerSession, parts: Parts) -> None:
        wanted = {*self._parts, _OWN_PART}
        if wanted != set(parts):
            part = min(wanted ^ set(parts))
            where = "in the checkpoint" if part in wanted else "in the program"
            raise IncompatibleCheckpointError(part, [f"it is missing {where}"])
        saved = {name: part.tree() for name, part in parts.items()}
        own = saved[_OWN_PART]
        states = {place: self._state_in(saved, place) for place, _ in self._leaves()}
        unbuilt = {_place(entry) for entry, optimized in own["optimized"] if optimized is None}
        self._build_models(own["built"])
        for place, leaf in self._leaves():
            if not is_optimizer(leaf):
                self._check_fit(place, leaf, states[place])
        self._build_optimizers(own["optimized"])  # only now: what is refused must not have changed the program
        for place, leaf in self._optimizers().items():
            self._check_fit(place, leaf, states[place], is_fresh=place in unbuilt)
        self._put_back_others(states)
        for place, leaf in self._leaves():
            if uses_state_dict(leaf):
                leaf.load_state_dict(states[place])
            else:
                for path, variable in contents_of(leaf).variables.items():
                    if path in states[place]:
                        variable.assign(array_of(states[place][path]))
        for place, leaf in self._leaves():
            if place in unbuilt and _is_built(leaf):
                _reset_slots(leaf, states[place])
        self._restored = set(states)
        if parts[_OWN_PART].is_own:
            self.set_random_state(session, own["random"])

    def batch_source(self, session: EagerSession, data: Any, run_seed: int) -> BatchSource:
        if shuffles_anew(data) and not self._warned_of_order:
            self._warned_of_order = True
            _log.warning(
                "a dataset in sv.batches shuffles anew for each pass, and counts its passes in this process alone: "
                "a resumed run would draw another order, see some elements twice and others not at all. Make "
                "iter(dataset.repeat()) a part, or shuffle with reshuffle_each_iteration=False and a seed."
            )
        return super().batch_source(session, data, run_seed)

    # ---- inside

    def _leaves(self) -> Iterator[tuple[Place, Any]]:
        for name, part in self._parts.items():
            for path, leaf in leaves(name, part).items():
                yield (name, path), leaf

    def _optimizers(self) -> dict[Place, Any]:
        return {place: leaf for place, leaf in self._leaves() if is_optimizer(leaf)}

    def _warn_of_lost_optimizers(self) -> None:
        kept = {id(optimizer) for optimizer in self._optimizers().values()}
        for place, leaf in self._leaves():
            optimizer = getattr(leaf, "optimizer", None)
            if not self._warned and optimizer is not None and is_optimizer(optimizer) and id(optimizer) not in kept:
                self._warned = True
                name = _named(place)
                _log.warning(
                    "%s is compiled with an optimizer that is no part, so its state is not kept; pass optimizer=%s",
                    name,
                    f"{place[0]}.optimizer",
                )

    def _built_how(self) -> list[list[Any]]:
        """What Keras says how each part was built: of those that can be built so again."""
        told: list[list[Any]] = []
        for place, leaf in self._leaves():
            if (
                getattr(leaf, "built", False)
                and hasattr(leaf, "build_from_config")
                and hasattr(leaf, "get_build_config")
            ):
                told.append([list(place), leaf.get_build_config()])
        return told

    def _optimized(self) -> list[list[Any]]:
        """Each optimizer with the places of the variables that it is built for: None if it is not built."""
        places = self._variables_by_identity()
        told: list[list[Any]] = []
        for place, optimizer in self._optimizers().items():
            optimized = getattr(optimizer, "_trainable_variables", ()) if _is_built(optimizer) else None
            found = None if optimized is None else [places.get(id(variable)) for variable in optimized]
            told.append([list(place), found])
        return told

    def _variables_by_identity(self) -> dict[int, list[str]]:
        return {
            id(variable): [*place, name]
            for place, leaf in self._leaves()
            if _gives_variables(leaf)
            for name, variable in contents_of(leaf).variables.items()
        }

    def _build_models(self, told: Iterable[Any]) -> None:
        """Build what is not built here and was when it was saved."""
        here = dict(self._leaves())
        for entry, config in told:
            leaf = here.get(_place(entry))
            if leaf is not None and not getattr(leaf, "built", True) and config is not None:
                leaf.build_from_config(config)

    def _build_optimizers(self, told: Iterable[Any]) -> None:
        """The same for optimizers, each for the variables that it had."""
        variables: dict[tuple[str, ...], Any] = {}
        for place, leaf in self._leaves():
            if _gives_variables(leaf):
                variables |= {(*place, name): variable for name, variable in contents_of(leaf).variables.items()}
        optimizers = self._optimizers()
        for entry, optimized in told:
            optimizer = optimizers.get(_place(entry))
            if optimizer is not None and not _is_built(optimizer) and optimized:
                found = [None if at is None else variables.get(tuple(at)) for at in optimized]
                if all(variable is not None for variable in found):
                    optimizer.build(found)

    def _state_in(self, saved: Mapping[str, Any], place: Place) -> Any:
        name, path = place
        if not is_container(self._parts[name]):
            return saved[name]
        here, there = leaves(name, self._parts[name]), saved[name]
        if not isinstance(there, dict) or here.keys() != there.keys():
            keys = there.keys() if isinstance(there, dict) else set()
            differences = [f"{path!r} is missing" for path in here.keys() - keys]
            differences += [f"{path!r} is unexpected" for path in keys - here.keys()]
            raise IncompatibleCheckpointError(name, sorted(differences))
        return there[path]

    def _check_fit(self, place: Place, leaf: Any, saved: Any, is_fresh: bool = False) -> None:
        """:raises IncompatibleCheckpointError: naming what is missing, unexpected, or of another shape or dtype."""
        if uses_state_dict(leaf):
            return
        differences = _differences(place, leaf, saved) if isinstance(saved, dict) else ["it is of another kind"]
        if is_fresh:  # it was saved before it was built: what it lacks gets its first values
            differences = [difference for difference in differences if not difference.endswith(" is missing")]
        if differences and not getattr(leaf, "built", getattr(leaf, "_built", True)):
            differences.append("it is not built here: build it, or run it once, before the session is opened")
        if differences:
            raise IncompatibleCheckpointError(place[0], differences)

    def _put_back_others(self, states: Mapping[Place, Any]) -> None:
        """All or none of them."""
        done: list[tuple[str, Any, Any]] = []
        for place, leaf in self._leaves():
            for path, other in _others(leaf).items():
                name = _named(place)
                former = take_state(name, other)
                try:
                    put_back(name, other, states[place][_OTHERS + path])
                except ValueError as error:
                    for earlier in done:
                        put_back(*earlier)
                    raise IncompatibleCheckpointError(
                        place[0], [f"{path!r}: {error}" if path else str(error)]
                    ) from error
                done.append((name, other, former))


_OTHERS: Final = "state of "


def _tree_of(name: str, leaf: Any) -> Any:
    if uses_state_dict(leaf):
        return leaf.state_dict()
    contents = contents_of(leaf)
    tree = {path: value_of_variable(variable) for path, variable in contents.variables.items()}
    return tree | {_OTHERS + path: take_state(name, other) for path, other in contents.others.items()}


def _others(leaf: Any) -> dict[str, Any]:
    return {} if uses_state_dict(leaf) else contents_of(leaf).others


def _gives_variables(leaf: Any) -> bool:
    """Whether an optimizer may train variables in it."""
    return not (is_optimizer(leaf) or uses_state_dict(leaf))


def _is_built(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "built", True))


def _reset_slots(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """Give the variables of an optimizer that were not there when it was saved the values that a new one has."""
    fresh = type(optimizer).from_config(optimizer.get_config())
    fresh.build(optimizer._trainable_variables)
    first = contents_of(fresh).variables
    for name, variable in contents_of(optimizer).variables.items():
        if name not in saved:
            variable.assign(first[name].numpy())


def _differences(place: Place, leaf: Any, saved: Mapping[str, Any]) -> list[str]:
    contents = contents_of(leaf)
    here: dict[str, tuple[Any, Any]] = {
        path: (variable.dtype, variable.shape) for path, variable in contents.variables.items()
    }
    there: dict[str, Any] = {path: value for path, value in saved.items() if not path.startswith(_OTHERS)}
    for path, other in contents.others.items():
        kinds = kinds_of_state(_named(place), other)
        here |= {f"{_OTHERS}{path}.{name}": kind for name, kind in kinds.items()}
    for path, state in saved.items():
        if path.startswith(_OTHERS):
            there |= {f"{path}.{name}": value for name, value in state.items()}
    differences = [f"{path!r} is missing" for path in here if path not in there]
    differences += [f"{path!r} is unexpected" for path in there if path not in here]
    for path in here.keys() & there.keys():
        dtype, shape = here[path]
        kind = kind_of(there[path])
        if kind is None:
            differences.append(f"{path!r} is no tensor there")
            continue
        saved_dtype, saved_shape = kind
        if tf.as_dtype(dtype) != saved_dtype:
            differences.append(f"{path!r} has dtype {saved_dtype.name} there and {tf.as_dtype(dtype).name} here")
        elif not tf.TensorShape(shape).is_compatible_with(saved_shape):
            shown = tuple(tf.TensorShape(shape).as_list())
            differences.append(f"{path!r} has shape {saved_shape} there and {shown} here")
    return sorted(differences)


def _place(entry: Sequence[str]) -> Place:
    return entry[0], entry[1]


def _named(place: Place) -> str:
    name, path = place
    return f"{name}/{path}" if path else name
