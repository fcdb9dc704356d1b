"""`logsumexp`, `softmax` and `log_softmax`, exact in value and gradient.

The formulas are those of `normalizer`: log p = (x - m) - log_z with log_z = log1p(the rest of the row). Computed in at
least float32; no temporary of the size of the logits, except that `logsumexp` with `where` writes the masked logits.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jxent._core import targets
from jxent._core.normalizer import normalizer
from jxent._core.passes import Arrays, Passes, compute_dtype
from jxent._core.shards import (
    Shards,
    cast,
    each_shards_own,
    first_class,
    shards_of,
    shared_cotangent,
    varying_together,
)
from jxent._loss import checks
from jxent._loss.axis_names import AxisName, mesh_axis

Axis = int | tuple[int, ...] | None


def logsumexp(
    logits: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "*#shape"] | None = None,
    keepdims: bool = False,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Logarithm of the sum of the exponentials of the logits, the softmax's log-normalizer, in nats.

    Args:
      logits: float16, bfloat16, float32 or float64.
      axis: the axis or axes to sum over; None for all.
      where: boolean, broadcasts to the logits; classes to include.
      keepdims: keep the summed axes with size 1.
      axis_name: inside `jax.shard_map`, the mesh axis or axes over which `axis` is sharded; the sum is over all shards.

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
    return _masked(_logsumexp, *_arguments("logsumexp", logits, axis, where, axis_name), keepdims)


def softmax(
    logits: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "*#shape"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "*shape"]:
    """Softmax: ``exp(logits - logsumexp(logits))``.

    Args:
      logits: float16, bfloat16, float32 or float64.
      axis: the class axis or axes, over which the probabilities sum to 1; None for all.
      where: boolean, broadcasts to the logits; classes to include. The others have probability 0.
      axis_name: inside `jax.shard_map`, the mesh axis or axes over which `axis` is sharded.

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
    return _masked(_softmax, *_arguments("softmax", logits, axis, where, axis_name))


def log_softmax(
    logits: Float[Array, "*shape"],
    axis: Axis = -1,
    *,
    where: Bool[Array, "*#shape"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "*shape"]:
    """Logarithm of the softmax, in nats: ``logits - logsumexp(logits)`` in full relative precision.

    Args:
      logits: float16, bfloat16, float32 or float64.
      axis: the class axis or axes; None for all.
      where: boolean, broadcasts to the logits; classes to include. The others have log-probability -inf.
      axis_name: inside `jax.shard_map`, the mesh axis or axes over which `axis` is sharded.

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
    return _masked(_log_softmax, *_arguments("log_softmax", logits, axis, where, axis_name))


class _Classes(NamedTuple):
    """Where the classes are; static."""

    axis: tuple[int, ...]
    shards: Shards


def _arguments(function, logits, axis, where, axis_name):
    """(`_Classes`, logits, where)."""
    logits = checks.floating(function, "logits", logits)
    where = checks.mask(function, where, logits.shape, "the logits", "compare it (mask != 0)")
    axes = checks.class_axes(function, logits, axis)
    over_classes = mesh_axis(function, "axis_name", axis_name, "logits", logits)
    return _Classes(axes, shards_of(over_classes)), logits, where


@partial(jax.jit, static_argnums=(0, 1, 4))
def _masked(function, classes, logits, where, keepdims=True):
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    out = function(classes, cast(logits, varying_together(logits, axis_name=classes.shards.axis_name)))
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


# --- logsumexp: d / dx[j] = p[j] --------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logsumexp(classes, logits):
    return _logsumexp_fwd(classes, logits)[0]


def _logsumexp_fwd(classes, logits):
    log_normalizer, residuals = _normalizer(classes, logits)
    out = log_normalizer.astype(logits.dtype)
    return each_shards_own(out, classes.shards, first_class(classes.shards, 1)), residuals


def _logsumexp_bwd(classes, residuals, cotangent):
    cotangent = shared_cotangent(cotangent, classes.shards)
    p = residuals.passes(classes).map(lambda c: c.p)
    return ((cotangent * p).astype(residuals.logits.dtype),)


_logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)


# --- softmax: with cotangent g, dx[j] = p[j] (g[j] - sum of p g) ------------------------------------------------------
#
# Where one class has p near 1, g[j] - sum of p g cancels for it. Any constant may be taken off g; with the g of the
# largest logit (their mean, if several are largest) that class's term of the sum is 0, and nothing cancels.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(classes, logits):
    return _softmax_fwd(classes, logits)[0]


def _softmax_fwd(classes, logits):
    return _mapped(lambda c: c.p, classes, logits)


def _softmax_bwd(classes, residuals, cotangent):
    passes = residuals.passes(classes, cotangent)
    count = passes.sum(lambda c: c.at_max)
    center = passes.sum(lambda c: c.at_max * c.q) / jnp.maximum(count, 1)
    mean = passes.sum(lambda c, center: c.p * (c.q - center), center)
    grad = passes.map(lambda c, center, mean: c.p * ((c.q - center) - mean), center, mean)
    return (grad.astype(residuals.logits.dtype),)


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


# --- log_softmax: with cotangent g, dx[j] = g[j] - p[j] sum of g ------------------------------------------------------
#
# Minus the gradient of a target (`targets`) with the shares g. A masked class (-inf) takes no part: its g is left out.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_softmax(classes, logits):
    return _log_softmax_fwd(classes, logits)[0]


def _log_softmax_fwd(classes, logits):
    return _mapped(lambda c: c.log_p, classes, logits)


def _log_softmax_bwd(classes, residuals, cotangent):
    passes = residuals.passes(classes, cotangent)
    sums = targets.sums(passes, lambda c: c.present * c.q)
    grad = passes.map(lambda c, sums: jnp.where(c.masked, 0, -targets.pull(c, c.q, sums)), sums)
    return (grad.astype(residuals.logits.dtype),)


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)
