"""What each position costs, and the exact gradient of that: the rule under `cross_entropy`.

A position's loss is a sum of costs times coefficients. With log p = (x - m) - log_z (`normalizer`) the costs are

    label     -log p[t] for an index label t; for class probabilities q the target of shares q[j] w[j] (`targets`)
    uniform   the target of shares w[j] / n over the n classes that are not masked, for label smoothing
    z         (m + log_z)**2, for the z-loss

Each of them is a class below, with its value, its gradient and its coefficient, and travels under its name. To add a
cost, write such a class, name it in `OPTIONAL`, and let `Scalars` have the option that multiplies it.

The statistics that have gradients are costs, too, which nothing multiplies and no loss contains:

    log_prob         log p[t]; for class probabilities, the sum of q[j] log p[j]
    log_normalizer   m + log_z
    entropy          the sum of p[j] (-log p[j])

The rule takes no coefficient: weights, smoothing and the mean's denominator are plain JAX outside of it, and have their
true gradients. Memory: nothing of the size of the logits in the forward pass; in the backward pass their gradient, and
those of class weights and of probability labels may write as many arrays of that size again.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jxent._core import targets
from jxent._core.divergences import Divergence
from jxent._core.labels import Entries, by_index, out_of_range
from jxent._core.passes import Class, Passes, compute_dtype, given
from jxent._core.shards import Shards, local_index, total
from jxent._core.terms import below_top, expm1
from jxent._core.weights import along, is_used, product_of


class Form(NamedTuple):
    """Which costs are wanted, of what; static."""

    axis: int
    logit_softcap: float | None
    costs: tuple[str, ...]  # names of what the loss is made of
    stats: bool  # whether the statistics are wanted, too
    shards: Shards  # of the classes
    divergence: Divergence | None = None  # instead of all costs

    @property
    def names(self) -> tuple[str, ...]:
        """Of all costs, the statistics among them."""
        return (*self.costs, *STATISTIC_NAMES) if self.stats else self.costs


class CostInputs(NamedTuple):
    """What the rule takes, and the gradients of that (None for none).

    Where the classes are sharded, all of these are this shard's, but class indices count the classes of all shards.
    """

    logits: Array
    labels: Array  # class indices without the class axis, or of the logits' shape: class probabilities, or logits of P
    class_weight: Array | None  # (classes,); in the sums over classes, not in the cost of an index label
    keep: Array | None  # a row array, False where a position does not count; what its logits hold reaches no gradient
    first: Array | None  # the class that this shard begins with; None if the classes are not sharded
    temperature: Array | None = None  # of shape (): what a divergence divides all logits by; None for 1
    # Of sparse labels, whose probabilities are `labels`, the classes: both of the logits' shape, but for k entries.
    indices: Array | None = None

    @property
    def dtype(self):
        """To compute in."""
        others = self.class_weight, self.temperature, None if by_index(self.labels) else self.labels
        return compute_dtype(self.logits.dtype, *(a.dtype for a in others if a is not None))


class Scalars(NamedTuple):
    """Options of a loss that multiply costs: Python numbers, or arrays of shape ()."""

    label_smoothing: float | Array = 0.0
    z_loss_weight: float | Array = 0.0


# --- the costs --------------------------------------------------------------------------------------------------------


class Known(NamedTuple):
    """Row arrays that are known before any cost is taken."""

    log_normalizer: Any  # None for log-probabilities, which have none
    label_logit: Array | None  # for index labels
    label: tuple[Array, Array | None] | None = None  # what `value` of the label's cost returned


class Moved(NamedTuple):
    """Tangents, row arrays. The first two are relative to the same class, see `Class.dz`."""

    log_z: Any  # None, as the next but one, for log-probabilities, which have no normalizer
    label_z: Array | None  # of x[t] - m, for index labels
    log_normalizer: Any
    labels: Array | None = None  # of the probabilities of sparse labels


class Cost:
    """One cost of each position. Its arrays are row arrays, but for those of a `Class`."""

    option = ""  # the name of the option in `Scalars` that multiplies the cost
    gradient_takes_p_alone = False  # of each class, so that kept exponentials serve for the logits
    steepness = 1  # a bound of the gradient's elements for a coefficient of 1, for the range of float16: see `sweep`

    def coefficient(self, scalars: Scalars, sample_weight, label_weight):
        """What multiplies the cost in the loss of a position; None for 1, as for weights that are not given."""
        del label_weight
        return product_of(sample_weight, getattr(scalars, self.option))

    def value(self, passes: Passes, known: Known) -> tuple[Array, Array | None]:
        """(the cost, what to keep for its gradient)."""
        raise NotImplementedError

    def rows(self, passes: Passes, kept: Array, cotangent: Array) -> tuple:
        """What `gradient` takes besides a class, by passes of its own; the cotangent multiplies the gradient."""
        raise NotImplementedError

    def gradient(self, c: Class, rows) -> Array:
        """The gradient by x, for `Passes.map`."""
        raise NotImplementedError

    def to_label(self, c: Class, rows) -> Array | None:
        """The gradient by the label's probability q[j], for `Passes.map`; None for 0."""
        return None

    def to_class_weight(self, c: Class, rows) -> Array | None:
        """The gradient by the class weight, of each position, for `Passes.map`; None for 0."""
        return None

    def tangent(self, passes: Passes, kept: Array | None, moved: Moved) -> Array:
        """The tangent of the cost for the tangents that the passes have, `Arrays.moving`."""
        raise NotImplementedError


