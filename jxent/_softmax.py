"""`logsumexp`, `softmax` and `log_softmax`, exact in value and gradient.

They use the formulas of `normalizer`: log p = (x - m) - log_z with log_z = log1p(the rest of the row), computed in at
least float32. No temporary array has the size of the logits, except the masked logits of `logsumexp` with `where`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jxent._call import checks
from jxent._call.annotations import ArrayLike, AxisName
from jxent._call.axis_names import Sharded, mesh_axes
from jxent._call.names import known_names
from jxent._call.placement import CLASSES, placed
from jxent._core.dtypes import compute_dtype
from jxent._core.forward_mode import moving_where, with_forward_mode
from jxent._core.shards import (
    Shards,
    cast,
    class_offset,
    each_shards_own,
    shared_cotangent,
    varying_together,
)
from jxent._rows import targets
from jxent._rows.normalizer import normalizer
from jxent._rows.passes import Arrays, Class, Logits, Moving, Passes, Row

Axis = int | tuple[int, ...] | None


@known_names
def logsumexp(
    logits: Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    keepdims: bool = False,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Logarithm of the sum of the exponentials of the logits, the softmax's log-normalizer, in nats.

    Args:
      logits: float16, bfloat16, float32 or float64.
      axis: the axis or axes to sum over; None for all.
      where: boolean, broadcasts to the logits; classes to include.
      keepdims: keep the summed axes with size 1.
      axis_name: the mesh axis or axes over which `axis` is sharded; the sum is over all shards. Inside `jax.shard_map`,
        pass this shard's logits. Elsewhere, pass whole logits; the mesh shards the first of several axes.

    Returns:
      The logits' shape without `axis`, in the logits' dtype. A row without classes has -inf, with a gradient of 0.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> print(jxent.logsumexp(jnp.array([0.0, -20.0])))
      2.0611537e-09

    References:
      https://docs.jax.dev/en/latest/_autosummary/jax.nn.logsumexp.html
    """
    keepdims = checks.flag("logsumexp", "keepdims", keepdims)
    return _call("logsumexp", _logsumexp, logits, axis, where, axis_name, keepdims)


@known_names
def softmax(
    logits: Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "*shape"]:
    """Softmax: ``exp(logits - logsumexp(logits))``.

    Args:
      logits: float16, bfloat16, float32 or float64.
      axis: the class axis or axes, over which the probabilities sum to 1; None for all.
      where: boolean, broadcasts to the logits; classes to include. The others have probability 0.
      axis_name: the mesh axis or axes over which `axis` is sharded, as in `logsumexp`.

    Returns:
      Probabilities, in the logits' shape and dtype; 0 in a row without classes (all -inf or all excluded).

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> print(jxent.softmax(jnp.array([1.0, 1.0, -jnp.inf])))
      [0.5 0.5 0. ]

    References:
      https://docs.jax.dev/en/latest/_autosummary/jax.nn.softmax.html
    """
    return _call("softmax", _softmax, logits, axis, where, axis_name)


