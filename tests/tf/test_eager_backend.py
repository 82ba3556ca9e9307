"""The backend for eager TensorFlow and Keras: what it keeps, and that a resumed run is the uninterrupted one."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_core import EverySteps, Supervisor  # noqa: E402
from supervise_core.checkpoint_files import read_checkpoint  # noqa: E402
from supervise_core.checkpoint_format import CheckpointId  # noqa: E402
from supervise_core.directory_store import DirectoryStore  # noqa: E402
from supervise_core.errors import IncompatibleCheckpointError, NotReadyError, UnsupportedStateError  # noqa: E402
from supervise_core.manifest import Manifest  # noqa: E402
from supervise_core.parts import Parts  # noqa: E402
from supervise_core.snapshot_files import write_snapshot  # noqa: E402
from supervise_core.staging import Staging  # noqa: E402
from supervise_core.testing.disks import HastyDisk  # noqa: E402
from supervise_tf import EagerBackend  # noqa: E402
from supervise_tf.inputs import is_end_of_input  # noqa: E402

keras = tf.keras
INPUTS = np.random.default_rng(5).normal(size=(40, 4)).astype(np.float32)
TARGETS = np.random.default_rng(6).integers(0, 3, 40)


@dataclass
class Program:
    """A training program: its parts, one step, and all that training changes, read past the backend."""

    parts: dict[str, Any]
    step: Callable[[], object]
    state: Callable[[], Iterable[Any]]
    init_fn: Callable[[Any], object] | None = None

    def digest(self) -> str:
        found = hashlib.sha256()
        for value in self.state():
            array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
            found.update(repr((str(array.dtype), array.shape)).encode())
            found.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
        return found.hexdigest()


def supervised(make: Callable[[], Program], logdir: Path, steps: int) -> Program:
    program = make()
    sv = Supervisor(
        EagerBackend(**program.parts),
        logdir,
        init_fn=program.init_fn,
        save_every=EverySteps(2),
        summarize_every=None,
        signals=False,
    )
    with sv.managed_session():
        while not sv.should_stop() and sv.global_step < steps:
            program.step()
    return program


def classify(model: Any, optimizer: Any, metrics: tuple[Any, ...] = (), scaled: bool = False) -> Callable[[], None]:
    """A step on a batch that the optimizer's iterations choose."""

    def step() -> None:
        at = int(optimizer.iterations.numpy()) * 8 % 40
        inputs, targets = INPUTS[at : at + 8], TARGETS[at : at + 8]
        with tf.GradientTape() as tape:
            scores = tf.cast(model(inputs, training=True), tf.float32)
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(targets, scores, from_logits=True))
            if scaled:
                loss = optimizer.scale_loss(loss)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        for metric in metrics:
            metric.update_state(targets, tf.nn.softmax(scores))

    return step


def network(dtype: str = "float32") -> Any:
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, dtype=dtype),
            keras.layers.BatchNormalization(dtype=dtype),
            keras.layers.Dropout(0.3, seed=2, dtype=dtype),
            keras.layers.Dense(3, dtype=dtype),
        ]
    )


def of_keras(make_optimizer: Callable[[], Any], dtype: str = "float32", scaled: bool = False) -> Program:
    keras.utils.set_random_seed(0)
    model, optimizer = network(dtype), make_optimizer()
    return Program(
        {"model": model, "optimizer": optimizer},
        classify(model, optimizer, scaled=scaled),
        lambda: [*model.variables, *optimizer.variables],
    )


def adam() -> Program:
    return of_keras(lambda: keras.optimizers.Adam(0.05))


def metrics_of_keras() -> Program:
    keras.utils.set_random_seed(0)
    model, optimizer = network(), keras.optimizers.Adam(0.05)
    metrics = keras.metrics.SparseCategoricalAccuracy(), keras.metrics.SparseTopKCategoricalAccuracy(2)
    return Program(
        {"model": model, "optimizer": optimizer, "accuracy": metrics[0], "more": [metrics[1]]},
        classify(model, optimizer, metrics),
        lambda: [*model.variables, *(variable for metric in metrics for variable in metric.variables)],
    )


