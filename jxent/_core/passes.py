"""Passes over the logits, and all that XLA:CPU must be told so that a pass writes no copy of them.

A pass reads every logit once. `Passes.sum` adds a term up over the classes; `Passes.map` returns arrays of the logits'
shape. A term is a function of one `Class`, and reads like its formula: ``passes.sum(lambda c: jnp.exp(c.z))``.

XLA:CPU fuses a sum with the arithmetic that feeds it, into a loop without an array of the logits' size, but

- not with comparisons and selections. So a mask is a number, 0 or 1, made of `minimum` and `maximum`;
- not with a value of the logits' size that another pass uses too, be it the upcast logits, a broadcast row or a
  broadcast constant. So a barrier gives each pass arrays of its own, and a 1, `unit`, to make its constants of;
- not well over more than 2**15 classes in an axis, where it takes four times as long. So such sums take two steps.

It also fuses a sum with what the next pass makes of it, and would store an array for that. So each sum ends with a
selection that changes nothing, `apart`. Exponentials cost a CPU more than memory does. So a caller who has room for an
array of the logits' size can keep them, and later passes read them (`Passes.keep_exponentials`).

A "row" array has the logits' shape with size 1 along the class axes. Where the classes are sharded, each sum is one
over the shards too. All is computed in float32, or in float64 for float64 logits. Of float16 logits XLA:CPU writes a
float32 copy: it fuses the upcast of bfloat16 with a sum, not that of float16.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jxent._core import terms
from jxent._core.labels import pick
from jxent._core.shards import cast, total, varying

T = TypeVar("T")


def compute_dtype(*dtypes):
    """At least float32, and float64 if any of `dtypes` is."""
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32)


# --- what the compiler is told ----------------------------------------------------------------------------------------


def barrier(values):
    """`lax.optimization_barrier`, but none to tangents, which JAX 0.12 cannot always transpose.

    Except inside a `shard_map` that checks replication, where a barrier makes values vary, and tangents must follow.
    """
    return (lax.optimization_barrier if any(map(varying, jax.tree.leaves(values))) else _barrier)(values)


@jax.custom_jvp
def _barrier(values):
    return lax.optimization_barrier(values)


def _barrier_jvp(primals, tangents):
    return _barrier(*primals), tangents[0]


_barrier.defjvp(_barrier_jvp, symbolic_zeros=True)


def on_cpu(function: Callable[..., T], *operands) -> T:
    """`function(cpu, *operands)`, with `cpu` True where it is lowered for a CPU and False elsewhere."""
    return lax.platform_dependent(*operands, cpu=partial(function, True), default=partial(function, False))


def apart(row):
    """`row` unchanged. The selection stops XLA:CPU from fusing the sum that `row` is into what uses it next."""
    return jnp.where(row == jnp.inf, jnp.inf, row)


def given(value: T | None) -> T:
    """What is there wherever this is asked."""
    assert value is not None
    return value


# --- one class --------------------------------------------------------------------------------------------------------


class Arrays(NamedTuple):
    """What the passes over some rows read; None for what is not there."""

    logits: Array | None = None  # None where `exp` is kept instead
    q: Array | None = None  # a number for each class of each position, such as label probabilities
    weight: Array | None = None  # a number for each class, with as many axes as the logits
    exp: Array | None = None  # exp(x - m), where it is kept
    top: Array | None = None  # this and the rest are row arrays: the largest logit,
    log_z: Array | None = None  # log sum exp(x - m),
    inverse_z: Array | None = None  # and exp(-log_z), which goes with `exp`
    moving: "Moving | None" = None


class Moving(NamedTuple):
    """Tangents of `Arrays`; None for what does not move."""

    logits: Array | None = None
    q: Array | None = None
    weight: Array | None = None
    reference: Array | None = None  # a row array: the tangent of x at the largest logit


@dataclass(frozen=True)
class Class:
    """One class of every position. What a term takes from it broadcasts against the logits."""

    arrays: Arrays
    softcap: float | None
    axis: tuple[int, ...]
    exp_lacks_label: bool
    unit: Array

    @cached_property
    def z(self) -> Array:
        """x - m, 0 at the largest logit."""
        return terms.centered(self._logit, self.arrays.top, self.arrays.log_z, self.softcap, self.unit)

    @cached_property
    def exp_z(self) -> Array:
        return jnp.exp(self.z) if self.arrays.exp is None else self._exp

    @cached_property
    def log_p(self) -> Array:
        """The log-probability: z - log_z, or the logit itself where there is no normalizer."""
        return self._logit.astype(self.unit.dtype) if self.arrays.log_z is None else self.z - self.arrays.log_z

    @cached_property
    def p(self) -> Array:
        return jnp.exp(self.log_p) if self.arrays.exp is None else self._exp * given(self.arrays.inverse_z)

    @cached_property
    def p_but_label(self) -> Array:
        """`p`, except at the index label, where it may be 0."""
        return self.p if self.arrays.exp is None else self.arrays.exp * given(self.arrays.inverse_z)

    @cached_property
    def q(self) -> Array:
        """The label's probability of this class, or what else `Arrays.q` has for each class."""
        return given(self.arrays.q).astype(self.unit.dtype)

    @cached_property
    def present(self) -> Array:
        """1, and 0 for a class that is masked with -inf."""
        return terms.present(self._logit, self.unit)

    @property
    def masked(self) -> Array:
        """Whether a class is masked, for `Passes.map`."""
        return self._logit == -jnp.inf

    @cached_property
    def below_max(self) -> Array:
        """0 for the class with the largest logit and 1 below it, where p of the largest is above 2/3.

        Elsewhere it is any number from 0 to 1 for a class whose logit is not much smaller. A label that kept
        exponentials lack counts as below.
        """
        if self.arrays.exp is not None:
            return lax.stop_gradient(terms.below_top_of_exponentials(self.arrays.exp, self.unit))
        return lax.stop_gradient(terms.below_top(self._logit, given(self.arrays.top), self.unit))

    @property
    def at_max(self) -> Array:
        return self.unit - self.below_max

    @cached_property
    def index(self) -> Array:
        return class_index(jax.tree.leaves(self.arrays)[0], self.axis)

    # Tangents.

    @property
    def dlogit(self) -> Array:
        return given(given(self.arrays.moving).logits).astype(self.unit.dtype)

    @cached_property
    def dx(self) -> Array:
        """The tangent of x."""
        if self.softcap is None:
            return self.dlogit
        return terms.slope(self._logit.astype(self.unit.dtype), self.softcap, self.dlogit, self.unit)

    @cached_property
    def dz(self) -> Array:
        """The tangent of z, which is that of x less that of x at the largest logit."""
        return self.dx - given(given(self.arrays.moving).reference)

    @property
    def dq(self) -> Array | None:
        """The tangent of `q`, or None."""
        dq = given(self.arrays.moving).q
        return None if dq is None else dq.astype(self.unit.dtype)

    def dcost(self, share: Array, dshare: Array | None, dlog_z: Array, weighted: bool = True) -> Array:
        """The tangent of w[j] a[j] (-log p[j]), for the share a[j], whose tangent is `dshare`.

        w[j] are the class weights, or 1 unless it is to be `weighted`.
        """
        moving, by_share = given(self.arrays.moving), terms.marginal(share, -self.log_p, self.unit)
        tangents = []
        if moving.logits is not None:
            tangents.append((self.weighted(share) if weighted else share) * (dlog_z - self.dz))
        if dshare is not None:
            tangents.append((self.weighted(dshare) if weighted else dshare) * by_share)
        if weighted and moving.weight is not None:
            tangents.append(moving.weight * (share * by_share))
        return sum(tangents, 0 * self.unit)

    def weighted(self, share: Array) -> Array:
        """The share times the class weight, if there is one."""
        return share if self.arrays.weight is None else share * self.arrays.weight

    def cost(self, share: Array) -> Array:
        """share * -log p, with 0 * inf = 0."""
        return terms.product(share, -self.log_p, self.unit)

    def p_below(self) -> Array:
        """p (m - x), which is 0 for a masked class."""
        return terms.product_of_p(self.p, -self.z, self.unit)

    def cost_of(self, share: Array) -> Array:
        """-log p, and 0 for a masked class without a share: it is no class. For `Passes.map`."""
        return jnp.where(self.masked & (share == 0), 0, -self.log_p)

    def to_logit(self, gradient: Array) -> Array:
        """The gradient by the logit, in its dtype, from that by z. For `Passes.map`."""
        # Of no positions the gradient is a constant, which varies along no axis by itself.
        gradient = cast(gradient, varying(jax.tree.leaves(self.arrays)[0]))
        if self.softcap is not None:
            gradient = terms.slope(self._logit.astype(gradient.dtype), self.softcap, gradient)
        return gradient if self.arrays.logits is None else gradient.astype(self.arrays.logits.dtype)

    @property
    def _logit(self) -> Array:
        assert self.arrays.logits is not None, "of these logits exponentials alone are kept"
        return self.arrays.logits

    @property
    def _exp(self) -> Array:
        assert not self.exp_lacks_label, "the exponentials that are kept are 0 at the label"
        return given(self.arrays.exp)