class _Label(Cost):
    """The cost of the label, from which smoothing takes its share."""

    def coefficient(self, scalars, sample_weight, label_weight):
        rest = 1 - scalars.label_smoothing if is_used(scalars.label_smoothing) else None
        return product_of(sample_weight, label_weight, rest)


class IndexLabel(_Label):
    """-log p[t]. The gradient is p[j] - [j = t], which at j = t is expm1(-cost)."""

    gradient_takes_p_alone = True

    def __init__(self, index: Array):
        self.index = index  # a row array, counted from this shard's first class

    def value(self, passes, known):
        cost = given(passes.arrays.log_z) - passes.z_of(given(known.label_logit))
        return cost, cost

    def rows(self, passes, kept, cotangent):
        return self.index, cotangent, cotangent * expm1(-kept)

    def gradient(self, c, rows):
        index, cotangent, at_label = rows
        return jnp.where(c.index == index, at_label, cotangent * c.p_but_label)

    def tangent(self, passes, kept, moved):
        return moved.log_z - given(moved.label_z)


class _Target(Cost):
    """The cost of a target (`targets`) whose shares are the class weights, if it is `weighted`, times `unweighted`."""

    def __init__(self, weighted: bool = True):
        self.weighted = weighted

    def unweighted(self, c: Class) -> Array:
        raise NotImplementedError

    def share(self, c):
        return self._weigh(c, self.unweighted(c))

    def _weigh(self, c, share):
        return c.weighted(share) if self.weighted else share

    def value(self, passes, known) -> tuple[Array, Array | None]:
        return targets.cost(passes, self.share), None

    def rows(self, passes, kept, cotangent):
        return cotangent, targets.sums(passes, self.share)

    def gradient(self, c, rows):
        cotangent, sums = rows
        return cotangent * targets.pull(c, self.share(c), sums)

    def to_class_weight(self, c, rows):
        share = self.unweighted(c)
        return rows[0] * (share * c.cost_of(share)) if self.weighted else None

    def dunweighted(self, c: Class) -> Array | None:
        """The tangent of `unweighted`; None if it does not move."""
        return None

    def tangent(self, passes, kept, moved):
        def term(c, dlog_z):
            return c.dcost(self.unweighted(c), self.dunweighted(c), dlog_z, self.weighted)

        return passes.sum(term, moved.log_z)


class ProbabilityLabel(_Label, _Target):
    """The target of shares q[j] w[j]."""

    def unweighted(self, c):
        return c.q

    def dunweighted(self, c):
        return c.dq

    def to_label(self, c, rows):
        return rows[0] * self._weigh(c, c.cost_of(c.q))  # w[j] (-log p[j])


