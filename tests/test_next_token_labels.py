"""Labels of a language model: those of the whole sequence, on every kind of mesh, however it is sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jxent

TOKENS = np.random.default_rng(3).integers(0, 50, (4, 16)).astype(np.int32)
WANTED = np.pad(TOKENS[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
LAYOUTS = [
    (P(None, "sequence"), "sequence"),
    (P("data", "sequence"), "sequence"),
    (P(None, ("data", "sequence")), ("data", "sequence")),
    (P(None, ("sequence", "data")), ("sequence", "data")),
    (P("data"), None),  # the batch alone: nothing to be told
]


def mesh_of(mode):
    return jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(mode,) * 2)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("spec", "axis_name"), LAYOUTS)
def test_inside_shard_map(spec, axis_name, check_vma):
    labels = partial(jxent.next_token_labels, axis_name=axis_name)
    f = jax.shard_map(labels, mesh=mesh_of(AxisType.Auto), in_specs=spec, out_specs=spec, check_vma=check_vma)
    np.testing.assert_array_equal(jax.jit(f)(TOKENS), WANTED)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("spec", "axis_name"), LAYOUTS)
def test_on_a_mesh(spec, axis_name, mode):
    """Whole arrays, with and without a name."""
    mesh = mesh_of(mode)
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        for name in (axis_name, None):
            labels = jax.jit(partial(jxent.next_token_labels, axis_name=name))(tokens)
            np.testing.assert_array_equal(labels, WANTED)
            assert labels.sharding.is_equivalent_to(tokens.sharding, 2)


def test_inside_vmap():
    parts = TOKENS.reshape(4, 4, 4)  # row, shard, token
    labels = jax.vmap(partial(jxent.next_token_labels, axis_name="s"), in_axes=1, out_axes=1, axis_name="s")(parts)
    np.testing.assert_array_equal(labels.reshape(4, 16), WANTED)
    both = jax.vmap(partial(jxent.next_token_labels, axis_name=("a", "b")), axis_name="b")
    halves = jax.vmap(both, axis_name="a")(TOKENS[0].reshape(2, 4, 2))
    np.testing.assert_array_equal(halves.reshape(16), WANTED[0])
    rows = jax.vmap(jax.vmap(partial(jxent.next_token_labels, ignore_index=0, axis_name="s"), axis_name="s"))(parts)
    np.testing.assert_array_equal(rows.reshape(4, 16), np.maximum(WANTED, 0))


def test_a_loss_of_a_sharded_sequence():
    """As `docs/sharding.md` writes it: no label is lost, with the mean over all positions."""
    logits = np.random.default_rng(4).normal(size=(4, 16, 50)).astype(np.float32)

    def loss(logits, tokens):
        labels = jxent.next_token_labels(tokens, axis_name="sequence")
        return jxent.cross_entropy(logits, labels, batch_axis_name=("data", "sequence"))

    specs = P("data", "sequence"), P("data", "sequence")
    out = jax.shard_map(loss, mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=P())(logits, TOKENS)
    np.testing.assert_allclose(out, jxent.cross_entropy(logits, WANTED), rtol=1e-6)


def test_what_is_wrong_with_an_axis():
    mesh = mesh_of(AxisType.Auto)
    labels = partial(jxent.next_token_labels, axis_name="sequence")
    with pytest.raises(ValueError, match=r"^next_token_labels: tokens must be sharded over axis_name='sequence'"):
        jax.shard_map(labels, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(TOKENS)
    with pytest.raises(ValueError, match=r"^next_token_labels: axis_name='sequence' names no axis in scope"):
        labels(TOKENS)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"over 4 devices, .* pad the positions"):
        labels(jnp.asarray(TOKENS[:, :15]))


def test_a_token_that_does_not_fit():
    """It became 0."""
    for tokens in (np.array([1, 2**40]), [1, 2**40], np.array([1, 2**32], np.uint64), np.array([-(2**31) - 1])):
        with pytest.raises(ValueError, match=r"^next_token_labels: tokens has an integer that does not fit into 32"):
            jxent.next_token_labels(tokens)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jxent.next_token_labels(np.array([1, 2**40])), [2**40, -100])
    np.testing.assert_array_equal(jxent.next_token_labels(np.array([1, 2**31 - 1])), [2**31 - 1, -100])
