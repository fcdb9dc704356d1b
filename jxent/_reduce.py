"""From the positions' costs to the loss: which positions count, what they weigh, and what the mean divides by.

Plain JAX, so that weights, masks and denominators have their true gradients without a rule of their own.
"""

import jax.numpy as jnp

from jxent._labels import by_index
from jxent._rows import compute_dtype


def counted(labels, where, ignore_index, shape):
    """The positions that count, a boolean array of `shape`, or None where all do."""
    keep = None
    if by_index(labels) and _holds(labels.dtype, ignore_index):
        keep = labels != ignore_index
    if where is None:
        return keep
    where = jnp.broadcast_to(where, shape)
    return where if keep is None else keep & where


def _holds(dtype, value):
    info = jnp.iinfo(dtype)
    return info.min <= value <= info.max


def weight_of(labels, class_weight, keep):
    """The class weight of each index label that counts; None without class weights, or for class probabilities."""
    if class_weight is None or not by_index(labels):
        return None
    # At least float32: the sums over positions and their gradients are taken in this dtype.
    class_weight = class_weight.astype(compute_dtype(class_weight.dtype))
    return only(keep, class_weight[jnp.clip(labels, 0, class_weight.size - 1)])


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


def reduce(losses, keep, label_weight, sample_weight, reduction):
    """(loss, weight): the positions' losses reduced, and the denominator of the mean.

    `losses` are weighted by class already and 0 where a position does not count; `label_weight` is the weight of each
    position's class, or None. The mean of nothing is nan, with a gradient of 0.
    """
    weight = label_weight
    if sample_weight is not None:
        sample_weight = sample_weight.astype(compute_dtype(sample_weight.dtype))
        sample_weight = only(keep, jnp.broadcast_to(sample_weight, losses.shape))
        losses = weighted(sample_weight, losses)
        weight = sample_weight if weight is None else weight * sample_weight
    if weight is not None:
        weight = jnp.sum(weight)
    else:
        # An integer sum: one of float32 ones may stop at 2**24.
        ones = jnp.ones(losses.shape, jnp.int32) if keep is None else keep.astype(jnp.int32)
        weight = jnp.sum(ones).astype(losses.dtype)
    if reduction == "none":
        return losses, weight
    loss = jnp.sum(losses)
    if reduction == "mean":
        loss = jnp.where(weight == 0, jnp.nan, loss / jnp.where(weight == 0, 1, weight))
    return loss, weight
