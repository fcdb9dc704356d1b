"""`SparseLabels`: the loss of the class probabilities that they stand for, which are never written."""

import re
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
from jax.experimental import checkify
from modes import differentiated

import jxent

B, L, C, K, F = 3, 4, 9, 5, 3
RNG = np.random.default_rng(8)
LOGITS = 2 * RNG.normal(size=(B, L, C))
LOGITS[0, 0, 2] += 30  # sure, and right: below, the label has most of its share there
INDICES = RNG.integers(0, C, (B, L, K)).astype(np.int32)
SHARES = 0.9 * RNG.dirichlet(np.ones(K), (B, L))
INDICES[0, 0, 0], SHARES[0, 0] = 2, [0.85, 0.05, 0, 0, 0]
INDICES[1, 1] = [3, 3, 5, 3, 5]  # which add up
INDICES[2, 0, 1], SHARES[2, 0, 1] = -7, 0  # padding
HIDDEN, KERNEL = RNG.normal(size=(B, L, F)), RNG.normal(size=(F, C))
WEIGHTS = {"class_weight": RNG.uniform(0.5, 2, C), "sample_weight": RNG.uniform(0.5, 2, (B, L))}
WHERE = RNG.random((B, L)) < 0.8
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1, "z_loss_weight": 0.05, "where": WHERE},
    "softcap": {"logit_softcap": 4.0},
}


def dense(shares):
    """The class probabilities that the labels stand for."""
    shares = jnp.asarray(shares)
    one_hot = jax.nn.one_hot(jnp.asarray(INDICES), C, dtype=shares.dtype)
    return jnp.sum(shares[..., None] * one_hot, -2)


def sparse(shares):
    return jxent.SparseLabels(jnp.asarray(INDICES), shares)


CALLS = {
    "cross_entropy": (jxent.cross_entropy, {"logits": LOGITS}, {"return_stats": True}),
    "nll_loss": (jxent.nll_loss, {"logits": LOGITS}, {}),
    "linear": (
        jxent.linear_cross_entropy,
        {"hidden": HIDDEN, "kernel": KERNEL},
        {"return_stats": True, "block_size": 5},
    ),
}


def total(name, labels, options, arrays, shares):
    """A number that depends on the loss, and on the statistics where there are some."""
    arrays = dict(arrays)
    function, names, more = CALLS[name]
    out = function(*(arrays.pop(n) for n in names), labels(shares), **arrays, **more, **options)
    loss, log_prob = (out[0], out[1].log_prob) if isinstance(out, tuple) else (out, jnp.zeros(()))
    return jnp.sum(jnp.sin(loss)) + jnp.sum(jnp.cos(log_prob))


@pytest.mark.usefixtures("x64")
@pytest.mark.covering(pairs=True)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("options", "modes"),
    short(
        [
            *((options, mode) for options in OPTIONS for mode in "rf"),
            *(("smoothing", m) for m in ("rr", "rf", "fr", "ff")),
        ],
        ("plain", "r"),
        ("smoothing", "f"),
        ("softcap", "r"),
    ),
)
def test_the_loss_of_the_dense_labels(options, modes, name, reduction):
    """With derivatives by everything, the probabilities included, in every order of the modes."""
    options = OPTIONS[options] if name != "nll_loss" else {"where": WHERE}
    arrays = jax.tree.map(jnp.asarray, (CALLS[name][1] | WEIGHTS, SHARES))

    def of(labels):
        f = partial(total, name, labels, {"reduction": reduction, **options})
        return differentiated(f, modes)(*arrays)

    chex.assert_trees_all_close(of(sparse), of(dense), rtol=1e-9, atol=1e-10)


