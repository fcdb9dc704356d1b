"""Divergences: their definitions with 50 digits, plain formulas in float64, masks, and the linear forms' programs."""

import itertools
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference
from compiling import optimized
from grids import short
from jax.experimental import checkify
from modes import differentiated

import jxent

C = 60
BETAS = (None, 0.5, 0.1, 0.9)  # None is the Kullback-Leibler divergence, and "tv" the total variation distance


def logits_divergence(beta, module=jxent):
    if beta == "tv":
        return module.tv_distance
    return module.kl_divergence if beta is None else partial(module.js_divergence, beta=beta)


def linear_divergence(beta):
    if beta == "tv":
        return jxent.linear_tv_distance
    return jxent.linear_kl_divergence if beta is None else partial(jxent.linear_js_divergence, beta=beta)


# --- exactness --------------------------------------------------------------------------------------------------------


@mpmath.workdps(100)
def defined(x_p, x_q, temperature, beta):
    """(the divergence, its gradients by both logits), of one row, by the definition; a logit of -inf is no class."""

    def log_softmax(x):
        scaled = [mpmath.mpf(float(v)) / temperature for v in x]
        log_z = mpmath.log(mpmath.fsum(map(mpmath.exp, scaled)))
        return [v - log_z for v in scaled]

    def relative(log_a, log_b):
        """KL(A || B), and its gradient by the logits of A."""
        terms = [
            (mpmath.exp(a), a - b if a > -mpmath.inf else mpmath.mpf(0)) for a, b in zip(log_a, log_b, strict=True)
        ]
        mean = mpmath.fsum(a * term for a, term in terms)
        return mean, [a * (term - mean) / temperature for a, term in terms]

    def by_signs(p, signs):
        """The gradient by the logits of P of the sum of |p - q| / 2."""
        mean = mpmath.fsum(a * s for a, s in zip(p, signs, strict=True))
        return [a * (s - mean) / 2 / temperature for a, s in zip(p, signs, strict=True)]

    log_p, log_q = log_softmax(x_p), log_softmax(x_q)
    if beta == "tv":
        p, q = (list(map(mpmath.exp, log)) for log in (log_p, log_q))
        steps = [a - b for a, b in zip(p, q, strict=True)]
        # With 100 digits of logits up to 1e39, a smaller step is the rounding of a tie.
        signs = [mpmath.sign(s) if abs(s) > 1e-50 * a else 0 for s, a in zip(steps, p, strict=True)]
        return mpmath.fsum(map(abs, steps)) / 2, by_signs(p, signs), by_signs(q, [-s for s in signs])
    if beta is None:
        value, to_p = relative(log_p, log_q)
        return value, to_p, [(mpmath.exp(b) - mpmath.exp(a)) / temperature for a, b in zip(log_p, log_q, strict=True)]
    beta = mpmath.mpf(beta)
    mixed = [beta * mpmath.exp(a) + (1 - beta) * mpmath.exp(b) for a, b in zip(log_p, log_q, strict=True)]
    log_m = [mpmath.log(m) if m else -mpmath.inf for m in mixed]
    (of_p, to_p), (of_q, to_q) = relative(log_p, log_m), relative(log_q, log_m)
    return beta * of_p + (1 - beta) * of_q, [beta * g for g in to_p], [(1 - beta) * g for g in to_q]


