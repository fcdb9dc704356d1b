"""`linear_cross_entropy` is `cross_entropy` of the logits that it never holds.

Compared with `cross_entropy` on explicit logits (itself tested against the float64 oracle), over a grid in which every
pair of settings occurs; then what only blocks and matmuls can get wrong.
"""

import itertools
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import reference
from grids import short
from jax.sharding import AxisType, PartitionSpec

import jxent
from jxent._sweep import sweep

# --- the grid ---------------------------------------------------------------------------------------------------------

SHAPES = {1: (13,), 2: (3, 8), 3: (2, 5, 3), 4: (2, 1, 3, 4)}
SETTINGS = {
    "rank": (1, 2, 3, 4),
    "labels": ("index", "probabilities"),
    "vocab_axis": (-1, 0),
    "reduction": ("mean", "sum", "none"),
    "recompute": (False, True),
    "block_size": (None, 1, 4, 6),
    "class_weight": (False, True),
    "sample_weight": (False, True),
    "mask": (None, "where", "ignore_index"),
    "label_smoothing": (None, 0.1, "traced"),
    "z_loss_weight": (None, 0.01, "traced"),
    "logit_softcap": (None, 3.0),
    "return_stats": (False, True),
    "wrt": tuple(
        itertools.chain.from_iterable(itertools.combinations(("hidden", "kernel", "bias"), n) for n in range(4))
    ),
}


def every_pair():
    """Rows of settings, in which any two settings of any two options occur together."""
    rng = np.random.default_rng(3)
    pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(SETTINGS, 2)
        for i in range(len(SETTINGS[a]))
        for j in range(len(SETTINGS[b]))
    }
    while pairs:
        rows = [tuple((name, int(rng.integers(len(values)))) for name, values in SETTINGS.items()) for _ in range(200)]
        row = max(rows, key=lambda row: len(pairs.intersection(itertools.combinations(row, 2))))
        pairs -= set(itertools.combinations(row, 2))
        yield {name: SETTINGS[name][i] for name, i in row}


GRID = list(every_pair())


