"""Divergences between the distributions of two rows of logits, accurate even if the two distributions nearly agree.

For the logits of P let log p = z_p - log_z_p, with z_p = (x - m) / temperature, and likewise for Q. Let

    d[j] = z_q[j] - z_p[j]                         # with the rounding errors corrected
    D    = log1p(sum of (exp z_q[j] - exp z_p[j]) / Z_p)      # = log Z_q - log Z_p
    u[j] = d[j] - D                                # = log q[j] - log p[j]

If |D| > 1, it is the difference of the two log-normalizers. Log-normalizers that nearly agree are never subtracted.
With these,

    KL(P || Q) = sum of q[j] - p[j] - p[j] u[j]    # no term is negative: p (exp u - 1 - u)
    dKL/dx_q   = q[j] - p[j]
    dKL/dx_p   = p[j] (-u[j] - KL)

With M = beta P + (1 - beta) Q, a = log m - log p and b = log m - log q, both computed from u (`terms.mixed`),

    JS         = sum of beta (m - p - p a) + (1 - beta) (m - q - q b)
    dJS/dx_p   = beta p[j] (-a[j] - KL(P || M)),   dJS/dx_q = (1 - beta) q[j] (-b[j] - KL(Q || M))

A gradient p[j] (s[j] - sum of p s), with scores s, cancels if p[j] is near 1. So the code subtracts the score of the
class t with the largest logit, and takes p[j] (v[j] - sum of p v) with v[j] = s[j] - s[t]. Class t adds 0 to the sum.

The total variation distance needs no class t. Its terms are |q - p| / 2, and its scores are half of the sign of p - q,
which is 0 at a tie. Let P+ be the sum of p (1 + sign) / 2 and P- that of p (1 - sign) / 2, and likewise for Q. Then

    dTV/dx_p   = p[j] ((1 + sign) P- - (1 - sign) P+) / 2,   dTV/dx_q = q[j] ((1 - sign) Q+ - (1 + sign) Q-) / 2

P+ and P- add up to 1, and neither is computed from the other. So an element where p and q differ is exact.

A class that both sides mask with -inf has no terms. A class that Q alone masks makes KL(P || Q) infinite; its gradient
is the one for the smallest q in floating point. Sums over the classes are passes (`passes`), in at least float32.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool

from jxent._backend.backend import RowMode
from jxent._backend.fusion import unfused
from jxent._core.reports import report_values
from jxent._core.shards import Shards, largest
from jxent._objective.objective import Costs, Objective, RowInputs, as_row, temperature_row
from jxent._rows import terms
from jxent._rows.pair import OfRow, Pair, PairRows
from jxent._rows.passes import Arrays, Class, Logits, Passes, Row, known

# --- the divergences --------------------------------------------------------------------------------------------------


class RelativeMean(NamedTuple):
    """Scores relative to that of the class with the largest logit. Row arrays."""

    at_top: Row  # the distance of that class; the mean distance if several logits are largest
    mean: Row  # the mean of the relative scores


class Balance(NamedTuple):
    """How much of one side's probability lies in two sets of classes; half of that of a tie is in each. Row arrays."""

    more_p: Row  # in the classes where p is above q
    more_q: Row


class Sums(NamedTuple):
    """The sums over the classes that `Divergence.prepare` may take. They are made by passes, one after the other."""

    total: Callable[[Callable[[Pair], Array]], Row]
    """``total(term)`` is the sum of ``term(pair)``."""

    relative_mean: Callable[..., RelativeMean]
    """``relative_mean(weight, at_top, distance, relative)`` is a mean with the probabilities `weight`.

    `at_top` is 1 for the class with the largest logit. ``relative(pair, distance)`` is the score of a class minus the
    score of a class with this distance.
    """


class Divergence(abc.ABC):
    """A divergence between two distributions, as terms of one class, a `Pair`.

    An implementor is a frozen, hashable dataclass. Its summands are never negative, so that nothing cancels in their
    sum. The gradients are by z of each side, and may assume that all normalizers are known.
    """

    largest_gradient: ClassVar[float] = 16
    """See `Cost.largest_gradient`."""

    keeps_distance: ClassVar[bool] = False
    """Whether passes read d from memory. XLA:CPU fuses at most 100 operations, and some terms with d have more."""

    @abc.abstractmethod
    def summands(self) -> tuple[Callable[[Pair], Array], ...]:
        """The terms that a class adds to the divergence. Each is summed by a separate pass."""

    @abc.abstractmethod
    def prepare(self, sums: Sums) -> tuple[Any, ...]:
        """The row arrays that the gradients take besides a class, as NamedTuples."""

    @abc.abstractmethod
    def to_p(self, c: Pair, prepared: tuple[Any, ...]) -> Array:
        """The gradient by z_p, from what `prepare` returned."""

    @abc.abstractmethod
    def to_q(self, c: Pair, prepared: tuple[Any, ...]) -> Array:
        """The gradient by z_q."""


