"""Functions from which terms are made, class by class. They and all their derivatives avoid cancellation.

Most are written for sums over the classes: without comparisons, and with constants made from `one`, which is 1 in the
dtype to compute in. `passes` explains why.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jxent._core.forward_mode import mapped_with


@jax.custom_jvp
def expm1(x: Array) -> Array:
    """exp(x) - 1, with the derivative exp(x). JAX's derivative, the result plus 1, loses a small exp(x)."""
    return jnp.expm1(x)


@expm1.defjvp
def _expm1_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    return expm1(x), jnp.exp(x) * dx


def most(one: Array) -> Array:
    """The largest finite number."""
    return float(jnp.finfo(one.dtype).max) * one


def rounded(x: Array, one: Array) -> Array:
    """x, which a compiler must round before it subtracts anything from it.

    If x is a product, a compiler may compute it again, fused with x - m into one operation that does not round x. Then
    x - m is not 0 at the largest x. The sum here rounds to x.
    """
    return x + x * (1e-30 * one)


def rounded_if_few(x: Array, one: Array) -> Array:
    """`rounded`, for arrays so small that its time does not matter.

    XLA:CPU merges passes over up to 32 classes and 4096 numbers into one program, which computes products again.
    """
    few = all(isinstance(size, int) for size in x.shape) and x.size <= 2**16
    return rounded(x, one) if few else x


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def centered(
    logits: Array, row_max: Array, log_z: Array | None, temperature: Array | None, cap: float | None, one: Array
) -> Array:
    """(x - m) / temperature, in the dtype of `one`: exactly 0 at the largest logit `row_max`, if `log_z` is known.

    If `log_z` is None, the rounding of x is not forced in large arrays. The tangent takes `log_z` as well. A
    `temperature` of None is 1. It divides x - m and not x, because x / temperature would round the offset.

    x is the logit, or cap * tanh(logit / cap). With a = row_max / cap and b = logit / cap,

        tanh(b) - tanh(a) = 2 expm1(-2 (a - b)) / ((1 + exp(-2 a)) (1 + exp(2 b)))

    which does not cancel, unlike the difference of two rounded values of tanh.
    """
    x, row_max = logits.astype(one.dtype), row_max.astype(one.dtype)
    below = (rounded_if_few(x, one) if log_z is None else mapped_with(rounded(x, one), log_z)) - row_max
    if cap is None:
        return below if temperature is None else below / temperature
    scale = cap * one
    falling, rising = jnp.exp(-2 * one * (row_max / scale)), jnp.exp(2 * one * (x / scale))
    z = 2 * scale * jnp.expm1(2 * one * (below / scale)) / ((one + falling) * (one + rising))
    # The last term is 0, or -inf where x is -inf, so that a masked class stays masked.
    z = z + jnp.minimum(x * (0.25 * one) + most(one), 0 * one)
    return z if temperature is None else z / temperature


# If a class t has p of 2/3 or more, the tangent is dx[j] - dx[t]. With dx[j] alone, as for a constant maximum, sums of
# p[j] dz[j] would add terms of the size of dx[t] that cancel in the result. At the largest logit the tangent is a
# written 0 and not a difference, because gradients of the difference would add numbers that cancel.
@centered.defjvp
def _centered_jvp(cap: float | None, primals: Any, tangents: Any) -> tuple[Any, Any]:
    logits, row_max, log_z, temperature, one = primals
    z = centered(logits, row_max, log_z, temperature, cap, one)
    of_both = zip(primals[:2], tangents[:2], strict=True)
    dx, drow_max = (slope(a.astype(z.dtype), cap, da.astype(z.dtype)) for a, da in of_both)
    at_top = confident(log_z) * (one - below_top(logits, row_max, one, temperature))
    return z, cooled(z, (dx - drow_max) * (one - lax.stop_gradient(at_top)), temperature, tangents[3], one)


