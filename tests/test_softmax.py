"""`logsumexp`, `softmax`, `log_softmax`: axes, masks, dtypes and the edges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jxent

FUNCTIONS = (jxent.logsumexp, jxent.softmax, jxent.log_softmax)
THEIRS = {"logsumexp": jax.scipy.special.logsumexp, "softmax": jax.nn.softmax, "log_softmax": jax.nn.log_softmax}


def logits(shape=(3, 4, 5), dtype=np.float32):
    return jnp.asarray(3 * np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.covering
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3, (0, 1), (2, 0), (-1, -2), (0, 1, 2), ()], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_axes(function, axis):
    x = logits()
    if axis == ():
        want = (
            x if function is jxent.logsumexp else jnp.ones_like(x) if function is jxent.softmax else jnp.zeros_like(x)
        )
    else:
        want = THEIRS[function.__name__](x, axis)
    # jax.nn adds the maximum back, rounding once more.
    np.testing.assert_allclose(function(x, axis), want, rtol=2e-6, atol=1e-6)


def test_axis_none_and_keepdims():
    x = logits()
    chex.assert_shape(jxent.logsumexp(x, None), ())
    chex.assert_shape(jxent.logsumexp(x, None, keepdims=True), (1, 1, 1))
    chex.assert_shape(jxent.logsumexp(x, (0, -1), keepdims=True), (1, 4, 1))
    np.testing.assert_allclose(jnp.sum(jxent.softmax(x, None)), 1, rtol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_where_selects_classes(function):
    """As if the other classes were not there; they get probability 0 and no gradient, and may hold anything."""
    x = logits()
    where = jnp.array([True, False, True, True, False])
    dirty = jnp.where(where, x, jnp.nan)
    got, pull = jax.vjp(lambda x: function(x, where=where), dirty)
    want, pull_want = jax.vjp(function, x[..., np.asarray(where)])
    (gradient,), (want_gradient,) = pull(jnp.ones_like(got)), pull_want(jnp.ones_like(want))
    fill = -np.inf if function is jxent.log_softmax else 0
    if function is not jxent.logsumexp:
        np.testing.assert_array_equal(got[..., ~np.asarray(where)], np.full((3, 4, 2), fill))
        got = got[..., np.asarray(where)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # The gradient of a sum of probabilities is 0 but for rounding.
    np.testing.assert_allclose(gradient[..., np.asarray(where)], want_gradient, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(gradient)[..., ~np.asarray(where)] == 0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("how", ["-inf", "where"])
def test_rows_without_classes(function, how):
    """No NaN, in value, gradient or second derivative: nothing to choose from has probability 0."""
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    where = None
    if how == "-inf":
        x = x.at[1].set(-jnp.inf)
    else:
        where = jnp.array([[True, True], [False, False]])
    value, pull = jax.vjp(lambda x: function(x, where=where), x)
    want = 0 if function is jxent.softmax else -np.inf
    np.testing.assert_array_equal(value[1], np.full(value[1].shape, want))
    (gradient,) = pull(jnp.ones_like(value))
    np.testing.assert_array_equal(gradient[1], [0.0, 0.0])
    assert np.isfinite(gradient[0]).all()
    second = jax.jvp(
        lambda x: jax.vjp(lambda x: function(x, where=where), x)[1](jnp.ones_like(value))[0], (x,), (x * 0 + 1,)
    )
    if how == "where":
        chex.assert_tree_all_finite(second)


@pytest.mark.covering("softmax-bfloat16")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes(function, dtype):
    """In the logits' dtype, rounded once from float32."""
    x = logits(dtype=dtype)
    got, gradient = function(x), jax.grad(lambda x: jnp.sum(function(x).astype(jnp.float32)))(x)
    chex.assert_type([got, gradient], dtype)
    log_p = oracle.log_softmax(x)
    want = {"logsumexp": oracle.logsumexp(x), "softmax": np.exp(log_p), "log_softmax": log_p}[function.__name__]
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    tiny = float(jnp.finfo(dtype).smallest_subnormal)  # probabilities below the normal range of float16
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=half_ulp + 3e-6, atol=tiny)


def test_scalars_and_rows_without_classes():
    assert jxent.logsumexp(jnp.array(2.5), None) == 2.5
    assert jxent.softmax(jnp.array(2.5), None) == 1
    assert jxent.log_softmax(jnp.array(2.5), ()) == 0
    np.testing.assert_array_equal(jxent.logsumexp(jnp.zeros((2, 0))), [-np.inf, -np.inf])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_arrays(function):
    chex.assert_shape(function(jnp.zeros((0, 3))), (0,) if function is jxent.logsumexp else (0, 3))
    chex.assert_shape(jax.grad(lambda x: jnp.sum(function(x)))(jnp.zeros((2, 0))), (2, 0))


def test_infinite_and_nan_logits():
    assert jxent.logsumexp(jnp.array([1.0, jnp.inf])) == np.inf
    assert np.isnan(jxent.logsumexp(jnp.array([1.0, jnp.nan])))
    assert np.isnan(jxent.softmax(jnp.array([1.0, jnp.nan]))).all()
    np.testing.assert_array_equal(jxent.softmax(jnp.array([0.0, -jnp.inf, 0.0])), [0.5, 0.0, 0.5])


def test_no_overflow():
    x = jnp.array([88.8, 1000.0, -1000.0, 3e38])
    np.testing.assert_array_equal(jxent.softmax(x), [0, 0, 0, 1])
    assert jxent.logsumexp(x) == np.float32(3e38)
    np.testing.assert_allclose(jxent.logsumexp(jnp.full(4, 1000.0)), 1000 + np.log(4), rtol=1e-7)


def test_ties():
    x = jnp.array([5.0, 5.0, 5.0, -100.0])
    np.testing.assert_allclose(jxent.log_softmax(x)[:3], np.full(3, -np.log(3)), rtol=1e-7)
    np.testing.assert_allclose(jxent.logsumexp(x), 5 + np.log(3), rtol=1e-7)
