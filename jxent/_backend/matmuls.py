"""The matmuls of a block of positions.

The operands have the common dtype of `hidden` and `kernel`. Results accumulate in at least float32.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jxent._backend.fusion import barrier
from jxent._core.dtypes import compute_dtype

Axes = tuple[int, ...]


def dot(a: Array, b: Array, axes: tuple[Axes, Axes], precision: Any) -> Array:
    """The sum of products over `axes`, which is (axes of `a`, axes of `b`)."""
    return lax.dot_general(a, b, (axes, ((), ())), precision, preferred_element_type=compute_dtype(a.dtype))


def operands_of_block(
    hidden: Float[Array, "*block features"], kernel: Float[Array, "rows columns"]
) -> tuple[Float[Array, "*block features"], Float[Array, "rows columns"]]:
    """Both arrays in their common dtype, for the matmuls of one block.

    The barrier gives each block its own kernel. Otherwise XLA may make one transposed copy of it for all blocks.
    """
    dtype = jnp.promote_types(hidden.dtype, kernel.dtype)
    return barrier((hidden.astype(dtype), kernel.astype(dtype)))
