"""The table of backends, and the only code in which a program depends on the platform that JAX lowers it for."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from jax import lax

from jxent._backend.backend import Backend
from jxent._backend.cpu import CPU
from jxent._backend.xla import XLA

T = TypeVar("T")
Choice = TypeVar("Choice")

DEFAULT = XLA()
BACKENDS: dict[str, Backend] = {"cpu": CPU()}
"""The backends by JAX's name of the platform; all other platforms have the `DEFAULT`."""


def by_platform(choice: Callable[[Backend], Choice], function: Callable[..., T], *operands: Any) -> T:
    """``function(choice(backend), *operands)``, with the backend of the platform that JAX lowers the program for.

    If all backends choose alike, JAX traces the function once, and the program does not depend on the platform.
    """
    default, others = choice(DEFAULT), {platform: choice(backend) for platform, backend in BACKENDS.items()}
    if all(other == default for other in others.values()):
        return function(default, *operands)
    programs = {platform: partial(function, other) for platform, other in others.items()}
    return lax.platform_dependent(*operands, default=partial(function, default), **programs)


def itself(backend: Backend) -> Backend:
    """The `choice` of `by_platform` that takes the whole backend."""
    return backend
