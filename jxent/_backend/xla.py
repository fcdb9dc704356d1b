"""The backend of GPUs and TPUs, whose XLA compilers fuse comparisons and masks with a sum."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jxent._backend.backend import Backend, BlockNeeds
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

    def block_size(self, positions: Any, classes: int, needs: BlockNeeds) -> int:
        """The positions of a block, from what an H100 computes and moves: see `docs/benchmarks/accelerators.md`.

        Each block adds its share to the kernel's gradient, which is read and written in float32. Its matmul takes
        longer than that traffic if 4 / block + 1 / features < bandwidth / flops. With 2048 features on an H100 that is
        from 1400 positions on. Without that gradient a block only reads the kernel, and 300 positions are enough.
        """
        if needs.kernel_gradient:
            return by_budget(positions, classes, least=1024, budget=2**31, most=2048)
        return by_budget(positions, classes, least=512, budget=2**29)

    def kernel_gradient(self, hidden: Array, dlogits: Array, vocab_axis: int, precision: Any) -> Array:
        positions = tuple(range(hidden.ndim - 1))
        operands = (hidden, dlogits) if vocab_axis else (dlogits, hidden)
        return dot(*operands, (positions, positions), precision)

    def in_layout_of_kernel(self, gradient: Array, vocab_axis: int, one_block: bool) -> Array:
        return gradient

    def dtype_over_devices(self, dtype: jnp.dtype) -> jnp.dtype:
        return dtype


def by_budget(positions: Any, classes: Any, least: int, budget: int, most: int | None = None) -> int:
    """A quarter of the positions, or fewer if their float32 logits exceed `budget` bytes; from `least` to `most`.

    If neither the positions nor the classes are known, as in symbolic shapes, it is `least`.
    """
    sizes = (positions // 4, budget // (4 * classes))
    size = min((size for size in sizes if isinstance(size, int)), default=least)
    return max(least, size if most is None else min(size, most))
