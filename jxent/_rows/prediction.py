"""The class with the largest logit, and the k classes with the largest logits."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jxent._backend.backend import Backend
from jxent._backend.fusion import barrier
from jxent._backend.platform import by_platform, itself
from jxent._core.indexing import pick
from jxent._core.shards import ClassAxis, cast, largest, smallest, total, varying
from jxent._rows.passes import blockable


def largest_class(logits: Array, classes: ClassAxis) -> Int[Array, "*row"]:
    """The first class with the largest logit, or the first whose logit is NaN; a row array of int32."""
    logits, axis, axis_name = lax.stop_gradient(logits), classes.axis, classes.shards.axis_name
    number = blockable(logits, axis)
    here = by_platform(itself, lambda backend, logits: backend.argmax(logits, axis, number), logits)
    if classes.offset is None:
        return here
    value = pick(logits, here, axis)
    value = barrier(jnp.where(jnp.isnan(value), jnp.inf, value))  # one number for both sides of the comparison
    best = value == largest(value, axis_name)
    return smallest(jnp.where(best, here + classes.offset, jnp.iinfo(jnp.int32).max), axis_name)


def largest_classes(logits: Array, k: int, classes: ClassAxis) -> tuple[Int[Array, "*entries"], Float[Array, "*row"]]:
    """(the k classes with the largest logits in falling order, the largest logit of the others).

    Of equal logits, the first class is first. The classes are the last axis, and the indices int32. If there are no
    others, their largest logit is -inf. If the classes are sharded, each shard sends its k + 1 largest logits.
    """
    logits, number, axis = lax.stop_gradient(logits), blockable(logits, classes.axis), classes.axis
    one_more = min(k + 1, classes.number)
    of_shard = min(one_more, classes.size)

    def top_k(backend: Backend, logits: Array) -> tuple[Array, Array]:
        return backend.top_k(logits, of_shard, number)

    values, here = by_platform(itself, top_k, logits)

    def with_rest(values: Array, indices: Array) -> tuple[Array, Array]:
        if one_more == k:
            return indices, jnp.full_like(lax.slice_in_dim(values, 0, 1, axis=axis), -jnp.inf)
        return lax.slice_in_dim(indices, 0, k, axis=axis), lax.slice_in_dim(values, k, k + 1, axis=axis)

    if classes.offset is None:
        return with_rest(values, here)
    place = classes.offset // classes.size * of_shard

    def of_all(mine: Array) -> Array:
        """The arrays of all shards, one after the other."""
        nothing = jnp.zeros((*mine.shape[:-1], classes.shards.number * of_shard), mine.dtype)
        nothing = cast(nothing, varying(mine))
        placed = lax.dynamic_update_slice_in_dim(nothing, mine, place, axis)
        return total(placed, classes.shards.axis_name)

    # Of equal logits, those of an earlier shard come first, as they do in `lax.top_k` of all logits.
    values, at = lax.top_k(of_all(values), one_more)
    return with_rest(values, pick(of_all(here + classes.offset), at, axis))
