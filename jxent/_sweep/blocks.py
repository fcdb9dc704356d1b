"""Blocks of positions: a sweep computes the positions of one block together, and reads and writes them as below.

An axis of length L is split as (size, steps), and block i takes column i: positions i, i + steps, i + 2 steps, ... If
the number of shards of an axis divides `size`, each block has a slice of every shard. No axis is merged with another.
If a length has no divisor near the wanted size, blocks are of neighbours. The last block then overlaps the one before
it, and the positions that both have belong to the last. Neither way copies or pads the array.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool


class Blocks(NamedTuple):
    """The cuts of the axes of the positions; one entry for each axis."""

    shape: tuple[int, ...]
    size: tuple[int, ...]  # of a block
    steps: tuple[int, ...]  # blocks along the axis

    @property
    def number(self) -> int:
        return math.prod(self.steps)


def blocks_of(shape: tuple[int, ...], most: int) -> Blocks:
    """Blocks of at most `most` positions: if cutting the longest axis is not enough, the next longest is cut too."""
    size, steps = list(shape), [1] * len(shape)
    for axis in sorted(range(len(shape)), key=lambda a: -shape[a]):
        if math.prod(size) <= most:
            break
        length = shape[axis]
        limit = max(1, most * length // math.prod(size))
        size[axis] = max(d for d in range(1, limit + 1) if length % d == 0)
        if 2 * size[axis] <= limit:
            size[axis] = -(-length // -(-length // limit))
        steps[axis] = -(-length // size[axis])
    return Blocks(shape=tuple(shape), size=tuple(size), steps=tuple(steps))


def _places(blocks: Blocks, i: Any) -> Iterator[tuple[int, int, Any]]:
    """(size, steps, start) of block `i` along each axis; if the axis is split, the start is a column."""
    for length, size, steps in zip(*blocks, strict=True):
        if steps == 1:
            yield size, 1, 0
        elif size * steps == length:
            yield size, steps, i % steps
        else:
            yield size, 1, jnp.minimum(i % steps * size, length - size)
        i = i // steps


def _window(blocks: Blocks, i: Any, array: Array) -> tuple[Array, list[Any], tuple[int, ...]]:
    """(`array` with each split axis as two axes, the start of block `i` in it, the shape of this block)."""
    rest = array.shape[len(blocks.shape) :]
    view, start, shape = [], [], []
    for length, (size, steps, at) in zip(blocks.shape, _places(blocks, i), strict=True):
        split = steps > 1
        view += [size, steps] if split else [length]
        start += [0, at] if split else [at]
        shape += [size, 1] if split else [size]
    return array.reshape(*view, *rest), [*start, *(0 for _ in rest)], (*shape, *rest)


def take(blocks: Blocks, i: Any, array: Array) -> Array:
    """Block `i` of an array whose leading axes are those of the positions."""
    view, start, shape = _window(blocks, i, array)
    return lax.dynamic_slice(view, start, shape).reshape(*blocks.size, *array.shape[len(blocks.shape) :])


def put(blocks: Blocks, i: Any, array: Array, block: Array) -> Array:
    """`array` with block `i` in its place."""
    view, start, shape = _window(blocks, i, array)
    return lax.dynamic_update_slice(view, block.reshape(shape), start).reshape(array.shape)


def not_repeated(blocks: Blocks, i: Any) -> Bool[Array, "*block"] | None:
    """A mask that broadcasts to block `i`, False for positions that a later block has too; None for True at all."""
    for axis, (length, size, steps) in enumerate(zip(*blocks, strict=True)):
        if size * steps > length:  # one axis at most: blocks have length 1 along all others that are cut
            at = i // math.prod(blocks.steps[:axis]) % steps
            mine = (at * size + jnp.arange(size) < length - size) | (at == steps - 1)
            return mine.reshape([-1 if a == axis else 1 for a in range(len(blocks.shape))])
    return None
