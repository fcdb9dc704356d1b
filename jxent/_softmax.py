"""`logsumexp`, `softmax` and `log_softmax`, exact in value and gradient.

The formulas are those of `normalizer`: log p = (x - m) - log_z with log_z = log1p(the rest of the row). Computed in at
least float32; no temporary of the size of the logits, except that `logsumexp` with `where` writes the masked logits.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jxent._core import targets
from jxent._core.forward_mode import moving_where, with_forward_mode
from jxent._core.normalizer import normalizer
from jxent._core.passes import Arrays, Moving, Passes, compute_dtype
from jxent._core.shards import (
    Shards,
    cast,
    each_shards_own,
    first_class,
    shared_cotangent,
    varying_together,
)
from jxent._loss import checks
from jxent._loss.annotations import ArrayLike, AxisName
from jxent._loss.axis_names import Sharded, mesh_axes
from jxent._loss.names import known_names
from jxent._loss.placement import CLASSES, placed

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
      axis_name: the mesh axis or axes over which `axis` is sharded; the sum is over all shards. Inside `jax.shard_map`
        the logits are this shard's; elsewhere they are whole, and the first of several axes is sharded over the mesh.

    Returns:
      The logits' shape without `axis`, in the logits' dtype; -inf where nothing is summed, with a gradient of 0.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Example:
      >>> import jax.numpy as jnp, jxent
      >>> print(jxent.logsumexp(jnp.array([0.0, -20.0])))
      2.0611537e-09

    Reference: https://docs.jax.dev/en/latest/_autosummary/jax.nn.logsumexp.html
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

    Example:
      >>> import jax.numpy as jnp, jxent
      >>> print(jxent.softmax(jnp.array([1.0, 1.0, -jnp.inf])))
      [0.5 0.5 0. ]

    Reference: https://docs.jax.dev/en/latest/_autosummary/jax.nn.softmax.html
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

    Example:
      >>> import jax.numpy as jnp, jxent
      >>> print(jxent.log_softmax(jnp.array([0.0, -20.0])))
      [-2.0611537e-09 -2.0000000e+01]

    Reference: https://docs.jax.dev/en/latest/_autosummary/jax.nn.log_softmax.html
    """
    return _call("log_softmax", _log_softmax, logits, axis, where, axis_name)


class _Classes(NamedTuple):
    """Where the classes are; static."""

    axis: tuple[int, ...]
    shards: Shards


def _call(name, function, logits, axis, where, axis_name, keepdims=True):
    logits = checks.floating(name, "logits", logits)
    where = checks.mask(name, where, logits.shape, "the logits", "compare it (mask != 0)")
    axes = checks.class_axes(name, logits, axis)
    over = mesh_axes(name, axis_name, Sharded("logits", logits, axes))
    # Over axes of a mesh the first class axis is sharded.
    dimensions = tuple(CLASSES if a in axes[:1] else None for a in range(logits.ndim))
    static = function, _Classes(axes, over.shards), keepdims
    return placed(name, over.placement, _masked, static, (logits, where), (dimensions, dimensions))


def _masked(function, classes, keepdims, logits, where):
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    out, _ = function(classes, cast(logits, varying_together(logits, axis_name=classes.shards.axis_name)))
    return out if keepdims else jnp.squeeze(out, classes.axis)


class _Residuals(NamedTuple):
    logits: Array
    top: Array
    log_z: Array

    def passes(self, classes, g=None):
        """Passes over the logits, and over the cotangent `g` of the result if there is one, as `Class.q`."""
        arrays = Arrays(self.logits, g, top=self.top, log_z=self.log_z)
        return Passes(arrays, classes.axis, self.top.dtype, None, classes.shards.axis_name, previous=self.log_z)


def _normalizer(classes, logits):
    """(log_normalizer, `_Residuals`)."""
    dtype = compute_dtype(logits.dtype)
    row = normalizer(logits, None, classes.axis, None, dtype, False, classes.shards.axis_name)
    return row.log_normalizer, _Residuals(logits, row.top, row.log_z)


def _mapped(term, classes, logits):
    """(the array of a term, in the logits' dtype, and `_Residuals`)."""
    _, residuals = _normalizer(classes, logits)
    return residuals.passes(classes).map(term).astype(logits.dtype), residuals


