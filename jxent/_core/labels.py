"""Index labels: which there are, in range or not, and what stands at the label of each position.

A position has one of them, or the entries of a sparse label: k class indices along the class axis, with a probability
each. An index counts from this shard's first class.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import ScatterDimensionNumbers, scatter_add
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from jxent._core.shards import by_compiler, partitions, total


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


class SparseLabels(NamedTuple):
    """Labels of k classes for each position, with their probabilities: a teacher's top k, or several right answers.

    The loss is that of class probabilities that are 0 elsewhere, which are never written. Classes may repeat, and their
    probabilities add up. An entry of probability 0 counts for nothing, whatever its index, and an index out of range of
    any other makes its position NaN. Probabilities need not sum to 1: what is missing is missing from the loss.
    """

    indices: Int[Array | np.ndarray, "*positions k"]
    """Class indices. A position whose indices all equal `ignore_index` is left out."""
    probabilities: Float[Array | np.ndarray, "*positions k"]
    """Label probabilities, which have their gradient."""


jax.export.register_namedtuple_serialization(SparseLabels, serialized_name="jxent.SparseLabels")


def parts(labels):
    """(class indices, class probabilities, or those of sparse labels; the indices of these, or None)."""
    if not isinstance(labels, SparseLabels):
        return labels, None
    return jnp.asarray(labels.probabilities), jnp.asarray(labels.indices)


class Entries(NamedTuple):
    """The entries of sparse labels. Arrays of the logits' shape, but with k entries along the class axis."""

    class_index: Array  # or out of range for one of another shard or for none
    probability: Array

    def at(self, values, axis):
        """The values at the entries; any others for a class that this shard does not have."""
        return pick(values, jnp.clip(self.class_index, 0, values.shape[axis] - 1), axis)

    def here(self, values, classes):
        """Values at the entries, 0 where an entry's class is not among these of this shard."""
        return jnp.where(out_of_range(self.class_index, classes), 0, values)

    def add_to(self, array, values, axis):
        """The array plus the values at the entries, each added where its class is, if that is one of this shard's."""
        values = self.here(values, array.shape[axis]).astype(array.dtype)
        index = jnp.clip(self.class_index, 0, array.shape[axis] - 1)[..., None]
        positions = tuple(a for a in range(array.ndim) if a != axis)
        dimensions = ScatterDimensionNumbers((), (axis,), (axis,), positions, positions)
        add = partial(scatter_add, dimension_numbers=dimensions, mode="promise_in_bounds")
        return by_compiler(add, jax.typeof(array).sharding.spec, array, index, values)


def pick(values, labels, axis):
    """The values at a row array of class indices that are in range."""
    spec = [*partitions(values)]
    spec[axis] = None
    return by_compiler(partial(jnp.take_along_axis, axis=axis, mode="clip"), PartitionSpec(*spec), values, labels)


def rounding_of(dtype):
    """By how much probabilities, or their sum, may miss what they should be."""
    return max(1e-3, 4 * float(jnp.finfo(dtype).eps))


def is_no_share(labels):
    """Where a floating-point label is outside of [0, 1], by more than rounding."""
    rounding = rounding_of(labels.dtype)
    return (labels < -rounding) | (labels > 1 + rounding)
