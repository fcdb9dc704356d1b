"""Mistakes that pyright and mypy must both find: each says where an error is expected, and both report one that is not.

No test runs it.
"""

import jax

import jxent


def misuses(x: jax.Array, y: jax.Array) -> None:
    jxent.cross_entropy(x, y, reduction="average")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    jxent.nll_loss(x, y, weight=x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    jxent.cross_entropy(x, y, x)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    jxent.linear_cross_entropy(x, y)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


def tuple_for_an_array(x: jax.Array, y: jax.Array) -> jax.Array:
    return jxent.cross_entropy(x, y, return_stats=True)  # type: ignore[return-value]  # pyright: ignore[reportReturnType]


def array_for_a_tuple(x: jax.Array, y: jax.Array) -> jxent.Stats:
    return jxent.linear_cross_entropy(x, x, y)  # type: ignore[return-value]  # pyright: ignore[reportReturnType]
