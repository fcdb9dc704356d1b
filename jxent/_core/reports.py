"""Reports of the losses under `jax.experimental.checkify`: the fault of an array, a bad value, and its index.

One array passes through a primitive, which returns it unchanged and takes the array to check as another operand. The
primitive has no effect, and the compiler never sees it. `checkify` reads a program before compilation, and its rule for
the primitive checks the array. (With `checkify.debug_check` in the losses, a call takes 15 times as long to dispatch,
and its effect keeps `jax.export` from serializing the program.)

The labels pass if there are class labels, because they are mostly small. Otherwise the losses pass, or the logits of P
for a divergence of given logits. A large array that passes may be kept once more for the backward pass.
"""

import abc
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jaxtyping import Bool

from jxent._core.indexing import out_of_range
from jxent._core.shards import AxisNames, by_compiler, total

try:  # JAX has no public place for the rules of checkify. If a later JAX moves them, nothing is reported.
    from jax._src.checkify import error_checks
except ImportError:
    error_checks = {}


class Fault(abc.ABC):
    """A fault that an array may have. Static.

    `jax.vmap` may put axes before those that the loss knows. So an axis is counted from the end.
    """

    @property
    @abc.abstractmethod
    def message(self) -> str:
        """The message of the report, with the fields `{value}` and `{index}`."""

    @abc.abstractmethod
    def look(self, array: Array, mask: Array | None) -> tuple[Bool[Array, "*shape"], Array]:
        """(where the array is bad and not masked, the values to report), both with the same shape."""


@dataclass(frozen=True, kw_only=True)
class OutOfRange(Fault):
    """Class indices that no class has."""

    function: str
    classes: int

    @property
    def message(self) -> str:
        return (
            f"{self.function}: label {{value}} is out of range for {self.classes} classes, at {{index}}; labels must "
            f"be in [0, {self.classes}) or equal ignore_index"
        )

    def look(self, array: Array, mask: Array | None) -> tuple[Array, Array]:
        return out_of_range(array, self.classes), array


@dataclass(frozen=True, kw_only=True)
class NoSuchClass(OutOfRange):
    """Indices of `linear_log_probs` that no class has, except -1."""

    @property
    def message(self) -> str:
        return (
            f"{self.function}: index {{value}} is out of range for {self.classes} classes, at {{index}}; indices must "
            f"be in [0, {self.classes}), or -1 for no class"
        )

    def look(self, array: Array, mask: Array | None) -> tuple[Array, Array]:
        return _where_kept(out_of_range(array, self.classes) & (array != -1), mask), array


@dataclass(frozen=True, kw_only=True)
class NotFinite(Fault):
    function: str
    name: str
    masked: bool  # whether -inf is a masked class

    @property
    def message(self) -> str:
        return f"{self.function}: {self.name} has {{value}} at {{index}}"

    def look(self, array: Array, mask: Array | None) -> tuple[Array, Array]:
        bad = jnp.isnan(array) | (array == jnp.inf)
        return _where_kept(bad if self.masked else bad | (array == -jnp.inf), mask), array


@dataclass(frozen=True, kw_only=True)
class Negative(Fault):
    """Class probabilities below 0."""

    function: str

    @property
    def message(self) -> str:
        return f"{self.function}: labels are class probabilities, and one is {{value}}, at {{index}}"

    def look(self, array: Array, mask: Array | None) -> tuple[Array, Array]:
        return _where_kept(array < 0, mask), array


@dataclass(frozen=True, kw_only=True)
class NotShare(Fault):
    """Sigmoid labels, each the share of a yes, that are outside of [0, 1]."""

    function: str

    @property
    def message(self) -> str:
        return f"{self.function}: label {{value}} is outside of [0, 1], at {{index}}"

    def look(self, array: Array, mask: Array | None) -> tuple[Array, Array]:
        return _where_kept(is_no_share(array), mask), array


@dataclass(frozen=True, kw_only=True)
class NotOne(Fault):
    """Class probabilities that do not sum to 1."""

    function: str
    axis: int
    axis_name: AxisNames

    @property
    def message(self) -> str:
        return f"{self.function}: labels are class probabilities, and sum to {{value}} instead of 1, at {{index}}"

    def look(self, array: Array, mask: Array | None) -> tuple[Array, Array]:
        sums = jnp.sum(array, self.axis, keepdims=True, dtype=jnp.float32)
        sums = total(sums, self.axis_name)
        bad = _where_kept(jnp.abs(sums - 1) > rounding_of(array.dtype), mask)
        return jnp.squeeze(bad, self.axis), jnp.squeeze(sums, self.axis)


