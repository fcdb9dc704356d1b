"""`temperature` in the losses of classes: a number, a traced scalar, or one for each position.

Derivatives of every order are those of reference.py in float64. In float32 the loss, the statistics and the gradients
keep their digits at every margin, offset and temperature. A temperature of 1 is no temperature, and one at a masked
position reaches nothing. Tests of all functions (vmap, meshes, random calls) have temperatures too.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import reference
from compiling import optimized
from grids import short
from jax import export
from modes import differentiated

import jxent

# z rounds once more than without a temperature, by half a unit of at most 64.
BOUND = 5e-6 + 2.0**-19
SHAPE, CLASSES, FEATURES = (3, 4), 6, 3
RNG = np.random.default_rng(31)
WHERE = RNG.random(SHAPE) < 0.7
INDICES = RNG.integers(0, CLASSES, (*SHAPE, 2))
ARRAYS = {
    "logits": 2 * RNG.normal(size=(*SHAPE, CLASSES)),
    "hidden": RNG.normal(size=(*SHAPE, FEATURES)),
    "kernel": RNG.normal(size=(FEATURES, CLASSES)),
    "index": RNG.integers(0, CLASSES, SHAPE),
    "probability": RNG.dirichlet(np.ones(CLASSES), SHAPE),
    "sparse": RNG.dirichlet(np.ones(2), SHAPE),
    "class_weight": RNG.uniform(0.5, 2, CLASSES),
}
EVERYTHING = {"label_smoothing": 0.1, "z_loss_weight": 0.05, "logit_softcap": 3.0, "return_stats": True}


class Case(NamedTuple):
    labels: str
    of_temperature: tuple[int, ...]  # its shape
    linear: bool = False
    options: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "index": Case("index", SHAPE),
    "index-everything": Case("index", (3, 1), options=EVERYTHING),
    "probability-everything": Case("probability", (), options=EVERYTHING),
    "sparse-stats": Case("sparse", (3, 1), options={"return_stats": True}),
    "linear": Case("index", (), linear=True),
    "linear-none": Case("index", (4,), linear=True, options={"reduction": "none"}),
    "linear-everything": Case("probability", (3, 1), linear=True, options=EVERYTHING),
    "linear-sparse": Case("sparse", SHAPE, linear=True, options=EVERYTHING),
}


def weighed(out):
    """One number of the loss and the statistics that have gradients."""
    loss, stats = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    parts = [loss] if stats is None else [loss, stats.log_prob, stats.log_normalizer, stats.entropy]
    return sum(jnp.vdot(jnp.cos(jnp.arange(part.size) + i), part.ravel()) for i, part in enumerate(parts))


def call(case, module, temperature, labels, class_weight, *arrays):
    if module is reference:
        logits = arrays[0] @ arrays[1] if case.linear else arrays[0]
        labels = (
            jnp.sum(jax.nn.one_hot(INDICES, CLASSES) * labels[..., None], -2) if case.labels == "sparse" else labels
        )
        temperature = jnp.broadcast_to(temperature, SHAPE)
        function, arrays, options = reference.cross_entropy, (logits,), {}
    else:
        labels = jxent.SparseLabels(INDICES, labels) if case.labels == "sparse" else labels
        function = jxent.linear_cross_entropy if case.linear else jxent.cross_entropy
        options = {"block_size": 5} if case.linear else {}
    options = options | case.options | {"class_weight": class_weight, "where": WHERE}
    return weighed(function(*arrays, labels, temperature=temperature, **options))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "modes"),
    short(
        [(name, modes) for name in CASES for modes in ("", "r", "f", "rr", "rf", "fr", "ff")],
        *(
            ("index", "rf"),
            ("index-everything", "r"),
            ("probability-everything", "f"),
        ),
        *(("sparse-stats", "fr"), ("linear-everything", "r"), ("linear-none", "f")),
    ),
)
def test_derivatives(name, modes):
    """By the temperature, logits or layers, probabilities and class weights together."""
    case = CASES[name]
    temperature = jnp.asarray(np.linspace(0.4, 1.9, max(1, np.prod(case.of_temperature, dtype=int))))
    labels = jnp.asarray(ARRAYS[case.labels])
    rest = [ARRAYS[key] for key in ("class_weight", *(("hidden", "kernel") if case.linear else ("logits",)))]
    at = [temperature.reshape(case.of_temperature), *map(jnp.asarray, rest)]
    if case.labels != "index":
        at.append(labels)

    def of(module, temperature, class_weight, *arrays):
        *arrays, given = arrays if case.labels != "index" else (*arrays, labels)
        return call(case, module, temperature, given, class_weight, *arrays)

    found, wanted = (jax.jit(differentiated(partial(of, module), modes))(*at) for module in (jxent, reference))
    chex.assert_trees_all_close(found, wanted, rtol=1e-12, atol=1e-12)


# --- digits -----------------------------------------------------------------------------------------------------------

MARGINS, OFFSETS, TEMPERATURES = (0.0, 1.0, 20.0, 50.0, 80.0), (0.0, -300.0, 1e4), (0.05, 0.7, 1.25, 20.0)


def relative(got, want, size=None):
    """The largest error relative to the number or to its terms, of those that float32 holds as normal numbers."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    size = np.abs(want) if size is None else size
    return np.max(np.where(size < float(jnp.finfo(jnp.float32).tiny), 0, np.abs(got - want) / np.maximum(size, 1e-300)))


