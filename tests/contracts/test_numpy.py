"""The NumPy backend keeps the contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from supervise_core.testing.backend_contract import BackendContract, Program
from supervise_numpy import ArrayBackend, ArraySession


class TestArrayBackend(BackendContract):
    def program(self) -> Program:
        np.random.seed(0)
        rng, old = np.random.default_rng(0), np.random.RandomState(1)
        arrays = {
            "w": rng.normal(size=(3, 4)),
            "fortran": np.asfortranarray(rng.normal(size=(2, 3)).astype(np.float32)),
            "every_other": np.arange(10, dtype=np.int16)[::2],
            "big_endian": np.arange(3, dtype=">f8"),
            "scalar": np.array(2.5, np.float16),
            "empty": np.zeros((0, 5), np.float32),
            "flags": np.array([True, False]),
            "phase": np.array([1 + 2j], np.complex128),
        }

        def train(session: ArraySession) -> None:
            for array in arrays.values():
                if array.dtype.kind in "fc":
                    array += rng.normal(size=array.shape) + np.random.normal() + old.normal()
            arrays["every_other"] += 1
            np.logical_not(arrays["flags"], out=arrays["flags"])
            session.global_step += 1

        return Program(ArrayBackend(arrays, rng=rng, old=old), train, lambda: arrays)


class TestArrayBackendThatCountsNothing(BackendContract):
    unsupported: ClassVar[Mapping[str, str]] = {"random state": "this program draws nothing"}

    def program(self) -> Program:
        arrays = {"w": np.arange(6.0).reshape(2, 3)}

        def train(session: ArraySession) -> None:
            arrays["w"] *= 1.5

        return Program(ArrayBackend(arrays), train, lambda: arrays)