def arrays(shape, features, vocab, *, vocab_axis=-1, dtype=np.float64, scale=1.0, seed=0):
    """hidden, kernel, bias and index labels; the logits have a standard deviation of about `scale`."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(*shape, features))
    kernel = rng.normal(size=(features, vocab)) * scale / np.sqrt(features)
    bias = rng.normal(size=vocab) * scale
    labels = rng.integers(0, vocab, shape)
    kernel = kernel if vocab_axis else kernel.T
    return *(jnp.asarray(a, dtype) for a in (hidden, kernel, bias)), jnp.asarray(labels, jnp.int32)


def logits_of(hidden, kernel, bias=None, vocab_axis=-1):
    logits = jnp.matmul(hidden, kernel if vocab_axis else kernel.T, preferred_element_type=jnp.float64)
    return logits if bias is None else logits + bias


@pytest.mark.covering(
    "4-index--1-mean-False-6-True-True-None-None-None-None-True-('bias',)",
    "4-probabilities-0-sum-False-None-False-False-ignore_index-None-None-None-True-('hidden','kernel','bias')",
    "3-index-0-none-False-6-False-True-ignore_index-traced-0.01-None-False-('hidden','kernel','bias')",
)
@pytest.mark.parametrize("row", GRID, ids=lambda row: "-".join(map(str, row.values())).replace(" ", ""))
def test_equals_cross_entropy(row, x64):
    """Values, statistics and all gradients, those of weights, labels and scalars included, to 1e-10."""
    shape, vocab, axis = SHAPES[row["rank"]], 11, row["vocab_axis"]
    rng = np.random.default_rng(1)
    hidden, kernel, bias, labels = arrays(shape, 5, vocab, vocab_axis=axis)
    options = {k: row[k] for k in ("reduction", "logit_softcap", "return_stats")}
    floats = {name: {"hidden": hidden, "kernel": kernel, "bias": bias}[name] for name in row["wrt"]}
    rest = {k: v for k, v in {"hidden": hidden, "kernel": kernel}.items() if k not in floats}
    if row["labels"] == "probabilities":
        floats["labels"] = jnp.asarray(rng.dirichlet(np.ones(vocab), shape) * 1.2)
    else:
        rest["labels"] = labels
    if row["class_weight"]:
        floats["class_weight"] = jnp.asarray(rng.uniform(0.5, 2, vocab))
    if row["sample_weight"]:
        floats["sample_weight"] = jnp.asarray(rng.uniform(0.5, 2, shape))
    if row["mask"] == "where":
        rest["where"] = jnp.asarray(rng.uniform(size=shape) < 0.7)
    elif row["mask"] and row["labels"] == "index":
        options["ignore_index"] = 3
    for name in ("label_smoothing", "z_loss_weight"):
        if row[name] == "traced":
            floats[name] = jnp.asarray(0.07)
        elif row[name]:
            options[name] = row[name]
    cotangent = jnp.asarray(rng.normal(size=shape if row["reduction"] == "none" else ()))

    def ours(floats):
        own = {"vocab_axis": axis, "block_size": row["block_size"], "recompute": row["recompute"]}
        return jxent.linear_cross_entropy(**floats, **rest, **options, **own)

    def theirs(floats):
        every = floats | rest
        logits = logits_of(every.pop("hidden"), every.pop("kernel"), every.pop("bias", None), axis)
        return jxent.cross_entropy(logits, **every, **options)

    @partial(jax.jit, static_argnums=0)
    def outcome(function, floats):
        loss, pull, *stats = jax.vjp(function, floats, has_aux=options["return_stats"])
        return loss, pull(cotangent)[0], stats

    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12),
        outcome(ours, floats),
        outcome(theirs, floats),
    )


def test_scalar_position(x64):
    hidden, kernel, bias, label = arrays((), 5, 7)
    loss = jxent.linear_cross_entropy(hidden, kernel, label, bias=bias, reduction="none")
    np.testing.assert_allclose(loss, jxent.cross_entropy(logits_of(hidden, kernel, bias), label), rtol=1e-12)


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.covering("(33,)-mean")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(33,), (3, 11)], ids=str)
def test_block_size_changes_nothing(shape, reduction):
    """33 positions, 4097 classes, logits so small that one class more or less in a normalizer would show."""
    hidden, kernel, bias, labels = arrays(shape, 8, 4097, dtype=np.float32, scale=0.05)
    number = jnp.arange(33).reshape(shape)
    # The last blocks have less to count than the first; 27 lies in two of 7.
    where = (number % 5 != 1) & ((number < 25) | (number == 27))
    cotangent = jnp.cos(jnp.arange(33.0)).reshape(shape)

    def run(block_size):
        def loss(hidden, kernel, bias):
            losses = jxent.linear_cross_entropy(
                hidden, kernel, labels, bias=bias, where=where, reduction=reduction, block_size=block_size
            )
            return jnp.sum(losses * (cotangent if reduction == "none" else 1))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(hidden, kernel, bias)

    with jax.enable_x64(True):
        x = np.asarray(logits_of(hidden, kernel, bias))
    loss = oracle.cross_entropy(x, labels, where=where, reduction=reduction)
    want = np.sum(loss * (np.asarray(cotangent, np.float64) if reduction == "none" else 1))
    whole = run(33)
    for block_size in (1, 7, 11, 40):
        got = run(block_size)
        # A sum of some 20 losses of size log(4097) = 8.3, which with cotangents of both signs nearly cancels.
        np.testing.assert_allclose(got[0], want, rtol=1e-6, atol=1e-5)
        chex.assert_trees_all_close(got[1], whole[1], rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_block_is_traced_once(monkeypatch, reduction):
    """In each sweep: for the platform of lowering alone, and not for the shapes of the results."""
    traced, block = [], sweep.block_of
    monkeypatch.setattr(sweep, "block_of", lambda *args: traced.append(args) or block(*args))
    hidden, kernel, _, labels = arrays((39,), 2, 3, dtype=np.float32)

    def loss(hidden):
        return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels, block_size=13, reduction=reduction))

    program = jax.jit(jax.value_and_grad(loss)).trace(hidden)
    assert not traced
    program.lower()
    assert len(traced) == {"mean": 1, "none": 2}[reduction]


@pytest.mark.parametrize("vocab", short((32000, 50257), 50257))
def test_vocabularies_that_divide_by_nothing(vocab):
    hidden, kernel, bias, labels = arrays((33,), 4, vocab, dtype=np.float32, scale=0.05)
    labels = labels.at[:2].set(jnp.array([0, vocab - 1]))
    losses, grad = jax.value_and_grad(
        lambda k: jnp.sum(jxent.linear_cross_entropy(hidden, k, labels, bias=bias, block_size=7, reduction="none"))
    )(kernel)
    with jax.enable_x64(True):
        x = np.asarray(logits_of(hidden, kernel, bias))
    np.testing.assert_allclose(losses, oracle.cross_entropy(x, labels, reduction="sum"), rtol=1e-6)
    want = np.asarray(hidden, np.float64).T @ oracle.logit_gradient(x, labels)
    np.testing.assert_allclose(grad, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_no_positions(shape):
    hidden, kernel, _, labels = arrays(shape, 4, 5, dtype=np.float32)
    for reduction, want in (("mean", np.nan), ("sum", 0.0)):
        loss, grads = jax.value_and_grad(partial(jxent.linear_cross_entropy, reduction=reduction), (0, 1))(
            hidden, kernel, labels
        )
        np.testing.assert_array_equal(loss, want)
        chex.assert_trees_all_close(grads, (jnp.zeros_like(hidden), jnp.zeros_like(kernel)))


# --- cotangents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", short((False, True), False))
def test_loss_scaled_and_used_twice(recompute, x64):
    hidden, kernel, _, labels = arrays((4, 6), 5, 9)

    def once(hidden, kernel):
        return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=5, recompute=recompute)

    def gradients(f):
        return jax.jit(jax.grad(f, (0, 1)))(hidden, kernel)

    loss, plain = once(hidden, kernel), gradients(once)
    scaled = gradients(lambda *args: 1e-5 * once(*args))
    chex.assert_trees_all_close(scaled, jax.tree.map(lambda g: 1e-5 * g, plain), rtol=1e-13)
    twice = gradients(lambda *args: once(*args) + once(*args) ** 2)
    chex.assert_trees_all_close(twice, jax.tree.map(lambda g: (1 + 2 * loss) * g, plain), rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_survive_a_scaled_loss(reduction):
    """Neither a mean over many positions nor a tiny factor makes the gradient of the logits vanish in float16."""
    hidden, kernel, _, labels = arrays((64,), 8, 33, dtype=np.float16)
    factor = 1e-6

    def grads(dtype):
        def loss(h, k):
            losses = jxent.linear_cross_entropy(h, k, labels, reduction=reduction, block_size=16)
            return jnp.sum(losses * factor)

        up = [a.astype(dtype) for a in (hidden, kernel)]
        # The gradients themselves are out of float16's range; a loss scale brings them back, as in training.
        scaled = (lambda h, k: loss(h, k) * 2.0**14), (lambda k, h: loss(h, k) * 2.0**14)
        return jax.jit(jax.grad(scaled[0]))(*up), jax.jit(jax.grad(scaled[1]))(*up[::-1])

    for got, want in zip(grads(jnp.float16), grads(jnp.float32), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=4e-3 * float(jnp.abs(want).max()))
        assert float(jnp.abs(want).max()) > 1e-5


@pytest.mark.parametrize("margin", [0, 16, 20, 25])
def test_float16_gradients_of_confident_positions_survive(margin):
    """With a loss scale of 2**15, as in training, they are what the scaled gradient rounds to."""
    x = margin * np.eye(4)
    hidden, kernel = jnp.eye(4, dtype=jnp.float16), jnp.asarray(x, jnp.float16)
    grad = jax.grad(lambda k: jxent.linear_cross_entropy(hidden, k, jnp.arange(4)) * 2.0**15)(kernel)
    want = oracle.logit_gradient(x, np.arange(4)) * 2.0**13
    # Half a unit in the last place where float16 is normal, half its smallest number where it is not.
    np.testing.assert_allclose(grad, want, rtol=2e-3, atol=6e-8)


@pytest.mark.parametrize("size", [1e6, 1e-7])
def test_float16_with_class_weights_of_any_size(size):
    hidden, kernel, _, labels = arrays((8,), 4, 64, dtype=np.float16)
    q, weight = jax.nn.one_hot(labels, 64), jnp.full(64, size)

    def loss(kernel):
        return jxent.linear_cross_entropy(hidden, kernel, q, class_weight=weight, reduction="sum", block_size=3) / size

    got, want = (jax.jit(jax.grad(loss))(kernel.astype(dtype)) for dtype in (jnp.float16, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-3 * float(jnp.abs(want).max()))


def test_float16_where_no_class_weighs_anything():
    """Gradients of 0, and those of statistics, which class weights do not multiply."""
    hidden, kernel, _, labels = arrays((8,), 4, 64, dtype=np.float16)

    def smoothed(weight, hidden):
        options = {"class_weight": jnp.full(64, weight), "label_smoothing": 0.5, "reduction": "none"}
        return jxent.linear_cross_entropy(hidden, kernel, labels, return_stats=True, block_size=3, **options)

    np.testing.assert_array_equal(jax.grad(lambda h: smoothed(0.0, h)[0].sum())(hidden), 0)
    of_entropy = jax.grad(lambda h: smoothed(1e-5, h)[1].entropy.sum())
    got, want = (of_entropy(hidden.astype(dtype)) for dtype in (np.float16, np.float32))
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-3 * float(jnp.abs(want).max()))


def test_float16_gradients_of_a_large_z_loss():
    """Its gradient is 2 (m + log_z) times the others', here 1000 times: near the most that there is room for."""
    hidden, labels = jnp.ones((3, 4)), jnp.array([0, 1, 1])
    kernel = jnp.where(jnp.arange(8) == 0, 125.0, 1.0) * jnp.ones((4, 8))

    def gradient(dtype):
        def loss(k):
            return jxent.linear_cross_entropy(hidden.astype(dtype), k, labels, z_loss_weight=1.0, reduction="sum")

        return jax.grad(loss)(kernel.astype(dtype))

    got, want = gradient(jnp.float16), gradient(jnp.float32)
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-3 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("options", [{"where": False}, {"sample_weight": 0.0}], ids=str)
def test_float16_where_nothing_counts(options):
    """No coefficient to scale by: gradients of 0."""
    hidden, kernel, _, labels = arrays((4,), 3, 8, dtype=np.float16)
    loss = partial(jxent.linear_cross_entropy, labels=labels, reduction="sum", **options)
    for gradient in jax.grad(loss, (0, 1))(hidden, kernel):
        np.testing.assert_array_equal(gradient, 0)


