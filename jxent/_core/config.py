"""JAX's settings as they were where a loss was traced, for what is traced again later.

A primitive may be lowered, partitioned or transposed outside of the caller's `with` blocks.
"""

import contextlib
from typing import Any

import jax


def traced_config():
    """A function that returns a context manager, within which these settings are as they are now."""
    config: Any = jax.config
    x64, matmul_precision = config.jax_enable_x64, config.jax_default_matmul_precision

    @contextlib.contextmanager
    def traced():
        with jax.enable_x64(x64), jax.default_matmul_precision(matmul_precision):
            yield

    return traced