def test_exact_near_certainty():
    """The class that is nearly all of P has a gradient as exact as that of an index label."""
    x = np.array([[0.0, -20, -25, -40], [60, 0, 3, 1]], np.float32)
    labels = jxent.SparseLabels(np.array([[0, 2], [0, 3]]), np.array([[1.0, 0.0], [0.999, 0.001]], np.float32))
    q = np.array([[1.0, 0, 0, 0], [np.float32(0.999), 0, 0, np.float32(0.001)]])
    value, gradient = jax.value_and_grad(partial(jxent.cross_entropy, reduction="sum"))(x, labels)
    np.testing.assert_allclose(value, 2 * oracle.cross_entropy(x, q), rtol=1e-6)
    with mpmath.workdps(50):
        e = [[mpmath.exp(float(v)) for v in row] for row in x]
        wanted = [[sum(q[i]) * v / sum(row) - q[i][j] for j, v in enumerate(row)] for i, row in enumerate(e)]
    np.testing.assert_allclose(gradient, np.array(wanted, float), rtol=5e-6)


def test_other_layouts():
    """A class axis in the middle; one position alone; NumPy arrays and lists."""
    x = LOGITS.astype(np.float32)
    wanted = jxent.cross_entropy(x, dense(SHARES.astype(np.float32)), reduction="none")
    found = jxent.cross_entropy(np.moveaxis(x, -1, 1), jxent.SparseLabels(INDICES, SHARES), axis=1, reduction="none")
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    one = jxent.cross_entropy(x[1, 1], jxent.SparseLabels(INDICES[1, 1].tolist(), SHARES[1, 1].tolist()))
    np.testing.assert_allclose(one, wanted[1, 1], rtol=1e-5)


def test_what_is_missing_is_missing():
    """Or it is given to all classes alike, as docs/reference/SparseLabels.md has it."""
    x, q = LOGITS.astype(np.float32), SHARES.astype(np.float32)
    half = jxent.SparseLabels(INDICES, q / 2)
    whole = jxent.cross_entropy(x, jxent.SparseLabels(INDICES, q))
    np.testing.assert_allclose(jxent.cross_entropy(x, half), whole / 2, rtol=1e-6)

    total = q.sum(-1)
    of_top_k = jxent.SparseLabels(INDICES, q / total[..., None])
    options = {"reduction": "none"}
    found = jxent.cross_entropy(x, of_top_k, sample_weight=total, **options)
    found += (1 - total) * jxent.cross_entropy(x, of_top_k, label_smoothing=1.0, **options)
    wanted = jxent.cross_entropy(x, dense(q) + (1 - total[..., None]) / C, **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_index_labels_are_a_special_case():
    x, labels = LOGITS.astype(np.float32), INDICES[..., 0].clip(0)
    one = jxent.SparseLabels(labels[..., None], np.ones((B, L, 1), np.float32))
    chex.assert_trees_all_close(
        jax.value_and_grad(jxent.cross_entropy)(x, one), jax.value_and_grad(jxent.cross_entropy)(x, labels), rtol=1e-6
    )


def test_positions_that_are_ignored():
    """All of whose indices say so; what they hold reaches nothing."""
    indices, x = INDICES.copy(), LOGITS.astype(np.float32)
    indices[2, 3], x[2, 3] = -100, np.nan
    indices[2, 0, 1] = -100  # one entry of five, without a share: its position counts
    keep = np.ones((B, L), bool)
    keep[2, 3] = False
    f = jax.value_and_grad(jxent.cross_entropy)
    value, gradient = f(x, jxent.SparseLabels(indices, SHARES))
    wanted, wanted_gradient = f(LOGITS.astype(np.float32), jxent.SparseLabels(INDICES, SHARES), where=keep)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bad", [-1, C, C + 8])
def test_an_index_out_of_range(name, bad):
    """NaN at its position alone, if it has a probability; `checkify` names it."""
    indices = INDICES.copy()
    indices[1, 2, 3] = bad
    function, arrays, _ = CALLS[name]
    arrays = [a.astype(np.float32) for a in arrays.values()]
    f = partial(function, reduction="none")
    labels = jxent.SparseLabels(indices, SHARES.astype(np.float32))
    losses = f(*arrays, labels)
    np.testing.assert_array_equal(np.isnan(losses), (indices[..., 3] == bad) & (SHARES[..., 3] != 0))
    gradient = jax.grad(lambda x: jnp.sum(f(x, *arrays[1:], labels)))(arrays[0])
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), np.isnan(losses))
    error, _ = jax.jit(checkify.checkify(f, errors=checkify.user_checks))(*arrays, labels)
    with pytest.raises(checkify.JaxRuntimeError, match=rf"label {bad} is out of range for {C} classes, at \[1 2 3\]"):
        error.throw()


