"""Labels that give probabilities to a few classes of each position."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import ScatterDimensionNumbers, scatter_add
from jaxtyping import Bool, Float, Int

from jxent._core.forward_mode import moving_where
from jxent._core.indexing import out_of_range, pick
from jxent._core.reports import Negative, NotFinite, NotShare, OutOfRange, report
from jxent._core.shards import ClassAxis, by_compiler, local_index, sharded_as_positions, total
from jxent._labels.index import differs
from jxent._labels.labels import Labels, Mask
from jxent._rows import targets
from jxent._rows.costs import Before, LabelCost, Moved
from jxent._rows.passes import Class, Passes, Row, known, zeros_of
from jxent._rows.terms import below_top, held


class SparseLabels(NamedTuple):
    """Labels of k classes for each position, with probabilities: a teacher's top k, or several right answers.

    The loss equals that of dense probabilities with 0 for all other classes; the dense array is never created. If a
    class repeats, its probabilities add up. An entry with probability 0 changes nothing, even if its index is out of
    range. Any other index out of range makes its position NaN. The probabilities need not sum to 1, and are not
    normalized.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> logits = jnp.array([[2.0, 0.5, -1.0]])
      >>> labels = jxent.SparseLabels(jnp.array([[0, 1]]), jnp.array([[0.9, 0.1]]))  # two of the three classes
      >>> dense = jnp.array([[0.9, 0.1, 0.0]])
      >>> print(f"{jxent.cross_entropy(logits, labels):.4f} {jxent.cross_entropy(logits, dense):.4f}")
      0.3913 0.3913
    """

    indices: Int[Array | np.ndarray, "*positions k"]
    """Class indices. The loss leaves out a position whose indices all equal `ignore_index`."""
    probabilities: Float[Array | np.ndarray, "*positions k"]
    """Label probabilities. They can be differentiated."""


jax.export.register_namedtuple_serialization(SparseLabels, serialized_name="jxent.SparseLabels")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class EntryLabels(Labels):
    """The entries of `SparseLabels`. With a class axis, the arrays have the logits' shape, but size k along it."""

    indices: Int[Array, "*positions k"]  # these count the classes of all shards
    probabilities: Float[Array, "*positions k"]

    cost_takes_class_weight = True
    can_be_ignored = True
    differentiable = True
    gradient_is_a_share = True

    @property
    def array(self) -> Any:
        return self.probabilities

    def with_array(self, array: Any) -> Self:
        return replace(self, probabilities=array)

    def gradient(self, of_array: Array | None) -> Self:
        return replace(self, indices=None, probabilities=of_array)

    def dimensions(self, positions: tuple[Any, ...], of_logits: tuple[Any, ...], of_entry: Any) -> Self:
        return replace(self, indices=(*positions, of_entry), probabilities=(*positions, of_entry))

    def not_ignored(self, ignore_index: int | None) -> Mask:
        """A sparse label is ignored only if all its indices equal `ignore_index`."""
        mask = differs(self.indices, ignore_index)
        return None if mask is None else jnp.any(mask, -1)

    def sharded_as_positions(self, array: Array, axis: int) -> Self:
        indices, probabilities = (sharded_as_positions(a, array, axis) for a in (self.indices, self.probabilities))
        return replace(self, indices=indices, probabilities=probabilities)

    def reported(self, function: str, mask: Mask, classes: ClassAxis, distribution: bool = True) -> Self:
        """No sum is checked, because sparse probabilities need not sum to 1."""
        labels, of_entries = self.probabilities, None if mask is None else mask[..., None]
        of_number = Negative(function=function) if distribution else NotShare(function=function)
        for fault in (NotFinite(function=function, name="labels", masked=False), of_number):
            labels = report(fault, labels, labels, of_entries)
        if not distribution:
            same = self.indices[..., None] == self.indices[..., None, :]
            of_class = jnp.sum(jnp.where(same, labels[..., None, :], 0), -1)  # a class may have several entries
            labels = report(of_number, labels, of_class, of_entries)
        used = labels != 0 if of_entries is None else (labels != 0) & of_entries
        of_range = OutOfRange(function=function, classes=classes.number)
        return replace(self, probabilities=report(of_range, labels, jnp.where(used, self.indices, 0)))

    def largest(self, classes: ClassAxis) -> Int[Array, "*positions"]:
        last = self.probabilities.ndim - 1
        return pick(self.indices, jnp.expand_dims(jnp.argmax(self.probabilities, -1), -1), last)[..., 0]

    def with_class_axis(self, axis: int) -> Self:
        indices, probabilities = (jnp.moveaxis(a, -1, axis) for a in (self.indices, self.probabilities))
        return replace(self, indices=indices, probabilities=probabilities)

    def moving_where(self, mask: Row | None) -> Self:
        return self if mask is None else replace(self, probabilities=moving_where(mask, self.probabilities))

    def of_each_class(self, logits: Array, classes: ClassAxis, dtype: Any) -> Array:
        """If a class repeats, its probabilities add up."""
        return Entries.of(self.indices, classes).add_to(zeros_of(logits, dtype), self.probabilities)

    def by_array(self, function: Callable[..., Array], classes: ClassAxis, *values: Array) -> Array:
        entries = Entries.of(self.indices, classes)
        return entries.here(function(*map(entries.at, values)))

    def invalid(self, classes: ClassAxis) -> Bool[Array, "*row"]:
        """Whether any entry of the position has an index out of range and a probability other than 0."""
        bad = out_of_range(self.indices, classes.number) & (self.probabilities != 0)
        return total(jnp.sum(bad, classes.axis, keepdims=True), classes.shards.axis_name) > 0

    def cost(self, classes: ClassAxis, class_weight: Array | None) -> LabelCost:
        return EntryCost(Entries.of(self.indices, classes), self.probabilities, class_weight)


