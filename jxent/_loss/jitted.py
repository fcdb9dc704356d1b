"""`jax.jit` under the name of a public function, which profiles, logs of compilation and jaxprs show."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import jax


@cache  # a new function in each call would be compiled in each call
def jitted(name: str, function: Callable, static: tuple[int, ...]) -> Callable[..., Any]:
    """`jax.jit` of the function, as one of this name; the arguments at the places `static` are static."""

    @wraps(function)
    def named(*args):
        return function(*args)

    named.__name__ = named.__qualname__ = name
    return jax.jit(named, static_argnums=static)
