"""Positions in blocks: which ones are in flight together, and how a block is read and written.

An axis of length L is split as (size, steps), and block i takes column i: positions i, i + steps, i + 2 steps, ... So
each block holds a slice of every shard of an axis whose shards divide its size, and no axis is merged with another. A
length without a divisor near the wanted size gets blocks of neighbours instead, whose last one reaches back over the
one before it; the positions that two blocks share belong to the last. Neither way copies or pads the array.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax


class Blocks(NamedTuple):
    """How the axes of the positions are cut; one entry for each axis."""

    shape: tuple[int, ...]
    size: tuple[int, ...]  # of a block
    steps: tuple[int, ...]  # blocks along the axis

    @property
    def number(self):
        return math.prod(self.steps)


def blocks_of(shape, most):
    """Blocks of at most `most` positions, cut along the longest axis; along others only if single ones are too many."""
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
    return Blocks(tuple(shape), tuple(size), tuple(steps))


def _places(blocks, i):
    """(size, steps, start) of block `i` along each axis; the start counts columns where the axis is split."""
    for length, size, steps in zip(*blocks, strict=True):
        if steps == 1:
            yield size, 1, 0
        elif size * steps == length:
            yield size, steps, i % steps
        else:
            yield size, 1, jnp.minimum(i % steps * size, length - size)
        i = i // steps


def _window(blocks, i, array):
    """`array` with its split axes in two, and the start and the shape of block `i` in that."""
    rest = array.shape[len(blocks.shape) :]
    view, start, shape = [], [], []
    for length, (size, steps, at) in zip(blocks.shape, _places(blocks, i), strict=True):
        split = steps > 1
        view += [size, steps] if split else [length]
        start += [0, at] if split else [at]
        shape += [size, 1] if split else [size]
    return array.reshape(*view, *rest), [*start, *(0 for _ in rest)], (*shape, *rest)


def take(blocks, i, array):
    """Block `i` of an array whose leading axes are those of the positions."""
    view, start, shape = _window(blocks, i, array)
    return lax.dynamic_slice(view, start, shape).reshape(*blocks.size, *array.shape[len(blocks.shape) :])


def put(blocks, i, array, block):
    """`array` with block `i` in its place."""
    view, start, shape = _window(blocks, i, array)
    return lax.dynamic_update_slice(view, block.reshape(shape), start).reshape(array.shape)


def not_repeated(blocks, i):
    """Which positions of block `i` no later block holds too, an array that broadcasts to the block; None for all."""
    for axis, (length, size, steps) in enumerate(zip(*blocks, strict=True)):
        if size * steps > length:  # of one axis at most: any other that is cut is cut into single positions
            at = i // math.prod(blocks.steps[:axis]) % steps
            mine = (at * size + jnp.arange(size) < length - size) | (at == steps - 1)
            return mine.reshape([-1 if a == axis else 1 for a in range(len(blocks.shape))])
    return None
