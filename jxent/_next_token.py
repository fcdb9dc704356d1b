"""`next_token_labels`, which makes the labels of a language model."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jxent._call import checks
from jxent._call.annotations import ArrayLike, AxisName
from jxent._call.axis_names import Sharded, mesh_axes
from jxent._call.names import known_names
from jxent._call.placement import CLASSES, placed
from jxent._core.shards import AxisNames, Shards, by_compiler, cast, varying


@known_names
def next_token_labels(
    tokens: Int[ArrayLike, "*batch length"],
    *,
    ignore_index: int = -100,
    offset: int = 1,
    where: Bool[ArrayLike, "*#batch length"] | None = None,
    segment_ids: Int[ArrayLike, "*#batch length"] | None = None,
    axis_name: AxisName | None = None,
) -> Int[Array, "*batch length"]:
    """Labels of a language model: each token's label is the next token, and the last one is ignored.

    The labels keep the tokens' length. So you need not slice hidden states or logits, which would break their
    sharding.

    Args:
      tokens: integers, the sequence on the last axis.
      ignore_index: label of the positions that have none; pass the same to the loss.
      offset: how far ahead the label is, a positive Python number. Heads that predict several tokens have offsets of 1,
        2, 3 and so on.
      where: boolean, broadcasts to the shape of the tokens. A token with False is the label of no position. Pass False
        for prompts and padding, for example ``where=tokens != pad``.
      segment_ids: integers, broadcast to the shape of the tokens: which of several documents in a row a token belongs
        to. A position is ignored if its label is of another document. Ids of 0 are padding, which is nobody's label.
      axis_name: the mesh axis or axes over which the sequence is sharded. Do not name axes that shard only the batch.
        Inside `jax.shard_map` (or `jax.vmap` with an axis name), pass this shard's tokens. The label of its last token
        is then the next shard's first token. Without a name every shard would end in `ignore_index`, because types do
        not say which axis of an array is sharded. Elsewhere, pass whole tokens. A name then shards them over the
        mesh in use. `where` and `segment_ids` are sharded as the tokens are.

    Returns:
      ``labels[..., i] = tokens[..., i + offset]``, in the tokens' dtype, and `ignore_index` where that is no label.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: tokens without an axis, tokens that do not fit into their dtype in JAX, a dtype that cannot hold
        `ignore_index`, an `offset` below 1, or another argument of the wrong shape.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> print(jxent.next_token_labels(jnp.array([[5, 6, 7]])))
      [[   6    7 -100]]
      >>> tokens, documents = jnp.array([5, 6, 7, 8, 9, 0]), jnp.array([1, 1, 1, 2, 2, 0])
      >>> print(jxent.next_token_labels(tokens, segment_ids=documents))
      [   6    7 -100    9 -100 -100]
      >>> print(jxent.next_token_labels(tokens, offset=2, segment_ids=documents))
      [   7 -100 -100 -100 -100 -100]
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
    offset = checks.positive(name, "offset", offset)
    where = checks.mask(name, where, tokens.shape, "the tokens", "compare it (mask != 0)")
    if segment_ids is not None:
        segment_ids = checks.array(name, "segment_ids", segment_ids)
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"{name}: segment_ids must be integers, got {segment_ids.dtype}")
        checks.broadcastable(name, "segment_ids", segment_ids, tokens.shape, "the tokens")
        if segment_ids.shape[-1:] != tokens.shape[-1:]:
            raise ValueError(
                f"{name}: segment_ids must have an id for each of the {tokens.shape[-1]} tokens of a sequence, got "
                f"shape {segment_ids.shape}"
            )
    over = mesh_axes(name, axis_name, Sharded(name="tokens", array=tokens, axes=(tokens.ndim - 1,)))
    dimensions = (*[None] * (tokens.ndim - 1), CLASSES)  # `axis_name` shards the last axis
    static, arrays = (over.shards, ignore_index, offset), (tokens, where, segment_ids)
    return placed(name, over.placement, _labels, static, arrays, (dimensions,) * 3)


def _labels(
    shards: Shards, ignore_index: int, offset: int, tokens: Array, where: Array | None, segment_ids: Array | None
) -> Array:
    given = {name: array for name, array in (("where", where), ("segment_ids", segment_ids)) if array is not None}

    def labels(tokens: Array, *arrays: Array) -> Array:
        return _labels_of(shards, ignore_index, offset, tokens, **dict(zip(given, arrays, strict=True)))

    return by_compiler(labels, jax.typeof(tokens).sharding.spec, tokens, *given.values())


def _labels_of(
    shards: Shards,
    ignore_index: int,
    offset: int,
    tokens: Array,
    where: Array | None = None,
    segment_ids: Array | None = None,
) -> Array:
    ignored = jnp.asarray(ignore_index, tokens.dtype)
    if where is not None:
        tokens = jnp.where(where, tokens, ignored)
    if segment_ids is None:
        return _ahead(shards, offset, tokens, ignored)
    segments = cast(segment_ids, varying(tokens))
    labels = _ahead(shards, offset, jnp.where(segments == 0, ignored, tokens), ignored)
    of_labels = _ahead(shards, offset, segments, jnp.zeros((), segments.dtype))
    return jnp.where(of_labels == segments, labels, ignored)


def _ahead(shards: Shards, offset: int, array: Array, end: Array) -> Array:
    """``array[..., i + offset]`` of the whole sequence for each i of this shard, and `end` beyond the sequence."""
    length, names = array.shape[-1], shards.axis_name
    index = jnp.arange(length)
    if not names:
        offset = min(offset, length) if isinstance(length, int) else offset  # a larger one might not fit into an int32
        return jnp.where(index >= length - offset, end, jnp.roll(array, -offset, -1))
    shards_ahead, rest = divmod(offset, max(length, 1))
    number = math.prod(lax.axis_size(name) for name in names)
    if shards_ahead >= number:
        return jnp.full_like(array, end)
    near = _of_shard_ahead(array[..., rest:], names, shards_ahead)
    far = _of_shard_ahead(array[..., :rest], names, shards_ahead + 1)
    left = (number - lax.axis_index(names)) * length - offset  # how many tokens of this shard have a label
    return jnp.where(index >= left, end, jnp.concatenate([near, far], -1))


def _of_shard_ahead(array: Array, axis_name: AxisNames, ahead: int) -> Array:
    """`array` of the shard that is `ahead` shards further on; after the last shard comes the first.

    The array moves along one axis at a time, because `lax.ppermute` takes axes in the order of the mesh and not of
    their names. It moves along the last axis first. A shard that it reaches past the end of that axis needs the array
    of one step more along the axes before.
    """
    if not axis_name or ahead == 0 or array.size == 0:
        return array
    *before, last = axis_name
    size = lax.axis_size(last)
    steps, along = divmod(ahead, size)
    if along:
        array = lax.ppermute(array, last, [(shard, (shard - along) % size) for shard in range(size)])
    near = _of_shard_ahead(array, tuple(before), steps)
    if not along:
        return near
    far = _of_shard_ahead(array, tuple(before), steps + 1)
    return jnp.where(lax.axis_index(last) + along >= size, far, near)
