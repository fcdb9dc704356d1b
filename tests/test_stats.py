"""The statistics that a loss with `return_stats` has taken in the same pass."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
import reference
from compiling import optimized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jxent

N, D, C = 4, 3, 5
ULPS = 8 * float(np.finfo(np.float32).eps)  # eight units in the last place of 1


def data(kind, seed=0):
    """Logits (N, D, C), labels of a kind, and every weight; one label is ignored, one position masked."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(N, D, C))).astype(np.float32)
    if kind == "index":
        labels = rng.integers(0, C, (N, D)).astype(np.int32)
        labels[1, 2] = -100
    else:
        labels = rng.dirichlet(np.full(C, 0.4), (N, D)).astype(np.float32)
    where = np.ones((N, D), bool)
    where[2, 0] = False
    class_weight, sample_weight = rng.uniform(0.2, 2, C), rng.uniform(0, 2, (N, D))
    weights = {"class_weight": class_weight.astype(np.float32), "sample_weight": sample_weight.astype(np.float32)}
    return logits, labels, weights | {"where": where}


@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_stats(kind):
    logits, labels, weights = data(kind)
    best = labels if kind == "index" else labels.argmax(-1)
    logits[2:] += 9 * np.eye(C, dtype=np.float32)[best[2:]]  # right there; (2, 0) does not count
    capped = oracle.softcap(logits, 4.0)
    loss, stats = jxent.cross_entropy(
        logits, labels, **weights, label_smoothing=0.1, logit_softcap=4.0, reduction="sum", return_stats=True
    )
    keep = weights["where"] & (labels != -100 if kind == "index" else True)
    log_p = oracle.log_softmax(capped)
    q = oracle.one_hot(labels, C) if kind == "index" else labels
    for got, want in (
        (stats.log_prob, (q * log_p).sum(-1)),
        (stats.log_normalizer, oracle.logsumexp(capped)),
        (stats.entropy, -(np.exp(log_p) * log_p).sum(-1)),
    ):
        chex.assert_type(got, jnp.float32)
        np.testing.assert_allclose(got, np.where(keep, want, 0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(stats.prediction, np.where(keep, logits.argmax(-1), 0))
    chex.assert_type(stats.prediction, jnp.int32)
    hits = logits.argmax(-1) == best
    assert 0 < np.sum(hits & keep) < hits.size
    np.testing.assert_array_equal(stats.correct, hits & keep)
    chex.assert_type(stats.correct, jnp.bool_)
    _, weight = oracle.position_losses(logits, labels, **weights)
    np.testing.assert_allclose(stats.weight, weight.sum(), rtol=1e-6)
    assert stats.count == np.sum(keep) != stats.weight
    chex.assert_shape(stats.count, ())
    chex.assert_type(stats.count, jnp.int32)
    mean = jxent.cross_entropy(logits, labels, **weights, label_smoothing=0.1, logit_softcap=4.0)
    np.testing.assert_allclose(loss / stats.weight, mean, rtol=1e-6)


@pytest.mark.parametrize("ignore_index", [-1, 0, -100])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_ignored_position_is_never_a_hit(ignore_index, weighted):
    labels = jnp.array([ignore_index, 2, ignore_index, 1])
    logits = jnp.array([[9.0, 0, 0], [0, 0, 9], [0, 9, 0], [9, 0, 0]])
    weights = {"class_weight": jnp.array([1.0, 2, 7]), "sample_weight": jnp.array([3.0, 0, 1, 1])} if weighted else {}
    _, stats = jxent.cross_entropy(logits, labels, ignore_index=ignore_index, return_stats=True, **weights)
    assert jnp.sum(stats.correct) / stats.count == 0.5
    hits = np.bincount(np.asarray(stats.prediction), weights=np.asarray(labels) != ignore_index)
    np.testing.assert_array_equal(hits, [1, 0, 1])


@pytest.mark.parametrize(
    "loss", [jxent.cross_entropy, lambda x, *a, **k: jxent.linear_cross_entropy(x, jnp.eye(3), *a, **k)]
)
@pytest.mark.parametrize("kind", ["index", "probabilities", "sparse"])
def test_a_masked_position_is_never_a_hit(loss, kind):
    """Its label is the 0 that stands for its prediction, and the largest of its logits too."""
    logits, labels = jnp.array([[9.0, 0, 0], [0, 0, 9]]), jnp.array([0, 2])
    labels = {
        "index": labels,
        "probabilities": jax.nn.one_hot(labels, 3),
        "sparse": jxent.SparseLabels(labels[:, None], jnp.ones((2, 1))),
    }[kind]
    _, stats = loss(logits, labels, where=jnp.array([False, True]), return_stats=True)
    np.testing.assert_array_equal(stats.prediction, [0, 2])
    np.testing.assert_array_equal(stats.correct, [False, True])
    assert stats.count == 1


def test_the_count_is_over_all_shards():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    labels = jnp.array([0, -100, 1, 2, -100, -100, 1, 1])
    weight = jnp.arange(8.0)

    def accuracy(logits, labels, weight):
        options = {"sample_weight": weight, "batch_axis_name": "data", "return_stats": True}
        _, stats = jxent.cross_entropy(logits, labels, **options)
        return jax.lax.psum(stats.correct.sum(), "data") / stats.count

    logits = jnp.eye(8, 3).at[2].set(0.0)  # right where the label is 0
    spec = P("data")
    out = jax.shard_map(accuracy, mesh=mesh, in_specs=(spec,) * 3, out_specs=P())(logits, labels, weight)
    assert out == jnp.float32(1 / 5)


def test_stats_of_a_confident_wrong_row():
    """Entropy and log-normalizer do not depend on which class the label is."""
    logits = jnp.array([[0.0, -20.0, -30.0]])
    stats = [jxent.cross_entropy(logits, jnp.array([t]), return_stats=True)[1] for t in range(3)]
    log_p = oracle.log_softmax(logits)[0]
    for t in range(3):
        np.testing.assert_allclose(stats[t].entropy[0], -(np.exp(log_p) * log_p).sum(), rtol=2e-6)
        np.testing.assert_allclose(stats[t].log_normalizer[0], np.logaddexp.reduce(logits[0].astype(float)), rtol=1e-6)
        np.testing.assert_allclose(stats[t].log_prob[0], log_p[t], rtol=2e-6)


def test_stats_as_auxiliary_output():
    """Of `value_and_grad`, compiled: loss, statistics and gradient are those of the plain calls."""
    logits, labels, weights = data("index")
    loss = partial(jxent.cross_entropy, labels=labels, **weights)
    (value, stats), gradient = jax.jit(jax.value_and_grad(partial(loss, return_stats=True), has_aux=True))(logits)
    chex.assert_trees_all_close((value, stats), loss(logits, return_stats=True), rtol=ULPS)
    np.testing.assert_array_equal(stats.prediction, loss(logits, return_stats=True)[1].prediction)
    expected = np.asarray(jax.grad(loss)(logits))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=ULPS * np.abs(expected).max())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("classes", [2**14, 2**14 + 27])  # in blocks on a CPU, and a prime number
def test_prediction_of_many_classes(classes, axis):
    """The first of the largest logits, or of NaN, wherever they lie."""
    logits = np.random.default_rng(12).normal(size=(7, classes)).astype(np.float32)
    for row, places in enumerate(((5, 6), (300, 9000), (classes - 1,), (0, classes - 1))):
        logits[row, places] = 9
    logits[4, [700, 9000]] = np.nan
    logits[4, 8] = np.inf
    logits[5] = -np.inf
    logits[6, : classes - 2] = -np.inf
    for x in (jnp.asarray(logits), jnp.asarray(logits, jnp.bfloat16)):
        x, labels = jnp.moveaxis(x, -1, axis), np.arange(7)
        stats = jax.jit(partial(jxent.cross_entropy, labels=labels, axis=axis, return_stats=True))(x)[1]
        np.testing.assert_array_equal(stats.prediction, np.argmax(np.asarray(x), axis))


@pytest.mark.parametrize("classes", [2**14, 2**14 + 27])
def test_a_prediction_that_nobody_asks_for_costs_nothing(classes):
    """No comparison of logits with their indices is in the program, forwards or backwards."""

    def compared(name):
        def objective(hidden, kernel):
            stats = jxent.linear_cross_entropy(
                hidden, kernel, jnp.arange(8), block_size=2, reduction="none", return_stats=True
            )[1]
            return jnp.sum(stats.log_prob), getattr(stats, name)

        f = optimized(jax.value_and_grad(objective, (0, 1), has_aux=True))
        program = f.lower(jnp.ones((8, 4)), jnp.ones((4, classes))).compile().as_text()
        return len(re.findall(r"= \(f32\[[^)]* s32\[\S+\) (?:reduce|fusion)\(", program))

    assert compared("prediction") > compared("log_prob") == 0


def test_label_out_of_range_in_stats():
    """The label's log-probability is NaN, what other positions report is as ever, and the prediction needs no label."""
    logits, labels, _ = data("index")
    run = jax.jit(partial(jxent.cross_entropy, logits, return_stats=True))
    bad = np.zeros(labels.shape, bool)
    bad[3, 1] = True
    _, expected = run(np.where(bad, C - 1, labels))
    _, stats = run(np.where(bad, C, labels))
    assert np.isnan(stats.log_prob[bad]).all()
    for name in ("log_prob", "log_normalizer", "entropy", "prediction", "correct"):
        np.testing.assert_array_equal(getattr(stats, name)[~bad], getattr(expected, name)[~bad])
    np.testing.assert_array_equal(stats.prediction, expected.prediction)
    assert stats.weight == expected.weight == N * D - 1


# --- gradients --------------------------------------------------------------------------------------------------------

STATISTICS = ("log_prob", "log_normalizer", "entropy")
RNG = np.random.default_rng(7)
HIDDEN, KERNEL = RNG.normal(size=(N, D, 3)), RNG.normal(size=(3, C))
OPTIONS = {
    "plain": (),
    "class weights": ("class_weight",),
    "smoothing, z-loss": ("sample_weight", "label_smoothing", "z_loss_weight"),
    "all": ("class_weight", "sample_weight", "where", "label_smoothing", "z_loss_weight", "logit_softcap"),
}
SCALARS = {"label_smoothing": 0.1, "z_loss_weight": 0.1, "logit_softcap": 4.0}


def linear(module, scores, labels, **options):
    """`linear_cross_entropy`, or the formula, of a pair (hidden, kernel) of scores."""
    hidden, kernel = scores
    if module is reference:
        return reference.cross_entropy(hidden @ kernel, labels, **options)
    return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=4, **options)