def moving_averages_of_weights() -> Program:
    return of_keras(lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=4))


def accumulated_gradients() -> Program:
    return of_keras(lambda: keras.optimizers.AdamW(0.05, gradient_accumulation_steps=2))


def scaled_losses() -> Program:
    """The first steps overflow, are skipped, and halve the scale; later ones double it again."""
    inner = keras.optimizers.Adam
    return of_keras(
        lambda: keras.optimizers.LossScaleOptimizer(inner(0.05), initial_scale=2.0**18, dynamic_growth_steps=2),
        "mixed_float16",
        scaled=True,
    )


def mixed_precision() -> Program:
    return of_keras(lambda: keras.optimizers.Adam(0.05), "mixed_bfloat16")


def decayed_rate() -> Program:
    return of_keras(lambda: keras.optimizers.RMSprop(keras.optimizers.schedules.CosineDecay(0.1, 9), momentum=0.5))


class Late(keras.Model):
    """Built by its first call, as it has no ``build`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = keras.layers.Dense(5, activation="tanh")
        self.scores = keras.layers.Dense(3)

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.scores(self.hidden(inputs))


def built_late(make: Callable[[], Any]) -> Program:
    keras.utils.set_random_seed(0)
    model, optimizer = make(), keras.optimizers.Adam(0.05)
    return Program(
        {"model": model, "optimizer": optimizer},
        classify(model, optimizer),
        lambda: [*model.variables, *optimizer.variables],
        init_fn=lambda session: model(INPUTS[:1]),
    )


def late_subclass() -> Program:
    return built_late(Late)


def late_sequential() -> Program:
    return built_late(lambda: keras.Sequential([keras.layers.Dense(5), keras.layers.Dense(3)]))


def two_of_each() -> Program:
    """Each optimizer must be built for its own model only: the average of weights overwrites all that it knows."""
    keras.utils.set_random_seed(0)
    models = [network(), network()]
    optimizers = [
        keras.optimizers.Adam(0.05, use_ema=True, ema_overwrite_frequency=2),
        keras.optimizers.SGD(0.1, momentum=0.9),
    ]
    steps = [classify(model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)]

    def step() -> None:
        for each in steps:
            each()

    return Program(
        {"first": models[0], "second": models[1], "optimizer": optimizers[0], "other": optimizers[1]},
        step,
        lambda: [variable for part in (*models, *optimizers) for variable in part.variables],
    )


def checkpoint_object() -> Program:
    inner = adam()
    counter = tf.Variable(0, dtype=tf.int64)
    elements = iter(numbers())

    def step() -> None:
        inner.step()
        counter.assign_add(next(elements)[0])

    checkpoint = tf.train.Checkpoint(counter=counter, elements=elements, nested={"all": [*inner.parts.values()]})
    return Program({"checkpoint": checkpoint}, step, lambda: [counter, *inner.state()])


def rooted_checkpoint_object() -> Program:
    inner = adam()
    checkpoint = tf.train.Checkpoint(inner.parts["model"], optimizer=inner.parts["optimizer"])
    return Program({"checkpoint": checkpoint}, inner.step, inner.state)


def numbers(**options: Any) -> Any:
    dataset = tf.data.Dataset.range(100).shuffle(30, seed=4).batch(2).map(lambda number: number + 1).prefetch(2)
    chosen = tf.data.Options()
    for name, value in options.items():
        setattr(chosen, name, value)
    return dataset.repeat().with_options(chosen)


def consumed(dataset: Any, **parts: Any) -> Program:
    elements = iter(dataset)
    total = tf.Variable(0, dtype=tf.int64)
    seen: list[Any] = []

    def step() -> None:
        element = next(elements)
        seen.append(element.numpy())
        total.assign(total * 31 + tf.reduce_sum(element * [1, 3]))

    return Program({"elements": elements, "total": total, **parts}, step, lambda: [total, next(elements)])


def shuffled_elements() -> Program:
    return consumed(numbers())


def symbolically_shuffled_elements() -> Program:
    return consumed(numbers(experimental_symbolic_checkpoint=True))


def elements_shuffled_inside_interleave() -> Program:
    dataset = tf.data.Dataset.range(10).interleave(lambda n: tf.data.Dataset.range(n, n + 9).shuffle(4, seed=2))
    options = tf.data.Options()
    options.experimental_symbolic_checkpoint = True
    return consumed(dataset.batch(2).with_options(options))


def elements_shuffled_from_the_global_seed() -> Program:
    tf.random.set_seed(8)
    return consumed(tf.data.Dataset.range(100).shuffle(20).batch(2))


def tables() -> Program:
    words = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    vectors = tf.lookup.experimental.DenseHashTable(tf.int64, tf.float32, [-1.0, -1.0], -1, -2)
    counter = tf.Variable(0, dtype=tf.int64)

    def step() -> None:
        number = counter.assign_add(1).numpy()
        words.insert(tf.constant([f"word {number}", "b\x00\xff"]), tf.constant([number, number], tf.int64))
        vectors.insert(counter[None], tf.fill((1, 2), float(number)))

    def state() -> list[Any]:
        keys, values = words.export()
        order = np.argsort(keys.numpy())
        return [counter, keys.numpy()[order], values.numpy()[order], vectors.lookup(tf.range(20, dtype=tf.int64))]

    return Program({"words": words, "all": {"vectors": vectors, "counter": counter}}, step, state)


def module_with_all() -> Program:
    """None of these but the first are among the variables of a module."""
    module = tf.Module()
    module.weight = tf.Variable(1.5)
    module.names = tf.Variable(["none", "at all"])
    module.generator = tf.random.Generator.from_seed(3)
    module.table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, -1)
    module.elements = iter(numbers())

    def step() -> None:
        module.weight.assign_add(module.generator.normal(()))
        module.names.assign(tf.strings.as_string(module.generator.normal((2,))))
        element = next(module.elements)
        module.table.insert(element, element + 1)

    return Program(
        {"module": module},
        step,
        lambda: [module.weight, module.names, module.generator.state, *map(np.sort, module.table.export())],
    )


class Noise(keras.layers.Layer):
    """A layer with state that Keras does not count among its variables."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = tf.Variable(1.0)
        self.generator = tf.random.Generator.from_seed(1)
        self.seeds = keras.random.SeedGenerator(4)

    def call(self, inputs: Any) -> Any:
        drawn = self.generator.normal(tf.shape(inputs)) + keras.random.normal((4,), seed=self.seeds)
        self.scale.assign(self.scale + tf.reduce_mean(drawn))
        return inputs + self.scale * drawn