def _moved(classes, residuals, dlogits):
    """(passes that know the tangents, the tangent of log_z, that of the largest logit), see `Class.dz`."""
    passes = residuals.passes(classes)
    passes.moving(Moving(dlogits))
    reference = passes.mean_at_max(lambda c: c.dx)
    passes.moving(Moving(dlogits, reference=reference))
    return passes, passes.sum(lambda c: c.p * c.dz), reference


# --- logsumexp: d / dx[j] = p[j] --------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logsumexp_rule(classes, logits):
    return _logsumexp_fwd(classes, logits)[0]


def _logsumexp_fwd(classes, logits):
    log_normalizer, residuals = _normalizer(classes, logits)
    out = log_normalizer.astype(logits.dtype)
    return (each_shards_own(out, classes.shards, first_class(classes.shards, 1)), None), residuals


def _logsumexp_bwd(classes, residuals, cotangents):
    cotangent = shared_cotangent(cotangents[0], classes.shards)
    p = residuals.passes(classes).map(lambda c: c.p)
    return ((cotangent.astype(p.dtype) * p).astype(residuals.logits.dtype),)


def _logsumexp_tangent(classes, residuals, dlogits):
    _, log_z, reference = _moved(classes, residuals, dlogits)
    return (log_z + reference).astype(dlogits.dtype)


_logsumexp_rule.defvjp(_logsumexp_fwd, _logsumexp_bwd)
_logsumexp = with_forward_mode(_logsumexp_rule, _logsumexp_tangent)


# --- softmax: with cotangent g, dx[j] = p[j] (g[j] - sum of p g) ------------------------------------------------------
#
# Where one class has p near 1, g[j] - sum of p g cancels for it. Any constant may be taken off g; with the g of the
# largest logit (their mean, if several are largest) that class's term of the sum is 0, and nothing cancels. The same
# formula has the tangents: the Jacobian is symmetric.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax_rule(classes, logits):
    return _softmax_fwd(classes, logits)[0]


def _softmax_fwd(classes, logits):
    out, residuals = _mapped(lambda c: c.p, classes, logits)
    return (out, None), residuals


def _softmax_bwd(classes, residuals, cotangents):
    return (_softmax_tangent(classes, residuals, cotangents[0]),)


def _softmax_tangent(classes, residuals, direction):
    passes = residuals.passes(classes, direction)
    center = passes.mean_at_max(lambda c: c.q)
    mean = passes.sum(lambda c, center: c.p * (c.q - center), center)
    out = passes.map(lambda c, center, mean: c.p * ((c.q - center) - mean), center, mean)
    return out.astype(residuals.logits.dtype)


_softmax_rule.defvjp(_softmax_fwd, _softmax_bwd)
_softmax = with_forward_mode(_softmax_rule, _softmax_tangent)


# --- log_softmax: with cotangent g, dx[j] = g[j] - p[j] sum of g ------------------------------------------------------
#
# Minus the gradient of a target (`targets`) with the shares g. A masked class (-inf) takes no part: its g is left out.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_softmax_rule(classes, logits):
    return _log_softmax_fwd(classes, logits)[0]


def _log_softmax_fwd(classes, logits):
    out, residuals = _mapped(lambda c: moving_where(~c.masked, c.log_p), classes, logits)
    return (out, None), residuals


def _log_softmax_bwd(classes, residuals, cotangents):
    passes = residuals.passes(classes, cotangents[0])
    sums = targets.sums(passes, lambda c: c.present * c.q)
    grad = passes.map(lambda c, sums: jnp.where(c.masked, 0, -targets.pull(c, c.q, sums)), sums)
    return (grad.astype(residuals.logits.dtype),)


def _log_softmax_tangent(classes, residuals, dlogits):
    passes, log_z, _ = _moved(classes, residuals, dlogits)
    moved = passes.map(lambda c, log_z: jnp.where(c.masked, 0, c.dz - log_z), log_z)
    return moved.astype(residuals.logits.dtype)


_log_softmax_rule.defvjp(_log_softmax_fwd, _log_softmax_bwd)
_log_softmax = with_forward_mode(_log_softmax_rule, _log_softmax_tangent)