def is_no_share(labels: Array) -> Bool[Array, "*shape"]:
    """Where a floating-point label is outside of [0, 1], by more than rounding."""
    rounding = rounding_of(labels.dtype)
    return (labels < -rounding) | (labels > 1 + rounding)


def rounding_of(dtype: Any) -> float:
    """The error that is allowed for probabilities or their sum."""
    return max(1e-3, 4 * float(jnp.finfo(dtype).eps))


def _where_kept(bad: Array, mask: Array | None) -> Array:
    return bad if mask is None else bad & mask


def report_values(
    function: str, mask: Array | None, through: Array, masked: tuple[str, ...] = (), **arrays: Array | None
) -> Array:
    """`through`, with a report of values of the arrays that are not finite.

    Each array is given by name, or as None. `mask` broadcasts to all of them, or is None for arrays without positions.
    In arrays that `masked` names, -inf is a masked class and no fault.
    """
    for name, array in arrays.items():
        if array is not None:
            through = report(NotFinite(function=function, name=name, masked=name in masked), through, array, mask)
    return through


# --- the primitive ----------------------------------------------------------------------------------------------------

reported_p = Primitive("jxent_reported")


def report(fault: Fault, through: Array, array: Array, mask: Array | None = None) -> Array:
    """`through`, with a report of the first fault of the array at unmasked positions."""
    if array.size == 0:
        return through
    looked_at = (array,) if mask is None else (array, mask)
    return reported_p.bind(through, *looked_at, fault=fault, has_mask=mask is not None)


@reported_p.def_impl
@reported_p.def_abstract_eval
def _as_it_is(through: Any, *looked_at: Any, **_: Any) -> Any:
    return through


def _jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    return reported_p.bind(*primals, **params), tangents[0]


def _batched(operands: Any, axes: Any, **params: Any) -> tuple[Any, Any]:
    """Puts the mapped axis of array and mask first. A mask that alone is mapped becomes the union of the masks."""
    (through, array, *mask), (of_through, axis, *of_mask) = operands, axes

    def in_front(mask: Array, at: int | None) -> Array:
        if axis is None:
            return mask if at is None else jnp.any(mask, at)
        return mask[None] if at is None else jnp.moveaxis(mask, at, 0)

    array = array if axis is None else jnp.moveaxis(array, axis, 0)
    return reported_p.bind(through, array, *map(in_front, mask, of_mask), **params), of_through


def _checkify(*operands: Any, fault: Fault, has_mask: bool) -> tuple[Any, Any]:
    """(the previous error or this array's, `through`). The first operands are those of all `checkify` rules of JAX."""
    context, (through, *looked_at) = operands[: -2 - has_mask], operands[-2 - has_mask :]
    found = by_compiler(partial(_first_bad, fault), PartitionSpec(), *looked_at)

    @jax.jit
    def check(value: Array, index: Array, is_bad: Array) -> None:
        checkify.debug_check(~is_bad, fault.message, value=value, index=index)

    (call,) = jax.make_jaxpr(check)(*found).eqns
    error, _ = error_checks[call.primitive](*context, *found, **call.params)
    return error, through


def _first_bad(fault: Fault, array: Array, mask: Array | None = None) -> tuple[Array, Array, Array]:
    """(the first bad value, its index, whether there is one).

    The index is found one axis after the other, because a flat index could exceed int32.
    """
    bad, values = fault.look(array, mask)
    is_bad, index = jnp.any(bad), []
    for _ in range(bad.ndim):
        at = jnp.argmax(jnp.any(bad, range(1, bad.ndim)))
        index.append(at)
        bad, values = bad[at], values[at]
    return values, jnp.array(index, jnp.int32), is_bad


ad.primitive_jvps[reported_p] = _jvp
batching.primitive_batchers[reported_p] = _batched
mlir.register_lowering(reported_p, lambda ctx, through, *looked_at, **_: [through])
error_checks[reported_p] = _checkify
