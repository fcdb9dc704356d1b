"""`nll_loss`: the loss of log-probabilities."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from jxent._call import checks, label_checks
from jxent._call.annotations import ArrayLike, AxisName, Reduction
from jxent._call.axis_names import loss_axes
from jxent._call.loss import placed_loss_of
from jxent._call.names import known_names
from jxent._call.options import Weights, options_of
from jxent._labels.sparse import SparseLabels
from jxent._objective.nll import NegativeLogLikelihood
from jxent._rows.costs import Scalars


@known_names
def nll_loss(
    log_probs: Float[ArrayLike, "*shape"],
    labels: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*shape"] | SparseLabels,
    *,
    axis: int = -1,
    class_weight: Float[ArrayLike, " classes"] | None = None,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Negative log-likelihood of the labels, in nats.

    ``nll_loss(log_softmax(x), t)`` is ``cross_entropy(x, t)``, except for the rounding of 16-bit log-probabilities.

    Args:
      log_probs: log-probabilities, as from `log_softmax`: float16, bfloat16, float32 or float64.
      labels: class indices, integers of the shape of `log_probs` without its class axis; or class probabilities,
        floating point of the shape of `log_probs`; or `SparseLabels`.
      axis: the class axis.
      class_weight: one weight per class, shape (classes,).
      sample_weight: multiplies each position's loss and its term of the mean's denominator; broadcasts to the
        positions.
      where: boolean, broadcasts to the positions; False masks a position, even if it contains NaN.
      ignore_index: a position with this index label is masked; None masks none.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `cross_entropy`.
      axis_name: the mesh axis or axes over which the classes are sharded, as in `cross_entropy`.
      batch_axis_name: the same for the positions.

    Returns:
      The loss is in float32, or in float64 if an input is. It is a scalar, or has the positions' shape with
      ``reduction="none"``.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> log_probs = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]))
      >>> print(f"{jxent.nll_loss(log_probs, jnp.array([0, 2])):.4f}")
      0.2899

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.NLLLoss.html
    """
    name = "nll_loss"
    log_probs, of_kind, axis = label_checks.logits_and_labels(name, "log_probs", log_probs, labels, axis)
    class_weight, sample_weight, where = checks.weights(name, class_weight, sample_weight, where, log_probs, axis)
    over = loss_axes(name, "log_probs", log_probs, axis, axis_name, batch_axis_name, reduction)
    options = options_of(
        name,
        "log_probs",
        objective=NegativeLogLikelihood(axis=axis, shards=over.shards),
        over=over,
        scalars=Scalars(),
        reduction=reduction,
        ignore_index=checks.ignored_class(name, ignore_index, of_kind),
    )
    weights = Weights(class_weight=class_weight, sample_weight=sample_weight, where=where, scalars={})
    return placed_loss_of(over.placement, options, log_probs, weights, labels=of_kind)
