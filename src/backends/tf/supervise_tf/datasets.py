"""What a ``tf.data.Dataset`` tells of the order of its elements."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def shuffles_anew(data: Any) -> bool:
    """Whether it is a dataset that draws another order for each pass, which no resumed run can draw again."""
    if not isinstance(data, tf.data.Dataset):
        return False
    variant = tf.data.experimental.to_variant(data)
    graph = tf.compat.v1.GraphDef.FromString(tf.raw_ops.DatasetToGraphV2(input_dataset=variant).numpy())
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return any(node.op.startswith("Shuffle") and node.attr["reshuffle_each_iteration"].b for node in nodes)
