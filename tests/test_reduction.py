"""The rows of GPUs and TPUs, on a CPU: by one reduction, or known to the second sweep from the first."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiling import optimized
from jax import lax
from jax.extend.core import Literal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from one_reduction import OneReduction

import jxent
from jxent._backend.backend import RowMode
from jxent._backend.platform import BACKENDS
from jxent._core.shards import ClassAxis, Shards
from jxent._labels.index import IndexLabels
from jxent._objective.cross_entropy import CrossEntropy
from jxent._objective.objective import FromRows, RowInputs
from jxent._objective.rule import BlockOf, costs_of_block
from jxent._rows.prediction import largest_class
from jxent._rows.reduction import Wanted, row_sums

BOUND = 5e-6
BOUND_BELOW = 1.1e-5  # of numbers below 1e-30, for which x - m is up to 87 and rounds more
SMALLEST = float(jnp.finfo(jnp.float32).tiny)
COSTS = ("label", "uniform", "z")
OBJECTIVE = CrossEntropy(axis=1, shards=Shards(), logit_softcap=None, costs=COSTS, stats=True)


@pytest.fixture(autouse=True)
def in_two_steps(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cpu", OneReduction())


def costs(mode, logits, labels):
    """The costs by name, the prediction, and the gradients of the sum of each cost."""
    inputs = RowInputs(logits=logits, labels=IndexLabels(indices=labels[:, None]))

    def each(logits):
        return costs_of_block(BlockOf(objective=OBJECTIVE, mode=mode), inputs.replace(logits=logits))

    of_rows, pull, prediction = jax.vjp(each, logits, has_aux=True)
    nothing = jax.tree.map(jnp.zeros_like, of_rows)
    gradients = {name: pull(nothing | {name: jnp.ones_like(cost)})[0] for name, cost in of_rows.items()}
    return jax.tree.map(lambda row: row[:, 0], (of_rows, prediction)), gradients


def definitions(logits, labels):
    """The costs in float64, the largest class left out of the sum of exponentials."""
    x, i = np.float64(logits), np.arange(len(logits))
    m, top = x.max(1), x.argmax(1)
    z = x - m[:, None]
    others = np.exp(z)
    others[i, top] = 0
    log_z = np.log1p(others.sum(1))
    p, there = np.exp(z - log_z[:, None]), np.isfinite(z)
    below = np.where(there, -z, 0)
    loss = -oracle.log_softmax(logits)[i, labels]
    return {
        "label": loss,
        "uniform": below.sum(1) / there.sum(1) + log_z,
        "entropy": log_z + (p * below).sum(1),
        "rest": log_z,
    }


def assert_near(got, want, rest, classes, name):
    """Where the number is finite, and neither it nor an exponential in its sum vanishes in float32."""
    got, want = np.float64(got), np.float64(want)
    judged = np.isfinite(want) & (want > SMALLEST) & (rest > classes * SMALLEST)
    assert judged.any()
    error, bound = np.abs(got - want)[judged] / want[judged], np.where(want > 1e-30, BOUND, BOUND_BELOW)[judged]
    assert np.all(error < bound), (name, error.max())


def ramps(rng, classes):
    """Rows that rise or fall by as little as 1e-6 a class."""
    steps = np.array([1e-6, 1e-5, 1e-3, 0.1, 3.0])
    return np.concatenate([steps, -steps])[:, None] * np.arange(classes)


def confident(rng, classes):
    """Margins of 0 to 80, at offsets to 1e4."""
    logits = rng.normal(size=(24, classes))
    logits[np.arange(24), rng.integers(0, classes, 24)] += np.linspace(0, 80, 24)
    return logits + rng.choice([0, -77, 300, 1e4, -1e4], (24, 1))


def around_anchors(rng, classes):
    """Values next to multiples of 16, on both sides, and the same value several times."""
    near = 16.0 * rng.integers(-2, 3, (24, classes)) + rng.choice([-8, 0, 8], (24, 1))
    return near + rng.choice([-1e-6, 0, 1e-6], (24, classes))


def masked(rng, classes):
    """Classes of -inf, all but one in the first row."""
    logits = np.where(rng.random((24, classes)) < 0.4, -np.inf, 9 * rng.normal(size=(24, classes)))
    logits[0] = -np.inf
    logits[:, 1] = 3
    return logits


def tiny_rests(rng, classes):
    """One large class and others down to the end of float32, each the rest of what comes before."""
    logits = np.full((24, classes), -200.0)
    logits[:, 0] = 0.7 * (7 * np.arange(24) % 24)
    logits[:, -1] = logits[:, 0] - 63.5 - np.arange(24)
    return rng.permuted(logits, axis=1)


def many_far_below(rng, classes):
    """All but the last class far below that one, and only their number keeps their sum from vanishing."""
    logits = np.full((24, classes), 15.9) - 0.01 * rng.random((24, classes))
    logits[:, -1] = 96 + 0.25 * np.arange(24)
    return logits[:, :: rng.choice([1, -1])]


def huge(rng, classes):
    """Far apart, but not so far that the sum of their differences overflows."""
    return np.where(rng.random((24, classes)) < 0.3, rng.choice([1e33, -1e33, 1e30], (24, 1)), -1e33)


@pytest.mark.parametrize("classes", [7, 1003, 50257])
@pytest.mark.parametrize("make", [ramps, confident, around_anchors, masked, tiny_rests, many_far_below, huge])
def test_against_float64(make, classes):
    rng = np.random.default_rng(classes)
    judge(np.float32(make(rng, classes)), rng)


def judge(logits, rng):
    classes = logits.shape[1]
    labels = np.where(rng.random(len(logits)) < 0.5, logits.argmax(1), rng.integers(0, classes, len(logits)))
    labels = np.where(np.isinf(logits[np.arange(len(logits)), labels]), 1, labels).astype(np.int32)
    ((got, prediction), _), wanted = costs_of(logits, labels), definitions(logits, labels)
    for name in ("label", "uniform", "entropy"):
        assert_near(got[name], wanted[name], wanted["rest"], classes, name)
    np.testing.assert_array_equal(prediction, logits.argmax(1))


@optimized
def costs_of(logits, labels):
    return costs(RowMode.ONE_REDUCTION, logits, labels)


def test_against_passes():
    """Also values that are not finite: NaN, inf, rows of -inf, labels out of range, and labels with -inf."""
    rng = np.random.default_rng(0)
    logits = np.float32(3 * rng.normal(size=(40, 23)))
    logits[np.arange(30), rng.integers(0, 23, 30)] = rng.permutation([np.nan, np.inf, -np.inf] * 10)
    logits[30:33] = [[-np.inf], [np.inf], [np.finfo(np.float32).min]]
    logits[33, 3:] = -np.inf
    labels = rng.integers(0, 23, 40).astype(np.int32)
    labels[[34, 35]], labels[33] = [-1, 23], 5
    modes = RowMode.ONE_REDUCTION, RowMode.PASSES
    one, passes = (optimized(lambda x, y, mode=mode: costs(mode, x, y))(logits, labels) for mode in modes)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(passes), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-6, atol=1e-30)


@pytest.mark.exhaustive
@pytest.mark.parametrize("classes", [7, 100, 1000, 5003])
def test_random_rows(classes):
    """50,000 rows of each size: of any scale, with ramps, margins, offsets, ties, masked classes and anchors."""
    rng = np.random.default_rng(classes)
    for _ in range(50_000 // 250):
        rows = rng.normal(size=(24, classes)) * rng.choice([0.01, 1, 3, 10, 50], (24, 1))
        ties = np.repeat(rows[:, : -(-classes // 5)], 5, 1)[:, :classes]
        makers = ramps, confident, around_anchors, masked, tiny_rests, many_far_below, confident, masked
        logits = np.concatenate([rows, ties, *(make(rng, classes) for make in makers), rows[:16] + 1e4])
        judge(np.float32(logits), rng)


@pytest.mark.parametrize("make", [confident, masked])
def test_shards_of_the_classes(make):
    """As one row: shards whose largest logits are equal, or all masked, and a label of any shard."""
    rng = np.random.default_rng(3)
    logits = np.float32(make(rng, 24))
    logits[:8, [2, 9, 17]] = logits[:8].max(1, keepdims=True)  # the maximum on three shards of eight classes
    logits[8:12, 8:16] = -np.inf
    logits[12], logits[12, 3:5] = -np.inf, np.finfo(np.float32).min
    index, wanted = np.argmax(logits, 1)[:, None], Wanted(distance=True, linear=True, prediction=True)

    def of_shard(part):
        offset = lax.axis_index("classes") * 8
        axis = ClassAxis(axis=1, size=8, shards=Shards(axis_name=("classes",), number=3, checked=False), offset=offset)
        return row_sums(part, index - offset, wanted, jnp.float32, axis)

    parts = logits.reshape(len(logits), 3, 8).swapaxes(0, 1)
    found = jax.tree.map(lambda a: a[0], jax.vmap(of_shard, axis_name="classes")(parts))
    whole = row_sums(logits, index, wanted, jnp.float32, ClassAxis(axis=1, size=24, shards=Shards(), offset=None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-6, atol=1e-37), found._asdict(), whole._asdict())


@pytest.mark.parametrize("function", ["row_sums", "largest_class"])
def test_what_shards_compare_is_computed_once(function):
    """Each number that a shard compares with the largest of all shards comes from a barrier.

    A compiler that computed it twice might round it in two ways. Then no shard would have the largest.
    """

    def of_shard(part):
        shards = Shards(axis_name=("classes",), number=3)
        axis = ClassAxis(axis=1, size=8, shards=shards, offset=lax.axis_index("classes") * 8)
        if function == "largest_class":
            return largest_class(part, axis)
        return row_sums(part, None, Wanted(prediction=True), jnp.float32, axis).prediction

    mesh = jax.make_mesh((1,), ("classes",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(of_shard, mesh=mesh, in_specs=P(None, "classes"), out_specs=P())
    (mapped,) = jax.make_jaxpr(mapped)(jnp.ones((4, 8))).eqns
    program = mapped.params["jaxpr"]
    made_by = {variable: equation for equation in program.eqns for variable in equation.outvars}
    left, seen = [v for e in program.eqns if e.primitive.name == "pmax" for v in e.invars], set()
    assert left
    while left:
        variable = left.pop()
        if isinstance(variable, Literal) or variable in seen:
            continue
        seen.add(variable)
        if variable in made_by and made_by[variable].primitive.name != "optimization_barrier":
            left += made_by[variable].invars
    assert not seen & set(program.invars), "the largest logits reach the comparison without a barrier"


# --- gradients from the rows of an earlier sweep ----------------------------------------------------------------------

RNG = np.random.default_rng(5)
HIDDEN, KERNEL = RNG.normal(size=(5, 8, 16)), RNG.normal(size=(16, 102))
LABELS = RNG.integers(0, 102, (5, 8))
LABELS[1, 2:5] = -100
COTANGENTS = RNG.normal(size=(5, 8)) * (RNG.random((5, 8)) < 0.8)
OPTIONS = {
    "label": {},
    "weights": {"class_weight": np.linspace(0.5, 2, 102)},
    "smoothing and z-loss": {"label_smoothing": 0.1, "z_loss_weight": 0.01, "sample_weight": np.linspace(0, 2, 8)},
    "recompute": {"recompute": True, "label_smoothing": 0.1},
    "statistics": {"return_stats": True, "z_loss_weight": 0.01},
}


def total(name, hidden, kernel):
    """Of a loss whose gradients are computed in the backward pass; the statistics count too, without the entropy."""
    options = OPTIONS[name]
    reduction = "mean" if "recompute" in options else "none"
    loss = jxent.linear_cross_entropy(hidden, kernel, LABELS, block_size=7, reduction=reduction, **options)
    if "return_stats" in options:
        loss, stats = loss
        loss = loss + stats.log_prob * stats.log_normalizer
    return jnp.sum(COTANGENTS.astype(loss.dtype) * loss) if loss.ndim else loss


def gradient_by_both(name):
    return jax.grad(lambda arrays: total(name, *arrays))


def in_bfloat16(spec=None):
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in (HIDDEN, KERNEL)]
    return arrays if spec is None else [jax.device_put(*each) for each in zip(arrays, spec, strict=True)]


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_from_known_rows(name, monkeypatch):
    """Against float64. The gradient of a block's logits rounds to 8 bits, and its product with an array once more."""
    calls, backward = [], CrossEntropy.backward_from_rows
    monkeypatch.setattr(CrossEntropy, "backward_from_rows", lambda *args: calls.append(1) or backward(*args))
    found = jax.jit(gradient_by_both(name))(in_bfloat16())
    assert calls, "the second sweep has computed the rows again"
    with jax.enable_x64(True):
        expected = [*map(np.asarray, gradient_by_both(name)([jnp.asarray(a, jnp.float64) for a in in_bfloat16()]))]
    for got, want in zip(found, expected, strict=True):
        assert np.max(np.abs(np.float64(got) - want)) < 2**-7 * np.max(np.abs(want))


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_known_rows_on_a_mesh(mode):
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "vocab"), axis_types=(AxisType[mode],) * 3)
    spec = NamedSharding(mesh, P(None, "data", None)), NamedSharding(mesh, P("sequence", "vocab"))
    with jax.set_mesh(mesh):
        found = jax.jit(gradient_by_both("smoothing and z-loss"))(in_bfloat16(spec))
    expected = jax.jit(gradient_by_both("smoothing and z-loss"))(in_bfloat16())
    for got, want in zip(found, expected, strict=True):
        assert np.max(np.abs(np.float64(got) - np.float64(want))) < 2**-7 * np.max(np.abs(np.float64(want)))


