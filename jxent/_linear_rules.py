"""The rules of `linear_costs` and `linear_total`: what is computed in which pass, and what is kept in between.

Coefficients are a dictionary from the name of a cost to an array of the positions' shape.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jxent._core.costs import STATISTIC_NAMES
from jxent._core.forward_mode import with_forward_mode
from jxent._core.passes import compute_dtype
from jxent._core.shards import scaled, shared_cotangent
from jxent._core.weights import weigh
from jxent._mesh.auto import depends_on_devices
from jxent._mesh.sharded import sharded
from jxent._sweep.sweep import Inputs, Swept


def _values(primals):
    """(values, differentiated) of a forward rule's arguments, as `symbolic_zeros` gives them.

    `differentiated` has an empty array for each input, of its dtype: of one axis if the input is differentiated, of two
    if not. JAX may take one call's residuals apart as it does another's, so that only shapes can tell which inputs are.
    """
    values = jax.tree.map(lambda a: a.value, primals)
    return values, jax.tree.map(lambda a: jnp.zeros((0,) if a.perturbed else (0, 0), a.value.dtype), primals)


def _names(differentiated):
    return tuple(name for name, like in differentiated._asdict().items() if like is not None and like.ndim == 1)


def _gradients(differentiated, grads, factor=None):
    """`Inputs` of gradients, each in its input's dtype and times a factor; None where there is none."""
    out = dict.fromkeys(Inputs._fields)
    for name in _names(differentiated):
        like, grad = getattr(differentiated, name), grads[name]
        grad = grad if factor is None else scaled(grad.astype(compute_dtype(like.dtype)), factor)
        out[name] = grad.astype(like.dtype)
    return Inputs(**out)


# --- the costs of each position: the gradients take a sweep of their own, in the backward pass ------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_costs(sweep, inputs: Inputs) -> Swept:
    """The costs of each position, the statistics among them, and the prediction."""
    return sharded(sweep, (), inputs, {})[0]


def _linear_costs_fwd(sweep, primals):
    inputs, differentiated = _values(primals)
    return sharded(sweep, (), inputs, {})[0], (inputs, differentiated)


# The gradient of the sum of cotangent[i] * cost[i]: the cotangents are the coefficients.
def _linear_costs_bwd(sweep, residuals, cotangents):
    inputs, differentiated = residuals
    return (_gradients_of_costs(sweep, inputs, differentiated, cotangents[0]),)


def _gradients_of_costs(sweep, inputs, differentiated, cotangents):
    """Those of the costs that have a cotangent."""
    coefficients = {name: cotangent for name, cotangent in cotangents.items() if cotangent is not None}
    coefficients = shared_cotangent(coefficients, sweep.form.shards)
    return _gradients(differentiated, sharded(sweep, _names(differentiated), inputs, coefficients)[1])


def _linear_costs_tangent(sweep, residuals, tangents):
    inputs, _ = residuals
    return _tangents_of_costs(sweep, inputs, tangents)


def _tangents_of_costs(sweep, inputs, tangents):
    """By a sweep whose blocks take the tangents of their logits, and of these those of the costs."""
    tangents = {name: tangent for name, tangent in tangents._asdict().items() if tangent is not None}

    def costs(moving):
        return sharded(sweep, (), inputs._replace(**moving), {})[0].costs

    return jax.jvp(costs, ({name: getattr(inputs, name) for name in tangents},), (tangents,))[1]


_linear_costs.defvjp(_linear_costs_fwd, _linear_costs_bwd, symbolic_zeros=True)
linear_costs = with_forward_mode(_linear_costs, _linear_costs_tangent, True, depends_on_devices)


# --- their total: one sweep takes it and its gradients, which are kept for the backward pass --------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_total(sweep, inputs: Inputs, coefficients: dict[str, Array]):
    """((the sum of the costs with these coefficients, the statistics), the prediction)."""
    costs, prediction = sharded(sweep, (), inputs, {})[0]
    return _total_and_statistics(coefficients, costs), prediction


def _total_and_statistics(coefficients, costs):
    return jnp.sum(weigh(coefficients, costs)), {name: costs[name] for name in costs if name not in coefficients}


class Residuals(NamedTuple):
    inputs: Inputs  # for tangents, and for the gradients of the statistics
    differentiated: Inputs  # as of `_values`
    gradients: dict[str, Any]  # of the total, for each input; those that are not differentiated are empty
    coefficients: dict[str, Array]
    costs: dict[str, Array]  # those of the total


def _linear_total_fwd(sweep, primals, coefficients):
    inputs, differentiated = _values(primals)
    coefficients = jax.tree.map(lambda c: c.value, coefficients)
    (costs, prediction), grads = sharded(sweep, _names(differentiated), inputs, coefficients)
    grads = {name: grads.get(name, like) for name, like in differentiated._asdict().items() if like is not None}
    of_total = {name: costs[name] for name in coefficients}
    residuals = Residuals(inputs, differentiated, grads, coefficients, of_total)
    return (_total_and_statistics(coefficients, costs), prediction), residuals


# With coefficients c and costs of the inputs x, total = sum of c[i] cost[i](x). So d total / dx is the sweep's gradient
# for these coefficients, whatever the cotangent, which multiplies it; and d total / dc[i] = cost[i]. The gradients of
# statistics take a sweep of their own, if they have cotangents.
def _linear_total_bwd(sweep, residuals, cotangents):
    to_total, to_statistics = cotangents[0]
    _, pull = jax.vjp(lambda c: jnp.sum(weigh(c, residuals.costs)), residuals.coefficients)
    parts = []
    if to_total is not None:
        factor = shared_cotangent(to_total, sweep.form.shards)
        parts.append(_gradients(residuals.differentiated, residuals.gradients, factor))
    if any(cotangent is not None for cotangent in to_statistics.values()):
        parts.append(_gradients_of_costs(sweep, residuals.inputs, residuals.differentiated, to_statistics))
    if to_total is None:
        to_total = jnp.zeros((), jax.eval_shape(weigh, residuals.coefficients, residuals.costs).dtype)
    return jax.tree.map(lambda *grads: sum(grads[1:], grads[0]), *parts), pull(to_total)[0]


# Not by the gradients that are there: the gradients of this tangent would add numbers that cancel.
def _linear_total_tangent(sweep, residuals, of_inputs, of_coefficients):
    coefficients = {name: c for name, c in of_coefficients.items() if c is not None}
    of_costs = {}
    if any(tangent is not None for tangent in of_inputs):
        of_costs = _tangents_of_costs(sweep, residuals.inputs, of_inputs)
    tangents = {
        "costs": {name: of_costs[name] for name in residuals.costs if name in of_costs},
        "coefficients": coefficients,
    }

    def weighed(moving):
        return jnp.sum(weigh(residuals.coefficients | moving["coefficients"], residuals.costs | moving["costs"]))

    at = {part: {name: getattr(residuals, part)[name] for name in moving} for part, moving in tangents.items()}
    of_total = jax.jvp(weighed, (at,), (tangents,))[1]
    still = jnp.zeros_like(next(iter(residuals.costs.values())))
    names = STATISTIC_NAMES if sweep.form.stats else ()
    return of_total, {name: of_costs.get(name, still) for name in names}


_linear_total.defvjp(_linear_total_fwd, _linear_total_bwd, symbolic_zeros=True)
linear_total = with_forward_mode(_linear_total, _linear_total_tangent, True, depends_on_devices)