@pytest.mark.parametrize("temperature", short((1.0, 1.25, 4.0), 1.0, 4.0))
@pytest.mark.parametrize("beta", [*BETAS, "tv"])
def test_against_50_digits(beta, temperature):
    """At any margin and offset, from rows that have little in common to rows that nearly agree.

    A temperature rounds twice more, its inverse and the product with that: by half a unit of up to 60 / 1.25 each.
    """
    bound = 5e-6 + 2 * (temperature != 1) * 2.0**-19
    rng = np.random.default_rng(0)
    grid = [*itertools.product((0, 20, 60), (0, 1e4, -300), (30, 3, 1, 0.1, 1e-2, 1e-4, 1e-6, 1e-7))]
    x_p = (3 * rng.normal(size=(len(grid), C))).astype(np.float32)
    margins, offsets, noises = (np.float32(column) for column in zip(*grid, strict=True))
    x_p[:, 5] += margins
    x_q = (x_p + noises[:, None] * rng.normal(size=x_p.shape)).astype(np.float32) + offsets[:, None]
    function = partial(logits_divergence(beta), temperature=temperature, reduction="none")
    value, pull = optimized(lambda *x: jax.vjp(function, *x))(x_p, x_q)
    to_p, to_q = pull(jnp.ones_like(value))
    assert (value >= 0).all()
    for i in range(len(grid)):
        wanted = [np.array(a, float) for a in defined(x_p[i], x_q[i], temperature, beta)]
        for found, want in zip((value[i], to_p[i], to_q[i]), wanted, strict=True):
            if np.abs(want).max() > 1e-30:  # what the terms underflow on is left out
                error = np.abs(np.asarray(found, float) - want).max() / np.abs(want).max()
                assert error < bound, (grid[i], want)


@pytest.mark.parametrize("beta", [*BETAS[:3], "tv"])
def test_many_largest_logits(beta):
    """A row in which all classes are alike, as of an untrained model."""
    x_q = (0.01 * np.random.default_rng(4).normal(size=(1, 1000))).astype(np.float32)
    x_p = np.zeros_like(x_q)
    value, grads = optimized(jax.value_and_grad(logits_divergence(beta), (0, 1)))(x_p, x_q)
    wanted, *wanted_grads = (np.array(a, float) for a in defined(x_p[0], x_q[0], 1.0, beta))
    np.testing.assert_allclose(value, wanted, rtol=5e-6)
    for grad, want in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(grad[0], want, rtol=0, atol=5e-6 * np.abs(want).max())


def test_the_textbook_formula_loses_what_is_kept():
    """The formula that others have: off by a thousandth for a noise of 0.03, and by a factor of some 50 at 1e-4."""
    rng = np.random.default_rng(1)
    x_p = (3 * rng.normal(size=(20, 1000))).astype(np.float32)
    for noise, least in ((0.03, 1e-4), (1e-4, 1.0)):
        x_q = (x_p + noise * rng.normal(size=x_p.shape)).astype(np.float32)
        exact = np.array([float(defined(p, q, 1.0, None)[0]) for p, q in zip(x_p[:2], x_q[:2], strict=True)])
        options = {"reduction": "none"}
        textbook = optimized(partial(reference.kl_divergence, **options))(x_p[:2], x_q[:2])
        ours = optimized(partial(jxent.kl_divergence, **options))(x_p[:2], x_q[:2])
        assert np.abs(textbook / exact - 1).max() > least
        assert np.abs(ours / exact - 1).max() < 5e-6


