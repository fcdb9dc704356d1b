"""Passes over the logits, written so that XLA:CPU stores no copy of the logits for a pass.

A pass reads every logit once. `Passes.sum` adds a term up over the classes; `Passes.map` returns arrays of the logits'
shape. A term is a function of one `Class` and looks like its formula: ``passes.sum(lambda c: jnp.exp(c.z))``.

XLA:CPU fuses a sum with the arithmetic before it into one loop, without an array of the logits' size. There are three
exceptions:

- XLA:CPU does not fuse comparisons and selections. So a mask is a number, 0 or 1, made of `minimum` and `maximum`.
- It does not fuse a value of the logits' size that another pass uses too: the upcast logits, a broadcast row or a
  broadcast constant. So a barrier gives each pass its own arrays, and its own 1, `one`, from which it makes constants.
- A sum over more than 2**15 classes in one axis takes four times as long as a sum in two steps. So it has two steps.

XLA:CPU also fuses a sum with its use in the next pass, and would store an array for that. So each sum ends with a
selection that changes nothing, `unfused`. On a CPU exponentials cost more time than reading them from memory. A caller
with room for an array of the logits' size can keep them for later passes (`Passes.save_exponentials`).

A row array has the logits' shape, but size 1 along the class axes. If the classes are sharded, each sum also adds up
over the shards. Passes compute in float32, or in float64 for float64 logits. XLA:CPU writes a float32 copy of float16
logits, because it fuses the upcast of bfloat16 with a sum but not the upcast of float16.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from jxent._backend.fusion import barrier, unfused
from jxent._backend.platform import by_platform
from jxent._core.indexing import pick
from jxent._core.shards import AxisNames, cast, total, varying
from jxent._rows import terms

T = TypeVar("T")
Row = Float[Array, "*#row"]
Logits = Float[Array, "*shape"]


def known(value: T | None) -> T:
    """The value, which the caller knows not to be None."""
    assert value is not None
    return value


# --- one class --------------------------------------------------------------------------------------------------------


class Moving(NamedTuple):
    """Tangents of `Arrays`; None for arrays that are constant."""

    logits: Array | None = None
    q: Array | None = None
    weight: Array | None = None
    reference: Array | None = None  # a row array: the tangent of x at the largest logit
    temperature: Array | None = None  # a row array

    @property
    def z(self) -> bool:
        """Whether z has a tangent."""
        return self.logits is not None or self.temperature is not None


class Arrays(NamedTuple):
    """The arrays that the passes over some rows read; None for arrays that are not given."""

    logits: Array | None = None  # None if `exp` is kept instead
    q: Array | None = None  # a number for each class of each position, such as label probabilities
    weight: Array | None = None  # a number for each class, with as many axes as the logits
    exp: Array | None = None  # exp(x - m), if it is kept
    row_max: Array | None = None  # this and the rest are row arrays: the largest logit,
    log_z: Array | None = None  # log sum exp(x - m),
    inverse_z: Array | None = None  # and exp(-log_z), given together with `exp` or a temperature
    temperature: Array | None = None  # a row array; None for 1
    moving: Moving | None = None

    @property
    def any(self) -> Array:
        """The logits, or else the exponentials: an array of the logits' shape."""
        array = self.exp if self.logits is None else self.logits
        return known(array)


