"""The rule of the costs: their values forwards, their gradients backwards, and what is kept in between."""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jxent._core import divergences
from jxent._core.costs import CostInputs, Form, Known, Moved, costs_of, is_out_of_range
from jxent._core.forward_mode import moving_where, with_forward_mode
from jxent._core.labels import at_label, by_index, clipped, out_of_range
from jxent._core.normalizer import normalizer
from jxent._core.passes import Arrays, Moving, Passes, given, on_cpu
from jxent._core.prediction import largest_class
from jxent._core.shards import each_shards_own, gradient_like, local_index, shared_cotangent
from jxent._core.weights import along, only


class Residuals(NamedTuple):
    inputs: CostInputs  # without logits where `exp` serves for them
    top: Array  # row arrays, see `Normalizer`
    log_z: Array  # NaN where the index label is out of range
    kept: dict[str, Array | None]  # row arrays, by the names of the costs that keep them
    exp: Array | None  # of the logits' shape, see `Normalizer`

    def passes(self, form, previous):
        dtype, inputs = self.log_z.dtype, self.inputs
        like = inputs.logits if self.exp is None else self.exp
        arrays = Arrays(
            inputs.logits,
            q=None if by_index(inputs.labels) or inputs.indices is not None else inputs.labels,
            weight=along(inputs.class_weight, like.ndim, form.axis, dtype),
            exp=self.exp,
            top=self.top,
            log_z=self.log_z,
            inverse_z=None if self.exp is None else jnp.exp(-self.log_z),
        )
        axis, lacks_label = (form.axis,), leaves_label_out(form, inputs.labels, like.shape[form.axis])
        return Passes(arrays, axis, dtype, form.logit_softcap, form.shards.axis_name, previous, lacks_label)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _costs(form: Form, inputs: CostInputs) -> tuple[dict[str, Array], Array | None]:
    """(the costs of each position by name, the prediction if statistics are wanted), row arrays."""
    return each_shards_own(costs_fwd(form, False, inputs)[0], form.shards, inputs.first)


def costs_fwd(form, room, inputs) -> tuple[Any, Any]:
    """The forward rule; with `room` for an array of the logits' size, exponentials are kept."""
    if form.divergence is not None:
        divergence, residuals = divergences.forward(form, inputs)
        return ({"divergence": divergence}, None), residuals
    logits, labels, axis = inputs.logits, inputs.labels, form.axis
    classes = logits.shape[axis] * form.shards.number
    label = None
    if by_index(labels):
        index = local_index(clipped(labels, classes, axis), inputs.first)
        label = index, at_label(logits, index, axis, form.shards.axis_name)
    left_out = label if leaves_label_out(form, labels, logits.shape[axis]) else None
    cap, axis_name = form.logit_softcap, form.shards.axis_name
    row = normalizer(logits, left_out, (axis,), cap, inputs.dtype, room, axis_name)
    log_z = row.log_z
    if label is not None:
        log_z = jnp.where(out_of_range(jnp.expand_dims(labels, axis), classes), jnp.nan, log_z)
    if inputs.indices is not None:
        log_z = jnp.where(is_out_of_range(form, inputs), jnp.nan, log_z)

    residuals = Residuals(inputs, row.top, log_z, {}, None)
    passes = residuals.passes(form, log_z)
    known = Known(row.log_normalizer, None if label is None else label[1])
    values = {}
    for name, cost in costs_of(form, inputs).items():
        values[name] = cost.value(passes, known._replace(label=values.get("label")))
    out = {name: value for name, (value, _) in values.items()}
    prediction = largest_class(logits, axis, inputs.first, axis_name) if form.stats else None
    return (out, prediction), residuals._replace(kept={name: kept for name, (_, kept) in values.items()}, exp=row.exp)


def leaves_label_out(form, labels, classes):
    """Whether the sum of exponentials leaves the label's class out instead of the maximum's.

    It must not where log_z is wanted for itself. Nor where float32 cannot count the classes, beyond 2**24.
    """
    countable = isinstance(classes, int) and classes <= 2**24
    return by_index(labels) and form.costs == ("label",) and not form.stats and countable


