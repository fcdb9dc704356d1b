"""`linear_sigmoid_cross_entropy`: every derivative against full logits, 50 digits, labels of each kind, memory, SigLIP.

Meshes, `vmap`, export, strict modes, skipped positions and bad input are in the tables of all functions.
"""

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

N, F, C, K = 7, 4, 9, 3
RNG = np.random.default_rng(3)
HIDDEN, KERNEL, BIAS = RNG.normal(size=(N, F)), RNG.normal(size=(F, C)), RNG.normal(size=C)
POS_WEIGHT, SAMPLE_WEIGHT = RNG.uniform(0.5, 3, C), RNG.uniform(0.5, 2, N)
WHERE = np.arange(N) != 4
INDEX = RNG.integers(0, C, N)
INDEX[2] = -100
INDICES = RNG.permuted(np.tile(np.arange(C), (N, 1)), axis=1)[:, :K]
INDICES[0, 1:] = INDICES[0, 0]  # a class that repeats
SHARES = {"index": np.zeros(0), "dense": RNG.uniform(size=(N, C)), "sparse": RNG.uniform(size=(N, K)) / K}


def labels_of(kind, shares):
    """(The labels, the same for `reference`.)"""
    if kind == "index":
        return INDEX, jnp.asarray(INDEX)
    if kind == "dense":
        return shares, shares
    return jxent.SparseLabels(INDICES, shares), jnp.zeros((N, C)).at[np.arange(N)[:, None], INDICES].add(shares)


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.covering("index-mean-False-rr", "sparse-none-False-fr", "index-sum-True-f", "dense-mean-False-r")
@pytest.mark.parametrize("modes", short(("", "r", "f", "rr", "rf", "fr", "ff"), "r", "f", "rr", "fr"))
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "dense", "sparse"])
def test_derivatives_by_every_argument(kind, reduction, recompute, modes):
    def found(hidden, kernel, bias, shares, pos_weight, **options):
        labels = labels_of(kind, shares)[0]
        options |= {"bias": bias, "pos_weight": pos_weight, "recompute": recompute, "block_size": 3}
        return jxent.linear_sigmoid_cross_entropy(hidden, kernel, labels, **options)

    def wanted(hidden, kernel, bias, shares, pos_weight, **options):
        labels = labels_of(kind, shares)[1]
        return reference.sigmoid_of_classes(hidden @ kernel + bias, labels, pos_weight=pos_weight, **options)

    def of(function, *at):
        *arrays, sample_weight, label_smoothing = at
        options = {"sample_weight": sample_weight, "label_smoothing": label_smoothing, "where": WHERE}
        return function(*arrays, reduction=reduction, **options)

    at = tuple(map(jnp.asarray, (HIDDEN, KERNEL, BIAS, SHARES[kind], POS_WEIGHT, SAMPLE_WEIGHT, 0.2)))
    each = (jax.jit(differentiated(partial(of, function), modes))(*at) for function in (found, wanted))
    for leaf, right in zip(*map(jax.tree.leaves, each), strict=True):  # second derivatives of a sum reach 1000
        np.testing.assert_allclose(leaf, right, rtol=1e-12, atol=1e-12 * max(1, np.max(np.abs(right), initial=0)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["index", "dense", "sparse"])
def test_without_options(kind):
    """No bias, no weights, no smoothing; a kernel with the vocabulary first."""
    labels, dense = labels_of(kind, SHARES[kind])
    found = jax.value_and_grad(partial(jxent.linear_sigmoid_cross_entropy, labels=labels, vocab_axis=0), (0, 1))
    wanted = jax.value_and_grad(lambda h, k: reference.sigmoid_of_classes(h @ k.T, dense), (0, 1))
    chex.assert_trees_all_close(found(HIDDEN, KERNEL.T), wanted(HIDDEN, KERNEL.T), rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_frozen_arguments():
    """With only the hidden states differentiated, or only the bias, or only the `pos_weight`."""
    at = HIDDEN, KERNEL, BIAS, POS_WEIGHT

    def loss(hidden, kernel, bias, pos_weight):
        return jxent.linear_sigmoid_cross_entropy(hidden, kernel, INDEX, bias=bias, pos_weight=pos_weight, block_size=3)

    together = jax.grad(loss, (0, 1, 2, 3))(*at)
    for i, gradient in enumerate(together):
        np.testing.assert_allclose(jax.grad(loss, i)(*at), gradient, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_one_pos_weight_for_all_classes():
    f = jax.value_and_grad(lambda w: jxent.linear_sigmoid_cross_entropy(HIDDEN, KERNEL, INDEX, pos_weight=w))
    (value, gradient), (each, gradients) = f(2.0), f(np.full(C, 2.0))
    np.testing.assert_allclose([value, gradient], [each, gradients.sum()], rtol=1e-13)


# --- exactness --------------------------------------------------------------------------------------------------------

MARGINS = (-80.0, -30.0, -17.5, -2.0, 0.0, 1e-4, 0.5, 3.0, 16.0, 20.0, 45.0, 80.0)


@pytest.mark.parametrize("kind", ["index", "sparse", "dense"])
def test_every_margin_against_50_digits(kind):
    """A label's logit of each size, among classes that are certain noes: the loss and each element of the gradient."""
    rows = np.float32([[x, -80, -60, -45.5] for x in MARGINS])  # the kernel is the identity, so they are the logits
    labels = np.zeros(len(rows), int)
    if kind == "sparse":  # twice a half of the same class
        labels = jxent.SparseLabels(np.zeros((len(rows), 2), int), np.full((len(rows), 2), 0.5, np.float32))
    if kind == "dense":
        labels = np.eye(4, dtype=np.float32)[labels]
    f = partial(jxent.linear_sigmoid_cross_entropy, labels=labels, reduction="none", block_size=5)
    gradient = jax.grad(lambda rows: jnp.sum(f(rows, jnp.eye(4))))
    losses, gradients = optimized(lambda rows: (f(rows, jnp.eye(4)), gradient(rows)))(rows)
    with mpmath.workdps(50):
        for row, loss, gradient in zip(rows, losses, gradients, strict=True):
            x = [mpmath.mpf(float(value)) for value in row]
            x[0] = -x[0]
            wanted = mpmath.fsum(mpmath.log1p(mpmath.exp(value)) for value in x)
            assert abs(float(loss) / wanted - 1) < 5e-6
            slopes = [1 / (1 + mpmath.exp(-value)) for value in x]
            slopes[0] = -slopes[0]
            for found, slope in zip(gradient, slopes, strict=True):
                assert abs(float(found) / slope - 1) < 5e-6, (row, found)


def test_infinite_logits():
    """A masked class costs nothing as a no, nor as a yes whose weight is 0."""
    bias, weight = np.float32([0, -np.inf, np.inf]), np.float32([1, 0, 1])
    hidden, kernel = np.zeros((3, 1), np.float32), np.zeros((1, 3), np.float32)
    f = partial(jxent.linear_sigmoid_cross_entropy, hidden, kernel, bias=bias, reduction="none")
    np.testing.assert_array_equal(f(np.arange(3)), [np.inf, np.inf, np.float32(np.log(2))])
    zero = jxent.SparseLabels(np.array([[1, 2], [2, 0], [0, 2]]), np.ones((3, 2), np.float32))
    np.testing.assert_allclose(f(zero, pos_weight=weight), np.log(2), rtol=1e-6)
    gradient = jax.grad(lambda b: jnp.sum(jxent.linear_sigmoid_cross_entropy(hidden, kernel, zero, bias=b)))(bias)
    np.testing.assert_allclose(gradient, [-1 / 6, -1 / 3, 0], rtol=1e-6)


@pytest.mark.parametrize("pos_weight", [1e-3, 1.0, 1e4])
def test_float16_gradients(pos_weight):
    """They neither overflow nor vanish with any weight, because a block scales them."""
    hidden, kernel = (jnp.asarray(a, jnp.float16) for a in (HIDDEN, KERNEL))
    gradient = jax.grad(partial(jxent.linear_sigmoid_cross_entropy, pos_weight=pos_weight), (0, 1))
    found, wide = (gradient(h, k, INDEX) for h, k in ((hidden, kernel), (hidden.astype(float), kernel.astype(float))))
    size = max(float(jnp.max(jnp.abs(a))) for a in wide)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a.astype(jnp.float32), found), wide, rtol=3e-3, atol=1e-3 * size)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_out_of_range():
    """NaN in the loss and the gradients of their positions, named by checkify, and nothing where they are masked."""
    hidden, kernel = np.float32(HIDDEN), np.float32(KERNEL)
    out = np.arange(N) == 3
    shares, few = np.float32(SHARES["dense"]), np.float32(SHARES["sparse"])
    for labels, said in (
        (np.where(out, C, 1), rf"label {C} is out of range for {C} classes"),
        (np.where(out[:, None], 1.5, shares), r"label 1.5 is outside of \[0, 1\], at \[3 0\]"),
        (np.where(out[:, None], -0.5, shares), r"label -0.5 is outside of \[0, 1\], at \[3 0\]"),
        (jxent.SparseLabels(np.where(out[:, None], -1, INDICES), few), r"label -1 is out of range"),
        (
            jxent.SparseLabels(INDICES, np.where(out[:, None], 1.5, few)),
            r"label 1.5 is outside of",
        ),
        (
            jxent.SparseLabels(np.where(out[:, None], 1, INDICES), np.where(out[:, None], 0.75, few)),
            rf"label {0.75 * few.shape[1]} is outside of",
        ),
    ):
        f = partial(jxent.linear_sigmoid_cross_entropy, labels=labels, reduction="none", label_smoothing=0.1)
        losses, pull = jax.vjp(f, hidden, kernel)
        np.testing.assert_array_equal(np.isnan(losses), out)
        np.testing.assert_array_equal(np.isnan(pull(jnp.ones_like(losses))[0]).any(1), out)
        masked = partial(jxent.linear_sigmoid_cross_entropy, labels=labels, where=~out)
        chex.assert_tree_all_finite(jax.value_and_grad(masked, (0, 1))(hidden, kernel))
        for call, names_it in ((f, True), (masked, False)):
            error = jax.jit(checkify.checkify(call, errors=checkify.user_checks))(hidden, kernel)[0].get()
            assert re.search("linear_sigmoid_cross_entropy: " + said, error) if names_it else error is None


def test_entries_of_share_0_count_for_nothing():
    few = np.float32(SHARES["sparse"])
    more = jxent.SparseLabels(np.pad(INDICES, ((0, 0), (0, 1)), constant_values=99), np.pad(few, ((0, 0), (0, 1))))
    f = jax.value_and_grad(jxent.linear_sigmoid_cross_entropy, (0, 1))
    chex.assert_trees_all_equal(
        f(*map(np.float32, (HIDDEN, KERNEL)), more),
        f(*map(np.float32, (HIDDEN, KERNEL)), jxent.SparseLabels(INDICES, few)),
    )


def test_masked_positions_may_hold_anything():
    hidden = np.where(WHERE[:, None], HIDDEN, np.nan).astype(np.float32)
    f = jax.value_and_grad(partial(jxent.linear_sigmoid_cross_entropy, where=WHERE, block_size=3), (0, 1))
    (value, (to_hidden, to_kernel)), kept = f(hidden, np.float32(KERNEL), INDEX), np.where(WHERE)[0]
    of_kept = jax.value_and_grad(jxent.linear_sigmoid_cross_entropy, (0, 1))
    alone = of_kept(hidden[kept], np.float32(KERNEL), INDEX[kept])
    chex.assert_trees_all_close((value, (to_hidden[kept], to_kernel)), alone, rtol=1e-5, atol=1e-6)
    assert not np.any(to_hidden[~WHERE])


# --- programs ---------------------------------------------------------------------------------------------------------


def siglip(image, text, scale, bias):
    n = len(image)
    options = {"vocab_axis": 0, "bias": jnp.full(n, bias)}
    return jxent.linear_sigmoid_cross_entropy(scale * image, text, jnp.arange(n), **options)


@pytest.mark.parametrize(("gradient", "most"), [(False, 50), (True, 140)])
def test_memory_of_siglip(gradient, most):
    """8192 pairs of 256 features, in MiB; the logits alone have 256. No array has positions times vocabulary."""
    n = 8192
    of_pairs, number = jax.ShapeDtypeStruct((n, 256), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    f = jax.value_and_grad(siglip, (0, 1, 2, 3)) if gradient else siglip
    program = optimized(f).lower(of_pairs, of_pairs, number, number).compile()
    assert program.memory_analysis().temp_size_in_bytes < most * 2**20
    assert f"{n},{n}]" not in program.as_text()


@pytest.mark.usefixtures("x64")
def test_siglip():
    """As big_vision has it, with the gradients of scale and bias."""

    def pairs(image, text, scale, bias):
        logits = scale * image @ text.T + bias
        return -jnp.sum(jax.nn.log_sigmoid(logits * (2 * jnp.eye(N) - 1))) / N

    at = HIDDEN, RNG.normal(size=(N, F)), 10.0, -10.0
    f, wanted = (jax.value_and_grad(function, (0, 1, 2, 3)) for function in (siglip, pairs))
    chex.assert_trees_all_close(f(*at), wanted(*at), rtol=1e-12, atol=1e-13)
