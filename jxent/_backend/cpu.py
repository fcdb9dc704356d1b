"""The backend of CPUs, for operations that XLA:CPU does not fuse or multiply well.

On a CPU exponentials cost more time than reading them from memory, so this backend keeps them if there is room. A sum
over more than 2**15 classes in one axis takes four times as long as a sum in two steps. XLA:CPU finds the index of a
maximum by comparisons, which take 15 times as long as the maximum. A matmul reads 16-bit operands without a float32
copy in only one layout.
"""

import math
from functools import cache
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jxent._backend.backend import Backend, BlockNeeds
from jxent._backend.fusion import barrier
from jxent._backend.matmuls import dot
from jxent._backend.xla import by_budget
from jxent._core.indexing import first_largest, pick

# The largest kernel that ended the process had 36 elements, among 500 random ones with up to 2**15.
SMALL_KERNEL = 2**12


class CPU(Backend):
    saves_exp = True
    least_step = 64

    def blocks_of_sum(self, classes: int) -> int:
        return blocks_in(classes) if classes > 2**15 else 1

    def blocks_of_masked_sum(self, classes: int, itemsize: int) -> int:
        """Blocks need no mask over all classes, which costs a CPU as much time as the exponentials."""
        return blocks_in(classes) if classes > (2**15 if itemsize == 2 else 2**14) else 1

    def argmax(self, logits: Array, axis: int, classes: int) -> Array:
        """The maximum of each block of classes, then the block with the largest maximum, then the class in that block.

        With fewer than 2**14 classes, or without blocks, this compares all logits instead. With few classes the maxima
        would not be few compared with the logits.
        """
        number = blocks_in(classes) if classes >= 2**14 else 1
        if number % 2 == 0:
            number //= 2  # two numbers are stored for each block, and a sum stores one
        if number == 1:
            # Otherwise XLA:CPU also takes the maximum of the logits from these comparisons, and so makes them even if
            # no one uses the index.
            return first_largest(barrier(logits), axis)
        size = classes // number
        blocks = logits.reshape(*logits.shape[:axis], number, size, *logits.shape[axis + 1 :])
        # XLA:CPU's maximum ignores NaN. This sum is NaN if a logit is NaN, and needs no array of comparisons.
        one, again = barrier((jnp.ones((), jnp.float32), blocks))
        finite = jnp.sum(one / (one + jnp.abs(again.astype(jnp.float32))), axis + 1)
        block = first_largest(jnp.where(jnp.isnan(finite), jnp.nan, jnp.max(blocks, axis + 1)), axis)
        of_block = jnp.squeeze(pick(blocks, jnp.expand_dims(block, axis + 1), axis), axis)
        return block * size + first_largest(of_block, axis)

    def top_k(self, logits: Array, k: int, classes: int) -> tuple[Array, Array]:
        """Of groups of neighbouring classes those k with the largest maxima, and then the k largest logits in them.

        XLA:CPU selects from a row slowly. The groups are such that both selections are from about as many numbers.
        Chosen groups stay in the order of their classes, so that of equal logits the first is first.
        """
        size = round(math.sqrt(classes / k))
        if size < 8:
            return _top_k(logits, k)
        rows, number, rest = logits.reshape(-1, classes), classes // size, classes % size
        least = jnp.array(-jnp.inf, rows.dtype)
        maxima = lax.reduce_window(rows, least, lax.max, (1, size), (1, size), "VALID")
        if rest:
            maxima = jnp.concatenate([maxima, jnp.max(rows[:, number * size :], -1, keepdims=True)], -1)
        largest, groups = _top_k(maxima, k)
        groups = jnp.sort(groups, -1)
        candidates = (groups[..., None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(-1, k * size)
        of_groups = jnp.take_along_axis(rows, jnp.minimum(candidates, classes - 1), -1, mode="clip")
        if rest:
            of_groups = jnp.where(candidates < classes, of_groups, least)
        # Of logits below all of these maxima none is among the k largest. A selection passes over -inf faster.
        values, at = _top_k(jnp.where(of_groups < largest[:, -1:], least, of_groups), k)
        indices = jnp.take_along_axis(groups, at // size, -1, mode="clip") * size + at % size
        return values.reshape(*logits.shape[:-1], k), indices.reshape(*logits.shape[:-1], k)

    def block_size(self, positions: Any, classes: int, needs: BlockNeeds) -> int:
        return by_budget(positions, classes, least=256, budget=64 * 2**20)

    def kernel_gradient(self, hidden: Array, dlogits: Array, vocab_axis: int, precision: Any) -> Array:
        """The gradient as (features, vocab), because the hidden states are cheaper to transpose than `dlogits`.

        XLA:CPU multiplies 16-bit operands directly only if the first operand is contracted over its last axes.
        Otherwise it writes both in float32. The barrier and the axis of size 1 make XLA:CPU transpose in memory, and
        not by a change of layout.
        """
        positions = tuple(range(hidden.ndim))  # the last is the axis of size 1
        hidden = barrier(jnp.moveaxis(hidden[..., None, :], -1, 0))
        return dot(hidden, dlogits[..., None, :], (tuple(a + 1 for a in positions), positions), precision)

    def in_layout_of_kernel(self, gradient: Array, vocab_axis: int, one_block: bool) -> Array:
        if vocab_axis:
            return gradient
        # Without the barrier XLA:CPU transposes the operands instead, and cannot multiply them directly (see above).
        if not one_block or gradient.size > SMALL_KERNEL:
            return barrier(gradient).T
        # XLA:CPU has removed barriers once it has assigned layouts. XLA:CPU 0.10 then turned the transpose of a matmul
        # into a matmul with a transposed layout. That ends the process if the matmul is small and under `jax.vmap`. An
        # axis of size 1 hides the transpose.
        return jnp.moveaxis(barrier(gradient[..., None]), 1, 0)[..., 0]

    def dtype_over_devices(self, dtype: jnp.dtype) -> jnp.dtype:
        """Float32 for 16 bits. XLA:CPU's own sum of these ends the process if it is over some of a mesh's axes."""
        return jnp.dtype(jnp.float32) if dtype.itemsize == 2 else dtype


def _top_k(values: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k`. Without the barriers XLA:CPU sorts whole rows instead, if less than the k numbers is used.

    There are two barriers for the results, because XLA:CPU ends the process if one takes both.
    """
    largest, indices = lax.top_k(barrier(values), k)
    return barrier(largest), barrier(indices)


@cache
def blocks_in(classes: int) -> int:
    """A divisor of the number of classes, not far from its square root; 1 if there is none.

    The divisor is a multiple of the largest power of 2 in `classes`, at most 256. So a shard of the classes has whole
    blocks.
    """
    even = min(classes & -classes, 256)
    rest = classes // even
    divisors = [even * d for d in range(1, rest + 1) if rest % d == 0]
    fit = [d for d in divisors if 1 < d <= classes // 16 and classes // d <= 2**15]
    return min(fit, key=lambda d: abs(math.log(2 * d * d / classes)), default=1)