def costs_bwd(form, residuals, cotangents):
    """The gradients of the costs' sum with these coefficients; but for the logits', in the dtype to compute in.

    A cost without a coefficient, or with None for it, has no share in the sum.
    """
    inputs = residuals.inputs
    if form.divergence is not None:
        to_q, to_p, to_temperature = divergences.backward(form, residuals, cotangents["divergence"])
        return summed_up(form, inputs, to_q, to_p, None, to_temperature)
    named = {name: cost for name, cost in costs_of(form, inputs).items() if cotangents.get(name) is not None}
    passes = residuals.passes(form, cotangents[next(iter(named))])
    rows = {name: cost.rows(passes, residuals.kept[name], cotangents[name]) for name, cost in named.items()}

    def gradients(c, rows):
        to_x = given(_added_up(cost.gradient(c, rows[name]) for name, cost in named.items()))
        to_labels, to_weight = None, None
        if not by_index(inputs.labels):
            of_label = (cost.to_label(c, rows[name]) for name, cost in named.items())
            to_labels = _added_up(of_label, jnp.zeros_like(inputs.labels, to_x.dtype))
        if inputs.class_weight is not None:
            of_weight = (cost.to_class_weight(c, rows[name]) for name, cost in named.items())
            to_weight = _added_up(of_weight, jnp.zeros_like(to_x))
        return c.to_logit(to_x), to_labels, to_weight

    return summed_up(form, inputs, *passes.map(gradients, rows))


def costs_tangent(form, residuals, moving):
    """The tangents of the costs, where those of the inputs are `moving`; None for an input that does not move."""
    if form.divergence is not None:
        return {"divergence": divergences.tangent(form, residuals, moving)}
    inputs, axis, log_z = residuals.inputs, form.axis, residuals.log_z
    passes = residuals.passes(form, log_z)
    weight = along(moving.class_weight, log_z.ndim, axis, log_z.dtype)
    sparse = inputs.indices is not None
    passes.moving(Moving(moving.logits, None if sparse else moving.labels, weight))
    if moving.logits is None:
        moved = Moved(*[jnp.zeros_like(log_z)] * 3)
    else:
        moved = _moved(form, residuals, passes, moving.logits)
    if sparse:
        moved = moved._replace(labels=moving.labels)
    return {name: cost.tangent(passes, residuals.kept[name], moved) for name, cost in costs_of(form, inputs).items()}


def _moved(form, residuals, passes, dlogits):
    inputs, axis, axis_name, label_dx = residuals.inputs, form.axis, form.shards.axis_name, None
    if by_index(inputs.labels):
        index = local_index(clipped(inputs.labels, dlogits.shape[axis] * form.shards.number, axis), inputs.first)
        picked = partial(at_label, labels=index, axis=axis, axis_name=axis_name)
        label_dx = passes.dx_of(None if form.logit_softcap is None else picked(inputs.logits), picked(dlogits))
    reference = passes.dx_of(passes.arrays.top, passes.mean_at_max(lambda c: c.dlogit))
    if passes.lacks_label:
        label_is_largest = residuals.kept["label"] - residuals.log_z < math.log(4 / 3)  # see `terms.below_top`
        reference = jnp.where(label_is_largest, given(label_dx), reference)
    passes.moving(passes.arrays.moving._replace(reference=reference))
    log_z = passes.sum(lambda c: c.p_but_label * c.dz)
    label_z = None if label_dx is None else label_dx - reference
    if passes.lacks_label:
        log_z += jnp.exp(-residuals.kept["label"]) * given(label_z)
    return Moved(log_z, label_z, log_z + reference)


def _added_up(arrays, nothing=None):
    """The sum of those that are not None; of none it is `nothing`."""
    there = [array for array in arrays if array is not None]
    return reduce(jnp.add, there) if there else nothing


def summed_up(form, inputs, to_logits, to_labels, to_weight, to_temperature=None):
    """The gradients of `CostInputs`, from those at each position; 0 where a position does not count."""
    grads = CostInputs(to_logits, to_labels, to_weight, None, None, to_temperature)
    grads = jax.tree.map(lambda grad: only(inputs.keep, grad), grads)
    if to_weight is not None:
        positions = tuple(a for a in range(to_weight.ndim) if a != form.axis)
        grads = grads._replace(class_weight=jnp.sum(grads.class_weight, positions))
    return grads if to_temperature is None else grads._replace(temperature=jnp.sum(grads.temperature))


# --- positions that do not count --------------------------------------------------------------------------------------