@pytest.mark.parametrize("beta", [*BETAS[:3], "tv"])
def test_equal_rows(beta):
    """0, with gradients of 0, in any dtype and for any logits."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 9)) * 8 + 20, dtype)
        value, grads = jax.value_and_grad(logits_divergence(beta), (0, 1))(x, x)
        assert value == 0
        assert value.dtype == jnp.float32
        assert not any(map(np.any, grads))
        assert [g.dtype for g in grads] == [dtype] * 2


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["", "Auto", "shard_map"])
@pytest.mark.parametrize("classes", [33, 40000])
def test_equal_rows_of_layers(classes, mode):
    """The total variation distance has sums of the same terms, which must be equal to the last bit."""
    hidden = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)
    kernel = jnp.asarray(RNG.normal(size=(3, classes - classes % 2 * (mode != ""))), jnp.float32)
    f = partial(jxent.linear_tv_distance, block_size=2)
    if mode:
        mesh = jax.make_mesh((2,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = (jax.P(), jax.P(None, "vocab")) * 2
        if mode == "shard_map":
            f = jax.shard_map(partial(f, axis_name="vocab"), mesh=mesh, in_specs=specs, out_specs=jax.P())
        hidden, kernel = (
            jax.device_put(a, jax.NamedSharding(mesh, spec))
            for a, spec in zip((hidden, kernel), specs[:2], strict=True)
        )
    value, grads = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(hidden, kernel, hidden, kernel)
    assert value == 0
    assert not any(map(np.any, grads))


FAR_ROWS = (  # in units of the largest number
    [-1] * 4,
    [-1, -np.inf, -1, -0.5],
    [0, 0, 0, -1],
    [0.3, 0.3, -0.3, -0.3],
    [-0.3, -0.6, 0.3, -0.3],
    [1] * 4,
)


@pytest.mark.parametrize("beta", [None, 0.5, 1e-10, "tv"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_as_large_as_there_are(dtype, beta):
    """Finite logits give no NaN: every pair of rows, a row of the least number among them."""
    rows = float(jnp.finfo(dtype).max) * np.array(FAR_ROWS) + np.array([[0, 1, 2, 0]])
    pairs = zip(*itertools.product(rows, repeat=2), strict=True)
    x_p, x_q = (np.asarray(jnp.array(np.array(side), dtype)) for side in pairs)
    value, pull = optimized(lambda *x: jax.vjp(partial(logits_divergence(beta), reduction="none"), *x))(x_p, x_q)
    grads = pull(jnp.ones_like(value))
    finite = np.isfinite(x_p).all(1) & np.isfinite(x_q).all(1)
    layers = [
        a for x in (x_p, x_q) for a in (jnp.eye(finite.sum(), dtype=dtype), x[finite])
    ]  # the logits are the kernels
    of_layers = optimized(partial(linear_divergence(beta), reduction="none", block_size=16))(*layers)
    np.testing.assert_allclose(of_layers, value[finite], rtol=5e-6)
    for i in range(len(x_p)):
        wanted, *wanted_grads = (np.array(a, float) for a in defined(x_p[i], x_q[i], 1.0, beta))
        if wanted < np.inf or i < 6:  # a P that underflows has nothing where Q alone masks a class
            np.testing.assert_allclose(value[i], wanted, rtol=5e-6, atol=1e-60)
        for grad, want in zip(grads, wanted_grads, strict=True):
            error = np.abs(grad[i].astype(float) - want)
            if np.isfinite(want).all():  # of an infinite KL the gradient by P is that of the smallest q
                assert np.max(error) <= (5e-6 if dtype == jnp.float32 else 4e-3) * np.abs(want).max() + 1e-37
            assert not np.isnan(error[np.isfinite(want)]).any()


@pytest.mark.parametrize("beta", [1e-3, 1e-6, 1e-10, 1e-15, 1e-17, 1e-30, 1 - 1e-3, 1 - 1e-10])
def test_small_shares_against_50_digits(beta):
    """The rows of P are those of Q with noise, or lie up to 60 apart. Either side may have the larger probability."""
    rng = np.random.default_rng(6)
    x_p = (3 * rng.normal(size=(12, 9))).astype(np.float32)
    noise = np.array([20, 8, 1, 1e-2] * 3)[:, None]
    x_q = (x_p + noise * rng.normal(size=x_p.shape)).astype(np.float32)
    function = partial(jxent.js_divergence, beta=beta, reduction="none")
    value, pull = optimized(lambda *x: jax.vjp(function, *x))(x_p, x_q)
    to_p, to_q = pull(jnp.ones_like(value))
    for i in range(len(x_p)):
        wanted = [np.array(a, float) for a in defined(x_p[i], x_q[i], 1.0, beta)]
        for found, want in zip((value[i], to_p[i], to_q[i]), wanted, strict=True):
            assert np.abs(np.asarray(found, float) - want).max() < 5e-6 * np.abs(want).max() + 1e-37


@pytest.mark.parametrize("beta", short((None, 0.3, "tv"), None, 0.3))
def test_the_temperature_of_masked_classes(beta):
    """z is infinite there, and its product with a gradient of 0 is 0, in each mode and at any temperature."""
    p, q = np.float32([1, -np.inf, 3, 0.5]), np.float32([0, -np.inf, -3, 2])

    def f(temperature, p, q):
        return logits_divergence(beta)(p, q, temperature=temperature)

    @jax.jit
    @jax.vmap
    def derivatives(temperature, p, q):
        at = temperature, p, q
        return (
            jax.value_and_grad(f)(*at),
            jax.jvp(f, at, (jnp.ones(()), *map(jnp.zeros_like, at[1:]))),
            jax.grad(jax.grad(f))(*at),
        )

    temperatures = jnp.float32([0.01, 0.2, 1.0, 2e37])
    shared = [jnp.tile(x, (4, 1)) for x in (p, q)]
    found = derivatives(temperatures, *shared)
    wanted = derivatives(temperatures, *(x[:, [0, 2, 3]] for x in shared))
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)


# --- against plain formulas -------------------------------------------------------------------------------------------

SHAPE = (3, 4)
RNG = np.random.default_rng(3)
LOGITS = tuple(2 * RNG.normal(size=(*SHAPE, 7)) for _ in range(2))
WEIGHT, WHERE = RNG.uniform(0.5, 2, SHAPE), RNG.random(SHAPE) < 0.7
LAYERS = {
    "hidden_p": RNG.normal(size=(*SHAPE, 5)),
    "kernel_p": RNG.normal(size=(5, 11)),
    "hidden_q": RNG.normal(size=(*SHAPE, 3)),
    "kernel_q": RNG.normal(size=(11, 3)),
    "bias_p": RNG.normal(size=11),
    "bias_q": RNG.normal(size=11),
    "temperature": np.array(1.3),
    "sample_weight": WEIGHT,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.covering("None-mean-rf")
@pytest.mark.parametrize("modes", short(("", "r", "f", "rr", "rf", "fr", "ff"), "", "r", "f", "rf", "fr"))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("beta", [None, 0.3, "tv"])
def test_derivatives(beta, reduction, modes):
    def f(module, p, q, temperature, weight):
        options = {"temperature": temperature, "sample_weight": weight, "where": WHERE, "reduction": reduction}
        return logits_divergence(beta, module)(p, q, **options)

    at = (*map(jnp.asarray, LOGITS), jnp.array(1.7), jnp.asarray(WEIGHT))
    found, wanted = (differentiated(partial(f, module), modes)(*at) for module in (jxent, reference))
    chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", short((None, 0.3, "tv"), None, 0.3))
def test_hessian_of_equal_rows(beta):
    """Nothing here may be differentiated as if the absolute value of a difference had a slope of 0 at 0."""
    at, options = (jnp.asarray(LOGITS[0]),) * 2, {"temperature": 1.7}
    found, wanted = (
        jax.jit(jax.hessian(partial(logits_divergence(beta, module), **options), (0, 1)))(*at)
        for module in (jxent, reference)
    )
    chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-12)


def linear(beta, options, arrays):
    arrays = dict(arrays)
    first = [arrays.pop(name) for name in ("hidden_p", "kernel_p", "hidden_q", "kernel_q")]
    return linear_divergence(beta)(*first, **arrays, vocab_axis=(-1, 0), where=WHERE, **options)


def plain(beta, reduction, arrays):
    p = arrays["hidden_p"] @ arrays["kernel_p"] + arrays["bias_p"]
    q = arrays["hidden_q"] @ arrays["kernel_q"].T + arrays["bias_q"]
    options = {name: arrays[name] for name in ("temperature", "sample_weight")}
    return logits_divergence(beta, reference)(p, q, where=WHERE, reduction=reduction, **options)


# (modes, block_size, recompute, reduction): all of the last three to the first order, further orders of some.
WAYS = [
    *itertools.product(("r",), (None, 5), (False, True), ("mean", "sum", "none")),
    *((modes, 5, recompute, "mean") for modes in ("", "f", "rr", "rf", "fr", "ff") for recompute in (False, True)),
    *((modes, 5, False, "none") for modes in ("", "f", "rr", "rf", "fr", "ff")),
]
SHORT_WAYS = [
    *(("r", None, False, "mean"), ("r", 5, True, "sum"), ("r", 5, False, "none")),
    ("f", 5, True, "mean"),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.covering
@pytest.mark.parametrize("beta", [None, 0.3, "tv"])
@pytest.mark.parametrize(("modes", "block_size", "recompute", "reduction"), short(WAYS, *SHORT_WAYS))
def test_linear(modes, block_size, recompute, reduction, beta):
    """The value and the derivatives by all eight arrays, of both sides, whatever the blocks."""
    options = {"block_size": block_size, "recompute": recompute, "reduction": reduction}
    names, at = tuple(LAYERS), tuple(map(jnp.asarray, LAYERS.values()))
    ours = differentiated(lambda *at: linear(beta, options, dict(zip(names, at, strict=True))), modes)
    theirs = differentiated(lambda *at: plain(beta, reduction, dict(zip(names, at, strict=True))), modes)
    found, wanted = ours(*at), theirs(*at)
    chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "float16"), ("float32", "bfloat16")])
def test_dtypes_of_the_sides(dtypes):
    """Each side multiplies in its own dtype; gradients come back in that of their argument."""
    sides = zip(("_p", "_q"), dtypes, strict=True)
    p, q = ([LAYERS[name + of].astype(dtype) for name in ("hidden", "kernel")] for of, dtype in sides)
    f = partial(jxent.linear_kl_divergence, vocab_axis=(-1, 0), block_size=5)
    value, grads = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(*p, *q)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.dtype(dtypes[0])] * 2 + [jnp.dtype(dtypes[1])] * 2
    wide = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(*(a.astype(jnp.float32) for a in (*p, *q)))
    for found, wanted in zip(jax.tree.leaves((value, grads)), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=3e-2 * np.abs(wanted).max())


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 100.0])
def test_float16_at_any_temperature(temperature):
    """The logits' gradients of a block neither overflow nor vanish, however much a temperature multiplies them."""
    arrays = [LAYERS[name] for name in ("hidden_p", "kernel_p", "hidden_q", "kernel_q")]
    small = [(a * temperature if "k" in name else a) for name, a in zip(("h", "k", "h", "k"), arrays, strict=True)]
    f = partial(jxent.linear_kl_divergence, vocab_axis=(-1, 0), block_size=5, temperature=temperature, reduction="sum")
    half = [a.astype(np.float16) for a in small]
    found = jax.grad(f, (2, 3))(*half)
    wanted = jax.grad(f, (2, 3))(*(a.astype(np.float32) for a in half))
    for got, want in zip(found, wanted, strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got.astype(np.float32), want, rtol=0, atol=2e-3 * np.abs(want).max())


