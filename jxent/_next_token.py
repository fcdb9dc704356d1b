"""`next_token_labels`, which makes the labels of a language model."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jxent._call import checks
from jxent._call.annotations import ArrayLike, AxisName
from jxent._call.axis_names import Sharded, mesh_axes
from jxent._call.names import known_names
from jxent._call.placement import CLASSES, placed
from jxent._core.shards import AxisNames, Shards, by_compiler


@known_names
def next_token_labels(
    tokens: Int[ArrayLike, "*batch length"], *, ignore_index: int = -100, axis_name: AxisName | None = None
) -> Int[Array, "*batch length"]:
    """Labels of a language model: each token's label is the next token, and the last one is ignored.

    The labels keep the tokens' length. So you need not slice hidden states or logits, which would break their
    sharding.

    Args:
      tokens: integers, the sequence on the last axis.
      ignore_index: label of the last position; pass the same to the loss.
      axis_name: the mesh axis or axes over which the sequence is sharded. Do not name axes that shard only the batch.
        Inside `jax.shard_map` (or `jax.vmap` with an axis name), pass this shard's tokens. The label of its last token
        is then the next shard's first token. Without a name every shard would end in `ignore_index`, because types do
        not say which axis of an array is sharded. Elsewhere, pass whole tokens. A name then shards them over the
        mesh in use.

    Returns:
      ``labels[..., i] = tokens[..., i + 1]``, and `ignore_index` at the end, in the tokens' dtype.

    Raises:
      TypeError: tokens that are not integers.
      ValueError: tokens without an axis, tokens that do not fit into their dtype in JAX, or a dtype that cannot hold
        `ignore_index`.

    Example:
      >>> import jax.numpy as jnp, jxent
      >>> print(jxent.next_token_labels(jnp.array([[5, 6, 7]])))
      [[   6    7 -100]]
    """
    name = "next_token_labels"
    tokens = checks.array(name, "tokens", tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{name}: tokens must be integers, got {tokens.dtype}")
    if tokens.ndim == 0:
        raise ValueError(f"{name}: tokens need a sequence axis, got a scalar")
    ignore_index = checks.integer(name, "ignore_index", ignore_index)
    info = jnp.iinfo(tokens.dtype)
    if not info.min <= ignore_index <= info.max:
        raise ValueError(
            f"{name}: ignore_index={ignore_index} does not fit into tokens of dtype {tokens.dtype}; convert them with "
            ".astype(jnp.int32)"
        )
    over = mesh_axes(name, axis_name, Sharded(name="tokens", array=tokens, axes=(tokens.ndim - 1,)))
    dimensions = ((*[None] * (tokens.ndim - 1), CLASSES),)  # `axis_name` shards the last axis
    return placed(name, over.placement, _shifted, (over.shards, ignore_index), (tokens,), dimensions)


def _shifted(shards: Shards, ignore_index: int, tokens: Array) -> Array:
    last = jnp.arange(tokens.shape[-1]) == tokens.shape[-1] - 1
    rolled = by_compiler(partial(jnp.roll, shift=-1, axis=-1), jax.typeof(tokens).sharding.spec, tokens)
    end = jnp.asarray(ignore_index, tokens.dtype)
    if shards.axis_name:
        is_last, following = _of_next_shard(tokens[..., :1], shards.axis_name)
        end = jnp.where(is_last, end, following)
    return jnp.where(last, end, rolled)


def _of_next_shard(first: Array, axis_name: AxisNames) -> tuple[Any, Array]:
    """(whether this shard is the last, what the next shard has as `first`).

    The loop moves `first` along one axis at a time, because `lax.ppermute` takes axes in the order of the mesh and not
    of their names. The shard after the last along an axis is the first along it, one further along the axis before.
    """
    is_last = True
    for name in reversed(axis_name):
        size = lax.axis_size(name)
        moved = lax.ppermute(first, name, [(shard, (shard - 1) % size) for shard in range(size)])
        first = jnp.where(is_last, moved, first)
        is_last &= lax.axis_index(name) == size - 1
    return is_last, first
