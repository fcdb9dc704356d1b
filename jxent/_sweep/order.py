"""The unmasked positions in order, in blocks; a sweep computes no more blocks than these positions fill.

If prompts and padding are masked, most positions add nothing to a loss, and their matmuls would be wasted. Shapes are
static, but the number of blocks need not be. Full blocks come first. The remaining positions are computed in smaller
steps, so that few positions cost little. If they lack less than a step of a full block, they are a block.

The loops have a dynamic length, so reverse mode cannot differentiate them. It could differentiate a loop of static
length with a `lax.cond` in it, but XLA computes even the results of a `cond` that are not used.

The positions of a block are gathered by their indices, and its results scattered. This is for one device that has all
of the positions. If only the compiler knows how they are sharded, it would gather them from all devices.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

Step = Callable[[Array, Any], Any]
"""A function of (the indices of a block of positions, a carry), which returns the next carry."""


class Order(NamedTuple):
    """The unmasked positions of an array of `shape`, whose axes are taken as one."""

    shape: tuple[int, ...]
    rows: Int[Array, " padded"]  # unmasked positions in order, then the number of all, an index out of range
    number: Int[Array, ""]  # of unmasked positions

    @property
    def of_all(self) -> int:
        return math.prod(self.shape)


def order_of(mask: Bool[Array, "*positions"], room: int) -> Order:
    """The `Order` of a mask. `room` is the size of the largest block: so much padding keeps its slice in bounds."""
    number = mask.size
    index = jnp.sort(jnp.where(mask.reshape(number), jnp.arange(number, dtype=jnp.int32), number))
    rows = jnp.pad(index, (0, room), constant_values=number)
    return Order(shape=mask.shape, rows=rows, number=jnp.sum(mask, dtype=jnp.int32))


def all_of(shape: tuple[Any, ...], room: int) -> Order:
    """The `Order` of all positions of this shape."""
    number = math.prod(shape)
    index = jnp.arange(number, dtype=jnp.int32)
    rows = jnp.pad(index, (0, room), constant_values=number)
    return Order(shape=shape, rows=rows, number=jnp.asarray(number, jnp.int32))


def take(order: Order, rows: Int[Array, " block"], array: Array, fill: float = 0) -> Array:
    """The given positions of an array, along the last axis of the positions; `fill` for indices out of range."""
    rest = array.shape[len(order.shape) :]
    block = array.reshape(order.of_all, *rest).at[rows].get(mode="fill", fill_value=fill, indices_are_sorted=True)
    return block.reshape(*[1] * (len(order.shape) - 1), rows.size, *rest)


def put(order: Order, rows: Int[Array, " block"], array: Array, block: Array) -> Array:
    """`array` with the block at these positions; indices out of range are dropped."""
    rest = array.shape[len(order.shape) :]
    flat, block = array.reshape(order.of_all, *rest), block.reshape(rows.size, *rest)
    return flat.at[rows].set(block, mode="drop", indices_are_sorted=True).reshape(array.shape)


def by_scan(order: Order, size: int, step: Step, carry: Any) -> Any:
    """``step(rows, carry)`` for blocks of `size` rows of all positions; reverse mode can differentiate this loop."""

    def visit(carry: Any, start: Array) -> tuple[Any, None]:
        return step(start + jnp.arange(size, dtype=jnp.int32), carry), None

    return lax.scan(visit, carry, size * jnp.arange(-(-order.of_all // size), dtype=jnp.int32))[0]


def by_blocks(order: Order, size: int, step_size: int, step: Step, carry: Any) -> Any:
    """``step(rows, carry)`` for blocks of `size` rows, then of `step_size`, until all unmasked positions are done."""

    def loop(first: Any, number: Array, size: int, carry: Any) -> Any:
        def visit(i: Array, carry: Any) -> Any:
            return step(lax.dynamic_slice(order.rows, (first + i * size,), (size,)), carry)

        return lax.fori_loop(0, number, visit, carry)

    full = (order.number + step_size - 1) // size  # steps that would fill a block are a block
    carry = loop(0, full, size, carry)
    if step_size == size:
        return carry
    rest = jnp.maximum(order.number - full * size, 0)
    return loop(full * size, -(-rest // step_size), step_size, carry)