def cooled(z: Array, dbelow: Array, temperature: Array | None, dtemperature: Array | None, one: Array) -> Array:
    """The tangent of a quotient z by the temperature, from the tangents of both operands; None for 1, or for 0."""
    if temperature is None:
        return dbelow
    return (dbelow if dtemperature is None else dbelow - held(z, one) * dtemperature) / temperature


def held(z: Array, one: Array) -> Array:
    """z, except 0 where it is -inf, or so large that products with it may be infinite.

    There p is 0. With this z the product of both is 0, and so are its derivatives.
    """
    bound = most(one) * 2.0**-6
    inside = jnp.maximum(jnp.minimum((bound + z) * most(one), one), 0 * one)
    return jnp.maximum(z, -bound) * lax.stop_gradient(inside)


def confident(log_z: Array) -> Array:
    """1 where the largest logit has p of at least 2/3, so that no other logit is as large; 0 elsewhere."""
    return lax.stop_gradient((log_z < math.log(1.5)).astype(log_z.dtype))


def below_top(logits: Array, row_max: Array, one: Array, temperature: Array | None = None) -> Array:
    """0 at the largest logit `row_max`, 1 at logits at least log 2 below it, and a number from 0 to 1 between.

    Distances are divided by the temperature.
    Callers use this where the largest logit has p of at least 2/3, and then no logit lies between. A comparison with
    `row_max` would depend on the last bit of the logits, which a compiler may compute twice with different rounding.
    """
    distance = row_max.astype(one.dtype) - logits.astype(one.dtype)
    distance = distance if temperature is None else distance / temperature
    return jnp.minimum(jnp.maximum(16 * one * distance - 4 * one, 0 * one), one)


def below_top_of_exponentials(exp: Array, one: Array) -> Array:
    """`below_top` from the exponentials exp(x - m), which are 1 at the largest logit."""
    return jnp.minimum(jnp.maximum(6 * one - 8 * one * exp, 0 * one), one)


def capped(logits: Array, cap: float | None) -> Array:
    """x, of a few logits."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def slope(logits: Array, cap: float | None, values: Array, one: float | Array = 1.0) -> Array:
    """`values` times the derivative of x by the logit, 1 - tanh(u)**2 with u = logit / cap.

    That form cancels where the cap saturates. 4 e / (1 + e)**2 with e = exp(-2 |u|) is the same and does not cancel. A
    sum over the classes must pass its `one`.
    """
    if cap is None:
        return values
    e = jnp.exp(-2 * one * jnp.abs(logits / (cap * one)))
    return 4 * one * e / ((one + e) * (one + e)) * values


def present(logits: Array, one: Array) -> Array:
    """1 where the logit is above -inf, and 0 where it is -inf."""
    x = logits.astype(one.dtype)
    return lax.stop_gradient(jnp.minimum(jnp.maximum(x * (0.25 * one) + most(one), 0 * one), one))


@jax.custom_jvp
def product(weight: Array, cost: Array, one: Array) -> Array:
    """weight * cost for a cost in [0, inf], with 0 * inf = 0."""
    finite = jnp.minimum(cost, most(one))
    sign = jnp.maximum(jnp.minimum(weight * most(one), one), -one)
    # +-the largest finite number if the cost is infinite and the weight is not 0, else 0. Times 4 it is infinite.
    excess = sign * ((one - present(-cost, one)) * finite)
    return weight * finite + (4 * one) * excess


def marginal(weight: Array, cost: Array, one: Array) -> Array:
    """The derivative of `product` by the weight: the cost, made finite, and 0 if weight * cost is 0 * inf."""
    used = jnp.minimum(jnp.abs(weight) * most(one), one)
    return jnp.maximum(lax.stop_gradient(used), present(-cost, one)) * jnp.minimum(cost, most(one))


@product.defjvp
def _product_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (weight, cost, one), (dweight, dcost, _) = primals, tangents
    return product(weight, cost, one), dweight * marginal(weight, cost, one) + weight * dcost


@jax.custom_jvp
def product_of_p(p: Array, cost: Array, one: Array) -> Array:
    """p * cost, and 0 where p is 0. Cheaper than `product`, for a cost that is infinite only where p is 0."""
    return p * jnp.minimum(cost, most(one))


@product_of_p.defjvp
def _product_of_p_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (p, cost, one), (dp, dcost, _) = primals, tangents
    return product_of_p(p, cost, one), dp * marginal(p, cost, one) + p * dcost


# --- functions of one logit -------------------------------------------------------------------------------------------


@jax.custom_jvp
def softplus(x: Array, one: float | Array = 1.0) -> Array:
    """log(1 + exp x). A sum over the classes must pass its `one`."""
    return jnp.maximum(x, 0 * one) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return softplus(*primals), sigmoid(primals[0]) * tangents[0]


@jax.custom_jvp
def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), with the derivative sigmoid(x) sigmoid(-x): 1 - sigmoid(x) rounds to 0 for a large x."""
    return jnp.exp(jnp.minimum(x, 0)) / (1 + jnp.exp(-jnp.abs(x)))


