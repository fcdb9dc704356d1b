"""The class with the largest logit."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from jxent._backend.platform import by_platform, itself
from jxent._core.indexing import pick
from jxent._core.shards import ClassAxis, largest, smallest
from jxent._rows.passes import blockable


def largest_class(logits: Array, classes: ClassAxis) -> Int[Array, "*row"]:
    """The first class with the largest logit, or the first whose logit is NaN; a row array of int32."""
    logits, axis, axis_name = lax.stop_gradient(logits), classes.axis, classes.shards.axis_name
    number = blockable(logits, axis)
    here = by_platform(itself, lambda backend, logits: backend.argmax(logits, axis, number), logits)
    if classes.offset is None:
        return here
    value = pick(logits, here, axis)
    value = jnp.where(jnp.isnan(value), jnp.inf, value)
    best = value == largest(value, axis_name)
    return smallest(jnp.where(best, here + classes.offset, jnp.iinfo(jnp.int32).max), axis_name)