def test_float16_of_smoothing_alone():
    """Where the label itself costs nothing, the coefficients of the smoothing are what must fit into float16."""
    hidden, kernel, _, labels = arrays((4,), 3, 8, dtype=np.float32)

    def gradient(dtype):
        loss = partial(jxent.linear_cross_entropy, hidden.astype(dtype), labels=labels, label_smoothing=1.0)
        return jax.grad(lambda k: loss(k, sample_weight=1e5, reduction="sum") / 1e5)(kernel.astype(dtype))

    got, want = gradient(jnp.float16), gradient(jnp.float32)
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-3 * float(jnp.abs(want).max()))


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.covering("index-mean")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("labels_are", ["index", "probabilities"])
def test_what_excluded_positions_hold_reaches_nothing(labels_are, reduction):
    hidden, kernel, bias, labels = arrays((13,), 4, 6, dtype=np.float32)
    where = jnp.arange(13) % 3 != 0
    if labels_are == "index":
        labels = labels.at[2].set(-100)
        out = ~where | (labels == -100)
    else:
        labels, out = jax.nn.softmax(hidden @ kernel), ~where
    bad = jnp.where(jnp.arange(13) % 2 == 0, jnp.nan, jnp.inf)[:, None]

    @jax.jit
    def run(hidden, labels):
        def loss(hidden, kernel, bias, sample_weight):
            losses = jxent.linear_cross_entropy(
                hidden, kernel, labels, bias=bias, where=where, sample_weight=sample_weight, reduction=reduction,
                block_size=5, label_smoothing=0.1, z_loss_weight=0.01,
            )  # fmt: skip
            return jnp.sum(losses)

        return jax.value_and_grad(loss, (0, 1, 2, 3))(hidden, kernel, bias, jnp.ones(13))

    poisoned = jnp.where(out[:, None], bad, hidden)
    bad_labels = labels if labels_are == "index" else jnp.where(out[:, None], jnp.nan, labels)
    got, want = run(poisoned, bad_labels), run(hidden, labels)
    assert np.isfinite(want[0])
    chex.assert_trees_all_equal(got, want)
    np.testing.assert_array_equal(np.asarray(got[1][0])[np.asarray(out)], 0)


