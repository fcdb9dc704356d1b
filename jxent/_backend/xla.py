"""The backend of GPUs and TPUs, whose XLA compilers fuse comparisons and masks with a sum."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jxent._backend.backend import Backend
from jxent._backend.matmuls import dot
from jxent._core.indexing import first_largest


class XLA(Backend):
    saves_exp = False
    least_step = 256

    def blocks_of_sum(self, classes: int) -> int:
        return 1

    def blocks_of_masked_sum(self, classes: int, itemsize: int) -> int:
        return 1

    def argmax(self, logits: Array, axis: int, classes: int) -> Array:
        return first_largest(logits, axis)

    def top_k(self, logits: Array, k: int, classes: int) -> tuple[Array, Array]:
        values, indices = lax.top_k(logits, k)
        return values, indices

    def block_size(self, kernel_has_gradient: bool, positions: Any, classes: int) -> int:
        least, budget = (1024, 2**30) if kernel_has_gradient else (512, 2**29)
        return by_budget(positions, classes, least, budget)

    def kernel_gradient(self, hidden: Array, dlogits: Array, vocab_axis: int, precision: Any) -> Array:
        positions = tuple(range(hidden.ndim - 1))
        operands = (hidden, dlogits) if vocab_axis else (dlogits, hidden)
        return dot(*operands, (positions, positions), precision)

    def in_layout_of_kernel(self, gradient: Array, vocab_axis: int, one_block: bool) -> Array:
        return gradient

    def dtype_over_devices(self, dtype: jnp.dtype) -> jnp.dtype:
        return dtype


def by_budget(positions: Any, classes: int, least: int, budget: int) -> int:
    """A quarter of the positions, or fewer if their float32 logits exceed `budget` bytes, but at least `least`.

    Larger blocks read and write the kernel's gradient less often.
    """
    sizes = (positions // 4, budget // (4 * classes))
    return max(least, min((size for size in sizes if isinstance(size, int)), default=least))
