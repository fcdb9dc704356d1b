"""The matmuls of a block, and what XLA:CPU must be told so that it multiplies 16-bit operands as they are.

Operands have the common dtype of `hidden` and `kernel`; the results are accumulated in at least float32.
"""

import jax.numpy as jnp
from jax import lax

from jxent._core.passes import barrier, compute_dtype


def dot(a, b, axes, precision):
    """The sum of products over `axes`, a pair of tuples of axes of `a` and `b`."""
    return lax.dot_general(a, b, (axes, ((), ())), precision, preferred_element_type=compute_dtype(a.dtype))


def operands_of_block(hidden, kernel):
    """Both in their common dtype, for the matmuls of one block.

    The barrier gives the block a kernel of its own, or XLA would make one transposed copy of the kernel for all blocks
    where that seems cheaper to it.
    """
    dtype = jnp.promote_types(hidden.dtype, kernel.dtype)
    return barrier((hidden.astype(dtype), kernel.astype(dtype)))


def kernel_gradient(hidden, dlogits, vocab_axis, cpu, precision):
    """In the layout of the kernel; on a CPU (features, vocab), because the hidden states are cheaper to transpose.

    XLA:CPU multiplies 16-bit operands as they are only if the first one is contracted over its last axes, and otherwise
    writes both in float32. The barrier makes it transpose, and the axis of size 1 in memory, not by layout.
    """
    if not cpu:
        positions = tuple(range(hidden.ndim - 1))
        operands = (hidden, dlogits) if vocab_axis else (dlogits, hidden)
        return dot(*operands, (positions, positions), precision)
    positions = tuple(range(hidden.ndim))  # the last is the axis of size 1
    hidden = barrier(jnp.moveaxis(hidden[..., None, :], -1, 0))
    return dot(hidden, dlogits[..., None, :], (tuple(a + 1 for a in positions), positions), precision)


def as_kernel(gradient, vocab_axis, cpu, one_block):
    """The gradient of `kernel_gradient`, that of one block or a sum over several, in the layout of the kernel."""
    if vocab_axis or not cpu:
        return gradient
    # The barrier keeps XLA:CPU from transposing the operands instead, for it cannot multiply 16-bit ones that way.
    if not one_block or gradient.size > SMALL_KERNEL:
        return barrier(gradient).T
    # Barriers are gone once layouts are assigned. XLA:CPU 0.10 then took the transpose of a matmul for a matmul with a
    # transposed layout, which ends the process where it is small and under `jax.vmap`. An axis of size 1 hides it.
    return jnp.moveaxis(barrier(gradient[..., None]), 1, 0)[..., 0]


SMALL_KERNEL = 2**12  # the largest that ended the process had 36 elements, of 500 random ones of up to 2**15