# A gradient of 0 at such a position is 0 times what it holds in the next derivative.
@pytest.mark.covering("probabilities-none")
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("labels_are", ["index", "probabilities", "sparse"])
def test_what_excluded_positions_hold_reaches_no_second_derivative(labels_are, reduction):
    hidden, kernel, bias, labels = arrays((7,), 4, 6, dtype=np.float32)
    out = jnp.arange(7) % 3 == 0
    q = jax.nn.softmax(hidden @ kernel)
    probabilities = q[:, :2] if labels_are == "sparse" else q

    @jax.jit
    def run(hidden, q):
        of_kind = {
            "index": labels,
            "probabilities": q,
            "sparse": jxent.SparseLabels(jnp.tile(jnp.arange(2), (7, 1)), q),
        }

        def loss(kernel, bias):
            options = {"bias": bias, "where": ~out, "reduction": reduction, "block_size": 2}
            return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, of_kind[labels_are], **options))

        def along(kernel, bias):
            return jax.jvp(loss, (kernel, bias), (kernel, bias))[1]

        def squares(kernel, bias):
            return sum(jnp.sum(gradient**2) for gradient in jax.grad(loss, (0, 1))(kernel, bias))

        return [jax.grad(function, (0, 1))(kernel, bias) for function in (along, squares)]

    bad = jnp.where(out[:, None], jnp.nan, 0)
    got, want = run(hidden + bad, probabilities + bad), run(hidden, probabilities)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(want))
    chex.assert_trees_all_close(got, want, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(reduction):
    hidden, kernel, _, labels = arrays((4,), 3, 5, dtype=np.float32)
    loss, grads = jax.value_and_grad(partial(jxent.linear_cross_entropy, reduction=reduction, block_size=2), (0, 1))(
        hidden, kernel, jnp.full_like(labels, -100)
    )
    np.testing.assert_array_equal(loss, np.nan if reduction == "mean" else 0)
    chex.assert_trees_all_equal(grads, (jnp.zeros_like(hidden), jnp.zeros_like(kernel)))


def test_masked_class_is_a_removed_class(x64):
    hidden, kernel, bias, labels = arrays((6,), 3, 5)
    more = jnp.concatenate([kernel, jnp.ones((3, 2))], 1), jnp.concatenate([bias, jnp.full(2, -jnp.inf)])

    def loss(h, k, b):
        return jxent.linear_cross_entropy(h, k, labels, bias=b, label_smoothing=0.1, z_loss_weight=0.01, block_size=4)

    got, want = (jax.value_and_grad(loss, (0, 1, 2))(hidden, *args) for args in (more, (kernel, bias)))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-13)
    np.testing.assert_allclose(got[1][0], want[1][0], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(got[1][1], np.pad(want[1][1], ((0, 0), (0, 2))), rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(got[1][2], np.pad(want[1][2], (0, 2)), rtol=1e-11, atol=1e-14)


# --- precision --------------------------------------------------------------------------------------------------------


def test_exact_near_certainty():
    """A margin of 20 in float32: the loss of 4e-8 and the gradients have all their digits, as for `cross_entropy`."""
    hidden = jnp.eye(20, dtype=jnp.float32)
    kernel = 20 * jnp.eye(20, dtype=jnp.float32)
    labels = jnp.arange(20)
    x = np.asarray(kernel, np.float64)
    loss, grads = jax.value_and_grad(partial(jxent.linear_cross_entropy, block_size=8), (0, 1))(hidden, kernel, labels)
    np.testing.assert_allclose(loss, oracle.cross_entropy(x, labels), rtol=1e-6)
    want = oracle.logit_gradient(x, labels) / 20
    np.testing.assert_allclose(grads[1], want, rtol=2e-6)
    # Against the kernel all but one term of each sum are 0.
    np.testing.assert_allclose(grads[0], 20 * want, rtol=2e-6)


@pytest.fixture(scope="module")
def many_positions():
    """bfloat16 hidden, kernel, labels; the loss and the kernel's gradient of the same numbers in float64."""
    hidden, kernel, _, labels = arrays((16384,), 32, 1000, dtype=jnp.bfloat16, scale=3.0)
    h, k = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    x = h @ k
    return hidden, kernel, labels, oracle.cross_entropy(x, labels), h.T @ oracle.logit_gradient(x, labels) / 16384


def test_bfloat16(many_positions):
    """The loss is float32 and right to 1e-5; the kernel's gradient is no worse with 64 blocks than with one."""
    hidden, kernel, labels, want, want_grad = many_positions
    errors = []
    for block_size in (16384, 256):
        loss, grad = jax.value_and_grad(partial(jxent.linear_cross_entropy, block_size=block_size), 1)(
            hidden, kernel, labels
        )
        assert loss.dtype == jnp.float32
        assert grad.dtype == jnp.bfloat16
        assert abs(loss - want) / want < 1e-5
        errors.append(np.linalg.norm(np.asarray(grad, np.float64) - want_grad) / np.linalg.norm(want_grad))
    # Rounding to bfloat16 (2**-8 at most, uniformly distributed) is nearly all of it, whatever the block.
    assert errors[1] <= 1.02 * errors[0] < 0.01


@pytest.mark.parametrize("peak", [5, 40, 160, 640])
def test_gradient_has_the_probabilities_of_the_forward_pass(peak):
    """The gradient of a float32 bias shows the gradient of the logits before it is rounded for the matmuls."""
    hidden, kernel, _, labels = arrays((16,), 64, 500, dtype=jnp.bfloat16, scale=1.0, seed=2)
    x = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    hidden = (hidden * (peak / x.max())).astype(jnp.bfloat16)
    x = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    assert 0.9 * peak < x.max() < 1.1 * peak

    def loss(bias, hidden, label):
        return jxent.linear_cross_entropy(hidden[None], kernel, label[None], bias=bias, return_stats=True)

    grads, stats = jax.vmap(jax.grad(loss, has_aux=True), (None, 0, 0))(jnp.zeros(500), hidden, labels)
    # What a float32 sum of 64 products of up to 640 in all leaves of a probability, and of 500 of them added up.
    np.testing.assert_allclose(grads, oracle.logit_gradient(x, labels), rtol=0, atol=1e-5)
    np.testing.assert_allclose(grads.sum(-1), 0, atol=1e-6)
    at_label = jnp.take_along_axis(grads, labels[:, None], 1)
    np.testing.assert_allclose(at_label, jnp.expm1(stats.log_prob), rtol=1e-5)


def operands_of_dots(text):
    """The operand types of every dot in an optimised HLO module."""
    found = []
    for computation in text.split("\n\n"):
        types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", computation))
        found += [(types[a], types[b]) for a, b in re.findall(r" dot\((%[\w.\-]+), (%[\w.\-]+)\)", computation)]
    return found


@pytest.mark.covering
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab_axis", [-1, 0])
@pytest.mark.parametrize("shape", [(512,), (4, 128)], ids=str)
def test_bfloat16_is_multiplied_as_bfloat16(shape, vocab_axis, reduction):
    """Three matmuls (four where the backward pass computes the logits again), none of them of float32 operands."""
    hidden, kernel, _, labels = arrays(shape, 64, 999, vocab_axis=vocab_axis, dtype=jnp.bfloat16)

    def loss(hidden, kernel):
        losses = jxent.linear_cross_entropy(
            hidden, kernel, labels, vocab_axis=vocab_axis, reduction=reduction, block_size=128
        )
        return jnp.sum(losses)

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).compile().as_text()
    # With a sum of losses as the loss the forward pass's own logits are not needed for `grad`.
    assert operands_of_dots(text) == [("bf16", "bf16")] * 3


def test_dtypes():
    """Mixed dtypes promote; gradients come in each input's own dtype; the loss in at least float32."""
    hidden, kernel, bias, labels = arrays((6,), 4, 5, dtype=np.float32)
    for h, k, b in itertools.product((jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.bfloat16,)):
        args = hidden.astype(h), kernel.astype(k), bias.astype(b)
        loss, grads = jax.jit(
            jax.value_and_grad(
                lambda h, k, b: jxent.linear_cross_entropy(h, k, labels, bias=b, block_size=4), (0, 1, 2)
            )
        )(*args)
        assert loss.dtype == jnp.float32
        assert [g.dtype for g in grads] == [a.dtype for a in args]
        want = jxent.cross_entropy((args[0] @ args[1]).astype(jnp.float32) + args[2], labels)
        np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_precision_reaches_every_matmul():
    hidden, kernel, _, labels = arrays((6,), 4, 5, dtype=np.float32)

    def text(**options):
        f = jax.grad(partial(jxent.linear_cross_entropy, block_size=4, **options), (0, 1))
        return jax.jit(f).lower(hidden, kernel, labels).as_text()

    assert text().count("HIGHEST") == 0
    highest = [line for line in text(precision="highest").splitlines() if "dot_general" in line]
    assert len(highest) == 3
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in highest)


