"""`logsumexp`, `softmax` and `log_softmax`, exact in value and gradient.

The formulas are those of `_rows`: log p = (x - m) - log_z with log_z = log1p(the rest of the row). Computed in at least
float32; no temporary of the size of the logits, except that `logsumexp` with `where` writes the masked logits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jxent import _checks
from jxent._axis_names import AxisName, mesh_axis
from jxent._passes import again, class_sum
from jxent._rows import below_max, compute_dtype, normalizer, unmasked
from jxent._shards import cast, everywhere, first_class, own, shards_of, summed

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
    keepdims = _checks.flag("logsumexp", "keepdims", keepdims)
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


def _arguments(function, logits, axis, where, axis_name):
    """((axes, `Shards`), logits, where); the pair is static."""
    logits = _checks.floating(function, "logits", logits)
    where = _checks.mask(function, where, logits.shape, "the logits", "compare it (mask != 0)")
    axes = _checks.class_axes(function, logits, axis)
    over_classes = mesh_axis(function, "axis_name", axis_name, "logits", logits)
    return (axes, shards_of(over_classes)), logits, where


@partial(jax.jit, static_argnums=(0, 1, 4))
def _masked(function, layout, logits, where, keepdims=True):
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    out = function(layout, cast(logits, everywhere(logits, axis_name=layout[1].axis_name)))
    return out if keepdims else jnp.squeeze(out, layout[0])


def _normalizer(logits, layout):
    axis, shards = layout
    return normalizer(logits, None, axis, None, compute_dtype(logits.dtype), axis_name=shards.axis_name)


def _sum(terms, previous, sized, rows, layout):
    axis, shards = layout
    return class_sum(terms, previous, sized, rows, axis, shards.axis_name)


def _log_p(logits, top, log_z):
    return (logits.astype(top.dtype) - top) - log_z


# --- logsumexp: d / dx[j] = p[j] --------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logsumexp(layout, logits):
    return _logsumexp_fwd(layout, logits)[0]


def _logsumexp_fwd(layout, logits):
    rows = _normalizer(logits, layout)
    out = own(rows.log_normalizer.astype(logits.dtype), layout[1], first_class(layout[1], 1))
    return out, (logits, rows.top, rows.log_z)


def _logsumexp_bwd(layout, residuals, cotangent):
    logits, top, log_z = residuals
    cotangent = summed(cotangent, layout[1])
    x, top, log_z, _ = again(log_z, logits, top, log_z)
    return ((cotangent * jnp.exp(_log_p(x, top, log_z))).astype(logits.dtype),)


_logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)


# --- softmax: with cotangent g, dx[j] = p[j] (g[j] - sum of p g) ------------------------------------------------------
#
# Where one class has p near 1, g[j] - sum of p g cancels for it. Any constant may be taken off g; with the g of the
# largest logit (their mean, if several are largest) that class's term of the sum is 0, and nothing cancels.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(layout, logits):
    return _softmax_fwd(layout, logits)[0]


def _softmax_fwd(layout, logits):
    top, log_z, *_ = _normalizer(logits, layout)
    x, top_, log_z_, _ = again(log_z, logits, top, log_z)
    return jnp.exp(_log_p(x, top_, log_z_)).astype(logits.dtype), (logits, top, log_z)


def _softmax_bwd(layout, residuals, cotangent):
    logits, top, log_z = residuals
    dtype = top.dtype

    def at_top(x, top, unit):
        return unit - below_max(x, top, unit)

    def g_at_top(x, g, top, unit):
        return at_top(x, top, unit) * g.astype(dtype)

    def term(x, g, top, log_z, center, _):
        return jnp.exp(_log_p(x, top, log_z)) * (g.astype(dtype) - center)

    both = logits, cotangent
    count = _sum(at_top, log_z, (logits,), (top,), layout)
    center = _sum(g_at_top, count, both, (top,), layout) / jnp.maximum(count, 1)
    mean = _sum(term, center, both, (top, log_z, center), layout)
    x, g, top, log_z, center, mean, _ = again(mean, *both, top, log_z, center, mean)
    return ((jnp.exp(_log_p(x, top, log_z)) * ((g.astype(dtype) - center) - mean)).astype(logits.dtype),)


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


# --- log_softmax: with cotangent g, dx[j] = g[j] - p[j] sum of g ------------------------------------------------------
#
# Where one class has p near 1 that cancels for it, and is computed as -expm1(log p) (sum of g) - (sum of the other g).
# A masked class (-inf) takes no part: its g is left out.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_softmax(layout, logits):
    return _log_softmax_fwd(layout, logits)[0]


def _log_softmax_fwd(layout, logits):
    top, log_z, *_ = _normalizer(logits, layout)
    x, top_, log_z_, _ = again(log_z, logits, top, log_z)
    return _log_p(x, top_, log_z_).astype(logits.dtype), (logits, top, log_z)


def _log_softmax_bwd(layout, residuals, cotangent):
    logits, top, log_z = residuals
    both, dtype = (logits, cotangent), top.dtype

    def counted(x, g, unit):
        return unmasked(x, unit) * g.astype(dtype)

    def below(x, g, top, unit):
        return unmasked(x, unit) * below_max(x, top, unit) * g.astype(dtype)

    total = _sum(counted, log_z, both, (), layout)
    others = _sum(below, total, both, (top,), layout)
    x, g, top, log_z, total, others, _ = again(others, *both, top, log_z, total, others)
    log_p, g = _log_p(x, top, log_z), g.astype(dtype)
    grad = jnp.where(log_p > jnp.log(2 / 3), -jnp.expm1(log_p) * total - others, g - jnp.exp(log_p) * total)
    return (jnp.where(x == -jnp.inf, 0, grad).astype(logits.dtype),)


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)