def test_float32():
    """Margins are those of the divided logits; the label is the largest class or another."""
    rng = np.random.default_rng(5)
    grid = np.stack(np.meshgrid(MARGINS, OFFSETS, TEMPERATURES, (0, 1), indexing="ij"), -1).reshape(-1, 4)
    margin, offset, temperature, away = (column[:, None] for column in grid.T)
    rows = 0.5 * rng.normal(size=(len(grid), 300))
    top = rng.integers(300, size=(len(grid), 1))
    np.put_along_axis(rows, top, rows.max(-1, keepdims=True) + margin, -1)
    logits, temperature = (temperature * rows + offset).astype(np.float32), temperature[:, 0].astype(np.float32)
    labels = ((top + away.astype(int)) % 300)[:, 0]

    def plain(x, t):
        return (jxent.cross_entropy(x, labels, temperature=t, reduction="none"),)

    def linear(x, t):  # with x as the kernel
        eye = jax.lax.stop_gradient(jnp.eye(len(labels)))
        return (jxent.linear_cross_entropy(eye, x, labels, temperature=t, reduction="none", block_size=50),)

    def statistics(x, t):
        stats = jxent.cross_entropy(x, labels, temperature=t, return_stats=True)[1]
        return -stats.log_prob, stats.entropy

    @partial(optimized, static_argnums=0)
    def pulled(f, x, t):
        """(the value, its gradients by both arrays) of each result."""
        values, pull = jax.vjp(f, x, t)
        still = [jnp.zeros_like(value) for value in values]
        ones = [[*still[:i], jnp.ones_like(value), *still[i + 1 :]] for i, value in enumerate(values)]
        return [(value, *pull(tuple(one))) for value, one in zip(values, ones, strict=True)]

    divisor = temperature.astype(np.float64)[:, None]
    terms = oracle.terms(logits, labels, temperature=temperature)
    p, z = np.exp(terms.log_p), terms.log_p + terms.log_z[:, None]
    far = np.where(z < -64, 2.0, 1.0)  # as z rounds to twice as much there
    to_z = oracle.logit_gradient(logits / divisor, labels)
    for f in (plain, linear, statistics):
        value, to_logits, to_temperature = pulled(f, logits, temperature)[0]
        assert relative(value, terms.loss) < BOUND, f
        assert relative(to_logits * divisor, to_z, np.abs(to_z) * far) < BOUND, f
        size = np.sum(np.abs(to_z * z) * far, -1)
        assert relative(to_temperature * divisor[:, 0], -np.sum(to_z * z, -1), size) < BOUND, f
    value, to_logits, to_temperature = pulled(statistics, logits, temperature)[1]
    mean = np.sum(p * z, -1, keepdims=True)
    assert relative(value, -np.sum(p * terms.log_p, -1)) < BOUND
    assert relative(to_logits * divisor, -p * (z - mean), p * (np.abs(z) + np.abs(mean)) * far) < BOUND
    variance = p * (z - mean) ** 2
    size = np.sum(variance * far, -1)
    assert relative(to_temperature * divisor[:, 0], np.sum(variance, -1), size) < BOUND