# --- the passes -------------------------------------------------------------------------------------------------------


@dataclass
class Passes:
    """Passes over the same arrays, one after the other.

    Each pass starts once the sum before it, `previous`, is known, or XLA:CPU would make one pass of several and store
    what they share. Terms know `z` where `Arrays.top` is given, and the probabilities where `Arrays.log_z` is.
    """

    arrays: Arrays
    axis: tuple[int, ...]
    dtype: jnp.dtype  # to compute in
    softcap: float | None = None
    axis_name: tuple = ()  # over which the classes are sharded
    previous: Array | None = None
    exp_lacks_label: bool = False  # whether `Arrays.exp` is 0 at the index label

    @property
    def lacks_label(self) -> bool:
        """Whether terms know nothing of the index label."""
        return self.arrays.exp is not None and self.exp_lacks_label

    def moving(self, tangents: Moving):
        """Has later terms know the tangents of the arrays."""
        self.arrays = self.arrays._replace(moving=tangents)

    def mean_at_max(self, term) -> Array:
        """The mean of a term at the largest logit, or over several that are not much smaller; 0 where there is none.

        A row array. Only where p of the largest is above 2/3 is it sure to be the term of one class.
        """
        number = jnp.maximum(self.sum(lambda c: c.at_max), 1)
        return self.sum(lambda c: c.at_max * term(c)) / number

    def sum(self, term, *rows) -> Array:
        """The sum over the classes of ``term(c, *rows)``, a row array; the `rows` are row arrays too."""
        classes = self._blockable()
        number = blocks_in(classes) if classes > 2**15 else 1

        def sums(cpu, *operands):
            blocks = self._block_sums(number if cpu else 1, term, *operands)
            return jnp.sum(blocks, self.axis, keepdims=True)

        operands = self.previous, self.arrays, *rows
        return self._known(on_cpu(sums, *operands) if number > 1 else sums(False, *operands))

    def map(self, term, *rows):
        """``term(c, *rows)``, which may be several arrays."""
        c, rows = self._start(self.previous, self.arrays, *rows)
        return term(c, *rows)

    def z_of(self, logit: Array, top: Array | None = None) -> Array:
        """x - m of any logits of the positions; `top`, if it is given, is the largest."""
        top, unit = self.arrays.top if top is None else top, jnp.ones((), self.dtype)
        return terms.centered(logit, top, self.arrays.log_z, self.softcap, unit)

    def dx_of(self, logit: Array | None, dlogit: Array) -> Array:
        """The tangent of x where that of the logit is `dlogit`."""
        dlogit = dlogit.astype(self.dtype)
        return dlogit if self.softcap is None else terms.slope(given(logit).astype(self.dtype), self.softcap, dlogit)

    def keep_exponentials(self, but: Array | None = None) -> Array:
        """Has later passes read exp(x - m) from memory, and returns its sum, less that of the class index `but`."""
        exp = jnp.exp(self.z_of(given(self.arrays.logits)))
        if but is not None:
            exp, self.exp_lacks_label = jnp.where(class_index(exp, self.axis) == but, 0, exp), True
        self.arrays = self.arrays._replace(exp=exp)
        return self._known(jnp.sum(exp, self.axis, keepdims=True))

    def sum_of_exponentials(self, but: Array | None = None) -> Array:
        """The sum of exp(x - m) over the classes, but for the class index `but`, without a cancellation.

        A mask costs a CPU as much as the exponentials. So many classes it adds up in blocks, the label's block anew.
        """
        if but is None:
            return self.sum(lambda c: c.exp_z)
        (axis,), classes = self.axis, self._blockable()
        most = 2**15 if given(self.arrays.logits).dtype.itemsize == 2 else 2**14
        number = blocks_in(classes) if classes > most else 1

        def unless_label(c, label):
            distance = lax.broadcasted_iota(c.unit.dtype, c.z.shape, axis) - label.astype(c.unit.dtype)
            return c.exp_z * jnp.minimum(jnp.abs(distance), c.unit)

        def sums(cpu, previous, arrays, label):
            if not cpu:
                return jnp.sum(self._block_sums(1, unless_label, previous, arrays, label), axis, keepdims=True)
            blocks = self._block_sums(number, lambda c: c.exp_z, previous, arrays)
            size = classes // number
            near_shape = (*label.shape[:axis], size, *label.shape[axis + 1 :])
            near = label // size * size + lax.broadcasted_iota(label.dtype, near_shape, axis)
            exp = jnp.exp(self.z_of(pick(arrays.logits, jnp.clip(near, 0, classes - 1), axis)))
            anew = jnp.sum(jnp.where(near == label, 0, exp), axis, keepdims=True)
            here = lax.broadcasted_iota(label.dtype, blocks.shape, axis) == label // size
            return jnp.sum(jnp.where(here, anew, blocks), axis, keepdims=True)

        operands = self.previous, self.arrays, but
        return self._known(on_cpu(sums, *operands) if number > 1 else sums(False, *operands))

    def _start(self, previous, arrays, *rows):
        """(the `Class`, the rows) of a pass that starts once `previous` is known."""
        unit = jnp.ones((), self.dtype)
        arrays, rows, unit, _ = barrier((arrays, rows, unit, previous))
        return Class(arrays, self.softcap, self.axis, self.exp_lacks_label, unit), rows

    def _block_sums(self, number, term, previous, arrays, *rows):
        """The terms: added up within `number` blocks of classes, which become the class axis, or for 1 as they are."""
        c, rows = self._start(previous, arrays, *rows)
        if number == 1:
            return term(c, *rows)
        (axis,) = self.axis

        def in_blocks(array):
            size = array.shape[axis]
            blocks = (1, 1) if size == 1 else (number, size // number)
            return array.reshape(*array.shape[:axis], *blocks, *array.shape[axis + 1 :])

        arrays, rows = jax.tree.map(in_blocks, (c.arrays, rows))
        return apart(jnp.sum(term(replace(c, arrays=arrays), *rows), axis + 1))

    def _known(self, sums):
        self.previous = apart(total(sums, self.axis_name))
        return self.previous

    def _blockable(self):
        return blockable(jax.tree.leaves(self.arrays)[0], self.axis[0]) if len(self.axis) == 1 else 0


def blockable(array, axis):
    """How many classes there are along the axis; 0 if they cannot be cut into blocks."""
    classes = array.shape[axis]
    return classes if isinstance(classes, int) and jax.typeof(array).sharding.spec[axis] is None else 0


def class_index(array, axis):
    """0, 1, 2, ... along the class axis and 1 along the others, from memory: faster than counting in each row."""
    shape = [size if a in axis else 1 for a, size in enumerate(array.shape)]
    return barrier(lax.broadcasted_iota(jnp.int32, shape, axis[0]))


def blocks_in(classes):
    """A divisor of the number of classes, not far from its square root; 1 if there is none.

    It has the classes' factors of 2, up to 256 of them, so that shards of the classes hold whole blocks.
    """
    even = min(classes & -classes, 256)
    rest = classes // even
    divisors = [even * d for d in range(1, rest + 1) if rest % d == 0]
    fit = [d for d in divisors if 1 < d <= classes // 16 and classes // d <= 2**15]
    return min(fit, key=lambda d: abs(math.log(2 * d * d / classes)), default=1)
