"""`sigmoid_cross_entropy` and the checks of its arguments. `jxent._objective.sigmoid` has the formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jxent._call import checks, label_checks
from jxent._call.annotations import ArrayLike, AxisName, Reduction
from jxent._call.axis_names import Sharded, mesh_axes
from jxent._call.loss import weight_dimensions
from jxent._call.names import known_names
from jxent._call.options import Options, Weights, options_of, scalars_of, traced_of
from jxent._call.placement import placed
from jxent._call.positions import denominator, positions_of, reduced
from jxent._core.dtypes import compute_dtype
from jxent._core.reports import NotShare, report, report_values
from jxent._core.shards import Shards, broadcast_like, cast_alike, sharded_like
from jxent._core.weights import is_used, only, weighted
from jxent._objective.rule import costs
from jxent._objective.sigmoid import SigmoidCrossEntropy, SigmoidInputs


@known_names
def sigmoid_cross_entropy(
    logits: Float[ArrayLike, "*shape"],
    labels: Float[ArrayLike, "*shape"] | Int[ArrayLike, "*shape"] | Bool[ArrayLike, "*shape"],
    *,
    pos_weight: Float[ArrayLike, "*#shape"] | None = None,
    sample_weight: Float[ArrayLike, "*#shape"] | None = None,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    label_smoothing: Float[ArrayLike, ""] = 0.0,
    reduction: Reduction = "mean",
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Binary cross-entropy between logits and labels, each logit a yes or no of its own, in nats.

    The loss of a logit x with label y is ``-w * y * log(sigmoid(x)) - (1 - y) * log(sigmoid(-x))``, where w is
    `pos_weight`. PyTorch's ``binary_cross_entropy_with_logits`` has the same definition. Loss and derivatives of every
    order keep full relative precision for any logit.

    Args:
      logits: log-odds of any shape, float16, bfloat16, float32 or float64. Every element is a position.
      labels: the probability of a yes, of the shape of `logits`. Integers and booleans are taken as numbers: 1 and True
        are a yes, 0 and False a no. If a label lies outside [0, 1] by more than rounding, its loss and gradients are
        NaN, and `jax.experimental.checkify` reports the label.
      pos_weight: multiplies the loss of a yes; broadcasts to `logits`, for example one number per entry of the last
        axis. The product of 0 and infinity is 0, so an infinite logit costs nothing with a weight of 0.
      sample_weight: multiplies each position's loss and its term of the mean's denominator; broadcasts to `logits`.
      where: boolean, broadcasts to `logits`; False masks a position, even if it contains NaN.
      label_smoothing: e in [0, 1]; labels become ``(1 - e) * labels + e / 2``. A Python number is static; a
        floating-point scalar array is traced, and its value is not checked.
      reduction: ``"mean"`` divides the sum by the number of unmasked positions, or by the sum of their `sample_weight`
        (PyTorch's mean divides by their number even then). ``"sum"`` does not divide, and ``"none"`` gives each
        position's loss.
      batch_axis_name: the mesh axis or axes over which the positions, all axes of `logits`, are sharded, as in
        `cross_entropy`. Inside `jax.shard_map`, the mean and the sum are then those of all shards. Without it, they
        are those of this shard.

    Returns:
      The loss is in float32, or in float64 if an input is. It is a scalar, or has the shape of `logits` with
      ``reduction="none"``.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> logits = jnp.array([[2.0, -1.0, 30.0], [0.5, 3.0, -4.0]])
      >>> labels = jnp.array([[1, 0, 1], [0, 1, 0]])
      >>> print(f"{jxent.sigmoid_cross_entropy(logits, labels):.4f}")
      0.2468

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html
    """
    name = "sigmoid_cross_entropy"
    logits = checks.floating(name, "logits", logits, "convert it with .astype(jnp.float32), or swap it with labels")
    labels = label_checks.binary_labels(name, logits, labels)
    pos_weight = checks.real(name, "pos_weight", pos_weight, logits.dtype)
    checks.broadcastable(name, "pos_weight", pos_weight, logits.shape, "the logits")
    # A class axis of size 1 makes every logit a position.
    as_classes = jax.ShapeDtypeStruct((*logits.shape, 1), logits.dtype)
    _, sample_weight, where = checks.weights(name, None, sample_weight, where, as_classes, logits.ndim)
    scalars = checks.scalars(name, label_smoothing, z_loss_weight=0.0)
    arrays = logits, labels, pos_weight, scalars.label_smoothing
    dtype = compute_dtype(*(array.dtype for array in arrays if isinstance(array, jax.Array)))
    objective = SigmoidCrossEntropy(dtype=dtype)
    axes = tuple(range(logits.ndim))
    classes, positions = (Sharded(name="logits", array=logits, axes=sharded) for sharded in ((), axes))
    over = mesh_axes(name, None, classes, batch_axis_name, positions, reduction)
    options = options_of(name, "logits", objective=objective, over=over, scalars=scalars, reduction=reduction)
    weights = Weights(class_weight=None, sample_weight=sample_weight, where=where, scalars=traced_of(scalars))
    dimensions = axes, axes, axes, weight_dimensions(weights, axes)
    return placed(name, over.placement, _loss, (options,), (logits, labels, pos_weight, weights), dimensions)


def _loss(
    options: Options, logits: Array, labels: Array, pos_weight: Array | None, weights: Weights
) -> Float[Array, "..."]:
    positions = positions_of(options, weights, None, logits[..., None], logits.ndim, 1)
    smoothing, objective = scalars_of(options, weights).label_smoothing, options.objective
    assert isinstance(objective, SigmoidCrossEntropy)
    dtype = objective.dtype
    numbers = labels if jnp.issubdtype(labels.dtype, jnp.floating) else labels.astype(dtype)
    if pos_weight is not None:
        pos_weight = broadcast_like(pos_weight, logits)
    inputs = SigmoidInputs(
        logits=logits,
        labels=sharded_like(numbers, logits),
        pos_weight=pos_weight,
        smoothing=jnp.asarray(smoothing, dtype) if is_used(smoothing) else None,
    )
    _, inputs, mask = cast_alike(Shards(), None, inputs, positions.mask)
    of_each, _ = costs(objective, inputs.replace(mask=mask))
    losses = weighted(positions.sample_weight, only(mask, of_each["label"]))
    losses = report_values(options.function, mask, losses, logits=logits, labels=numbers)
    losses = report(NotShare(function=options.function), losses, numbers, mask)
    return reduced(options, losses, denominator(options, positions, logits.shape, losses.dtype))