@pytest.mark.usefixtures("x64")
def test_a_float64_temperature_makes_the_divergence_float64():
    """As any float64 input does."""
    (p, q), t = (x.astype(np.float32) for x in LOGITS), jnp.float64(1.3)
    layers = [LAYERS[name].astype(np.float32) for name in ("hidden_p", "kernel_p", "hidden_q", "kernel_q")]
    for beta in (None, 0.3):
        f = logits_divergence(beta)
        wide = f(*(x.astype(np.float64) for x in (p, q)), temperature=t)
        value, to_t = jax.value_and_grad(lambda t, f=f: f(p, q, temperature=t))(t)
        np.testing.assert_allclose(value, wide, rtol=1e-13)
        assert value.dtype == to_t.dtype == jnp.float64
        assert linear_divergence(beta)(*layers, vocab_axis=(-1, 0), temperature=t).dtype == jnp.float64
    weighed = jxent.cross_entropy(p, jax.nn.softmax(q), class_weight=jnp.ones(7))
    assert weighed.dtype == jnp.float64


def test_other_layouts():
    """A class axis in front, one row alone, and weights that broadcast."""
    p, q = (x.astype(np.float32) for x in LOGITS)
    found = jxent.kl_divergence(np.moveaxis(p, -1, 1), np.moveaxis(q, -1, 1), axis=1, reduction="none")
    np.testing.assert_allclose(found, reference.kl_divergence(p, q, reduction="none"), rtol=1e-5)
    np.testing.assert_allclose(jxent.js_divergence(p[0, 0], q[0, 0]), reference.js_divergence(p[0, 0], q[0, 0]), 1e-5)
    weighed = jxent.kl_divergence(p, q, sample_weight=np.float32([1, 2, 0, 1]))
    np.testing.assert_allclose(weighed, reference.kl_divergence(p, q, sample_weight=np.array([1.0, 2, 0, 1])), 1e-5)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [None, 0.3, "tv"])
