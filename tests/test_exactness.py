"""Full relative precision of losses and gradients, at every margin and offset (docs/theory/formulas.md).

The bound is 5e-6 for float32: x - m rounds to half an ulp of at most 64, which is 1.9e-6 of exp(x - m), and log p
rounds likewise once more. A gradient element below float32's normal range is not judged.
"""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
from compiling import optimized
from grids import short
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jxent

BOUND = 5e-6
SMALLEST = float(jnp.finfo(jnp.float32).tiny)
MARGINS = (0.0, 1e-3, 1.0, 5.0, 10.0, 17.0, 20.0, 30.0, 40.0, 60.0)
CLASSES = (2, 3, 10, 1000, 32000, 50257)
OFFSETS = (-300.0, -10.0, 0.0, 50.0, 1e3, 1e4)


def rows(classes, offset, dtype=np.float32):
    """Rows of every margin, labelled with the largest class and with another, as the dtype holds them."""
    rng = np.random.default_rng(classes)
    logits, labels = [], []
    for margin, right in itertools.product(MARGINS, (True, False)):
        row = 0.5 * rng.normal(size=classes)
        top = rng.integers(classes)
        row[top] = row.max() + margin
        logits.append(row + offset)
        labels.append(top if right else (top + 1) % classes)
    return np.asarray(jnp.asarray(np.stack(logits), dtype)), np.asarray(labels, np.int32)


def worst(got, want):
    """Largest relative error of the elements that float32 can hold as normal numbers."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    judged = np.abs(want) >= SMALLEST
    assert judged.any()
    return np.max(np.abs(got - want)[judged] / np.abs(want)[judged])


def pull(loss, logits):
    """The losses of all positions, and the gradient of their sum."""
    values, vjp = jax.vjp(loss, logits)
    return values, vjp(jnp.ones_like(values))[0]


def losses_and_gradients(logits, labels, one_hot, axis_name=None):
    options = {"reduction": "none", "axis_name": axis_name}

    losses = {
        "index labels": lambda x: jxent.cross_entropy(x, labels, **options),
        "index labels, with stats": lambda x: jxent.cross_entropy(x, labels, return_stats=True, **options)[0],
        "one-hot labels": lambda x: jxent.cross_entropy(x, one_hot, **options),
        "log_softmax, nll_loss": lambda x: jxent.nll_loss(jxent.log_softmax(x, axis_name=axis_name), labels, **options),
    }
    return {name: pull(loss, logits) for name, loss in losses.items()}


@pytest.mark.covering
@pytest.mark.parametrize("offset", short(OFFSETS, -300.0, 0.0, 50.0, 1e4))
@pytest.mark.parametrize("classes", short(CLASSES, 2, 10, 1000, 50257))
def test_float32(classes, offset):
    logits, labels = rows(classes, offset)
    log_p = oracle.log_softmax(logits)
    loss = -np.take_along_axis(log_p, labels[:, None], -1)[:, 0]
    one_hot = oracle.one_hot(labels, classes).astype(np.float32)
    for name, (value, gradient) in optimized(losses_and_gradients)(logits, labels, one_hot).items():
        assert worst(value, loss) < BOUND, name
        assert worst(gradient, oracle.logit_gradient(logits, labels)) < BOUND, name
    assert worst(optimized(jxent.log_softmax)(logits), log_p) < BOUND
    assert worst(optimized(jxent.softmax)(logits), np.exp(log_p)) < BOUND
    chex.assert_trees_all_close(
        optimized(jxent.logsumexp)(logits), oracle.logsumexp(logits).astype(np.float32), rtol=BOUND
    )


def everything(logits, labels, one_hot, axis_name=None):
    """(losses by name, gradients by name, log-probabilities, probabilities, log-normalizers)."""

    def linear(x, reduction):  # x as the kernel: the logits are its entries, and its gradient is theirs
        eye = jax.lax.stop_gradient(jnp.eye(len(labels), dtype=x.dtype))
        return jxent.linear_cross_entropy(eye, x, labels, reduction=reduction, axis_name=axis_name, block_size=32)

    pairs = losses_and_gradients(logits, labels, one_hot, axis_name)
    pairs["linear"] = losses, _ = pull(partial(linear, reduction="none"), logits)
    pairs["linear, sum"] = losses, jax.grad(partial(linear, reduction="sum"))(logits)
    losses, gradients = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    return (
        losses,
        gradients,
        *(f(logits, axis_name=axis_name) for f in (jxent.log_softmax, jxent.softmax, jxent.logsumexp)),
    )


@pytest.mark.covering("shard_map-8")
@pytest.mark.parametrize(
    ("way", "classes"),
    short(
        [("shard_map", 8), ("shard_map", 1000), ("Auto", 1000), ("Explicit", 1000)], ("shard_map", 8), ("Auto", 1000)
    ),
)
def test_float32_on_shards(way, classes):
    """Classes over eight devices; the label on the largest logit's shard and on another, all offsets at once."""
    every = [rows(classes, offset) for offset in OFFSETS]
    logits, labels = (np.concatenate([row[i] for row in every] * 2) for i in (0, 1))
    half = len(labels) // 2
    labels[half:] = (labels[half:] + classes // 2) % classes
    mesh = jax.make_mesh((8,), ("vocab",), axis_types=(AxisType.Explicit if way == "Explicit" else AxisType.Auto,))
    specs = P(None, "vocab"), P(), P(None, "vocab")
    one_hot = oracle.one_hot(labels, classes).astype(np.float32)
    arrays = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((logits, labels, one_hot), specs, strict=True)]
    if way == "shard_map":
        out = P(), specs[0], specs[0], specs[0], P()
        f = jax.shard_map(partial(everything, axis_name="vocab"), mesh=mesh, in_specs=specs, out_specs=out)
        losses, gradients, log_p, p, log_normalizer = optimized(f)(*arrays)
    else:
        losses, gradients, log_p, p, log_normalizer = optimized(everything)(*arrays)

    want = oracle.log_softmax(logits)
    loss, gradient = -np.take_along_axis(want, labels[:, None], -1)[:, 0], oracle.logit_gradient(logits, labels)
    for name in losses:
        assert worst(losses[name], loss) < BOUND, name
        assert worst(gradients[name], gradient) < BOUND, name
    assert worst(log_p, want) < BOUND
    assert worst(p, np.exp(want)) < BOUND
    chex.assert_trees_all_close(log_normalizer, oracle.logsumexp(logits).astype(np.float32), rtol=BOUND)