def layer_with_plain_variables() -> Program:
    keras.utils.set_random_seed(0)
    noise = Noise()
    model, optimizer = keras.Sequential([keras.Input((4,)), noise, keras.layers.Dense(3)]), keras.optimizers.Adam(0.1)
    return Program(
        {"model": model, "optimizer": optimizer},
        classify(model, optimizer),
        lambda: [*model.variables, noise.scale, noise.generator.state, noise.seeds.state],
    )


def seed_generators() -> Program:
    seeds, others = keras.random.SeedGenerator(3), [keras.random.SeedGenerator(4), tf.random.Generator.from_seed(1)]
    total = keras.Variable(0.0)

    def step() -> None:
        drawn = [keras.random.normal((), seed=each) for each in (seeds, others[0])]
        total.assign_add(tf.add_n([*drawn, others[1].normal(())]))

    return Program(
        {"seeds": seeds, "others": tuple(others), "total": total},
        step,
        lambda: [total, seeds.state, *(other.state for other in others)],
    )


PROGRAMS = [
    adam, metrics_of_keras, moving_averages_of_weights, accumulated_gradients, scaled_losses, mixed_precision,
    decayed_rate, late_subclass, late_sequential, two_of_each, checkpoint_object, rooted_checkpoint_object,
    shuffled_elements, symbolically_shuffled_elements, elements_shuffled_inside_interleave,
    elements_shuffled_from_the_global_seed, tables, module_with_all, layer_with_plain_variables, seed_generators,
]  # fmt: skip