def test_classes_that_both_mask(beta):
    """They count for nothing, as if they were not there."""
    p, q = (x[0].astype(np.float32) for x in LOGITS)
    rest = np.array([0, 1, 3, 4, 6])
    f = jax.jit(jax.value_and_grad(logits_divergence(beta), (0, 1)))
    masked = [np.where(np.isin(np.arange(7), rest), x, -np.inf) for x in (p, q)]
    value, grads = f(*masked)
    wanted, grads_wanted = f(p[:, rest], q[:, rest])
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for grad, want in zip(grads, grads_wanted, strict=True):
        np.testing.assert_allclose(grad[:, rest], want, rtol=1e-5, atol=1e-7)
        assert not np.any(grad[:, [2, 5]])


@pytest.mark.parametrize("beta", [None, 0.3, "tv"])
def test_classes_that_p_masks(beta):
    p, q = (x[0].astype(np.float32) for x in LOGITS)
    p[:, [1, 4]] = -np.inf
    value, grads = jax.value_and_grad(partial(logits_divergence(beta), reduction="sum"), (0, 1))(p, q)
    wanted = [defined(*rows, 1.0, beta) for rows in zip(p, q, strict=True)]
    np.testing.assert_allclose(value, float(sum(w[0] for w in wanted)), rtol=1e-6)
    for i, grad in enumerate(grads):
        np.testing.assert_allclose(grad, np.array([w[1 + i] for w in wanted], float), rtol=1e-5, atol=1e-7)


