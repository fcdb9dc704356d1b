"""The contract of an objective, and the arrays that it takes."""

import abc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jxent._backend.backend import RowMode
from jxent._core.dtypes import compute_dtype
from jxent._core.forward_mode import moving_where
from jxent._core.reports import report_values
from jxent._core.shards import ClassAxis, Shards, cast, cast_alike, sharded_like, varying
from jxent._core.weights import only, product_of
from jxent._labels.labels import Labels
from jxent._rows.costs import Coefficient, Scalars
from jxent._rows.passes import Logits, Row, known

Costs = dict[str, Row]
"""The costs of each position, by their names."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowInputs:
    """The arrays that an objective takes, or their gradients or tangents.

    None stands for an array that is not given, or has no gradient or tangent. If the classes are sharded, the arrays
    are those of this shard. Class indices still count the classes of all shards.
    """

    logits: Logits | None
    labels: Labels | None = None  # with a class axis
    logits_p: Logits | None = None  # the logits of P in a divergence from P to Q; Q has `logits`
    class_weight: Float[Array, " classes"] | None = None  # in the sums over classes, not in the cost of an index label
    temperature: Float[Array, ""] | Row | None = None  # divides all logits, or those of each position; None for 1
    mask: Bool[Array, "*row"] | None = None  # False at masked positions, which reach no gradient
    class_offset: Int[Array, ""] | None = None  # the class that this shard begins with; None if there are no shards
    indices: Int[Array, "*entries"] | None = None  # k classes of each position; the same on every shard

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype to compute in."""
        arrays = jax.tree.leaves((self.logits, self.labels, self.logits_p, self.class_weight, self.temperature))
        return compute_dtype(*(array.dtype for array in arrays))

    def without_masked(self) -> Self:
        """The inputs, as constants at masked positions for derivatives of any order.

        A masked position may have NaN logits, and a derivative of 0 times NaN would be NaN. No input is copied.
        """
        if self.mask is None:
            return self
        logits, logits_p = (None if a is None else moving_where(self.mask, a) for a in (self.logits, self.logits_p))
        labels = None if self.labels is None else self.labels.moving_where(self.mask)
        return self.replace(logits=logits, logits_p=logits_p, labels=labels)

    def replace(self, **arrays: Any) -> Self:
        return replace(self, **arrays)


class FromRows(NamedTuple):
    """The residuals of `Objective.backward_from_rows`."""

    inputs: RowInputs
    rows: Costs  # what `Objective.returning_rows` returns besides the costs, by name