def logits(module, scores, labels, **options):
    return module.cross_entropy(scores, labels, **options)


def objectives(function, reduction, options, weights, labels, module):
    """By name functions of (scores, what else is differentiated): each statistic, and all of them with the loss."""
    at_positions = jnp.cos(jnp.arange(N * D)).reshape(N, D)

    def objective(wanted, arrays):
        floats = dict(arrays)
        given = floats.pop("labels", labels)
        loss, stats = function(
            module, floats.pop("scores"), given, **weights | floats, **options, reduction=reduction, return_stats=True
        )
        out = [jnp.sum(at_positions * getattr(stats, name) ** 2) for name in wanted]
        return sum(out) + (jnp.sum(jnp.sin(loss)) + jnp.sin(stats.weight) if len(wanted) > 1 else 0.0)

    return {name: partial(objective, (name,)) for name in STATISTICS} | {"all": partial(objective, STATISTICS)}


@pytest.mark.covering("logits-index-mean-all", "linear-index-none-plain", "logits-probabilities-mean-smoothing, z-loss")
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("function", [logits, linear], ids=["logits", "linear"])
def test_gradients(function, kind, reduction, names, x64):
    """Of statistics alone and with the loss, by all arguments, in both modes; and the second derivatives."""
    scores, labels, weights = data(kind)
    scores = jnp.asarray(scores, jnp.float64) if function is logits else (jnp.asarray(HIDDEN), jnp.asarray(KERNEL))
    weights = {
        name: jnp.asarray(w, w.dtype if w.dtype == bool else jnp.float64)
        for name, w in weights.items()
        if name in names
    }
    arrays = {"scores": scores} | {name: w for name, w in weights.items() if name != "where"}
    if kind == "probabilities":
        arrays["labels"] = jnp.asarray(labels, jnp.float64)
    direction = jax.tree.map(jnp.cos, arrays)
    options = {name: value for name, value in SCALARS.items() if name in names}

    @partial(jax.jit, static_argnums=0)
    def derivatives(module, arrays):
        every = objectives(function, reduction, options, weights, jnp.asarray(labels), module)
        out = {name: jax.grad(f)(arrays) for name, f in every.items()}
        f = every["all"]
        out["tangent"] = jax.jvp(f, (arrays,), (direction,))[1]
        out["forward over reverse"] = jax.jvp(jax.grad(f), (arrays,), (direction,))[1]
        out["reverse over forward"] = jax.grad(lambda at: jax.jvp(f, (at,), (direction,))[1])(arrays)
        return out

    got, want = derivatives(jxent, arrays), derivatives(reference, arrays)
    for name in want:
        assert np.any(np.asarray(jax.tree.leaves(got[name]["scores"] if name != "tangent" else got[name])[0])), name
        chex.assert_trees_all_close(got[name], want[name], rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_masked_classes_have_no_share_in_the_entropy():
    """Value, gradient and second derivatives are those of the other classes alone."""
    x, direction = np.random.default_rng(13).normal(size=(2, N, C))
    masked = np.where(np.arange(C) == 2, -np.inf, x)

    def entropy(x):
        return jnp.sum(jxent.cross_entropy(x, jnp.zeros(N, int), return_stats=True)[1].entropy)

    def derivatives(x, direction):
        def tangent(x):
            return jax.jvp(entropy, (x,), (direction,))[1]

        return entropy(x), jax.grad(entropy)(x), jax.jvp(jax.grad(entropy), (x,), (direction,))[1], jax.grad(tangent)(x)

    value, *found = jax.jit(derivatives)(masked, direction)
    of_others, *wanted = jax.jit(derivatives)(np.delete(x, 2, 1), np.delete(direction, 2, 1))
    np.testing.assert_allclose(value, of_others, rtol=1e-12)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got[:, 2], 0)
        np.testing.assert_allclose(np.delete(got, 2, 1), want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("classes", [2, 1000])
def test_gradients_near_certainty(classes):
    """In float32, against 50 digits, relative to the size of the two terms."""
    margins = np.array([0.0, 0.1, 3.0, 10.0, 17.0, 30.0, 60.0])
    x = np.random.default_rng(3).normal(size=(len(margins), classes)).astype(np.float32)
    x[:, 1] = x.max(-1) + margins

    def gradient(name):
        def total(x):
            return jnp.sum(getattr(jxent.cross_entropy(x, jnp.ones(len(x), int), return_stats=True)[1], name))

        return np.asarray(optimized(jax.grad(total))(x), np.float64)

    with mpmath.workdps(50):
        log_p = oracle.normalized(x, oracle.Digits)[0]
        p, z = oracle.Digits.exp(log_p), log_p - log_p.max(-1, keepdims=True)
        entropy, distance = -(p * log_p).sum(-1, keepdims=True), -(p * z).sum(-1, keepdims=True)
        wanted = {
            "entropy": (-p * (log_p + entropy), p * (distance - z)),
            "log_normalizer": (p, p),
            "log_prob": (oracle.one_hot(np.ones(len(x), int), classes) - p,) * 2,
        }
        wanted = {name: [a.astype(np.float64) for a in pair] for name, pair in wanted.items()}
    for name, (want, size) in wanted.items():
        judged = np.abs(size) > np.finfo(np.float32).tiny
        assert np.max(np.abs(gradient(name) - want)[judged] / np.abs(size)[judged]) < 5e-6, name


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("name", STATISTICS)
def test_gradients_of_16_bits(name, size):
    """Of a block's logits they must neither overflow float16 nor vanish, however large or small the coefficients."""

    def gradients(dtype):
        def objective(hidden, kernel):
            stats = linear(jxent, (hidden, kernel), data("index")[1], reduction="none", return_stats=True)[1]
            return jnp.sum(getattr(stats, name)) * size * 2.0**-10

        return jax.jit(jax.grad(objective, (0, 1)))(jnp.asarray(HIDDEN, dtype), jnp.asarray(KERNEL, dtype))

    for got, want in zip(gradients(jnp.float16), gradients(jnp.float32), strict=True):
        want = np.asarray(want)
        smallest = float(jnp.finfo(jnp.float16).smallest_subnormal)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-2 * np.abs(want).max() + smallest)