def test_a_class_that_q_masks():
    """KL is infinite where P has the class, however rarely; gradients are finite, and push P off it. JS is finite."""
    p, q = (x[0].astype(np.float32) for x in LOGITS)
    p[2, 3] = -80.0  # P has it with a probability of 1e-36
    q[:3, 3] = -np.inf
    values = jxent.kl_divergence(p, q, reduction="none")
    np.testing.assert_array_equal(np.isinf(values), [True, True, True, False])
    to_p, to_q = jax.grad(partial(jxent.kl_divergence, reduction="sum"), (0, 1))(p, q)
    assert np.isfinite(to_p).all()
    assert np.isfinite(to_q).all()
    assert (to_p[:2, 3] > 0).all()
    assert np.abs(to_p).max() < -np.log(np.finfo(np.float32).tiny)  # as for the smallest q, not as for none at all
    assert not np.any(to_q[:3, 3] > 0)
    for i in range(3):
        value, *wanted = defined(p[i], q[i], 1.0, 0.3)
        found, grads = jax.value_and_grad(partial(jxent.js_divergence, beta=0.3), (0, 1))(p[i], q[i])
        np.testing.assert_allclose(found, float(value), rtol=1e-6)
        chex.assert_tree_all_finite(grads)
        np.testing.assert_allclose(grads[1], np.array(wanted[1], float), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", short((None, 0.3, "tv"), None, 0.3))
@pytest.mark.parametrize("side", [0, 1])
def test_a_row_without_a_class(side, beta):
    """There is no distribution: NaN, at its own position alone."""
    rows = [x[0].astype(np.float32) for x in LOGITS]
    rows[side][2] = -np.inf
    values, pull = jax.vjp(partial(logits_divergence(beta), reduction="none"), *rows)
    np.testing.assert_array_equal(np.isnan(values), [False, False, True, False])
    for gradient in pull(jnp.ones_like(values)):
        np.testing.assert_array_equal(np.isnan(gradient).all(-1), np.isnan(values))


@pytest.mark.parametrize("beta", [None, 0.3, "tv"])
def test_what_does_not_count(beta):
    """It reaches nothing, whatever it holds; and where nothing counts the mean is NaN, with gradients of 0."""
    p, q = (np.where(WHERE[..., None], x, np.nan).astype(np.float32) for x in LOGITS)
    f = jax.jit(jax.value_and_grad(lambda p, q, where: logits_divergence(beta)(p, q, where=where), (0, 1)))
    value, grads = f(p, q, WHERE)
    np.testing.assert_allclose(value, logits_divergence(beta, reference)(*(x[WHERE] for x in LOGITS)), rtol=1e-5)
    for grad in grads:
        assert np.isfinite(grad).all()
        assert not np.any(grad[~WHERE])
    value, grads = f(p, q, np.zeros(SHAPE, bool))
    assert np.isnan(value)
    assert not any(map(np.any, grads))
    hidden_p, hidden_q = (np.where(WHERE[..., None], LAYERS[name], np.inf) for name in ("hidden_p", "hidden_q"))
    f = jax.jit(jax.grad(lambda arrays: linear(beta, {"block_size": 5}, arrays)))
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in LAYERS.items()}
    found = f(arrays | {"hidden_p": jnp.asarray(hidden_p), "hidden_q": jnp.asarray(hidden_q)})
    chex.assert_trees_all_close(found, f(arrays), rtol=1e-5)