@dataclass(frozen=True)
class KullbackLeibler(Divergence):
    """KL(P || Q)."""

    def summands(self) -> tuple[Callable[[Pair], Array], ...]:
        return self._excess, self._beyond

    def _excess(self, c: Pair) -> Array:
        return terms.excess(c.log_p, c.log_ratio, c.one)

    def _beyond(self, c: Pair) -> Array:
        # Two factors of the largest finite number make any p except 0 infinite, and leave 0 as it is.
        largest = c.impossible * terms.most(c.one)
        return terms.excess_beyond(c.log_q, c.log_ratio, c.one) + c.p * largest * largest

    def prepare(self, sums: Sums) -> tuple[RelativeMean, ...]:
        mean = sums.relative_mean
        return (mean(lambda c: c.p, lambda c: c.top_of_p, lambda c: c.mild_quarter, self._relative),)

    def _relative(self, c: Pair, quarter: Array) -> Array:
        """-u[j] / 4 minus the -u / 4 of a class whose d / 4 is `quarter`.

        A bound keeps products with derivatives finite for classes where p is negligible compared with q.
        """
        return quarter - jnp.minimum(c.mild_quarter, math.sqrt(float(jnp.finfo(c.one.dtype).max)) * c.one)

    def to_p(self, c: Pair, prepared: tuple[RelativeMean, ...]) -> Array:
        (scores,) = prepared
        return c.p * (self._relative(c, scores.at_top) - scores.mean) * (4 * c.one)

    def to_q(self, c: Pair, prepared: tuple[RelativeMean, ...]) -> Array:
        return terms.difference(c.log_p, c.log_q, c.log_ratio, c.one)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """beta KL(P || M) + (1 - beta) KL(Q || M), with M = beta P + (1 - beta) Q."""

    beta: float
    keeps_distance = True

    def summands(self) -> tuple[Callable[[Pair], Array], ...]:
        return self._excess_of_p, self._excess_of_q, self._beyond

    def _mixed(self, c: Pair) -> tuple[Array, Array, Array]:
        """(log m, log m - log p, log m - log q)."""
        return terms.mixed(c.log_p, c.log_q, c.log_ratio, self.beta, c.one)

    def _excess_of_p(self, c: Pair) -> Array:
        return self.beta * c.one * terms.excess(c.log_p, self._mixed(c)[1], c.one)

    def _excess_of_q(self, c: Pair) -> Array:
        return (1 - self.beta) * c.one * terms.excess(c.log_q, self._mixed(c)[2], c.one)

    def _beyond(self, c: Pair) -> Array:
        log_m, a, b = self._mixed(c)
        of_p, of_q = (terms.excess_beyond(log_m, u, c.one) for u in (a, b))
        return self.beta * c.one * of_p + (1 - self.beta) * c.one * of_q

    # The scores are -a = -log(beta + (1 - beta) exp(u)) and -b = -log(1 - beta + beta exp(-u)).

    def prepare(self, sums: Sums) -> tuple[RelativeMean, ...]:
        mean = sums.relative_mean
        of_p = mean(lambda c: c.p, lambda c: c.top_of_p, lambda c: c.mild_distance, self._relative_p)
        return of_p, mean(lambda c: c.q, lambda c: c.top_of_q, lambda c: c.mild_distance, self._relative_q)

    def _relative_p(self, c: Pair, distance: Array) -> Array:
        u, u_of_top = (d - known(c.rows.of_row.log_z_ratio) for d in (c.mild_distance, distance))
        return terms.log_mixed_step(u, u_of_top, distance - c.mild_distance, (1 - self.beta, self.beta), c.one)

    def _relative_q(self, c: Pair, distance: Array) -> Array:
        u, u_of_top = (d - known(c.rows.of_row.log_z_ratio) for d in (c.mild_distance, distance))
        return terms.log_mixed_step(-u, -u_of_top, c.mild_distance - distance, (self.beta, 1 - self.beta), c.one)

    def to_p(self, c: Pair, prepared: tuple[RelativeMean, ...]) -> Array:
        scores, _ = prepared
        return self.beta * c.one * c.p * (self._relative_p(c, scores.at_top) - scores.mean)

    def to_q(self, c: Pair, prepared: tuple[RelativeMean, ...]) -> Array:
        _, scores = prepared
        return (1 - self.beta) * c.one * c.q * (self._relative_q(c, scores.at_top) - scores.mean)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """The sum of |q - p| / 2. The derivative of |q - p| is 0 at a tie, and its second derivative is 0 everywhere."""

    largest_gradient = 1

    def summands(self) -> tuple[Callable[[Pair], Array], ...]:
        return (self._half_difference,)

    def _half_difference(self, c: Pair) -> Array:
        return c.one / 2 * jnp.abs(terms.difference(c.log_p, c.log_q, c.log_ratio, c.one))

    def prepare(self, sums: Sums) -> tuple[Balance, ...]:
        of_p = Balance(
            more_p=sums.total(lambda c: c.p * self._more_p(c)), more_q=sums.total(lambda c: c.p * self._more_q(c))
        )
        of_q = Balance(
            more_p=sums.total(lambda c: c.q * self._more_p(c)), more_q=sums.total(lambda c: c.q * self._more_q(c))
        )
        return of_p, of_q

    def _more_p(self, c: Pair) -> Array:
        """1 where p is above q, 1/2 where they are equal, and 0 elsewhere."""
        return c.one / 2 * (c.one - c.sign)

    def _more_q(self, c: Pair) -> Array:
        return c.one / 2 * (c.one + c.sign)

    def to_p(self, c: Pair, prepared: tuple[Balance, ...]) -> Array:
        of_p, _ = prepared
        return c.p * (self._more_p(c) * of_p.more_q - self._more_q(c) * of_p.more_p)

    def to_q(self, c: Pair, prepared: tuple[Balance, ...]) -> Array:
        _, of_q = prepared
        return c.q * (self._more_q(c) * of_q.more_p - self._more_p(c) * of_q.more_q)


