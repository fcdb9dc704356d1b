"""`jax.jit` under the name of a public function: profiles, compilation logs and jaxprs show this name."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import jax


@cache  # `jax.jit` would compile a new function in each call
def jitted(name: str, function: Callable[..., Any], static: tuple[int, ...]) -> Callable[..., Any]:
    """`jax.jit` of the function under this name; the arguments at the places `static` are static."""

    @wraps(function)
    def named(*args: Any) -> Any:
        return function(*args)

    named.__name__ = named.__qualname__ = name
    return jax.jit(named, static_argnums=static)
