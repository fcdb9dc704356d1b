"""One pass over the logits: a sum over the classes of what is computed for each, without an array of their size.

That is a matter of spelling. XLA:CPU fuses a reduction with the arithmetic that feeds it, but

- not with comparisons and selections: hence masks made of `minimum` and `maximum`;
- not with a value of the logits' size that another pass uses too, be it the upcast logits, a broadcast row or a
  broadcast constant: hence `again`, which gives each pass values of its own;
- not well over an axis of more than 2**15 classes, where it takes four times as long: hence sums in two steps.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jxent._shards import total, varying


def barrier(values):
    """`lax.optimization_barrier`, but none to tangents, which JAX 0.12 cannot always transpose.

    Except inside a `shard_map` that checks replication, where a barrier makes values vary, and tangents must follow.
    """
    return (lax.optimization_barrier if any(map(varying, jax.tree.leaves(values))) else _barrier)(values)


@jax.custom_jvp
def _barrier(values):
    return lax.optimization_barrier(values)


@_barrier.defjvp
def _barrier_jvp(primals, tangents):
    return _barrier(*primals), tangents[0]


def on_cpu(function, *operands) -> Any:
    """`function(cpu, *operands)`, with `cpu` True where it is lowered for a CPU and False elsewhere."""
    return lax.platform_dependent(*operands, cpu=partial(function, True), default=partial(function, False))


def again(previous, *arrays):
    """(*`arrays`, unit) for one more pass over the logits, which starts once `previous` is known.

    `unit` is 1 in the dtype of `previous`, which is the one to compute in; the pass takes its constants as multiples of
    it, to have them for itself.
    """
    unit = jnp.ones((), previous.dtype)
    arrays, unit, _ = barrier((arrays, unit, previous))
    return *arrays, unit


def own_sum(row):
    """Itself, but a selection: without one XLA:CPU fuses a sum forwards too, into what the next pass makes of it."""
    return jnp.where(row == jnp.inf, jnp.inf, row)


def class_sum(terms, previous, sized, rows, axis, axis_name=()):
    """The sum over the class axes of `terms(*sized, *rows, unit)`, a row array: one pass, see `again`.

    `sized` arrays have the class axes, all of them or (a weight for each class) only those; None stays None.
    """
    classes = blockable(sized[0], axis)
    number = blocks_in(classes) if classes > 2**15 else 1

    def row(cpu, previous, sized, rows):
        return jnp.sum(partial_sums(number if cpu else 1, terms, previous, sized, rows, axis), axis, keepdims=True)

    operands = previous, sized, rows
    return own_sum(total(on_cpu(row, *operands) if number > 1 else row(False, *operands), axis_name))


def partial_sums(number, terms, previous, sized, rows, axis):
    """The terms of `class_sum` added up within `number` blocks of the class axis, which becomes an axis of blocks."""
    *arrays, unit = again(previous, *sized, *rows)
    if number == 1:
        return terms(*arrays, unit)
    (axis,) = axis

    def in_blocks(array):
        if array is None:
            return None
        size = array.shape[axis]
        blocks = (1, 1) if size == 1 else (number, size // number)
        return array.reshape(*array.shape[:axis], *blocks, *array.shape[axis + 1 :])

    return own_sum(jnp.sum(terms(*map(in_blocks, arrays), unit), axis + 1))


def blockable(logits, axis):
    """How many classes there are in the one class axis; 0 if it cannot be cut into blocks."""
    if len(axis) != 1 or not isinstance(logits.shape[axis[0]], int):
        return 0
    return logits.shape[axis[0]] if jax.typeof(logits).sharding.spec[axis[0]] is None else 0


def blocks_in(classes):
    """A divisor of the number of classes, not far from its square root; 1 if there is none.

    It has the classes' factors of 2, up to 256 of them, so that shards of the classes hold whole blocks.
    """
    even = min(classes & -classes, 256)
    rest = classes // even
    divisors = [even * d for d in range(1, rest + 1) if rest % d == 0]
    fit = [d for d in divisors if 1 < d <= classes // 16 and classes // d <= 2**15]
    return min(fit, key=lambda d: abs(math.log(2 * d * d / classes)), default=1)
