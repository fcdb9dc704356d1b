"""The dtype to compute in."""

from typing import Any

import jax.numpy as jnp


def compute_dtype(*dtypes: Any) -> jnp.dtype:
    """float64 if any of `dtypes` is float64, and otherwise float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32)
