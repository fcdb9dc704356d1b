"""One block of positions: its logits, their costs, and the gradients of the costs.

The logits of a block are hidden @ kernel + bias, of one output layer, or of two for a divergence. Logits and costs are
at least float32. Only the gradient of the logits is rounded to the operands' dtype, for the backward matmuls.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jxent._backend.backend import Backend, RowMode
from jxent._backend.fusion import barrier, unfused
from jxent._backend.matmuls import dot, operands_of_block
from jxent._core.dtypes import compute_dtype
from jxent._core.weights import along, only
from jxent._labels.labels import Labels
from jxent._objective.objective import FromRows, Objective, RowInputs
from jxent._objective.rule import BlockOf, costs_of_block
from jxent._rows.passes import known
from jxent._rows.terms import rounded


class Sweep(NamedTuple):
    """The static part of a sweep (a loop over blocks of positions): the objective, and options of the loop."""

    function: str  # the name of the public function, for profiles
    objective: Objective
    vocab_axis: int
    block_size: int | None  # None for the default
    precision: Any  # as `jax.lax.dot_general` takes it
    vocab_axis_p: int = 1  # of `Inputs.kernel_p`
    pushes_tangents: bool = False  # whether the caller takes the tangents of the costs, which need the logits


class Inputs(NamedTuple):
    """Arrays, their gradients, or the objects that a forward rule with `symbolic_zeros` gets; None if not given."""

    hidden: Float[Array, "*positions features"]
    kernel: Float[Array, "rows columns"]  # the axis of the vocabulary is `Sweep.vocab_axis`
    bias: Float[Array, " vocab"] | None = None
    labels: Labels | None = None
    class_weight: Float[Array, " vocab"] | None = None  # see `RowInputs`
    mask: Bool[Array, "*positions"] | None = None  # False at masked positions
    class_offset: Int[Array, ""] | None = None  # see `RowInputs`
    temperature: Float[Array, "*#positions"] | None = None  # a scalar, or one for each position; see `RowInputs`
    # The fields below are those of P in a divergence.
    hidden_p: Float[Array, "*positions features_p"] | None = None
    kernel_p: Float[Array, "rows_p columns_p"] | None = None
    bias_p: Float[Array, " vocab"] | None = None
    indices: Int[Array, "*positions k"] | None = None  # see `RowInputs`
    rows: dict[str, Float[Array, "*positions"]] | None = None  # see `FromRows`

    def array(self, name: str) -> Any:
        """The array (or gradient) of this name; for labels, the one array that they have."""
        if name == "labels":
            return None if self.labels is None else self.labels.array
        return getattr(self, name)

    def with_arrays(self, arrays: dict[str, Any]) -> Self:
        """The inputs with other arrays, by the names of `array`."""
        if "labels" in arrays and self.labels is not None:
            arrays = arrays | {"labels": self.labels.with_array(arrays["labels"])}
        return self._replace(**arrays)

    @property
    def positional(self) -> tuple[str, ...]:
        """The names of the fields that have the axes of the positions."""
        by_position = self.temperature is not None and self.temperature.ndim > 0
        return (*POSITIONAL, "temperature") if by_position else POSITIONAL


class Swept(NamedTuple):
    """Results of a sweep for each position: arrays of the positions' shape, with one more axis for several entries."""

    costs: dict[str, Array]  # by name
    prediction: Array | None  # see `Objective.predicts`


Gradients = dict[str, Array]
"""Gradients by the names of the fields of `Inputs`."""

POSITIONAL = ("hidden", "labels", "mask", "hidden_p", "indices", "rows")
"""The fields of `Inputs` that always have the axes of the positions."""


class _Layer(NamedTuple):
    """The output layer of a block, as its matmuls take it."""

    hidden: Array  # 0 at masked positions
    kernel: Array
    vocab_axis: int
    suffix: str  # of the names of its arrays in `Inputs`

    def logits(self, bias: Array | None, precision: Any) -> Float[Array, "*block vocab"]:
        last = self.hidden.ndim - 1
        with jax.named_scope("logits" + self.suffix):
            logits = dot(self.hidden, self.kernel, ((last,), (1 - self.vocab_axis,)), precision)
            if self.hidden.shape[-1] == 1:  # XLA:CPU would recompute this product in each pass, and round otherwise
                logits = rounded(logits, barrier(jnp.ones((), logits.dtype)))
            if bias is None:
                return logits
            dtype = compute_dtype(logits.dtype, bias.dtype)
            return logits.astype(dtype) + known(along(bias, logits.ndim, last, dtype))

    def gradients(self, wrt: tuple[str, ...], dlogits: Array, backend: Backend, precision: Any) -> Gradients:
        """The gradients of the hidden states and the kernel, if `wrt` names them."""
        g, gradients = dlogits.astype(self.hidden.dtype), {}
        if (name := "hidden" + self.suffix) in wrt:
            with jax.named_scope(name + "_gradient"):
                gradients[name] = dot(g, self.kernel, ((g.ndim - 1,), (self.vocab_axis,)), precision)
        if (name := "kernel" + self.suffix) in wrt:
            with jax.named_scope(name + "_gradient"):
                gradients[name] = backend.kernel_gradient(self.hidden, g, self.vocab_axis, precision)
        return gradients


