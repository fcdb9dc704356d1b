"""The loss of logits or of log-probabilities, once its arguments are checked; and the statistics of any loss."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jxent._core.costs import CostInputs, weighs_classes
from jxent._core.labels import by_index
from jxent._core.shards import cast_alike, sharded_like
from jxent._core.weights import only, weigh
from jxent._loss.positions import coefficients_of, denominator, positions_of, reduced
from jxent._loss.reports import report_values


class Stats(NamedTuple):
    """What `return_stats=True` adds to a loss, taken in the same pass. No gradient flows through it.

    All but `weight` have the shape of the positions. Where a position does not count, `log_prob`, `log_normalizer` and
    `entropy` are 0 and `prediction` is -2**31, which no label is. So for a loss without class and sample weights the
    accuracy is `jnp.sum(stats.prediction == labels) / stats.weight`, and the loss without smoothing and z-loss is
    `-jnp.sum(stats.log_prob) / stats.weight`.
    """

    log_prob: Float[Array, "*positions"]
    """Log-probability of the label in nats; for class probabilities q, the sum of q[j] log p[j]."""
    log_normalizer: Float[Array, "*positions"]
    """log sum exp of the logits."""
    entropy: Float[Array, "*positions"]
    """Entropy of the softmax, in nats."""
    prediction: Int[Array, "*positions"]
    """Class with the largest logit (int32)."""
    weight: Float[Array, ""]
    """Denominator of the mean."""


@partial(jax.jit, static_argnums=(0, 1))
def loss_of(options, rule, logits, labels, weights):
    """The loss of logits, or what else `rule` takes the costs of, and `Stats` if the options ask for them."""
    axis = options.form.axis
    positions = positions_of(options, weights, labels, logits, axis, logits.shape[axis])
    inputs = _cost_inputs(options, weights, logits, positions)
    out = jax.tree.map(lambda row: only(positions.keep, jnp.squeeze(row, axis)), rule(options.form, inputs))
    losses = weigh(coefficients_of(options, weights, positions), out[0])
    weight = denominator(options, positions, losses.shape, losses.dtype)
    return with_stats(options, positions, reduced(options, losses, weight), out[1], weight)


def _cost_inputs(options, weights, logits, positions):
    axis, labels, keep = options.form.axis, positions.labels, positions.keep
    if not by_index(labels):
        labels = sharded_like(labels, logits)
    class_weight = weights.class_weight if weighs_classes(options.form, labels) else None
    class_weight = sharded_like(class_weight, logits, [axis])
    keep = None if keep is None else jnp.expand_dims(keep, axis)
    arrays = {options.argument: logits, "labels": labels}
    report_values(options.function, keep, masked=(options.argument,), **arrays)
    labels, (logits, class_weight), keep = cast_alike(options.form.shards, labels, (logits, class_weight), keep)
    return CostInputs(logits, labels, class_weight, keep, positions.first)


def with_stats(options, positions, loss, stats, weight):
    """The loss, and the `Stats` if the options ask for them."""
    if not options.form.stats:
        return loss
    prediction = only(positions.keep, stats["prediction"], jnp.iinfo(jnp.int32).min)
    return loss, jax.lax.stop_gradient(Stats(**stats | {"prediction": prediction}, weight=weight))