@pytest.mark.parametrize("make", PROGRAMS)
def test_a_run_that_is_resumed_twice_equals_one_without_a_supervisor(
    make: Callable[[], Program], tmp_path: Path
) -> None:
    alone = make()
    step = EagerBackend(**alone.parts)
    rounds = 0
    while (rounds if (made := step.global_step(step.create_session())) is None else made) < 5:
        alone.step()
        rounds += 1
    supervised(make, tmp_path, 0)  # leaves the first checkpoint only, of a program that made no step
    supervised(make, tmp_path, 2)
    assert supervised(make, tmp_path, 5).digest() == alone.digest()


# ---- what is refused


def saved(program: Program, logdir: Path) -> Parts:
    backend = EagerBackend(**program.parts)
    session = backend.create_session()
    backend.init(session)
    store = DirectoryStore(logdir, disk=HastyDisk())
    snapshot = backend.snapshot(session, Staging())
    with store.writing():
        draft = store.begin(CheckpointId(0, 0))
        files = write_snapshot(draft, snapshot, None).files
        draft.commit(Manifest(step=0, backend=backend.name, wall_time=0.0, parts=tuple(snapshot.parts), files=files))
    with store.open(store.checkpoints()[-1]) as reader:
        return {name: part.held() for name, part in read_checkpoint(reader).parts.items()}


def restore(parts: Parts, **here: Any) -> None:
    backend = EagerBackend(**here)
    backend.load(backend.create_session(), parts)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (object(), "a object cannot be saved"),
        (np.zeros(3), "a ndarray cannot be saved"),
        (tf.constant(1.0), "cannot be saved"),
        (tf.data.Dataset.range(3), r"iter\(dataset\)"),
        (tf.function(lambda x: x), "cannot be saved"),
        ({}, "empty"),
        (tf.train.Checkpoint(), "empty"),
        ({"good": tf.Variable(1), "epoch": 3}, r"part\['epoch'\]= has neither"),
        ([tf.Variable(1), [tf.Variable(1), None]], r"part\[1\]\[1\]= has neither"),
        ({1: tf.Variable(1), "1": tf.Variable(1)}, "same path"),
    ],
)
def test_what_cannot_be_saved_is_refused_when_it_is_named(part: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        EagerBackend(part=part)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tf.data.Dataset.from_generator(lambda: [1], output_signature=tf.TensorSpec((), tf.int32)), "stateful"),
        (lambda: tf.data.Dataset.range(3).map(lambda n: tf.random.uniform(())), "RandomUniform is stateful"),
    ],
)
def test_an_iterator_that_tensorflow_cannot_save_is_named(make: Callable[[], Any], said: str) -> None:
    backend = EagerBackend(data={"train": iter(make())})
    with pytest.raises(UnsupportedStateError, match=f"data/train.*: [^{{]*{said}"):
        backend.snapshot(backend.create_session(), Staging())


def test_what_does_not_fit_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    def parts(**changed: Any) -> dict[str, Any]:
        table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, -1)
        table.insert([1], [changed.pop("value", 1)])
        good = {"w": tf.Variable([1.0, 2.0]), "data": iter(tf.data.Dataset.range(9).batch(2)), "table": table}
        return {"first": tf.Variable(1.0), "more": good | changed}

    kept = saved(Program(parts(value=7), lambda: None, list), tmp_path)

    def shuffled() -> Any:
        """Made anew, since each iterator over one dataset gets another order."""
        return iter(tf.data.Dataset.range(9).shuffle(3, seed=1).batch(2))

    other_table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, -1.0)
    cases = [
        ({"w": tf.Variable([1.0])}, r"'value' has shape \(2,\) there and \(1,\) here"),
        ({"w": tf.Variable([1, 2])}, "'value' has dtype float32 there and int32 here"),
        ({"w": tf.Variable(["a", "b"])}, "'value' has dtype float32 there and string here"),
        ({"new": tf.Variable(1)}, "'new' is missing"),
        ({"table": other_table}, "table-values' has dtype int64 there and float32 here"),
        ({"table": tf.Variable(1.0)}, "'state of .table-keys' is unexpected"),
        ({"data": shuffled()}, "Failed to restore dataset iterator"),
    ]
    for changed, said in cases:
        here = parts(value=5, **changed)
        here["first"].assign(3.0)
        next(here["more"]["data"])
        with pytest.raises(IncompatibleCheckpointError, match=said):
            restore(kept, **here)
        assert here["first"].numpy() == 3.0
        untouched = shuffled() if "data" in changed else parts()["more"]["data"]
        assert [*map(bytes, here["more"]["data"])] == [*map(bytes, untouched)][1:]
        if isinstance(here["more"]["table"], type(other_table)) and here["more"]["table"] is not other_table:
            assert here["more"]["table"].lookup([1]).numpy().tolist() == [5]
    here = parts(value=5)
    restore(kept, **here)
    assert here["more"]["table"].lookup([1]).numpy().tolist() == [7]


