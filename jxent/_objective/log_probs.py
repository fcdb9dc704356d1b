"""Log-probabilities of k listed classes of each position, and of all other classes together, the rest.

The listed classes are masked with -inf in the block's own logits. A pass then sees the others alone: their normalizer
(m', s') makes the rest one class, and `jxent._rows.listed` has the log-probabilities of k + 1 classes. With gradients
g[j] and g_rest of those classes, a listed class gets g[j], and any other class g_rest exp((x - m') - s').
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from jxent._backend.backend import RowMode
from jxent._core.indexing import first_of_equals, out_of_range
from jxent._core.shards import Shards, gradient_of_copies, largest
from jxent._labels.sparse import Entries
from jxent._objective.objective import Costs, Objective, RowInputs, as_row, temperature_row
from jxent._rows.listed import LogProbs, Rest, below_top, gradients, log_probs
from jxent._rows.normalizer import normalizer
from jxent._rows.passes import Arrays, Class, Logits, Moving, Passes, Row, known
from jxent._rows.prediction import largest_classes
from jxent._rows.terms import held, slope

NO_CLASS = -1
"""The index that stands for no class."""


class Residuals(NamedTuple):
    inputs: RowInputs  # with the logits of the rest, which are -inf at the listed classes
    indices: Int[Array, "*entries"]
    counted: Bool[Array, "*entries"] | None  # see `jxent._rows.listed`; None if the classes are distinct
    listed: Array  # the logits of the listed classes, of size k along the class axis
    out: LogProbs  # for indices in range
    rest: Rest
    exp: Logits | None  # of the classes that are not listed; see `Normalizer`


@dataclass(frozen=True, kw_only=True)
class ListedClasses(Objective):
    """Log-probabilities of `RowInputs.indices`, or if these are None, of the k largest classes."""

    axis: int  # the last one
    shards: Shards
    logit_softcap: float | None
    k: int

    @property
    def names(self) -> tuple[str, ...]:
        return "log_probs", "log_rest"

    def entries(self, name: str) -> int:
        return 0 if name == "log_rest" else self.k

    def predicts(self, indices: Any) -> bool:
        return indices is None

    def known_indices(self, indices: Any, prediction: Array | None) -> Any:
        return prediction if indices is None else indices

    def forward(self, inputs: RowInputs, mode: RowMode) -> tuple[tuple[Costs, Array | None], Residuals]:
        logits, classes, found = known(inputs.logits), self.class_axis(inputs), None
        indices, row_max = inputs.indices, None
        if indices is None:
            indices, row_max = largest_classes(logits, self.k, classes)
            found = indices
        entries, counted = Entries.of(indices, classes), None
        if found is None:
            counted = ~out_of_range(indices, classes.number) & first_of_equals(indices, self.axis)
        listed = jnp.where(out_of_range(indices, classes.number), -jnp.inf, entries.collected(logits))
        # These -inf are made of the listed logits. So XLA:CPU has read these before it masks them, and needs no copy.
        masked = -jnp.inf * (1 + jnp.abs(lax.stop_gradient(listed)))
        others = entries.add_to(logits, masked)
        axis_name, cap = self.shards.axis_name, self.logit_softcap
        if row_max is None:
            row_max = largest(lax.stop_gradient(jnp.max(others, self.axis, keepdims=True)), axis_name)
        temperature = temperature_row(inputs)
        row = normalizer(
            others, None, temperature, (self.axis,), cap, inputs.dtype, mode is RowMode.SAVED_EXP, axis_name, row_max
        )
        rest = Rest(row_max=row.row_max, log_z=row.log_z, empty=row.log_normalizer == -jnp.inf)
        out = log_probs(listed, counted, rest, temperature, self.axis, cap)
        residuals = Residuals(
            inputs=inputs.replace(logits=others),
            indices=indices,
            counted=counted,
            listed=listed,
            out=out,
            rest=rest,
            exp=row.exp,
        )
        if found is None:
            out = self._marked(residuals, out, -jnp.inf)
        return ({"log_probs": out.listed, "log_rest": out.rest}, found), residuals

    def _marked(self, residuals: Residuals, values: LogProbs, of_none: float) -> LogProbs:
        """The values, `of_none` where an entry has no class, and NaN where its index is out of range."""
        bad = self._bad(residuals)
        listed = jnp.where(residuals.indices == NO_CLASS, of_none, jnp.where(bad, jnp.nan, values.listed))
        return LogProbs(listed=listed, rest=jnp.where(jnp.any(bad, self.axis, keepdims=True), jnp.nan, values.rest))

    def _bad(self, residuals: Residuals) -> Bool[Array, "*entries"]:
        classes = self.class_axis(residuals.inputs)
        return out_of_range(residuals.indices, classes.number) & (residuals.indices != NO_CLASS)

    def _passes(self, residuals: Residuals, previous: Row) -> Passes:
        """Passes over the classes that are not listed."""
        exp, cap, log_z = residuals.exp, self.logit_softcap, residuals.rest.log_z
        temperature = temperature_row(residuals.inputs)
        arrays = Arrays(
            logits=None if exp is not None and cap is None and temperature is None else residuals.inputs.logits,
            exp=exp,
            row_max=residuals.rest.row_max,
            log_z=log_z,
            inverse_z=None if exp is None and temperature is None else jnp.exp(-log_z),
            temperature=temperature,
        )
        return Passes(
            arrays=arrays,
            axis=(self.axis,),
            dtype=log_z.dtype,
            softcap=cap,
            axis_name=self.shards.axis_name,
            previous=previous,
        )

    def backward(self, residuals: Residuals, cotangents: Costs) -> RowInputs:
        inputs, entries = residuals.inputs, Entries.of(residuals.indices, self.class_axis(residuals.inputs))
        listed, rest = (cotangents.get(name) for name in self.names)
        listed = jnp.zeros_like(residuals.out.listed) if listed is None else listed
        to_y = LogProbs(
            listed=jnp.where(residuals.indices == NO_CLASS, 0, listed),
            rest=jnp.zeros_like(residuals.out.rest) if rest is None else rest,
        )
        to_y = gradients(residuals.out, residuals.counted, to_y, self.axis)
        if residuals.counted is not None:
            bad = jnp.any(self._bad(residuals), self.axis, keepdims=True)
            to_y = LogProbs(listed=jnp.where(bad, jnp.nan, to_y.listed), rest=jnp.where(bad, jnp.nan, to_y.rest))

        def gradient(c: Class, to_rest: Row) -> Logits:
            return c.to_logit(c.p * to_rest)

        passes = self._passes(residuals, to_y.rest)
        to_logits = passes.map(gradient, to_y.rest)
        to_listed = slope(residuals.listed.astype(passes.dtype), self.logit_softcap, to_y.listed)
        if passes.arrays.temperature is not None:
            to_listed = to_listed / passes.arrays.temperature
        to_logits = entries.add_to(to_logits.astype(known(inputs.logits).dtype), to_listed)
        to_temperature = self._to_temperature(residuals, passes, entries, to_y)
        return self.summed(inputs, RowInputs(logits=to_logits, temperature=to_temperature))

    def _to_temperature(self, residuals: Residuals, passes: Passes, entries: Entries, to_y: LogProbs) -> Row | None:
        """The gradient by the temperature T of each position, which is that by y times -(x - m) / T**2."""
        temperature, one = passes.arrays.temperature, jnp.ones((), passes.dtype)
        if temperature is None:
            return None
        below = below_top(
            residuals.listed, residuals.counted, residuals.rest, temperature, self.axis, self.logit_softcap
        )

        def term(c: Class, to_rest: Row, below: Row) -> Array:
            return to_rest * (c.p * (c.held_z + below))

        share = passes.share_of_sum(term, to_y.rest, held(below.rest, one))
        of_listed = entries.here(to_y.listed * held(below.listed, one))
        share += jnp.sum(of_listed, self.axis, keepdims=True)
        return -gradient_of_copies(share, temperature, self.shards) / temperature

    def tangent(self, residuals: Residuals, moving: RowInputs) -> Costs:
        rest, dlogits = residuals.rest, moving.logits
        passes, entries = (
            self._passes(residuals, rest.log_z),
            Entries.of(residuals.indices, self.class_axis(residuals.inputs)),
        )
        temperature, dtemperature = passes.arrays.temperature, as_row(moving.temperature, residuals.inputs)
        tangents = Moving(logits=dlogits, temperature=dtemperature)
        passes.moving(tangents)
        dlisted, still = jnp.zeros_like(residuals.listed), jnp.zeros_like(rest.row_max)
        reference = still
        if dlogits is not None:
            dlisted, reference = entries.collected(dlogits), passes.mean_at_max(lambda c: c.dx)
        passes.moving(tangents._replace(reference=reference))
        dlog_z = passes.sum(lambda c: c.p * c.dz)

        def out(listed: Array, row_max: Row, log_z: Row, temperature: Row | None) -> LogProbs:
            of_rest = rest._replace(row_max=row_max, log_z=log_z)
            return log_probs(listed, residuals.counted, of_rest, temperature, self.axis, self.logit_softcap)

        # The reference is the tangent of m', which moves the rest. Here s' gets it, because the tangent of that
        # logit would be the reference divided by a slope, which may be 0.
        dlog_z += reference if temperature is None else reference / temperature
        if temperature is not None:
            dtemperature = jnp.zeros_like(temperature) + (0 if dtemperature is None else dtemperature)
        at, along = (residuals.listed, rest.row_max, rest.log_z), (dlisted, still, dlog_z)
        moved = jax.jvp(out, (*at, temperature), (*along, dtemperature))[1]
        if residuals.counted is not None:
            moved = self._marked(residuals, moved, 0)
        return {"log_probs": moved.listed, "log_rest": moved.rest}
