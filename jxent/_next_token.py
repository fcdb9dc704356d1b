"""`next_token_labels`: labels of a language model."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jxent._core.shards import by_compiler
from jxent._loss import checks
from jxent._loss.annotations import ArrayLike
from jxent._loss.names import known_names


@known_names
def next_token_labels(
    tokens: Int[ArrayLike, "*batch length"], *, ignore_index: int = -100
) -> Int[Array, "*batch length"]:
    """Labels of a language model: each token's label is the next token, and the last one is ignored.

    The labels keep the tokens' length, so that hidden states and logits need no slicing, which would break their
    sharding.

    Args:
      tokens: integers, the sequence on the last axis.
      ignore_index: label of the last position; give the same to the loss.

    Returns:
      ``labels[..., i] = tokens[..., i + 1]``, and `ignore_index` at the end, in the tokens' dtype.

    Raises:
      TypeError: tokens that are not integers.
      ValueError: tokens without an axis, or of a dtype that cannot hold `ignore_index`.

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
    return _shifted(tokens, ignore_index)


@partial(jax.jit, static_argnums=1)
def _shifted(tokens, ignore_index):
    last = jnp.arange(tokens.shape[-1]) == tokens.shape[-1] - 1
    rolled = by_compiler(partial(jnp.roll, shift=-1, axis=-1), jax.typeof(tokens).sharding.spec, tokens)
    return jnp.where(last, jnp.asarray(ignore_index, tokens.dtype), rolled)
