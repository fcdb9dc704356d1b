"""The costs of a position, with exact gradients. This file has the costs that do not depend on the kind of label.

The loss of a position is a sum of costs times coefficients. With log p = (x - m) - log_z (`normalizer`) the costs are

    label     -log p[t], or the cost of a target, the label's probabilities (`targets`, `jxent._labels`)
    uniform   the cost of the target with shares w[j] / n for the n classes that are not masked, for label smoothing
    z         (m + log_z)**2, for the z-loss

Each cost is a Python class with a value, a gradient and a tangent. Dictionaries hold costs by name.

The statistics that have gradients are costs too. No coefficient multiplies them, and no loss contains them:

    log_prob         log p[t]; for class probabilities, the sum of q[j] log p[j]
    log_normalizer   m + log_z
    entropy          the sum of p[j] (-log p[j])

A temperature T divides x - m, so its gradient is -1 / T times the sum of z[j] (gradient by z[j]). Only the normalizer
does not depend on x - m alone. Its sum is that of p[j] (z[j] + m / T).

A cost takes no coefficient. Weights, smoothing and the mean's denominator are plain JAX outside of the rule, and have
their true gradients. In the forward pass a cost writes no array of the logits' size. The backward pass writes the
gradient by the logits. Each gradient by class weights or by probability labels may write one more array of that size.
"""

import abc
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import Array

from jxent._core.weights import is_used, product_of
from jxent._rows import targets
from jxent._rows.passes import Class, Passes, Row, known
from jxent._rows.reduction import RowSums

Coefficient = Array | float | None
"""The factor of a cost, an array for each position or one number for all; None for 1."""


class Scalars(NamedTuple):
    """Options of a loss that multiply costs: Python numbers, or arrays of shape ()."""

    label_smoothing: float | Array = 0.0
    z_loss_weight: float | Array = 0.0


class Before(NamedTuple):
    """Row arrays (see `passes`) that are computed before any cost; None for those that log-probabilities lack."""

    log_normalizer: Row | None
    label_logit: Row | None  # where each label is one class
    label: tuple["Cost", tuple[Row, Row | None]] | None = None  # the cost of the label, and its `value`
    sums: RowSums | None = None  # if one reduction has taken them


class Moved(NamedTuple):
    """Tangents, row arrays. The first two subtract the tangent of x at the same class, see `Class.dz`."""

    log_z: Row
    label_z: Row | None  # of x[t] - m, where each label is one class
    log_normalizer: Row
    entries: Array | None = None  # of the probabilities of sparse labels


class Cost(abc.ABC):
    """One cost of each position.

    An implementor gives the value of the cost, its gradient by x as a term of `Passes.map`, and its tangent. All arrays
    are row arrays, except those of a `Class` (`passes`), which broadcast against the logits. `rows` takes one cotangent
    for each position. The gradients, also `to_label` and `to_class_weight`, may be differentiated again. An implementor
    may assume that the passes know `log_p`, and if `Passes.normalized`, `z` and `p` too.
    """

    option: ClassVar[str] = ""
    """The name of the option in `Scalars` that multiplies the cost."""

    gradient_takes_p_alone: bool = False
    """Whether the gradient needs only the probabilities, so that saved exponentials can replace the logits."""

    takes_class_weight: ClassVar[bool] = False
    """Whether the cost is a sum over the classes in which each term has its class weight as a factor."""

    logits_may_round: bool = False
    """Whether the gradient keeps its digits if the logits and the known rows were rounded in different ways."""

    largest_gradient: ClassVar[float] = 1
    """The expected size of the largest gradient for a coefficient of 1, from which `jxent._sweep` scales float16."""

    def coefficient(self, scalars: Scalars, sample_weight: Array | None) -> Coefficient:
        """The factor of the cost in the loss of a position."""
        return product_of(sample_weight, getattr(scalars, self.option))

    @abc.abstractmethod
    def value(self, passes: Passes, before: Before) -> tuple[Row, Row | None]:
        """(the cost, what to keep for its gradient)."""

    @abc.abstractmethod
    def rows(self, passes: Passes, kept: Row | None, cotangent: Row) -> Any:
        """The arrays that `gradient` takes besides a `Class`. The cotangent multiplies the gradient."""

    @abc.abstractmethod
    def gradient(self, c: Class, rows: Any) -> Array:
        """The gradient by x, or by log-probabilities that no sum normalizes; for `Passes.map`."""

    def to_label(self, c: Class, rows: Any) -> Array | None:
        """The gradient by the label's probability q[j], for `Passes.map`; None for 0."""
        return None

    def to_class_weight(self, c: Class, rows: Any) -> Array | None:
        """The gradient by the class weight, of each position, for `Passes.map`; None for 0."""
        return None

    def rows_of_z(self, passes: Passes, rows: Any) -> Any:
        """The row arrays of `rows` that `times_z` takes, and others that it needs."""
        del passes
        return rows

    @abc.abstractmethod
    def times_z(self, c: Class, rows: Any) -> Array:
        """The gradient by z times z, for `Passes.sum`, without the part that `label_times_z` has.

        The sum over the classes is the gradient by the temperature, times minus the temperature.
        """

    def label_times_z(self, passes: Passes, rows: Any) -> Row | None:
        """The rest of that sum, of the classes of this shard; None for 0. It takes the `rows` of `gradient`."""
        del passes, rows
        return None

    @abc.abstractmethod
    def tangent(self, passes: Passes, kept: Row | None, moved: Moved) -> Row:
        """The tangent of the cost, from the tangents of the arrays in `Arrays.moving`."""


