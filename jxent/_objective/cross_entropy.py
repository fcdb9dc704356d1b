"""Cross-entropy with smoothing, z-loss and statistics. Each is a cost, computed by passes over the same logits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jxent._backend.backend import RowMode
from jxent._core.forward_mode import jvp_of_moving, mapped_with
from jxent._core.indexing import at_index
from jxent._core.shards import Shards, gradient_of_copies
from jxent._core.weights import along, is_used
from jxent._labels.labels import Labels
from jxent._objective.objective import Costs, FromRows, Objective, RowInputs, as_row, known_labels, temperature_row
from jxent._rows.costs import (
    OPTIONAL,
    STATISTIC_NAMES,
    STATISTICS,
    Before,
    Coefficient,
    Cost,
    LogProb,
    Moved,
    Scalars,
    coefficient_of_label,
)
from jxent._rows.normalizer import Normalizer, normalizer, normalizer_of
from jxent._rows.passes import Arrays, Class, Logits, Moving, Passes, Row, known
from jxent._rows.prediction import largest_class
from jxent._rows.reduction import Wanted, row_sums


class Residuals(NamedTuple):
    inputs: RowInputs  # without logits if `exp` replaces them
    row_max: Row  # see `Normalizer`
    log_z: Row  # NaN where a label is out of range
    kept: dict[str, Row | None]  # by the names of the costs that keep them
    exp: Logits | None  # see `Normalizer`


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    axis: int
    shards: Shards
    logit_softcap: float | None
    costs: tuple[str, ...]  # names of the costs whose weighted sum is the loss
    stats: bool  # whether `forward` returns statistics too
    returns_rows: bool = False  # whether `forward` returns the rows of `FromRows` too

    @classmethod
    def wanted(cls, scalars: Scalars) -> tuple[str, ...]:
        """The names of the costs that a loss with these options has."""
        return "label", *(name for name, cost in OPTIONAL.items() if is_used(getattr(scalars, cost.option)))

    @property
    def names(self) -> tuple[str, ...]:
        return (*self._names_of_costs, *self._row_names) if self.returns_rows else self._names_of_costs

    @property
    def _names_of_costs(self) -> tuple[str, ...]:
        return (*self.costs, *STATISTIC_NAMES) if self.stats else self.costs

    @property
    def _row_names(self) -> tuple[str, ...]:
        return "row_max", "log_z", *map(_kept_name, self._names_of_costs)

    def costs_of(self, inputs: RowInputs) -> dict[str, Cost]:
        """The costs by name, with the statistics if they are wanted."""
        labels, classes = known_labels(inputs), self.class_axis(inputs)
        weight = self._class_weight(inputs) if labels.cost_takes_class_weight else None
        label = labels.cost(classes, weight)
        costs: dict[str, Cost] = {name: label if name == "label" else OPTIONAL[name] for name in self.costs}
        if not self.stats:
            return costs
        unweighted = label if weight is None else labels.cost(classes, None)
        return costs | {"log_prob": LogProb(unweighted)} | STATISTICS

    def _class_weight(self, inputs: RowInputs) -> Array | None:
        array: Any = inputs.logits
        return along(inputs.class_weight, array.ndim, self.axis, inputs.dtype)

    def leaves_label_out(self, labels: Labels, size: int) -> bool:
        """Whether the sum of exponentials leaves the label's class out instead of the maximum's.

        The label's cost is then as exact, but log_z alone is not. So no other cost and no statistic may need log_z.
        """
        return self.costs == ("label",) and not self.stats and labels.can_be_left_out(self.classes(size, None))

    def passes(self, residuals: Residuals, previous: Row | None) -> Passes:
        dtype, inputs = residuals.log_z.dtype, residuals.inputs
        like = known(inputs.logits if residuals.exp is None else residuals.exp)
        labels, temperature = known_labels(inputs), temperature_row(inputs)
        uses_inverse = residuals.exp is not None or temperature is not None
        arrays = Arrays(
            logits=inputs.logits,
            q=labels.dense,
            weight=along(inputs.class_weight, like.ndim, self.axis, dtype),
            exp=residuals.exp,
            row_max=residuals.row_max,
            log_z=residuals.log_z,
            inverse_z=jnp.exp(-residuals.log_z) if uses_inverse else None,
            temperature=temperature,
        )
        return Passes(
            arrays=arrays,
            axis=(self.axis,),
            dtype=dtype,
            softcap=self.logit_softcap,
            axis_name=self.shards.axis_name,
            previous=previous,
            exp_lacks_label=self.leaves_label_out(labels, like.shape[self.axis]),
            fused=previous is None,
        )

    def forward(self, inputs: RowInputs, mode: RowMode) -> tuple[tuple[Costs, Array | None], Residuals]:
        if mode is not RowMode.ONE_REDUCTION:
            return self.by_passes(inputs, mode)
        out, residuals = _by_one_reduction(self, inputs)
        return out, residuals._replace(inputs=inputs)

    @property
    def needs_one_sum(self) -> bool:
        return self.costs == ("label",) and not self.stats

    def takes_one_reduction(self, labels: Labels | None, temperature: Array | None) -> bool:
        """A soft cap and a temperature round the logits, and passes take care that they do so alike.

        Dense labels are one more array of the logits' size, so one reduction does not make it smaller.
        """
        return self.logit_softcap is None and temperature is None and known(labels).dense is None

    def by_passes(self, inputs: RowInputs, mode: RowMode) -> tuple[tuple[Costs, Array | None], Residuals]:
        logits, labels, classes = known(inputs.logits), known_labels(inputs), self.class_axis(inputs)
        axis_name, index = self.shards.axis_name, labels.index(classes)
        label_logit = None if index is None else at_index(logits, index, self.axis, axis_name)
        left_out = None
        if index is not None and label_logit is not None and self.leaves_label_out(labels, classes.size):
            left_out = index, label_logit
        static = (self.axis,), self.logit_softcap, inputs.dtype, mode is RowMode.SAVED_EXP, axis_name
        row = normalizer(logits, left_out, temperature_row(inputs), *static)
        out, residuals = self._costs(inputs, row, Before(log_normalizer=row.log_normalizer, label_logit=label_logit))
        prediction = largest_class(logits, classes) if self.stats else None
        return (out, prediction), residuals._replace(exp=row.exp)

    def by_sums(self, inputs: RowInputs) -> tuple[tuple[Costs, Array | None], Residuals]:
        """`by_passes`, from the sums of one reduction."""
        logits, labels, classes = known(inputs.logits), known_labels(inputs), self.class_axis(inputs)
        smoothed = "uniform" in self.costs and inputs.class_weight is None
        wanted = Wanted(distance=self.stats, linear=smoothed, prediction=self.stats)
        sums = row_sums(logits, labels.index(classes), wanted, inputs.dtype, classes)
        row = normalizer_of(sums, self.shards, classes.offset)
        before = Before(log_normalizer=row.log_normalizer, label_logit=sums.label_logit, sums=sums)
        out, residuals = self._costs(inputs, row, before)
        return (out, sums.prediction), residuals

    def _costs(self, inputs: RowInputs, row: Normalizer, before: Before) -> tuple[Costs, Residuals]:
        """(the costs, residuals without exponentials)."""
        log_z, invalid = row.log_z, known_labels(inputs).invalid(self.class_axis(inputs))
        if invalid is not None:
            log_z = jnp.where(invalid, jnp.nan, log_z)

        residuals = Residuals(inputs=inputs, row_max=row.row_max, log_z=log_z, kept={}, exp=None)
        passes, costs = self.passes(residuals, log_z), self.costs_of(inputs)
        values: dict[str, tuple[Row, Row | None]] = {}
        for name, cost in costs.items():
            values[name] = cost.value(passes, before)
            if name == "label":
                before = before._replace(label=(cost, values[name]))
        kept = {name: kept for name, (_, kept) in values.items()}
        out = {name: value for name, (value, _) in values.items()}
        if self.returns_rows:
            rows = {"row_max": row.row_max, "log_z": log_z}
            rows |= {_kept_name(name): jnp.zeros_like(log_z) if row is None else row for name, row in kept.items()}
            out |= rows
        return out, residuals._replace(kept=kept)

    def takes_rows(self, labels: Labels | None, temperature: Array | None, names: Iterable[str]) -> bool:
        label = known(labels).cost(self.classes(1, None), None)
        costs = {"label": label, "log_prob": LogProb(label)} | OPTIONAL | STATISTICS
        return self.takes_one_reduction(labels, temperature) and all(costs[name].logits_may_round for name in names)

    def returning_rows(self) -> "CrossEntropy":
        return replace(self, returns_rows=True)

    def backward_from_rows(self, residuals: FromRows, cotangents: Costs) -> RowInputs:
        inputs, rows = residuals
        kept: dict[str, Row | None] = {name: rows[_kept_name(name)] for name in self._names_of_costs}
        row_max, log_z = rows["row_max"], rows["log_z"]
        of_rows = Residuals(inputs=inputs, row_max=row_max, log_z=log_z, kept=kept, exp=None)
        return self._backward(of_rows, cotangents, previous=None)

    def backward(self, residuals: Residuals, cotangents: Costs) -> RowInputs:
        first = next(name for name in self._names_of_costs if cotangents.get(name) is not None)
        return self._backward(residuals, cotangents, cotangents[first])

    def _backward(self, residuals: Residuals, cotangents: Costs, previous: Row | None) -> RowInputs:
        inputs = residuals.inputs
        costs = self._costs_of_residuals(residuals)
        named = {name: cost for name, cost in costs.items() if cotangents.get(name) is not None}
        passes = self.passes(residuals, previous)
        rows = {name: cost.rows(passes, residuals.kept[name], cotangents[name]) for name, cost in named.items()}
        labels = known_labels(inputs)

        def gradients(c: Class, rows: dict[str, Any]) -> tuple[Logits, Array | None, Array | None]:
            to_x = known(_added_up(cost.gradient(c, rows[name]) for name, cost in named.items()))
            to_labels, to_weight = None, None
            if labels.differentiable:
                of_label = (cost.to_label(c, rows[name]) for name, cost in named.items())
                to_labels = _added_up(of_label, jnp.zeros_like(labels.array, to_x.dtype))
            if inputs.class_weight is not None:
                of_weight = (cost.to_class_weight(c, rows[name]) for name, cost in named.items())
                to_weight = _added_up(of_weight, jnp.zeros_like(to_x))
            return c.to_logit(to_x), to_labels, to_weight

        to_logits, to_labels, to_weight = passes.map(gradients, rows)
        to_inputs = RowInputs(
            logits=to_logits,
            labels=labels.gradient(to_labels),
            class_weight=to_weight,
            temperature=self._to_temperature(passes, named, rows),
        )
        return self.summed(inputs, to_inputs)

    def _to_temperature(self, passes: Passes, costs: dict[str, Cost], rows: dict[str, Any]) -> Row | None:
        """The gradient by the temperature of each position; without a temperature None."""
        temperature = passes.arrays.temperature
        if temperature is None:
            return None
        of_z = {name: cost.rows_of_z(passes, rows[name]) for name, cost in costs.items()}

        def times_z(c: Class, rows: dict[str, Any]) -> Array:
            return known(_added_up(cost.times_z(c, rows[name]) for name, cost in costs.items()))

        of_labels = (cost.label_times_z(passes, rows[name]) for name, cost in costs.items())
        share = known(_added_up((passes.share_of_sum(times_z, of_z), *of_labels)))
        return -gradient_of_copies(share, temperature, self.shards) / temperature

    def _costs_of_residuals(self, residuals: Residuals) -> dict[str, Cost]:
        inputs = residuals.inputs
        return self.costs_of(inputs.replace(logits=residuals.exp) if inputs.logits is None else inputs)

    def tangent(self, residuals: Residuals, moving: RowInputs) -> Costs:
        inputs, log_z = residuals.inputs, residuals.log_z
        labels, passes = known_labels(inputs), self.passes(residuals, log_z)
        weight = along(moving.class_weight, log_z.ndim, self.axis, log_z.dtype)
        dlabels = None if moving.labels is None else moving.labels.array
        dq, dtemperature = None if labels.dense is None else dlabels, as_row(moving.temperature, inputs)
        passes.moving(Moving(logits=moving.logits, q=dq, weight=weight, temperature=dtemperature))
        if not known(passes.arrays.moving).z:
            still = jnp.zeros_like(log_z)
            moved = Moved(log_z=still, label_z=still, log_normalizer=still, entries=dlabels)
        else:
            moved = self._moved(residuals, passes, moving.logits)._replace(entries=dlabels)
        costs = self._costs_of_residuals(residuals)
        tangents = {name: cost.tangent(passes, residuals.kept[name], moved) for name, cost in costs.items()}
        return tangents | ({name: jnp.zeros_like(log_z) for name in self._row_names} if self.returns_rows else {})

    def _moved(self, residuals: Residuals, passes: Passes, dlogits: Logits | None) -> Moved:
        inputs, axis_name = residuals.inputs, self.shards.axis_name
        index = known_labels(inputs).index(self.classes(passes.arrays.any.shape[self.axis], inputs.class_offset))
        logit, dlogit, label_dx, reference = None, None, None, jnp.zeros_like(residuals.log_z)
        if index is not None:
            if self.logit_softcap is not None or inputs.temperature is not None:
                logit = at_index(known(inputs.logits), index, self.axis, axis_name)
            dlogit = None if dlogits is None else at_index(dlogits, index, self.axis, axis_name)
            label_dx = None if dlogit is None else passes.dx_of(logit, dlogit)
        if dlogits is not None:
            reference = passes.mean_at_max(lambda c: c.dx)
        if passes.lacks_label and dlogits is not None:
            loss = known(residuals.kept["label"])
            label_is_largest = loss - residuals.log_z < math.log(4 / 3)  # see `terms.below_top`
            reference = jnp.where(label_is_largest, known(label_dx), reference)
        passes.moving(known(passes.arrays.moving)._replace(reference=reference))
        log_z = passes.sum(lambda c: c.p_but_label * c.dz)
        label_z = None if index is None else passes.dz_of(logit, dlogit)
        if passes.lacks_label:
            log_z += jnp.exp(-known(residuals.kept["label"])) * known(label_z)
        return Moved(log_z=log_z, label_z=label_z, log_normalizer=log_z + passes.dtop(reference))

    def exchanges_logits(self, inputs: RowInputs) -> bool:
        # With a temperature the exponentials do not tell z, by which the gradient of the temperature is multiplied.
        alike = self.logit_softcap is None and known(inputs.logits).dtype == inputs.dtype
        alike = alike and inputs.temperature is None
        return alike and self.takes_p_alone(inputs, self.costs)

    def takes_p_alone(self, inputs: RowInputs, names: Iterable[str]) -> bool:
        costs = self.costs_of(inputs)
        return all(costs[name].gradient_takes_p_alone for name in names)

    def coefficients(
        self, scalars: Scalars, sample_weight: Array | None, label_weight: Array | None
    ) -> dict[str, Coefficient]:
        others = {name: OPTIONAL[name].coefficient(scalars, sample_weight) for name in self.costs if name in OPTIONAL}
        return {"label": coefficient_of_label(scalars, sample_weight, label_weight)} | others

    def takes_class_weight(self, name: str, labels: Labels | None) -> bool:
        if name == "label":
            return known(labels).cost_takes_class_weight
        return name in OPTIONAL and OPTIONAL[name].takes_class_weight

    def largest_gradient(self, name: str) -> float:
        return (OPTIONAL | STATISTICS).get(name, Cost).largest_gradient


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_one_reduction(objective: CrossEntropy, inputs: RowInputs) -> Any:
    """`CrossEntropy.forward` by one reduction, without the inputs in the residuals."""
    out, residuals = objective.by_sums(inputs)
    return mapped_with((out, residuals._replace(inputs=None)), inputs)


# JAX cannot differentiate a reduction of several arrays. So tangents, and all that follows from them, are those of the
# passes, which return the same numbers.
def _by_one_reduction_jvp(objective: CrossEntropy, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (inputs,), (directions,) = primals, tangents
    leaves, tree = jax.tree.flatten(inputs)
    directions = tree.flatten_up_to(directions)
    moving = [i for i, direction in enumerate(directions) if not isinstance(direction, SymbolicZero)]

    def by_passes(*leaves: Array) -> Any:
        out, residuals = objective.by_passes(tree.unflatten(leaves), RowMode.PASSES)
        return out, residuals._replace(inputs=None)

    moved = jvp_of_moving(by_passes, moving, leaves, [directions[i] for i in moving])[1]
    return _by_one_reduction(objective, inputs), moved


_by_one_reduction.defjvp(_by_one_reduction_jvp, symbolic_zeros=True)


def _kept_name(cost: str) -> str:
    """The name of the row that a cost keeps, among the rows of `FromRows`."""
    return "kept_" + cost


def _added_up(arrays: Iterable[Array | None], nothing: Array | None = None) -> Array | None:
    """The sum of the arrays that are not None; `nothing` if all are None."""
    there = [array for array in arrays if array is not None]
    return reduce(jnp.add, there) if there else nothing
