"""The backend for eager TensorFlow keeps the contract."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")

from supervise_core.testing.backend_contract import BackendContract, Program  # noqa: E402
from supervise_tf import EagerBackend, EagerSession  # noqa: E402


class TestEagerBackend(BackendContract):
    def program(self) -> Program:
        keras = tf.keras
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(6), keras.layers.BatchNormalization(),
             keras.layers.Dropout(0.5, seed=1), keras.layers.Dense(3)]
        )  # fmt: skip
        optimizer = keras.optimizers.Adam(0.05)
        extra = tf.Module()
        extra.scale = tf.Variable(1.5, dtype=tf.float64)
        extra.nothing = tf.Variable(tf.zeros((0, 3)))
        extra.brief = tf.Variable(tf.reshape(tf.cast(tf.range(6), tf.bfloat16), (2, 3)))
        generator = tf.random.Generator.from_seed(3)

        def train(session: EagerSession) -> None:
            inputs = generator.normal((8, 4)) + np.float32(np.random.normal()) + random.random()
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(inputs, training=True)))
            optimizer.apply_gradients(
                zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
            )
            extra.scale.assign_add(0.25)
            extra.brief.assign_add(tf.ones_like(extra.brief))

        def raw() -> dict[str, Any]:
            variables = [*model.variables, *optimizer.variables, *extra.variables, generator.state]
            return {str(number): variable.numpy() for number, variable in enumerate(variables)}

        parts = {"model": model, "optimizer": optimizer, "extra": extra, "generator": generator}
        return Program(EagerBackend(**parts), train, raw)

    def program_that_is_not_ready(self) -> Program:
        model = tf.keras.Sequential([tf.keras.layers.Dense(3)])
        return Program(EagerBackend(model=model), lambda session: None, dict)


class TestEagerBackendWithTrackables(BackendContract):
    """State that only a checkpoint of TensorFlow holds, which goes through a scratch directory."""

    def program(self) -> Program:
        tf.keras.utils.set_random_seed(0)
        table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, [0.0, 0.0])
        words = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
        elements = iter(tf.data.Dataset.range(50).shuffle(20, seed=1).batch(2).repeat())
        module = tf.Module()
        module.matrix = tf.Variable(tf.reshape(tf.range(6.0), (2, 3)))
        module.nothing = tf.Variable(tf.zeros((0, 3)))
        module.count = tf.Variable(0, dtype=tf.int64)
        module.names = tf.Variable(["", "none"])
        module.table, module.elements = table, elements
        generators = [tf.random.Generator.from_seed(3), tf.keras.random.SeedGenerator(4)]

        def train(session: EagerSession) -> None:
            element = next(elements)
            drawn = generators[0].normal((2, 3)) + tf.keras.random.normal((2, 3), seed=generators[1])
            module.matrix.assign_add(drawn + np.float32(np.random.normal() + random.random()))
            module.count.assign(module.count * 7 + tf.reduce_sum(element * [1, 3]))
            module.names.assign(tf.strings.as_string(element))
            table.insert(element, module.matrix[:, :2])
            words.insert(module.names.value(), element)

        def raw() -> dict[str, Any]:
            variables = [module.matrix, module.nothing, module.count, *(generator.state for generator in generators)]
            keys, rows = (exported.numpy() for exported in table.export())
            texts = [module.names.numpy().tolist(), *sorted(words.export()[0].numpy().tolist())]
            return {
                **{str(number): variable.numpy() for number, variable in enumerate(variables)},
                "keys": np.sort(keys),
                "rows": rows[np.argsort(keys)],
                "texts": repr(texts),
                "numbers": np.sort(words.export()[1].numpy()),
            }

        parts = {"model": module, "rest": {"words": words, "generators": generators}}
        return Program(EagerBackend(**parts), train, raw)