class LabelCost(Cost):
    """The cost of a label. Each kind of label has its own (`jxent._labels`)."""


def coefficient_of_label(scalars: Scalars, sample_weight: Array | None, label_weight: Array | None) -> Coefficient:
    """The factor of the label's cost: the weights, times 1 - smoothing."""
    rest = 1 - scalars.label_smoothing if is_used(scalars.label_smoothing) else None
    return product_of(sample_weight, label_weight, rest)


class TargetCost(Cost):
    """The cost of a target (`targets`). A share is `unweighted`, times the class weight if the target is `weighted`."""

    takes_class_weight = True

    def __init__(self, weighted: bool = True) -> None:
        self.weighted = weighted

    @abc.abstractmethod
    def unweighted(self, c: Class) -> Array:
        """The share of a class without its class weight."""

    def dunweighted(self, c: Class) -> Array | None:
        """The tangent of `unweighted`; None if that is constant."""
        return None

    def share(self, c: Class) -> Array:
        return self.weigh(c, self.unweighted(c))

    def weigh(self, c: Class, share: Array) -> Array:
        return c.weighted(share) if self.weighted else share

    def value(self, passes: Passes, before: Before) -> tuple[Row, Row | None]:
        return targets.cost(passes, self.share), None

    def rows(self, passes: Passes, kept: Row | None, cotangent: Row) -> tuple[Row, targets.Sums | None]:
        return cotangent, targets.sums(passes, self.share)

    def gradient(self, c: Class, rows: tuple[Row, targets.Sums | None]) -> Array:
        cotangent, sums = rows
        return cotangent * targets.gradient(c, self.share(c), sums)

    def times_z(self, c: Class, rows: tuple[Row, targets.Sums | None]) -> Array:
        # Where A p[j] - a[j] cancels because p[j] is near 1, z is 0.
        cotangent, sums = rows
        return cotangent * (known(sums).all * c.p - self.share(c)) * c.held_z

    def to_class_weight(self, c: Class, rows: tuple[Row, targets.Sums | None]) -> Array | None:
        share = self.unweighted(c)
        return rows[0] * (share * c.cost_if_shared(share)) if self.weighted else None

    def tangent(self, passes: Passes, kept: Row | None, moved: Moved) -> Row:
        def term(c: Class, dlog_z: Row) -> Array:
            return c.dcost(self.unweighted(c), self.dunweighted(c), dlog_z, self.weighted)

        return passes.sum(term, moved.log_z)


class Uniform(TargetCost):
    """The target of shares w[j] / n, n being the number of classes that are not masked."""

    option = "label_smoothing"
    logits_may_round = True

    def unweighted(self, c: Class) -> Array:
        return c.present

    def value(self, passes: Passes, before: Before) -> tuple[Row, Row]:
        sums = before.sums
        if sums is not None and sums.linear is not None and passes.arrays.weight is None:
            n = jnp.maximum(known(sums.present), 1)
            return sums.linear / n + known(passes.arrays.log_z), n
        n = jnp.maximum(passes.sum(self.unweighted), 1)
        return targets.cost(passes, self.share) / n, n

    def rows(self, passes: Passes, kept: Row | None, cotangent: Row) -> tuple[Row, targets.Sums | None]:
        n = known(kept)
        if passes.arrays.weight is None:
            # One class alone has a gradient of exactly 0, even if its logit is computed twice and rounds differently.
            return cotangent / n, targets.Sums(all=jnp.where(n == 1, 0, n), others=n - 1)
        return cotangent / n, targets.sums(passes, self.share)

    def tangent(self, passes: Passes, kept: Row | None, moved: Moved) -> Row:
        return super().tangent(passes, kept, moved) / known(kept)


class SquaredNormalizer(Cost):
    """(m + log_z)**2, with the gradient 2 (m + log_z) p[j]."""

    option = "z_loss_weight"
    gradient_takes_p_alone = logits_may_round = True
    largest_gradient = 64

    def value(self, passes: Passes, before: Before) -> tuple[Row, Row]:
        log_normalizer = known(before.log_normalizer)
        return log_normalizer**2, log_normalizer

    def rows(self, passes: Passes, kept: Row | None, cotangent: Row) -> Row:
        return 2 * cotangent * known(kept)

    def gradient(self, c: Class, rows: Row) -> Array:
        return rows * c.p

    def rows_of_z(self, passes: Passes, rows: Row) -> tuple[Row, Row]:
        return rows, passes.top()

    def times_z(self, c: Class, rows: tuple[Row, Row]) -> Array:
        return normalizer_times_z(c, rows)

    def tangent(self, passes: Passes, kept: Row | None, moved: Moved) -> Row:
        return 2 * known(kept) * moved.log_normalizer


