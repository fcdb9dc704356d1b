"""Sharded arrays that do not fit each other or their mesh: the loss is still that of one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_calls import (
    ARRAYS,
    BATCH,
    CALLS,
    COTANGENTS,
    FEATURES,
    HIDDEN,
    KERNEL,
    LABELS,
    LINEAR,
    LOGITS,
    SPECS,
    assert_equal,
    linear_loss,
    mesh_of,
    on_one_device,
    put,
    value_and_grad,
)

import jxent

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.covering("linear-all-mode2", "cross_entropy-all-Explicit")
@pytest.mark.parametrize("mode", ["Auto", "Explicit", ("Auto", "Explicit"), ("Explicit", "Auto")])
@pytest.mark.parametrize("name", ["linear-all", "cross_entropy-all"])
def test_arrays_that_are_sharded_unlike_each_other(name, mode):
    """One mesh may have axes of both types."""
    f, wrt = value_and_grad(name)
    mesh = mesh_of(mode, data=4, model=2)
    for specs in (
        {"hidden": P("data"), "kernel": P(None, "model"), "logits": P("data")},
        {
            "labels": P("data"),
            "kernel": P("model", "data"),
            "sample_weight": P(None, "data"),
            "logits": P(None, "model"),
        },
        {"hidden": P("model"), "labels": P("data"), "class_weight": P("model"), "logits": P(None, None, "data")},
    ):
        arrays = [put(mesh, ARRAYS[a], specs.get(a, P())) for a in CALLS[name][1]]
        actual = jax.jit(jax.value_and_grad(f, wrt))(put(mesh, COTANGENTS, P()), *arrays)
        assert_equal(actual, on_one_device(name))


@pytest.mark.covering("13-64-7-Explicit", "16-61-32-Auto")
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize(("length", "vocab", "block_size"), [(13, 64, 7), (13, 64, None), (16, 61, 32), (16, 64, 3)])
def test_what_does_not_divide(length, vocab, block_size, mode):
    """Lengths, vocabularies and blocks need not divide. JAX cannot place an array in uneven shards."""
    arrays = [HIDDEN[:, :length], KERNEL[:, :vocab], np.minimum(LABELS[:, :length], vocab - 1)]
    mesh = mesh_of(mode, data=4, vocab=2)
    specs = P("data"), P(None, "vocab" if vocab % 2 == 0 else None), P("data")

    @partial(jax.value_and_grad, argnums=(0, 1))
    def f(hidden, kernel, labels):
        if mode == "Auto":  # within a program such a sharding may be uneven
            hidden = lax.with_sharding_constraint(hidden, NamedSharding(mesh, P("data", "vocab")))
            kernel = lax.with_sharding_constraint(kernel, NamedSharding(mesh, P("data", "vocab")))
        return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=block_size)

    sharded = [put(mesh, a, spec) for a, spec in zip(arrays, specs, strict=True)]
    plain = jax.value_and_grad(lambda h, k, labels: jxent.cross_entropy(h @ k, labels), (0, 1))
    assert_equal(jax.jit(f)(*sharded), plain(*map(jnp.asarray, arrays)))


def test_no_positions():
    """Without positions the sum is 0, and so are its gradients."""
    arrays = HIDDEN[:, :0], KERNEL, LABELS[:, :0]
    specs = P("data"), SPECS["kernel"], P("data")
    f = partial(jxent.linear_cross_entropy, reduction="sum")
    mapped = jax.shard_map(
        partial(f, axis_name="vocab", batch_axis_name="data"),
        mesh=mesh_of("Auto", data=4, vocab=2),
        in_specs=specs,
        out_specs=P(),
    )
    for mode, function in (("Auto", mapped), ("Auto", f), ("Explicit", f)):
        mesh = mesh_of(mode, data=4, vocab=2)
        placed = [put(mesh, a, s) for a, s in zip(arrays, specs, strict=True)]
        value, grads = jax.jit(jax.value_and_grad(function, (0, 1)))(*placed)
        assert_equal((value, *grads), (0.0, np.zeros((BATCH, 0, FEATURES)), np.zeros_like(KERNEL)))


def test_weights_without_a_mesh():
    """The class weights are on one device, and the logits on a mesh with explicit axes."""
    mesh = mesh_of("Explicit", data=8)
    logits, labels = (put(mesh, ARRAYS[a], P("data")) for a in ("logits", "labels"))
    actual = jax.jit(jxent.cross_entropy)(logits, labels, class_weight=jnp.asarray(ARRAYS["class_weight"]))
    wanted = jxent.cross_entropy(*(jnp.asarray(ARRAYS[a]) for a in LOGITS[:2]), class_weight=ARRAYS["class_weight"])
    assert_equal(actual, wanted)


@pytest.mark.parametrize("single", ["hidden", "kernel", "labels"])
def test_an_array_without_a_mesh(single):
    """This array is on one device, and the others are on a mesh with explicit axes."""
    mesh = mesh_of("Explicit", data=4, vocab=2)
    specs = {"hidden": P("data"), "kernel": P(None, "vocab"), "labels": P("data")}
    arrays = [jnp.asarray(ARRAYS[a]) if a == single else put(mesh, ARRAYS[a], specs[a]) for a in LINEAR[:3]]
    actual = jax.jit(jax.value_and_grad(linear_loss, (0, 1)))(*arrays)
    assert_equal(actual, on_one_device("linear"))
