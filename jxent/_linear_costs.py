"""The rules of `linear_costs` and `linear_total`: what is computed in which pass, and what is kept in between."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jxent._costs import Costs
from jxent._reduce import Coefficients, weigh
from jxent._rows import compute_dtype
from jxent._sharded import sharded
from jxent._shards import summed
from jxent._sweep import Inputs


def _values(primals):
    """(values, wanted) of a forward rule's arguments, as `symbolic_zeros` gives them.

    `wanted` has an empty array for each input, of its dtype: of one axis if the input is differentiated, of two if not.
    JAX may take one call's residuals apart as it does another's, so that only shapes can tell which inputs are.
    """
    values = jax.tree.map(lambda a: a.value, primals)
    return values, jax.tree.map(lambda a: jnp.zeros((0,) if a.perturbed else (0, 0), a.value.dtype), primals)


def _names(wanted):
    return tuple(name for name, like in wanted._asdict().items() if like is not None and like.ndim == 1)


def _gradients(wanted, grads, factor=None):
    """`Inputs` of gradients, each in its input's dtype and times a factor; None where there is none."""
    out = dict.fromkeys(Inputs._fields)
    for name in _names(wanted):
        like, grad = getattr(wanted, name), grads[name]
        grad = grad if factor is None else grad.astype(compute_dtype(like.dtype)) * factor
        out[name] = grad.astype(like.dtype)
    return Inputs(**out)


def _is_zero(cotangent) -> bool:
    return isinstance(cotangent, SymbolicZero)


def _array(cotangent):
    return jnp.zeros(cotangent.shape, cotangent.dtype) if _is_zero(cotangent) else cotangent


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_costs(sweep, inputs) -> Costs:
    """The costs of each position. The gradients take a sweep of their own, in the backward pass."""
    return sharded(sweep, (), inputs, None)[0]


def _linear_costs_fwd(sweep, primals):
    inputs, wanted = _values(primals)
    return sharded(sweep, (), inputs, None)[0], (inputs, wanted)


# The gradient of the sum of cotangent[i] * cost[i]: the cotangents are the coefficients.
def _linear_costs_bwd(sweep, residuals, cotangents):
    inputs, wanted = residuals
    coefficients = jax.tree.map(_array, Coefficients(*cotangents[:3]), is_leaf=_is_zero)
    coefficients = summed(coefficients, sweep.form.shards)
    return (_gradients(wanted, sharded(sweep, _names(wanted), inputs, coefficients)[1]),)


linear_costs.defvjp(_linear_costs_fwd, _linear_costs_bwd, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_total(sweep, inputs, coefficients) -> tuple[Array, Costs]:
    """(total, costs): the sum of the costs with these coefficients, and the costs, which carry no gradient.

    One sweep takes the total and its gradients, which are kept for the backward pass.
    """
    rows = sharded(sweep, (), inputs, None)[0]
    return jnp.sum(weigh(coefficients, rows)), rows


class Residuals(NamedTuple):
    wanted: Inputs  # as of `_values`
    gradients: dict[str, Array]  # of the total, for each input; those that are not wanted are empty
    coefficients: Coefficients
    rows: Costs  # those that have coefficients


def _linear_total_fwd(sweep, primals, coefficients):
    inputs, wanted = _values(primals)
    coefficients = jax.tree.map(lambda c: c.value, coefficients)
    rows, grads = sharded(sweep, _names(wanted), inputs, coefficients)
    grads = {name: grads.get(name, like) for name, like in wanted._asdict().items() if like is not None}
    residuals = Residuals(wanted, grads, coefficients, Costs(*rows[:3]))
    return (jnp.sum(weigh(coefficients, rows)), rows), residuals


# With coefficients c and costs of the inputs x, total = sum of c[i] cost[i](x). So d total / dx is the sweep's gradient
# for these coefficients, whatever the cotangent, which multiplies it; and d total / dc[i] = cost[i].
def _linear_total_bwd(sweep, residuals, cotangents):
    wanted, grads, coefficients, rows = residuals
    factor = _array(cotangents[0])
    _, pull = jax.vjp(lambda c: jnp.sum(weigh(c, rows)), coefficients)
    return _gradients(wanted, grads, summed(factor, sweep.form.shards)), pull(factor)[0]


linear_total.defvjp(_linear_total_fwd, _linear_total_bwd, symbolic_zeros=True)