# --- only what is differentiated --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrt", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_differentiated_is_computed(reduction, wrt):
    """Counted in the traced program: a matmul for the logits, one more for `hidden`, one more for `kernel`."""
    hidden, kernel, bias, labels = arrays((8,), 3, 5, dtype=np.float32)

    def loss(*args):
        losses = jxent.linear_cross_entropy(*args[:2], labels, bias=args[2], block_size=4, reduction=reduction)
        return jnp.sum(losses)

    function = jax.value_and_grad(loss, wrt) if wrt else loss
    text = jax.jit(function).lower(hidden, kernel, bias).as_text()
    forward = 1 + (reduction == "none" and bool(wrt))  # a pass of its own for the losses
    assert text.count("stablehlo.dot_general") == forward + (0 in wrt) + (1 in wrt)


@pytest.mark.parametrize("vocab_axis", [-1, 0])
def test_stop_gradient_freezes(vocab_axis):
    hidden, kernel, _, labels = arrays((8,), 3, 5, vocab_axis=vocab_axis, dtype=np.float32)

    def loss(hidden, kernel):
        kernel = jax.lax.stop_gradient(kernel)
        return jxent.linear_cross_entropy(hidden, kernel, labels, vocab_axis=vocab_axis, block_size=4)

    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, kernel).as_text()
    assert text.count("stablehlo.dot_general") == 2