def test_bfloat16_layers():
    """The division is in float32. A quotient of hidden states rounds to bfloat16 before the matmul."""
    rng = np.random.default_rng(2)
    hidden, kernel = jnp.asarray(rng.normal(size=(64, 512)), "bfloat16"), rng.normal(size=(512, 1000)) / 12
    kernel, labels, t = jnp.asarray(kernel, "bfloat16"), rng.integers(0, 1000, 64), 0.7

    def log_probs(hidden, temperature):
        loss = partial(jxent.linear_cross_entropy, reduction="none", temperature=temperature)
        return -np.asarray(loss(hidden, kernel, labels), np.float64)

    logits = np.asarray(jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32), np.float64)
    wanted = np.take_along_axis(oracle.log_softmax(logits / np.float32(t)), labels[:, None], -1)[:, 0]
    assert np.abs(log_probs(hidden, t) - wanted).max() < 2e-6
    assert np.abs(log_probs(hidden / t, 1.0) - wanted).max() > 0.01


@pytest.mark.covering
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("temperature", [1e-3, 100.0])
def test_float16_at_any_temperature(temperature, by_position):
    """The logits' gradients of a block neither overflow nor vanish, however much a temperature multiplies them."""
    hidden, labels = ARRAYS["hidden"], ARRAYS["index"]
    kernel = ARRAYS["kernel"] * temperature
    t = np.float32(temperature) * np.linspace(1, 3, 3, dtype=np.float32)[:, None] if by_position else temperature
    f = partial(jxent.linear_cross_entropy, labels=labels, block_size=5, temperature=t, reduction="sum")
    half = [array.astype(np.float16) for array in (hidden, kernel)]
    found = jax.grad(f, (0, 1))(*half)
    wanted = jax.grad(f, (0, 1))(*(array.astype(np.float32) for array in half))
    for got, want in zip(found, wanted, strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got.astype(np.float32), want, rtol=0, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize("temperature", short((0.01, 1.0, 2e37), 0.01))
def test_masked_classes(temperature):
    """Their z is infinite. Its product with a gradient of 0 is 0, in each mode."""
    row = np.float32([1, -np.inf, 3, 0.5])

    @jax.jit
    def derivatives(t, x):
        def f(t, x):
            return weighed(jxent.cross_entropy(x, 1, temperature=t, label_smoothing=0.1, return_stats=True))

        return jax.value_and_grad(f)(t, x), jax.jvp(f, (t, x), (t, jnp.zeros_like(x))), jax.grad(jax.grad(f))(t, x)

    fewer = derivatives(jnp.float32(temperature), row[[0, 2, 3]])
    x = np.float32([1, 3, 0.5, -np.inf])
    chex.assert_trees_all_close(derivatives(jnp.float32(temperature), x), fewer, rtol=1e-5)


# --- what it must not change ------------------------------------------------------------------------------------------


def test_one_is_no_temperature():
    """The lowered programs are equal to the character."""
    logits, labels = (jnp.asarray(ARRAYS[name]) for name in ("logits", "index"))
    layers = [jnp.asarray(ARRAYS[name], jnp.float32) for name in ("hidden", "kernel")]

    def text(function, *arrays, **options):
        return jax.jit(jax.value_and_grad(partial(function, **options))).lower(*arrays).as_text()

    for function, arrays in ((jxent.cross_entropy, (logits, labels)), (jxent.linear_cross_entropy, (*layers, labels))):
        without = text(function, *arrays)
        for one in (1, 1.0, np.float32(1), np.array(1.0)):
            assert text(function, *arrays, temperature=one) == without
        assert text(function, *arrays, temperature=1.5) != without


@pytest.mark.parametrize("linear", short((False, True), False))
@pytest.mark.usefixtures("x64")
def test_a_masked_position_may_have_any(linear):
    case = Case("index", SHAPE, linear, EVERYTHING)
    arrays = [jnp.asarray(ARRAYS[name]) for name in (("hidden", "kernel") if linear else ("logits",))]
    garbage = RNG.choice([np.nan, 0.0, np.inf, -1.0], SHAPE)

    @jax.jit
    def derivatives(temperature, direction):
        def f(temperature, *arrays):
            return call(case, jxent, temperature, jnp.asarray(ARRAYS["index"]), None, *arrays)

        every = tuple(range(1 + len(arrays)))
        gradient = jax.grad(f, every)
        at, along = (temperature, *arrays), (direction, *arrays)
        return f(*at), gradient(*at), jax.jvp(gradient, at, along)

    found = derivatives(np.where(WHERE, 1.3, garbage), np.where(WHERE, 0.5, np.nan))
    chex.assert_trees_all_equal(found, derivatives(np.where(WHERE, 1.3, 2.0), np.where(WHERE, 0.5, 1.0)))
    assert not np.any(found[1][0][~WHERE])
    assert np.all(found[1][0][WHERE])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("function", [jxent.cross_entropy, jxent.kl_divergence])
def test_masked_logits_do_not_reach_a_scalar_temperature(function):
    """Their second derivatives are NaN, which a sum over the positions would spread."""
    options = {"where": WHERE, "reduction": "sum"}
    other = ARRAYS["index"] if function is jxent.cross_entropy else jnp.sin(ARRAYS["logits"])

    @jax.jit
    def derivatives(t, logits):
        def f(t):
            return function(logits, other, temperature=t, **options)

        return jax.grad(lambda t: jax.jvp(f, (t,), (t,))[1])(t), jax.grad(jax.grad(f))(t)

    spoilt = np.where(WHERE[..., None], ARRAYS["logits"], np.nan)
    wanted = derivatives(1.3, ARRAYS["logits"])
    assert np.all(np.isfinite(wanted))
    chex.assert_trees_all_equal(derivatives(1.3, spoilt), wanted)


@pytest.mark.parametrize(("shape", "reduction"), short([((), "mean"), ((8, 1), "none")], ((8, 1), "none")))
def test_memory_of_a_linear_loss(shape, reduction):
    """A temperature and its gradient need no further array of a block's size."""
    types = [(8, 256, 16), (16, 8192)]
    hidden, kernel = (jax.ShapeDtypeStruct(each, jnp.float32) for each in types)
    labels, t = jax.ShapeDtypeStruct((8, 256), jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)

    def loss(hidden, kernel, temperature, labels, used):
        given = {"temperature": temperature} if used else {}
        return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels, reduction=reduction, block_size=256, **given))

    def temporaries(used, wrt):
        f = optimized(jax.value_and_grad(partial(loss, used=used), wrt))
        return f.lower(hidden, kernel, t, labels).compile().memory_analysis().temp_size_in_bytes

    without = temporaries(False, (0, 1))
    assert temporaries(True, (0, 1, 2)) <= 1.01 * without