def test_a_variable_of_any_shape_takes_what_was_saved(tmp_path: Path) -> None:
    parts = [{"v": tf.Variable(start, shape=tf.TensorShape(None))} for start in ([1.0, 2.0, 3.0], 0.0)]
    restore(saved(Program(parts[0], lambda: None, list), tmp_path), **parts[1])
    assert parts[1]["v"].numpy().tolist() == [1.0, 2.0, 3.0]


def test_a_model_that_nothing_builds_is_named(tmp_path: Path) -> None:
    sv = Supervisor(EagerBackend(encoder=Late(), optimizer=keras.optimizers.Adam()), tmp_path, signals=False)
    with pytest.raises(NotReadyError, match="not built: encoder; call build"), sv.managed_session():
        pass


def test_the_first_checkpoint_can_be_restored_into_objects_that_have_trained(tmp_path: Path) -> None:
    """As a retry in one process does: the optimizers were not built when it was written."""
    program, reference = two_of_each(), two_of_each()
    parts = saved(program, tmp_path)
    for _ in range(3):
        program.step()
    restore(parts, **program.parts)
    program.step()
    reference.step()
    assert program.digest() == reference.digest()


def test_the_optimizer_of_a_compiled_model_that_is_no_part_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    model.compile("adam", "mse")
    with caplog.at_level(logging.WARNING, "supervise_tf"):
        saved(Program({"model": model, "optimizer": model.optimizer}, lambda: None, list), tmp_path / "both")
        assert not caplog.messages
        saved(Program({"model": model}, lambda: None, list), tmp_path / "one")
    assert ["optimizer=model.optimizer" in message for message in caplog.messages] == [True]


# ---- the step


def test_the_step_is_that_of_the_first_optimizer_wherever_it_is(tmp_path: Path) -> None:
    program = two_of_each()
    backend = EagerBackend(all={"models": [program.parts["first"]], "o": program.parts["other"]}, second=program.parts)
    program.parts["other"].iterations.assign(41)
    assert backend.global_step(backend.create_session()) == 41
    given = EagerBackend(global_step=tf.Variable(7), **program.parts)
    assert given.create_session().global_step == 7
    assert EagerBackend(global_step=lambda: 8, v=tf.Variable(1)).create_session().global_step == 8
    assert EagerBackend(v=tf.Variable(1)).global_step(given.create_session()) is None


def test_asking_for_the_step_reads_one_variable_and_nothing_else() -> None:
    class Iterations:
        """Stands in for a variable and notes how often it is read."""

        reads = 0

        def numpy(self) -> int:
            self.reads += 1
            return 3

    class Optimizer:
        built = True
        variables = ()

        def __init__(self) -> None:
            self.iterations = Iterations()

        def apply_gradients(self, pairs: object) -> None:
            raise AssertionError("the step was only asked for")

    class Watched(tf.Module):
        @property
        def variables(self) -> Any:
            nonlocal looked
            looked += 1
            return ()

    looked = 0
    optimizer = Optimizer()
    backend = EagerBackend(optimizer=optimizer, model=Watched())
    session = backend.create_session()
    looked = 0
    assert [backend.global_step(session) for _ in range(5)] == [3] * 5
    assert optimizer.iterations.reads == 5
    assert looked == 0


# ---- the end of the input