@dataclass(frozen=True)
class Class:
    """One class of every position, the argument of a term. Its properties are arrays that broadcast against the logits.

    x is the logit after the softcap, m the largest x, and z = x - m. With a temperature z = (x - m) / temperature.
    """

    arrays: Arrays
    softcap: float | None
    axis: tuple[int, ...]
    exp_lacks_label: bool
    one: Array  # 1, from which a term makes its constants

    @cached_property
    def z(self) -> Array:
        """x - m, divided by the temperature, and 0 at the largest logit."""
        a = self.arrays
        return terms.centered(self._logit, known(a.row_max), a.log_z, a.temperature, self.softcap, self.one)

    @cached_property
    def held_z(self) -> Array:
        """z, except 0 for a masked class."""
        return terms.held(self.z, self.one)

    @cached_property
    def exp_z(self) -> Array:
        return jnp.exp(self.z) if self.arrays.exp is None else self._exp

    @property
    def normalized(self) -> bool:
        """See `Passes.normalized`."""
        return self.arrays.log_z is not None

    @property
    def x(self) -> Array:
        """The logit itself, of formulas that have no softcap and no row maximum."""
        return self._logit.astype(self.one.dtype)

    @cached_property
    def log_p(self) -> Array:
        """The log-probability: z - log_z, or the logit itself if log-probabilities are given."""
        return self._logit.astype(self.one.dtype) if self.arrays.log_z is None else self.z - self.arrays.log_z

    @cached_property
    def p(self) -> Array:
        # With a temperature, z rounds once more. This product rounds once less than z - log_z.
        return jnp.exp(self.log_p) if self.arrays.inverse_z is None else self.exp_z * self.arrays.inverse_z

    @cached_property
    def p_but_label(self) -> Array:
        """`p`, except at the index label, where it may be 0."""
        return self.p if self.arrays.exp is None else self.arrays.exp * known(self.arrays.inverse_z)

    @cached_property
    def q(self) -> Array:
        """The label's probability of this class, or another number that `Arrays.q` has for each class."""
        return known(self.arrays.q).astype(self.one.dtype)

    @cached_property
    def present(self) -> Array:
        """1, and 0 for a class that is masked with -inf."""
        return terms.present(self._logit, self.one)

    @cached_property
    def zero(self) -> Array:
        """0 in the logits' shape. For `Passes.map`."""
        return zeros_of(self._logit, self.one.dtype)

    @property
    def masked(self) -> Array:
        """Whether a class is masked with -inf. For `Passes.map`."""
        return self._logit == -jnp.inf

    @cached_property
    def below_max(self) -> Array:
        """If p of the largest logit is above 2/3: 0 for the class with that logit, and 1 for all others.

        Otherwise a class whose logit is almost the largest may have any number from 0 to 1. If the kept exponentials
        lack the label, the label's class has 1.
        """
        if self.arrays.exp is not None:
            return lax.stop_gradient(terms.below_top_of_exponentials(self.arrays.exp, self.one))
        row_max, temperature = known(self.arrays.row_max), self.arrays.temperature
        return lax.stop_gradient(terms.below_top(self._logit, row_max, self.one, temperature))

    @property
    def at_max(self) -> Array:
        return self.one - self.below_max

    @cached_property
    def index(self) -> Array:
        return class_index(self.arrays.any, self.axis)

    # Tangents.

    @property
    def dlogit(self) -> Array:
        return known(known(self.arrays.moving).logits).astype(self.one.dtype)

    @cached_property
    def dx(self) -> Array:
        """The tangent of x."""
        if self.softcap is None:
            return self.dlogit
        return terms.slope(self._logit.astype(self.one.dtype), self.softcap, self.dlogit, self.one)

    @cached_property
    def dz(self) -> Array:
        """The tangent of z: the tangent of x minus `Moving.reference`, and the share of the temperature."""
        moving, temperature = known(self.arrays.moving), self.arrays.temperature
        if temperature is None:
            return self.dx - known(moving.reference)
        dbelow = 0 * self.one if moving.logits is None else self.dx - known(moving.reference)
        return terms.cooled(self.z, dbelow, temperature, moving.temperature, self.one)

    @property
    def dq(self) -> Array | None:
        """The tangent of `q`, or None."""
        dq = known(self.arrays.moving).q
        return None if dq is None else dq.astype(self.one.dtype)

    def dcost(self, share: Array, dshare: Array | None, dlog_z: Array, weighted: bool = True) -> Array:
        """The tangent of w[j] a[j] (-log p[j]), for the share a[j], whose tangent is `dshare`.

        w[j] is the class weight if `weighted`, and otherwise 1.
        """
        moving, by_share = known(self.arrays.moving), terms.marginal(share, -self.log_p, self.one)
        tangents = []
        if moving.z:
            tangents.append((self.weighted(share) if weighted else share) * (dlog_z - self.dz))
        if dshare is not None:
            tangents.append((self.weighted(dshare) if weighted else dshare) * by_share)
        if weighted and moving.weight is not None:
            tangents.append(moving.weight * (share * by_share))
        return sum(tangents, 0 * self.one)

    def weighted(self, share: Array) -> Array:
        """The share, times the class weight if class weights are given."""
        return share if self.arrays.weight is None else share * self.arrays.weight

    def cost(self, share: Array) -> Array:
        """share * -log p, with 0 * inf = 0."""
        return terms.product(share, -self.log_p, self.one)

    def p_below(self) -> Array:
        """p (m - x), which is 0 for a masked class."""
        return terms.product_of_p(self.p, -self.z, self.one)

    def cost_if_shared(self, share: Array) -> Array:
        """-log p, but 0 for a masked class without a share, which does not count as a class. For `Passes.map`."""
        return jnp.where(self.masked & (share == 0), 0, -self.log_p)

    def to_logit(self, gradient: Array) -> Array:
        """The gradient by the logit, in the logit's dtype, from the gradient by z. For `Passes.map`."""
        # Without positions the gradient is a constant, and its type would not say that it varies over the mesh.
        gradient = cast(gradient, varying(self.arrays.any))
        if self.arrays.temperature is not None:
            gradient = gradient / self.arrays.temperature
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
        return known(self.arrays.exp)


