"""What each position costs, and the exact gradient of that: the rule under `cross_entropy`.

With log p = (x - m) - log_z (`_rows`), a position has up to three costs, and its loss is a sum of them whose
coefficients (weights, smoothing, the z-loss, the mean's denominator) are plain JAX outside the rule:

    label     -log p[t], or sum of q[j] w[j] * -log p[j] for class probabilities q and class weights w
    uniform   the mean over the classes of w[j] * -log p[j], for label smoothing
    z         (m + log_z)**2, for the z-loss

Every term of these sums is >= 0, so each is as exact as log p. Memory: nothing of the size of the logits in the forward
pass; in the backward pass their gradient alone, while gradients of class weights and of probability labels may write as
many arrays of that size again. Arithmetic in at least float32.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jxent._labels import along, by_index, clipped, out_of_range, times
from jxent._passes import again, class_sum, on_cpu
from jxent._reduce import only
from jxent._rows import (
    below_max,
    centered,
    class_indices,
    compute_dtype,
    label_logit,
    normalizer,
    pick,
    product,
    unmasked,
)
from jxent._shards import Shards, cast, largest, offset, own, sharded_like, smallest, summed, varying


class Form(NamedTuple):
    """Which costs are wanted, of what; static."""

    axis: int
    logit_softcap: float | None
    uniform: bool
    z: bool
    stats: bool
    shards: Shards = Shards()  # of the classes
    room: bool = False  # for an array of the logits' size, as beside the logits of a block


class Costs(NamedTuple):
    """Row arrays (the logits' shape with one class); None where not wanted. The last four carry no gradient."""

    label: Array
    uniform: Array | None
    z: Array | None
    log_normalizer: Array | None = None
    log_prob: Array | None = None
    entropy: Array | None = None
    prediction: Array | None = None


class Residuals(NamedTuple):
    logits: Array
    labels: Array
    class_weight: Array | None
    keep: Array | None
    first: Array | None
    top: Array  # this and the rest are row arrays
    log_z: Array
    log_normalizer: Array
    exp: Array | None  # of the logits' shape, see `Rows`
    label_cost: Array
    present: Array | None  # how many classes are not masked
    mean_weight: Array | None  # their mean class weight


def _dtype(logits, labels):
    return compute_dtype(logits.dtype, *([] if by_index(labels) else [labels.dtype]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def costs(form, logits, labels, class_weight, keep, first):
    """The costs of each position.

    `labels` are class indices without the class axis or class probabilities of the logits' shape; `class_weight`
    (classes,) or None enters the sums over classes and not the cost of an index label; `keep` is a row array, False
    where a position does not count, or None. What the logits hold at such a position does not reach a gradient. Where
    the classes are sharded, all of these are this shard's, but class indices count all classes, and `first` is the one
    that this shard begins with; otherwise `first` is None.
    """
    return own(costs_fwd(form, logits, labels, class_weight, keep, first)[0], form.shards, first)


def costs_fwd(form, logits, labels, class_weight, keep, first):
    axis, cap, dtype = (form.axis,), form.logit_softcap, _dtype(logits, labels)
    weight = along(class_weight, logits.ndim, form.axis, dtype)
    local, axis_name = logits.shape[form.axis], form.shards.axis_name
    classes = local * form.shards.number
    sum_ = partial(class_sum, axis=axis, axis_name=axis_name)

    # Without the label's class the sum takes one pass less, and the loss is as exact, though log_z alone is not.
    label = left_out = None
    if by_index(labels):
        index = offset(clipped(labels, classes, form.axis), first)
        label = left_out = index, label_logit(logits, index, form.axis, axis_name)
    if form.uniform or form.z or form.stats or not isinstance(local, int) or local > 2**24:
        left_out = None  # float32 counts to 2**24
    top, log_z, log_normalizer, exp = normalizer(logits, left_out, axis, cap, dtype, form.room, axis_name)
    rows = top, log_z

    def cost(x, q, w, top, log_z, unit):
        return product(times(q.astype(dtype), w), log_z - centered(x, top, cap, unit), unit)

    if label is not None:
        log_z = jnp.where(out_of_range(jnp.expand_dims(labels, form.axis), classes), jnp.nan, log_z)
        label_cost = log_z - centered(label[1], top, cap, jnp.ones((), dtype))
        rows = top, log_z
    else:
        label_cost = sum_(cost, log_z, (logits, labels, weight), rows)
    last = label_cost

    present = mean_weight = uniform = None
    if form.uniform:

        def uniform_cost(x, w, top, log_z, unit):
            return product(times(unmasked(x, unit), w), log_z - centered(x, top, cap, unit), unit)

        present = jnp.maximum(sum_(unmasked, last, (logits,), ()), 1)
        uniform = last = sum_(uniform_cost, present, (logits, weight), rows) / present
        if weight is not None:
            mean_weight = last = sum_(lambda x, w, unit: unmasked(x, unit) * w, last, (logits, weight), ()) / present

    out = Costs(label_cost, uniform, log_normalizer**2 if form.z else None)
    if form.stats:

        def entropy_term(x, top, log_z, unit):
            log_p = centered(x, top, cap, unit) - log_z
            return product(jnp.exp(log_p), -log_p, unit)

        entropy = sum_(entropy_term, last, (logits,), rows)
        log_prob = -label_cost
        if not by_index(labels) and weight is not None:
            log_prob = -sum_(cost, entropy, (logits, labels, None), rows)
        prediction = _prediction(form, logits, first)
        out = out._replace(log_normalizer=log_normalizer, log_prob=log_prob, entropy=entropy, prediction=prediction)
    rows = top, log_z, log_normalizer, exp, label_cost, present, mean_weight
    return out, Residuals(logits, labels, class_weight, keep, first, *rows)


def _prediction(form, logits, first):
    """The first class with the largest logit, or the first whose logit is NaN."""
    here = jnp.expand_dims(lax.argmax(logits, form.axis, jnp.int32), form.axis)
    if first is None:
        return here
    value = lax.stop_gradient(pick(logits, here, form.axis))
    value = jnp.where(jnp.isnan(value), jnp.inf, value)
    best = value == largest(value, form.shards.axis_name)
    return smallest(jnp.where(best, here + first, jnp.iinfo(jnp.int32).max), form.shards.axis_name)


# With p = exp(log p), V the mean of the class weights and n the number of classes,
#
#     d label / dx[j]          = p[j] - [j = t],                   and expm1(-label) at j = t
#                              = p[j] Q - q[j] w[j],               Q = sum of q w
#     d uniform / dx[j]        = p[j] V - w[j] / n                 (the same with q = 1 / n)
#     d z / dx[j]              = 2 (m + log_z) p[j]
#
# In the second and third line one class may have p near 1, and p Q - q w cancels there. It is computed as
# Q expm1(log p[j]) + (sum of q w over the other classes), which does not: a one-hot q gives the first line's gradient.
def costs_bwd(form, residuals, cotangents):
    logits, labels, class_weight, keep, first, top, log_z, log_normalizer, exp, label_cost, present, mean_weight = (
        residuals
    )
    axis, cap, dtype = (form.axis,), form.logit_softcap, log_z.dtype
    weight = along(class_weight, logits.ndim, form.axis, dtype)
    to_label, to_uniform, to_z = cotangents[:3]
    sum_ = partial(class_sum, axis=axis, axis_name=form.shards.axis_name)

    last, total, others, other_weight = to_label, None, None, None
    if not by_index(labels):

        def below(q, x, w, top, unit):
            return times(q.astype(dtype), w) * below_max(x, top, unit)

        last = total = sum_(lambda q, w, unit: times(q.astype(dtype), w), last, (labels, weight), ())
        last = others = sum_(below, last, (labels, logits, weight), (top,))
    if form.uniform and weight is not None:

        def weight_below(x, w, top, unit):
            return unmasked(x, unit) * w * below_max(x, top, unit)

        last = other_weight = sum_(weight_below, last, (logits, weight), (top,)) / present
    elif form.uniform:
        mean_weight, other_weight = jnp.ones_like(present), (present - 1) / present

    inverse = jnp.exp(-log_z)  # of the normalizer
    scale, at_label = to_label * inverse, to_label * jnp.expm1(-label_cost)
    rows = top, log_z, total, others, mean_weight, other_weight, inverse, scale, at_label
    x, labels, exp, w, top, log_z, total, others, mean_weight, other_weight, inverse, scale, at_label, unit = again(
        last, logits, labels, exp, weight, *rows
    )
    z, pull = jax.vjp(lambda x: centered(x, top, cap, unit), x)
    masked = x == -jnp.inf
    log_p = z - log_z
    p = jnp.exp(log_p) if exp is None else exp * inverse
    confident = log_p > jnp.log(2 / 3)
    if by_index(labels):
        here = class_indices(x, form.axis) == offset(jnp.expand_dims(labels, form.axis), first)
        grad = jnp.where(here, at_label, to_label * p if exp is None else scale * exp)
        grad_labels, per_class = None, 0
    else:
        q = labels.astype(dtype)
        grad = to_label * jnp.where(confident, total * jnp.expm1(log_p) + others, total * p - times(q, w))
        cost = jnp.where(masked & (q == 0), 0, -log_p)  # a masked class that no label names is no class
        grad_labels = only(keep, to_label * times(cost, w))
        per_class = to_label * q * cost
    if form.uniform:
        share = jnp.where(masked, 0, (1 if w is None else w) / present)
        grad += to_uniform * jnp.where(
            confident, mean_weight * jnp.expm1(log_p) + other_weight, mean_weight * p - share
        )
        per_class += to_uniform * jnp.where(masked, 0, -log_p) / present
    if form.z:
        grad += 2 * to_z * log_normalizer * p
    # Of no positions the gradient is a constant, which varies along no axis by itself.
    grad = only(keep, pull(cast(grad, varying(z)))[0])

    grad_weight = None
    if class_weight is not None:
        positions = tuple(a for a in range(logits.ndim) if a != form.axis)
        grad_weight = jnp.sum(only(keep, per_class), positions)
    return grad, grad_labels, grad_weight


def _keeps_exp(form, logits, labels):
    """Whether exp(x - m) can be kept for the backward pass in the place of the logits, and is all that it needs."""
    plain = by_index(labels) and not form.uniform and form.logit_softcap is None
    return plain and logits.dtype == compute_dtype(logits.dtype)


def _costs_fwd(form, logits, labels, class_weight, keep, first):
    def forward(cpu, *inputs):
        rows, residuals = costs_fwd(form._replace(room=cpu), *inputs)
        return rows, residuals._replace(logits=residuals.exp, exp=None) if cpu else residuals

    inputs = logits, labels, class_weight, keep, first
    rows, residuals = on_cpu(forward, *inputs) if _keeps_exp(form, logits, labels) else forward(False, *inputs)
    return own(rows, form.shards, first), residuals


def _costs_bwd(form, residuals, cotangents):
    def backward(cpu, residuals, cotangents):
        return costs_bwd(form, residuals._replace(exp=residuals.logits) if cpu else residuals, cotangents)

    operands = residuals, summed(Costs(*cotangents[:3]), form.shards)
    keeps_exp = _keeps_exp(form, residuals.logits, residuals.labels)
    grads = on_cpu(backward, *operands) if keeps_exp else backward(False, *operands)
    grads = (None if grad is None else grad.astype(like.dtype) for grad, like in zip(grads, residuals[:3], strict=True))
    return *map(sharded_like, grads, residuals[:3]), None, None


costs.defvjp(_costs_fwd, _costs_bwd)
