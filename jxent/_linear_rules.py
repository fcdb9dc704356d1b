"""The rules of `linear_costs` and `linear_total`: what is computed in which pass, and what is kept in between.

Coefficients are a dictionary from the name of a cost to an array of the positions' shape.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jxent._core.passes import compute_dtype
from jxent._core.shards import shared_cotangent
from jxent._core.weights import weigh
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
        grad = grad if factor is None else grad.astype(compute_dtype(like.dtype)) * factor
        out[name] = grad.astype(like.dtype)
    return Inputs(**out)


def _is_zero(cotangent) -> bool:
    return isinstance(cotangent, SymbolicZero)


def _array(cotangent):
    return jnp.zeros(cotangent.shape, cotangent.dtype) if _is_zero(cotangent) else cotangent


# --- the costs of each position: the gradients take a sweep of their own, in the backward pass ------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_costs(sweep, inputs: Inputs) -> Swept:
    """The costs and statistics of each position; the statistics carry no gradient."""
    return sharded(sweep, (), inputs, {})[0]


def _linear_costs_fwd(sweep, primals):
    inputs, differentiated = _values(primals)
    return sharded(sweep, (), inputs, {})[0], (inputs, differentiated)


# The gradient of the sum of cotangent[i] * cost[i]: the cotangents are the coefficients.
def _linear_costs_bwd(sweep, residuals, cotangents):
    inputs, differentiated = residuals
    coefficients = shared_cotangent({name: _array(c) for name, c in cotangents.costs.items()}, sweep.form.shards)
    return (_gradients(differentiated, sharded(sweep, _names(differentiated), inputs, coefficients)[1]),)


linear_costs.defvjp(_linear_costs_fwd, _linear_costs_bwd, symbolic_zeros=True)


# --- their total: one sweep takes it and its gradients, which are kept for the backward pass --------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_total(sweep, inputs: Inputs, coefficients: dict[str, Array]) -> tuple[Array, Swept]:
    """(the sum of the costs with these coefficients, the costs and statistics, which carry no gradient)."""
    swept = sharded(sweep, (), inputs, {})[0]
    return jnp.sum(weigh(coefficients, swept.costs)), swept


class Residuals(NamedTuple):
    differentiated: Inputs  # as of `_values`
    gradients: dict[str, Any]  # of the total, for each input; those that are not differentiated are empty
    coefficients: dict[str, Array]
    costs: dict[str, Array]


def _linear_total_fwd(sweep, primals, coefficients):
    inputs, differentiated = _values(primals)
    coefficients = jax.tree.map(lambda c: c.value, coefficients)
    swept, grads = sharded(sweep, _names(differentiated), inputs, coefficients)
    grads = {name: grads.get(name, like) for name, like in differentiated._asdict().items() if like is not None}
    residuals = Residuals(differentiated, grads, coefficients, swept.costs)
    return (jnp.sum(weigh(coefficients, swept.costs)), swept), residuals


# With coefficients c and costs of the inputs x, total = sum of c[i] cost[i](x). So d total / dx is the sweep's gradient
# for these coefficients, whatever the cotangent, which multiplies it; and d total / dc[i] = cost[i].
def _linear_total_bwd(sweep, residuals, cotangents):
    factor = _array(cotangents[0])
    _, pull = jax.vjp(lambda c: jnp.sum(weigh(c, residuals.costs)), residuals.coefficients)
    grads = _gradients(residuals.differentiated, residuals.gradients, shared_cotangent(factor, sweep.form.shards))
    return grads, pull(factor)[0]


linear_total.defvjp(_linear_total_fwd, _linear_total_bwd, symbolic_zeros=True)
