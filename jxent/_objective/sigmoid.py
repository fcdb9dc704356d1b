"""Sigmoid cross-entropy: each logit is a separate yes or no.

Let s(x) = log(1 + exp x) = max(x, 0) + log1p(exp(-|x|)), whose derivative is the sigmoid. A label is y, and the weight
of a yes is w. Let a = y and b = 1 - y, or with smoothing e, a = (1 - e) y + e / 2 and likewise b. Then

    loss        = w a s(-x) + b s(x)                  # both terms >= 0: nothing cancels
    d loss / dx = b sigmoid(x) - w a sigmoid(-x)
    d loss / dy = (1 - e) (w s(-x) - s(x))            # s(-x) - s(x) = -x
    d loss / dw = a s(-x)

in which 0 times infinity is 0. A label outside of [0, 1] by more than rounding counts as NaN.

The derivative of `sigmoid` is sigmoid(x) sigmoid(-x) and not p (1 - p), because 1 - p rounds to 0 for a large x. So
further derivatives are as exact. The losses use one array of the logits' size, and the gradients one more. All
arithmetic is in at least float32.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jxent._backend.backend import RowMode
from jxent._backend.fusion import barrier, unfused
from jxent._core.forward_mode import moving_where
from jxent._core.reports import is_no_share
from jxent._core.shards import Shards
from jxent._core.weights import only, times
from jxent._objective.objective import Costs, Objective
from jxent._rows.terms import sigmoid, softplus

NONE = Shards()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SigmoidInputs:
    """Arrays of the logits' shape, except the scalar `smoothing`; None for arrays that are not given."""

    logits: Float[Array, "*shape"]
    labels: Float[Array, "*shape"]
    pos_weight: Float[Array, "*shape"] | None = None
    smoothing: Float[Array, ""] | None = None
    mask: Bool[Array, "*shape"] | None = None
    class_offset: None = None  # there are no shards of classes

    def without_masked(self) -> Self:
        """See `RowInputs.without_masked`."""
        if self.mask is None:
            return self
        logits, labels = (moving_where(self.mask, array) for array in (self.logits, self.labels))
        return self.replace(logits=logits, labels=labels)

    def replace(self, **arrays: Any) -> Self:
        return replace(self, **arrays)


class Residuals(NamedTuple):
    inputs: SigmoidInputs


@dataclass(frozen=True, kw_only=True)
class SigmoidCrossEntropy(Objective):
    """Every element of the logits is a position, and there is no class axis."""

    dtype: jnp.dtype  # to compute in
    axis: int = -1
    shards: Shards = NONE

    @property
    def names(self) -> tuple[str, ...]:
        return ("label",)

    def forward(self, inputs: SigmoidInputs, mode: RowMode) -> tuple[tuple[Costs, None], Residuals]:
        x, w, a, b = _shares(self.dtype, inputs)
        losses = times(w, _paid(a, softplus(-x))) + _paid(b, softplus(x))
        # Otherwise XLA:CPU stores five arrays instead of this one if a sum follows.
        return ({"label": unfused(losses)}, None), Residuals(inputs=inputs)

    def backward(self, residuals: Residuals, cotangents: Costs) -> SigmoidInputs:
        # Otherwise XLA:CPU stores the values that the loss and its gradient share.
        inputs, cotangent = barrier((residuals.inputs, cotangents["label"]))
        # All slopes except the one by the logits may be infinite, while the cotangent is 0 for a sample weight of 0.
        slopes = self._slopes(inputs)
        gradients = jax.tree.map(partial(times, cotangent), slopes).replace(logits=cotangent * slopes.logits)
        if gradients.smoothing is not None:
            gradients = gradients.replace(smoothing=jnp.sum(gradients.smoothing))
        return gradients

    def tangent(self, residuals: Residuals, moving: SigmoidInputs) -> Costs:
        slopes = self._slopes(residuals.inputs)

        def moved(slope: Array | None, tangent: Array | None) -> Array | None:
            return None if slope is None or tangent is None else slope * tangent.astype(self.dtype)

        parts: list[Array] = jax.tree.leaves(jax.tree.map(moved, slopes, moving, is_leaf=lambda array: array is None))
        return {"label": sum(parts[1:], parts[0])}

    def _slopes(self, inputs: SigmoidInputs) -> SigmoidInputs:
        """The derivatives of the loss by the inputs; None for an input that is not given or has no derivative."""
        x, w, a, b = _shares(self.dtype, inputs)
        to_label = jnp.where(jnp.isnan(a), jnp.nan, -x if w is None else _to_weighted_label(x, w))
        to_smoothing = None
        if inputs.smoothing is not None:
            to_smoothing = (0.5 - inputs.labels.astype(self.dtype)) * to_label
            to_label = (1 - inputs.smoothing.astype(self.dtype)) * to_label
        slopes = SigmoidInputs(
            logits=b * sigmoid(x) - times(w, a * sigmoid(-x)),
            labels=to_label,
            pos_weight=None if w is None else _paid(a, softplus(-x)),
            smoothing=to_smoothing,
        )
        return jax.tree.map(lambda slope: only(inputs.mask, slope), slopes)


def _shares(dtype: jnp.dtype, inputs: SigmoidInputs) -> tuple[Array, Array | None, Array, Array]:
    """(x, w, a, b) of the formulas above, in the dtype to compute in."""
    x, y = inputs.logits.astype(dtype), jnp.where(is_no_share(inputs.labels), jnp.nan, inputs.labels.astype(dtype))
    a, b = y, 1 - y
    if inputs.smoothing is not None:
        e = inputs.smoothing.astype(dtype)
        a, b = (1 - e) * a + e / 2, (1 - e) * b + e / 2
    return x, None if inputs.pos_weight is None else inputs.pos_weight.astype(dtype), a, b


def _paid(share: Array, cost: Array) -> Array:
    """share * cost for a share >= 0, with 0 * inf = 0."""
    most = float(jnp.finfo(cost.dtype).max)
    excess = jnp.minimum(jnp.maximum(cost - most, 0), most)  # 0 unless the cost is infinite
    return share * jnp.minimum(cost, most) * (1 + excess) * (1 + excess)


def _to_weighted_label(x: Array, w: Array) -> Array:
    """w s(-x) - s(x). With s(-x) = s(x) - x it needs only the smaller of s(x) and s(-x)."""
    below = x < 0
    return times(w - 1, softplus(jnp.where(below, x, -x))) + jnp.where(below, times(w, jnp.maximum(-x, 0)), -x)