@pytest.mark.covering("bfloat16-3")
@pytest.mark.parametrize("classes", [3, 1000, 50257])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits(dtype, classes):
    """The loss is that of the logits upcast, in float32; the gradient is rounded once, to the logits' dtype."""
    logits, labels = rows(classes, 0.0, dtype)
    chex.assert_type(jxent.cross_entropy(logits, labels), jnp.float32)
    upcast = logits.astype(np.float64)
    loss = -np.take_along_axis(oracle.log_softmax(upcast), labels[:, None], -1)[:, 0]
    value, gradient = optimized(partial(pull, lambda x: jxent.cross_entropy(x, labels, reduction="none")))(logits)
    assert worst(value, loss) < BOUND
    chex.assert_type(gradient, dtype)
    want = oracle.logit_gradient(upcast, labels)
    half_ulp = float(jnp.finfo(dtype).eps) / 2 + BOUND
    normal = np.abs(want) >= float(jnp.finfo(dtype).tiny)
    error = np.abs(np.asarray(gradient, np.float64) - want)
    assert np.all(error[normal] <= half_ulp * np.abs(want)[normal])


@pytest.mark.parametrize("value", [0.0, 1.0, -7.5, 1e4, 1e8])
def test_equal_logits(value):
    assert jxent.cross_entropy(jnp.array([[value, value]]), jnp.array([1])) == np.float32(np.log(2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("classes", [2, 1000])
def test_float64(classes):
    logits, labels = rows(classes, 0.0, np.float64)
    value, gradient = optimized(partial(pull, lambda x: jxent.cross_entropy(x, labels, reduction="none")))(logits)
    chex.assert_type(value, jnp.float64)
    loss = -np.take_along_axis(oracle.log_softmax(logits), labels[:, None], -1)[:, 0]
    # Half an ulp of 64 in float64 is 3.6e-15; as above, with the oracle's own rounding.
    assert worst(value, loss) < 2e-14
    assert worst(gradient, oracle.logit_gradient(logits, labels)) < 2e-14


def off(got, want, terms):
    """Largest error in units of the terms' magnitudes, where float32 can hold those as normal numbers."""
    got, want, terms = (np.asarray(a, np.float64) for a in (got, want, terms))
    judged = terms >= SMALLEST
    assert judged.any()
    return np.max(np.abs(got - want)[judged] / terms[judged])


def along(losses, logits, v):
    """(the losses' tangents along v, the Hessian of their sum times v, forwards over reverse and the other way)."""

    def total(x):
        return jnp.sum(losses(x))

    def tangent(x):
        return jax.jvp(total, (x,), (v,))[1]

    return (
        jax.jvp(losses, (logits,), (v,))[1],
        jax.jvp(jax.grad(total), (logits,), (v,))[1],
        jax.grad(tangent)(logits),
    )


def second_derivatives(logits, labels, one_hot, v):
    eye = jnp.eye(len(labels), dtype=logits.dtype)  # the hidden states: logits are the kernel's entries

    def linear(reduction):
        return lambda x: jxent.linear_cross_entropy(eye, x, labels, reduction=reduction, block_size=32)

    losses = {
        "index labels": lambda x: jxent.cross_entropy(x, labels, reduction="none"),
        "smoothed": lambda x: jxent.cross_entropy(x, labels, label_smoothing=0.1, reduction="none"),
        "one-hot labels": lambda x: jxent.cross_entropy(x, one_hot, reduction="none"),
        "log_softmax, nll_loss": lambda x: jxent.nll_loss(jxent.log_softmax(x), labels, reduction="none"),
        "linear": linear("none"),
        "linear, sum": linear("sum"),
    }
    return {name: along(loss, logits, v) for name, loss in losses.items()}


def assert_exact(logits, labels, bound, arithmetic=oracle.Float64):
    """Tangents within the bound, Hessian-vector products within twice that."""
    classes = logits.shape[-1]
    v = np.random.default_rng(classes).normal(size=logits.shape).astype(logits.dtype)
    one_hot = oracle.one_hot(labels, classes).astype(logits.dtype)
    found = optimized(second_derivatives)(logits, labels, one_hot, v)
    for name, (tangent, *products) in found.items():
        want = oracle.derivatives(logits, labels, v, 0.1 if name == "smoothed" else 0.0, arithmetic)
        if name == "linear, sum":
            assert off([tangent], [want.tangent.sum()], [want.tangent_terms.sum()]) < bound, name
        else:
            assert off(tangent, want.tangent, want.tangent_terms) < bound, name
        for product in products:
            assert off(product, want.product, want.product_terms) < 2 * bound, name


@pytest.mark.covering
@pytest.mark.parametrize("offset", short((-300.0, 0.0, 1e4), -300.0, 1e4))
@pytest.mark.parametrize("classes", short((2, 1000, 50257), 2, 50257))
def test_tangents_and_second_derivatives(classes, offset):
    assert_exact(*rows(classes, offset), BOUND)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("classes", short((2, 10, 1000), 10))
def test_tangents_and_second_derivatives_in_float64(classes):
    with mpmath.workdps(50):
        assert_exact(*rows(classes, 0.0, np.float64), 1e-12, oracle.Digits)


@pytest.mark.covering("index-{'label_smoothing': 0.1}-1000")
@pytest.mark.parametrize("classes", [3, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"z_loss_weight": 1e-3},
        {"label_smoothing": 0.1, "z_loss_weight": 1e-3},
        {"label_smoothing": 0.1, "class_weight": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_sums_of_positive_terms(kind, options, classes):
    """Smoothing, z-loss and soft labels add terms that are all >= 0: the sum is as exact as log p."""
    logits, labels = rows(classes, 0.0)
    rng = np.random.default_rng(0)
    if options.get("class_weight"):
        options = options | {"class_weight": rng.uniform(0.5, 2, classes).astype(np.float32)}
    if kind == "probabilities":
        labels = rng.dirichlet(np.full(classes, 0.3), len(labels)).astype(np.float32)
    want = oracle.cross_entropy(logits, labels, reduction="none", **options)
    loss = optimized(partial(jxent.cross_entropy, reduction="none", **options))
    assert worst(loss(logits, labels), want) < BOUND


@pytest.mark.parametrize("margin", [5.0, 20.0, 40.0])
def test_softcap(margin):
    """Rounding the capped logits, half an ulp of the cap, is the only loss."""
    logits, labels = rows(1000, 0.0)
    logits = logits + margin * (np.arange(1000) == 0).astype(np.float32)
    want = oracle.cross_entropy(logits, labels, reduction="none", logit_softcap=30.0)
    # tanh rounds within 3e-7, times a cap of 30, twice.
    assert worst(jxent.cross_entropy(logits, labels, reduction="none", logit_softcap=30.0), want) < 2 * 30 * 3e-7
    x = jnp.array([25.0, 300.0, 1000.0])  # where 1 - tanh**2 has no digit left
    slope = jax.grad(lambda x: jxent.cross_entropy(x, jnp.array(0), logit_softcap=30.0))(x)
    assert slope[1] > 0
    u = np.asarray(x[1:], np.float64) / 30
    ratio = np.cosh(u[0]) ** 2 / np.cosh(u[1]) ** 2
    np.testing.assert_allclose(slope[2] / slope[1], ratio, rtol=1e-4)  # exp(-2 u) rounds u = 33 to 2e-6, doubled


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [0.5, 2, 1, 3]])
def test_smoothing_of_a_confident_row(weights):
    """The gradient of the largest logit, too, whose probability is 1 but for 1e-8."""
    logits, w = np.array([1.0, 20.0, 0.0, -3.0], np.float32), np.array(weights, np.float32)
    options = {"class_weight": None if weights[0] == 1 else jnp.asarray(w), "label_smoothing": 0.1, "reduction": "sum"}
    got = jax.grad(lambda x: jxent.cross_entropy(x, jnp.array(1), **options))(jnp.asarray(logits))
    p = np.exp(oracle.log_softmax(logits))
    want = 0.9 * w[1] * oracle.logit_gradient(logits, np.array(1)) + 0.1 / 4 * (p * w.sum() - w)
    assert worst(got, want) < BOUND


def test_near_one_hot_labels():
    """The gradient of a confident row under nearly one-hot labels, where p * sum(q) - q cancels."""
    logits = np.array([[25.0, 0.0, -1.0]], np.float32)
    labels = np.array([[1.0, 1e-9, 2e-9]], np.float32)
    log_p, q = oracle.log_softmax(logits), labels.astype(np.float64)
    want = np.exp(log_p) * q.sum() - q
    want[0, 0] = q[0, 1:].sum() + q.sum() * np.expm1(log_p[0, 0])
    got = jax.grad(lambda x: jxent.cross_entropy(x, labels, reduction="sum"))(logits)
    assert worst(got, want) < BOUND


def test_softmax_gradient_of_a_confident_row():
    logits, cotangent = np.array([20.0, 0.0, 1.0], np.float32), np.array([3.0, 1.0, -2.0], np.float32)
    p = np.exp(oracle.log_softmax(logits))
    g = cotangent.astype(np.float64) - cotangent[0]
    want = p * (g - (p * g).sum())
    _, vjp = jax.vjp(jxent.softmax, jnp.asarray(logits))
    assert worst(vjp(jnp.asarray(cotangent))[0], want) < BOUND
    _, vjp = jax.vjp(jxent.log_softmax, jnp.asarray(logits))
    total = cotangent.astype(np.float64).sum()
    want = cotangent - p * total
    want[0] = -cotangent[1:].astype(np.float64).sum() - np.expm1(oracle.log_softmax(logits)[0]) * total
    assert worst(vjp(jnp.asarray(cotangent))[0], want) < BOUND


def test_softmax_gradient_of_ties():
    """A cotangent with a common part, which the gradient does not depend on."""
    cotangent = np.random.default_rng(0).normal(size=1000).astype(np.float32) + np.float32(100)
    (gradient,) = jax.vjp(jxent.softmax, jnp.zeros(1000))[1](jnp.asarray(cotangent))
    g = cotangent.astype(np.float64)
    np.testing.assert_allclose(gradient, (g - g.mean()) / 1000, rtol=0, atol=1e-5 / 1000)


@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_softcap_of_a_confident_row(kind):
    """The capped logits differ by less than they round: x - m must not be the difference of two rounded tanh."""
    logits, cap = np.array([[58.70677, 0.63705, -20.0], [40.0, 39.0, 2.0]], np.float32), 30.0
    a, b = logits.astype(np.float64) / cap, logits.max(-1, keepdims=True).astype(np.float64) / cap
    z = cap * np.sinh(a - b) / (np.cosh(a) * np.cosh(b))
    labels = np.zeros(2, np.int32)
    want = np.log1p(np.exp(z[:, 1:]).sum(-1))
    given = labels if kind == "index" else oracle.one_hot(labels, 3).astype(np.float32)
    got, stats = jxent.cross_entropy(logits, given, logit_softcap=cap, reduction="none", return_stats=True)
    assert worst(got, want) < 2e-5  # z is up to 50 and rounds to 2e-6; tanh and exp add as much again
    log_p = z - want[:, None]
    assert worst(stats.entropy, -(np.exp(log_p) * log_p).sum(-1)) < 2e-5


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_tangents_where_the_softcap_saturates(temperature):
    """Capped logits nearly agree, and their slopes differ 1e4 times: a reference with another slope takes digits."""
    logits, cap = np.array([-4.0, -36.0, -12.0], np.float32), 5.0
    x = logits.astype(np.float64) / cap
    p = np.exp(oracle.log_softmax(cap * np.tanh(x) / temperature))
    slope = np.cosh(x) ** -2 / temperature
    want = slope * (np.eye(3) - p)  # of log p
    options = {"logit_softcap": cap, "temperature": temperature}

    def log_p(kernel):
        out = jxent.linear_cross_entropy(np.ones((3, 1)), kernel, jnp.arange(3), reduction="none", **options)
        return -out

    def listed(kernel):
        out = jxent.linear_log_probs(np.ones((3, 1)), kernel, jnp.arange(3)[:, None], **options)
        return out.log_probs[:, 0], out.log_rest

    kernel, bound = jnp.asarray(logits)[None], 2e-5  # exp(-2 u) rounds u = 7, doubled
    assert worst(jax.jacfwd(log_p)(kernel)[:, 0], want) < bound
    of_listed, of_rest = jax.jacfwd(listed)(kernel)
    assert worst(of_listed[:, 0], want) < bound
    share = (1 - np.eye(3)) * p / (1 - p[:, None])
    assert worst(of_rest[:, 0], slope * (share - p)) < bound


@pytest.mark.parametrize("label", [0, 1])
def test_smoothing_towards_one_class(label):
    """All the smoothing goes to the confident class, where p V - w cancels; and log_z itself is needed exactly."""
    logits, weight = np.array([[0.0, -20.0, -21.0]], np.float32), np.array([1.0, 0.0, 0.0], np.float32)
    options = {"class_weight": weight, "label_smoothing": 0.1}
    log_p = oracle.log_softmax(logits)[0]
    value, gradient = jax.value_and_grad(
        lambda x: jxent.cross_entropy(x, jnp.array([label]), reduction="sum", **options)
    )(logits)
    assert worst(value, oracle.cross_entropy(logits, np.array([label]), reduction="sum", **options)) < BOUND
    share = 0.1 / 3 + (0.9 if label == 0 else 0)
    assert worst(gradient[0, 0], share * np.expm1(log_p[0])) < BOUND


def test_a_cost_of_the_normalizer_alone():
    """A z-loss where the label's class has no weight: log_z itself is needed, of a row in which the label is wrong."""
    logits, label = np.array([0.0, -20.0, -21.0], np.float32), np.array(1)
    options = {"class_weight": np.array([1, 0, 0], np.float32), "z_loss_weight": 1.0, "reduction": "sum"}
    value, gradient = jax.value_and_grad(partial(jxent.cross_entropy, labels=label, **options))(jnp.asarray(logits))
    log_p = oracle.log_softmax(logits)
    assert worst(value, log_p[0] ** 2) < BOUND
    assert worst(gradient, -2 * log_p[0] * np.exp(log_p)) < BOUND
