"""The class with the largest logit.

The index of a maximum is found by comparisons, for which a CPU takes 15 times as long as for the maximum. So there the
maximum of each block of classes comes first, then the block that has the largest, then the class in that block; if the
classes are so many that these numbers are few beside the logits, and have a divisor that suits.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from jxent._core.labels import pick
from jxent._core.passes import barrier, blockable, blocks_in, on_cpu
from jxent._core.shards import largest, sharded_like, smallest


def largest_class(logits: Array, axis: int, first: Array | None = None, axis_name=()) -> Array:
    """The first class with the largest logit, or the first whose logit is NaN; a row array of int32.

    Where the classes are sharded, over `axis_name`, `first` is the class that this shard begins with.
    """
    logits = lax.stop_gradient(logits)
    classes = blockable(logits, axis)
    number = blocks_in(classes) if classes >= 2**14 else 1
    if number % 2 == 0:
        number //= 2  # of so many blocks two numbers each are held, where a sum over classes holds one of twice as many
    here = on_cpu(partial(_argmax, axis, number), logits)
    if first is None:
        return here
    value = pick(logits, here, axis)
    value = jnp.where(jnp.isnan(value), jnp.inf, value)
    best = value == largest(value, axis_name)
    return smallest(jnp.where(best, here + first, jnp.iinfo(jnp.int32).max), axis_name)


def _argmax(axis, number, cpu, logits):
    if not cpu:
        return _first_largest(logits, axis)
    if number == 1:
        # Or XLA:CPU would take the maximum, too, from these comparisons, and so make them though nobody asks for them.
        return _first_largest(barrier(logits), axis)
    size = logits.shape[axis] // number
    blocks = logits.reshape(*logits.shape[:axis], number, size, *logits.shape[axis + 1 :])
    # XLA:CPU's maximum passes over NaN. This sum is NaN where a logit is, and needs no array of comparisons.
    unit, again = barrier((jnp.ones((), jnp.float32), blocks))
    finite = jnp.sum(unit / (unit + jnp.abs(again.astype(jnp.float32))), axis + 1)
    block = _first_largest(jnp.where(jnp.isnan(finite), jnp.nan, jnp.max(blocks, axis + 1)), axis)
    of_block = jnp.squeeze(pick(blocks, jnp.expand_dims(block, axis + 1), axis), axis)
    return block * size + _first_largest(of_block, axis)


def _first_largest(values, axis):
    """The first index of the largest value, or of NaN.

    `lax.argmax` makes its reduction when it is lowered. Within `custom_partitioning` that is done by a thread of the
    compiler's, which does not know whether float64 is switched on where the loss was traced.
    """

    def first_largest(a, b):
        (x, i), (y, j) = a, b
        take_x = (x > y) | (x != x)
        # `jnp.where` would be a call within the reduction, for which XLA:CPU has ended the process.
        return lax.select(take_x, x, y), lax.select(take_x | ((x == y) & (i < j)), i, j)

    indices = sharded_like(lax.broadcasted_iota(jnp.int32, values.shape, axis), values)
    initial = jnp.array(-jnp.inf, values.dtype), jnp.array(0, jnp.int32)
    return jnp.expand_dims(lax.reduce((values, indices), initial, first_largest, (axis,))[1], axis)
