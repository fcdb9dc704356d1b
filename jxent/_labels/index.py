"""Labels that are one class index for each position."""

from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jxent._core.dtypes import compute_dtype
from jxent._core.indexing import out_of_range, pick
from jxent._core.reports import OutOfRange, report
from jxent._core.shards import ClassAxis, Shards, at_positions, local_index, sharded_as_positions, total
from jxent._core.weights import only
from jxent._labels.labels import Labels, Mask
from jxent._rows.costs import Before, LabelCost, Moved
from jxent._rows.passes import Class, Passes, Row, known
from jxent._rows.terms import expm1, held


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class IndexLabels(Labels):
    """Class indices, with the positions' shape. An index counts the classes of all shards."""

    indices: Int[Array, "*positions"]

    cost_takes_class_weight = False
    can_be_ignored = True
    differentiable = False

    @property
    def array(self) -> Any:
        return self.indices

    def with_array(self, array: Any) -> Self:
        return replace(self, indices=array)

    def gradient(self, of_array: Array | None) -> Self:
        return replace(self, indices=None)

    def dimensions(self, positions: tuple[Any, ...], of_logits: tuple[Any, ...], of_entry: Any) -> Self:
        return replace(self, indices=positions)

    def not_ignored(self, ignore_index: int | None) -> Mask:
        return differs(self.indices, ignore_index)

    def without_masked(self, mask: Mask) -> Self:
        return replace(self, indices=only(mask, self.indices))  # 0, which is in range

    def label_weight(
        self, class_weight: Float[Array, " classes"], mask: Mask, shards: Shards, offset: Int[Array, ""] | None
    ) -> Float[Array, "*positions"]:
        # At least float32, because sums over positions and their gradients have this dtype.
        class_weight = class_weight.astype(compute_dtype(class_weight.dtype))
        index = local_index(self.indices, offset)
        inside = jnp.clip(index, 0, class_weight.size - 1)
        weight = at_positions(class_weight, inside)
        if offset is not None:
            weight = total(jnp.where(index == inside, weight, 0), shards.axis_name)
        return only(mask, weight)

    def sharded_as_positions(self, array: Array, axis: int) -> Self:
        return replace(self, indices=sharded_as_positions(self.indices, array, axis))

    def reported(self, function: str, mask: Mask, classes: ClassAxis, distribution: bool = True) -> Self:
        """Masked positions are checked too. The caller must have replaced their labels, by `without_masked`."""
        of_range = OutOfRange(function=function, classes=classes.number)
        return replace(self, indices=report(of_range, self.indices, self.indices))

    def largest(self, classes: ClassAxis) -> Int[Array, "*positions"]:
        return self.indices

    def with_class_axis(self, axis: int) -> Self:
        return replace(self, indices=jnp.expand_dims(self.indices, axis))

    def index(self, classes: ClassAxis) -> Int[Array, "*row"]:
        clipped = jnp.clip(self.indices, 0, classes.number - 1).astype(jnp.int32)
        return local_index(clipped, classes.offset)

    def can_be_left_out(self, classes: ClassAxis) -> bool:
        """True for a known number of up to 2**24 classes. The sum compares indices in float32, which counts no more."""
        return isinstance(classes.size, int) and classes.size <= 2**24

    def invalid(self, classes: ClassAxis) -> Bool[Array, "*row"]:
        return out_of_range(self.indices, classes.number)

    def cost(self, classes: ClassAxis, class_weight: Array | None) -> LabelCost:
        return IndexCost(self, classes)


class IndexCost(LabelCost):
    """-log p[t]. The gradient is p[j] - [j = t], at j = t computed as expm1(-cost); by log-probabilities -[j = t]."""

    gradient_takes_p_alone = logits_may_round = True

    def __init__(self, labels: IndexLabels, classes: ClassAxis) -> None:
        self.labels, self.classes = labels, classes

    def value(self, passes: Passes, before: Before) -> tuple[Row, Row]:
        logit = known(before.label_logit)
        cost = known(passes.arrays.log_z) - passes.z_of(logit) if passes.normalized else -logit.astype(passes.dtype)
        return cost, cost

    def rows(self, passes: Passes, kept: Row | None, cotangent: Row) -> tuple[Int[Array, "*row"], Row, Row]:
        index = local_index(self.labels.indices, self.classes.offset)
        return index, cotangent, cotangent * expm1(-known(kept)) if passes.normalized else -cotangent

    def gradient(self, c: Class, rows: tuple[Int[Array, "*row"], Row, Row]) -> Array:
        index, cotangent, at_label = rows
        elsewhere = cotangent * c.p_but_label if c.normalized else c.zero
        return jnp.where(c.index == index, at_label, elsewhere)

    def rows_of_z(self, passes: Passes, rows: tuple[Int[Array, "*row"], Row, Row]) -> Row:
        _, cotangent, _ = rows
        return cotangent

    def times_z(self, c: Class, rows: Row) -> Array:
        return rows * c.p_but_label * c.held_z

    def label_times_z(self, passes: Passes, rows: tuple[Int[Array, "*row"], Row, Row]) -> Row:
        """The sum has p[t] z[t] already, unless it lacks the label."""
        index, cotangent, at_label = rows
        logits, one = known(passes.arrays.logits), jnp.ones((), passes.dtype)
        inside = jnp.clip(index, 0, self.classes.size - 1)
        z = held(passes.z_of(pick(logits, inside, self.classes.axis)), one)
        return jnp.where(index == inside, (at_label if passes.lacks_label else -cotangent) * z, 0)

    def tangent(self, passes: Passes, kept: Row | None, moved: Moved) -> Row:
        return moved.log_z - known(moved.label_z)


def differs(indices: Int[Array, "*shape"], ignore_index: int | None) -> Bool[Array, "*shape"] | None:
    """Whether each class index differs from `ignore_index`; None if that is None or outside of the indices' dtype."""
    kind = jnp.iinfo(indices.dtype)
    if ignore_index is None or not kind.min <= ignore_index <= kind.max:
        return None
    return indices != indices.dtype.type(ignore_index)  # as a Python int, one beyond int32 would overflow
