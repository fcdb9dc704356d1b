"""Index labels: which there are, in range or not, and what stands at the label of each position."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jxent._core.shards import by_compiler, total


def by_index(labels) -> bool:
    """Whether the labels are class indices; otherwise they are class probabilities, or None where there are none."""
    return labels is not None and jnp.issubdtype(labels.dtype, jnp.integer)


def out_of_range(labels, classes):
    return (labels < 0) | (labels >= classes)


def clipped(labels, classes, axis):
    """The labels as a row array of indices that are in range."""
    return jnp.expand_dims(jnp.clip(labels, 0, classes - 1), axis).astype(jnp.int32)


def at_label(values, labels, axis, axis_name=()):
    """The value at each position's label. `labels` is a row array, counted from this shard's first class."""
    if not axis_name:
        return pick(values, labels, axis)
    inside = jnp.clip(labels, 0, values.shape[axis] - 1)
    return total(jnp.where(labels == inside, pick(values, inside, axis), 0), axis_name)


def pick(values, labels, axis):
    """The values at a row array of class indices that are in range."""
    spec = [*jax.typeof(values).sharding.spec]
    spec[axis] = None
    return by_compiler(partial(jnp.take_along_axis, axis=axis, mode="clip"), PartitionSpec(*spec), values, labels)
