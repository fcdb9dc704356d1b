"""The one reduction of GPUs and TPUs, on a CPU: against float64, and against the passes that it replaces."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiling import optimized
from jax import lax
from one_reduction import OneReduction

from jxent._backend.backend import RowMode
from jxent._backend.platform import BACKENDS
from jxent._core.shards import ClassAxis, Shards
from jxent._labels.index import IndexLabels
from jxent._objective.cross_entropy import CrossEntropy
from jxent._objective.objective import RowInputs
from jxent._objective.rule import BlockOf, costs_of_block
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
