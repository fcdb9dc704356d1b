"""`sigmoid_cross_entropy`: the loss of logits each of which is a yes or no of its own.

With s(x) = log(1 + exp x) = max(x, 0) + log1p(exp(-|x|)), whose derivative is the sigmoid, a label y, its weight w
where it is a yes, a = y and b = 1 - y (or with smoothing e: (1 - e) y + e / 2, and likewise b),

    loss        = w a s(-x) + b s(x)                  # both terms >= 0: nothing cancels
    d loss / dx = b sigmoid(x) - w a sigmoid(-x)
    d loss / dy = (1 - e) (w s(-x) - s(x))            # s(-x) - s(x) = -x
    d loss / dw = a s(-x)

in which 0 times infinity is 0. A label outside of [0, 1] is taken for NaN.

`sigmoid` has the derivative sigmoid(x) sigmoid(-x), and not p (1 - p), in which 1 - p has no digits for a large x. So
every further derivative is as exact. Memory: one array of the logits' size, for the losses, and one more for gradients
beside them; all in at least float32.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jxent._core.forward_mode import moving_where, with_forward_mode
from jxent._core.labels import is_no_share
from jxent._core.passes import apart, barrier, compute_dtype
from jxent._core.shards import Shards, cast_alike, sharded_like
from jxent._core.terms import sigmoid, softplus
from jxent._core.weights import is_used, only, weighted
from jxent._loss import checks, label_checks
from jxent._loss.annotations import ArrayLike, Reduction
from jxent._loss.axis_names import Over
from jxent._loss.jitted import jitted
from jxent._loss.names import known_names
from jxent._loss.options import Weights, options_of, scalars_of
from jxent._loss.positions import denominator, positions_of, reduced
from jxent._loss.reports import report_shares, report_values


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
) -> Float[Array, "..."]:
    r"""Binary cross-entropy between logits and labels, each logit a yes or no of its own, in nats.

    :math:`-w\, y \log \sigma(x) - (1 - y) \log \sigma(-x)`, with :math:`\sigma` the sigmoid and :math:`w` the
    `pos_weight`. PyTorch's ``binary_cross_entropy_with_logits`` means the same. Loss and derivatives of every order
    keep full relative precision for any logit.

    Args:
      logits: log-odds of any shape, float16, bfloat16, float32 or float64. Every element is a position.
      labels: the probability of a yes, of the shape of `logits`. Integers and booleans are taken as numbers: 1 and True
        are a yes, 0 and False a no. A label outside of [0, 1], by more than rounding, makes its loss and its gradients
        NaN, and `jax.experimental.checkify` names it.
      pos_weight: multiplies the loss of a yes; broadcasts to `logits`, as one number for each of their last axis does.
        The product of 0 and infinity is 0, so that an infinite logit costs nothing with a weight of 0.
      sample_weight: multiplies each position's loss and its share of the mean's denominator; broadcasts to `logits`.
      where: boolean, broadcasts to `logits`; False leaves a position out, whatever it holds.
      label_smoothing: e in [0, 1]; labels become ``(1 - e) * labels + e / 2``. A Python number is static; a
        floating-point scalar array is traced, and its value is not checked.
      reduction: ``"mean"`` divides the sum by the number of positions that count, or by the sum of their
        `sample_weight` (PyTorch's mean divides by their number then, too); ``"sum"`` does not; ``"none"`` gives each
        position's loss. Inside `jax.shard_map` the positions are this shard's.

    Returns:
      The loss in float32, or in float64 if an input is: a scalar, or for ``reduction="none"`` the shape of `logits`.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Example:
      >>> import jax.numpy as jnp, jxent
      >>> logits = jnp.array([[2.0, -1.0, 30.0], [0.5, 3.0, -4.0]])
      >>> labels = jnp.array([[1, 0, 1], [0, 1, 0]])
      >>> print(f"{jxent.sigmoid_cross_entropy(logits, labels):.4f}")
      0.2468

    Reference: https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html
    """
    name = "sigmoid_cross_entropy"
    logits = checks.floating(name, "logits", logits, "convert it with .astype(jnp.float32), or swap it with labels")
    labels = label_checks.binary_labels(name, logits, labels)
    pos_weight = checks.real(name, "pos_weight", pos_weight, logits.dtype)
    checks.broadcastable(name, "pos_weight", pos_weight, logits.shape, "the logits")
    # Every logit is a position: a class axis of size 1 makes it so.
    as_classes = jax.ShapeDtypeStruct((*logits.shape, 1), logits.dtype)
    _, sample_weight, where = checks.weights(name, None, sample_weight, where, as_classes, logits.ndim)
    scalars = checks.scalars(name, label_smoothing, z_loss_weight=0.0)
    options, traced = options_of((name, "logits"), logits.ndim, labels, Over(), scalars, None, reduction)
    weights = Weights(None, sample_weight, where, traced)
    return jitted(name, _loss, (0,))(options, logits, labels, pos_weight, weights)


def _loss(options, logits, labels, pos_weight, weights):
    positions = positions_of(options, weights, None, logits[..., None], logits.ndim, 1)
    smoothing = scalars_of(options, weights).label_smoothing
    arrays = (a for a in (logits, labels, pos_weight, smoothing) if isinstance(a, Array))
    dtype = compute_dtype(*(array.dtype for array in arrays))
    smoothing = jnp.asarray(smoothing, dtype) if is_used(smoothing) else None
    numbers = labels if jnp.issubdtype(labels.dtype, jnp.floating) else labels.astype(dtype)
    if pos_weight is not None:
        pos_weight = sharded_like(jnp.broadcast_to(pos_weight, logits.shape), logits)
    inputs = _Inputs(logits, sharded_like(numbers, logits), pos_weight, smoothing, positions.keep)
    _, of_classes, keep = cast_alike(Shards(), None, inputs._replace(keep=None), inputs.keep)
    losses, _ = _losses(dtype, of_classes._replace(keep=keep))
    losses = weighted(positions.sample_weight, only(keep, losses))
    losses = report_values(options, keep, losses, logits=logits, labels=numbers)
    losses = report_shares(options, keep, losses, numbers)
    return reduced(options, losses, denominator(options, positions, logits.shape, losses.dtype))


class _Inputs(NamedTuple):
    """Arrays of the logits' shape, but for `smoothing`, which is a number; None for what is not given."""

    logits: Array
    labels: Array
    pos_weight: Array | None
    smoothing: Array | None
    keep: Array | None


def _shares(dtype, inputs):
    """(x, w, a, b), as at the top of this file, in the dtype to compute in."""
    x, y = inputs.logits.astype(dtype), jnp.where(is_no_share(inputs.labels), jnp.nan, inputs.labels.astype(dtype))
    a, b = y, 1 - y
    if inputs.smoothing is not None:
        e = inputs.smoothing.astype(dtype)
        a, b = (1 - e) * a + e / 2, (1 - e) * b + e / 2
    return x, None if inputs.pos_weight is None else inputs.pos_weight.astype(dtype), a, b


def _paid(share, cost):
    """share * cost for a share >= 0, with 0 * inf = 0."""
    most = float(jnp.finfo(cost.dtype).max)
    excess = jnp.minimum(jnp.maximum(cost - most, 0), most)  # 0 unless the cost is infinite
    return share * jnp.minimum(cost, most) * (1 + excess) * (1 + excess)


def _times(weight, values):
    """weight * values, with 0 * inf = 0, whichever of the two is infinite; None for 1."""
    if weight is None:
        return values
    nothing = ((weight == 0) & jnp.isinf(values)) | (jnp.isinf(weight) & (values == 0))
    weight, values = (jnp.where(nothing, 0, factor) for factor in (weight, values))
    return weight * values


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sigmoid_losses(dtype, inputs):
    """(the loss of each position, None)."""
    return _fwd(dtype, inputs)[0]


def _fwd(dtype, inputs):
    if inputs.keep is not None:  # no derivative, of whatever order, meets what does not count
        logits, labels = (moving_where(inputs.keep, array) for array in (inputs.logits, inputs.labels))
        inputs = inputs._replace(logits=logits, labels=labels)
    x, w, a, b = _shares(dtype, inputs)
    losses = _times(w, _paid(a, softplus(-x))) + _paid(b, softplus(x))
    return (apart(losses), None), inputs  # or, with a sum to come, XLA:CPU would store five arrays rather than this one


def _slopes(dtype, inputs):
    """The derivatives of the loss by the inputs; None for an input that is not there, or has none."""
    x, w, a, b = _shares(dtype, inputs)
    to_label = jnp.where(jnp.isnan(a), jnp.nan, -x if w is None else _to_weighted_label(x, w))
    to_smoothing = None
    if inputs.smoothing is not None:
        to_smoothing = (0.5 - inputs.labels.astype(dtype)) * to_label
        to_label = (1 - inputs.smoothing.astype(dtype)) * to_label
    to_x = b * sigmoid(x) - _times(w, a * sigmoid(-x))
    slopes = _Inputs(to_x, to_label, None if w is None else _paid(a, softplus(-x)), to_smoothing, None)
    return jax.tree.map(lambda slope: only(inputs.keep, slope), slopes)


def _to_weighted_label(x, w):
    """w s(-x) - s(x), by which of the two is the larger, because s(-x) = s(x) - x."""
    below = x < 0
    return _times(w - 1, softplus(jnp.where(below, x, -x))) + jnp.where(below, _times(w, jnp.maximum(-x, 0)), -x)


def _bwd(dtype, inputs, cotangents):
    inputs, cotangents = barrier((inputs, cotangents))  # or XLA:CPU would store what the loss and its gradient share
    slopes = _slopes(dtype, inputs)  # all but that by the logits may be infinite, where a sample weight may be 0
    grads = jax.tree.map(partial(_times, cotangents[0]), slopes)
    grads = grads._replace(logits=cotangents[0] * slopes.logits)
    if grads.smoothing is not None:
        grads = grads._replace(smoothing=jnp.sum(grads.smoothing))
    return (jax.tree.map(lambda grad, array: grad.astype(array.dtype), grads, inputs._replace(keep=None)),)


def _tangent(dtype, inputs, moving):
    slopes = _slopes(dtype, inputs)
    moved = [slope * d.astype(dtype) for slope, d in zip(slopes, moving, strict=True) if d is not None]
    return sum(moved[1:], moved[0])


_sigmoid_losses.defvjp(_fwd, _bwd)
_losses = with_forward_mode(_sigmoid_losses, _tangent)
