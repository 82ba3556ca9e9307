"""What the TensorFlow programs have in common: modes, kinds of variables, and how they say facts and hashes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import tensorflow as tf

v1 = tf.compat.v1


def enter(mode: str) -> None:
    """Put TensorFlow into a mode, for the rest of the process."""
    v1.logging.set_verbosity(v1.logging.ERROR)
    if mode == "v1":
        v1.disable_v2_behavior()
    elif mode == "no eager":
        v1.disable_eager_execution()


def variable(name: str, initial: Any, kind: str, **options: Any) -> Any:
    """A variable of that kind, with the value of a constant."""
    return v1.get_variable(name, initializer=tf.constant(initial), use_resource=kind == "resource", **options)


def global_step(kind: str) -> Any:
    """A global step of that kind."""
    collections = [v1.GraphKeys.GLOBAL_VARIABLES, v1.GraphKeys.GLOBAL_STEP]
    return v1.get_variable(
        "global_step", (), tf.int64, initializer=v1.zeros_initializer(), trainable=False,
        use_resource=kind == "resource", collections=collections,
    )  # fmt: skip


def hash_of(session: Any, variables: list[Any]) -> str:
    """One hash over names and values."""
    sha = hashlib.sha256()
    for one, value in sorted(zip((one.op.name for one in variables), session.run(variables), strict=True)):
        sha.update(one.encode() + value.tobytes())
    return sha.hexdigest()


def say(**facts: Any) -> None:
    """Print a line of JSON."""
    print(json.dumps(facts), flush=True)
