"""The positions that count, one after the other, in blocks; and no more blocks than they fill.

With prompts masked or padding most positions have no share in a loss, and their matmuls would be wasted. Shapes are
static, but the number of blocks need not be. Full blocks come first. What is left is computed in smaller steps, so that
few positions cost little, unless it lacks less than a step of a full block.

The loops are of dynamic length, and so cannot be differentiated backwards. A loop of static length with a `lax.cond` in
it could, but XLA computes the results of a `cond` that nobody uses.

A block of such positions is gathered, and what comes of it scattered, by their indices. That is for one device, which
holds all of the positions: where only the compiler knows how they are sharded, it would gather them from all devices.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Order(NamedTuple):
    """Which positions of an array of `shape` count; the axes of the positions taken as one."""

    shape: tuple[int, ...]
    rows: Array  # those that count in their order, and then the number of all positions, an index out of range
    counted: Array  # how many

    @property
    def number(self):
        return math.prod(self.shape)


def order_of(keep, room):
    """The `Order` of a mask; `room` is the size of the largest block, of which no slice may run past the end."""
    number = keep.size
    index = jnp.sort(jnp.where(keep.reshape(number), jnp.arange(number, dtype=jnp.int32), number))
    return Order(keep.shape, jnp.pad(index, (0, room), constant_values=number), jnp.sum(keep, dtype=jnp.int32))


def all_of(shape, room):
    """The `Order` of all positions of this shape."""
    number = math.prod(shape)
    index = jnp.arange(number, dtype=jnp.int32)
    return Order(shape, jnp.pad(index, (0, room), constant_values=number), jnp.asarray(number, jnp.int32))


def take(order, rows, array):
    """The given positions of an array whose leading axes are those of the positions, along the last; zeros for none."""
    rest = array.shape[len(order.shape) :]
    block = array.reshape(order.number, *rest).at[rows].get(mode="fill", fill_value=0, indices_are_sorted=True)
    return block.reshape(*[1] * (len(order.shape) - 1), rows.size, *rest)


def put(order, rows, array, block):
    """`array` with the block in these positions."""
    rest = array.shape[len(order.shape) :]
    flat, block = array.reshape(order.number, *rest), block.reshape(rows.size, *rest)
    return flat.at[rows].set(block, mode="drop", indices_are_sorted=True).reshape(array.shape)


def by_scan(order, size, step, carry):
    """``step(rows, carry)`` for blocks of `size` rows, of all positions; it can be differentiated backwards."""

    def visit(carry, start):
        return step(start + jnp.arange(size, dtype=jnp.int32), carry), None

    return lax.scan(visit, carry, size * jnp.arange(-(-order.number // size), dtype=jnp.int32))[0]


def by_blocks(order, size, step_size, step, carry):
    """``step(rows, carry)`` for blocks of `size` rows and then of `step_size`, while there are positions that count."""

    def loop(first, number, size, carry):
        def visit(i, carry):
            return step(lax.dynamic_slice(order.rows, (first + i * size,), (size,)), carry)

        return lax.fori_loop(0, number, visit, carry)

    full = (order.counted + step_size - 1) // size  # as many steps as would fill a block are a block
    carry = loop(0, full, size, carry)
    if step_size == size:
        return carry
    rest = jnp.maximum(order.counted - full * size, 0)
    return loop(full * size, -(-rest // step_size), step_size, carry)