def raised_by(function: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def ends_of_input(path: Path) -> dict[str, tuple[Callable[[], object], bool]]:
    """What raises, and whether it is the end of the input."""
    elements = iter(tf.data.Dataset.range(0))
    queue = tf.queue.FIFOQueue(2, [tf.int32])
    queue.close()
    prefix = str(path / "short")
    tf.train.Checkpoint(v=tf.Variable(tf.zeros(9000))).write(prefix)
    data = Path(f"{prefix}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:100])

    def read() -> Any:
        return tf.raw_ops.RestoreV2(
            prefix=prefix,
            tensor_names=["v/.ATTRIBUTES/VARIABLE_VALUE"],
            shape_and_slices=[""],
            dtypes=[tf.float32],
        )

    def own() -> None:
        raise tf.errors.OutOfRangeError(None, None, "no more files")

    def many() -> Any:
        total = tf.constant(0, tf.int64)
        for _ in tf.range(3):
            total += next(elements)
        return total

    def bare(error: BaseException) -> None:
        raise error

    return {
        "iterator": (lambda: elements.get_next(), True),
        "iterator in a function": (tf.function(lambda: elements.get_next() + 1), True),
        "iterator in a loop in a function": (tf.function(many), True),
        "queue": (queue.dequeue, True),
        "queue in a function": (tf.function(queue.dequeue), True),
        "the program itself": (own, True),
        "a file": (read, False),
        "a file in a function": (tf.function(read), False),
        "a file in a dataset": (lambda: iter(tf.data.Dataset.range(1).map(lambda n: read())).get_next(), False),
        "another error": (lambda: bare(tf.errors.DataLossError(None, None, "End of sequence")), False),
        "no error of TensorFlow": (lambda: bare(OSError(errno.EIO, "End of sequence")), False),
    }


def test_only_the_end_of_an_input_ends_a_run_well(tmp_path: Path) -> None:
    backend = EagerBackend(v=tf.Variable(1))
    found = {name: raised_by(raises) for name, (raises, _) in ends_of_input(tmp_path).items()}
    expected = {name: good for name, (_, good) in ends_of_input(tmp_path).items()}
    assert {name: backend.is_clean_stop(error) for name, error in found.items()} == expected
    assert {name: is_end_of_input(error) for name, error in found.items()} == expected


def test_a_run_whose_input_ends_is_saved_and_ends_well(tmp_path: Path) -> None:
    total = tf.Variable(0, dtype=tf.int64)
    elements = iter(tf.data.Dataset.range(1, 6))
    sv = Supervisor(EagerBackend(total=total, elements=elements), tmp_path, signals=False, summarize_every=None)
    add = tf.function(lambda: total.assign_add(elements.get_next()))
    with sv.managed_session():
        while not sv.should_stop():
            add()
    assert total.numpy() == 15
    assert sv.report.exit_status == 0
    again = tf.Variable(0, dtype=tf.int64)
    sv = Supervisor(
        EagerBackend(total=again, elements=iter(tf.data.Dataset.range(1, 6))),
        tmp_path,
        signals=False,
        summarize_every=None,
    )
    with sv.managed_session():
        pass
    assert again.numpy() == 15


SHUFFLED = {
    "in its order": (lambda data: data.batch(2), False),
    "once and for all": (lambda data: data.shuffle(4, seed=1, reshuffle_each_iteration=False).batch(2), False),
    "anew for each pass": (lambda data: data.shuffle(4, seed=1).batch(2), True),
    "inside of an interleave": (lambda data: data.interleave(lambda _: data.shuffle(2)), True),
}


@pytest.mark.parametrize("how", SHUFFLED)
def test_a_dataset_whose_order_cannot_be_drawn_again_is_told_of(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shuffle, is_told = SHUFFLED[how]
    sv = Supervisor(EagerBackend(v=tf.Variable(1)), tmp_path, signals=False, summarize_every=None)
    with sv.managed_session():
        for epoch in sv.epochs(2):
            for _ in sv.batches(shuffle(tf.data.Dataset.range(6))):
                assert epoch in (0, 1)
    told = [record.getMessage() for record in caplog.records if "would draw another order" in record.getMessage()]
    assert len(told) == is_told
