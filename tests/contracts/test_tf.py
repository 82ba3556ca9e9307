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