# --- programs ---------------------------------------------------------------------------------------------------------


def program(f, wrt, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return optimized(jax.value_and_grad(f, wrt)).lower(*arrays).compile()


@pytest.mark.parametrize(
    ("beta", "wrt", "recompute", "dots", "arrays"),
    [
        (None, (2, 3), False, 4, 3.1),
        (None, (2, 3), True, 6, 3.1),
        (None, (0, 1), False, 4, 3.1),
        (None, (0, 1, 2, 3), False, 6, 4.1),
        (0.5, (2, 3), False, 4, 4.1),
        ("tv", (2, 3), False, 4, 3.1),
    ],
)
def test_matmuls_and_memory(beta, wrt, recompute, dots, arrays):
    """A frozen teacher costs one matmul; what is held is blocks of logits (`arrays` of them) and the gradients."""
    positions, vocab, features_p, features, block = 512, 8192, 32, 16, 64
    f = partial(linear_divergence(beta), recompute=recompute, block_size=block)
    shapes = ((positions, features_p), (features_p, vocab), (positions, features), (features, vocab))
    compiled = program(f, wrt, *shapes)
    assert len(re.findall(r" dot\(", compiled.as_text())) == dots
    gradients = 4 * sum(np.prod(shapes[i]) for i in wrt)
    assert compiled.memory_analysis().temp_size_in_bytes < arrays * 4 * block * vocab + 3 * gradients


def test_default_block():
    """Half of that of `linear_cross_entropy`, which has 512 of these positions in a block."""
    text = program(jxent.linear_kl_divergence, (2, 3), (2048, 4), (4, 32000), (2048, 4), (4, 32000)).as_text()
    assert "f32[256,32000]" in text
    assert "f32[512,32000]" not in text


@pytest.mark.parametrize(("beta", "most"), [(None, 0.05), (0.5, 1.05), ("tv", 0.05)])
def test_memory_of_logits(beta, most):
    """Forwards nothing of the size of the logits, but JS the distance of the two; backwards the gradient."""
    shape = (256, 8192)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2
    size = 4 * np.prod(shape)
    forward = optimized(logits_divergence(beta)).lower(*arrays).compile()
    assert forward.memory_analysis().temp_size_in_bytes < most * size
    backward = program(logits_divergence(beta), 1, shape, shape)
    assert backward.memory_analysis().temp_size_in_bytes < most * size


def test_a_frozen_side_has_no_gradient_computed():
    """`stop_gradient` says so as well as `argnums` do."""
    shapes = ((64, 8), (8, 256), (64, 4), (4, 256))

    def f(*arrays):
        return jxent.linear_kl_divergence(*map(jax.lax.stop_gradient, arrays[:2]), *arrays[2:], block_size=16)

    assert len(re.findall(r" dot\(", program(f, (0, 1, 2, 3), *shapes).as_text())) == 4


def test_under_transformations():
    """`vmap` over examples, with a teacher that all share; a scan; a checkpoint."""
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in LAYERS.items()}
    p, q = (arrays["hidden_p"], arrays["kernel_p"]), (arrays["hidden_q"], arrays["kernel_q"])
    f = partial(jxent.linear_kl_divergence, vocab_axis=(-1, 0), block_size=2)
    of_one = jax.value_and_grad(f, 3)
    each, of_one = jax.jit(jax.vmap(of_one, (0, None, 0, None)))(*p, *q), jax.jit(of_one)
    for i in range(SHAPE[0]):
        one = of_one(p[0][i], p[1], q[0][i], q[1])
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], each), one, rtol=1e-5, atol=1e-7)

    def scanned(kernel):
        def step(total, hidden):
            return total + jax.checkpoint(f)(hidden[0], p[1], hidden[1], kernel), None

        return jax.lax.scan(step, 0.0, (p[0], q[0]))[0]

    total = jax.jit(jax.value_and_grad(scanned))(q[1])
    chex.assert_trees_all_close(total, jax.tree.map(lambda a: jnp.sum(a, 0), each), rtol=1e-5, atol=1e-6)


