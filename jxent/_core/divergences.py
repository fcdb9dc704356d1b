"""Divergences between the distributions of two rows of logits, exactly, also where the two nearly agree.

With log p = z_p - log_z_p of the logits of P, z being (x - m) / temperature, and likewise for Q, let

    d[j] = z_q[j] - z_p[j]                         # without the rounding of either
    D    = log1p(sum of (exp z_q[j] - exp z_p[j]) / Z_p)      # = log Z_q - log Z_p
    u[j] = d[j] - D                                # = log q[j] - log p[j]

Two normalizers that nearly agree are never subtracted: only where D is large is it their difference. Then

    KL(P || Q) = sum of q[j] - p[j] - p[j] u[j]    # no term is negative: p (exp u - 1 - u)
    dKL/dx_q   = q[j] - p[j]
    dKL/dx_p   = p[j] (-u[j] - KL)

With M = beta P + (1 - beta) Q, a = log m - log p and b = log m - log q, neither of which takes a difference,

    JS         = sum of beta (m - p - p a) + (1 - beta) (m - q - q b)
    dJS/dx_p   = beta p[j] (-a[j] - KL(P || M)),   dJS/dx_q = (1 - beta) q[j] (-b[j] - KL(Q || M))

A gradient p[j] (s[j] - sum of p s) cancels where p[j] is near 1. So scores are taken relative to that of the class with
the largest logit, t, which has then a term of 0 in the sum: p[j] (v[j] - sum of p v), with v[j] = s[j] - s[t].

A class that both sides mask with -inf has no terms. One that Q alone masks makes KL(P || Q) infinite; its gradient is
that of the smallest q there is. Sums over the classes are passes (`passes`), in at least float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jxent._core import terms
from jxent._core.passes import Arrays, Passes, apart, given
from jxent._core.shards import largest


class Known(NamedTuple):
    """Row arrays; None for what is not known yet."""

    top_p: Array  # the largest logit
    top_q: Array
    log_z_p: Array | None = None  # log sum exp z
    log_z_q: Array | None = None
    log_z_ratio: Array | None = None  # log Z_q - log Z_p


class Residuals(NamedTuple):
    inputs: NamedTuple  # `costs.CostInputs`, whose labels are the logits of P
    known: Known


class Rows(NamedTuple):
    """What a term takes besides the logits of Q. Row arrays, but for those of `logits_p` and `distance`."""

    logits_p: Array
    known: Known
    top_distance: tuple[Array, Array]  # a quarter of top_q - top_p, and what rounding takes off it
    temperature: Array | None  # None for 1
    distance: Array | None = None  # d, if it is kept


@dataclass(frozen=True)
class Pair:
    """One class of every position, of P and of Q; for a sum over the classes, see `passes`."""

    logits_q: Array
    rows: Rows
    unit: Array

    def cooled(self, z: Array) -> Array:
        """z / temperature."""
        return z if self.rows.temperature is None else z / self.rows.temperature

    def _z(self, logits: Array, top: Array) -> Array:
        """(x - m) / temperature, and the least finite number where that is -inf, as it is for a masked class."""
        z = terms.rounded_if_few(logits.astype(self.unit.dtype), self.unit) - top
        return terms.bounded_ratio(z, self.rows.temperature, terms.most(self.unit), self.unit, above=False)

    @cached_property
    def z_p(self) -> Array:
        return self._z(self.rows.logits_p, self.rows.known.top_p)

    @cached_property
    def z_q(self) -> Array:
        return self._z(self.logits_q, self.rows.known.top_q)

    @property
    def held_p(self) -> Array:
        """z_p, but 0 for a masked class: derivatives of a product with its gradient, which is 0, stay finite."""
        return self.z_p * terms.present(self.rows.logits_p, self.unit)

    @property
    def held_q(self) -> Array:
        return self.z_q * terms.present(self.logits_q, self.unit)

    @cached_property
    def quarter(self) -> Array:
        """d / 4, bounded: no sum or difference of a few of these overflows, however large the logits are."""
        p, q = (terms.quarter(logits, self.unit) for logits in (self.rows.logits_p, self.logits_q))
        top, lost_by_top = self.rows.top_distance
        d = ((q - p) - top) + (terms.lost_by_difference(q, p) - lost_by_top)
        return terms.bounded_ratio(d, self.rows.temperature, terms.most(self.unit) / 4, self.unit)

    @cached_property
    def distance(self) -> Array:
        """d."""
        return 4 * self.unit * self.quarter if self.rows.distance is None else self.rows.distance

    @cached_property
    def lost(self) -> Array:
        """1 where Q masks a class that P has, and 0 elsewhere."""
        return terms.present(self.rows.logits_p, self.unit) * (self.unit - terms.present(self.logits_q, self.unit))

    @property
    def impossible(self) -> Array:
        """1 where z_q is -inf, because Q masks the class or has it that far below the others, and 0 elsewhere."""
        z_q = self.cooled(self.logits_q.astype(self.unit.dtype) - self.rows.known.top_q)
        return self.unit - terms.present(z_q, self.unit)

    @cached_property
    def mild_quarter(self) -> Array:
        """d / 4, but for a lost class that of the logarithm of the smallest number."""
        least = math.log(float(jnp.finfo(self.unit.dtype).tiny)) / 4 * self.unit
        return self.quarter * (self.unit - self.lost) + least * self.lost

    @cached_property
    def mild_distance(self) -> Array:
        """d, but for a lost class the logarithm of the smallest number."""
        least = math.log(float(jnp.finfo(self.unit.dtype).tiny)) * self.unit
        return self.distance * (self.unit - self.lost) + least * self.lost

    @cached_property
    def difference_of_exponentials(self) -> Array:
        """exp z_q - exp z_p."""
        return terms.difference(self.z_p, self.z_q, self.distance, self.unit)

    @cached_property
    def log_p(self) -> Array:
        return self.z_p - given(self.rows.known.log_z_p)

    @cached_property
    def log_q(self) -> Array:
        return self.z_q - given(self.rows.known.log_z_q)

    @cached_property
    def p(self) -> Array:
        return jnp.exp(self.log_p)

    @cached_property
    def q(self) -> Array:
        return jnp.exp(self.log_q)

    @cached_property
    def log_ratio(self) -> Array:
        """u = log q - log p."""
        return self.distance - given(self.rows.known.log_z_ratio)

    @cached_property
    def top_of_p(self) -> Array:
        """1 at the largest logit of P, and 0 below it, where its p is above 2/3. By z, which is divided already."""
        return self.unit - lax.stop_gradient(terms.below_top(self.z_p, 0 * self.unit, self.unit))

    @cached_property
    def top_of_q(self) -> Array:
        return self.unit - lax.stop_gradient(terms.below_top(self.z_q, 0 * self.unit, self.unit))


# --- the divergences --------------------------------------------------------------------------------------------------


class Divergence:
    """A divergence; `Pair` is one class. Instances are static: equal if they mean the same."""

    steepness = 16  # see `costs.Cost`
    keeps_distance = False  # whether passes read d from memory, because XLA:CPU fuses no more than 100 operations

    def summands(self) -> tuple[Callable[[Pair], Array], ...]:
        """What a class adds to the divergence, each summand by a pass of its own."""
        raise NotImplementedError

    def prepare(self, mean) -> tuple:
        """What the gradients take besides a class; `mean` is `_relative_mean`."""
        raise NotImplementedError

    def to_p(self, c: Pair, rows) -> Array:
        """The gradient by z_p."""
        raise NotImplementedError

    def to_q(self, c: Pair, rows) -> Array:
        raise NotImplementedError


@dataclass(frozen=True)
class KullbackLeibler(Divergence):
    """KL(P || Q)."""

    def summands(self):
        return self._excess, self._beyond

    def _excess(self, c: Pair):
        return terms.excess(c.log_p, c.log_ratio, c.unit)

    def _beyond(self, c: Pair):
        # Twice the largest number makes infinite what is not 0, and leaves 0 as it is.
        largest = c.impossible * terms.most(c.unit)
        return terms.excess_beyond(c.log_q, c.log_ratio, c.unit) + c.p * largest * largest

    def prepare(self, mean):
        return (mean(lambda c: c.p, lambda c: c.top_of_p, lambda c: c.mild_quarter, self._relative),)

    def _relative(self, c: Pair, quarter):
        """A quarter of -u[j] less that of a class with this d / 4.

        Bounded where P is 0 beside Q, so that products with derivatives are finite.
        """
        return quarter - jnp.minimum(c.mild_quarter, math.sqrt(float(jnp.finfo(c.unit.dtype).max)) * c.unit)

    def to_p(self, c, rows):
        ((quarter, mean),) = rows
        return c.p * (self._relative(c, quarter) - mean) * (4 * c.unit)

    def to_q(self, c, rows):
        return terms.difference(c.log_p, c.log_q, c.log_ratio, c.unit)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """beta KL(P || M) + (1 - beta) KL(Q || M), with M = beta P + (1 - beta) Q."""

    beta: float
    keeps_distance = True

    def summands(self):
        return self._excess_of_p, self._excess_of_q, self._beyond

    def _mixed(self, c: Pair):
        """(log m, log m - log p, log m - log q)."""
        return terms.mixed(c.log_p, c.log_q, c.log_ratio, self.beta, c.unit)

    def _excess_of_p(self, c: Pair):
        return self.beta * c.unit * terms.excess(c.log_p, self._mixed(c)[1], c.unit)

    def _excess_of_q(self, c: Pair):
        return (1 - self.beta) * c.unit * terms.excess(c.log_q, self._mixed(c)[2], c.unit)

    def _beyond(self, c: Pair):
        log_m, a, b = self._mixed(c)
        of_p, of_q = (terms.excess_beyond(log_m, u, c.unit) for u in (a, b))
        return self.beta * c.unit * of_p + (1 - self.beta) * c.unit * of_q

    # The scores are -a = -log(beta + (1 - beta) exp(u)) and -b = -log(1 - beta + beta exp(-u)).

    def prepare(self, mean):
        of_p = mean(lambda c: c.p, lambda c: c.top_of_p, lambda c: c.mild_distance, self._relative_p)
        return of_p, mean(lambda c: c.q, lambda c: c.top_of_q, lambda c: c.mild_distance, self._relative_q)

    def _relative_p(self, c: Pair, distance):
        u, u_of_top = (d - given(c.rows.known.log_z_ratio) for d in (c.mild_distance, distance))
        return terms.log_mixed_step(u, u_of_top, distance - c.mild_distance, (1 - self.beta, self.beta), c.unit)

    def _relative_q(self, c: Pair, distance):
        u, u_of_top = (d - given(c.rows.known.log_z_ratio) for d in (c.mild_distance, distance))
        return terms.log_mixed_step(-u, -u_of_top, c.mild_distance - distance, (self.beta, 1 - self.beta), c.unit)

    def to_p(self, c, rows):
        distance, mean = rows[0]
        return self.beta * c.unit * c.p * (self._relative_p(c, distance) - mean)

    def to_q(self, c, rows):
        distance, mean = rows[1]
        return (1 - self.beta) * c.unit * c.q * (self._relative_q(c, distance) - mean)


# --- values, gradients and tangents -----------------------------------------------------------------------------------


def forward(form, inputs):
    """(the divergence of each position, a row array; `Residuals`)."""
    dtype, axis, axis_name = inputs.dtype, form.axis, form.shards.axis_name

    def top_of(logits):
        initial = -jnp.inf if 0 in logits.shape else None
        top = largest(lax.stop_gradient(jnp.max(logits, axis, keepdims=True, initial=initial)), axis_name)
        # No class at all: NaN. For Q it may be what P has not, either.
        return jnp.where(top == -jnp.inf, jnp.nan, top.astype(dtype))

    passes = _passes(form, inputs, None)
    known = Known(apart(top_of(inputs.labels)), apart(top_of(inputs.logits)))
    rows = _with_distance(form, passes, _rows(Residuals(inputs, known)))
    log_z_p = jnp.log(_sum(passes, lambda c: jnp.exp(c.z_p), rows))
    log_z_q = jnp.log(_sum(passes, lambda c: jnp.exp(c.z_q), rows))
    difference = _sum(passes, lambda c: c.difference_of_exponentials, rows)
    far = jnp.abs(log_z_q - log_z_p) > 1
    near_ratio = jnp.log1p(jnp.where(far, 0, difference * jnp.exp(-log_z_p)))
    known = known._replace(log_z_p=log_z_p, log_z_q=log_z_q, log_z_ratio=jnp.where(far, log_z_q - log_z_p, near_ratio))
    summed = [_sum(passes, summand, rows._replace(known=known)) for summand in form.divergence.summands()]
    return sum(summed[1:], summed[0]), Residuals(inputs, known)


def backward(form, residuals, cotangent):
    """The gradients by the logits of Q, those of P, and the temperature, each at every class of every position."""
    inputs = residuals.inputs
    passes = _passes(form, inputs, cotangent)
    rows = _with_distance(form, passes, _rows(residuals))
    prepared = form.divergence.prepare(partial(_relative_mean, passes, rows))

    def gradients(c, rows, prepared, cotangent):
        pair = Pair(c.arrays.logits, rows, c.unit)
        to_p, to_q = (cotangent * to(pair, prepared) for to in (form.divergence.to_p, form.divergence.to_q))
        # The products before their quotient: it is 0 where the gradient is, whatever z is.
        to_temperature = None if rows.temperature is None else -pair.cooled(to_p * pair.held_p + to_q * pair.held_q)
        return pair.cooled(to_q), pair.cooled(to_p), to_temperature

    return passes.map(gradients, rows, prepared, cotangent)


def tangent(form, residuals, moving):
    """The tangent of the divergence of each position."""
    inputs = residuals.inputs
    passes = _passes(form, inputs, residuals.known.log_z_q)
    rows = _with_distance(form, passes, _rows(residuals))
    prepared = form.divergence.prepare(partial(_relative_mean, passes, rows))

    def term(c, rows, prepared, dlogits_p, dlogits_q, dtemperature):
        pair = Pair(c.arrays.logits, rows, c.unit)
        sides = (form.divergence.to_p, pair.held_p, dlogits_p), (form.divergence.to_q, pair.held_q, dlogits_q)
        parts = [0 * c.unit]
        for gradient, z, dlogits in sides:
            if dlogits is not None:
                parts.append(gradient(pair, prepared) * pair.cooled(dlogits.astype(c.unit.dtype)))
            if dtemperature is not None:
                parts.append(-pair.cooled(gradient(pair, prepared) * z * dtemperature))
        return sum(parts[1:], parts[0])

    dtemperature = None if moving.temperature is None else _as_row(moving.temperature, inputs)
    return passes.sum(term, rows, prepared, moving.labels, moving.logits, dtemperature)


def _passes(form, inputs, previous):
    arrays = Arrays(inputs.logits)
    return Passes(arrays, (form.axis,), inputs.dtype, axis_name=form.shards.axis_name, previous=previous)


def _as_row(number, inputs):
    return number.astype(inputs.dtype).reshape((1,) * inputs.logits.ndim)


def _rows(residuals):
    inputs, known = residuals
    top_p, top_q = known.top_p / 4, known.top_q / 4
    top_distance = top_q - top_p, terms.lost_by_difference(top_q, top_p)
    temperature = None if inputs.temperature is None else _as_row(inputs.temperature, inputs)
    return Rows(inputs.labels, known, top_distance, temperature)


def _with_distance(form, passes, rows):
    """The rows with d, if the divergence keeps it."""
    if not form.divergence.keeps_distance:
        return rows
    return rows._replace(distance=passes.map(lambda c, rows: Pair(c.arrays.logits, rows, c.unit).distance, rows))


def _sum(passes, term, rows):
    """The sum over the classes of ``term(pair)``."""
    return passes.sum(lambda c, rows: term(Pair(c.arrays.logits, rows, c.unit)), rows)


def _relative_mean(passes, rows, weight, at_top, distance_of, relative):
    """(the distance at the largest logit, the mean of the scores relative to that there), row arrays.

    The mean is one by the probabilities `weight`. Of several largest logits the distance is their mean, of which no sum
    overflows.
    """

    def share_of_top(c, rows, share):
        pair = Pair(c.arrays.logits, rows, c.unit)
        return at_top(pair) * share * distance_of(pair)

    def term(c, rows, distance):
        pair = Pair(c.arrays.logits, rows, c.unit)
        return weight(pair) * relative(pair, distance)

    distance = passes.sum(share_of_top, rows, 1 / _sum(passes, at_top, rows))
    return distance, passes.sum(term, rows, distance)