@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse"])
def test_second_derivatives_do_not_take_rows_as_constants(order):
    def second(arrays):
        gradient = gradient_by_both("label")
        if order == "forward over reverse":
            return jax.jvp(gradient, (arrays,), (arrays,))[1]
        along = lax.stop_gradient(arrays)
        return jax.grad(lambda arrays: sum(map(jnp.vdot, gradient(arrays), along)))(arrays)

    found = jax.jit(second)(in_bfloat16())
    with jax.enable_x64(True):
        expected = [*map(np.asarray, second([jnp.asarray(a, jnp.float64) for a in in_bfloat16()]))]
    for got, want in zip(found, expected, strict=True):
        assert np.max(np.abs(np.float64(got) - want)) < 2**-6 * np.max(np.abs(want))


@pytest.mark.parametrize("margin", [0.0, 3.0, 20.0])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("name", ["label", "uniform", "z", "log_prob", "log_normalizer"])
def test_logits_may_round(name, label, margin):
    """Logits that the second sweep rounds by up to an ulp otherwise, the largest one too."""
    x = np.float32(np.random.default_rng(2).normal(size=(1, 40)) + 50)
    x[0, 0] = x.max() + margin
    again = jnp.nextafter(x, np.where(np.arange(40) % 2, np.inf, -np.inf).astype(np.float32))
    inputs, objective = RowInputs(logits=jnp.asarray(x), labels=IndexLabels(indices=jnp.array([[label]]))), OBJECTIVE
    (out, _), _ = objective.returning_rows().forward(inputs, RowMode.ONE_REDUCTION)
    rows = {key: out[key] for key in out if key not in objective.names}
    residuals = FromRows(inputs=inputs.replace(logits=again), rows=rows)
    found = np.asarray(objective.backward_from_rows(residuals, {name: jnp.ones((1, 1))}).logits)
    assert objective.costs_of(inputs)[name].logits_may_round
    log_p = oracle.log_softmax(x)
    p, at_label = np.exp(log_p), np.arange(40) == label
    not_p = -np.expm1(log_p)
    m_and_log_z = np.float64(x[0, 0]) - log_p[0, 0]
    of_label = np.where(at_label, -not_p, p)
    top = np.arange(40) == 0
    of_uniform = np.where(top, 39 / 40 - not_p, p - 1 / 40)
    want = {
        "label": of_label,
        "log_prob": -of_label,
        "uniform": of_uniform,
        "z": 2 * m_and_log_z * p,
        "log_normalizer": p,
    }
    size = np.where(top, 1, p + 1 / 40) if name == "uniform" else abs(want[name])  # of its terms
    assert np.max(abs(found - want[name]) / size) < 1.5e-5  # logits near 50 and 70 round by 4e-6 and 8e-6


