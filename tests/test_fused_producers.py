"""Logits that a compiler makes anew in each pass over them, with another rounding.

XLA:CPU makes a matmul of one feature a multiplication and fuses it into every pass. The logits of `cross_entropy` are
fused with what makes them, if both are under one `jax.jit`. There x - m may be one operation, which does not round x.
So at the largest logit nothing may hang on the last bit of x - m. The calls and their judgement are random_calls.py's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_calls as calls
import random_divergences as divergences
from grids import short

import jxent

STATS = ("loss", *calls.STATS)
EVERY = {"label_smoothing": 0.1, "z_loss_weight": 1e-3}
LINEAR = {"function": "linear_cross_entropy", "features": 1}
CONFIGS = {
    "linear": calls.Config(**LINEAR, **EVERY, reduction="none", differentiated=STATS, axis=0),
    "linear-probabilities": calls.Config(**LINEAR, probabilities=True, class_weight=True),
    "linear-sparse": calls.Config(**LINEAR, probabilities=True, entries=3, recompute=True, block_size=3),
    "product": calls.Config(producer="product", **EVERY, differentiated=STATS, reduction="none"),
    "product-probabilities": calls.Config(producer="product", probabilities=True, logit_softcap=30.0, axis=0),
    "product-sparse": calls.Config(producer="product", probabilities=True, entries=3, dtype="bfloat16"),
    "product-label": calls.Config(producer="product"),
    "sum": calls.Config(producer="sum", **EVERY, differentiated=STATS, classes=33),
    "log-probabilities": calls.Config(function="nll_loss", producer="product", probabilities=True),
    "kl": divergences.Config(producer="product", traced=True, temperature=1.25),
    # So few numbers that XLA:CPU makes one program of all passes.
    "few": calls.Config(producer="product", positions=(1,), classes=3, probabilities=True, differentiated=STATS),
    "few-log-probabilities": calls.Config(producer="product", positions=(1,), classes=8, **EVERY),
    "few-kl": divergences.Config(producer="product", positions=(1,), classes=3, reduction="none"),
    "few-js": divergences.Config("js_divergence", producer="product", positions=(1,), classes=3, beta=0.5),
    "few-tv": divergences.Config("tv_distance", producer="product", positions=(1,), classes=3),
    "linear-js": divergences.Config("linear_js_divergence", features=(1, 1), axis=(-1, 0), beta=0.1),
}


@pytest.mark.covering("linear-None")
@pytest.mark.parametrize("level", [None, 0, 3])
@pytest.mark.parametrize(
    "name",
    short(
        CONFIGS,
        *("linear", "linear-sparse", "product", "product-probabilities", "sum", "kl", "few", "few-js", "linear-js"),
    ),
)
def test_definitions(name, level):
    config = CONFIGS[name]._replace(level=level)
    module = divergences if isinstance(config, divergences.Config) else calls
    values = module.draw(config, np.random.default_rng(3), 500)
    worst = module.judge(config, values, module.run(config, values), module.expected(config, values))
    assert max(worst.values()) <= 1, worst


def test_one_feature():
    hidden = jnp.array([[0.9510346], [-0.5929705], [0.87477607]])
    kernel = jnp.array([[-1.6951083, 0.39033818, -1.2907437, -2.7149215, 2.438745]])
    labels = jnp.array([-100, 0, 4])
    losses = jxent.linear_cross_entropy(hidden, kernel, labels, z_loss_weight=0.1, reduction="none")
    x = np.asarray(hidden, np.float64) * np.asarray(kernel, np.float64)
    log_z = np.log(np.exp(x).sum(-1))
    want = np.where(labels == -100, 0, log_z - x[np.arange(3), [0, 0, 4]] + 0.1 * log_z**2)
    np.testing.assert_allclose(losses, want, rtol=1e-6)


# The logits are near 1e4, so that what is not rounded is 1e-3 of it.
@pytest.mark.parametrize(("positions", "classes"), [(300, 1000), (9, 3)])
def test_one_feature_with_large_logits(positions, classes):
    rng = np.random.default_rng(0)
    hidden = (3 + np.abs(rng.normal(size=(positions, 1)))).astype(np.float32)
    kernel = (3000 + rng.normal(size=(1, classes))).astype(np.float32)
    labels = rng.integers(0, classes, positions)
    x = (hidden * kernel).astype(np.float64)
    log_p = x - x.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    losses, stats = jxent.linear_cross_entropy(hidden, kernel, labels, reduction="none", return_stats=True)
    np.testing.assert_allclose(losses, -log_p[np.arange(positions), labels], rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, -(np.exp(log_p) * log_p).sum(-1), rtol=2e-6)


@pytest.mark.parametrize("classes", [2, 5, 13, 32])
@pytest.mark.parametrize("rows", [1, 40])
def test_few_logits_of_a_product(rows, classes):
    rng = np.random.default_rng(classes)
    right = rng.uniform(1, 2, (rows, classes)).astype(np.float32)
    left = ((1e4 + rng.normal(size=(rows, classes))) / right).astype(np.float32)
    x = (left * right).astype(np.float64)
    log_p = x - x.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    got = jax.jit(lambda left: jxent.log_softmax(left * right))(left)
    np.testing.assert_allclose(got, log_p, rtol=1e-6, atol=1e-7)


# The functions of softmax have the same passes. Along the label the gradient is p - 1, of which the largest logit's
# rounding leaves nothing if it is not taken off.
@pytest.mark.parametrize("margin", [0.3, 5.0, 20.0])
def test_softmax_functions(margin):
    left = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    left[:, 2] = np.abs(left).max(-1) + margin

    def both(functions, left):
        x = left * jnp.float32(1.7)
        return [function(x) for function in functions]

    functions = jxent.log_softmax, jxent.softmax, jxent.logsumexp
    x = (left * np.float32(1.7)).astype(np.float64)
    rest = np.exp(x - x[:, 2:3])
    rest[:, 2] = 0
    log_z = np.log1p(rest.sum(-1, keepdims=True))
    want = (x - x[:, 2:3]) - log_z, np.exp((x - x[:, 2:3]) - log_z), (x[:, 2:3] + log_z)[:, 0]
    for got, expected in zip(jax.jit(both, static_argnums=0)(functions, left), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=5e-6)