def test_classes_that_are_masked():
    """Without a share they are no classes; with one the loss is infinite."""
    x = np.array([[1.0, -np.inf, 2, 0]] * 2, np.float32)
    labels = jxent.SparseLabels(np.array([[0, 1], [0, 1]]), np.array([[1.0, 0], [0.5, 0.5]], np.float32))
    losses = jxent.cross_entropy(x, labels, reduction="none")
    rest = oracle.cross_entropy(x[:1, [0, 2, 3]], np.array([0]))
    np.testing.assert_allclose(losses, [rest, np.inf], rtol=1e-6)
    gradient = jax.grad(lambda x, q: jnp.sum(jxent.cross_entropy(x, labels._replace(probabilities=q))), (0, 1))
    assert all(np.isfinite(g[0]).all() for g in gradient(x, labels.probabilities))


def test_statistics():
    x = LOGITS.astype(np.float32)
    _, stats = jxent.cross_entropy(x, jxent.SparseLabels(INDICES, SHARES), return_stats=True)
    log_p = oracle.log_softmax(x)
    taken = np.take_along_axis(log_p, INDICES.clip(0), -1)
    np.testing.assert_allclose(stats.log_prob, (SHARES * taken).sum(-1), rtol=1e-5)
    label = np.take_along_axis(INDICES, SHARES.argmax(-1)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(stats.correct, x.argmax(-1) == label)


@pytest.mark.parametrize("recompute", [False, True])
def test_memory(recompute):
    """No dense row is written: a block has its logits, their exponentials and their gradient."""
    positions, vocab, features, k, block = 512, 8192, 16, 8, 64
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((positions, features), (features, vocab))]
    entries = jxent.SparseLabels(*(jax.ShapeDtypeStruct((positions, k), d) for d in (jnp.int32, jnp.float32)))
    f = jax.value_and_grad(partial(jxent.linear_cross_entropy, block_size=block, recompute=recompute), (0, 1))
    compiled = optimized(f).lower(*arrays, entries).compile()
    assert len(re.findall(r" dot\(", compiled.as_text())) == 3 + recompute
    kernel = 4 * features * vocab
    assert compiled.memory_analysis().temp_size_in_bytes < 3.1 * 4 * block * vocab + 2 * kernel


def test_memory_of_logits():
    x = jax.ShapeDtypeStruct((512, 8192), jnp.float32)
    entries = jxent.SparseLabels(*(jax.ShapeDtypeStruct((512, 8), d) for d in (jnp.int32, jnp.float32)))
    forward = optimized(jxent.cross_entropy).lower(x, entries).compile().memory_analysis()
    assert forward.temp_size_in_bytes < 0.02 * 4 * x.size
    backward = optimized(jax.value_and_grad(jxent.cross_entropy)).lower(x, entries).compile().memory_analysis()
    assert backward.temp_size_in_bytes < 1.05 * 4 * x.size  # of the gradient, before the entries are taken off it


def test_export():
    """Serialized with its name, as `Stats` is."""
    f = jax.jit(jxent.cross_entropy)
    labels = jxent.SparseLabels(jnp.asarray(INDICES), jnp.asarray(SHARES, jnp.float32))
    x = jnp.asarray(LOGITS, jnp.float32)
    read = jax.export.deserialize(jax.export.export(f)(x, labels).serialize(vjp_order=1))
    np.testing.assert_array_equal(read.call(x, labels), f(x, labels))


def test_per_example():
    labels = jxent.SparseLabels(jnp.asarray(INDICES), jnp.asarray(SHARES, jnp.float32))
    f = jax.value_and_grad(jxent.linear_cross_entropy, 1)
    hidden, kernel = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(KERNEL, jnp.float32)
    each = jax.vmap(f, (0, None, 0))(hidden, kernel, labels)
    for i in range(B):
        one = f(hidden[i], kernel, jax.tree.map(lambda a, i=i: a[i], labels))
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], each), one, rtol=1e-5, atol=1e-7)