# --- the objective ----------------------------------------------------------------------------------------------------


class Residuals(NamedTuple):
    inputs: RowInputs
    of_row: OfRow


@dataclass(frozen=True, kw_only=True)
class DivergenceObjective(Objective):
    """The divergence from P to Q. In the inputs, P has `logits_p` and Q has `logits`."""

    axis: int
    shards: Shards
    divergence: Divergence

    temperature_gradient_is_a_share = True

    @property
    def names(self) -> tuple[str, ...]:
        return ("divergence",)

    def largest_gradient(self, name: str) -> float:
        return self.divergence.largest_gradient

    def forward(self, inputs: RowInputs, mode: RowMode) -> tuple[tuple[Costs, None], Residuals]:
        dtype, axis, axis_name = inputs.dtype, self.axis, self.shards.axis_name

        def top_of(logits: Logits) -> Row:
            initial = -jnp.inf if 0 in logits.shape else None
            row_max = largest(lax.stop_gradient(jnp.max(logits, axis, keepdims=True, initial=initial)), axis_name)
            # If P or Q masks all its classes, the divergence is NaN.
            return jnp.where(row_max == -jnp.inf, jnp.nan, row_max.astype(dtype))

        passes = self._passes(inputs, None)
        row_max_p, row_max_q = unfused(top_of(known(inputs.logits_p))), unfused(top_of(known(inputs.logits)))
        of_row = OfRow(row_max_p=row_max_p, row_max_q=row_max_q)
        rows = self._rows(passes, Residuals(inputs=inputs, of_row=of_row))
        log_z_p = jnp.log(_sum(passes, lambda c: jnp.exp(c.z_p), rows))
        log_z_q = jnp.log(_sum(passes, lambda c: jnp.exp(c.z_q), rows))
        difference = _sum(passes, lambda c: c.difference_of_exponentials, rows)
        far = jnp.abs(log_z_q - log_z_p) > 1
        near_ratio = jnp.log1p(jnp.where(far, 0, difference * jnp.exp(-log_z_p)))
        log_z_ratio = jnp.where(far, log_z_q - log_z_p, near_ratio)
        of_row = of_row._replace(log_z_p=log_z_p, log_z_q=log_z_q, log_z_ratio=log_z_ratio)
        summed = [_sum(passes, summand, rows._replace(of_row=of_row)) for summand in self.divergence.summands()]
        return ({"divergence": sum(summed[1:], summed[0])}, None), Residuals(inputs=inputs, of_row=of_row)

    def backward(self, residuals: Residuals, cotangents: Costs) -> RowInputs:
        inputs, cotangent = residuals.inputs, cotangents["divergence"]
        passes = self._passes(inputs, cotangent)
        rows = self._rows(passes, residuals)
        prepared = self.divergence.prepare(_sums(passes, rows))

        def gradients(
            c: Class, rows: PairRows, prepared: tuple[Any, ...], cotangent: Row
        ) -> tuple[Array, Array, Array | None]:
            pair = Pair(known(c.arrays.logits), rows, c.one)
            to_p, to_q = (cotangent * to(pair, prepared) for to in (self.divergence.to_p, self.divergence.to_q))
            # Multiply before the division by the temperature. A gradient of 0 then gives 0 for any z.
            to_temperature = None if rows.temperature is None else -pair.cooled(to_p * pair.held_p + to_q * pair.held_q)
            return pair.cooled(to_q), pair.cooled(to_p), to_temperature

        to_q, to_p, to_temperature = passes.map(gradients, rows, prepared, cotangent)
        return self.summed(inputs, RowInputs(logits=to_q, logits_p=to_p, temperature=to_temperature))

    def tangent(self, residuals: Residuals, moving: RowInputs) -> Costs:
        inputs = residuals.inputs
        passes = self._passes(inputs, residuals.of_row.log_z_q)
        rows = self._rows(passes, residuals)
        prepared = self.divergence.prepare(_sums(passes, rows))

        def term(
            c: Class,
            rows: PairRows,
            prepared: tuple[Any, ...],
            dlogits_p: Logits | None,
            dlogits_q: Logits | None,
            dtemperature: Row | None,
        ) -> Array:
            pair = Pair(known(c.arrays.logits), rows, c.one)
            sides = (
                (self.divergence.to_p, pair.held_p, dlogits_p),
                (self.divergence.to_q, pair.held_q, dlogits_q),
            )
            parts = [0 * c.one]
            for gradient, z, dlogits in sides:
                if dlogits is not None:
                    parts.append(gradient(pair, prepared) * pair.cooled(dlogits.astype(c.one.dtype)))
                if dtemperature is not None:
                    parts.append(-pair.cooled(gradient(pair, prepared) * z * dtemperature))
            return sum(parts[1:], parts[0])

        dtemperature = as_row(moving.temperature, inputs)
        return {"divergence": passes.sum(term, rows, prepared, moving.logits_p, moving.logits, dtemperature)}

    def reported(
        self, function: str, argument: str, mask: Bool[Array, "*positions"] | None, inputs: RowInputs
    ) -> RowInputs:
        row_mask, logits_p = None if mask is None else jnp.expand_dims(mask, self.axis), known(inputs.logits_p)
        for name, array in (("logits_p", logits_p), (argument, inputs.logits)):
            logits_p = report_values(function, row_mask, logits_p, masked=(name,), **{name: array})
        return inputs.replace(logits_p=logits_p)

    def _passes(self, inputs: RowInputs, previous: Row | None) -> Passes:
        arrays, axis_name = Arrays(logits=inputs.logits), self.shards.axis_name
        return Passes(arrays=arrays, axis=(self.axis,), dtype=inputs.dtype, axis_name=axis_name, previous=previous)

    def _rows(self, passes: Passes, residuals: Residuals) -> PairRows:
        inputs, of_row = residuals
        row_max_p, row_max_q = of_row.row_max_p / 4, of_row.row_max_q / 4
        rows = PairRows(
            logits_p=known(inputs.logits_p),
            of_row=of_row,
            row_max_distance=(row_max_q - row_max_p, terms.lost_by_difference(row_max_q, row_max_p)),
            temperature=temperature_row(inputs),
        )
        if not self.divergence.keeps_distance:
            return rows
        kept = passes.map(lambda c, rows: Pair(known(c.arrays.logits), rows, c.one).distance, rows)
        return rows._replace(distance=kept)