class SparseLabel(_Label):
    """The target of shares q w at the entries of a sparse label, whose weights w are those of the entries' classes.

    The gradient is that of any target: first as if no class had a share, and then less the shares at the entries.
    """

    def __init__(self, entries: Entries, weight: Array | None, form: Form):
        self.entries, self.weight, self.form = entries, weight, form

    def taken(self, passes) -> tuple[Array, Array, Array]:
        """(the logits, the share, -log p) of each entry of this shard; of others the share is 0.

        So is -log p of a masked class without a share, which is no class.
        """
        logits, log_z = given(passes.arrays.logits), passes.arrays.log_z
        x = self.entries.at(logits, self.form.axis)
        share = _times(self.weight, self.entries.probability.astype(passes.dtype))
        share = self.entries.here(share, logits.shape[self.form.axis])
        cost = -x.astype(passes.dtype) if log_z is None else log_z - passes.z_of(x)
        return x, share, jnp.where((share == 0) & (cost == jnp.inf), 0, cost)

    def summed(self, values):
        """The sum over the entries of all shards."""
        return total(jnp.sum(values, self.form.axis, keepdims=True), self.form.shards.axis_name)

    def value(self, passes, known):
        _, share, cost = self.taken(passes)
        return self.summed(share * cost), None

    def rows(self, passes, kept, cotangent):
        x, share, cost = self.taken(passes)
        others = self.summed(share * below_top(x, passes.arrays.top, jnp.ones((), passes.dtype)))
        return cotangent, share, cost, targets.Sums(self.summed(share), others)

    def gradient(self, c, rows):
        cotangent, share, cost, sums = rows
        of_all = targets.pull(c, 0, sums)  # in which there are the others' shares where p is near 1
        taken = jnp.where(targets.is_near_one(-cost), 0, share)
        return self.entries.add_to(cotangent * of_all, -cotangent * taken, self.form.axis)

    def to_label(self, c, rows):
        cotangent, _, cost, _ = rows
        return self.entries.here(cotangent * _times(self.weight, cost), given(c.arrays.logits).shape[self.form.axis])

    def to_class_weight(self, c, rows):
        cotangent, _, cost, _ = rows
        if self.weight is None:
            return None
        paid = cotangent * self.entries.probability.astype(cost.dtype) * cost
        return self.entries.add_to(jnp.zeros_like(given(c.arrays.logits), cost.dtype), paid, self.form.axis)

    def tangent(self, passes, kept, moved):
        x, share, cost = self.taken(passes)
        moving, parts = given(passes.arrays.moving), [0 * cost]
        shape = given(passes.arrays.logits).shape
        if moving.logits is not None:
            dlog_p = passes.dx_of(x, self.entries.at(moving.logits, self.form.axis))
            if moving.reference is not None:
                dlog_p = dlog_p - moving.reference - moved.log_z
            parts.append(-share * dlog_p)
        if moved.labels is not None:
            parts.append(_times(self.weight, moved.labels.astype(passes.dtype)) * cost)
        if self.weight is not None and moving.weight is not None:
            dweight = self.entries.at(jnp.broadcast_to(moving.weight, shape), self.form.axis)
            parts.append(self.entries.probability.astype(passes.dtype) * dweight * cost)
        return self.summed(self.entries.here(sum(parts[1:], parts[0]), shape[self.form.axis]))


def _times(weight, values):
    return values if weight is None else weight * values


class Uniform(_Target):
    """The target of shares w[j] / n, n being the number of classes that are not masked."""

    option = "label_smoothing"

    def unweighted(self, c):
        return c.present

    def value(self, passes, known):
        n = jnp.maximum(passes.sum(self.unweighted), 1)
        return targets.cost(passes, self.share) / n, n

    def rows(self, passes, kept, cotangent):
        n = kept
        sums = targets.Sums(n, n - 1) if passes.arrays.weight is None else targets.sums(passes, self.share)
        return cotangent / n, sums

    def tangent(self, passes, kept, moved):
        n = kept
        return super().tangent(passes, kept, moved) / n


class SquaredNormalizer(Cost):
    """(m + log_z)**2, with the gradient 2 (m + log_z) p[j]."""

    option = "z_loss_weight"
    gradient_takes_p_alone = True
    steepness = 64

    def value(self, passes, known):
        return known.log_normalizer**2, known.log_normalizer

    def rows(self, passes, kept, cotangent):
        return (2 * cotangent * kept,)

    def gradient(self, c, rows):
        return rows[0] * c.p

    def tangent(self, passes, kept, moved):
        return 2 * given(kept) * moved.log_normalizer


OPTIONAL = {"uniform": Uniform(), "z": SquaredNormalizer()}


# --- the statistics ---------------------------------------------------------------------------------------------------


class LogProb(Cost):
    """Minus the label's cost, without class weights."""

    def __init__(self, label: IndexLabel | ProbabilityLabel | SparseLabel):
        self.label = label
        self.gradient_takes_p_alone = label.gradient_takes_p_alone

    def value(self, passes, known):
        same = isinstance(self.label, IndexLabel) or passes.arrays.weight is None
        cost, kept = given(known.label) if same else self.label.value(passes, known)
        return -cost, kept

    def rows(self, passes, kept, cotangent):
        return self.label.rows(passes, kept, -cotangent)

    def gradient(self, c, rows):
        return self.label.gradient(c, rows)

    def to_label(self, c, rows):
        return self.label.to_label(c, rows)

    def tangent(self, passes, kept, moved):
        return -self.label.tangent(passes, kept, moved)