def matmuls(reduction, *differentiated):
    """How many there are in the program of the gradients by hidden states and kernel."""

    def objective(hidden, kernel):
        loss, stats = jxent.linear_cross_entropy(
            hidden, kernel, jnp.arange(64), block_size=16, reduction=reduction, return_stats=True
        )
        numbers = {"loss": loss} | stats._asdict()
        return sum(jnp.sum(numbers[name]) for name in differentiated), jnp.sum(stats.entropy)

    program = optimized(jax.grad(objective, (0, 1), has_aux=True)).lower(jnp.ones((64, 32)), jnp.ones((32, 128)))
    return program.compile().as_text().count(" dot(")


def test_sweeps():
    """Without a reduction one forwards and one backwards, whatever is differentiated; for a mean see further down."""
    assert matmuls("none", "loss") == matmuls("none", "entropy") == matmuls("none", "loss", *STATISTICS) == 4


def test_what_is_not_differentiated_costs_nothing():
    """The backward pass multiplies less where it is the loss alone that has a cotangent."""

    def products(*wanted):
        def objective(x):
            loss, stats = jxent.cross_entropy(x, jnp.zeros(len(x), int), return_stats=True, label_smoothing=0.1)
            return (loss, *(getattr(stats, name) for name in wanted)), stats

        value, pull, _ = jax.vjp(objective, jnp.ones((3, 5)), has_aux=True)
        return str(jax.make_jaxpr(pull)(value)).count("= mul ")

    without = jax.vjp(partial(jxent.cross_entropy, labels=jnp.zeros(3, int), label_smoothing=0.1), jnp.ones((3, 5)))
    assert products() == str(jax.make_jaxpr(without[1])(without[0])).count("= mul ")
    assert products() < products("log_normalizer") < products("log_normalizer", "entropy")

    # Nor does it read logits and exponentials both, which would have to wait for it together.
    logits = jnp.ones((64, 512))
    value, pull, _ = jax.vjp(
        partial(jxent.cross_entropy, labels=jnp.zeros(64, int), return_stats=True), logits, has_aux=True
    )
    program = jax.jit(lambda pull, cotangent: pull(cotangent)).lower(pull, value).compile()
    assert program.memory_analysis().argument_size_in_bytes < 1.5 * logits.nbytes