class Entries(NamedTuple):
    """A few classes of each position, on one shard of the classes. The index has size k along the class axis."""

    class_index: Int[Array, "*entries"]  # from this shard's first class; out of its range for a class of another shard
    classes: ClassAxis

    @classmethod
    def of(cls, indices: Int[Array, "*entries"], classes: ClassAxis) -> Self:
        """The entries with these class indices. An index out of range of all classes becomes -1: no shard has it."""
        none = out_of_range(indices, classes.number)
        return cls(class_index=jnp.where(none, -1, local_index(indices, classes.offset)), classes=classes)

    def at(self, values: Array) -> Array:
        """The values at the entries; arbitrary values for a class of another shard."""
        axis = self.classes.axis
        return pick(values, jnp.clip(self.class_index, 0, values.shape[axis] - 1), axis)

    def here(self, values: Array) -> Array:
        """The values of the entries, with 0 for an entry whose class is not on this shard."""
        return jnp.where(out_of_range(self.class_index, self.classes.size), 0, values)

    def add_to(self, array: Array, values: Array) -> Array:
        """The array plus the values of the entries, each at its class; values for other shards' classes are dropped."""
        axis, values = self.classes.axis, self.here(values).astype(array.dtype)
        index = jnp.clip(self.class_index, 0, array.shape[axis] - 1)[..., None]
        positions = tuple(a for a in range(array.ndim) if a != axis)
        dimensions = ScatterDimensionNumbers((), (axis,), (axis,), positions, positions)
        add = partial(scatter_add, dimension_numbers=dimensions, mode="promise_in_bounds")
        return by_compiler(add, jax.typeof(array).sharding.spec, array, index, values)

    def collected(self, values: Array) -> Array:
        """The values at the entries, from the shards that have them; 0 for an index that no shard has."""
        return total(self.here(self.at(values)), self.classes.shards.axis_name)

    def summed(self, values: Array) -> Row:
        """The sum over the entries of all shards."""
        return total(jnp.sum(values, self.classes.axis, keepdims=True), self.classes.shards.axis_name)


class EntryRows(NamedTuple):
    """The arrays that the gradient of `EntryCost` takes besides a `Class`. An `Array` has a number for each entry."""

    cotangent: Row
    share: Array
    cost: Array
    sums: targets.Sums | None


