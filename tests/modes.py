"""Derivatives in an order of the modes, written as a word: "rf" is backwards of forwards."""

from functools import partial

import jax
import jax.numpy as jnp


def differentiated(f, modes):
    """The function of several trees, differentiated once for each letter: "f" along cosines, "r" with cotangents."""
    for mode in reversed(modes):
        f = partial(_forwards if mode == "f" else _backwards, f)
    return jax.jit(f)  # one program; eager derivatives compile each operation


def _forwards(f, *at):
    return jax.jvp(f, at, jax.tree.map(lambda a: jnp.cos(3 * a), at))[1]


def _backwards(f, *at):
    out, pull = jax.vjp(f, *at)
    return pull(jax.tree.map(lambda a: jnp.cos(a) + jnp.arange(a.size).reshape(a.shape), out))