class LogNormalizer(Cost):
    """m + log_z, with the gradient p[j]."""

    gradient_takes_p_alone = True

    def value(self, passes, known):
        return known.log_normalizer, None

    def rows(self, passes, kept, cotangent):
        return (cotangent,)

    def gradient(self, c, rows):
        return rows[0] * c.p

    def tangent(self, passes, kept, moved):
        return moved.log_normalizer


class Entropy(Cost):
    """H = log_z + D, with D the sum of p[j] (m - x[j]); no term of the two is negative.

    The gradient is -p[j] (log p[j] + H) = p[j] (m - x[j]) - D p[j]. The first term is 0 at the largest logit, where
    log p[j] and H nearly cancel if its p is near 1.
    """

    steepness = 16

    def value(self, passes, known):
        distance = passes.sum(lambda c: c.p_below())
        return given(passes.arrays.log_z) + distance, distance

    def rows(self, passes, kept, cotangent):
        return cotangent, given(kept)

    def gradient(self, c, rows):
        cotangent, distance = rows
        return cotangent * (c.p_below() - distance * c.p)

    def tangent(self, passes, kept, moved):
        if given(passes.arrays.moving).logits is None:
            return jnp.zeros_like(moved.log_z)
        return passes.sum(lambda c: c.p_below() * c.dz) - given(kept) * moved.log_z


STATISTICS = {"log_normalizer": LogNormalizer(), "entropy": Entropy()}
STATISTIC_NAMES = ("log_prob", *STATISTICS)


def wanted_costs(scalars: Scalars) -> tuple[str, ...]:
    """The names of the costs that a loss with these options has."""
    return "label", *(name for name, cost in OPTIONAL.items() if is_used(getattr(scalars, cost.option)))


def weighs_classes(names: tuple[str, ...], labels) -> bool:
    """Whether one of the costs takes class weights into its sum over the classes."""
    return any(isinstance(OPTIONAL.get(n), _Target) or (n == "label" and not by_index(labels)) for n in names)


def coefficients(form: Form, scalars: Scalars, sample_weight, label_weight) -> dict[str, Array | None]:
    """What multiplies the costs in the loss, by the names of the costs; None stands for 1."""
    label = _Label()
    return {name: OPTIONAL.get(name, label).coefficient(scalars, sample_weight, label_weight) for name in form.costs}


def steepness(name: str) -> float:
    return (OPTIONAL | STATISTICS | {"divergence": Divergence}).get(name, Cost).steepness


def entries_of(form: Form, inputs: CostInputs) -> Entries:
    """The entries of sparse labels; an index out of range is -1 on every shard."""
    index = local_index(given(inputs.indices), inputs.first)
    return Entries(jnp.where(_has_no_class(form, inputs), -1, index), inputs.labels)


def _has_no_class(form, inputs):
    return out_of_range(inputs.indices, inputs.logits.shape[form.axis] * form.shards.number)


def is_out_of_range(form: Form, inputs: CostInputs):
    """Whether an entry of sparse labels with a probability has an index out of range; a row array."""
    bad = _has_no_class(form, inputs) & (inputs.labels != 0)
    return total(jnp.sum(bad, form.axis, keepdims=True), form.shards.axis_name) > 0


def _weight_of(form, inputs, entries):
    """The class weight of each entry; None for 1."""
    if inputs.class_weight is None:
        return None
    weight = along(inputs.class_weight, inputs.logits.ndim, form.axis, inputs.dtype)
    return entries.at(jnp.broadcast_to(given(weight), inputs.logits.shape), form.axis)


def costs_of(form: Form, inputs: CostInputs) -> dict[str, Cost]:
    """The costs by name, the statistics among them."""
    if by_index(inputs.labels):
        label = unweighted = IndexLabel(local_index(jnp.expand_dims(inputs.labels, form.axis), inputs.first))
    elif inputs.indices is not None:
        entries = entries_of(form, inputs)
        label, unweighted = (
            SparseLabel(entries, _weight_of(form, inputs, entries), form),
            SparseLabel(entries, None, form),
        )
    else:
        label, unweighted = ProbabilityLabel(), ProbabilityLabel(weighted=False)
    costs: dict[str, Cost] = {name: label if name == "label" else OPTIONAL[name] for name in form.costs}
    return costs | {"log_prob": LogProb(unweighted)} | STATISTICS if form.stats else costs
