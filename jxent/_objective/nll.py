"""The negative log-likelihood: the label's cost, of log-probabilities that are taken as they are.

d / d log_probs[j] is -1 at an index label and 0 elsewhere, or -q[j] w[j] for label probabilities q. JAX would transpose
the gather into a scatter into zeros, which neither fuses nor partitions. The rule here avoids that scatter for index
labels, and counts 0 times infinity as 0.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jxent._backend.backend import RowMode
from jxent._core.indexing import at_index
from jxent._core.shards import Shards
from jxent._core.weights import along
from jxent._labels.labels import Labels
from jxent._objective.objective import Costs, Objective, RowInputs, known_labels
from jxent._rows.costs import Before, LabelCost, Moved
from jxent._rows.passes import Arrays, Class, Logits, Moving, Passes, Row, known


class Residuals(NamedTuple):
    inputs: RowInputs  # with the log-probabilities as `logits`
    kept: Row | None  # the array that the label's cost keeps for its gradient


@dataclass(frozen=True, kw_only=True)
class NegativeLogLikelihood(Objective):
    axis: int
    shards: Shards

    @property
    def names(self) -> tuple[str, ...]:
        return ("label",)

    def _cost(self, inputs: RowInputs) -> LabelCost:
        return known_labels(inputs).cost(self.class_axis(inputs), self._class_weight(inputs))

    def _class_weight(self, inputs: RowInputs) -> Array | None:
        return along(inputs.class_weight, known(inputs.logits).ndim, self.axis, inputs.dtype)

    def _passes(self, inputs: RowInputs, previous: Row | None) -> Passes:
        arrays = Arrays(logits=inputs.logits, q=known_labels(inputs).dense, weight=self._class_weight(inputs))
        axis_name = self.shards.axis_name
        return Passes(arrays=arrays, axis=(self.axis,), dtype=inputs.dtype, axis_name=axis_name, previous=previous)

    def _at_label(self, inputs: RowInputs, values: Logits) -> Row | None:
        index = known_labels(inputs).index(self.class_axis(inputs))
        return None if index is None else at_index(values, index, self.axis, self.shards.axis_name)

    def forward(self, inputs: RowInputs, mode: RowMode) -> tuple[tuple[Costs, None], Residuals]:
        before = Before(log_normalizer=None, label_logit=self._at_label(inputs, known(inputs.logits)))
        cost, kept = self._cost(inputs).value(self._passes(inputs, None), before)
        invalid = known_labels(inputs).invalid(self.class_axis(inputs))
        cost = cost if invalid is None else jnp.where(invalid, jnp.nan, cost)
        return ({"label": cost}, None), Residuals(inputs=inputs, kept=kept)

    def backward(self, residuals: Residuals, cotangents: Costs) -> RowInputs:
        inputs, cotangent = residuals.inputs, cotangents["label"]
        labels, cost, passes = known_labels(inputs), self._cost(inputs), self._passes(inputs, cotangent)
        invalid = labels.invalid(self.class_axis(inputs))

        def gradients(c: Class, rows: object, invalid: Array | None) -> tuple[Array, Array | None, Array | None]:
            to_x = cost.gradient(c, rows)
            to_x = to_x if invalid is None else jnp.where(invalid, jnp.nan, to_x)
            to_weight = None if inputs.class_weight is None else cost.to_class_weight(c, rows)
            return to_x, cost.to_label(c, rows), to_weight

        to_x, to_labels, to_weight = passes.map(gradients, cost.rows(passes, residuals.kept, cotangent), invalid)
        of_inputs = RowInputs(logits=to_x, labels=labels.gradient(to_labels), class_weight=to_weight)
        return self.summed(inputs, of_inputs)

    def tangent(self, residuals: Residuals, moving: RowInputs) -> Costs:
        inputs, dlabels = residuals.inputs, None if moving.labels is None else moving.labels.array
        labels, passes = known_labels(inputs), self._passes(inputs, None)
        weight = along(moving.class_weight, known(inputs.logits).ndim, self.axis, inputs.dtype)
        still = jnp.sum(jnp.zeros_like(known(inputs.logits), inputs.dtype), self.axis, keepdims=True)
        q = None if labels.dense is None else dlabels
        passes.moving(Moving(logits=moving.logits, q=q, weight=weight, reference=still))
        at_label = None if moving.logits is None else self._at_label(inputs, moving.logits)
        label_z = None if at_label is None else at_label.astype(inputs.dtype)
        moved = Moved(log_z=still, label_z=label_z, log_normalizer=still, entries=dlabels)
        return {"label": self._cost(inputs).tangent(passes, residuals.kept, moved)}

    def takes_class_weight(self, name: str, labels: Labels | None) -> bool:
        return known(labels).cost_takes_class_weight
