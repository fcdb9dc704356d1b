"""Sigmoid cross-entropy of output layers: each class is a yes or no of its own, and a position pays for all classes.

Let s(x) = log(1 + exp x), y[j] the label's share of a yes for class j, and w[j] the weight of a yes. Then

    label   = sum of w[j] y[j] s(-x[j]) + (1 - y[j]) s(x[j])
    uniform = sum of (w[j] s(-x[j]) + s(x[j])) / 2
    loss    = (1 - e) label + e uniform                       # for a smoothing of e

in which 0 times infinity is 0. No term is negative, so nothing cancels. If the label is one index t, y[j] is 1 for t
and 0 for all other classes. So each class has one of the two terms, s(x[j]) or s(-x[t]), and none is subtracted.
The shares of sparse labels are added up in one array of a block's logits' size. For cotangents g of label and h of
uniform, let yes = g y + h / 2 and no = g (1 - y) + h / 2. The gradients are

    by x[j]: no sigmoid(x) - w yes sigmoid(-x)
    by y[j]: g (w s(-x) - s(x))                               # see `terms.yes_over_no`
    by w[j]: yes s(-x)

A share outside of [0, 1] by more than rounding counts as NaN. All arithmetic is in at least float32.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, Self

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Num

from jxent._backend.backend import RowMode
from jxent._core.reports import rounding_of
from jxent._core.shards import Shards
from jxent._core.weights import along, product_of, times
from jxent._labels.labels import Labels
from jxent._objective.objective import Costs, Objective, RowInputs, known_labels
from jxent._rows.costs import Coefficient, Scalars, coefficient_of_label
from jxent._rows.passes import Arrays, Class, Logits, Moving, Passes, Row, class_index, known
from jxent._rows.terms import most, product, share_of, sigmoid, sigmoids, softplus, yes_over_no


class Residuals(NamedTuple):
    inputs: RowInputs


class _AtLabel(NamedTuple):
    """Where the label of each position is, if the labels are one index."""

    index: Num[Array, "*row"]  # counted from this shard's first class
    classes: Num[Array, "*classes"]  # 0, 1, 2, ...

    @classmethod
    def of(cls, index: Int[Array, "*row"], logits: Logits, axis: int) -> Self:
        """Floating-point numbers, which XLA:CPU fuses with a sum, for as many classes as float32 can count."""
        classes, size = class_index(logits, (axis,)), logits.shape[axis]
        if not isinstance(size, int) or size > 2**24:
            return cls(index=index, classes=classes)
        return cls(index=index.astype(jnp.float32), classes=classes.astype(jnp.float32))

    def other(self, c: Class) -> Array:
        """0 for the label's class and 1 for all others."""
        return jnp.minimum(jnp.abs(self.classes - self.index).astype(c.one.dtype), c.one)