@sigmoid.defjvp
def _sigmoid_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    return sigmoid(x), sigmoid(x) * sigmoid(-x) * dx


@jax.custom_jvp
def sigmoids(x: Array) -> tuple[Array, Array]:
    """(sigmoid(x), sigmoid(-x)) from one exponential, for `Passes.map`."""
    exp = jnp.exp(-jnp.abs(x))
    larger = 1 / (1 + exp)
    smaller = exp * larger
    return jnp.where(x < 0, smaller, larger), jnp.where(x < 0, larger, smaller)


@sigmoids.defjvp
def _sigmoids_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    of_yes, of_no = sigmoids(*primals)
    slope = of_yes * of_no * tangents[0]
    return (of_yes, of_no), (slope, -slope)


@jax.custom_jvp
def yes_over_no(x: Array, weight: Array, one: Array) -> Array:
    """weight * softplus(-x) - softplus(x), of a weight >= 0. It is infinite only for an infinite x.

    With l = log1p(exp(-|x|)) it is (weight - 1) l + weight max(-x, 0) - max(x, 0), which has no cancelling terms.
    """
    smaller = jnp.log1p(jnp.exp(-jnp.abs(x)))
    above, below = jnp.maximum(x, 0 * one), jnp.maximum(-x, 0 * one)
    return (weight - one) * smaller + product(weight, below, one) - above


@yes_over_no.defjvp
def _yes_over_no_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, weight, one), (dx, dweight, _) = primals, tangents
    by_x = -(weight * sigmoid(-x) + sigmoid(x))
    return yes_over_no(x, weight, one), by_x * dx + jnp.minimum(softplus(-x), most(one)) * dweight


def share_of(y: Array, rounding: float, one: Array) -> Array:
    """y, and NaN if y is outside of [0, 1] by more than `rounding`."""
    above, below = jnp.maximum(y - (1 + rounding) * one, 0 * one), jnp.maximum(-rounding * one - y, 0 * one)
    infinite = most(one) * (most(one) * (above + below))  # or else 0
    return y + lax.stop_gradient(0 * one * infinite)


# --- functions of two distributions -----------------------------------------------------------------------------------
#
# Let a = exp(log_a) and b = exp(log_b). Some functions also take u = log_b - log_a. The caller's u is accurate even if
# a and b nearly agree. The difference of the rounded logarithms is not.


def lost_by_difference(a: Array, b: Array) -> Array:
    """The exact a - b minus the rounded a - b (Knuth's TwoSum). Its derivative is 0."""
    a, b = lax.stop_gradient((a, b))
    rounded = a - b
    virtual = rounded - a
    return (a - (rounded - virtual)) - (b + virtual)


def quarter(logits: Array, one: Array) -> Array:
    """x / 4. For -inf it is a finite number below all others, so that differences of quarters are finite."""
    return jnp.maximum(rounded_if_few(logits.astype(one.dtype), one) * (0.25 * one), -most(one) / 2)