# --- on shards --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_stats_of_classes_on_shards():
    """Whole rows of numbers, so that there are ties between shards."""
    rng = np.random.default_rng(11)
    logits, labels = np.round(2 * rng.normal(size=(8, 16, 64))), rng.integers(0, 64, (8, 16)).astype(np.int32)
    labels[0, :5] = -100
    f, mesh = partial(jxent.cross_entropy, return_stats=True), jax.make_mesh((8,), ("vocab",), (AxisType.Auto,))
    sharded = jax.shard_map(
        partial(f, axis_name="vocab"), mesh=mesh, in_specs=(P(None, None, "vocab"), P()), out_specs=P()
    )
    chex.assert_trees_all_close(jax.jit(sharded)(logits, labels), jax.jit(f)(logits, labels), rtol=1e-10, atol=1e-12)


def test_stats_of_positions_on_shards():
    """The weight is that of the positions of all devices."""
    labels = np.where(np.arange(16).reshape(8, 2) % 5 == 0, -100, 1)

    def weight(logits, labels, **options):
        return jxent.cross_entropy(logits, labels, return_stats=True, **options)[1].weight

    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    sharded = jax.shard_map(partial(weight, batch_axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=P())
    logits = np.zeros((8, 2, C), np.float32)
    assert sharded(logits, labels) == weight(logits, labels) == np.sum(labels != -100)


@pytest.mark.parametrize(
    ("options", "differentiated", "dots"),
    [({}, False, 3), ({}, True, 6), ({"recompute": True}, True, 4), ({"reduction": "none"}, True, 4)],
)
def test_matmuls_where_statistics_are_differentiated(options, differentiated, dots):
    """As the docstrings of `Stats` and `reduction` say; a mean holds two gradients of the kernel then."""
    options |= {"block_size": 8, "ignore_index": None, "return_stats": True}  # None: no block is skipped

    def objective(hidden, kernel):
        loss, stats = jxent.linear_cross_entropy(hidden, kernel, jnp.zeros(32, jnp.int32), **options)
        entropy = jnp.sum(stats.entropy) / stats.count
        return jnp.mean(loss) + (0.01 * entropy if differentiated else 0), entropy

    f = optimized(jax.value_and_grad(objective, (0, 1), has_aux=True))
    kernel = jnp.ones((64, 512))
    compiled = f.lower(jnp.ones((32, 64)), kernel).compile()
    assert len(re.findall(r" dot\(", compiled.as_text())) == dots
    held = compiled.memory_analysis().temp_size_in_bytes
    assert (held > 1.5 * kernel.nbytes) == (dots == 6)
