"""Weights: products in which None stands for 1, and 0 times infinity is 0."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array


def product_of(*factors: Any) -> Any:
    """The product of the factors that are not None; None if all are."""
    given = [factor for factor in factors if factor is not None]
    return functools.reduce(operator.mul, given) if given else None


def is_used(option: Any) -> bool:
    """Whether an option that multiplies a cost may be nonzero: not a Python 0.0. The value of an array is not known."""
    return not (isinstance(option, float) and option == 0.0)


def along(class_weight: Array | None, ndim: int, axis: int, dtype: Any) -> Array | None:
    """The class weights along the class axis of `ndim` axes, for broadcasting; None for None."""
    if class_weight is None:
        return None
    return class_weight.astype(dtype).reshape([-1 if a == axis else 1 for a in range(ndim)])


def only(keep: Array | None, values: Any, other: Any = 0) -> Any:
    """`values` where `keep` is True, and `other` elsewhere, even if the values are NaN there."""
    return values if keep is None else jnp.where(keep, values, other)


def weighted(weight: Any, costs: Any) -> Array:
    """weight * costs, with 0 * inf = 0; a weight of None is 1."""
    if weight is None:
        return costs
    # The selection comes before the product. So the gradient by a weight of 0 is the cost, unless the cost is infinite.
    return weight * jnp.where((weight == 0) & (costs == jnp.inf), 0, costs)


def times(weight: Array | None, values: Array) -> Array:
    """weight * values, with 0 * inf = inf * 0 = 0; None for 1."""
    if weight is None:
        return values
    nothing = ((weight == 0) & jnp.isinf(values)) | (jnp.isinf(weight) & (values == 0))
    weight, values = (jnp.where(nothing, 0, factor) for factor in (weight, values))
    return weight * values


def weigh(coefficients: Mapping[str, Any], costs: Any) -> Array:
    """The losses of the positions: the sum of each coefficient times the cost with its name."""
    return functools.reduce(jnp.add, [weighted(coefficient, costs[name]) for name, coefficient in coefficients.items()])
