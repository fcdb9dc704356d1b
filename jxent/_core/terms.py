"""What a term is made of, class by class: a few functions that stay exact, in every derivative, where others cancel.

All of them are spelled for a sum over the classes: without comparisons, and with constants made of the `unit`, which is
1 in the dtype to compute in; `passes` says why.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jxent._core.forward_mode import mapped_with


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


def rounded(x, unit):
    """x. A compiler must round it before it takes anything off the result.

    Where x is a product that a compiler takes anew, it would otherwise fuse x - m into one operation, which does not
    round x, and x - m would not be 0 at the largest x. The sum here is rounded to x.
    """
    return x + x * (1e-30 * unit)


def rounded_if_few(x, unit):
    """`rounded`, for arrays so small that the time does not count.

    XLA:CPU makes one program of several passes over up to 32 classes and 4096 numbers, where products are taken anew.
    """
    few = all(isinstance(size, int) for size in x.shape) and x.size <= 2**16
    return rounded(x, unit) if few else x


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def centered(logits, top, log_z, cap, unit):
    """x - m, in the dtype of `unit`: exactly 0 at the largest logit `top`, if `log_z` is known.

    Where it is None, a large program may leave out the rounding of x. The tangent takes `log_z` as well.

    x is the logit, or cap * tanh(logit / cap). With a = top / cap and b = logit / cap,

        tanh(b) - tanh(a) = 2 expm1(-2 (a - b)) / ((1 + exp(-2 a)) (1 + exp(2 b)))

    which does not cancel, as the difference of two rounded tanh would.
    """
    x, top = logits.astype(unit.dtype), top.astype(unit.dtype)
    below = (rounded_if_few(x, unit) if log_z is None else mapped_with(rounded(x, unit), log_z)) - top
    if cap is None:
        return below
    cap = cap * unit
    falling, rising = jnp.exp(-2 * unit * (top / cap)), jnp.exp(2 * unit * (x / cap))
    z = 2 * cap * jnp.expm1(2 * unit * (below / cap)) / ((unit + falling) * (unit + rising))
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
    """0 at the largest logit `top`, 1 at those that lie at least log 2 below it, and a number between 0 and 1 between.

    Where the largest has to be told apart, its p is at least 2/3, and no other logit lies between. A comparison with
    `top` itself would hang on the last bit of the logits, which a compiler may compute twice.
    """
    distance = top.astype(unit.dtype) - logits.astype(unit.dtype)
    return jnp.minimum(jnp.maximum(16 * unit * distance - 4 * unit, 0 * unit), unit)


def below_top_of_exponentials(exp, unit):
    """`below_top` by the exponentials exp(x - m), which are 1 at the largest logit."""
    return jnp.minimum(jnp.maximum(6 * unit - 8 * unit * exp, 0 * unit), unit)


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


@jax.custom_jvp
def product_of_p(p, cost, unit):
    """p * cost for a cost that is infinite only where the probability p is 0; it is 0 there. Cheaper than `product`."""
    return p * jnp.minimum(cost, most(unit))


@product_of_p.defjvp
def _product_of_p_jvp(primals, tangents):
    (p, cost, unit), (dp, dcost, _) = primals, tangents
    return product_of_p(p, cost, unit), dp * marginal(p, cost, unit) + p * dcost


# --- of one logit alone -----------------------------------------------------------------------------------------------


@jax.custom_jvp
def softplus(x):
    """log(1 + exp x)."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    return softplus(*primals), sigmoid(*primals) * tangents[0]


@jax.custom_jvp
def sigmoid(x):
    """1 / (1 + exp(-x)), with the derivative sigmoid(x) sigmoid(-x): 1 - sigmoid(x) has no digits for a large x."""
    return jnp.exp(jnp.minimum(x, 0)) / (1 + jnp.exp(-jnp.abs(x)))


@sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return sigmoid(x), sigmoid(x) * sigmoid(-x) * dx


