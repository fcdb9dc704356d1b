"""The types of arguments, as type checkers see them, and the options of a loss, for its overloads.

`return_stats` decides the type that a loss returns. Each overload takes the other options by a `TypedDict`. So the
options are listed in the signature and here, and not in every overload.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, TypedDict

import jax.typing
from jaxtyping import Bool, Float

ArrayLike = jax.typing.ArrayLike | Sequence[Any]
"""Values that `jnp.asarray` takes: arrays of JAX and NumPy, Python numbers, and nested lists of them."""

Reduction = Literal["mean", "sum", "none"]
AxisName = Hashable | tuple[Hashable, ...]


class LossOptions(TypedDict, total=False):
    """The options of `cross_entropy` and `linear_cross_entropy`, except `return_stats`."""

    class_weight: Float[ArrayLike, " classes"] | None
    sample_weight: Float[ArrayLike, "*#positions"] | None
    where: Bool[ArrayLike, "*#positions"] | None
    ignore_index: int | None
    label_smoothing: Float[ArrayLike, ""]
    z_loss_weight: Float[ArrayLike, ""]
    logit_softcap: float | None
    temperature: Float[ArrayLike, "*#positions"]
    reduction: Reduction
    axis_name: AxisName | None
    batch_axis_name: AxisName | None


class LogitsLossOptions(LossOptions, total=False):
    axis: int


class LinearLossOptions(LossOptions, total=False):
    bias: Float[ArrayLike, " vocab"] | None
    vocab_axis: int
    block_size: int | None
    recompute: bool
    precision: Any