def _sum(passes: Passes, term: Callable[[Pair], Array], rows: PairRows) -> Row:
    """The sum over the classes of ``term(pair)``."""
    return passes.sum(lambda c, rows: term(Pair(known(c.arrays.logits), rows, c.one)), rows)


def _sums(passes: Passes, rows: PairRows) -> Sums:
    return Sums(
        total=lambda term: _sum(passes, term, rows),
        relative_mean=partial(_relative_mean, passes, rows),
    )


def _relative_mean(
    passes: Passes,
    rows: PairRows,
    weight: Callable[[Pair], Array],
    at_top: Callable[[Pair], Array],
    distance_of: Callable[[Pair], Array],
    relative: Callable[[Pair, Array], Array],
) -> RelativeMean:
    """See `Sums`."""

    def share_of_top(c: Class, rows: PairRows, share: Row) -> Array:
        pair = Pair(known(c.arrays.logits), rows, c.one)
        return at_top(pair) * share * distance_of(pair)

    def term(c: Class, rows: PairRows, distance: Row) -> Array:
        pair = Pair(known(c.arrays.logits), rows, c.one)
        return weight(pair) * relative(pair, distance)

    distance = passes.sum(share_of_top, rows, 1 / _sum(passes, at_top, rows))
    return RelativeMean(at_top=distance, mean=passes.sum(term, rows, distance))