def _layers(sweep: Sweep, inputs: Inputs, row_mask: Array | None) -> tuple[_Layer, _Layer | None]:
    """(the `_Layer` of the logits, the `_Layer` of P in a divergence or None)."""
    # Masked hidden states become 0 before the matmul, because in the kernel's gradient 0 * NaN would be NaN.
    hidden, kernel = operands_of_block(only(row_mask, inputs.hidden), inputs.kernel)
    of_q = _Layer(hidden=hidden, kernel=kernel, vocab_axis=sweep.vocab_axis, suffix="")
    if inputs.hidden_p is None or inputs.kernel_p is None:
        return of_q, None
    hidden, kernel = operands_of_block(only(row_mask, inputs.hidden_p), inputs.kernel_p)
    return of_q, _Layer(hidden=hidden, kernel=kernel, vocab_axis=sweep.vocab_axis_p, suffix="_p")


def row_mode_of(sweep: Sweep, wrt: tuple[str, ...], backend: Backend, inputs: Inputs) -> RowMode:
    """How the backend computes the rows of a block."""
    if inputs.rows is not None and not backend.saves_exp:
        return RowMode.KNOWN
    mode = backend.row_mode(bool(wrt) or sweep.pushes_tangents, sweep.objective.needs_one_sum)
    if mode is RowMode.SAVED_EXP and "temperature" in wrt:
        return RowMode.PASSES  # the gradient by a temperature needs the logits; exponentials would be one more array
    if mode is RowMode.ONE_REDUCTION and not sweep.objective.takes_one_reduction(inputs.labels, inputs.temperature):
        return RowMode.PASSES
    return mode


def block_of(
    sweep: Sweep, wrt: tuple[str, ...], backend: Backend, inputs: Inputs, coefficients: dict[str, Array]
) -> tuple[Swept, Gradients]:
    """The costs of one block, and the gradients by the inputs named in `wrt`.

    They are gradients of the sum of the costs times their coefficients. There are no costs if `inputs` have rows, which
    an earlier sweep has computed together with the costs. Gradients of arrays that all blocks share have the dtype in
    which they are summed. `Backend.kernel_gradient` returns the kernel's.
    """
    row_mask = None if inputs.mask is None else inputs.mask[..., None]
    layer, layer_p = _layers(sweep, inputs, row_mask)
    logits, precision, objective = layer.logits(inputs.bias, sweep.precision), sweep.precision, sweep.objective
    labels = None if inputs.labels is None else inputs.labels.with_class_axis(logits.ndim - 1)
    temperature, by_position = inputs.temperature, "temperature" in inputs.positional
    of_block = RowInputs(
        logits=logits,
        labels=labels,
        logits_p=None if layer_p is None else layer_p.logits(inputs.bias_p, precision),
        class_weight=inputs.class_weight,
        temperature=known(temperature)[..., None] if by_position else temperature,
        mask=row_mask,
        class_offset=inputs.class_offset,
        indices=inputs.indices,
    ).without_masked()  # masked hidden states are 0 above, but masked label probabilities may be NaN
    mode = row_mode_of(sweep, wrt, backend, inputs)
    backward: Any = None
    if mode is RowMode.KNOWN:
        rows = {name: row[..., None] for name, row in known(inputs.rows).items()}
        out, residuals, backward = ({}, None), FromRows(inputs=of_block, rows=rows), objective.backward_from_rows
    elif wrt:
        with jax.named_scope("rows"):
            out, residuals = objective.forward(of_block, mode)
        backward = objective.backward
    else:
        of_block = objective.cast_alike(of_block)
        static = BlockOf(objective=objective, mode=mode)
        with jax.named_scope("rows"):
            out, residuals = costs_of_block(static, of_block), None
    entries: Any = {name: objective.entries(name) for name in out[0]}, objective.entries("prediction")

    def as_positions(row: Array, entries: int) -> Array:
        return only(row_mask, row) if entries else only(inputs.mask, row[..., 0])

    costs, prediction = jax.tree.map(as_positions, out, entries if out[1] is not None else (entries[0], None))
    swept = Swept(costs=costs, prediction=prediction)
    if inputs.rows is not None:
        swept = Swept(costs={}, prediction=None)
    if backward is None:
        return swept, {}

    to_costs = {
        name: (c if objective.entries(name) else c[..., None]).astype(of_block.dtype)
        for name, c in coefficients.items()
    }
    with jax.named_scope("logits_gradient"):
        to_rows: Any = backward(residuals, to_costs)
        if mode is RowMode.KNOWN:  # XLA:TPU computes this gradient within the matmul of the logits, for both matmuls
            to_rows = to_rows.replace(logits=barrier(to_rows.logits.astype(layer.hidden.dtype)))
    gradients = layer.gradients(wrt, to_rows.logits, backend, precision)
    if layer_p is not None:
        gradients |= layer_p.gradients(wrt, to_rows.logits_p, backend, precision)
    for name, field in (("bias", "logits"), ("bias_p", "logits_p")):
        if name in wrt:
            # The terms are computed once more for this sum. If they had two uses, XLA:CPU would write all of them.
            with jax.named_scope(name + "_gradient"):
                again, _ = barrier(((residuals, to_costs), getattr(to_rows, field)))
                terms = unfused(getattr(backward(*again), field))
                gradients[name] = jnp.sum(terms, tuple(range(terms.ndim - 1)))
    if "labels" in wrt:
        gradients["labels"] = to_rows.labels.array
    if "class_weight" in wrt:
        gradients["class_weight"] = to_rows.class_weight
    if "temperature" in wrt:
        gradients["temperature"] = to_rows.temperature[..., 0] if by_position else to_rows.temperature
    return swept, gradients
