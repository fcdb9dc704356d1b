"""JAX's settings as they were when a loss was traced, for functions that JAX traces again later.

JAX may lower, partition or transpose a primitive outside of the caller's `with` blocks.
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import jax


def traced_config() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A function that returns a context manager, which restores the present x64 and matmul precision settings."""
    config: Any = jax.config
    x64, matmul_precision = config.jax_enable_x64, config.jax_default_matmul_precision

    @contextlib.contextmanager
    def traced() -> Generator[None, None, None]:
        with jax.enable_x64(x64), jax.default_matmul_precision(matmul_precision):
            yield

    return traced