def counted(inputs):
    """The inputs, of which no derivative, of whatever order, meets a position that does not count.

    Its logits may be NaN, and 0 times NaN would be NaN. The inputs themselves are not copied.
    """
    if inputs.keep is None:
        return inputs
    labels = inputs.labels if by_index(inputs.labels) else moving_where(inputs.keep, inputs.labels)
    return inputs._replace(logits=moving_where(inputs.keep, inputs.logits), labels=labels)


# --- between the passes -----------------------------------------------------------------------------------------------


def _exchanges_logits(form, inputs):
    """Whether exponentials can be kept for the backward pass in the place of the logits, and suffice for the loss."""
    if form.divergence is not None:
        return False
    of_loss = costs_of(form._replace(stats=False), inputs)
    takes_p_alone = all(cost.gradient_takes_p_alone for cost in of_loss.values())
    return takes_p_alone and form.logit_softcap is None and inputs.logits.dtype == inputs.dtype


class _Kept(NamedTuple):
    """Residuals; or residuals without logits, and beside them logits or, on a CPU, exponentials."""

    residuals: Residuals
    logits_or_exp: Array | None = None
    logits: Array | None = None  # beside the exponentials, for the statistics that need them


def _costs_fwd(form, inputs):
    def forward(cpu, inputs):
        out, residuals = costs_fwd(form, cpu, inputs)
        logits_or_exp = residuals.exp if cpu else inputs.logits
        return out, (residuals._replace(inputs=inputs._replace(logits=None), exp=None), logits_or_exp)

    inputs = counted(inputs)
    if _exchanges_logits(form, inputs):
        out, kept = on_cpu(forward, inputs)
        kept = _Kept(*kept, inputs.logits if form.stats else None)
    else:
        out, residuals = costs_fwd(form, False, inputs)
        kept = _Kept(residuals)
    return each_shards_own(out, form.shards, inputs.first), kept


def _costs_bwd(form, kept, cotangents):
    inputs, of_costs = kept.residuals.inputs, cotangents[0]
    if kept.logits is not None:
        named = {name: cost for name, cost in costs_of(form, inputs).items() if of_costs[name] is not None}
        if all(cost.gradient_takes_p_alone for cost in named.values()):
            kept = kept._replace(logits=None)
    grads = _with_residuals(costs_bwd, form, kept, shared_cotangent(of_costs, form.shards))
    if kept.logits_or_exp is not None:
        inputs = inputs._replace(logits=kept.logits_or_exp)
    return (like_inputs(grads, inputs),)


def _costs_tangent(form, kept, moving):
    return _with_residuals(costs_tangent, form, kept, moving)


def _with_residuals(function, form, kept, operand):
    """``function(form, residuals, operand)`` with the residuals that `_costs_fwd` kept."""

    def of_platform(cpu, kept, operand):
        logits = kept.logits if cpu else kept.logits_or_exp
        residuals = kept.residuals._replace(
            inputs=kept.residuals.inputs._replace(logits=logits), exp=kept.logits_or_exp if cpu else None
        )
        return function(form, residuals, operand)

    if kept.logits_or_exp is None:
        return function(form, kept.residuals, operand)
    return on_cpu(of_platform, kept, operand)


def like_inputs(grads, inputs):
    """The gradients in the dtype and the sharding of the inputs."""

    def like(grad, array):
        return None if grad is None else gradient_like(grad.astype(array.dtype), array)

    return CostInputs._make(map(like, grads, inputs))


_costs.defvjp(_costs_fwd, _costs_bwd)
costs = with_forward_mode(_costs, _costs_tangent)


# --- of a block of a sweep --------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _costs_of_block(static, inputs):
    """`costs`, for ``static = (form, room)`` as of `costs_fwd`, with one residual for all platforms."""
    return _costs_of_block_fwd(static, inputs)[0]


def _costs_of_block_fwd(static, inputs):
    form, room = static
    out, residuals = costs_fwd(form, room, inputs)
    return each_shards_own(out, form.shards, inputs.first), residuals


def _costs_of_block_bwd(static, residuals, cotangents):
    form, _ = static
    grads = costs_bwd(form, residuals, shared_cotangent(cotangents[0], form.shards))
    return (like_inputs(grads, residuals.inputs),)


def _costs_of_block_tangent(static, residuals, moving):
    form, _ = static
    return costs_tangent(form, residuals, moving)


_costs_of_block.defvjp(_costs_of_block_fwd, _costs_of_block_bwd)
costs_of_block = with_forward_mode(_costs_of_block, _costs_of_block_tangent)