# --- the passes -------------------------------------------------------------------------------------------------------


@dataclass
class Passes:
    """Passes over the same arrays, one after the other.

    Each pass starts after the sum before it, `previous`. Otherwise XLA:CPU would merge passes and store the values that
    they share. Terms know `z` if `Arrays.row_max` is given, and probabilities if `Arrays.log_z` is given.
    """

    arrays: Arrays
    axis: tuple[int, ...]
    dtype: jnp.dtype  # to compute in
    softcap: float | None = None
    axis_name: AxisNames = ()  # over which the classes are sharded
    previous: Array | None = None
    exp_lacks_label: bool = False  # whether `Arrays.exp` is 0 at the index label
    fused: bool = False  # whether a pass without `previous` may be computed together with the logits

    @property
    def normalized(self) -> bool:
        """Whether the arrays are logits with a normalizer, and not log-probabilities."""
        return self.arrays.log_z is not None

    @property
    def lacks_label(self) -> bool:
        """Whether the terms read exponentials that are 0 at the index label."""
        return self.arrays.exp is not None and self.exp_lacks_label

    def moving(self, tangents: Moving) -> None:
        """Sets the tangents of the arrays for the terms of later passes."""
        self.arrays = self.arrays._replace(moving=tangents)

    def mean_at_max(self, term: Callable[[Class], Array]) -> Row:
        """The mean of a term over the largest logit and any others that `Class.at_max` includes; a row array.

        If p of the largest logit is above 2/3, this is the term of that class alone. If no class is included, it is 0.
        """
        number = jnp.maximum(self.sum(lambda c: c.at_max), 1)
        return self.sum(lambda c: c.at_max * term(c)) / number

    def sum(self, term: Callable[..., Array], *rows: Any) -> Row:
        """The sum over the classes of ``term(c, *rows)``, a row array; the `rows` are row arrays too."""
        return self._finished(self._sum_here(term, *rows))

    def share_of_sum(self, term: Callable[..., Array], *rows: Any) -> Row:
        """`sum` over the classes of this shard. Later passes do not wait for it, so that it may go unused."""
        return unfused(self._sum_here(term, *rows))

    def _sum_here(self, term: Callable[..., Array], *rows: Any) -> Row:
        classes = self._blockable()

        def sums(number: int, previous: Row | None, arrays: Arrays, *rows: Any) -> Row:
            return jnp.sum(self._block_sums(number, term, previous, arrays, *rows), self.axis, keepdims=True)

        operands = self.previous, self.arrays, *rows
        return by_platform(lambda backend: backend.blocks_of_sum(classes), sums, *operands)

    def map(self, term: Callable[..., T], *rows: Any) -> T:
        """``term(c, *rows)``, one array or a tree of arrays."""
        c, rows = self._start(self.previous, self.arrays, *rows)
        return term(c, *rows)

    def z_of(self, logit: Array) -> Array:
        """z of any logits of the positions."""
        a, one = self.arrays, jnp.ones((), self.dtype)
        return terms.centered(logit, known(a.row_max), a.log_z, a.temperature, self.softcap, one)

    def dz_of(self, logit: Array | None, dlogit: Array | None) -> Array:
        """The tangent of z if the tangent of the logit is `dlogit`; None for 0. It needs `Moving.reference`."""
        moving = known(self.arrays.moving)
        still = jnp.zeros((), self.dtype)
        dbelow = still if dlogit is None else self.dx_of(logit, dlogit) - known(moving.reference)
        if self.arrays.temperature is None:
            return dbelow
        one = jnp.ones((), self.dtype)
        return terms.cooled(self.z_of(known(logit)), dbelow, self.arrays.temperature, moving.temperature, one)

    def top(self) -> Row:
        """m, divided by the temperature."""
        m = terms.capped(known(self.arrays.row_max), self.softcap)
        return m if self.arrays.temperature is None else m / self.arrays.temperature

    def dtop(self, dx: Row) -> Row:
        """The tangent of `top` if the tangent of m is `dx`."""
        moving, temperature = known(self.arrays.moving), self.arrays.temperature
        if temperature is None:
            return dx
        return terms.cooled(self.top(), dx, temperature, moving.temperature, jnp.ones((), self.dtype))

    def dx_of(self, logit: Array | None, dlogit: Array) -> Array:
        """The tangent of x if the tangent of the logit is `dlogit`."""
        dlogit = dlogit.astype(self.dtype)
        return dlogit if self.softcap is None else terms.slope(known(logit).astype(self.dtype), self.softcap, dlogit)

    def save_exponentials(self, but: Int[Array, "*row"] | None = None) -> Row:
        """The sum of exp(x - m) without the class index `but`. Later passes read exp(x - m) from memory."""
        exp = jnp.exp(self.z_of(known(self.arrays.logits)))
        if but is not None:
            exp, self.exp_lacks_label = jnp.where(class_index(exp, self.axis) == but, 0, exp), True
        self.arrays = self.arrays._replace(exp=exp)
        return self._finished(jnp.sum(exp, self.axis, keepdims=True))

    def sum_of_exponentials(self, but: Int[Array, "*row"] | None = None) -> Row:
        """The sum of exp(x - m) over the classes without the class index `but`, which is never subtracted.

        The sum masks the class, or takes blocks of classes and computes the block with the class `but` again.
        """
        if but is None:
            return self.sum(lambda c: c.exp_z)
        (axis,), classes = self.axis, self._blockable()
        itemsize = known(self.arrays.logits).dtype.itemsize

        def unless_label(c: Class, label: Int[Array, "*row"]) -> Array:
            distance = lax.broadcasted_iota(c.one.dtype, c.z.shape, axis) - label.astype(c.one.dtype)
            return c.exp_z * jnp.minimum(jnp.abs(distance), c.one)

        def sums(number: int, previous: Row | None, arrays: Arrays, label: Int[Array, "*row"]) -> Row:
            if number == 1:
                return jnp.sum(self._block_sums(1, unless_label, previous, arrays, label), axis, keepdims=True)
            blocks = self._block_sums(number, lambda c: c.exp_z, previous, arrays)
            size = classes // number
            near_shape = (*label.shape[:axis], size, *label.shape[axis + 1 :])
            near = label // size * size + lax.broadcasted_iota(label.dtype, near_shape, axis)
            exp = jnp.exp(self.z_of(pick(known(arrays.logits), jnp.clip(near, 0, classes - 1), axis)))
            again = jnp.sum(jnp.where(near == label, 0, exp), axis, keepdims=True)
            here = lax.broadcasted_iota(label.dtype, blocks.shape, axis) == label // size
            return jnp.sum(jnp.where(here, again, blocks), axis, keepdims=True)

        operands = self.previous, self.arrays, but
        return self._finished(by_platform(lambda b: b.blocks_of_masked_sum(classes, itemsize), sums, *operands))

    def _start(self, previous: Row | None, arrays: Arrays, *rows: Any) -> tuple[Class, tuple[Any, ...]]:
        """(the `Class`, the rows) of a pass that starts once `previous` is known."""
        one = jnp.ones((), self.dtype)
        if previous is not None or not self.fused:
            arrays, rows, one, _ = barrier((arrays, rows, one, previous))
        return Class(arrays, self.softcap, self.axis, self.exp_lacks_label, one), rows

    def _block_sums(
        self, number: int, term: Callable[..., Array], previous: Row | None, arrays: Arrays, *rows: Any
    ) -> Array:
        """The terms, added up in each of `number` blocks along the class axis. One block is not added up."""
        c, rows = self._start(previous, arrays, *rows)
        if number == 1:
            return term(c, *rows)
        (axis,) = self.axis

        def in_blocks(array: Array) -> Array:
            size = array.shape[axis]
            blocks = (1, 1) if size == 1 else (number, size // number)
            return array.reshape(*array.shape[:axis], *blocks, *array.shape[axis + 1 :])

        arrays, rows = jax.tree.map(in_blocks, (c.arrays, rows))
        return unfused(jnp.sum(term(replace(c, arrays=arrays), *rows), axis + 1))

    def _finished(self, sums: Row) -> Row:
        self.previous = unfused(total(sums, self.axis_name))
        return self.previous

    def _blockable(self) -> int:
        return blockable(self.arrays.any, self.axis[0]) if len(self.axis) == 1 else 0


def zeros_of(logits: Array, dtype: Any) -> Array:
    """0 in the logits' shape, made from the logits so that it is sharded like them."""
    return jnp.where(logits < 0, jnp.zeros_like(logits, dtype), 0)


def blockable(array: Array, axis: int) -> int:
    """How many classes there are along the axis; 0 if they cannot be divided into blocks."""
    classes = array.shape[axis]
    return classes if isinstance(classes, int) and jax.typeof(array).sharding.spec[axis] is None else 0


def class_index(array: Array, axis: tuple[int, ...]) -> Int[Array, "*classes"]:
    """0, 1, 2, ... along the class axis, of size 1 along others; stored by a barrier, as counting per row is slower."""
    shape = [size if a in axis else 1 for a, size in enumerate(array.shape)]
    return barrier(lax.broadcasted_iota(jnp.int32, shape, axis[0]))
