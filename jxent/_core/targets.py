"""Targets: shares of the classes, what they cost, and the one formula of that cost's gradient.

A target gives every class j a share a[j], as label probabilities and smoothing do. With A the sum of the shares,

    cost           = sum of a[j] (-log p[j])      # every term >= 0 if every share is: nothing cancels
    d cost / dx[j] = A p[j] - a[j]

Where one class has p near 1 the gradient cancels for that class. There p[j] - 1 = expm1(log p[j]) is known without a
cancellation, and with A = a[j] + (the others' shares) the same gradient is

    d cost / dx[j] = A expm1(log p[j]) + (the others' shares)

whose two terms are of the size of the result: for a one-hot share it is the expm1(-cost) of an index label. A share is
a function of a `Class`, so that no array of shares is written. The cotangent of `log_softmax` is a target too, though
its shares have any sign: the gradient is a[j] - A p[j].
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jxent._core.terms import expm1


class Sums(NamedTuple):
    """Of the shares of a target, row arrays."""

    all: Array
    others: Array  # of all classes but that with the largest logit


def cost(passes, share):
    return passes.sum(lambda c: c.cost(share(c)))


def sums(passes, share):
    return Sums(all=passes.sum(share), others=passes.sum(lambda c: share(c) * c.below_max))


def pull(c, share, sums):
    """The gradient of the cost by x, for `Passes.map`."""
    near_one = sums.all * expm1(c.log_p) + sums.others
    return jnp.where(is_near_one(c.log_p), near_one, sums.all * c.p - share)


def is_near_one(log_p):
    return log_p > jnp.log(2 / 3)
