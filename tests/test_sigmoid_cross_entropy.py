"""`sigmoid_cross_entropy`: 50 digits for every derivative, options against plain formulas, masks, memory, meshes."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from compiling import optimized
from grids import short
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modes import differentiated

import jxent

SHAPE = (4, 5)
RNG = np.random.default_rng(5)
LOGITS = 3 * RNG.normal(size=SHAPE)
LABELS = RNG.uniform(size=SHAPE)
POS_WEIGHT, SAMPLE_WEIGHT = RNG.uniform(0.5, 3, SHAPE[-1:]), RNG.uniform(0.5, 2, SHAPE)
WHERE = RNG.random(SHAPE) < 0.7


def plain(logits, labels, pos_weight, sample_weight, label_smoothing, *, where=True, reduction="mean"):
    """As a textbook has it."""
    y = (1 - label_smoothing) * labels + label_smoothing / 2
    losses = -pos_weight * y * jax.nn.log_sigmoid(logits) - (1 - y) * jax.nn.log_sigmoid(-logits)
    weight = jnp.where(jnp.broadcast_to(where, losses.shape), sample_weight, 0)
    total = jnp.sum(weight * losses)
    return {"mean": total / jnp.sum(weight), "sum": total, "none": weight * losses}[reduction]


# --- exactness --------------------------------------------------------------------------------------------------------

POINTS = (-80.0, -60.0, -30.0, -17.5, -9.0, -2.0, -1e-3, 0.0, 1e-4, 0.5, 3.0, 16.0, 20.0, 45.0, 80.0)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("modes", ["", "r", "f", "rr", "fr", "rf", "ff", "rrr", "frf"])
def test_every_derivative_against_50_digits(modes, label):
    """Relative to the magnitudes of its terms, in float32; jax.nn loses the second one at 17 and above."""
    f = partial(jxent.sigmoid_cross_entropy, reduction="none")
    f = partial(lambda f, x: f(x, jnp.full(x.shape, label)), f)
    for mode in reversed(modes):
        if mode == "r":
            f = partial(lambda f, x: jax.vjp(f, x)[1](jnp.ones_like(x))[0], f)
        else:
            f = partial(lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1], f)
    found = optimized(f)(jnp.array(POINTS, jnp.float32))
    with mpmath.workdps(60):
        for x, value in zip(POINTS, found, strict=True):
            x = mpmath.mpf(float(np.float32(x)))
            p, q = 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
            wanted = [-mpmath.log(p if label else q), p - label if label == 0 else -q, p * q, p * q * (q - p)][
                len(modes)
            ]
            terms = p * q if len(modes) == 3 else abs(wanted)
            assert abs(float((mpmath.mpf(float(value)) - wanted) / terms)) < 2e-6, (x, value)


@pytest.mark.parametrize("label", [0, 1])
def test_infinite_logits(label):
    """A right one costs nothing, a wrong one is infinitely wrong; gradients are finite."""
    x = jnp.array([-jnp.inf, jnp.inf])
    losses = jxent.sigmoid_cross_entropy(x, jnp.full(2, label), reduction="none")
    np.testing.assert_array_equal(losses, [jnp.inf, 0] if label else [0, jnp.inf])
    gradient = jax.grad(partial(jxent.sigmoid_cross_entropy, reduction="sum"))(x, jnp.full(2, label))
    np.testing.assert_array_equal(gradient, [-1, 0] if label else [0, 1])


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("modes", short(("", "r", "f", "rr", "rf", "fr", "ff"), "", "r", "f", "fr"))
def test_derivatives_by_every_argument(modes, reduction):
    def f(function, x, y, w, s, e):
        return function(x, y, pos_weight=w, sample_weight=s, label_smoothing=e, where=WHERE, reduction=reduction)

    def textbook(x, y, *, pos_weight, sample_weight, label_smoothing, **options):
        return plain(x, y, pos_weight, sample_weight, label_smoothing, **options)

    at = tuple(map(jnp.asarray, (LOGITS, LABELS, POS_WEIGHT, SAMPLE_WEIGHT, 0.2)))
    found, wanted = (differentiated(partial(f, g), modes)(*at) for g in (jxent.sigmoid_cross_entropy, textbook))
    chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int8, jnp.int32, jnp.uint8, jnp.float32, jnp.bfloat16])
def test_labels_are_numbers(dtype):
    labels = jnp.asarray(LABELS > 0.5, dtype)
    logits = jnp.asarray(LOGITS, jnp.float32)
    found = jax.value_and_grad(jxent.sigmoid_cross_entropy)(logits, labels)
    wanted = jax.value_and_grad(plain)(logits, (LABELS > 0.5) * 1.0, 1.0, 1.0, 0.0)
    chex.assert_trees_all_close(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_logits(dtype):
    """The loss is that of the logits as they are, in float32; the gradient is rounded once."""
    logits, labels = jnp.asarray(LOGITS, dtype), jnp.asarray(LABELS, jnp.float32)
    value, gradient = jax.value_and_grad(jxent.sigmoid_cross_entropy)(logits, labels)
    wide, wide_gradient = jax.value_and_grad(jxent.sigmoid_cross_entropy)(logits.astype(jnp.float32), labels)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, wide, rtol=1e-6)
    np.testing.assert_array_equal(gradient, wide_gradient.astype(dtype))


def test_static_smoothing_is_traced_smoothing():
    options = {"pos_weight": POS_WEIGHT.astype(np.float32)}
    traced = jxent.sigmoid_cross_entropy(LOGITS, LABELS, label_smoothing=jnp.array(0.2), **options)
    np.testing.assert_allclose(
        jxent.sigmoid_cross_entropy(LOGITS, LABELS, label_smoothing=0.2, **options), traced, 1e-6
    )


def test_what_does_not_count():
    logits = np.where(WHERE, LOGITS, np.nan).astype(np.float32)
    f = jax.value_and_grad(partial(jxent.sigmoid_cross_entropy, where=WHERE))
    value, gradient = f(logits, LABELS)
    np.testing.assert_allclose(value, plain(LOGITS[WHERE], LABELS[WHERE], 1.0, 1.0, 0.0), rtol=1e-5)
    assert np.isfinite(gradient).all()
    assert not np.any(gradient[~WHERE])
    value, gradient = jax.value_and_grad(partial(jxent.sigmoid_cross_entropy, where=False))(logits, LABELS)
    assert np.isnan(value)
    assert not np.any(gradient)


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (0,)])
def test_any_shape(shape):
    x = jnp.full(shape, 0.3)
    losses = jxent.sigmoid_cross_entropy(x, jnp.ones(shape, int), reduction="none")
    np.testing.assert_allclose(losses, np.full(shape, np.log1p(np.exp(-0.3))), rtol=1e-6)
    mean = jxent.sigmoid_cross_entropy(x, jnp.ones(shape, int))
    assert np.isnan(mean) if x.size == 0 else mean == losses.mean()


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gradient", "arrays"), [(False, 1.1), (True, 2.1)])
def test_memory(gradient, arrays):
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    f = jax.value_and_grad(jxent.sigmoid_cross_entropy) if gradient else jxent.sigmoid_cross_entropy
    memory = optimized(f).lower(x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < arrays * 4 * 512 * 1024


@pytest.mark.parametrize("way", ["Auto", "Explicit", "shard_map", "unchecked"])
def test_sharded(way):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(a, jnp.float32) for a in (rng.normal(size=(8, 16)), rng.uniform(size=(8, 16)))]
    arrays += [jnp.asarray(rng.uniform(size=16), jnp.float32), jnp.asarray(rng.uniform(size=(8, 16)), jnp.float32)]
    specs = [P("data", "model"), P("data", "model"), P("model"), P("data", "model")]
    kind = AxisType.Explicit if way == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)

    def f(logits, labels, pos_weight, sample_weight, axes=()):
        options = {"pos_weight": pos_weight, "sample_weight": sample_weight, "reduction": "sum"}
        total = jxent.sigmoid_cross_entropy(logits, labels, **options)
        return jax.lax.psum(total, axes) if axes else total

    wanted = jax.value_and_grad(f, (0, 1, 2, 3))(*arrays)
    if way in ("Auto", "Explicit"):
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
        found = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(*placed)
    else:
        local = partial(f, axes=("data", "model"))
        checked = way == "shard_map"
        mapped = jax.shard_map(local, mesh=mesh, in_specs=tuple(specs), out_specs=P(), check_vma=checked)
        found = jax.jit(jax.value_and_grad(mapped, (0, 1, 2, 3)))(*arrays)
    chex.assert_trees_all_close(jax.device_get(found), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("way", ["named", "shard_map"])
def test_named_axes(way, reduction):
    """Of the positions, with masks that differ by shard: the numbers of one device, and inputs that stay in shards."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    x, y, s = rng.normal(size=(8, 16)), rng.uniform(size=(8, 16)), rng.uniform(size=(8, 16 if way == "named" else 1))
    w, where = rng.uniform(size=16), np.arange(8)[:, None] < 3
    at, specs = (
        (x, y, w, s),
        (P("data", "model"), P("data", "model"), P("model"), P("data", "model" if way == "named" else None)),
    )

    def f(x, y, w, s, where=where, **axes):
        options = {"pos_weight": w, "sample_weight": s, "where": where, "label_smoothing": 0.1}
        return jxent.sigmoid_cross_entropy(x, y, reduction=reduction, **options, **axes)

    wanted = jax.value_and_grad(f, (0, 1, 2, 3))(*at)
    if way == "named":
        named = partial(f, batch_axis_name=P("data", "model"))
        with jax.set_mesh(mesh):
            arrays = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(at, specs, strict=True)]
            shardings = None, tuple(a.sharding for a in arrays)
            step = jax.jit(jax.value_and_grad(named, (0, 1, 2, 3)), out_shardings=shardings)
            program = step.lower(*arrays).compile()
            found = program(*arrays)
        assert "all-gather" not in program.as_text()
    else:
        local = partial(f, batch_axis_name=("data", "model"))
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(*specs, P("data")), out_specs=P())
        found = jax.jit(jax.value_and_grad(mapped, (0, 1, 2, 3)))(*at, where)
    chex.assert_trees_all_close(jax.device_get(found), wanted, rtol=1e-12, atol=1e-14)