class EntryCost(LabelCost):
    """The cost of the target (`targets`) with shares q w at the entries of a sparse label; w is the class weight.

    The gradient is that of any target. The code computes it with a share of 0 for each class, and then subtracts the
    shares at the entries.
    """

    def __init__(self, entries: Entries, probability: Array, class_weight: Array | None) -> None:
        self.entries, self.probability, self.class_weight = entries, probability, class_weight

    def _weighted(self, passes_or_class: Passes | Class, values: Array) -> Array:
        """The values of the entries times the weights of their classes."""
        if self.class_weight is None:
            return values
        logits = known(passes_or_class.arrays.logits)
        return self.entries.at(jnp.broadcast_to(self.class_weight, logits.shape)) * values

    def _taken(self, passes: Passes) -> tuple[Array, Array, Array]:
        """(the logit, the share, -log p) of each entry; the share of an entry of another shard is 0.

        If the share is 0, an infinite -log p becomes 0: a masked class without a share does not count as a class.
        """
        x, log_z = self.entries.at(known(passes.arrays.logits)), passes.arrays.log_z
        share = self.entries.here(self._weighted(passes, self.probability.astype(passes.dtype)))
        cost = -x.astype(passes.dtype) if log_z is None else log_z - passes.z_of(x)
        return x, share, jnp.where((share == 0) & (cost == jnp.inf), 0, cost)

    def value(self, passes: Passes, before: Before) -> tuple[Row, None]:
        _, share, cost = self._taken(passes)
        return self.entries.summed(share * cost), None

    def rows(self, passes: Passes, kept: Row | None, cotangent: Row) -> EntryRows:
        (x, share, cost), sums = self._taken(passes), None
        if passes.normalized:
            row_max, temperature = known(passes.arrays.row_max), passes.arrays.temperature
            others = share * below_top(x, row_max, jnp.ones((), passes.dtype), temperature)
            sums = targets.Sums(others=self.entries.summed(others), all=self.entries.summed(share))
        return EntryRows(cotangent=cotangent, share=share, cost=cost, sums=sums)

    def gradient(self, c: Class, rows: EntryRows) -> Array:
        if rows.sums is None:
            return self.entries.add_to(c.zero, -rows.cotangent * rows.share)
        of_all = targets.gradient(c, 0, rows.sums)  # if p is near 1, this has subtracted the share already
        taken = jnp.where(targets.is_near_one(-rows.cost), 0, rows.share)
        return self.entries.add_to(rows.cotangent * of_all, -rows.cotangent * taken)

    def rows_of_z(self, passes: Passes, rows: EntryRows) -> tuple[Row, Row]:
        return rows.cotangent, known(rows.sums).all

    def times_z(self, c: Class, rows: tuple[Row, Row]) -> Array:
        cotangent, share = rows
        return cotangent * (share * c.p) * c.held_z

    def label_times_z(self, passes: Passes, rows: EntryRows) -> Row:
        z = held(passes.z_of(self.entries.at(known(passes.arrays.logits))), jnp.ones((), passes.dtype))
        return -rows.cotangent * jnp.sum(self.entries.here(rows.share * z), self.entries.classes.axis, keepdims=True)

    def to_label(self, c: Class, rows: EntryRows) -> Array:
        return self.entries.here(rows.cotangent * self._weighted(c, rows.cost))

    def to_class_weight(self, c: Class, rows: EntryRows) -> Array | None:
        if self.class_weight is None:
            return None
        paid = rows.cotangent * self.probability.astype(rows.cost.dtype) * rows.cost
        return self.entries.add_to(jnp.zeros_like(known(c.arrays.logits), rows.cost.dtype), paid)

    def tangent(self, passes: Passes, kept: Row | None, moved: Moved) -> Row:
        x, share, cost = self._taken(passes)
        moving, parts = known(passes.arrays.moving), [0 * cost]
        if moving.z:
            dlogit = None if moving.logits is None else self.entries.at(moving.logits)
            dlog_p = passes.dz_of(x, dlogit) - moved.log_z if passes.normalized else passes.dx_of(x, known(dlogit))
            parts.append(-share * dlog_p)
        if moved.entries is not None:
            parts.append(self._weighted(passes, moved.entries.astype(passes.dtype)) * cost)
        if self.class_weight is not None and moving.weight is not None:
            dweight = self.entries.at(jnp.broadcast_to(moving.weight, known(passes.arrays.logits).shape))
            parts.append(self.probability.astype(passes.dtype) * dweight * cost)
        return self.entries.summed(self.entries.here(sum(parts[1:], parts[0])))