def test_smoothing_towards_the_only_class():
    """All others are masked, so p is 1 and its gradient 0, whatever the last digit of its logit is."""
    x = jnp.full((1, 40), -jnp.inf).at[0, 3].set(50.0)
    inputs = RowInputs(logits=x, labels=IndexLabels(indices=jnp.array([[3]])))
    (out, _), _ = OBJECTIVE.returning_rows().forward(inputs, RowMode.ONE_REDUCTION)
    rows = {key: out[key] for key in out if key not in OBJECTIVE.names}
    residuals = FromRows(inputs=inputs.replace(logits=jnp.nextafter(x, jnp.full_like(x, -jnp.inf))), rows=rows)
    found = OBJECTIVE.backward_from_rows(residuals, {"label": jnp.ones((1, 1)), "uniform": jnp.ones((1, 1))})
    assert not np.any(found.logits)


SEVERAL = jxent.SparseLabels(np.stack([abs(LABELS), abs(LABELS) // 2], -1), np.full((5, 8, 2), 0.5, np.float32))


def with_entropy(hidden, kernel, bias):
    stats = jxent.linear_cross_entropy(hidden, kernel, LABELS, bias=bias, reduction="none", return_stats=True)[1]
    return jnp.sum(stats.entropy)


def losses(hidden, kernel, bias, labels=LABELS, **options):
    return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels, bias=bias, reduction="none", **options))


# Gradients that would lose digits, and one that is summed in float32.
@pytest.mark.parametrize(
    ("f", "wrt", "dtype"),
    [
        (with_entropy, (0, 1), jnp.bfloat16),
        (partial(losses, labels=SEVERAL), (0, 1), jnp.bfloat16),
        (partial(losses, logit_softcap=5.0), (0, 1), jnp.bfloat16),
        (partial(losses, temperature=0.5), (0, 1), jnp.bfloat16),
        (partial(losses, label_smoothing=0.1, class_weight=np.linspace(0.5, 2, 102)), (0, 1), jnp.bfloat16),
        (losses, (0, 1, 2), jnp.bfloat16),
        (losses, (0, 1), jnp.float32),
    ],
    ids=["entropy", "several labels", "soft cap", "temperature", "weighted smoothing", "bias", "float32"],
)
def test_without_known_rows(f, wrt, dtype, monkeypatch):
    def refused(*_):
        raise AssertionError

    monkeypatch.setattr(CrossEntropy, "backward_from_rows", refused)
    arrays = [jnp.asarray(array, dtype) for array in (HIDDEN, KERNEL, np.zeros(102))]
    jax.jit(jax.grad(f, wrt)).lower(*arrays)
    with pytest.raises(AssertionError):  # as this one would
        jax.jit(jax.grad(losses, (0, 1))).lower(*(array.astype(jnp.bfloat16) for array in arrays))
