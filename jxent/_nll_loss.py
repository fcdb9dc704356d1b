"""`nll_loss`: the loss of log-probabilities."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jxent import _checks
from jxent._axis_names import AxisName, mesh_axes
from jxent._debug import report_labels, report_values
from jxent._labels import along, by_index, clipped, out_of_range, times
from jxent._passes import again, class_sum
from jxent._reduce import counted, denominator, only, product_of, reduce, share_of, weight_of, weighted
from jxent._rows import compute_dtype, label_logit, product
from jxent._shards import alike, along_positions, first_class, offset, own, sharded_like, summed


def nll_loss(
    log_probs: Float[Array, "*shape"],
    labels: Int[Array, "*positions"] | Float[Array, "*shape"],
    *,
    axis: int = -1,
    class_weight: Float[Array, " classes"] | None = None,
    sample_weight: Float[Array, "*#positions"] | None = None,
    where: Bool[Array, "*#positions"] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Negative log-likelihood of the labels, in nats.

    ``nll_loss(log_softmax(x), t)`` is ``cross_entropy(x, t)``, but for the rounding of 16-bit log-probabilities.

    Args:
      log_probs: log-probabilities, as from `log_softmax`: float16, bfloat16, float32 or float64.
      labels: class indices, integers of the shape of `log_probs` without its class axis; or class probabilities,
        floating point of the shape of `log_probs`.
      axis: the class axis.
      class_weight: one weight per class, shape (classes,).
      sample_weight: multiplies each position's loss and its share of the mean's denominator; broadcasts to the
        positions.
      where: boolean, broadcasts to the positions; False leaves a position out, whatever it holds.
      ignore_index: a position with this index label is left out.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `cross_entropy`.
      axis_name, batch_axis_name: mesh axes of sharded classes and positions inside `jax.shard_map`, as in
        `cross_entropy`.

    Returns:
      The loss in float32, or in float64 if an input is: a scalar, or for ``reduction="none"`` the positions' shape.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Example:
      >>> import jax.numpy as jnp, jxent
      >>> log_probs = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]))
      >>> print(f"{jxent.nll_loss(log_probs, jnp.array([0, 2])):.4f}")
      0.2899

    Reference: https://docs.pytorch.org/docs/stable/generated/torch.nn.NLLLoss.html
    """
    name = "nll_loss"
    log_probs = _checks.floating(
        name, "log_probs", log_probs, "convert it with .astype(jnp.float32), or swap it with labels"
    )
    axis = _checks.class_axis(name, "log_probs", log_probs, axis)
    labels = _checks.class_labels(name, "log_probs", log_probs, labels, axis)
    class_weight, sample_weight, where = _checks.weights(name, class_weight, sample_weight, where, log_probs, axis)
    ignore_index = _checks.ignored_class(name, ignore_index, labels)
    reduction = _checks.reduction(name, reduction)
    over = mesh_axes(name, axis_name, batch_axis_name, reduction, ("log_probs", log_probs))
    return _nll_loss(axis, ignore_index, reduction, over, log_probs, labels, class_weight, sample_weight, where)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _nll_loss(axis, ignore_index, reduction, mesh_axes, log_probs, labels, class_weight, sample_weight, where):
    shards, batch_axis_name = mesh_axes
    shape = log_probs.shape[:axis] + log_probs.shape[axis + 1 :]
    placed = partial(along_positions, other=log_probs, axis=axis)
    labels = placed(labels) if by_index(labels) else sharded_like(labels, log_probs)
    keep = counted(labels, where, ignore_index, shape, placed)
    if by_index(labels):
        labels = only(keep, labels)  # 0 where ignored: in range
        report_labels("nll_loss", labels, log_probs.shape[axis] * shards.number)
    first = first_class(shards, log_probs.shape[axis])
    in_sums = None if by_index(labels) else sharded_like(class_weight, log_probs, [axis])
    row_keep = None if keep is None else jnp.expand_dims(keep, axis)
    report_values("nll_loss", row_keep, masked=("log_probs",), log_probs=log_probs, labels=labels)
    each, (log_p, in_sums), (row_keep,) = alike(shards, labels, (log_probs, in_sums), (row_keep,))
    costs = _costs((axis, shards), log_p, each, in_sums, row_keep, first)
    label_weight = weight_of(labels, class_weight, keep, shards, first)
    share = share_of(sample_weight, keep, shape, placed)
    losses = weighted(product_of(share, label_weight), only(keep, jnp.squeeze(jnp.asarray(costs), axis)))
    weight = denominator(label_weight, share, keep, shape, losses.dtype, batch_axis_name)
    return reduce(losses, weight, reduction, batch_axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _costs(layout, log_probs, labels, class_weight, keep, first) -> Array:
    """-log p of the label, or the sum of q w * -log p, a row array. `layout` is (class axis, `Shards`)."""
    return _costs_fwd(layout, log_probs, labels, class_weight, keep, first)[0]


def _costs_fwd(layout, log_probs, labels, class_weight, keep, first):
    rows = _cost_rows(layout, log_probs, labels, class_weight, first)
    return own(rows, layout[1], first), (log_probs, labels, class_weight, keep, first)


def _cost_rows(layout, log_probs, labels, class_weight, first):
    axis, shards = layout
    if by_index(labels):
        classes = log_probs.shape[axis] * shards.number
        index = offset(clipped(labels, classes, axis), first)
        cost = -label_logit(log_probs, index, axis, shards.axis_name).astype(compute_dtype(log_probs.dtype))
        return jnp.where(out_of_range(jnp.expand_dims(labels, axis), classes), jnp.nan, cost)
    dtype = compute_dtype(log_probs.dtype, labels.dtype)
    weight = along(class_weight, labels.ndim, axis, dtype)

    def term(log_probs, q, w, unit):
        return product(times(q.astype(dtype), w), -log_probs.astype(dtype), unit)

    return class_sum(term, jnp.zeros((), dtype), (log_probs, labels, weight), (), (axis,), shards.axis_name)


# d / d log_probs[j] is -1 at the label and 0 elsewhere, or -q[j] w[j]. A custom rule, because the transpose of a gather
# is a scatter into zeros, which neither fuses nor partitions, and because 0 * inf counts as 0.
def _costs_bwd(layout, residuals, cotangent):
    axis, shards = layout
    log_probs, labels, class_weight, keep, first = residuals
    cotangent = summed(cotangent, shards)
    dtype = cotangent.dtype
    log_probs, labels, class_weight, _ = again(cotangent, log_probs, labels, class_weight)
    grad_labels = grad_weight = None
    if by_index(labels):
        labels = jnp.expand_dims(labels, axis)
        at_label = lax.broadcasted_iota(labels.dtype, log_probs.shape, axis) == offset(labels, first)
        at_label = sharded_like(at_label, log_probs)
        # 0 by way of the log-probabilities, of whose sharding the compiler would know nothing otherwise.
        grad = jnp.where(at_label, -cotangent, jnp.where(log_probs < 0, jnp.zeros((), dtype), 0))
        grad = jnp.where(out_of_range(labels, log_probs.shape[axis] * shards.number), jnp.nan, grad)
    else:
        w = along(class_weight, labels.ndim, axis, dtype)
        q, log_p = labels.astype(dtype), log_probs.astype(dtype)
        grad = -cotangent * times(q, w)
        cost = jnp.where((log_p == -jnp.inf) & (q == 0), 0, -log_p)
        grad_labels = only(keep, cotangent * times(cost, w)).astype(labels.dtype)
        if class_weight is not None:
            positions = tuple(a for a in range(labels.ndim) if a != axis)
            grad_weight = jnp.sum(only(keep, cotangent * q * cost), positions).astype(class_weight.dtype)
    grads = only(keep, grad).astype(log_probs.dtype), grad_labels, grad_weight
    return *map(sharded_like, grads, residuals[:3]), None, None


_costs.defvjp(_costs_fwd, _costs_bwd)
