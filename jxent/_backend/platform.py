"""The table of backends, and the only code in which a program depends on the platform that JAX lowers it for."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from jax import lax

from jxent._backend.backend import Backend
from jxent._backend.cpu import CPU
from jxent._backend.tpu import TPU
from jxent._backend.xla import XLA

T = TypeVar("T")
Choice = TypeVar("Choice")

DEFAULT = XLA()
BACKENDS: dict[str, Backend] = {"cpu": CPU(), "tpu": TPU()}
"""The backends by JAX's name of the platform; all other platforms have the `DEFAULT`."""


def by_platform(choice: Callable[[Backend], Choice], function: Callable[..., T], *operands: Any) -> T:
    """``function(choice(backend), *operands)``, with the backend of the platform that JAX lowers the program for.

    If all backends choose alike, JAX traces the function once, and the program does not depend on the platform.
    """
    default, choices = choice(DEFAULT), {platform: choice(backend) for platform, backend in BACKENDS.items()}
    programs = {platform: partial(function, other) for platform, other in choices.items() if other != default}
    if not programs:
        return function(default, *operands)
    return lax.platform_dependent(*operands, default=partial(function, default), **programs)


def backend_of(platform: str | None) -> Backend:
    """The backend of a platform; None for a platform that the table does not have."""
    return DEFAULT if platform is None else BACKENDS[platform]


def itself(backend: Backend) -> Backend:
    """The `choice` of `by_platform` that takes the whole backend."""
    return backend
