"""From the positions' costs to the loss: which positions count, what they weigh, and what the mean divides by.

Plain JAX, so that weights, masks and denominators have their true gradients without a rule of their own.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jxent._labels import by_index
from jxent._rows import compute_dtype
from jxent._shards import by_compiler, offset, total


def counted(labels, where, ignore_index, shape, placed):
    """The positions that count, a boolean array of `shape`, or None where all do.

    `placed` shards an array of the positions as the logits or hidden states are, see `along_positions`; index labels
    are so already.
    """
    keep = None
    if by_index(labels) and _holds(labels.dtype, ignore_index):
        keep = labels != labels.dtype.type(ignore_index)  # as it is, one beyond an int32 would overflow
    if where is None:
        return keep
    where = placed(jnp.broadcast_to(where, shape))
    return where if keep is None else keep & where


def _holds(dtype, value):
    info = jnp.iinfo(dtype)
    return info.min <= value <= info.max


def weight_of(labels, class_weight, keep, shards, first):
    """The class weight of each index label that counts; None without class weights, or for class probabilities."""
    if class_weight is None or not by_index(labels):
        return None
    # At least float32: the sums over positions and their gradients are taken in this dtype.
    class_weight = class_weight.astype(compute_dtype(class_weight.dtype))
    index = offset(labels, first)
    inside = jnp.clip(index, 0, class_weight.size - 1)
    weight = by_compiler(lambda w, i: w[i], jax.typeof(labels).sharding.spec, class_weight, inside)
    if first is not None:
        weight = total(jnp.where(index == inside, weight, 0), shards.axis_name)
    return only(keep, weight)


def weighted(weight, costs):
    """weight * costs, with 0 * inf = 0; None weighs nothing."""
    if weight is None:
        return costs
    # Selected before the product, so that the gradient with respect to a weight of 0 is the cost, unless that is
    # infinite.
    return weight * jnp.where((weight == 0) & (costs == jnp.inf), 0, costs)


def only(keep, values, other=0):
    """`values` at the positions that count, `other` elsewhere, whatever the values are there."""
    return values if keep is None else jnp.where(keep, values, other)


class Coefficients(NamedTuple):
    """What multiplies the costs of the same names; None multiplies nothing."""

    label: Array | None = None
    uniform: Array | None = None
    z: Array | None = None


def weigh(coefficients, costs):
    """The losses of the positions: each cost times its coefficient, added up."""
    pairs = zip(coefficients, costs, strict=False)
    return functools.reduce(jnp.add, [weighted(c, cost) for c, cost in pairs if cost is not None])


def share_of(sample_weight, keep, shape, placed):
    """The sample weights in full, 0 where a position does not count; None for None. `placed` as in `counted`."""
    if sample_weight is None:
        return None
    sample_weight = sample_weight.astype(compute_dtype(sample_weight.dtype))
    return only(keep, placed(jnp.broadcast_to(sample_weight, shape)))


def product_of(*factors):
    """The product of those that are not None; None if all are."""
    factors = [factor for factor in factors if factor is not None]
    return functools.reduce(operator.mul, factors) if factors else None


def denominator(label_weight, share, keep, shape, dtype, axis_name=()):
    """What the mean divides by: the weights of the positions that count, or their number; over all shards."""
    weight = product_of(label_weight, share)
    if weight is not None:
        return total(jnp.sum(weight), axis_name)
    # An integer sum: one of float32 ones may stop at 2**24.
    ones = jnp.ones(shape, jnp.int32) if keep is None else keep.astype(jnp.int32)
    return total(jnp.sum(ones), axis_name).astype(dtype)


def mean(loss, weight):
    """The mean of nothing is nan, with a gradient of 0."""
    return jnp.where(weight == 0, jnp.nan, loss / jnp.where(weight == 0, 1, weight))


def reduce(losses, weight, reduction, axis_name=()):
    """The loss; for a mean and a sum, over the positions of all shards."""
    if reduction == "none":
        return losses
    loss = total(jnp.sum(losses), axis_name)
    return mean(loss, weight) if reduction == "mean" else loss