# --- of two distributions ---------------------------------------------------------------------------------------------
#
# With a = exp(log_a) and b = exp(log_b), u = log_b - log_a is given once more, exact where the two nearly agree.


def lost_by_difference(a, b):
    """What the rounding of a - b takes off it, exactly (Knuth's TwoSum). To differentiation it is 0."""
    a, b = lax.stop_gradient((a, b))
    rounded = a - b
    virtual = rounded - a
    return (a - (rounded - virtual)) - (b + virtual)


def quarter(logits, unit):
    """x / 4, and for -inf a number below that of any other: differences of these are finite."""
    return jnp.maximum(rounded_if_few(logits.astype(unit.dtype), unit) * (0.25 * unit), -most(unit) / 2)


def bounded_ratio(a, b, bound, unit, above=True):
    """a / b, but at least -bound, which is finite, and at most bound if it may be `above`; None for b is 1."""
    if b is not None:
        return _bounded_ratio(a, b, bound, unit, above)
    return jnp.maximum(jnp.minimum(a, bound) if above else a, -bound)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _bounded_ratio(a, b, bound, unit, above):
    return mapped_with(bounded_ratio(a / b, None, bound, unit, above), unit)


# Beyond the bound, where a may be infinite, it has no slope. JAX would multiply the slope there, inf, by 0.
@_bounded_ratio.defjvp
def _bounded_ratio_jvp(above, primals, tangents):
    (_, b, bound, unit), (da, db, _, _) = primals, tangents
    ratio = _bounded_ratio(*primals, above)
    inside = lax.stop_gradient(jnp.maximum(jnp.minimum((bound / 16 - jnp.abs(ratio)) * most(unit), unit), 0 * unit))
    return ratio, (inside * da - inside * ratio * db) / b


@jax.custom_jvp
def difference(log_a, log_b, u, unit):
    """b - a. To differentiation u is log_b - log_a."""
    return jnp.exp(jnp.maximum(log_a, log_b)) * (-_sign(u, unit) * jnp.expm1(-jnp.abs(u)))


@difference.defjvp
def _difference_jvp(primals, tangents):
    (log_a, log_b, _, _), (da, db, _, _) = primals, tangents
    return difference(*primals), jnp.exp(log_b) * db - jnp.exp(log_a) * da


def excess(log_a, u, unit):
    """b - a - a u, never negative, for u up to a bound; beyond it, where a counts for nothing, what b has there.

    It is a times exp(v) - 1 - v. Near 0 that is taken from its series. At v = few + more, few being in [-1/4, 1/4], it
    exceeds what it is at `few` by exp(few) expm1(more) - more, in which nothing cancels but a quarter.
    """
    v = jnp.minimum(u, _bound(unit))
    few = jnp.maximum(jnp.minimum(v, unit / 4), -unit / 4)
    k = next(k for k in range(20) if 0.25**k / math.factorial(k + 2) < jnp.finfo(unit.dtype).eps / 16)
    series = 1 / math.factorial(k + 1) * unit
    for i in range(k, 1, -1):
        series = series * few + 1 / math.factorial(i) * unit
    more = v - few
    return jnp.exp(log_a) * (few * few * series + (jnp.exp(few) * expm1(more) - more))


def excess_beyond(log_b, u, unit):
    """What b - a - a u has beyond the bound of `excess`: the rest of b."""
    return -jnp.exp(log_b) * expm1(-jnp.maximum(u - _bound(unit), 0 * unit))


