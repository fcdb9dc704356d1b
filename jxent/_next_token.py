"""`next_token_labels`: labels of a language model."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jxent._core.shards import by_compiler
from jxent._loss import checks
from jxent._loss.annotations import ArrayLike, AxisName
from jxent._loss.axis_names import Sharded, mesh_axes
from jxent._loss.names import known_names
from jxent._loss.placement import CLASSES, placed


@known_names
def next_token_labels(
    tokens: Int[ArrayLike, "*batch length"], *, ignore_index: int = -100, axis_name: AxisName | None = None
) -> Int[Array, "*batch length"]:
    """Labels of a language model: each token's label is the next token, and the last one is ignored.

    The labels keep the tokens' length, so that hidden states and logits need no slicing, which would break their
    sharding.

    Args:
      tokens: integers, the sequence on the last axis.
      ignore_index: label of the last position; give the same to the loss.
      axis_name: the mesh axis or axes over which the sequence is sharded. Inside `jax.shard_map` (or `jax.vmap` with an
        axis name) the tokens are this shard's, and the label of its last token is the next shard's first token. Name
        these axes there: types do not say which axis of an array is sharded, and without a name every shard would end
        in `ignore_index`. Axes that shard only the batch are not named. Elsewhere the tokens are whole, and a name
        shards them over the mesh in use.

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
    over = mesh_axes(name, axis_name, Sharded("tokens", tokens, (tokens.ndim - 1,)))
    dimensions = ((*[None] * (tokens.ndim - 1), CLASSES),)  # along what `axis_name` shards
    return placed(name, over.placement, _shifted, (over.shards, ignore_index), (tokens,), dimensions)


def _shifted(shards, ignore_index, tokens):
    last = jnp.arange(tokens.shape[-1]) == tokens.shape[-1] - 1
    rolled = by_compiler(partial(jnp.roll, shift=-1, axis=-1), jax.typeof(tokens).sharding.spec, tokens)
    end = jnp.asarray(ignore_index, tokens.dtype)
    if shards.axis_name:
        is_last, following = _of_next_shard(tokens[..., :1], shards.axis_name)
        end = jnp.where(is_last, end, following)
    return jnp.where(last, end, rolled)


def _of_next_shard(first, axis_name):
    """(whether this shard is the last, what the next shard has as `first`).

    One axis after the other, because `lax.ppermute` takes several axes in the order of the mesh and not of their names:
    the shard after the last along an axis is the first along it, one further along the axis before.
    """
    is_last = True
    for name in reversed(axis_name):
        size = lax.axis_size(name)
        moved = lax.ppermute(first, name, [(shard, (shard - 1) % size) for shard in range(size)])
        first = jnp.where(is_last, moved, first)
        is_last &= lax.axis_index(name) == size - 1
    return is_last, first