class Objective(abc.ABC):
    """A static description of the costs of each position, with methods for the costs, gradients and tangents.

    An implementor is a frozen, hashable dataclass with fields `axis` (the class axis) and `shards` (of the classes).
    `jxent._objective.rule` makes differentiable functions of an objective, for given logits and for the logits of one
    block of positions (`jxent._sweep`). All arrays of positions are row arrays (`passes`), except costs with several
    `entries`, which only a sweep takes, with the classes on the last axis. Masked positions may contain anything, also
    NaN. The rule takes their costs and gradients out, and no derivative may depend on them.
    """

    axis: int
    shards: Shards
    stats: bool = False
    """Whether there are statistics among the costs, and a prediction."""
    block_divisor: ClassVar[int] = 1
    """By which the default number of positions in a block is divided."""

    temperature_gradient_is_a_share: ClassVar[bool] = False
    """Whether the gradient by the temperature is the sum of the gradients on the shards of the classes."""

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of all costs that `forward` returns."""

    def entries(self, name: str) -> int:
        """The size along the class axis of the cost with this name, or of the `prediction`; 0 for a row array."""
        del name
        return 0

    def predicts(self, indices: Any) -> bool:
        """Whether `forward` returns a prediction, for inputs with these `RowInputs.indices`."""
        del indices
        return self.stats

    def known_indices(self, indices: Any, prediction: Array | None) -> Any:
        """The indices with which the costs have the same derivatives, now that the prediction is known."""
        del prediction
        return indices

    @abc.abstractmethod
    def forward(self, inputs: Any, mode: RowMode) -> tuple[tuple[Costs, Int[Array, "*row"] | None], Any]:
        """((the costs, the prediction or None), residuals).

        With `RowMode.SAVED_EXP` the residuals may contain exponentials. `RowMode.ONE_REDUCTION` is asked for only if
        `takes_one_reduction` is True.
        """

    @abc.abstractmethod
    def backward(self, residuals: Any, cotangents: Costs) -> Any:
        """The gradients by the inputs of the sum of cotangent times cost, in the form of inputs.

        All gradients have the dtype to compute in, except the gradient by the logits. A cost that has no cotangent, or
        None, is left out of the sum.
        """

    @abc.abstractmethod
    def tangent(self, residuals: Any, moving: Any) -> Costs:
        """The tangents of the costs, linear in `moving`, the tangents of the inputs; None for a constant input."""

    @property
    def needs_one_sum(self) -> bool:
        """Whether the costs need only the maximum and one sum of each row."""
        return False

    def takes_one_reduction(self, labels: Labels | None, temperature: Array | None) -> bool:
        """Whether `forward` uses `RowMode.ONE_REDUCTION`, for labels of this kind and this temperature."""
        del labels, temperature
        return False

    def takes_rows(self, labels: Labels | None, temperature: Array | None, names: Iterable[str]) -> bool:
        """Whether `backward_from_rows` has the gradients of the costs with these names, for labels of this kind.

        It reads logits that are computed again, and a compiler may round them in another way. A cost whose gradient
        would lose digits by that must be left out.
        """
        del labels, temperature, names
        return False

    def returning_rows(self) -> "Objective":
        """The same objective, but `forward` returns the rows of `FromRows` among the costs; their tangents are 0."""
        raise NotImplementedError

    def backward_from_rows(self, residuals: FromRows, cotangents: Costs) -> Any:
        """`backward`, from the rows of an earlier `forward`."""
        raise NotImplementedError

    def exchanges_logits(self, inputs: Any) -> bool:
        """Whether the loss's backward pass can do with exponentials instead of the logits.

        If True, the residuals are a `cross_entropy.Residuals`.
        """
        del inputs
        return False

    def takes_p_alone(self, inputs: Any, names: Iterable[str]) -> bool:
        """Whether the gradients of the costs with these names need no logits if exponentials are kept."""
        del inputs, names
        return False

    def coefficients(
        self, scalars: Scalars, sample_weight: Array | None, label_weight: Array | None
    ) -> dict[str, Coefficient]:
        """The factor of each cost of the loss, by name; None stands for 1."""
        del scalars
        (name,) = self.names
        return {name: product_of(sample_weight, label_weight)}

    def takes_class_weight(self, name: str, labels: Labels | None) -> bool:
        """Whether the cost with this name is a sum over the classes with class weights as factors of the terms."""
        del name, labels
        return False

    def least_class_weight(self, name: str) -> float:
        """The smallest factor that the terms of the cost with this name have if class weights are smaller."""
        del name
        return 0

    def largest_gradient(self, name: str) -> float:
        """`Cost.largest_gradient` of the cost with this name."""
        del name
        return 1

    def on(self, shards: Shards) -> "Objective":
        """The same objective with other shards of the classes."""
        changed: Any = self
        return replace(changed, shards=shards)

    def class_axis(self, inputs: RowInputs) -> ClassAxis:
        """The class axis of the inputs."""
        return self.classes(known(inputs.logits).shape[self.axis], inputs.class_offset)

    def cast_alike(self, inputs: RowInputs) -> RowInputs:
        """The inputs, as `shards.cast_alike` casts them. A gradient must vary over a mesh as its array does."""
        of_classes = inputs.replace(labels=None, mask=None, class_offset=None, indices=None)
        temperature = None
        if not self.temperature_gradient_is_a_share:
            of_classes, temperature = of_classes.replace(temperature=None), inputs.temperature
        labels, of_classes, (mask, temperature, indices) = cast_alike(
            self.shards, inputs.labels, of_classes, (inputs.mask, temperature, inputs.indices)
        )
        if not self.temperature_gradient_is_a_share:
            of_classes = of_classes.replace(temperature=temperature)
        return of_classes.replace(labels=labels, mask=mask, class_offset=inputs.class_offset, indices=indices)

    def classes(self, size: int, offset: Int[Array, ""] | None) -> ClassAxis:
        return ClassAxis(axis=self.axis, size=size, shards=self.shards, offset=offset)

    def reported(
        self, function: str, argument: str, mask: Bool[Array, "*positions"] | None, inputs: RowInputs
    ) -> RowInputs:
        """The inputs, with `checkify` reports of their faults; the labels have no class axis yet."""
        row_mask = None if mask is None else jnp.expand_dims(mask, self.axis)
        labels = known_labels(inputs).reported(function, mask, self.class_axis(inputs))
        logits = {argument: inputs.logits}
        array = report_values(function, row_mask, labels.array, masked=(argument,), **logits)
        return inputs.replace(labels=labels.with_array(array))

    def summed(self, inputs: RowInputs, gradients: RowInputs) -> RowInputs:
        """The gradients by the inputs, from the gradients at each position, with 0 at masked positions.

        Class weights and a scalar temperature have no positions, so their gradients are summed over the positions. The
        gradient by a temperature of each position is summed over the classes, if it has a class axis.
        """
        gradients = jax.tree.map(lambda gradient: only(inputs.mask, gradient), gradients)
        class_weight, temperature = gradients.class_weight, gradients.temperature
        if class_weight is not None:
            class_weight = jnp.sum(class_weight, tuple(a for a in range(class_weight.ndim) if a != self.axis))
        if temperature is not None:
            by_position = known(inputs.temperature).ndim > 0
            temperature = jnp.sum(temperature, self.axis, keepdims=True) if by_position else jnp.sum(temperature)
        return gradients.replace(class_weight=class_weight, temperature=temperature)


def as_row(temperature: Float[Array, ""] | Row | None, inputs: RowInputs) -> Row | None:
    """The temperature, or its tangent, as a row array; None for None."""
    if temperature is None:
        return None
    temperature = temperature.astype(inputs.dtype)
    return temperature if temperature.ndim else temperature.reshape((1,) * known(inputs.logits).ndim)


def temperature_row(inputs: RowInputs) -> Row | None:
    """The temperature as a row array, which is a constant at masked positions; None for 1."""
    row, mask = as_row(inputs.temperature, inputs), inputs.mask
    if row is None or mask is None or known(inputs.temperature).ndim:
        return row
    # Otherwise second derivatives at masked positions, which may be NaN, would reach the scalar.
    row = cast(sharded_like(jnp.broadcast_to(row, mask.shape), mask), varying(mask))
    return moving_where(mask, row)


def known_labels(inputs: RowInputs) -> Labels:
    return known(inputs.labels)