def _bound(unit):
    """For u, so that u exp(-u) is rounding."""
    return (4 - math.log(jnp.finfo(unit.dtype).eps)) * unit


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def mixed(log_a, log_b, u, beta, unit):
    """(log m, log m - log a, log m - log b), for m = beta a + (1 - beta) b.

    From the larger one it is log1p((1 - its share) expm1(-|u|)) to log m, and from the other |u| more. Either cancels
    where the larger one has a small share. `_beside_a_trace` does not.
    """
    if beta < 1 / 16:
        to_a, to_b = _beside_a_trace(-u, beta, unit)
        from_larger = jnp.minimum(to_a, to_b)
    elif beta > 15 / 16:
        to_b, to_a = _beside_a_trace(u, 1 - beta, unit)
        from_larger = jnp.minimum(to_a, to_b)
    else:
        above, below = jnp.maximum(u, 0 * unit), jnp.minimum(u, 0 * unit)  # one of the two is 0
        from_larger = jnp.log1p((1 - beta) * unit * jnp.expm1(below)) + jnp.log1p(beta * unit * jnp.expm1(-above))
        to_a, to_b = from_larger + above, from_larger - below
    return mapped_with((jnp.maximum(log_a, log_b) + from_larger, to_a, to_b), (log_a, log_b))


def _beside_a_trace(y, share, unit):
    """(log m - log a, log m - log b), for m = share a + (1 - share) b with a small share, and y = log a - log b.

    The second is log1p(share expm1(y)), in which nothing cancels. The first is y less. Once share a is all of m, it no
    longer changes.
    """
    kind = jnp.finfo(unit.dtype)
    alone = min(2 - math.log(share) - math.log(kind.eps), math.log(float(kind.max)) - 0.5) * unit
    near = jnp.minimum(y, alone)
    to_b = jnp.log1p(share * unit * jnp.expm1(near))
    return to_b - near, to_b + jnp.maximum(y - alone, 0 * unit)


@mixed.defjvp
def _mixed_jvp(beta, primals, tangents):
    (log_a, log_b, u, unit), (da, db, _, _) = primals, tangents
    log_m, to_a, to_b = mixed(log_a, log_b, u, beta, unit)
    share_a, share_b = beta * jnp.exp(-to_a), (1 - beta) * jnp.exp(-to_b)  # of m
    dlog_m = share_a * da + share_b * db
    return (log_m, to_a, to_b), (dlog_m, dlog_m - da, dlog_m - db)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def log_mixed_step(y, after, step, shares, unit):
    """L(after) - L(y), with L(y) = log(1 - share + share exp(y)), where `step` is after - y, but exact.

    `shares` are (share, 1 - share), neither of them rounded from the other.

    For the larger of the two arguments let p = share exp(y) / exp(L(y)), and w = |step|. Then it is -+log(1 - p + p
    exp(-w)), by the sign of the step. Where that is small, log1p(p expm1(-w)) is the same logarithm without the 1.
    """
    w = jnp.abs(step)
    p, rest = _shares(jnp.maximum(y, after), shares, unit)
    tiny = float(jnp.finfo(unit.dtype).tiny) * unit
    of_small = jnp.log1p(jnp.maximum(p * jnp.expm1(-w), -unit / 2))
    of_large = jnp.log(jnp.maximum(jnp.minimum(2 * unit * (rest + p * jnp.exp(-w)), unit), tiny))
    return -_sign(step, unit) * (of_small + of_large)


@log_mixed_step.defjvp
def _log_mixed_step_jvp(shares, primals, tangents):
    (y, after, step, unit), (dy, dafter, _, _) = primals, tangents
    at_y, at_after = (_shares(at, shares, unit)[0] for at in (y, after))
    return log_mixed_step(y, after, step, shares, unit), at_after * dafter - at_y * dy


def _shares(y, shares, unit):
    """(share exp(y), 1 - share), each divided by their sum."""
    kind, (share, rest) = jnp.finfo(unit.dtype), shares
    odds = min(max(share / rest, float(kind.tiny)), float(kind.max)) * unit
    return unit / (unit + jnp.exp(-y) / odds), unit / (unit + jnp.exp(y) * odds)


def _sign(u, unit):
    """-1, 0 or 1."""
    return jnp.maximum(jnp.minimum(u * most(unit), unit), -unit)
