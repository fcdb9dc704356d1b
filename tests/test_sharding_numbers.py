"""Numbers on meshes that sums over devices or the compiler's threads could change: NaN, 16 bits, precisions."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharded_calls import ARRAYS, BIAS, HIDDEN, KERNEL, LABELS, assert_equal, linear_loss, mesh_of, put

import jxent

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.covering
@pytest.mark.parametrize("way", ["Auto", "Explicit", "shard_map"])
@pytest.mark.parametrize("nan", [[0], [0, 4], [0, 8, 16, 24, 32, 40, 48, 56]])
def test_nan_is_not_passed_over(nan, way):
    """A maximum over shards must not pass over a NaN of some shards, nor of all of them."""
    bias, hidden = BIAS.copy(), HIDDEN.copy()
    bias[nan] = np.nan
    hidden[1, 2, 3] = np.nan

    def f(logits, hidden, kernel, bias, labels, **axis_name):
        """(Results that one class makes NaN, losses that `hidden` makes NaN at its own positions)."""
        options = {"reduction": "none", **axis_name}
        return (
            jxent.cross_entropy(logits, labels, **options),
            jxent.linear_cross_entropy(HIDDEN, kernel, labels, bias=bias, **options),
            jxent.logsumexp(logits, **axis_name),
            jnp.sum(jxent.softmax(logits, **axis_name), -1),
        ), jxent.linear_cross_entropy(hidden, kernel, labels, **options)

    mesh = mesh_of("Auto" if way == "shard_map" else way, vocab=8)
    specs = P(None, None, "vocab"), P(), P(None, "vocab"), P("vocab"), P()
    arrays = [
        put(mesh, a, spec)
        for a, spec in zip((ARRAYS["logits"] + bias, hidden, KERNEL, bias, LABELS), specs, strict=True)
    ]
    if way == "shard_map":  # the results of all shards along a new axis

        def on_each(*arrays):
            return jax.tree.map(lambda a: a[None], f(*arrays, axis_name="vocab"))

        f_ = jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=P("vocab"), check_vma=False)
    else:
        f_ = f
    of_all, of_hidden = jax.tree.map(np.asarray, jax.jit(f_)(*arrays))
    counts = LABELS != -100
    for number, values in enumerate(of_all):
        assert values.shape == ((8, *LABELS.shape) if way == "shard_map" else LABELS.shape)
        assert np.isnan(values[..., counts] if number < 2 else values).all()
    np.testing.assert_array_equal(np.isnan(of_hidden), np.isnan(np.broadcast_to(hidden[..., 3], of_hidden.shape)))


@pytest.mark.covering("Explicit-P('data',)-bfloat16")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kernel", [P(), P("data"), P(None, "data")], ids=str)
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_16_bit_gradients_on_some_axes_of_a_mesh(mode, kernel, dtype):
    """The other axis has copies. XLA:CPU crashes if it must sum 16-bit numbers over some axes alone."""
    mesh = mesh_of(mode, data=4, unused=2)
    arrays = [jnp.asarray(HIDDEN, dtype), jnp.asarray(KERNEL, dtype), LABELS]
    step = jax.jit(jax.value_and_grad(partial(linear_loss, reduction="sum"), (0, 1)))
    loss, want = step(*arrays)
    hidden = P() if len(kernel) == 2 else P("data")
    got, grads = step(*(put(mesh, a, spec) for a, spec in zip(arrays, (hidden, kernel, hidden), strict=True)))
    np.testing.assert_allclose(got, loss, rtol=1e-6)
    for a, b in zip(grads, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=2 * float(jnp.finfo(dtype).eps) * np.max(np.abs(b)))


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_a_16_bit_bias_gradient_is_rounded_once(mode):
    """The sum over devices comes first. Each device's part is larger than the sum here, and its rounding would show."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(8, 4, 3)).astype(np.float32), rng.normal(size=(3, 64)).astype(np.float32)
    labels, weights = rng.integers(0, 64, (8, 4)).astype(np.int32), np.ones((8, 4), np.float32)
    hidden[1::2], labels[1::2], weights[1::2] = 1.1 * hidden[::2], labels[::2], -1  # almost the same again, subtracted

    def loss(bias, hidden, kernel, labels, weights):
        return jxent.linear_cross_entropy(
            hidden, kernel, labels, bias=bias, sample_weight=weights, reduction="sum", recompute=True
        )

    gradient = jax.jit(jax.grad(loss))
    exact = np.asarray(gradient(jnp.zeros(64), hidden, kernel, labels, weights))
    mesh = mesh_of(mode, data=8)
    arrays = zip(
        (jnp.zeros(64, jnp.bfloat16), kernel, hidden, labels, weights), (P(), P(), *[P("data")] * 3), strict=True
    )
    bias, kernel, *positional = (put(mesh, array, spec) for array, spec in arrays)
    rounded = gradient(bias, positional[0], kernel, *positional[1:])
    chex.assert_type(rounded, jnp.bfloat16)
    error = np.abs(np.asarray(rounded, np.float32) - exact)
    assert (error <= 2**-8 * np.abs(exact) + 1e-6).all()  # half a unit in the last place; sums differ in order


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_prediction_in_float64(mode):
    """The compiler's threads lower the program of a device. They do not know that the test enables float64."""
    rng = np.random.default_rng(1)
    hidden, kernel, labels = rng.normal(size=(8, 2, 3)), rng.normal(size=(3, 8)), np.zeros((8, 2), np.int32)
    mesh = mesh_of(mode, data=8)
    arrays = put(mesh, hidden, P("data")), put(mesh, kernel, P()), put(mesh, labels, P("data"))
    _, stats = jax.jit(partial(jxent.linear_cross_entropy, return_stats=True))(*arrays)
    np.testing.assert_array_equal(stats.prediction, np.argmax(hidden @ kernel, -1))


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_contexts_of_the_trace(mode):
    """The contexts of a trace hold for its program, even if that is lowered and compiled outside of them."""
    mesh = mesh_of(mode, data=4, vocab=2)
    specs = P("data"), P("data", "vocab"), P("data")
    arrays = [put(mesh, a, s) for a, s in zip((HIDDEN, KERNEL, LABELS), specs, strict=True)]
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        traced = jax.jit(jax.value_and_grad(linear_loss, (0, 1))).trace(*arrays)
    program = traced.lower().compile()
    dots = [line for line in program.as_text().splitlines() if " dot(" in line]
    assert len(dots) >= 3
    assert all("operand_precision={highest,highest}" in line for line in dots)
    assert_equal(program(*arrays), jax.value_and_grad(linear_loss, (0, 1))(*map(jnp.asarray, (HIDDEN, KERNEL, LABELS))))

    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    dots = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(dots) >= 3
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)
    if mode == "Auto":  # the kernel is gathered along its features, before the loop
        assert "sharding_constraint %arg1 <@mesh, [{}, {?}]>" in lowered[: lowered.index("stablehlo.while")]
