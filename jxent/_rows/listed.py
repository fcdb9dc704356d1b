"""Listed classes of each position, and the rest: all other classes together, as one more class.

Let x be the logits (after the softcap) and T the temperature. For the classes that are not listed, let m' be the
largest x and s' = log sum exp((x - m') / T). So the rest has the logit m' / T + s', and a position has k + 1 classes.
With m the largest of all x,

    y[j]   = (x[j] - m) / T                       # of a listed class
    y_rest = (m' - m) / T + s'
    log p  = (y - top) - log_z                    # top = max y, log_z = log sum exp(y - top), without that maximum

Nothing is subtracted from 1, so the log-probability of the rest is exact if the rest has almost all or almost no
probability. It is finite even if exp(y_rest) underflows.

A class that repeats in the list has the same log-probability each time, but is one class in the sums: `counted` is
False for all its entries except the first. With cotangents c of all k + 1 log-probabilities, and C their sum, the
gradients by y are c[j] - C p[j]. If p[j] > 2/3, that is c[j] (1 - p[j]) - p[j] (C - c[j]), in which C - c[j] is a
sum without c[j]. Arrays of entries have size k along the class axis; the others are row arrays (`passes`).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from jxent._core.forward_mode import mapped_with
from jxent._core.indexing import first_largest
from jxent._core.weights import only
from jxent._rows.passes import Row
from jxent._rows.terms import centered, expm1

Entries = Float[Array, "*entries"]


class Rest(NamedTuple):
    """The classes that are not listed."""

    row_max: Row  # these two are as in `Normalizer`
    log_z: Row
    empty: Bool[Array, "*row"]  # whether there are none, or all are masked with -inf


class LogProbs(NamedTuple):
    """Log-probabilities, or their cotangents or tangents."""

    listed: Entries
    rest: Row


def below_top(
    logits: Entries,
    counted: Bool[Array, "*entries"] | None,
    rest: Rest,
    temperature: Row | None,
    axis: int,
    cap: float | None,
) -> LogProbs:
    """(x - m) / T of the listed classes, and of the largest class of the rest; m is a constant for derivatives."""
    one = jnp.ones((), rest.log_z.dtype)
    row_max = jnp.max(only(counted, logits, -jnp.inf), axis, keepdims=True).astype(one.dtype)
    row_max = lax.stop_gradient(jnp.maximum(row_max, only(~rest.empty, rest.row_max, -jnp.inf)))
    row_max = only(row_max != -jnp.inf, row_max)
    not_confident = jnp.full_like(row_max, jnp.inf)  # a log_z with which `centered` has the tangent of x

    def below(logits: Array) -> Array:
        return centered(logits, row_max, not_confident, temperature, cap, one)

    return LogProbs(listed=below(logits), rest=below(rest.row_max))


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def log_probs(
    logits: Entries,
    counted: Bool[Array, "*entries"] | None,
    rest: Rest,
    temperature: Row | None,
    axis: int,
    cap: float | None,
) -> LogProbs:
    """The log-probabilities of listed classes with these logits, and of the rest; None for `counted` if all are."""
    y, y_rest = below_top(logits, counted, rest, temperature, axis, cap)
    y_rest = only(~rest.empty, y_rest + rest.log_z, -jnp.inf)
    top = jnp.maximum(jnp.max(only(counted, y, -jnp.inf), axis, keepdims=True), y_rest)
    top = only(top != -jnp.inf, top)
    exp, exp_rest = only(counted, jnp.exp(y - top)), jnp.exp(y_rest - top)

    def summed(keep: Any) -> Row:
        return jnp.sum(keep(exp), axis, keepdims=True) + keep(exp_rest)

    everything = summed(lambda exp: exp)
    below = summed(lambda exp: jnp.where(exp > 0.75, 0, exp))  # without the largest, if that is above 2/3 of all
    log_z = jnp.log1p(jnp.where(everything < 1.5, below, everything - 1))
    out = LogProbs(listed=(y - top) - log_z, rest=(y_rest - top) - log_z)
    return mapped_with(out, (logits, counted, rest, temperature))


# The tangent of y at the most probable class is subtracted from all of them first (`normalizer` says why).
@log_probs.defjvp
def _log_probs_jvp(axis: int, cap: float | None, primals: Any, tangents: Any) -> tuple[LogProbs, LogProbs]:
    (logits, counted, rest, temperature), (dlogits, _, drest, dtemperature) = primals, tangents
    of = log_probs(logits, counted, rest, temperature, axis, cap)

    def below(logits: Array, row_max: Row, temperature: Row | None) -> LogProbs:
        return below_top(logits, counted, rest._replace(row_max=row_max), temperature, axis, cap)

    at, along = (logits, rest.row_max, temperature), (dlogits, drest.row_max, dtemperature)
    dy = jax.jvp(below, at, along)[1]
    gone = lax.stop_gradient(of.rest) == -jnp.inf
    dy_rest = jnp.where(gone, 0, dy.rest + drest.log_z)
    first = only(counted, lax.stop_gradient(of.listed), -jnp.inf)
    listed_top = jnp.max(first, axis, keepdims=True)
    at_top = lax.broadcasted_iota(jnp.int32, first.shape, axis) == first_largest(first, axis)
    of_listed_top = jnp.sum(jnp.where(at_top, dy.listed, 0), axis, keepdims=True)
    reference = jnp.where(lax.stop_gradient(of.rest) >= listed_top, dy_rest, of_listed_top)
    dlisted, drest = dy.listed - reference, dy_rest - reference
    dlog_z = jnp.sum(only(counted, jnp.exp(of.listed)) * dlisted, axis, keepdims=True) + jnp.exp(of.rest) * drest
    return of, LogProbs(listed=dlisted - dlog_z, rest=jnp.where(gone, 0, drest - dlog_z))


def gradients(of: LogProbs, counted: Bool[Array, "*entries"] | None, cotangents: LogProbs, axis: int) -> LogProbs:
    """The gradients by y, of the sum of cotangent times log-probability."""
    cotangents = cotangents._replace(rest=jnp.where(of.rest == -jnp.inf, 0, cotangents.rest))

    def is_near_one(log_p: Array) -> Array:
        return lax.stop_gradient(log_p) > math.log(2 / 3)

    def total(keep: Any) -> Row:
        return jnp.sum(keep(of.listed, cotangents.listed), axis, keepdims=True) + keep(of.rest, cotangents.rest)

    of_all = total(lambda log_p, c: c)
    of_others = total(lambda log_p, c: jnp.where(is_near_one(log_p), 0, c))

    def gradient(log_p: Array, counted: Array | None, c: Array) -> Array:
        p = only(counted, jnp.exp(log_p))
        return jnp.where(is_near_one(log_p), -c * expm1(log_p) - p * of_others, c - p * of_all)

    return LogProbs(
        listed=gradient(of.listed, counted, cotangents.listed), rest=gradient(of.rest, None, cotangents.rest)
    )
