"""What one row of logits comes down to: its maximum and the logarithm of its normalizer, exactly.

With the row maximum m = max x and r = sum of exp(x[j] - m) over every class but the one at the maximum,

    log_z = log1p(r)                       # log sum exp(x - m)
    log p[j] = (x[j] - m) - log_z          # both terms <= 0: nothing cancels
    p[j] - 1 = expm1(log p[j])

`m` and `log_z` stay apart, because their sum would round at |m| >> 1. Where the label t is known its class may be left
out instead of the maximum's, with d = x[t] - m:

    log_z = log1p(sum over j != t of exp(x[j] - m) + expm1(d))

Then the loss log_z - d is as exact, though log_z alone is not, and the sum takes one pass less.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jxent._core.forward_mode import linear, mapped_with
from jxent._core.passes import Arrays, Moving, Passes
from jxent._core.shards import each_shards_own, first_class, largest, shards_of, shared_cotangent
from jxent._core.terms import below_top_of_exponentials, confident, rounded


class Normalizer(NamedTuple):
    """Row arrays, and the exponentials if they are kept."""

    top: Array  # the largest logit, upcast; 0 in a row of -inf, so that x - m is not NaN
    log_z: Array  # log sum exp(x - m); 0 in a row of -inf, so that p = 0 there
    log_normalizer: Array  # log sum exp x
    exp: Array | None  # exp(x - m), of the logits' shape, but 0 at a label that is left out


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5, 6))
def normalizer(logits, label, axis, cap, dtype, room=False, axis_name=()) -> Normalizer:
    """The `Normalizer` of the logits over the class axes.

    `label` is the class to leave out of the sum and its logit, both row arrays, or None to leave out the maximum. With
    `room` for an array of the logits' size the exponentials are taken once and kept.
    """
    # The maximum before the upcast, which the next pass would share.
    initial = -jnp.inf if 0 in logits.shape else None
    top = largest(jnp.max(logits, axis, keepdims=True, initial=initial), axis_name).astype(dtype)
    empty = top == -jnp.inf
    top = jnp.where(empty, 0, top)
    passes = Passes(Arrays(logits, top=top), axis, dtype, cap, axis_name, previous=top)
    add_up = passes.keep_exponentials if room else passes.sum_of_exponentials
    if label is not None:
        index, logit = label
        rest = add_up(but=index) + jnp.expm1(passes.z_of(rounded(logit.astype(dtype), jnp.ones((), dtype))))
    else:
        everything = add_up()
        below = passes.sum(lambda c: c.exp_z * below_top_of_exponentials(c.exp_z, c.unit))
        # Where the sum is at least 1.5, 1 can be taken off it; where it is not, the maximum is unique.
        rest = jnp.where(everything < 1.5, below, everything - 1)
    empty &= rest == rest  # a maximum over shards may pass over NaN
    log_z = jnp.log1p(jnp.where(empty, 0, rest))
    m = top if cap is None else cap * jnp.tanh(top / cap)
    log_normalizer = jnp.where(m == jnp.inf, jnp.inf, m + log_z)  # where log_z is NaN
    log_normalizer = jnp.where(empty, -jnp.inf, log_normalizer)
    shards = shards_of(axis_name)  # as their tangents, or `jax.vmap` would take these to be shared and those not
    top, log_z, log_normalizer = each_shards_own((top, log_z, log_normalizer), shards, first_class(shards, 1))
    return mapped_with(Normalizer(top, log_z, log_normalizer, passes.arrays.exp), (logits, label))


# With dz[j] = dx[j] - dm, d log_z = sum of p[j] dz[j], for any dm, as a shift of all logits changes no probability.
# Where the largest class has a p of 2/3 or more, dm is its tangent, see `terms.centered`; elsewhere it is 0, which adds
# nothing to gradients that cancels. These sums are a `linear` map, so that XLA:CPU fuses each into one pass.
@normalizer.defjvp
def _normalizer_jvp(axis, cap, dtype, room, axis_name, primals, tangents):
    out = normalizer(*primals, axis, cap, dtype, room, axis_name)
    shards = shards_of(axis_name)

    def passes_of(logits, top, log_z, moving=None):
        arrays = Arrays(logits, top=top, log_z=log_z, moving=moving)
        return Passes(arrays, axis, dtype, cap, axis_name, previous=log_z)

    def apply(residuals, directions):
        logits, top, log_z = residuals
        sure, (dlogits,) = confident(log_z), directions
        passes = passes_of(logits, top, log_z, Moving(dlogits))
        dtop = passes.sum(lambda c, sure: sure * c.at_max * c.dlogit, sure)
        passes.moving(Moving(dlogits, reference=passes.dx_of(top, dtop)))
        dlog_z = passes.sum(lambda c, sure: c.p * c.dz * (c.unit - sure * c.at_max), sure)
        return [dtop, dlog_z]

    def transpose(residuals, cotangents):
        logits, top, log_z = residuals
        to_top, to_log_z = shared_cotangent(cotangents, shards)
        passes = passes_of(logits, top, log_z)
        others = passes.sum(lambda c, sure: c.p * (c.unit - sure * c.at_max), confident(log_z))
        at_top = to_top - passes.dx_of(top, to_log_z * others)

        def gradient(c, sure, to_log_z, at_top):
            return jnp.where(sure * c.at_max > 0, at_top.astype(logits.dtype), c.to_logit(c.p * to_log_z))

        return [passes.map(gradient, confident(log_z), to_log_z, at_top)]

    residuals, directions = [primals[0], out.top, out.log_z], [tangents[0]]
    dtop, dlog_z = linear(apply, transpose, residuals, directions, [out.top, out.log_z])
    passes, dexp = passes_of(*residuals), None
    if out.exp is not None:
        dexp = out.exp * jax.jvp(passes.z_of, (primals[0], out.top), (tangents[0], dtop))[1]
    return out, Normalizer(dtop, dlog_z, passes.dx_of(out.top, dtop) + dlog_z, dexp)
