"""Every floating argument has its true gradient: against autodiff of the plain formulas of reference.py, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jxent

N, D, C = 4, 2, 5
pytestmark = pytest.mark.usefixtures("x64")


def arguments(kind):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C, (N, D)) if kind == "index" else rng.dirichlet(np.ones(C), (N, D)) * 1.3
    if kind == "index":
        labels[0, 1] = -100
    where = rng.uniform(size=(N, D)) < 0.8
    arrays = [
        3 * rng.normal(size=(N, D, C)),
        labels,
        rng.uniform(0.2, 2, C),
        rng.uniform(0.2, 2, (N, D)),
        np.array(0.15),
        np.array(0.02),
    ]
    return [jnp.asarray(a) for a in arrays], jnp.asarray(where), jnp.asarray(rng.normal(size=(N, D)))


@pytest.mark.covering("index-none-None")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_cross_entropy(kind, reduction, softcap):
    args, where, cotangent = arguments(kind)
    wrt = [i for i in range(6) if not (i == 1 and kind == "index")]

    def gradients(function):
        def loss(logits, labels, *arrays):
            names = ("class_weight", "sample_weight", "label_smoothing", "z_loss_weight")
            options = dict(zip(names, arrays, strict=True)) | {"where": where, "reduction": reduction}
            return function(logits, labels, logit_softcap=softcap, **options)

        return jax.jit(jax.grad(lambda *args: jnp.sum(loss(*args) * (cotangent if reduction == "none" else 1)), wrt))(
            *args
        )

    for i, got, want in zip(wrt, *map(gradients, (jxent.cross_entropy, reference.cross_entropy)), strict=True):
        # A sum of some 40 terms of size 1, in float64.
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14, err_msg=f"argument {i}")


@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_nll_loss(kind):
    (logits, labels, class_weight, sample_weight, *_), where, _ = arguments(kind)
    log_p = jax.nn.log_softmax(logits)
    wrt = (0, 2, 3) if kind == "index" else (0, 1, 2, 3)

    def gradients(function):
        def loss(log_p, labels, class_weight, sample_weight):
            return function(log_p, labels, class_weight=class_weight, sample_weight=sample_weight, where=where)

        return jax.jit(jax.grad(loss, wrt))(log_p, labels, class_weight, sample_weight)

    for got, want in zip(*map(gradients, (jxent.nll_loss, reference.nll_loss)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "linear_cross_entropy"])
def test_a_class_without_probability(name):
    """It costs infinity where it is wanted, and nothing where it is not: 0 times infinity is 0."""
    logits, weight = jnp.array([0.0, 0.0, -np.inf]), jnp.array([2.0, 3.0, 5.0])
    labels = jnp.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])

    def losses(labels, weight):
        options = {"class_weight": weight, "reduction": "none"}
        if name == "linear_cross_entropy":
            return jxent.linear_cross_entropy(jnp.ones((2, 1)), jnp.zeros((1, 3)), labels, bias=logits, **options)
        rows = jnp.broadcast_to(logits, (2, 3))
        if name == "nll_loss":
            return jxent.nll_loss(jxent.log_softmax(rows), labels, **options)
        return jxent.cross_entropy(rows, labels, **options)

    value, pull = jax.vjp(losses, labels, weight)
    log_2 = np.log(2)
    np.testing.assert_allclose(value, [2.5 * log_2, np.inf])
    grad_labels, grad_weight = pull(jnp.ones(2))
    np.testing.assert_allclose(grad_labels, [[2 * log_2, 3 * log_2, 0], [2 * log_2, 3 * log_2, np.inf]])
    np.testing.assert_allclose(grad_weight, [0.75 * log_2, 0.75 * log_2, np.inf])


@pytest.mark.covering
@pytest.mark.parametrize("axis", [-1, 0, (0, 2), None])
@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax"])
def test_softmax_family(name, axis):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(4 * rng.normal(size=(3, 4, 5)))
    ours = getattr(jxent, name)
    theirs = jax.scipy.special.logsumexp if name == "logsumexp" else getattr(jax.nn, name)
    if axis is None and name != "logsumexp":
        theirs_, theirs = theirs, lambda x, axis: theirs_(x, tuple(range(x.ndim)))
    value, pull = jax.vjp(lambda x: ours(x, axis), logits)
    want, pull_want = jax.vjp(lambda x: theirs(x, axis), logits)
    np.testing.assert_allclose(value, want, rtol=1e-13, atol=1e-15)
    cotangent = jnp.asarray(rng.normal(size=value.shape))
    np.testing.assert_allclose(pull(cotangent)[0], pull_want(cotangent)[0], rtol=1e-11, atol=1e-14)


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_broadcast_sample_weight(kind, reduction):
    """The gradient of a broadcast weight has the weight's shape."""
    (logits, labels, *_), _, _ = arguments(kind)
    for shape in itertools.product((1, N), (1, D)):
        weight = jnp.full(shape, 0.7)
        gradient = jax.grad(lambda w: jxent.cross_entropy(logits, labels, sample_weight=w, reduction=reduction))
        full = gradient(jnp.broadcast_to(weight, (N, D)))
        axes = tuple(a for a in range(2) if shape[a] == 1)
        np.testing.assert_allclose(gradient(weight), full.sum(axes, keepdims=True), rtol=1e-12, atol=1e-14)