def test_checkify_names_what_is_not_finite():
    p, q = (x.astype(np.float32) for x in LOGITS)
    p[1, 2, 3], hidden = np.nan, LAYERS["hidden_q"].copy()
    hidden[2, 1, 0] = np.inf
    for f, arrays, says in (
        (jxent.kl_divergence, (p, q), r"kl_divergence: logits_p has nan at \[1 2 3\]"),
        (
            partial(jxent.linear_js_divergence, vocab_axis=(-1, 0)),
            (LAYERS["hidden_p"], LAYERS["kernel_p"], hidden, LAYERS["kernel_q"]),
            r"linear_js_divergence: hidden_q has inf at \[2 1 0\]",
        ),
    ):
        error, _ = jax.jit(checkify.checkify(f, errors=checkify.user_checks))(*arrays)
        with pytest.raises(checkify.JaxRuntimeError, match=says):
            error.throw()


# Before they are divided, the logits of a confident row may lie close together.
@pytest.mark.parametrize("function", [jxent.kl_divergence, jxent.js_divergence])
def test_small_temperatures_of_confident_rows(function):
    scale = 2.0**-7  # a power of 2, so that the quotients have no rounding
    rng = np.random.default_rng(0)
    p = rng.normal(size=(6, 5)).astype(np.float32)
    p[:, 1] += np.array([3, 6, 9, 12, 15, 20], np.float32)
    q = p + rng.normal(size=p.shape).astype(np.float32) / 2

    def gradients(temperature):
        def total(p, q):
            return function(p, q, temperature=temperature, reduction="sum")

        return jax.grad(total, (0, 1))(p * temperature, q * temperature)

    for cool, plain in zip(gradients(scale), gradients(1.0), strict=True):
        np.testing.assert_allclose(cool * scale, plain, rtol=2e-6)