@pytest.mark.parametrize("options", [{"recompute": True}, {"reduction": "none"}, {}], ids=str)
def test_what_is_kept_between_the_passes(options):
    """The gradients of a mean, in the dtypes of their inputs; otherwise nothing but the inputs themselves."""
    hidden, kernel, _, labels = arrays((64,), 8, 33, dtype=jnp.bfloat16)

    def pull(hidden, kernel):
        def loss(hidden, kernel):
            return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels, block_size=16, **options))

        return jax.vjp(loss, hidden, kernel)[1]

    program = jax.make_jaxpr(pull)(hidden, kernel).jaxpr
    kept = [(v.aval.shape, v.aval.dtype) for v in program.outvars if v not in program.invars and v.aval.size > 64]
    assert kept == ([] if options else [((64, 8), jnp.bfloat16), ((8, 33), jnp.bfloat16)])


def test_gradients_of_a_mean_are_rounded_once():
    """Over 96 positions, no power of two: the kept gradients are those of the backward pass, bit for bit."""
    hidden, kernel, _, labels = arrays((96,), 16, 50, dtype=jnp.bfloat16)
    kept, taken = (
        jax.grad(partial(jxent.linear_cross_entropy, block_size=32, recompute=recompute), (0, 1))(
            hidden, kernel, labels
        )
        for recompute in (False, True)
    )
    chex.assert_trees_all_equal(kept, taken)


