"""The maximum of each row of logits, and the logarithm of the row's normalizer, without cancellation.

With the row maximum m = max x and r = sum of exp(x[j] - m) over every class but the one at the maximum,

    log_z = log1p(r)                       # log sum exp(x - m)
    log p[j] = (x[j] - m) - log_z          # both terms <= 0: nothing cancels
    p[j] - 1 = expm1(log p[j])

`m` and `log_z` are kept as two numbers, because their sum loses the digits of log_z if |m| >> 1. If the label t is
known, its class can be left out instead of the maximum's. With d = x[t] - m,

    log_z = log1p(sum over j != t of exp(x[j] - m) + expm1(d))

Then the loss log_z - d is as exact, although log_z alone is not. This form saves one pass over the logits.

A temperature divides x - m everywhere, and m in log_normalizer = m / temperature + log_z.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from jxent._core.forward_mode import linear, mapped_with
from jxent._core.shards import (
    AxisNames,
    Shards,
    class_offset,
    each_shards_own,
    gradient_of_copies,
    largest,
    shards_of,
    shared_cotangent,
)
from jxent._rows.passes import Arrays, Class, Logits, Moving, Passes, Row
from jxent._rows.reduction import RowSums
from jxent._rows.terms import below_top_of_exponentials, centered, confident, rounded


class Normalizer(NamedTuple):
    """Row arrays (see `passes`), and the exponentials if they are kept."""

    row_max: Row  # the largest logit, upcast; 0 in a row of -inf, so that x - m is not NaN
    log_z: Row  # log sum exp(x - m); 0 in a row of -inf, so that p = 0 there
    log_normalizer: Row  # log sum exp x
    exp: Logits | None  # exp(x - m), of the logits' shape, except 0 at a label that is left out


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6, 7))
def normalizer(
    logits: Logits,
    label: tuple[Int[Array, "*row"], Row] | None,
    temperature: Row | None,
    axis: tuple[int, ...],
    cap: float | None,
    dtype: jnp.dtype,
    save_exp: bool = False,
    axis_name: AxisNames = (),
    row_max: Row | None = None,
) -> Normalizer:
    """The `Normalizer` of the logits over the class axes.

    `label` is (the class to leave out of the sum, its logit), both row arrays. None leaves out the maximum. With
    `save_exp` the exponentials are computed once and kept, in an array of the logits' size. If the largest
    logit is given as `row_max`, two passes are saved. Then log_z may lose digits if it is close to 0. Its derivatives
    are exact all the same.
    """
    # The maximum is taken before the upcast. After it, both passes would read one upcast copy, which would be stored.
    top = row_max
    if top is None:
        initial = -jnp.inf if 0 in logits.shape else None
        top = largest(jnp.max(logits, axis, keepdims=True, initial=initial), axis_name)
    known_max, row_max = row_max is not None, top.astype(dtype)
    empty = row_max == -jnp.inf
    row_max = jnp.where(empty, 0, row_max)
    passes = Passes(
        arrays=Arrays(logits=logits, row_max=row_max, temperature=temperature),
        axis=axis,
        dtype=dtype,
        softcap=cap,
        axis_name=axis_name,
        previous=row_max,
    )
    add_up = passes.save_exponentials if save_exp else passes.sum_of_exponentials
    if label is not None:
        index, logit = label
        rest = add_up(but=index) + jnp.expm1(passes.z_of(rounded(logit.astype(dtype), jnp.ones((), dtype))))
    elif known_max:
        rest = add_up() - 1
    else:
        everything = add_up()
        below = passes.sum(lambda c: c.exp_z * below_top_of_exponentials(c.exp_z, c.one))
        # If the sum is at least 1.5, subtracting 1 loses little. If the sum is less, the maximum is unique.
        rest = jnp.where(everything < 1.5, below, everything - 1)
    shards = shards_of(axis_name)
    row = _normalizer(row_max, passes.top(), empty, rest, shards, class_offset(shards, 1))
    return mapped_with(row._replace(exp=passes.arrays.exp), (logits, label, temperature))


def normalizer_of(sums: RowSums, shards: Shards, offset: Int[Array, ""] | None) -> Normalizer:
    """The `Normalizer` from what one reduction has found, over all shards."""
    empty = sums.row_max == -jnp.inf
    row_max = jnp.where(empty, 0, sums.row_max)
    return _normalizer(row_max, row_max, empty, sums.rest, shards, offset)


def _normalizer(
    row_max: Row, top: Row, empty: Array, rest: Row, shards: Shards, offset: Int[Array, ""] | None
) -> Normalizer:
    """The `Normalizer` without exponentials. `top` is m divided by the temperature, and `rest` is that of one class."""
    empty &= rest == rest  # a maximum over shards may ignore NaN
    log_z = jnp.log1p(jnp.where(empty, 0, rest))
    log_normalizer = jnp.where(top == jnp.inf, jnp.inf, top + log_z)  # where log_z is NaN
    log_normalizer = jnp.where(empty, -jnp.inf, log_normalizer)
    # `jax.vmap` would otherwise take these values as shared by the shards and their tangents as not shared.
    row_max, log_z, log_normalizer = each_shards_own((row_max, log_z, log_normalizer), shards, offset)
    return Normalizer(row_max=row_max, log_z=log_z, log_normalizer=log_normalizer, exp=None)


# With dz[j] = dx[j] - dm, d log_z = sum of p[j] dz[j]. Any dm is right, because a shift of all logits changes no
# probability. If the largest logit has p of 2/3 or more, dm is the tangent of that logit (`terms.centered`). Otherwise
# dm is 0, which adds no terms that cancel. With a temperature T, dz[j] is (dx[j] - dm - z[j] dT) / T. These sums are a
# `linear` map, so that XLA:CPU fuses each into one pass.
@normalizer.defjvp
def _normalizer_jvp(
    axis: tuple[int, ...],
    cap: float | None,
    dtype: jnp.dtype,
    save_exp: bool,
    axis_name: AxisNames,
    primals: Any,
    tangents: Any,
) -> tuple[Normalizer, Normalizer]:
    logits, label, temperature, row_max = primals
    out = normalizer(logits, label, temperature, axis, cap, dtype, save_exp, axis_name, row_max)
    shards = shards_of(axis_name)

    def passes_of(residuals: Sequence[Array], moving: Moving | None = None) -> Passes:
        logits, row_max, log_z, *temperature = residuals
        arrays = Arrays(
            logits=logits,
            row_max=row_max,
            log_z=log_z,
            temperature=temperature[0] if temperature else None,
            moving=moving,
        )
        return Passes(arrays=arrays, axis=axis, dtype=dtype, softcap=cap, axis_name=axis_name, previous=log_z)

    def apply(residuals: Sequence[Array], directions: Sequence[Array]) -> Sequence[Array]:
        row_max, log_z = residuals[1:3]
        sure, moving = confident(log_z), Moving(logits=directions[0], temperature=_second(directions))
        passes = passes_of(residuals, moving)
        drow_max = passes.sum(lambda c, sure: sure * c.at_max * c.dlogit, sure)
        passes.moving(moving._replace(reference=passes.dx_of(row_max, drow_max)))
        dlog_z = passes.sum(lambda c, sure: c.p * c.dz * (c.one - sure * c.at_max), sure)
        return [drow_max, dlog_z]

    def transpose(residuals: Sequence[Array], cotangents: Sequence[Array]) -> Sequence[Array]:
        logits, row_max, log_z, *temperature = residuals
        to_row_max, to_log_z = shared_cotangent(cotangents, shards)
        passes = passes_of(residuals)
        others = passes.sum(lambda c, sure: c.p * (c.one - sure * c.at_max), confident(log_z))
        of_others = to_log_z * others / temperature[0] if temperature else to_log_z * others
        at_top = to_row_max - passes.dx_of(row_max, of_others)

        def gradient(c: Class, sure: Row, to_log_z: Row, at_top: Row) -> Logits:
            return jnp.where(sure * c.at_max > 0, at_top.astype(logits.dtype), c.to_logit(c.p * to_log_z))

        to_logits = passes.map(gradient, confident(log_z), to_log_z, at_top)
        if not temperature:
            return [to_logits]
        mean = gradient_of_copies(passes.share_of_sum(lambda c: c.p * c.held_z), temperature[0], shards)
        to_temperature = -to_log_z * mean / temperature[0]
        shared = tuple(a for a, size in enumerate(temperature[0].shape) if size == 1)
        return [to_logits, jnp.sum(to_temperature, shared, keepdims=True)]

    dlogits, _, dtemperature, _ = tangents
    residuals, directions = [logits, out.row_max, out.log_z], [dlogits]
    if temperature is not None:
        residuals, directions = [*residuals, temperature], [*directions, dtemperature]
    drow_max, dlog_z = linear(apply, transpose, residuals, directions, [out.row_max, out.log_z])
    passes, dexp = passes_of(residuals, Moving(temperature=_second(directions))), None
    if out.exp is not None:

        def z_of(logits: Logits, row_max: Row, temperature: Row | None) -> Logits:
            return centered(logits, row_max, out.log_z, temperature, cap, jnp.ones((), dtype))

        dz = jax.jvp(z_of, (logits, out.row_max, temperature), (dlogits, drow_max, dtemperature))[1]
        dexp = out.exp * dz
    dtop = passes.dtop(passes.dx_of(out.row_max, drow_max))
    return out, Normalizer(row_max=drow_max, log_z=dlog_z, log_normalizer=dtop + dlog_z, exp=dexp)


def _second(arrays: Sequence[Array]) -> Array | None:
    """The second array, of the temperature; None without a temperature."""
    return arrays[1] if len(arrays) > 1 else None
