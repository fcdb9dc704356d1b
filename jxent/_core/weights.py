"""Weights: products in which None stands for 1, and 0 times infinity is 0."""

import functools
import operator

import jax.numpy as jnp
from jax import Array


def product_of(*factors):
    """The product of the factors that are not None; None if all are."""
    factors = [factor for factor in factors if factor is not None]
    return functools.reduce(operator.mul, factors) if factors else None


def is_used(option):
    """Whether an option that multiplies a cost is anything but a Python 0; an array may be anything."""
    return not (isinstance(option, float) and option == 0)


def along(class_weight, ndim, axis, dtype):
    """The class weights along the class axis, for broadcasting; None for None."""
    if class_weight is None:
        return None
    return class_weight.astype(dtype).reshape([-1 if a == axis else 1 for a in range(ndim)])


def only(keep: Array | None, values, other=0):
    """`values` at the positions that count, `other` elsewhere, whatever the values are there."""
    return values if keep is None else jnp.where(keep, values, other)


def weighted(weight, costs):
    """weight * costs, with 0 * inf = 0; None weighs nothing."""
    if weight is None:
        return costs
    # Selected before the product, so that the gradient with respect to a weight of 0 is the cost, unless that is
    # infinite.
    return weight * jnp.where((weight == 0) & (costs == jnp.inf), 0, costs)


def weigh(coefficients, costs):
    """The losses of the positions: each coefficient times the cost of its name, added up."""
    return functools.reduce(jnp.add, [weighted(coefficient, costs[name]) for name, coefficient in coefficients.items()])
