"""Targets, their cost, and the gradient of that cost.

A target gives every class j a number a[j], its share. Label probabilities and smoothing are targets. With A the sum of
the shares,

    cost           = sum of a[j] (-log p[j])      # every term >= 0 if every share is: nothing cancels
    d cost / dx[j] = A p[j] - a[j]

If one class has p near 1, A p[j] - a[j] cancels for that class. But p[j] - 1 = expm1(log p[j]) does not cancel. With
A = a[j] + (the others' shares) the same gradient is

    d cost / dx[j] = A expm1(log p[j]) + (the others' shares)

and its terms are about 1 - p[j] and the others' shares, not about 1. For a one-hot target this is expm1(-cost), as for
an index label. A share is a function of a `Class` (`passes`), so that no array of shares is written. The cotangent of
`log_softmax` is a target too, although its shares may be negative; the gradient is a[j] - A p[j]. If log-probabilities
are given instead of logits, the gradient by them is -a[j].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool

from jxent._rows.passes import Class, Passes, Row
from jxent._rows.terms import expm1

Share = Callable[[Class], Array]


class Sums(NamedTuple):
    """Sums of the shares of a target, row arrays."""

    all: Row
    others: Row  # of all classes except the one with the largest logit


def cost(passes: Passes, share: Share) -> Row:
    return passes.sum(lambda c: c.cost(share(c)))


def sums(passes: Passes, share: Share) -> Sums | None:
    """The sums that `gradient` takes; None if log-probabilities are given instead of logits."""
    if not passes.normalized:
        return None
    return Sums(all=passes.sum(share), others=passes.sum(lambda c: share(c) * c.below_max))


def gradient(c: Class, share: Array | float, sums: Sums | None) -> Array:
    """The gradient of the cost by x, or by the log-probability if `sums` is None; for `Passes.map`."""
    if sums is None:
        return jnp.negative(share)
    near_one = sums.all * expm1(c.log_p) + sums.others
    return jnp.where(is_near_one(c.log_p), near_one, sums.all * c.p - share)


def is_near_one(log_p: Array) -> Bool[Array, "..."]:
    return log_p > jnp.log(2 / 3)
