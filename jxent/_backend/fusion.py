"""Hints on fusion to a compiler. They change no value, and cost nothing with compilers that do not need them."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jxent._core.shards import varying

T = TypeVar("T")


def barrier(values: T) -> T:
    """`lax.optimization_barrier` of the values but not of their tangents, which JAX 0.12 cannot always transpose.

    If values vary inside a `shard_map` that checks replication, the barrier makes all of them vary. Then their tangents
    must vary too, and pass the barrier.
    """
    return (lax.optimization_barrier if any(map(varying, jax.tree.leaves(values))) else _barrier)(values)


@jax.custom_jvp
def _barrier(values: Any) -> Any:
    return lax.optimization_barrier(values)


def _barrier_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return _barrier(*primals), tangents[0]


_barrier.defjvp(_barrier_jvp, symbolic_zeros=True)


def unfused(row: Array) -> Array:
    """`row`, a sum, unchanged. The selection stops XLA:CPU from fusing the sum into the next operation."""
    return jnp.where(row == jnp.inf, jnp.inf, row)
