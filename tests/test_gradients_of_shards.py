"""Gradients taken on each device of the global loss are what docs/guides/sharding.md says, wherever they are taken.

Where JAX does not check replication it differentiates the sum of what all devices return. So gradients are averaged
there; who sums them trains with as many times the rate as there are devices.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jxent

DEVICES = 8
RNG = np.random.default_rng(13)
HIDDEN, KERNEL = (RNG.normal(size=shape).astype(np.float32) for shape in ((DEVICES, 4, 3), (3, 5)))
LABELS = RNG.integers(0, 5, (DEVICES, 4)).astype(np.int32)
LABELS[:3, 1:] = -100  # the devices do not count alike


def of_logits(kernel, hidden, labels, **options):
    return jxent.cross_entropy(hidden @ kernel, labels, **options)


def of_divergence(kernel, hidden, labels, **options):
    return jxent.linear_kl_divergence(hidden, 2 * kernel, hidden, kernel, where=labels != -100, **options)


def of_hidden(kernel, hidden, labels, **options):
    return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=3, **options)


LOSSES = {"cross_entropy": of_logits, "linear_cross_entropy": of_hidden, "linear_kl_divergence": of_divergence}


def in_shard_map(function, check):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    def of_part(kernel, hidden, labels):
        loss, (of_kernel, of_hidden) = function(kernel, hidden[0], labels[0])
        return jax.tree.map(lambda a: a[None], (loss, (jax.lax.pcast(of_kernel, "data", to="varying"), of_hidden)))

    def unchecked(kernel, hidden, labels):
        return jax.tree.map(lambda a: a[None], function(kernel, hidden[0], labels[0]))

    return jax.shard_map(
        of_part if check else unchecked,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P("data") if not check else P(None), (P("data"), P("data"))),
        check_vma=check,
    )


MAPPED = {
    "pmap": partial(jax.pmap, axis_name="data", in_axes=(None, 0, 0)),
    "vmap": partial(jax.vmap, axis_name="data", in_axes=(None, 0, 0)),
    "unchecked shard_map": partial(in_shard_map, check=False),
    "shard_map": partial(in_shard_map, check=True),
}


@pytest.mark.parametrize("how", MAPPED)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_on_each_device(loss, how):
    wanted, (of_kernel, of_hidden) = jax.value_and_grad(LOSSES[loss], (0, 1))(KERNEL, HIDDEN, LABELS)
    on_each = jax.value_and_grad(partial(LOSSES[loss], batch_axis_name="data"), (0, 1))
    losses, (kernels, hiddens) = jax.device_get(jax.jit(MAPPED[how](on_each))(KERNEL, HIDDEN, LABELS))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    close(losses, np.full(losses.shape, wanted))
    close(np.mean(kernels, 0), of_kernel)  # with the check, all are the same
    times = 1 if how == "shard_map" else DEVICES
    close(hiddens, times * of_hidden)
    if how == "shard_map":
        close(kernels[0], of_kernel)
    else:
        assert not np.allclose(kernels[0], of_kernel, rtol=1e-2)  # of one device alone it is nothing


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_from_outside(loss):
    """Of the mapped function there is one gradient, the right one."""
    wanted = jax.grad(LOSSES[loss])(KERNEL, HIDDEN, LABELS)
    of_part = partial(LOSSES[loss], batch_axis_name="data")
    mapped = jax.vmap(of_part, axis_name="data", in_axes=(None, 0, 0))
    grad = jax.grad(lambda kernel: mapped(kernel, HIDDEN, LABELS)[0])(jnp.asarray(KERNEL))
    np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-6)
