"""What the losses report under `jax.experimental.checkify`: what is wrong with an array, a value of it, and where.

The labels pass through a primitive of our own, which returns them as they are, and takes the array to be looked at
beside them. The primitive has no effect, and the compiler never meets it. `checkify` alone, which reads a program
before it is compiled, has a rule for it: there the array is looked at. It is the labels that pass, because they are
small and no loss of classes does without them, or else the losses: a large array that passed would be kept for the
backward pass once more.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jxent._core.labels import by_index, is_no_share, out_of_range, rounding_of
from jxent._core.shards import by_compiler, total

try:  # JAX has no public place for the rules of checkify. Where a later one has none here, nothing is reported.
    from jax._src.checkify import error_checks
except ImportError:
    error_checks = {}


def report_labels(options, keep, labels, classes, axis, indices=None):
    """The labels. Reported are index labels out of range, and class probabilities that are none.

    Index labels of positions that do not count must be in range. `keep`, a row array, has the positions that count, or
    is None where all do; `axis` is the class axis of probabilities, and `classes` are those of all shards. Of sparse
    labels, whose `indices` have as many axes, the sum may be anything.
    """
    function = options.function
    if by_index(labels):
        return _reported(OutOfRange(function, classes), labels, labels)
    labels = _reported(NotFinite(function, "labels", masked=False), labels, labels, keep)
    labels = _reported(Negative(function), labels, labels, keep)
    if indices is not None:
        used = _where_kept(labels != 0, keep)
        return _reported(OutOfRange(function, classes), labels, jnp.where(used, indices, 0))
    return _reported(NotOne(function, axis - labels.ndim, options.form.shards.axis_name), labels, labels, keep)


def report_values(options, keep, through, masked=(), **arrays):
    """The labels, or the losses where there are none. Reported are values that are not finite.

    They are those of the arrays, given by name or as None. `keep` is as for `report_labels`, or None for arrays that
    have no positions. In arrays named by `masked`, -inf stands for a masked class.
    """
    for name, array in arrays.items():
        if array is not None:
            through = _reported(NotFinite(options.function, name, name in masked), through, array, keep)
    return through


def report_shares(options, keep, through, labels):
    """The losses, as of `report_values`. Reported are labels, shares of a yes, that are outside of [0, 1]."""
    return _reported(NotShare(options.function), through, labels, keep)


# --- what is looked for -----------------------------------------------------------------------------------------------
#
# Each has a message, and `look`, which returns (where an array is bad, the values to be told). Leading axes may come
# before those that the loss knows, from `jax.vmap`, so that an axis is counted from the end.


class OutOfRange(NamedTuple):
    function: str
    classes: int

    @property
    def message(self):
        return (
            f"{self.function}: label {{value}} is out of range for {self.classes} classes, at {{index}}; labels must "
            f"be in [0, {self.classes}) or equal ignore_index"
        )

    def look(self, labels, keep):
        return out_of_range(labels, self.classes), labels


class NotFinite(NamedTuple):
    function: str
    name: str
    masked: bool  # whether -inf is a masked class

    @property
    def message(self):
        return f"{self.function}: {self.name} has {{value}} at {{index}}"

    def look(self, array, keep):
        bad = jnp.isnan(array) | (array == jnp.inf)
        return _where_kept(bad if self.masked else bad | (array == -jnp.inf), keep), array


class Negative(NamedTuple):
    function: str

    @property
    def message(self):
        return f"{self.function}: labels are class probabilities, and one is {{value}}, at {{index}}"

    def look(self, labels, keep):
        return _where_kept(labels < 0, keep), labels


class NotShare(NamedTuple):
    function: str

    @property
    def message(self):
        return f"{self.function}: label {{value}} is outside of [0, 1], at {{index}}"

    def look(self, labels, keep):
        return _where_kept(is_no_share(labels), keep), labels


class NotOne(NamedTuple):
    function: str
    axis: int
    axis_name: tuple

    @property
    def message(self):
        return f"{self.function}: labels are class probabilities, and sum to {{value}} instead of 1, at {{index}}"

    def look(self, labels, keep):
        sums = jnp.sum(labels, self.axis, keepdims=True, dtype=jnp.float32)
        sums = total(sums, self.axis_name)
        rounding = rounding_of(labels.dtype)
        bad = _where_kept(jnp.abs(sums - 1) > rounding, keep)
        return jnp.squeeze(bad, self.axis), jnp.squeeze(sums, self.axis)


def _where_kept(bad, keep):
    return bad if keep is None else bad & keep


# --- the primitive ----------------------------------------------------------------------------------------------------

reported_p = Primitive("jxent_reported")


def _reported(report, labels: Array, array: Array, keep: Array | None = None) -> Array:
    if array.size == 0:
        return labels
    looked_at = (array,) if keep is None else (array, keep)
    return reported_p.bind(labels, *looked_at, report=report, kept=keep is not None)


@reported_p.def_impl
@reported_p.def_abstract_eval
def _as_they_are(labels, *looked_at, **_):
    return labels


def _jvp(primals, tangents, **params):
    return reported_p.bind(*primals, **params), tangents[0]


def _batched(operands, axes, **params):
    """The mapped axis of what is looked at comes first, in `keep` too; if only `keep` is mapped, any example counts."""
    (labels, array, *keep), (of_labels, axis, *of_keep) = operands, axes

    def in_front(mask, at):
        if axis is None:
            return mask if at is None else jnp.any(mask, at)
        return mask[None] if at is None else jnp.moveaxis(mask, at, 0)

    array = array if axis is None else jnp.moveaxis(array, axis, 0)
    return reported_p.bind(labels, array, *map(in_front, keep, of_keep), **params), of_labels


def _checkify(*operands, report, kept):
    """(the error so far, or that of this array; the labels). Before the operands stands what JAX's rules take first."""
    context, (labels, *looked_at) = operands[: -2 - kept], operands[-2 - kept :]
    found = by_compiler(partial(_first_bad, report), PartitionSpec(), *looked_at)

    @jax.jit
    def check(value, index, is_bad):
        checkify.debug_check(~is_bad, report.message, value=value, index=index)

    (call,) = jax.make_jaxpr(check)(*found).eqns
    error, _ = error_checks[call.primitive](*context, *found, **call.params)
    return error, labels


def _first_bad(report, array, keep=None):
    """(the first bad value, its index, whether there is one).

    The index is found one axis after the other, as an index into all of them could exceed an int32.
    """
    bad, values = report.look(array, keep)
    is_bad, index = jnp.any(bad), []
    for _ in range(bad.ndim):
        at = jnp.argmax(jnp.any(bad, range(1, bad.ndim)))
        index.append(at)
        bad, values = bad[at], values[at]
    return values, jnp.array(index, jnp.int32), is_bad


ad.primitive_jvps[reported_p] = _jvp
batching.primitive_batchers[reported_p] = _batched
mlir.register_lowering(reported_p, lambda ctx, labels, *looked_at, **_: [labels])
error_checks[reported_p] = _checkify
