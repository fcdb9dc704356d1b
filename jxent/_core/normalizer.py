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

from jxent._core.passes import Arrays, Passes
from jxent._core.shards import largest, total


class Normalizer(NamedTuple):
    """Row arrays, and the exponentials if they are kept. To differentiation `top` is a constant."""

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
        rest = add_up(but=index) + jnp.expm1(passes.z_of(logit))
    else:
        everything = add_up()
        below = passes.sum(lambda c: c.exp_z * c.below_max)
        # Where the sum is at least 1.5, 1 can be taken off it; where it is not, the maximum is unique.
        rest = jnp.where(everything < 1.5, below, everything - 1)
    empty &= rest == rest  # a maximum over shards may pass over NaN
    log_z = jnp.log1p(jnp.where(empty, 0, rest))
    m = top if cap is None else cap * jnp.tanh(top / cap)
    log_normalizer = jnp.where(m == jnp.inf, jnp.inf, m + log_z)  # where log_z is NaN
    log_normalizer = jnp.where(empty, -jnp.inf, log_normalizer)
    return Normalizer(top, log_z, log_normalizer, passes.arrays.exp)


@normalizer.defjvp
def _normalizer_jvp(axis, cap, dtype, room, axis_name, primals, tangents):
    logits, label = primals
    out = normalizer(logits, label, axis, cap, dtype, room, axis_name)
    passes = Passes(Arrays(top=out.top), axis, dtype, cap)
    z, dz = jax.jvp(passes.z_of, (logits,), (tangents[0],))
    dlog_z = total(jnp.sum(jnp.exp(z - out.log_z) * dz, axis, keepdims=True), axis_name)
    return out, Normalizer(jnp.zeros_like(out.top), dlog_z, dlog_z, None if out.exp is None else out.exp * dz)
