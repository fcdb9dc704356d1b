"""The statistics that a loss with `return_stats` has taken in the same pass."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
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
    np.testing.assert_array_equal(stats.prediction, np.where(keep, logits.argmax(-1), -(2**31)))
    chex.assert_type(stats.prediction, jnp.int32)
    hits = logits.argmax(-1) == best
    assert 0 < np.sum(hits & keep) < hits.size
    np.testing.assert_array_equal(stats.correct, hits & keep)
    chex.assert_type(stats.correct, jnp.bool_)
    _, weight = oracle.position_losses(logits, labels, **weights)
    np.testing.assert_allclose(stats.weight, weight.sum(), rtol=1e-6)
    mean = jxent.cross_entropy(logits, labels, **weights, label_smoothing=0.1, logit_softcap=4.0)
    np.testing.assert_allclose(loss / stats.weight, mean, rtol=1e-6)


@pytest.mark.parametrize("ignore_index", [-1, 0, -100])
def test_an_ignored_position_is_never_a_hit(ignore_index):
    labels = jnp.array([ignore_index, 2, ignore_index])
    logits = jnp.array([[9.0, 0, 0], [0, 0, 9], [0, 9, 0]])
    _, stats = jxent.cross_entropy(logits, labels, ignore_index=ignore_index, return_stats=True)
    assert jnp.sum(stats.correct) / stats.weight == 1


def test_stats_of_a_confident_wrong_row():
    """Entropy and log-normalizer do not depend on which class the label is."""
    logits = jnp.array([[0.0, -20.0, -30.0]])
    stats = [jxent.cross_entropy(logits, jnp.array([t]), return_stats=True)[1] for t in range(3)]
    log_p = oracle.log_softmax(logits)[0]
    for t in range(3):
        np.testing.assert_allclose(stats[t].entropy[0], -(np.exp(log_p) * log_p).sum(), rtol=2e-6)
        np.testing.assert_allclose(stats[t].log_normalizer[0], np.logaddexp.reduce(logits[0].astype(float)), rtol=1e-6)
        np.testing.assert_allclose(stats[t].log_prob[0], log_p[t], rtol=2e-6)


def test_stats_carry_no_gradient():
    """Neither alone nor together with the loss, whose gradient stays what it was."""
    logits, labels, weights = data("index")

    def gradient(with_loss, with_stats):
        def total(logits):
            loss, stats = jxent.cross_entropy(logits, labels, **weights, return_stats=True)
            return with_loss * loss + with_stats * sum(jnp.sum(s) for s in stats)

        return np.asarray(jax.grad(total)(logits))

    assert not gradient(0, 1).any()
    alone = gradient(1, 0)
    np.testing.assert_allclose(gradient(1, 1), alone, rtol=0, atol=ULPS * np.abs(alone).max())


def test_stats_as_auxiliary_output():
    """Of `value_and_grad`, compiled: loss, statistics and gradient are those of the plain calls."""
    logits, labels, weights = data("index")
    loss = partial(jxent.cross_entropy, labels=labels, **weights)
    (value, stats), gradient = jax.jit(jax.value_and_grad(partial(loss, return_stats=True), has_aux=True))(logits)
    chex.assert_trees_all_close((value, stats), loss(logits, return_stats=True), rtol=ULPS)
    np.testing.assert_array_equal(stats.prediction, loss(logits, return_stats=True)[1].prediction)
    expected = np.asarray(jax.grad(loss)(logits))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=ULPS * np.abs(expected).max())


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
