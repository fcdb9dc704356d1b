"""The loss of logits or of log-probabilities, after its arguments are checked, and the statistics of any loss."""

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jxent._call.options import Options, Weights
from jxent._call.placement import CLASSES, Placement, placed
from jxent._call.positions import Positions, coefficients_of, denominator, number, positions_of, reduced
from jxent._core.shards import not_reduced, sharded_like
from jxent._core.weights import only, weigh
from jxent._labels.labels import Labels
from jxent._objective.objective import RowInputs
from jxent._objective.rule import costs
from jxent._rows.costs import STATISTIC_NAMES


class Stats(NamedTuple):
    """Statistics that `return_stats=True` adds to a loss, taken in the same pass.

    Floating-point fields have their true gradients. All fields have the shape of the positions, except the scalars
    `weight` and `count`. At a masked position, every number is 0 and `correct` is False. The accuracy is
    ``stats.correct.sum() / stats.count``. The mean loss without weights, smoothing and z-loss is
    ``-stats.log_prob.sum() / stats.count``. Inside `jax.shard_map` with `batch_axis_name`, the two scalars are those of
    all shards. The other fields are this shard's: sum them with psum.

    If you differentiate statistics of `linear_cross_entropy`, call it with ``reduction="none"`` or ``recompute=True``.
    One sweep (loop over blocks) in the backward pass then serves the loss and the statistics, with four matmuls in all.
    Otherwise a mean takes six matmuls, and memory for a second gradient of the kernel. If you only report statistics,
    the mean takes three matmuls.

    If a program returns `Stats` and `jax.export` serializes it, its reader must import jxent. Return `stats._asdict()`
    for other readers.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), jnp.array([0, 0, -100])
      >>> loss, stats = jxent.cross_entropy(logits, labels, return_stats=True)
      >>> print(stats.prediction, stats.correct, stats.count)
      [0 1 0] [ True False False] 2
      >>> print(f"accuracy {stats.correct.sum() / stats.count:.2f}")
      accuracy 0.50
    """

    log_prob: Float[Array, "*positions"]
    """Log-probability of the label in nats; for dense or sparse class probabilities q, the sum of q[j] log p[j]."""
    log_normalizer: Float[Array, "*positions"]
    """log sum exp of the logits, after the soft cap and divided by the temperature."""
    entropy: Float[Array, "*positions"]
    """Entropy of the softmax, in nats."""
    prediction: Int[Array, "*positions"]
    """Class with the largest logit; the first one, if several are largest (int32).

    At a masked position it is 0, a valid class, so that you can use it as an index. To count the predictions of
    unmasked positions, call ``np.bincount(stats.prediction.ravel(), weights=mask.ravel())``.
    """
    correct: Bool[Array, "*positions"]
    """Whether the prediction is the label; for class probabilities, the label is the most probable class.

    A masked position is never correct.
    """
    weight: Float[Array, ""]
    """Denominator of the mean: the sum of the weights of the unmasked positions, or their number."""
    count: Int[Array, ""]
    """Number of unmasked positions, including those of weight 0 (int32)."""


jax.export.register_namedtuple_serialization(Stats, serialized_name="jxent.Stats")


def placed_loss_of(
    placement: Placement | None,
    options: Options,
    logits: Array,
    weights: Weights,
    labels: Labels | None = None,
    logits_p: Array | None = None,
) -> Any:
    """`loss_of` with arrays sharded by the `Placement`, unless this is None."""
    positions, axis = tuple(range(logits.ndim - 1)), options.objective.axis
    of_logits = (*positions[:axis], CLASSES, *positions[axis:])
    of_labels = None if labels is None else labels.dimensions(positions, of_logits, None)
    dimensions = of_logits, weight_dimensions(weights, positions), of_labels, of_logits
    arrays = logits, weights, labels, logits_p
    return placed(options.function, placement, loss_of, (options,), arrays, dimensions)


def weight_dimensions(weights: Weights, positions: tuple[int, ...]) -> Weights:
    """The dimensions of each array of the weights, which `Placement.spec` explains."""
    scalars: Any = dict.fromkeys(weights.scalars, ())
    by_position = {"sample_weight": positions, "where": positions, "temperature": positions}
    dimensions: Any = {"class_weight": (CLASSES,), **by_position}
    return weights._replace(scalars=scalars, **dimensions)


def loss_of(
    options: Options, logits: Array, weights: Weights, labels: Labels | None, logits_p: Array | None
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Stats]:
    """The loss of logits, or of log-probabilities, and `Stats` if the options ask for them."""
    axis = options.objective.axis
    positions = positions_of(options, weights, labels, logits, axis, logits.shape[axis])
    rows = costs(options.objective, _row_inputs(options, weights, logits, logits_p, positions))
    of_each, predicted = jax.tree.map(lambda row: only(positions.mask, jnp.squeeze(row, axis)), rows)
    losses = weigh(coefficients_of(options, weights, positions), of_each)
    weight = denominator(options, positions, losses.shape, losses.dtype)
    loss = reduced(options, losses, weight)
    return with_stats(options, positions, loss, of_each, predicted, weight, logits.shape[axis])


def _row_inputs(
    options: Options, weights: Weights, logits: Array, logits_p: Array | None, positions: Positions
) -> RowInputs:
    objective, labels, mask = options.objective, positions.labels, positions.mask
    axis, class_weight = objective.axis, None
    if any(objective.takes_class_weight(name, labels) for name in objective.names):
        class_weight = sharded_like(weights.class_weight, logits, [axis])
    temperature = not_reduced(positions.temperature)
    if temperature is not None and temperature.ndim:
        temperature = jnp.expand_dims(temperature, axis)
    inputs = RowInputs(
        logits=logits,
        labels=None if labels is None else labels.sharded_as_logits(logits),
        logits_p=logits_p,
        class_weight=class_weight,
        temperature=temperature,
    )
    inputs = objective.reported(options.function, options.argument, mask, inputs)
    labels = None if inputs.labels is None else inputs.labels.with_class_axis(axis)
    mask = None if mask is None else jnp.expand_dims(mask, axis)
    return objective.cast_alike(inputs.replace(labels=labels, mask=mask, class_offset=positions.class_offset))


def with_stats(
    options: Options,
    positions: Positions,
    loss: Float[Array, "..."],
    costs: dict[str, Array],
    prediction: Array | None,
    weight: Float[Array, ""],
    classes: int,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Stats]:
    """The loss, and the `Stats` if the options ask for them; `classes` are this shard's."""
    if prediction is None or positions.labels is None:
        return loss
    label = positions.labels.largest(options.objective.classes(classes, positions.class_offset))
    return loss, Stats(
        **{name: costs[name] for name in STATISTIC_NAMES},
        prediction=only(positions.mask, prediction),
        correct=only(positions.mask, prediction == label, False),
        weight=weight,
        count=number(options, positions, prediction.shape),
    )
