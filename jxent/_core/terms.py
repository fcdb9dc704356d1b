"""What a term is made of, class by class: a few functions that stay exact, in every derivative, where others cancel.

All of them are spelled for a sum over the classes: without comparisons, and with constants made of the `unit`, which is
1 in the dtype to compute in; `passes` says why.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.custom_jvp
def expm1(x):
    """exp(x) - 1, with the derivative exp(x). JAX takes the result plus 1, in which a small exp(x) has no digits."""
    return jnp.expm1(x)


@expm1.defjvp
def _expm1_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return expm1(x), jnp.exp(x) * dx


def most(unit):
    """The largest finite number."""
    return float(jnp.finfo(unit.dtype).max) * unit


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def centered(logits, top, log_z, cap, unit):
    """x - m, in the dtype of `unit`: exactly 0 at the largest logit `top`. `log_z` matters to the tangent alone.

    x is the logit, or cap * tanh(logit / cap). With a = top / cap and b = logit / cap,

        tanh(b) - tanh(a) = 2 expm1(-2 (a - b)) / ((1 + exp(-2 a)) (1 + exp(2 b)))

    which does not cancel, as the difference of two rounded tanh would.
    """
    del log_z
    x, top = logits.astype(unit.dtype), top.astype(unit.dtype)
    if cap is None:
        return x - top
    cap = cap * unit
    falling, rising = jnp.exp(-2 * unit * (top / cap)), jnp.exp(2 * unit * (x / cap))
    z = 2 * cap * jnp.expm1(-2 * unit * ((top - x) / cap)) / ((unit + falling) * (unit + rising))
    # The last term is 0, or -inf where x is: a masked class stays masked.
    return z + jnp.minimum(x * (0.25 * unit) + most(unit), 0 * unit)


# The tangent is dx[j] - dx[top] where a class has a p of 2/3 or more, and not dx[j] as if the maximum were a constant:
# sums of p[j] dz[j] would then have a term of the size of dx[top] that their result has not. At the largest logit 0 is
# written as 0 and not as a difference, or gradients of it would add numbers that cancel.
@centered.defjvp
def _centered_jvp(cap, primals, tangents):
    logits, top, log_z, unit = primals
    z = centered(logits, top, log_z, cap, unit)
    of_both = zip(primals[:2], tangents[:2], strict=True)
    dx, dtop = (slope(a.astype(z.dtype), cap, da.astype(z.dtype)) for a, da in of_both)
    at_top = confident(log_z) * (unit - below_top(logits, top, unit))
    return z, (dx - dtop) * (unit - lax.stop_gradient(at_top))


def confident(log_z):
    """1 where the largest logit has a p of at least 2/3, so that no other is as large; 0 elsewhere."""
    return lax.stop_gradient((log_z < math.log(1.5)).astype(log_z.dtype))


def below_top(logits, top, unit):
    """0 at the largest logit `top` and 1 below it."""
    distance = top.astype(unit.dtype) - logits.astype(unit.dtype)
    return jnp.minimum(distance * (most(unit) / 4), unit)


def slope(logits, cap, values, unit: float | Array = 1.0):
    """`values` times the derivative of x by the logits: 1 - tanh(u)**2, which cancels where the cap saturates.

    4 e / (1 + e)**2 with e = exp(-2 |u|) is the same, and does not cancel. A sum needs the `unit`.
    """
    if cap is None:
        return values
    e = jnp.exp(-2 * unit * jnp.abs(logits / (cap * unit)))
    return 4 * unit * e / ((unit + e) * (unit + e)) * values


def present(logits, unit):
    """1, and 0 where a logit is -inf."""
    x = logits.astype(unit.dtype)
    return lax.stop_gradient(jnp.minimum(jnp.maximum(x * (0.25 * unit) + most(unit), 0 * unit), unit))


@jax.custom_jvp
def product(weight, cost, unit):
    """weight * cost for a cost in [0, inf], with 0 * inf = 0."""
    finite = jnp.minimum(cost, most(unit))
    sign = jnp.maximum(jnp.minimum(weight * most(unit), unit), -unit)
    # The largest finite number where the cost is infinite and the weight is not 0, which four times is infinite.
    excess = sign * ((unit - present(-cost, unit)) * finite)
    return weight * finite + (4 * unit) * excess


def marginal(weight, cost, unit):
    """The derivative of `product` by the weight: the cost, finite, but 0 where it is infinite and the weight is 0."""
    used = jnp.minimum(jnp.abs(weight) * most(unit), unit)
    return jnp.maximum(lax.stop_gradient(used), present(-cost, unit)) * jnp.minimum(cost, most(unit))


@product.defjvp
def _product_jvp(primals, tangents):
    (weight, cost, unit), (dweight, dcost, _) = primals, tangents
    return product(weight, cost, unit), dweight * marginal(weight, cost, unit) + weight * dcost