def bounded_ratio(a: Array, b: Array | None, bound: Array, one: Array, above: bool = True) -> Array:
    """a / b, at least -bound and, if it may be `above` the bound, at most bound. None for b means 1."""
    if b is not None:
        return _bounded_ratio(a, b, bound, one, above)
    return jnp.maximum(jnp.minimum(a, bound) if above else a, -bound)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _bounded_ratio(a: Array, b: Array, bound: Array, one: Array, above: bool) -> Array:
    return mapped_with(bounded_ratio(a / b, None, bound, one, above), one)


# From a sixteenth of the bound on, the rule takes the ratio as constant. Beyond the bound a may be infinite, and JAX's
# own rule would multiply an infinite slope by 0.
@_bounded_ratio.defjvp
def _bounded_ratio_jvp(above: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (_, b, bound, one), (da, db, _, _) = primals, tangents
    ratio = _bounded_ratio(*primals, above)
    inside = lax.stop_gradient(jnp.maximum(jnp.minimum((bound / 16 - jnp.abs(ratio)) * most(one), one), 0 * one))
    return ratio, (inside * da - inside * ratio * db) / b


@jax.custom_jvp
def difference(log_a: Array, log_b: Array, u: Array, one: Array) -> Array:
    """b - a. Its derivative takes u as log_b - log_a."""
    return jnp.exp(jnp.maximum(log_a, log_b)) * (-sign(u, one) * jnp.expm1(-jnp.abs(u)))


@difference.defjvp
def _difference_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (log_a, log_b, _, _), (da, db, _, _) = primals, tangents
    return difference(*primals), jnp.exp(log_b) * db - jnp.exp(log_a) * da


def excess(log_a: Array, u: Array, one: Array) -> Array:
    """b - a - a u, never negative, for u up to `_bound`. For a larger u the value at the bound; see `excess_beyond`.

    This is a times exp(v) - 1 - v, with v the bounded u. Let v = few + more, with few in [-1/4, 1/4]. A series gives
    the part for `few`. The rest is exp(few) expm1(more) - more, at least a fifth of |more|, so little cancels.
    """
    v = jnp.minimum(u, _bound(one))
    few = jnp.maximum(jnp.minimum(v, one / 4), -one / 4)
    k = next(k for k in range(20) if 0.25**k / math.factorial(k + 2) < jnp.finfo(one.dtype).eps / 16)
    series = 1 / math.factorial(k + 1) * one
    for i in range(k, 1, -1):
        series = series * few + 1 / math.factorial(i) * one
    more = v - few
    return jnp.exp(log_a) * (few * few * series + (jnp.exp(few) * expm1(more) - more))


def excess_beyond(log_b: Array, u: Array, one: Array) -> Array:
    """The rest of b - a - a u for u above the bound of `excess`, where a is negligible compared with b."""
    return -jnp.exp(log_b) * expm1(-jnp.maximum(u - _bound(one), 0 * one))


def _bound(one: Array) -> Array:
    """The bound of u in `excess`: at this u, u exp(-u) is below the rounding error of 1."""
    return (4 - math.log(jnp.finfo(one.dtype).eps)) * one


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def mixed(log_a: Array, log_b: Array, u: Array, beta: float, one: Array) -> tuple[Array, Array, Array]:
    """(log m, log m - log a, log m - log b), for m = beta a + (1 - beta) b.

    For the larger of a and b, log m minus its logarithm is log1p((1 - its share) expm1(-|u|)). Its share is beta or
    1 - beta. For the smaller one the difference is |u| more. Both differences cancel if the larger one has a small
    share, so `_beside_a_trace` computes that case.
    """
    if beta < 1 / 16:
        to_a, to_b = _beside_a_trace(-u, beta, one)
        from_larger = jnp.minimum(to_a, to_b)
    elif beta > 15 / 16:
        to_b, to_a = _beside_a_trace(u, 1 - beta, one)
        from_larger = jnp.minimum(to_a, to_b)
    else:
        above, below = jnp.maximum(u, 0 * one), jnp.minimum(u, 0 * one)  # one of the two is 0
        from_larger = jnp.log1p((1 - beta) * one * jnp.expm1(below)) + jnp.log1p(beta * one * jnp.expm1(-above))
        to_a, to_b = from_larger + above, from_larger - below
    return mapped_with((jnp.maximum(log_a, log_b) + from_larger, to_a, to_b), (log_a, log_b))


def _beside_a_trace(y: Array, share: float, one: Array) -> tuple[Array, Array]:
    """(log m - log a, log m - log b), for m = share a + (1 - share) b with a small share, and y = log a - log b.

    The second is log1p(share expm1(y)), in which nothing cancels. The first is the second minus y. Once y is so large
    that share a is all of m in floating point, the first is constant.
    """
    kind = jnp.finfo(one.dtype)
    alone = min(2 - math.log(share) - math.log(kind.eps), math.log(float(kind.max)) - 0.5) * one
    near = jnp.minimum(y, alone)
    to_b = jnp.log1p(share * one * jnp.expm1(near))
    return to_b - near, to_b + jnp.maximum(y - alone, 0 * one)


@mixed.defjvp
def _mixed_jvp(beta: float, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (log_a, log_b, u, one), (da, db, _, _) = primals, tangents
    log_m, to_a, to_b = mixed(log_a, log_b, u, beta, one)
    share_a, share_b = beta * jnp.exp(-to_a), (1 - beta) * jnp.exp(-to_b)  # of m
    dlog_m = share_a * da + share_b * db
    return (log_m, to_a, to_b), (dlog_m, dlog_m - da, dlog_m - db)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def log_mixed_step(y: Array, after: Array, step: Array, shares: tuple[float, float], one: Array) -> Array:
    """L(after) - L(y), with L(y) = log(1 - share + share exp(y)). `step` is an accurate after - y.

    `shares` are (share, 1 - share), each without the rounding of the other.

    Let p = share exp(Y) / exp(L(Y)) with Y the larger of y and after, and w = |step|. The result is -+log(1 - p + p
    exp(-w)), by the sign of the step. Down to an argument of 1/2, log1p(p expm1(-w)) gives the logarithm without
    rounding 1 - p. Below 1/2 `of_small` is log(1/2), and `of_large` adds the rest.
    """
    w = jnp.abs(step)
    p, rest = _shares(jnp.maximum(y, after), shares, one)
    tiny = float(jnp.finfo(one.dtype).tiny) * one
    of_small = jnp.log1p(jnp.maximum(p * jnp.expm1(-w), -one / 2))
    of_large = jnp.log(jnp.maximum(jnp.minimum(2 * one * (rest + p * jnp.exp(-w)), one), tiny))
    return -sign(step, one) * (of_small + of_large)


@log_mixed_step.defjvp
def _log_mixed_step_jvp(shares: tuple[float, float], primals: Any, tangents: Any) -> tuple[Any, Any]:
    (y, after, step, one), (dy, dafter, _, _) = primals, tangents
    at_y, at_after = (_shares(at, shares, one)[0] for at in (y, after))
    return log_mixed_step(y, after, step, shares, one), at_after * dafter - at_y * dy


def _shares(y: Array, shares: tuple[float, float], one: Array) -> tuple[Array, Array]:
    """(share exp(y), 1 - share), each divided by their sum."""
    kind, (share, rest) = jnp.finfo(one.dtype), shares
    odds = min(max(share / rest, float(kind.tiny)), float(kind.max)) * one
    return one / (one + jnp.exp(-y) / odds), one / (one + jnp.exp(y) * odds)


def sign(u: Array, one: Array) -> Array:
    """The sign of u: -1, 0 or 1."""
    return jnp.maximum(jnp.minimum(u * most(one), one), -one)
