"""`Pair`: one class of two distributions P and Q, from which the terms of a divergence are made.

`jxent._objective.divergence` explains the notation. All values are in at least float32.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jxent._rows import terms
from jxent._rows.passes import Logits, Row, known


class OfRow(NamedTuple):
    """Row arrays (see `passes`); None for those that are not known yet."""

    row_max_p: Row  # the largest logit
    row_max_q: Row
    log_z_p: Row | None = None  # log sum exp z
    log_z_q: Row | None = None
    log_z_ratio: Row | None = None  # log Z_q - log Z_p


class PairRows(NamedTuple):
    """The arrays that a term takes besides the logits of Q. All except `logits_p` and `distance` are row arrays."""

    logits_p: Logits
    of_row: OfRow
    row_max_distance: tuple[Row, Row]  # (row_max_q - row_max_p) / 4, and its rounding error
    temperature: Row | None  # None for 1
    distance: Array | None = None  # d, if it is kept


@dataclass(frozen=True)
class Pair:
    """One class of every position, of P and of Q; for a sum over the classes, see `passes`."""

    logits_q: Logits
    rows: PairRows
    one: Array  # 1, from which a term makes its constants

    def cooled(self, z: Array) -> Array:
        """z / temperature."""
        return z if self.rows.temperature is None else z / self.rows.temperature

    def _z(self, logits: Array, row_max: Array) -> Array:
        """(x - m) / temperature. Where that is -inf, as for a masked class, the least finite number replaces it."""
        z = terms.rounded_if_few(logits.astype(self.one.dtype), self.one) - row_max
        return terms.bounded_ratio(z, self.rows.temperature, terms.most(self.one), self.one, above=False)

    @cached_property
    def z_p(self) -> Array:
        return self._z(self.rows.logits_p, self.rows.of_row.row_max_p)

    @cached_property
    def z_q(self) -> Array:
        return self._z(self.logits_q, self.rows.of_row.row_max_q)

    @property
    def held_p(self) -> Array:
        """z_p, except 0 for a masked class. Its gradient is 0, and derivatives of z times the gradient stay finite."""
        return self.z_p * terms.present(self.rows.logits_p, self.one)

    @property
    def held_q(self) -> Array:
        return self.z_q * terms.present(self.logits_q, self.one)

    @cached_property
    def quarter(self) -> Array:
        """d / 4, bounded so that no sum or difference of a few of these overflows, even for the largest logits."""
        p, q = (terms.quarter(logits, self.one) for logits in (self.rows.logits_p, self.logits_q))
        row_max, lost_by_top = self.rows.row_max_distance
        d = ((q - p) - row_max) + (terms.lost_by_difference(q, p) - lost_by_top)
        return terms.bounded_ratio(d, self.rows.temperature, terms.most(self.one) / 4, self.one)

    @cached_property
    def distance(self) -> Array:
        """d."""
        return 4 * self.one * self.quarter if self.rows.distance is None else self.rows.distance

    @cached_property
    def lost(self) -> Array:
        """1 where Q masks a class that P has, and 0 elsewhere."""
        return terms.present(self.rows.logits_p, self.one) * (self.one - terms.present(self.logits_q, self.one))

    @property
    def impossible(self) -> Array:
        """1 where z_q is -inf, because Q masks the class or its logit is too far below the largest; 0 elsewhere."""
        z_q = self.cooled(self.logits_q.astype(self.one.dtype) - self.rows.of_row.row_max_q)
        return self.one - terms.present(z_q, self.one)

    @cached_property
    def mild_quarter(self) -> Array:
        """d / 4, except for a lost class: there log(the smallest normal number) / 4."""
        least = math.log(float(jnp.finfo(self.one.dtype).tiny)) / 4 * self.one
        return self.quarter * (self.one - self.lost) + least * self.lost

    @cached_property
    def mild_distance(self) -> Array:
        """d, except for a lost class: there log(the smallest normal number)."""
        least = math.log(float(jnp.finfo(self.one.dtype).tiny)) * self.one
        return self.distance * (self.one - self.lost) + least * self.lost

    @cached_property
    def difference_of_exponentials(self) -> Array:
        """exp z_q - exp z_p."""
        return terms.difference(self.z_p, self.z_q, self.distance, self.one)

    @cached_property
    def log_p(self) -> Array:
        return self.z_p - known(self.rows.of_row.log_z_p)

    @cached_property
    def log_q(self) -> Array:
        return self.z_q - known(self.rows.of_row.log_z_q)

    @cached_property
    def p(self) -> Array:
        return jnp.exp(self.log_p)

    @cached_property
    def q(self) -> Array:
        return jnp.exp(self.log_q)

    @cached_property
    def log_ratio(self) -> Array:
        """u = log q - log p."""
        return self.distance - known(self.rows.of_row.log_z_ratio)

    @cached_property
    def sign(self) -> Array:
        """The sign of q - p, a constant."""
        return lax.stop_gradient(terms.sign(self.log_ratio, self.one))

    @cached_property
    def top_of_p(self) -> Array:
        """If P's largest logit has p above 2/3: 1 at that logit, and 0 elsewhere.

        `terms.below_top` gets z instead of the logits, because z is already divided by the temperature.
        """
        return self.one - lax.stop_gradient(terms.below_top(self.z_p, 0 * self.one, self.one))

    @cached_property
    def top_of_q(self) -> Array:
        return self.one - lax.stop_gradient(terms.below_top(self.z_q, 0 * self.one, self.one))