@known_names
def log_softmax(
    logits: Float[ArrayLike, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[ArrayLike, "*#shape"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "*shape"]:
    """Logarithm of the softmax, in nats: ``logits - logsumexp(logits)`` in full relative precision.

    Args:
      logits: float16, bfloat16, float32 or float64.
      axis: the class axis or axes; None for all.
      where: boolean, broadcasts to the logits; classes to include. The others have log-probability -inf.
      axis_name: the mesh axis or axes over which `axis` is sharded, as in `logsumexp`.

    Returns:
      Log-probabilities, in the logits' shape and dtype; -inf in a row without classes.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> print(jxent.log_softmax(jnp.array([0.0, -20.0])))
      [-2.0611537e-09 -2.0000000e+01]

    References:
      https://docs.jax.dev/en/latest/_autosummary/jax.nn.log_softmax.html
    """
    return _call("log_softmax", _log_softmax, logits, axis, where, axis_name)


class _Classes(NamedTuple):
    """The axes and shards of the classes; static."""

    axis: tuple[int, ...]
    shards: Shards


def _call(
    name: str,
    function: Callable[..., Any],
    given: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    axis_name: AxisName | None,
    keepdims: bool = True,
) -> Array:
    logits = checks.floating(name, "logits", given)
    mask = checks.mask(name, where, logits.shape, "the logits", "compare it (mask != 0)")
    axes = checks.class_axes(name, logits, axis)
    over = mesh_axes(name, axis_name, Sharded(name="logits", array=logits, axes=axes))
    # A mesh shards the first class axis.
    dimensions = tuple(CLASSES if a in axes[:1] else None for a in range(logits.ndim))
    static = function, _Classes(axis=axes, shards=over.shards), keepdims
    return placed(name, over.placement, _masked, static, (logits, mask), (dimensions, dimensions))


def _masked(
    function: Callable[..., Any],
    classes: _Classes,
    keepdims: bool,
    logits: Logits,
    where: Bool[Array, "*#shape"] | None,
) -> Array:
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    out, _ = function(classes, cast(logits, varying_together(logits, axis_name=classes.shards.axis_name)))
    return out if keepdims else jnp.squeeze(out, classes.axis)


class _Residuals(NamedTuple):
    logits: Logits
    row_max: Row
    log_z: Row

    def passes(self, classes: _Classes, g: Logits | None = None) -> Passes:
        """Passes over the logits. If the result has a cotangent `g`, the passes have it as `Class.q`."""
        return Passes(
            arrays=Arrays(logits=self.logits, q=g, row_max=self.row_max, log_z=self.log_z),
            axis=classes.axis,
            dtype=self.row_max.dtype,
            axis_name=classes.shards.axis_name,
            previous=self.log_z,
        )


def _normalizer(classes: _Classes, logits: Logits) -> tuple[Row, _Residuals]:
    """(log_normalizer, `_Residuals`)."""
    dtype = compute_dtype(logits.dtype)
    row = normalizer(logits, None, None, classes.axis, None, dtype, False, classes.shards.axis_name)
    return row.log_normalizer, _Residuals(logits=logits, row_max=row.row_max, log_z=row.log_z)


def _mapped(term: Callable[[Class], Array], classes: _Classes, logits: Logits) -> tuple[Array, _Residuals]:
    """(the array of a term, in the logits' dtype, and `_Residuals`)."""
    _, residuals = _normalizer(classes, logits)
    return residuals.passes(classes).map(term).astype(logits.dtype), residuals


def _moved(classes: _Classes, residuals: _Residuals, dlogits: Logits) -> tuple[Passes, Row, Row]:
    """(passes that know the tangents, the tangent of log_z, the tangent of the largest logit), see `Class.dz`."""
    passes = residuals.passes(classes)
    passes.moving(Moving(logits=dlogits))
    reference = passes.mean_at_max(lambda c: c.dx)
    passes.moving(Moving(logits=dlogits, reference=reference))
    return passes, passes.sum(lambda c: c.p * c.dz), reference


# --- logsumexp: d / dx[j] = p[j] --------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logsumexp_rule(classes: _Classes, logits: Logits) -> tuple[Array, None]:
    return _logsumexp_fwd(classes, logits)[0]


def _logsumexp_fwd(classes: _Classes, logits: Logits) -> tuple[tuple[Array, None], _Residuals]:
    log_normalizer, residuals = _normalizer(classes, logits)
    out = log_normalizer.astype(logits.dtype)
    return (each_shards_own(out, classes.shards, class_offset(classes.shards, 1)), None), residuals


def _logsumexp_bwd(classes: _Classes, residuals: _Residuals, cotangents: Any) -> tuple[Logits]:
    cotangent = shared_cotangent(cotangents[0], classes.shards)
    p = residuals.passes(classes).map(lambda c: c.p)
    return ((cotangent.astype(p.dtype) * p).astype(residuals.logits.dtype),)


def _logsumexp_tangent(classes: _Classes, residuals: _Residuals, dlogits: Logits) -> Array:
    _, log_z, reference = _moved(classes, residuals, dlogits)
    return (log_z + reference).astype(dlogits.dtype)


_logsumexp_rule.defvjp(_logsumexp_fwd, _logsumexp_bwd)
_logsumexp = with_forward_mode(_logsumexp_rule, _logsumexp_tangent)


# --- softmax: with cotangent g, dx[j] = p[j] (g[j] - sum of p g) ------------------------------------------------------
#
# If one class has p near 1, g[j] - sum of p g cancels for this class. Any constant may be subtracted from g. With the g
# of the largest logit (the mean, if several are largest), this class adds 0 to the sum, and nothing cancels. Tangents
# have the same formula, because the Jacobian is symmetric.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax_rule(classes: _Classes, logits: Logits) -> tuple[Array, None]:
    return _softmax_fwd(classes, logits)[0]


def _softmax_fwd(classes: _Classes, logits: Logits) -> tuple[tuple[Array, None], _Residuals]:
    out, residuals = _mapped(lambda c: c.p, classes, logits)
    return (out, None), residuals


def _softmax_bwd(classes: _Classes, residuals: _Residuals, cotangents: Any) -> tuple[Logits]:
    return (_softmax_tangent(classes, residuals, cotangents[0]),)


def _softmax_tangent(classes: _Classes, residuals: _Residuals, direction: Logits) -> Array:
    passes = residuals.passes(classes, direction)
    center = passes.mean_at_max(lambda c: c.q)
    mean = passes.sum(lambda c, center: c.p * (c.q - center), center)
    out = passes.map(lambda c, center, mean: c.p * ((c.q - center) - mean), center, mean)
    return out.astype(residuals.logits.dtype)


_softmax_rule.defvjp(_softmax_fwd, _softmax_bwd)
_softmax = with_forward_mode(_softmax_rule, _softmax_tangent)


# --- log_softmax: with cotangent g, dx[j] = g[j] - p[j] sum of g ------------------------------------------------------
#
# It is minus the gradient of a target (`targets`) with the shares g. The g of a masked class (-inf) is left out.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_softmax_rule(classes: _Classes, logits: Logits) -> tuple[Array, None]:
    return _log_softmax_fwd(classes, logits)[0]


def _log_softmax_fwd(classes: _Classes, logits: Logits) -> tuple[tuple[Array, None], _Residuals]:
    out, residuals = _mapped(lambda c: moving_where(~c.masked, c.log_p), classes, logits)
    return (out, None), residuals


def _log_softmax_bwd(classes: _Classes, residuals: _Residuals, cotangents: Any) -> tuple[Logits]:
    passes = residuals.passes(classes, cotangents[0])
    sums = targets.sums(passes, lambda c: c.present * c.q)
    grad = passes.map(lambda c, sums: jnp.where(c.masked, 0, -targets.gradient(c, c.q, sums)), sums)
    return (grad.astype(residuals.logits.dtype),)


def _log_softmax_tangent(classes: _Classes, residuals: _Residuals, dlogits: Logits) -> Array:
    passes, log_z, _ = _moved(classes, residuals, dlogits)
    moved = passes.map(lambda c, log_z: jnp.where(c.masked, 0, c.dz - log_z), log_z)
    return moved.astype(residuals.logits.dtype)


_log_softmax_rule.defvjp(_log_softmax_fwd, _log_softmax_bwd)
_log_softmax = with_forward_mode(_log_softmax_rule, _log_softmax_tangent)
