"""Parameters whose type says that their gradient is not to be summed over the batch (`PartitionSpec(reduced=...)`).

So JAX spells the accumulation of gradients over micro-batches with one sum over the devices, at the end.
"""

from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jxent

MICRO_BATCHES, POSITIONS, FEATURES, VOCAB = 2, 16, 6, 24
linear = jxent.linear_cross_entropy


def with_entropy(h, w, b, c, t, y, q):
    loss, stats = linear(h, w, y, bias=b, class_weight=c, temperature=t, return_stats=True)
    return loss + stats.entropy.mean()


# Each of (hidden, kernel, bias, class weights, temperature, index labels, probabilities).
LOSSES = {
    "linear": lambda h, w, b, c, t, y, q: linear(h, w, y, bias=b, class_weight=c, label_smoothing=0.1),
    "linear, blocks": lambda h, w, b, c, t, y, q: linear(h, w, q, bias=b, class_weight=c, block_size=4),
    "linear, none": lambda h, w, b, c, t, y, q: linear(h, w, y, bias=b, class_weight=c, reduction="none").sum(),
    "linear, recompute": lambda h, w, b, c, t, y, q: linear(h, w, y, bias=b, reduction="sum", recompute=True),
    "linear, statistics": with_entropy,
    "linear KL": lambda h, w, b, c, t, y, q: jxent.linear_kl_divergence(h, w, h, w + 1, bias_p=b, temperature=t),
    "cross_entropy": lambda h, w, b, c, t, y, q: jxent.cross_entropy(h @ w, y, class_weight=c, temperature=t),
    "cross_entropy of probabilities": lambda h, w, b, c, t, y, q: jxent.cross_entropy(h @ w, q, class_weight=c),
    "nll_loss": lambda h, w, b, c, t, y, q: jxent.nll_loss(jxent.log_softmax(h @ w), y, class_weight=c),
    "kl_divergence": lambda h, w, b, c, t, y, q: jxent.kl_divergence(q, h @ w, temperature=t),
}
# The class weights of full logits within a cost: their sum over the positions is one of plain JAX.
SUMMED = {"cross_entropy of probabilities": VOCAB}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(29)
    batch = (MICRO_BATCHES, POSITIONS)
    parameters = rng.normal(size=(FEATURES, VOCAB)), rng.normal(size=VOCAB), rng.uniform(0.5, 2, VOCAB), np.float64(1.3)
    data = rng.normal(size=(*batch, FEATURES)), rng.integers(0, VOCAB, batch), rng.dirichlet(np.ones(VOCAB), batch)
    return parameters, data


def gradient(loss, parameters, hidden, labels, probabilities):
    return jax.grad(lambda p: loss(hidden, *p, labels, probabilities))(parameters)


def accumulated(loss, parameters, data):
    """The sum over micro-batches, summed over the devices once."""
    parts = [gradient(loss, parameters, *(a[i] for a in data)) for i in range(MICRO_BATCHES)]
    total = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *parts)
    return jax.tree.map(
        lambda g, p: jax.sharding.reshard(g, P(*jax.typeof(p).sharding.spec.partitions)), total, parameters
    )


def on_mesh(parameters, data, vocab):
    """The parameters as they are on a mesh, their classes over the axis `vocab`; and the data, sharded over `data`."""
    specs = P(None, vocab, reduced={"data"}), *[P(vocab, reduced={"data"})] * 2, P(reduced={"data"})
    parameters = tuple(map(jax.sharding.reshard, map(jnp.asarray, parameters), specs))
    return parameters, tuple(
        jax.sharding.reshard(jnp.asarray(a), P(None, "data", *[None] * (a.ndim - 2))) for a in data
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.covering
@pytest.mark.parametrize("vocab", [None, "model"])
@pytest.mark.parametrize("name", LOSSES)
def test_one_sum_after_all_micro_batches(arrays, name, vocab):
    loss = LOSSES[name]
    parameters, data = arrays
    of_batch = jax.jit(partial(gradient, loss))
    want = sum(np.concatenate([g.ravel() for g in of_batch(parameters, *(a[i] for a in data))]) for i in range(2))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        parameters, data = on_mesh(parameters, data, vocab)
        of_one = jax.jit(partial(gradient, loss)).lower(parameters, *(a[0] for a in data))
        assert all(aval.sharding.spec.unreduced == {"data"} for aval in jax.tree.leaves(of_one.out_info))
        of_all = jax.jit(partial(accumulated, loss)).lower(parameters, data).compile()
        got = of_all(parameters, data)
    np.testing.assert_allclose(np.concatenate([np.ravel(g) for g in got]), want, rtol=1e-12, atol=1e-14)

    if vocab is None:  # or there are sums over the classes too
        sums = [c.size for c in hlo.collectives(of_one.compile().as_text())]
        assert all(size == 1 for size in sums if size != SUMMED.get(name)), sums
        assert [c.size for c in hlo.collectives(of_all.as_text())].count(FEATURES * VOCAB) == 1


def reduced(*parameters):
    return [jax.sharding.reshard(jnp.asarray(a), P(*[None] * np.ndim(a), reduced={"data"})) for a in parameters]


def sharded(*data):
    return [jax.sharding.reshard(jnp.asarray(a), P("data", *[None] * (a.ndim - 1))) for a in data]


def summed(gradients):
    return [jax.sharding.reshard(g, P()) for g in gradients]


@pytest.mark.usefixtures("x64")
def test_inside_shard_map(arrays):
    """There the parameters are cast to vary over the batch, and their gradients are what each device has."""
    (kernel, bias, class_weight, _), data = arrays
    parameters, data = (kernel, bias, class_weight), [a[0] for a in data]

    def gradients(kernel, bias, class_weight, hidden, labels, probabilities):
        def loss(kernel, bias, class_weight):
            of_labels = linear(hidden, kernel, labels, bias=bias, class_weight=class_weight, label_smoothing=0.1)
            return of_labels + jxent.cross_entropy(hidden @ kernel + bias, probabilities, class_weight=class_weight)

        return jax.grad(loss, (0, 1, 2))(kernel, bias, class_weight)

    of_devices = [gradients(*parameters, *(a[i : i + 4] for a in data)) for i in range(0, POSITIONS, 4)]
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))):
        in_specs = *[P(reduced={"data"})] * 3, *[P("data")] * 3
        mapped = jax.shard_map(gradients, in_specs=in_specs, out_specs=P(unreduced={"data"}))
        got = jax.jit(lambda *arrays: summed(mapped(*arrays)))(*reduced(*parameters), *sharded(*data))
    for gradient, of_device in zip(got, zip(*of_devices, strict=True), strict=True):
        np.testing.assert_allclose(gradient, sum(of_device), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_hessian_vector_products(arrays):
    (kernel, bias, *_), (hidden, labels, _) = arrays
    hidden, labels = hidden[0], labels[0]

    def product(hidden, labels, *at):
        def loss(kernel, bias):
            return linear(hidden, kernel, labels, bias=bias)

        return jax.jvp(jax.grad(loss, (0, 1)), at, jax.tree.map(lambda a: a + 0, at))[1]

    want = product(hidden, labels, kernel, bias)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)):
        got = jax.jit(lambda *a: summed(product(*a)))(*sharded(hidden, labels), *reduced(kernel, bias))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, list(want))
