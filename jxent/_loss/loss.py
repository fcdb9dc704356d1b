"""The loss of logits or of log-probabilities, once its arguments are checked; and the statistics of any loss."""

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jxent._core.costs import STATISTIC_NAMES, CostInputs, weighs_classes
from jxent._core.labels import SparseLabels, by_index, pick
from jxent._core.prediction import largest_class
from jxent._core.shards import cast_alike, not_reduced, sharded_but, sharded_like
from jxent._core.weights import only, weigh
from jxent._loss.placement import CLASSES, placed
from jxent._loss.positions import coefficients_of, denominator, number, positions_of, reduced
from jxent._loss.reports import report_labels, report_values


class Stats(NamedTuple):
    """What `return_stats=True` adds to a loss, taken in the same pass. Floating-point fields have their true gradients.

    All fields have the shape of the positions, except the scalars `weight` and `count`. At a position that does not
    count, every number is 0 and `correct` is False. The accuracy is ``stats.correct.sum() / stats.count``, and the loss
    without weights, smoothing and z-loss is ``-stats.log_prob.sum() / stats.count``. Inside `jax.shard_map` with
    `batch_axis_name`, the two scalars are of all shards, and the other fields of this shard: take their sums by psum.

    If you differentiate statistics of `linear_cross_entropy`, call it with ``reduction="none"`` or ``recompute=True``.
    One sweep backwards then serves the loss and the statistics, with four matmuls in all. Otherwise a mean takes six,
    and memory for a second gradient of the kernel. If you only report statistics, the mean takes three matmuls.

    A program that returns `Stats` and is serialized by `jax.export` can be read where jxent has been imported. Return
    `stats._asdict()` for other readers.
    """

    log_prob: Float[Array, "*positions"]
    """Log-probability of the label in nats; for class probabilities q, sparse ones too, the sum of q[j] log p[j]."""
    log_normalizer: Float[Array, "*positions"]
    """log sum exp of the logits."""
    entropy: Float[Array, "*positions"]
    """Entropy of the softmax, in nats."""
    prediction: Int[Array, "*positions"]
    """Class with the largest logit, the first of several (int32).

    At a position that does not count it is 0: a class as any other, so that it can be counted and looked up.
    ``np.bincount(stats.prediction.ravel(), weights=mask.ravel())`` leaves these positions out.
    """
    correct: Bool[Array, "*positions"]
    """Whether the prediction is the label; for class probabilities, the class with the largest of them.

    A position that does not count is never correct.
    """
    weight: Float[Array, ""]
    """Denominator of the mean: the sum of the weights of the positions that count, or their number."""
    count: Int[Array, ""]
    """Number of the positions that count, whatever their weights (int32)."""


jax.export.register_namedtuple_serialization(Stats, serialized_name="jxent.Stats")


def placed_loss_of(placement, options, rule, logits, labels, weights):
    """`loss_of`, of arrays sharded by the `Placement`, if that is not None."""
    positions, axis = tuple(range(logits.ndim - 1)), options.form.axis
    of_logits = (*positions[:axis], CLASSES, *positions[axis:])
    dimensions = of_logits, label_dimensions(labels, positions, of_logits), weight_dimensions(weights, positions)
    return placed(options.function, placement, loss_of, (options, rule), (logits, labels, weights), dimensions)


def label_dimensions(labels, positions, of_logits):
    if isinstance(labels, SparseLabels):
        of_entries: Any = (*positions, None)
        return SparseLabels(of_entries, of_entries)
    return positions if by_index(labels) else of_logits


def weight_dimensions(weights, positions):
    scalars = jax.tree.map(lambda _: (), weights.scalars)
    dimensions = {"class_weight": (CLASSES,), "sample_weight": positions, "where": positions, "temperature": ()}
    return weights._replace(scalars=scalars, **dimensions)


def loss_of(options, rule, logits, labels, weights):
    """The loss of logits, or what else `rule` takes the costs of, and `Stats` if the options ask for them."""
    axis = options.form.axis
    positions = positions_of(options, weights, labels, logits, axis, logits.shape[axis])
    inputs = _cost_inputs(options, weights, logits, positions)
    rows = rule(options.form, inputs)
    costs, predicted = jax.tree.map(lambda row: only(positions.keep, jnp.squeeze(row, axis)), rows)
    losses = weigh(coefficients_of(options, weights, positions), costs)
    weight = denominator(options, positions, losses.shape, losses.dtype)
    return with_stats(options, positions, reduced(options, losses, weight), costs, predicted, weight)


def _cost_inputs(options, weights, logits, positions):
    axis, labels, keep, indices = options.form.axis, positions.labels, positions.keep, positions.indices
    if indices is not None:
        labels, indices = (sharded_but(jnp.moveaxis(a, -1, axis), logits, axis) for a in (labels, indices))
    elif not by_index(labels):
        labels = sharded_like(labels, logits)
    class_weight = weights.class_weight if weighs_classes(options.form.costs, labels) else None
    class_weight = sharded_like(class_weight, logits, [axis])
    keep = None if keep is None else jnp.expand_dims(keep, axis)
    if options.form.divergence is None:
        classes = logits.shape[axis] * options.form.shards.number
        labels = report_labels(options, keep, labels, classes, axis, indices)
    else:
        labels = report_values(options, keep, labels, masked=("logits_p",), logits_p=labels)
    labels = report_values(options, keep, labels, masked=(options.argument,), **{options.argument: logits})
    labels, (logits, class_weight, temperature), (keep, indices) = cast_alike(
        options.form.shards, labels, (logits, class_weight, not_reduced(weights.temperature)), (keep, indices)
    )
    return CostInputs(logits, labels, class_weight, keep, positions.first, temperature, indices)


def with_stats(options, positions, loss, costs, prediction, weight):
    """The loss, and the `Stats` if the options ask for them."""
    if not options.form.stats:
        return loss
    label = positions.labels
    if positions.indices is not None:
        label = pick(positions.indices, jnp.expand_dims(jnp.argmax(label, -1), -1), label.ndim - 1)[..., 0]
    elif not by_index(label):
        form = options.form
        label = jnp.squeeze(largest_class(label, form.axis, positions.first, form.shards.axis_name), form.axis)
    return loss, Stats(
        **{name: costs[name] for name in STATISTIC_NAMES},
        prediction=only(positions.keep, prediction),
        correct=only(positions.keep, prediction == label, False),
        weight=weight,
        count=number(options, positions, prediction.shape),
    )
