"""`nll_loss`: the loss of log-probabilities."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jxent._core import targets
from jxent._core.costs import (
    CostInputs,
    Known,
    Moved,
    ProbabilityLabel,
    Scalars,
    SparseLabel,
    costs_of,
    is_out_of_range,
)
from jxent._core.forward_mode import with_forward_mode
from jxent._core.labels import SparseLabels, at_label, by_index, clipped, out_of_range
from jxent._core.passes import Arrays, Moving, Passes
from jxent._core.rule import counted, like_inputs, summed_up
from jxent._core.shards import each_shards_own, local_index, sharded_like, shared_cotangent
from jxent._core.weights import along
from jxent._loss import checks, label_checks
from jxent._loss.annotations import ArrayLike, AxisName, Reduction
from jxent._loss.axis_names import loss_axes
from jxent._loss.loss import placed_loss_of
from jxent._loss.names import known_names
from jxent._loss.options import Weights, options_of


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

    ``nll_loss(log_softmax(x), t)`` is ``cross_entropy(x, t)``, but for the rounding of 16-bit log-probabilities.

    Args:
      log_probs: log-probabilities, as from `log_softmax`: float16, bfloat16, float32 or float64.
      labels: class indices, integers of the shape of `log_probs` without its class axis; or class probabilities,
        floating point of the shape of `log_probs`; or `SparseLabels`.
      axis: the class axis.
      class_weight: one weight per class, shape (classes,).
      sample_weight: multiplies each position's loss and its share of the mean's denominator; broadcasts to the
        positions.
      where: boolean, broadcasts to the positions; False leaves a position out, whatever it holds.
      ignore_index: a position with this index label is left out; None leaves none out.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `cross_entropy`.
      axis_name, batch_axis_name: mesh axes over which classes and positions are sharded, as in `cross_entropy`.

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
    log_probs, labels, axis = label_checks.logits_and_labels(name, "log_probs", log_probs, labels, axis)
    arrays = checks.weights(name, class_weight, sample_weight, where, log_probs, axis)
    over = loss_axes(name, "log_probs", log_probs, axis, axis_name, batch_axis_name, reduction)
    options, traced = options_of((name, "log_probs"), axis, labels, over, Scalars(), ignore_index, reduction)
    return placed_loss_of(over.placement, options, _costs, log_probs, labels, Weights(*arrays, traced))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll_costs(form, inputs: CostInputs):
    """({"label": -log p of the label, or the sum of q w * -log p}, None), of which `inputs.logits` are the log p."""
    return _costs_fwd(form, inputs)[0]


def _costs_fwd(form, inputs):
    inputs = counted(inputs)
    if inputs.indices is not None:
        cost = _sparse_cost(form, inputs)
    else:
        cost = (_index_cost if by_index(inputs.labels) else _probability_cost)(form, inputs)
    return ({"label": each_shards_own(cost, form.shards, inputs.first)}, None), inputs


def _index_cost(form, inputs):
    axis, labels = form.axis, inputs.labels
    classes = inputs.logits.shape[axis] * form.shards.number
    cost = -_at_label(form, inputs, inputs.logits)
    return jnp.where(out_of_range(jnp.expand_dims(labels, axis), classes), jnp.nan, cost)


def _at_label(form, inputs, values):
    axis, classes = form.axis, values.shape[form.axis] * form.shards.number
    index = local_index(clipped(inputs.labels, classes, axis), inputs.first)
    return at_label(values, index, axis, form.shards.axis_name).astype(inputs.dtype)


def _probability_cost(form, inputs):
    return targets.cost(_passes(form, inputs, None), ProbabilityLabel().share)


def _sparse_cost(form, inputs):
    cost, _ = _sparse(form, inputs).value(_passes(form, inputs, None), Known(None, None))
    return jnp.where(is_out_of_range(form, inputs), jnp.nan, cost)


def _sparse(form, inputs) -> SparseLabel:
    """The cost of sparse labels in `cross_entropy`, for its entries and their weights."""
    label = costs_of(form, inputs)["label"]
    assert isinstance(label, SparseLabel)
    return label


def _passes(form, inputs, previous):
    weight = along(inputs.class_weight, inputs.logits.ndim, form.axis, inputs.dtype)
    q = None if by_index(inputs.labels) or inputs.indices is not None else inputs.labels
    arrays = Arrays(inputs.logits, q, weight)
    return Passes(arrays, (form.axis,), inputs.dtype, axis_name=form.shards.axis_name, previous=previous)


# d / d log_probs[j] is -1 at the label and 0 elsewhere, or -q[j] w[j]. A custom rule, because the transpose of a gather
# is a scatter into zeros, which neither fuses nor partitions, and because 0 * inf counts as 0.
def _costs_bwd(form, inputs, cotangents):
    cotangent = shared_cotangent(cotangents[0]["label"], form.shards)
    axis, classes = form.axis, inputs.logits.shape[form.axis] * form.shards.number

    def of_index(c, cotangent, labels):
        index = lax.broadcasted_iota(labels.dtype, inputs.logits.shape, axis) == local_index(labels, inputs.first)
        # 0 by way of the log-probabilities, of whose sharding the compiler would know nothing otherwise.
        zero = jnp.where(c.log_p < 0, jnp.zeros_like(inputs.logits, cotangent.dtype), 0)
        grad = jnp.where(sharded_like(index, inputs.logits), -cotangent, zero)
        return jnp.where(out_of_range(labels, classes), jnp.nan, grad), None, None

    def of_probabilities(c, cotangent):
        label, rows = ProbabilityLabel(), (cotangent, None)
        to_weight = None if inputs.class_weight is None else label.to_class_weight(c, rows)
        return -cotangent * label.share(c), label.to_label(c, rows), to_weight

    def of_entries(c, cotangent):
        label = _sparse(form, inputs)
        _, share, cost = label.taken(passes)
        zero = jnp.where(c.log_p < 0, jnp.zeros_like(inputs.logits, cotangent.dtype), 0)
        zero = jnp.where(is_out_of_range(form, inputs), jnp.nan, zero)
        rows = cotangent, share, cost, None
        to_x = label.entries.add_to(zero, -cotangent * share, axis)
        return to_x, label.to_label(c, rows), label.to_class_weight(c, rows)

    passes = _passes(form, inputs, cotangent)
    if inputs.indices is not None:
        grads = passes.map(of_entries, cotangent)
    elif by_index(inputs.labels):
        grads = passes.map(of_index, cotangent, jnp.expand_dims(inputs.labels, axis))
    else:
        grads = passes.map(of_probabilities, cotangent)
    return (like_inputs(summed_up(form, inputs, *grads), inputs),)


def _costs_tangent(form, inputs, moving):
    if by_index(inputs.labels):
        return {"label": -_at_label(form, inputs, moving.logits)}
    passes = _passes(form, inputs, None)
    weight = along(moving.class_weight, inputs.logits.ndim, form.axis, inputs.dtype)
    if inputs.indices is not None:
        passes.moving(Moving(moving.logits, None, weight))
        return {"label": _sparse(form, inputs).tangent(passes, None, Moved(None, None, None, moving.labels))}
    still = jnp.sum(jnp.zeros_like(inputs.logits, inputs.dtype), form.axis, keepdims=True)
    passes.moving(Moving(moving.logits, moving.labels, weight, reference=still))
    return {"label": ProbabilityLabel().tangent(passes, None, Moved(still, None, still))}


_nll_costs.defvjp(_costs_fwd, _costs_bwd)
_costs = with_forward_mode(_nll_costs, _costs_tangent)