def test_per_example():
    """Under `vmap`, with one `pos_weight` for all."""
    f = jax.value_and_grad(lambda w, x, y: jxent.sigmoid_cross_entropy(x, y, pos_weight=w))
    each = jax.vmap(f, (None, 0, 0))(POS_WEIGHT, LOGITS, LABELS)
    for i in range(len(LOGITS)):
        one = f(jnp.asarray(POS_WEIGHT), LOGITS[i], LABELS[i])
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], each), one, rtol=1e-5)


def test_checkify_names_what_is_not_finite():
    logits = LOGITS.copy()
    logits[1, 2] = np.nan
    error, _ = jax.jit(checkify.checkify(jxent.sigmoid_cross_entropy, errors=checkify.user_checks))(logits, LABELS)
    with pytest.raises(checkify.JaxRuntimeError, match=r"sigmoid_cross_entropy: logits has nan at \[1 2\]"):
        error.throw()


def test_gradients_with_any_pos_weight():
    """Where the logit is infinite; and of the label, where its two terms nearly cancel or one is much the larger."""
    x, y, w = np.float32([-np.inf, np.inf, -20, 20, -1e-3, 0]), np.float32([0, 1, 0, 1, 0.5, 0.5]), np.float32(1e-3)
    f = partial(jxent.sigmoid_cross_entropy, reduction="sum")
    to_label, to_weight = jax.grad(lambda y, w: f(x, y, pos_weight=w), (0, 1))(y, np.full(6, w))
    with np.errstate(invalid="ignore"):
        below, above = np.logaddexp(0, -x.astype(float)), np.logaddexp(0, x.astype(float))
        np.testing.assert_allclose(to_label, w * below - above, rtol=2e-6)
    np.testing.assert_allclose(to_weight, np.where(y == 0, 0, y * np.where(y == 0, 0, below)), rtol=2e-6)
    assert jax.grad(f, 1)(x[2:3], y[2:3], pos_weight=np.float32(0)) < 0  # -s(x), which is there yet


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_infinite_logits_with_any_pos_weight(smoothing):
    """0 times infinity is 0, in the loss and in its gradients."""
    x, y, w = (a.ravel() for a in np.meshgrid([-np.inf, -2, 0, 2, np.inf], [0, 0.5, 1], [0, 1, np.inf]))
    f = partial(jxent.sigmoid_cross_entropy, label_smoothing=smoothing, reduction="none")
    losses, pull = jax.vjp(lambda x, y, w: f(x, y, pos_weight=w), *map(jnp.float32, (x, y, w)))

    def product(*factors):
        return np.where(np.any([f == 0 for f in factors], 0), 0, np.prod(factors, 0))

    with np.errstate(invalid="ignore"):
        yes, no = (1 - smoothing) * y + smoothing / 2, (1 - smoothing) * (1 - y) + smoothing / 2
        wanted = product(w, yes, np.logaddexp(0, -x)) + product(no, np.logaddexp(0, x))
        to_x = product(no, np.exp(-np.logaddexp(0, -x))) - product(w, yes, np.exp(-np.logaddexp(0, x)))
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)
    grads = pull(jnp.ones_like(losses))
    np.testing.assert_allclose(grads[0], to_x, rtol=1e-5)
    for grad in (*grads, *pull(jnp.zeros_like(losses))[1:]):  # the second as of a sample weight of 0
        assert not np.isnan(grad).any()


