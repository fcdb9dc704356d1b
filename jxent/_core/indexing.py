"""Class indices: whether they are in range, and the values of an array at them, on any mesh."""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Int

from jxent._core.shards import AxisNames, by_compiler, cast, partitions, sharded_like, total, varying


def out_of_range(index: Int[Array, "*shape"], classes: int) -> Bool[Array, "*shape"]:
    return (index < 0) | (index >= classes)


def pick(values: Array, index: Int[Array, "*entries"], axis: int) -> Array:
    """The values at class indices in range. `index` has the axes of `values`, with any size along `axis`."""
    spec = [*partitions(values)]
    spec[axis] = None
    return by_compiler(partial(jnp.take_along_axis, axis=axis, mode="clip"), PartitionSpec(*spec), values, index)


def at_index(values: Array, index: Int[Array, "*row"], axis: int, axis_name: AxisNames = ()) -> Array:
    """The value at the class of each position. `index` is a row array and counts from this shard's first class."""
    if not axis_name:
        return pick(values, index, axis)
    inside = jnp.clip(index, 0, values.shape[axis] - 1)
    return total(jnp.where(index == inside, pick(values, inside, axis), 0), axis_name)


def first_of_equals(index: Int[Array, "*entries"], axis: int) -> Bool[Array, "*entries"]:
    """Whether no earlier index along the axis is the same."""
    places = lax.broadcasted_iota(jnp.int32, index.shape, axis)
    places = cast(sharded_like(places, index), varying(index))
    ordered, places = lax.sort((index, places), dimension=axis, num_keys=1)
    first = (ordered != jnp.roll(ordered, 1, axis)) | (lax.broadcasted_iota(jnp.int32, index.shape, axis) == 0)
    return lax.sort((places, first), dimension=axis, num_keys=1)[1]


def first_largest(values: Array, axis: int) -> Int[Array, "*row"]:
    """The first index of the largest value, or the first index of NaN; a row array of int32.

    This replaces `lax.argmax`, which makes its reduction when JAX lowers it. Inside `custom_partitioning` a thread of
    the compiler lowers it, and does not know whether float64 was switched on when the loss was traced.
    """

    def first(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        (x, i), (y, j) = a, b
        take_x = (x > y) | (x != x)
        # `jnp.where` would be a call inside the reduction, and such a call has ended the process in XLA:CPU.
        return lax.select(take_x, x, y), lax.select(take_x | ((x == y) & (i < j)), i, j)

    indices = sharded_like(lax.broadcasted_iota(jnp.int32, values.shape, axis), values)
    initial = jnp.array(-jnp.inf, values.dtype), jnp.array(0, jnp.int32)
    return jnp.expand_dims(lax.reduce((values, indices), initial, first, (axis,))[1], axis)
