"""Labels that give a probability to every class."""

from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jxent._core.forward_mode import moving_where
from jxent._core.reports import Negative, NotFinite, NotOne, NotShare, report
from jxent._core.shards import ClassAxis, sharded_like
from jxent._labels.labels import Labels, Mask
from jxent._rows.costs import LabelCost, TargetCost
from jxent._rows.passes import Class, Row
from jxent._rows.prediction import largest_class


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ProbabilityLabels(Labels):
    """Class probabilities, with the logits' shape."""

    probabilities: Float[Array, "*shape"]

    cost_takes_class_weight = True
    can_be_ignored = False
    differentiable = True

    @property
    def array(self) -> Any:
        return self.probabilities

    def with_array(self, array: Any) -> Self:
        return replace(self, probabilities=array)

    def gradient(self, of_array: Array | None) -> Self:
        return replace(self, probabilities=of_array)

    def dimensions(self, positions: tuple[Any, ...], of_logits: tuple[Any, ...], of_entry: Any) -> Self:
        return replace(self, probabilities=of_logits)

    def not_ignored(self, ignore_index: int | None) -> Mask:
        return None

    def sharded_as_logits(self, logits: Array) -> Self:
        return replace(self, probabilities=sharded_like(self.probabilities, logits))

    def reported(self, function: str, mask: Mask, classes: ClassAxis, distribution: bool = True) -> Self:
        labels, axis, axis_name = self.probabilities, classes.axis, classes.shards.axis_name
        row_mask = None if mask is None else jnp.expand_dims(mask, axis)
        not_one = NotOne(function=function, axis=axis - labels.ndim, axis_name=axis_name)
        of_numbers = Negative(function=function), not_one
        for fault in (
            NotFinite(function=function, name="labels", masked=False),
            *(of_numbers if distribution else (NotShare(function=function),)),
        ):
            labels = report(fault, labels, labels, row_mask)
        return replace(self, probabilities=labels)

    def largest(self, classes: ClassAxis) -> Int[Array, "*positions"]:
        return jnp.squeeze(largest_class(self.probabilities, classes), classes.axis)

    def with_class_axis(self, axis: int) -> Self:
        return self

    def moving_where(self, mask: Row | None) -> Self:
        return self if mask is None else replace(self, probabilities=moving_where(mask, self.probabilities))

    @property
    def dense(self) -> Array:
        return self.probabilities

    def cost(self, classes: ClassAxis, class_weight: Array | None) -> LabelCost:
        return ProbabilityCost(weighted=class_weight is not None)


class ProbabilityCost(LabelCost, TargetCost):
    """The cost of the target with shares q[j] w[j] (`targets`)."""

    def unweighted(self, c: Class) -> Array:
        return c.q

    def dunweighted(self, c: Class) -> Array | None:
        return c.dq

    def to_label(self, c: Class, rows: Any) -> Array:
        cotangent, _ = rows
        return cotangent * self.weigh(c, c.cost_if_shared(c.q))  # w[j] (-log p[j])
