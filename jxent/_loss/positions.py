"""The positions of a loss: which of them count, what they weigh, and what the mean divides by.

Plain JAX, so that weights, masks and denominators have their true gradients without a rule of their own.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jxent._core import costs
from jxent._core.labels import by_index, parts
from jxent._core.passes import compute_dtype
from jxent._core.shards import at_positions, first_class, local_index, sharded_as_positions, total
from jxent._core.weights import only, product_of
from jxent._loss.options import scalars_of


class Positions(NamedTuple):
    """What is known of the positions before any logit is read. But for `first`, arrays of the positions' shape."""

    labels: Array  # class indices, 0 where a position does not count; or probabilities, with an axis of them
    keep: Array | None  # False where a position does not count; None if all do
    label_weight: Array | None  # the class weight of an index label; None for 1. Weights are 0 where nothing counts
    sample_weight: Array | None
    first: Array | None  # the class that this shard begins with, see `first_class`
    indices: Array | None = None  # of sparse labels, whose probabilities are `labels`


def positions_of(options, weights, labels, array, axis, classes) -> Positions:
    """The positions are the axes of `array`, logits or hidden states, but for `axis`; the classes are this shard's."""
    labels, indices = parts(labels)
    shards, shape = options.form.shards, array.shape[:axis] + array.shape[axis + 1 :]
    as_positions = partial(sharded_as_positions, other=array, axis=axis)
    if by_index(labels):
        labels = as_positions(labels)
    where = None if weights.where is None else as_positions(jnp.broadcast_to(weights.where, shape))
    keep = _counted(labels if indices is None else indices, where, options.ignore_index, indices is not None)
    if by_index(labels):
        labels = only(keep, labels)  # 0 where ignored: in range
    sample_weight = weights.sample_weight
    if sample_weight is not None:
        sample_weight = sample_weight.astype(compute_dtype(sample_weight.dtype))
        sample_weight = only(keep, as_positions(jnp.broadcast_to(sample_weight, shape)))
    first = first_class(shards, classes)
    label_weight = _label_weight(labels, weights.class_weight, keep, shards, first)
    return Positions(labels, keep, label_weight, sample_weight, first, indices)


def _counted(labels, where, ignore_index, sparse):
    """The positions that count, or None where all do. Of a sparse label that is to be ignored, all indices say so."""
    if not by_index(labels) or ignore_index is None or not _holds(labels.dtype, ignore_index):
        return where
    keep = labels != labels.dtype.type(ignore_index)  # as it is, one beyond an int32 would overflow
    keep = jnp.any(keep, -1) if sparse else keep
    return keep if where is None else keep & where


def _holds(dtype, value):
    info = jnp.iinfo(dtype)
    return info.min <= value <= info.max


def _label_weight(labels, class_weight, keep, shards, first):
    """The class weight of each index label that counts; None without class weights, or for class probabilities."""
    if class_weight is None or not by_index(labels):
        return None
    # At least float32: the sums over positions and their gradients are taken in this dtype.
    class_weight = class_weight.astype(compute_dtype(class_weight.dtype))
    index = local_index(labels, first)
    inside = jnp.clip(index, 0, class_weight.size - 1)
    weight = at_positions(class_weight, inside)
    if first is not None:
        weight = total(jnp.where(index == inside, weight, 0), shards.axis_name)
    return only(keep, weight)


def coefficients_of(options, weights, positions):
    """What multiplies the costs, by name; the mean's denominator is left to the end."""
    scalars = scalars_of(options, weights)
    return costs.coefficients(options.form, scalars, positions.sample_weight, positions.label_weight)


def denominator(options, positions, shape, dtype):
    """What the mean divides by: the weights of the positions that count, or their number; over all shards."""
    weight = product_of(positions.label_weight, positions.sample_weight)
    if weight is not None:
        return total(jnp.sum(weight), options.batch_axis_name)
    return number(options, positions, shape).astype(dtype)


def number(options, positions, shape):
    """How many positions count, over all shards. An integer sum: one of float32 ones may stop at 2**24."""
    ones = jnp.ones(shape, jnp.int32) if positions.keep is None else positions.keep.astype(jnp.int32)
    return total(jnp.sum(ones), options.batch_axis_name)


def reduced(options, losses, weight):
    """The loss: that of each position, or their sum over all shards, or that divided by the weight.

    The mean of nothing is nan, with a gradient of 0.
    """
    if options.reduction == "none":
        return losses
    loss = total(jnp.sum(losses), options.batch_axis_name)
    if options.reduction == "sum":
        return loss
    return jnp.where(weight == 0, jnp.nan, loss / jnp.where(weight == 0, 1, weight))
