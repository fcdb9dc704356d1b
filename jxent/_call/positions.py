"""The positions of a loss: their mask, their weights, and the mean's denominator.

This is plain JAX, so that weights, masks and denominators have their true gradients without a derivative rule.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jxent._call.options import Options, Weights, scalars_of
from jxent._core.dtypes import compute_dtype
from jxent._core.shards import class_offset, sharded_as_positions, total
from jxent._core.weights import only, product_of
from jxent._labels.labels import Labels
from jxent._rows.costs import Coefficient


class Positions(NamedTuple):
    """Labels, mask and weights of the positions, before any logit is read; a weight of None stands for 1."""

    labels: Labels | None  # in range at masked positions
    mask: Bool[Array, "*positions"] | None  # False at masked positions; None if all are unmasked
    label_weight: Float[Array, "*positions"] | None  # see `Labels.label_weight`; weights are 0 at masked positions
    sample_weight: Float[Array, "*positions"] | None
    temperature: Float[Array, "*#positions"] | None  # a scalar; or one for each position, 1 at masked positions
    class_offset: Int[Array, ""] | None  # the class that this shard begins with


def positions_of(
    options: Options, weights: Weights, labels: Labels | None, array: Array, axis: int, classes: int
) -> Positions:
    """The positions are the axes of `array`, logits or hidden states, except `axis`; the classes are this shard's."""
    shards, shape = options.objective.shards, array.shape[:axis] + array.shape[axis + 1 :]
    as_positions = partial(sharded_as_positions, other=array, axis=axis)
    mask = None if weights.where is None else as_positions(jnp.broadcast_to(weights.where, shape))
    if labels is not None:
        labels = labels.sharded_as_positions(array, axis)
        mask = _both(labels.not_ignored(options.ignore_index), mask)
        labels = labels.without_masked(mask)
    sample_weight = weights.sample_weight
    if sample_weight is not None:
        sample_weight = sample_weight.astype(compute_dtype(sample_weight.dtype))
        sample_weight = only(mask, as_positions(jnp.broadcast_to(sample_weight, shape)))
    temperature = weights.temperature
    if temperature is not None and temperature.ndim:
        temperature = temperature.astype(compute_dtype(temperature.dtype))
        temperature = only(mask, as_positions(jnp.broadcast_to(temperature, shape)), 1)
    offset, label_weight = class_offset(shards, classes), None
    if labels is not None and weights.class_weight is not None:
        label_weight = labels.label_weight(weights.class_weight, mask, shards, offset)
    return Positions(
        labels=labels,
        mask=mask,
        label_weight=label_weight,
        sample_weight=sample_weight,
        temperature=temperature,
        class_offset=offset,
    )


def _both(mask: Array | None, other: Array | None) -> Array | None:
    return other if mask is None else mask if other is None else mask & other


def coefficients_of(options: Options, weights: Weights, positions: Positions) -> dict[str, Coefficient]:
    """The factors of the costs, by name; they do not include the mean's denominator."""
    scalars = scalars_of(options, weights)
    return options.objective.coefficients(scalars, positions.sample_weight, positions.label_weight)


def denominator(options: Options, positions: Positions, shape: tuple[int, ...], dtype: Any) -> Float[Array, ""]:
    """The mean's denominator, over all shards: the weights of the unmasked positions, or their number."""
    weight = product_of(positions.label_weight, positions.sample_weight)
    if weight is not None:
        return total(jnp.sum(weight), options.batch_axis_name)
    return number(options, positions, shape).astype(dtype)


def number(options: Options, positions: Positions, shape: tuple[int, ...]) -> Int[Array, ""]:
    """The number of unmasked positions of all shards, summed as integers: a float32 sum of ones may stop at 2**24."""
    ones = jnp.ones(shape, jnp.int32) if positions.mask is None else positions.mask.astype(jnp.int32)
    return total(jnp.sum(ones), options.batch_axis_name)


def reduced(options: Options, losses: Float[Array, "*positions"], weight: Float[Array, ""]) -> Float[Array, "..."]:
    """The losses of all positions, or their sum over all shards, or this sum divided by the weight.

    If the weight is 0, the mean is nan, with a gradient of 0.
    """
    if options.reduction == "none":
        return losses
    loss = total(jnp.sum(losses), options.batch_axis_name)
    if options.reduction == "sum":
        return loss
    return jnp.where(weight == 0, jnp.nan, loss / jnp.where(weight == 0, 1, weight))