@dataclass(frozen=True, kw_only=True)
class SigmoidOfClasses(Objective):
    block_divisor = 2  # because XLA:CPU also stores the logits without their bias

    axis: int
    shards: Shards
    smoothed: bool  # whether there is smoothing

    @property
    def names(self) -> tuple[str, ...]:
        return ("label", "uniform") if self.smoothed else ("label",)

    def _passes(self, inputs: RowInputs, previous: Row | None) -> Passes:
        logits, labels, classes = known(inputs.logits), known_labels(inputs), self.class_axis(inputs)
        arrays = Arrays(
            logits=logits,
            q=labels.of_each_class(logits, classes, inputs.dtype),
            weight=along(inputs.class_weight, logits.ndim, self.axis, inputs.dtype),
        )
        axis_name = self.shards.axis_name
        return Passes(arrays=arrays, axis=(self.axis,), dtype=inputs.dtype, axis_name=axis_name, previous=previous)

    def _at_label(self, inputs: RowInputs) -> _AtLabel | None:
        index = known_labels(inputs).index(self.class_axis(inputs))
        if index is None:
            return None
        return _AtLabel.of(index, known(inputs.logits), self.axis)

    def _share(self, inputs: RowInputs, c: Class, at_label: _AtLabel | None) -> Array:
        """The label's share of a yes."""
        if at_label is not None:
            return c.one - at_label.other(c)
        return share_of(c.q, rounding_of(known_labels(inputs).array.dtype), c.one)

    def _invalid(self, inputs: RowInputs) -> Array | None:
        return known_labels(inputs).invalid(self.class_axis(inputs))

    def forward(self, inputs: RowInputs, mode: RowMode) -> tuple[tuple[Costs, None], Residuals]:
        passes, invalid = self._passes(inputs, None), self._invalid(inputs)

        def paid(c: Class, at_label: _AtLabel | None) -> Array:
            if at_label is None:
                y = self._share(inputs, c, at_label)
                no = product(c.one - y, softplus(c.x, c.one), c.one)
                return no + product(c.weighted(y), softplus(-c.x, c.one), c.one)
            other = at_label.other(c)
            cost = softplus(c.x * (2 * c.one * other - c.one), c.one)
            return cost if c.arrays.weight is None else product(c.weighted(c.one - other) + other, cost, c.one)

        def of_half(c: Class) -> Array:
            yes = softplus(-c.x, c.one)
            return softplus(c.x, c.one) + (yes if c.arrays.weight is None else product(c.arrays.weight, yes, c.one))

        costs = {"label": passes.sum(paid, self._at_label(inputs))}
        if self.smoothed:
            costs["uniform"] = passes.sum(of_half) / 2
        if invalid is not None:
            costs = {name: jnp.where(invalid, jnp.nan, cost) for name, cost in costs.items()}
        return (costs, None), Residuals(inputs=inputs)

    def backward(self, residuals: Residuals, cotangents: Costs) -> RowInputs:
        inputs, labels = residuals.inputs, known_labels(residuals.inputs)
        of_label, of_uniform = cotangents.get("label"), cotangents.get("uniform")
        passes = self._passes(inputs, of_uniform if of_label is None else of_label)

        def gradients(
            c: Class, at_label: _AtLabel | None, of_label: Row | None, of_uniform: Row | None, invalid: Row | None
        ) -> tuple[Logits, Array | None, Array | None]:
            y = self._share(inputs, c, at_label)
            parts = [] if of_label is None else [(of_label * y, of_label * (1 - y))]
            parts += [] if of_uniform is None else [(of_uniform / 2, of_uniform / 2)]
            yes, no = (reduce(jnp.add, terms) for terms in zip(*parts, strict=True))
            of_yes, of_no = sigmoids(c.x)
            to_x = no * of_yes - c.weighted(yes) * of_no
            to_x = to_x if invalid is None else jnp.where(invalid, jnp.nan, to_x)
            to_weight = None if c.arrays.weight is None else times(yes, softplus(-c.x))
            to_labels = None
            if labels.differentiable:
                to_labels = jnp.zeros_like(labels.array, c.one.dtype)
                if of_label is not None:
                    to_labels = self._to_labels(inputs, c, y, of_label)
            return c.to_logit(to_x), to_labels, to_weight

        rows = self._at_label(inputs), of_label, of_uniform, self._invalid(inputs)
        to_logits, to_labels, to_weight = passes.map(gradients, *rows)
        of_inputs = RowInputs(logits=to_logits, labels=labels.gradient(to_labels), class_weight=to_weight)
        return self.summed(inputs, of_inputs)

    def _to_labels(self, inputs: RowInputs, c: Class, y: Array, cotangent: Row) -> Array:
        """The gradient by the main array of the labels."""
        weight = None if c.arrays.weight is None else jnp.broadcast_to(c.arrays.weight, c.x.shape)

        def gradient(x: Array, y: Array, weight: Array = c.one) -> Array:
            return jnp.where(jnp.isnan(y), jnp.nan, times(cotangent, yes_over_no(x.astype(y.dtype), weight, c.one)))

        values = (known(inputs.logits), y) if weight is None else (known(inputs.logits), y, weight)
        return known_labels(inputs).by_array(gradient, self.class_axis(inputs), *values)

    def tangent(self, residuals: Residuals, moving: RowInputs) -> Costs:
        inputs, labels = residuals.inputs, known_labels(residuals.inputs)
        logits, dtype, classes = known(inputs.logits), inputs.dtype, self.class_axis(inputs)
        passes, dq, invalid = self._passes(inputs, None), None, self._invalid(inputs)
        if labels.differentiable and moving.labels is not None and moving.labels.array is not None:
            dq = labels.with_array(moving.labels.array).of_each_class(logits, classes, dtype)
        dweight = along(moving.class_weight, logits.ndim, self.axis, dtype)
        passes.moving(Moving(logits=moving.logits, q=dq, weight=dweight))

        def moved(c: Class, yes: Array, no: Array) -> list[Array]:
            """The terms of the tangent by x and by w."""
            tangents, terms = known(c.arrays.moving), []
            if tangents.logits is not None:
                terms.append((no * sigmoid(c.x) - c.weighted(yes) * sigmoid(-c.x)) * c.dlogit)
            if tangents.weight is not None:
                terms.append(tangents.weight * product(yes, softplus(-c.x), c.one))
            return terms

        def of_label(c: Class, at_label: _AtLabel | None) -> Array:
            y = self._share(inputs, c, at_label)
            terms = moved(c, y, c.one - y)
            if c.dq is not None:
                weight = c.one if c.arrays.weight is None else c.arrays.weight
                slope = yes_over_no(c.x, weight, c.one)
                terms.append(c.dq * jnp.maximum(jnp.minimum(slope, most(c.one)), -most(c.one)))
            return _added_up(c, terms)

        def of_uniform(c: Class) -> Array:
            return _added_up(c, moved(c, c.one / 2, c.one / 2))

        costs = {"label": passes.sum(of_label, self._at_label(inputs))}
        if self.smoothed:
            costs["uniform"] = passes.sum(of_uniform)
        if invalid is not None:
            costs = {name: jnp.where(invalid, jnp.nan, cost) for name, cost in costs.items()}
        return costs

    def coefficients(
        self, scalars: Scalars, sample_weight: Array | None, label_weight: Array | None
    ) -> dict[str, Coefficient]:
        of_label = {"label": coefficient_of_label(scalars, sample_weight, label_weight)}
        if not self.smoothed:
            return of_label
        return of_label | {"uniform": product_of(sample_weight, scalars.label_smoothing)}

    def takes_class_weight(self, name: str, labels: Labels | None) -> bool:
        return True

    def least_class_weight(self, name: str) -> float:
        """A no has no weight, which is a factor of 1."""
        return 1


def _added_up(c: Class, terms: list[Array]) -> Array:
    return reduce(jnp.add, terms) if terms else jnp.zeros_like(c.x)
