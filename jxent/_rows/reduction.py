"""All numbers that a row of logits comes down to, in one reduction: the form of GPUs and TPUs.

A GPU reads the logits once for it, where the passes of `normalizer` read them two to four times. A TPU computes the
reduction within the matmul before it, and never writes the logits.

Two parts of a row are combined as follows. The larger of two maxima is the maximum m. The sums of exponentials of the
part with the lower maximum are rescaled. Each rescaling rounds, so a row that rises slowly would be rounded at every
class. Therefore sums are relative to an anchor, the largest multiple of 16 that is not above the maximum:

    anchor(m) = 16 floor(m / 16)
    rest      = sum of exp(x[j] - anchor(m)) over all classes but one with the largest logit

A sum is rescaled only if the anchor rises, and then shrinks by a factor of exp(-16). So what was rounded before hardly
counts. The factor is applied as two square roots, because it may vanish although the sum that it multiplies is large.
One class with the largest logit stays out of the sum, so log_z = log1p(rest exp(anchor(m) - m)) is exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from jxent._backend.fusion import barrier
from jxent._backend.platform import by_platform
from jxent._core.shards import ClassAxis, cast, largest, sharded_like, smallest, total, varying
from jxent._rows.passes import Logits, Row, zeros_of

STEP = 16.0


class Wanted(NamedTuple):
    """The parts of `RowSums` that a caller wants besides the maximum and the sum of exponentials."""

    distance: bool = False
    linear: bool = False
    prediction: bool = False


class RowSums(NamedTuple):
    """Row arrays of some classes of each position; m is their largest logit. None if not wanted."""

    row_max: Row  # m
    rest: Row  # sum of exp(x[j] - anchor(m)) over all classes but one with the logit m
    label_logit: Row | None = None  # the label's logit; 0 if these classes lack the label
    distance: Row | None = None  # sum of exp(x[j] - anchor(m)) (m - x[j])
    present: Row | None = None  # the number of classes that are not masked with -inf
    linear: Row | None = None  # the sum of m - x[j] over these classes
    prediction: Int[Array, "*row"] | None = None  # the first class with the logit m


def _anchor(m: Array) -> Array:
    """The anchor of a maximum; of -inf, the smallest number, so that differences of anchors are not NaN."""
    return STEP * jnp.floor(jnp.maximum(m, jnp.finfo(m.dtype).min) / STEP)


def _difference(m: Array, low: Array) -> Array:
    """m - low, which is finite for any logits but +inf, and 0 if both are -inf."""
    end = jnp.finfo(m.dtype)
    return jnp.minimum(jnp.maximum(m, end.min) - jnp.maximum(low, end.min), end.max)


def _joined(a: RowSums, b: RowSums) -> RowSums:
    """The `RowSums` of the classes of both."""
    m, low = jnp.maximum(a.row_max, b.row_max), jnp.minimum(a.row_max, b.row_max)
    if a.prediction is None or b.prediction is None:
        take_b, prediction = a.row_max < b.row_max, None
    else:
        before = (a.row_max == b.row_max) & (a.prediction < b.prediction)
        take_b = ~((a.row_max > b.row_max) | (a.row_max != a.row_max) | before)
        prediction = lax.select(take_b, b.prediction, a.prediction)
    anchor = _anchor(m)
    root = jnp.exp((_anchor(low) - anchor) / 2)
    at_low = jnp.exp(low - anchor)

    def scaled(of_low: Array) -> Array:
        return (of_low * root) * root

    def parts(of_a: Array, of_b: Array) -> tuple[Array, Array]:
        """(the sum of the part with the larger maximum, that of the other part)."""
        return lax.select(take_b, of_b, of_a), lax.select(take_b, of_a, of_b)

    rest, of_low = parts(a.rest, b.rest)
    of_low = scaled(of_low) + at_low
    out = RowSums(row_max=m, rest=rest + of_low, prediction=prediction)
    if a.label_logit is not None and b.label_logit is not None:
        out = out._replace(label_logit=a.label_logit + b.label_logit)
    apart = _difference(m, low)
    if a.distance is not None and b.distance is not None:
        distance, low_distance = parts(a.distance, b.distance)
        out = out._replace(distance=distance + (scaled(low_distance) + apart * of_low))
    if a.present is not None and b.present is not None and a.linear is not None and b.linear is not None:
        _, low_present = parts(a.present, b.present)
        out = out._replace(present=a.present + b.present, linear=(a.linear + b.linear) + apart * low_present)
    return out


def row_sums(
    logits: Logits, index: Int[Array, "*row"] | None, wanted: Wanted, dtype: jnp.dtype, classes: ClassAxis
) -> RowSums:
    """The `RowSums` of all classes, with `rest` and `distance` relative to the maximum instead of the anchor.

    `index` is the label's class, counted from this shard's first class.
    """
    axis = classes.axis
    x = logits.astype(dtype)
    zero = zeros_of(logits, dtype)
    places = cast(sharded_like(lax.broadcasted_iota(jnp.int32, x.shape, axis), logits), varying(logits))
    operands = RowSums(
        row_max=x,
        rest=zero,
        label_logit=None if index is None else jnp.where(places == index, x, zero),
        distance=zero if wanted.distance else None,
        present=jnp.where(x == -jnp.inf, zero, 1) if wanted.linear else None,
        linear=zero if wanted.linear else None,
        prediction=places if wanted.prediction else None,
    )

    def reduced(blocks: int, operands: RowSums) -> RowSums:
        return _reduced(operands, axis, blocks)

    sums = by_platform(lambda backend: backend.blocks_of_reduction(classes.size), reduced, operands)
    sums = _relative_to_max(sums)
    return _over_shards(sums, classes) if classes.shards.axis_name else sums


def _reduced(operands: RowSums, axis: int, blocks: int) -> RowSums:
    arrays, tree = jax.tree.flatten(operands)
    of_nothing = [-jnp.inf] + [0.0] * (len(arrays) - 1)  # `row_max` is the first
    initial = [jnp.array(value, array.dtype) for value, array in zip(of_nothing, arrays, strict=True)]

    def joined(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jax.tree.leaves(_joined(tree.unflatten(a), tree.unflatten(b))))

    def reduced(arrays: list[Array], axis: int) -> list[Array]:
        return [*lax.reduce(tuple(arrays), tuple(initial), joined, (axis,))]

    if blocks > 1:
        size = arrays[0].shape[axis]
        whole = size // blocks * blocks

        def in_blocks(array: Array) -> Array:
            part = lax.slice_in_dim(array, 0, whole, axis=axis)
            return part.reshape(*part.shape[:axis], blocks, whole // blocks, *part.shape[axis + 1 :])

        of_blocks = reduced([in_blocks(array) for array in arrays], axis + 1)
        rest = [lax.slice_in_dim(array, whole, size, axis=axis) for array in arrays]
        arrays = [jnp.concatenate(both, axis) for both in zip(of_blocks, rest, strict=True)]
    return tree.unflatten([jnp.expand_dims(array, axis) for array in reduced(arrays, axis)])


def _relative_to_max(sums: RowSums) -> RowSums:
    m = sums.row_max
    factor = jnp.where(m == -jnp.inf, 0, jnp.exp(_anchor(m) - m))
    distance = None if sums.distance is None else sums.distance * factor
    return sums._replace(rest=sums.rest * factor, distance=distance)


def _over_shards(sums: RowSums, classes: ClassAxis) -> RowSums:
    """The `RowSums` of the classes of all shards, from those of this shard, relative to the maximum."""
    axis_name, one = classes.shards.axis_name, jnp.ones((), sums.row_max.dtype)
    # The maximum of a shard is compared with that of all shards. If a compiler computed it again for that, and rounded
    # it differently, no shard would have the maximum. The barrier makes it one number.
    sums = barrier(sums)
    m = largest(sums.row_max, axis_name)
    has_max = sums.row_max == m
    apart = _difference(m, sums.row_max)
    root = jnp.exp(-apart / 2)
    below = (sums.rest * root) * root + jnp.where(has_max | (sums.row_max == -jnp.inf), 0, root * root)
    # Each shard leaves out its largest class. So of n shards that have the maximum, n - 1 are put in again.
    parts = {"rest": below, "number": jnp.where(has_max, one, 0)}
    if sums.label_logit is not None:
        parts["label_logit"] = sums.label_logit
    if sums.distance is not None:
        parts["distance"] = (sums.distance * root) * root + apart * below
    if sums.present is not None and sums.linear is not None:
        parts |= {"present": sums.present, "linear": sums.linear + apart * sums.present}
    of_all = {name: total(part, axis_name) for name, part in parts.items()}
    prediction = sums.prediction
    if prediction is not None and classes.offset is not None:
        best = jnp.where(jnp.isnan(sums.row_max), jnp.inf, sums.row_max)  # a maximum over shards may ignore NaN
        best = best == largest(best, axis_name)
        prediction = smallest(jnp.where(best, prediction + classes.offset, jnp.iinfo(jnp.int32).max), axis_name)
    rest = of_all.pop("rest") + (of_all.pop("number") - 1)
    return RowSums(row_max=m, rest=rest, prediction=prediction, **of_all)