OPTIONAL: dict[str, Cost] = {"uniform": Uniform(), "z": SquaredNormalizer()}
"""The costs, by name, that a loss has only if their option is set."""


# --- the statistics ---------------------------------------------------------------------------------------------------


class LogProb(Cost):
    """The label's cost without class weights, with the opposite sign."""

    def __init__(self, label: LabelCost) -> None:
        self.label = label
        self.gradient_takes_p_alone = label.gradient_takes_p_alone
        self.logits_may_round = label.logits_may_round

    def value(self, passes: Passes, before: Before) -> tuple[Row, Row | None]:
        label, of_label = known(before.label)
        cost, kept = of_label if label is self.label else self.label.value(passes, before)
        return -cost, kept

    def rows(self, passes: Passes, kept: Row | None, cotangent: Row) -> Any:
        return self.label.rows(passes, kept, -cotangent)

    def gradient(self, c: Class, rows: Any) -> Array:
        return self.label.gradient(c, rows)

    def rows_of_z(self, passes: Passes, rows: Any) -> Any:
        return self.label.rows_of_z(passes, rows)

    def times_z(self, c: Class, rows: Any) -> Array:
        return self.label.times_z(c, rows)

    def label_times_z(self, passes: Passes, rows: Any) -> Row | None:
        return self.label.label_times_z(passes, rows)

    def to_label(self, c: Class, rows: Any) -> Array | None:
        return self.label.to_label(c, rows)

    def tangent(self, passes: Passes, kept: Row | None, moved: Moved) -> Row:
        return -self.label.tangent(passes, kept, moved)


class LogNormalizer(Cost):
    """m + log_z, with the gradient p[j]."""

    gradient_takes_p_alone = logits_may_round = True

    def value(self, passes: Passes, before: Before) -> tuple[Row, None]:
        return known(before.log_normalizer), None

    def rows(self, passes: Passes, kept: Row | None, cotangent: Row) -> Row:
        return cotangent

    def gradient(self, c: Class, rows: Row) -> Array:
        return rows * c.p

    def rows_of_z(self, passes: Passes, rows: Row) -> tuple[Row, Row]:
        return rows, passes.top()

    def times_z(self, c: Class, rows: tuple[Row, Row]) -> Array:
        return normalizer_times_z(c, rows)

    def tangent(self, passes: Passes, kept: Row | None, moved: Moved) -> Row:
        return moved.log_normalizer


class Entropy(Cost):
    """H = log_z + D, with D the sum of p[j] (m - x[j]). Neither log_z nor D is negative.

    The gradient is -p[j] (log p[j] + H) = p[j] (m - x[j]) - D p[j]. If the largest logit has p near 1, log p[j] + H
    cancels there. In the second form the first term is exactly 0 there, so nothing cancels.
    """

    largest_gradient = 16

    def value(self, passes: Passes, before: Before) -> tuple[Row, Row]:
        if before.sums is None:
            distance = passes.sum(lambda c: c.p_below())
        else:
            distance = known(before.sums.distance) / (1 + before.sums.rest)
        return known(passes.arrays.log_z) + distance, distance

    def rows(self, passes: Passes, kept: Row | None, cotangent: Row) -> tuple[Row, Row]:
        return cotangent, known(kept)

    def gradient(self, c: Class, rows: tuple[Row, Row]) -> Array:
        cotangent, distance = rows
        return cotangent * (c.p_below() - distance * c.p)

    def times_z(self, c: Class, rows: tuple[Row, Row]) -> Array:
        # The sum of p[j] z[j] (z[j] + D) has terms of both signs. With z[j] + D as the other factor it has one sign.
        cotangent, distance = rows
        from_mean = c.held_z + distance
        return -cotangent * (c.p * from_mean * from_mean)

    def tangent(self, passes: Passes, kept: Row | None, moved: Moved) -> Row:
        if not known(passes.arrays.moving).z:
            return jnp.zeros_like(moved.log_z)
        if passes.arrays.temperature is not None:  # again with both factors less their means
            of_rows = known(kept), moved.log_z
            return passes.sum(lambda c, d, dlog_z: -c.p * (c.held_z + d) * (c.dz - dlog_z), *of_rows)
        return passes.sum(lambda c: c.p_below() * c.dz) - known(kept) * moved.log_z


def normalizer_times_z(c: Class, rows: tuple[Row, Row]) -> Array:
    """`Cost.times_z` of a cost with the gradient cotangent * p[j]; `rows` are (cotangent, m / temperature).

    A loss that depends on the normalizer also depends on m / temperature. That is added to each z, as p sums to 1.
    """
    cotangent, top = rows
    return cotangent * (c.p * (c.held_z + top))


STATISTICS: dict[str, Cost] = {"log_normalizer": LogNormalizer(), "entropy": Entropy()}
STATISTIC_NAMES = ("log_prob", *STATISTICS)