def test_a_frozen_temperature_takes_no_pass():
    """Its gradient sums over the classes. The program has this sum only for a temperature that is differentiated."""
    arrays = [jnp.asarray(ARRAYS[name], jnp.float32) for name in ("hidden", "kernel")]

    def flops(wrt):
        def loss(t, hidden, kernel):
            return jxent.linear_cross_entropy(hidden, kernel, ARRAYS["index"], temperature=t)

        program = jax.jit(jax.grad(loss, wrt)).lower(jnp.float32(1.5), *arrays).compile()
        return program.cost_analysis()["flops"]

    assert flops((1, 2)) + np.prod(SHAPE) * CLASSES < flops((0, 1, 2))


@pytest.mark.parametrize("masked", [False, True])
def test_number_of_positions_known_at_the_call(masked):
    """The last block is padded, with temperatures of 1."""
    (n,) = export.symbolic_shape("n")
    kernel = jnp.asarray(ARRAYS["kernel"], jnp.float32)

    def gradients(hidden, labels, temperature):
        def loss(hidden, kernel, temperature):
            where = labels != 0 if masked else None
            return jxent.linear_cross_entropy(
                hidden, kernel, labels, temperature=temperature, where=where, block_size=4
            )

        return jax.value_and_grad(loss, (0, 1, 2))(hidden, kernel, temperature)

    shapes = [((n, FEATURES), jnp.float32), ((n,), jnp.int32), ((n,), jnp.float32)]
    exported = export.export(jax.jit(gradients))(*(jax.ShapeDtypeStruct(*each) for each in shapes))
    arrays = ARRAYS["hidden"].reshape(-1, FEATURES)[:7], ARRAYS["index"].ravel()[:7], np.linspace(0.5, 2, 7)
    arrays = [jnp.asarray(a, kind) for a, (_, kind) in zip(arrays, shapes, strict=True)]
    chex.assert_trees_all_close(exported.call(*arrays), gradients(*arrays), rtol=1e-5, atol=1e-6)


def test_numbers_of_any_kind():
    """Lists and whole numbers are temperatures by position."""
    logits, labels = ARRAYS["logits"].astype(np.float32), ARRAYS["index"]
    wanted = jxent.cross_entropy(logits, labels, temperature=np.float32([1, 2, 1, 4]))
    for given in ([1, 2, 1, 4], [1.0, 2.0, 1.0, 4.0], np.array([[1, 2, 1, 4]]), jnp.array([1, 2, 1, 4], jnp.bfloat16)):
        assert jxent.cross_entropy(logits, labels, temperature=given) == wanted