def test_labels_outside_of_0_and_1():
    """NaN in the element's loss and gradients alone, named by checkify, and nothing where it does not count."""
    x, y = np.float32([1, 2, 3, 4, 5]), np.float32([-1, 2.5, 1, 1.0001, -1e-4])
    out, f = np.array([True, True, False, False, False]), partial(jxent.sigmoid_cross_entropy, reduction="none")
    losses, pull = jax.vjp(lambda x, y, w: f(x, y, pos_weight=w), x, y, np.ones_like(x))
    for array in (losses, *pull(jnp.ones_like(losses))):
        np.testing.assert_array_equal(np.isnan(array), out)
    np.testing.assert_array_equal(np.isnan(f(x, np.array([-1, 2, 0, 1, 1]))), out)
    value, grad = jax.value_and_grad(partial(jxent.sigmoid_cross_entropy, where=~out))(x, y)
    np.testing.assert_allclose(value, np.mean(losses[~out]), rtol=1e-6)
    np.testing.assert_array_equal(grad == 0, out)
    for labels, where, said in (
        (y, None, r"label -1.0 is outside of \[0, 1\], at \[0\]"),
        (np.array([0, 1, 2, 0, 1]), None, r"label 2.0 is outside of \[0, 1\], at \[2\]"),
        (y, ~out, None),
    ):
        call = checkify.checkify(partial(jxent.sigmoid_cross_entropy, where=where), errors=checkify.user_checks)
        error = jax.jit(call)(x, labels)[0].get()
        assert error is None if said is None else re.search("sigmoid_cross_entropy: " + said, error)


@pytest.mark.usefixtures("x64")
def test_a_float64_pos_weight_makes_the_loss_float64():
    x = jnp.ones(3, jnp.float32)
    assert jxent.sigmoid_cross_entropy(x, x, pos_weight=jnp.ones(3)).dtype == jnp.float64