@pytest.mark.parametrize(
    ("platform", "wrt", "positions", "vocab", "blocks"),
    [
        ("cpu", 1, 512, 50, 2),  # at least 256 positions
        ("cpu", 1, 514, 50, 3),
        ("cpu", 1, 3072, 50, 4),  # a quarter of them
        ("cpu", 1, 16384, 16384, 16),  # 64 MiB of logits
        ("cpu", 1, 16640, 16384, 20),
        ("cpu", 0, 16384, 65536, 64),  # and at least 256 positions there too
        ("tpu", 1, 2048, 50, 2),  # at least 1024 positions
        ("tpu", 1, 2050, 50, 3),
        ("tpu", 1, 65536, 65536, 64),  # and at most
        ("cuda", 1, 65536, 65536, 32),  # at most 2048 positions
        ("cuda", 1, 16384, 2**19, 16),  # and 2 GiB of logits
        ("tpu", 0, 1024, 50, 2),  # with a frozen kernel at least 512
        ("tpu", 0, 1026, 50, 3),
        ("cuda", 0, 65536, 65536, 32),  # and 512 MiB
        ("cuda", None, 65536, 65536, 32),  # the loss alone, too
        ("tpu", None, 65536, 2**18, 32),  # the loss alone stores no logits there: 2048 positions
        ("tpu", "tangent", 65536, 2**18, 128),
    ],
)
def test_default_block_size(platform, wrt, positions, vocab, blocks):
    """As the docstring has it, for where the program is to run, and not for where it is traced."""

    def tangent(hidden, kernel, labels):
        return jax.jvp(lambda hidden: loss(hidden, kernel, labels), (hidden,), (hidden,))

    loss = jxent.linear_cross_entropy
    step = jax.jit({None: loss, "tangent": tangent}[wrt] if wrt in (None, "tangent") else jax.grad(loss, wrt))
    shapes = ((positions, 2), jnp.float32), ((2, vocab), jnp.float32), ((positions,), jnp.int32)
    lowered = step.trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).lower(lowering_platforms=(platform,))
    found = re.findall(rf"-> tensor<(\d+)x{vocab}xf32>", lowered.as_text())
    # 2 features: the kernel's gradient; 1: a row of the kernel, in the check of what is not finite.
    block, least = -(-positions // blocks), 64 if platform == "cpu" else 256
    # And the steps where few positions count.
    assert set(map(int, found)) - {1, 2} == {block, max(block // 8, least)}


# --- transformations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", short(("mean", "none"), "mean"))
def test_vmap(reduction, x64):
    """Over examples, over kernels, over both; losses and gradients are those of the single calls."""
    hidden, kernel, bias, labels = arrays((3, 7), 4, 6)
    kernels = jnp.stack([kernel, 2 * kernel, kernel[:, ::-1]])
    cotangent = jnp.cos(jnp.arange(7.0))

    def loss(hidden, kernel, labels):
        losses = jxent.linear_cross_entropy(hidden, kernel, labels, bias=bias, block_size=3, reduction=reduction)
        return jnp.sum(losses * (cotangent if reduction == "none" else 1))

    step = jax.value_and_grad(loss, (0, 1))
    alone = jax.jit(step)
    for axes, args in (
        ((0, None, 0), (hidden, kernel, labels)),
        ((None, 0, None), (hidden[0], kernels, labels[0])),
        ((0, 0, 0), (hidden, kernels, labels)),
    ):
        got = jax.jit(jax.vmap(step, axes))(*args)
        for i in range(3):
            single = [a if axis is None else a[i] for a, axis in zip(args, axes, strict=True)]
            chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], got), alone(*single), rtol=1e-12, atol=1e-14)
        # The gradient of the vmapped loss: here the kernel's is a sum over the examples that share it.
        total = jax.jit(jax.grad(lambda *args, axes=axes: jnp.sum(jax.vmap(loss, axes)(*args)), 1))(*args)
        want = got[1][1] if axes[1] == 0 else got[1][1].sum(0)
        np.testing.assert_allclose(total, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("recompute", short((False, True), False))
def test_second_derivatives(recompute, x64):
    """Hessian-vector products and the Hessian, against those of the plain formula."""
    hidden, kernel, bias, labels = arrays((5,), 3, 4)
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.02, "logit_softcap": 4.0}
    rng = np.random.default_rng(5)
    tangents = tuple(jnp.asarray(rng.normal(size=a.shape)) for a in (hidden, kernel, bias))

    def ours(h, k, b):
        return jxent.linear_cross_entropy(h, k, labels, bias=b, block_size=2, recompute=recompute, **options)

    def theirs(h, k, b):
        return reference.cross_entropy(h @ k + b, labels, **options)

    args = hidden, kernel, bias

    def product(f):
        return jax.jit(lambda: jax.jvp(jax.grad(f, (0, 1, 2)), args, tangents)[1])()

    chex.assert_trees_all_close(product(ours), product(theirs), rtol=1e-9, atol=1e-12)
    hessian, want = (jax.jit(jax.hessian(f, 1))(*args) for f in (ours, theirs))
    np.testing.assert_allclose(hessian, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recompute", short((False, True), False))
def test_reverse_over_reverse_of_one_argument(recompute, x64):
    """The others are constants, with which JAX 0.12 cannot transpose an optimization barrier."""
    hidden, kernel, _, labels = arrays((5,), 3, 4)
    args = hidden, kernel

    def ours(h, k):
        return jxent.linear_cross_entropy(h, k, labels, block_size=2, recompute=recompute)

    def theirs(h, k):
        return reference.cross_entropy(h @ k, labels)

    def product(f, wrt):
        return jax.jit(jax.grad(lambda *args: jnp.vdot(jax.grad(f, wrt)(*args), args[wrt]), wrt))(*args)

    for wrt in (0, 1):
        np.testing.assert_allclose(product(ours, wrt), product(theirs, wrt), rtol=1e-9, atol=1e-12)


def test_second_derivatives_with_a_masked_class(x64):
    hidden, kernel, bias, labels = arrays((6,), 3, 4)
    more, masked = jnp.concatenate([kernel, kernel[:, :1]], 1), jnp.append(bias, -jnp.inf)

    def product(bias):
        def loss(kernel):
            return jxent.linear_cross_entropy(hidden, kernel, labels, bias=bias, label_smoothing=0.1, block_size=4)

        kernels = more if bias.size == 5 else kernel
        return jax.jit(lambda kernels: jax.jvp(jax.grad(loss), (kernels,), (kernels,))[1])(kernels)

    np.testing.assert_allclose(product(masked)[:, :4], product(bias), rtol=1e-10, atol=1e-14)
    np.testing.assert_array_equal(product(masked)[:, 4], 0)


@pytest.mark.parametrize("reduction", short(("mean", "sum"), "mean"))
def test_float64_weights_of_a_float32_model(reduction, x64):
    """The loss is float64 if an input is, whichever way the gradients are taken, and weights of any size fit."""
    hidden, kernel, _, labels = arrays((6,), 3, 5, dtype=np.float32)
    weight = jnp.full(6, 1e60)

    def run(function, **options):
        def loss(kernel):
            losses = function(kernel, sample_weight=weight, reduction=reduction, **options)
            return losses if reduction == "mean" else losses / 1e60

        return jax.value_and_grad(loss)(kernel)

    whole = run(lambda k, **options: jxent.cross_entropy(hidden @ k, labels, **options))
    for recompute in (False, True):
        linear = partial(jxent.linear_cross_entropy, hidden, labels=labels, block_size=4, recompute=recompute)
        got = run(linear)
        assert got[0].dtype == whole[0].dtype == jnp.float64
        np.testing.assert_allclose(got[0], whole[0], rtol=1e-6)
        if reduction == "mean":  # the gradient of the sum is out of float32's range on its way
            np.testing.assert_allclose(got[1], whole[1], rtol=1e-5, atol=1e-7)


def test_checkpoint_and_scan(x64):
    hidden, kernel, _, labels = arrays((4, 6), 3, 5)
    loss = partial(jxent.linear_cross_entropy, block_size=4)
    want = jax.grad(lambda h, k: jnp.mean(jnp.stack([loss(a, k, t) for a, t in zip(h, labels, strict=True)])), (0, 1))(
        hidden, kernel
    )

    def scanned(h, k):
        step = jax.checkpoint(lambda total, x: (total + loss(x[0], k, x[1]), None))
        return jax.lax.scan(step, jnp.zeros(()), (h, labels))[0] / 4

    chex.assert_trees_all_close(jax.jit(jax.grad(scanned, (0, 1)))(hidden, kernel), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """Positions sharded inside `shard_map` (over one device here): sums, with the kernel replicated."""
    hidden, kernel, bias, labels = arrays((6,), 3, 5, dtype=np.float32)
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,))

    def local(hidden, kernel, bias, labels):
        loss = jxent.linear_cross_entropy(hidden, kernel, labels, bias=bias, reduction="sum", block_size=4)
        return jax.lax.psum(loss, "data")

    specs = PartitionSpec("data"), PartitionSpec(), PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check_vma)
    got = jax.jit(jax.value_and_grad(mapped, (0, 1, 2)))(hidden, kernel, bias, labels)
    want = jax.value_and_grad(
        lambda h, k, b: jxent.linear_cross_entropy(h, k, labels, bias=b, reduction="sum"), (0, 1, 2)
    )(hidden, kernel, bias)
    chex.assert_trees_all_close(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("block_size", short((4, 100), 4))
def test_only_the_weights_vary_in_shard_map(block_size):
    """Weights of each device's own, with everything else replicated: the carry of the sweep varies as they do."""
    hidden, kernel, _, labels = arrays((6,), 3, 5, dtype=np.float32)
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,))
    weight, z_weight = jnp.arange(1.0, 7), jnp.array([0.1])

    def local(hidden, kernel, weight, z_weight):
        options = {"sample_weight": weight, "z_loss_weight": z_weight[0], "reduction": "sum", "block_size": block_size}
        return jax.lax.psum(jxent.linear_cross_entropy(hidden, kernel, labels, **options), "data")

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    args = hidden, kernel, weight, z_weight
    got = jax.grad(mapped, (0, 1, 2, 3))(*args)

    def plain(h, k, w, z):
        return jxent.linear_cross_entropy(h, k, labels, sample_weight=w, z_loss_weight=z[0], reduction="sum")

    chex.assert_trees_all_close(got, jax.grad(plain, (0, 1, 2, 3))(*args), rtol=2e-6, atol=1e-5)


def test_export_and_ahead_of_time():
    hidden, kernel, _, labels = arrays((6,), 3, 5, dtype=jnp.bfloat16)
    step = jax.jit(jax.value_and_grad(partial(jxent.linear_cross_entropy, block_size=4), (0, 1)))
    exported = jax.export.export(step, platforms=("cpu", "cuda", "rocm", "tpu"))(hidden, kernel, labels)
    want = step(hidden, kernel, labels)
    chex.assert_trees_all_equal(exported.call(hidden, kernel, labels), want)
    chex.assert_trees_all_equal(step.lower(hidden, kernel, labels).compile()(hidden, kernel, labels), want)


def test_values_do_not_retrace():
    hidden, kernel, _, labels = arrays((6,), 3, 5, dtype=np.float32)
    traced = jax.jit(
        chex.assert_max_traces(lambda h, s: jxent.linear_cross_entropy(h, kernel, labels, label_smoothing=s), 1)
    )
    assert traced(hidden, jnp.float32(0.1)) != traced(2 * hidden, jnp.float32(0.2))


# Compiled programs and residuals of one order of calls must not serve another.
ORDERS = [
    ("h", "k", "checkpoint h"),
    ("h", "checkpoint k", "h k"),
    ("checkpoint h", "k", "h"),
    ("h k", "k", "checkpoint k"),
]


@pytest.mark.covering
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_gradients_in_any_order(order, recompute, x64):
    """What is differentiated may change from call to call, with and without checkpoint."""
    hidden, kernel, _, labels = arrays((8,), 8, 8)

    def loss(hidden, kernel):
        return jxent.linear_cross_entropy(hidden, kernel, labels, recompute=recompute)

    wanted = jax.grad(lambda h, k: jxent.cross_entropy(h @ k, labels), (0, 1))(hidden, kernel)
    jax.clear_caches()
    for name in order:
        f = jax.checkpoint(loss) if "checkpoint" in name else loss
        wrt = tuple(i for i, letter in enumerate("hk") if letter in name.removeprefix("checkpoint ").split())
        actual = jax.jit(jax.grad(f, wrt))(hidden, kernel)
        for i, gradient in zip(wrt, actual, strict=True):
            np.testing.assert_allclose(gradient, wanted[i], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"recompute": True}, {}], ids=str)
def test_second_derivatives_of_one_block(options, x64):
    """As many positions as features, so that no axis can be taken for another unnoticed; both orders of modes."""
    hidden, kernel, _, labels = arrays((4,), 4, 8)

    def loss(hidden, kernel):
        return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels, **options))

    def full(hidden, kernel):
        reduction = "sum" if options.get("reduction") == "none" else "mean"
        return reference.cross_entropy(hidden @ kernel, labels, reduction=reduction)

    @partial(jax.jit, static_argnums=0)
    def second(f, hidden, kernel):
        """The Hessian, and the gradient of the squared gradient."""
        squares = jax.grad(lambda kernel: jnp.sum(jax.grad(f)(hidden, kernel) ** 2))
        return jax.hessian(f, 1)(hidden, kernel), squares(kernel)

    for got, want in zip(second(loss, hidden, kernel), second(full, hidden, kernel), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("block_size", [2, None])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_kernel_of_either_layout(dtype, block_size):
    """In one block and in several: XLA:CPU refuses some products of 16-bit operands when it runs them."""
    rng = np.random.default_rng(12)
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((4, 8), (8, 3)))
    labels = np.array([0, 2, 1, 1])

    def grads(kernel, vocab_axis):
        loss = partial(jxent.linear_cross_entropy, labels=labels, vocab_axis=vocab_axis, block_size=block_size)
        return jax.jit(jax.grad(loss, (0, 1)))(hidden, kernel)

    for got, want in zip(grads(kernel.T, 0), grads(kernel, -1), strict=True):
        want = want.T if got.shape != want.shape else want
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_float16_probabilities_of_large_costs():
    """The label's gradient is its cost, whatever the gradient of the logits is scaled by to fit into float16."""
    hidden, kernel = jnp.eye(2, dtype=jnp.float16), jnp.array([[0, -40, 3], [20, 0, -20]], jnp.float16)
    labels = jnp.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], jnp.float16)
    got = jax.grad(lambda q: jxent.linear_cross_entropy(hidden, kernel, q, reduction="sum"))(labels)
    want = -oracle.log_softmax(np.asarray(kernel, np.float64))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-11, atol=2**-25)
