"""Labels of a language model: those of the whole sequence, on every kind of mesh, however it is sharded.

Between devices only tokens move that are labels of another device's positions.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jxent

TOKENS = np.random.default_rng(3).integers(0, 50, (4, 16)).astype(np.int32)
WANTED = np.pad(TOKENS[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
# Documents in rows; tokens of none, at the end of a row and within; tokens that may not be labels.
SEGMENTS = np.array(
    [[1] * 5 + [2] * 8 + [0] * 3, [3] * 16, [1, 2] * 8, [7] * 4 + [0] * 2 + [7] * 6 + [9] * 4], np.int32
)
ALLOWED = np.random.default_rng(5).random(TOKENS.shape) < 0.7
LAYOUTS = [
    (P(None, "sequence"), "sequence"),
    (P("data", "sequence"), "sequence"),
    (P(None, ("data", "sequence")), ("data", "sequence")),
    (P(None, ("sequence", "data")), ("sequence", "data")),
    (P("data"), None),  # the batch alone: nothing to be told
]


def mesh_of(mode):
    return jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(mode,) * 2)


def defined(tokens, offset, where=None, segment_ids=None, ignore_index=-100):
    """The labels, one by one."""
    labels = np.full_like(tokens, ignore_index)
    for *row, i in np.ndindex(*tokens.shape):
        here, there = (*row, i), (*row, i + offset)
        if i + offset >= tokens.shape[-1] or (where is not None and not where[there]):
            continue
        if segment_ids is None or segment_ids[here] == segment_ids[there] != 0:
            labels[here] = tokens[there]
    return labels


def options(where, segment_ids):
    return {"where": ALLOWED if where else None, "segment_ids": SEGMENTS if segment_ids else None}


@pytest.mark.parametrize("offset", [1, 2, 5, 15, 16, 2**40])
@pytest.mark.parametrize(("where", "segment_ids"), [*itertools.product((False, True), repeat=2)])
def test_definition(where, segment_ids, offset):
    given = options(where, segment_ids)
    wanted = defined(TOKENS, offset, **given)
    np.testing.assert_array_equal(jxent.next_token_labels(TOKENS, offset=offset, **given), wanted)
    cube = {name: None if array is None else array.reshape(2, 2, 16) for name, array in given.items()}
    labels = jxent.next_token_labels(TOKENS.reshape(2, 2, 16).astype(np.int16), ignore_index=-1, offset=offset, **cube)
    assert labels.dtype == jnp.int16
    np.testing.assert_array_equal(labels, np.where(wanted == -100, -1, wanted).reshape(2, 2, 16))


def test_options_broadcast():
    """Over the batch; `where` also along the sequence."""
    found = jxent.next_token_labels(TOKENS, where=ALLOWED[0], segment_ids=SEGMENTS[0].astype(np.uint8))
    wanted = defined(TOKENS, 1, *(np.broadcast_to(array[0], TOKENS.shape) for array in (ALLOWED, SEGMENTS)))
    np.testing.assert_array_equal(found, wanted)
    rows = ALLOWED[:, :1]
    found, wanted = jxent.next_token_labels(TOKENS, where=rows), defined(TOKENS, 1, np.broadcast_to(rows, TOKENS.shape))
    np.testing.assert_array_equal(found, wanted)
    assert jxent.next_token_labels(TOKENS[:, :0], offset=2, segment_ids=SEGMENTS[:, :0]).shape == (4, 0)


OFFSETS = (1, 2, 4, 7, 9, 15, 16)  # a shard of the sequence has 2, 4 or 8 tokens


def at_offsets(tokens, where, segment_ids, axis_name=None):
    call = partial(jxent.next_token_labels, where=where, segment_ids=segment_ids, axis_name=axis_name)
    return [call(tokens, offset=offset) for offset in OFFSETS]


WANTED_AT_OFFSETS = [defined(TOKENS, offset, ALLOWED, SEGMENTS) for offset in OFFSETS]


@pytest.mark.covering
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("spec", "axis_name"), LAYOUTS)
def test_offsets_inside_shard_map(spec, axis_name, check_vma):
    """An offset may be longer than a shard."""
    f = partial(at_offsets, axis_name=axis_name)
    f = jax.shard_map(f, mesh=mesh_of(AxisType.Auto), in_specs=spec, out_specs=spec, check_vma=check_vma)
    for found, wanted in zip(jax.jit(f)(TOKENS, ALLOWED, SEGMENTS), WANTED_AT_OFFSETS, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.covering
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("spec", "axis_name"), LAYOUTS)
def test_offsets_on_a_mesh(spec, axis_name, mode, named):
    """A device sends labels of other devices' positions, and their segments, to the devices that need them."""
    mesh = mesh_of(mode)
    arrays = [jax.device_put(array, NamedSharding(mesh, spec)) for array in (TOKENS, ALLOWED, SEGMENTS)]
    with jax.set_mesh(mesh):
        program = jax.jit(partial(at_offsets, axis_name=axis_name if named else None)).lower(*arrays).compile()
    for found, wanted in zip(program(*arrays), WANTED_AT_OFFSETS, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert found.sharding.is_equivalent_to(arrays[0].sharding, 2)
    moved = collectives(program.as_text())
    assert {part.kind for part in moved} <= {"collective-permute"}
    local = arrays[0].addressable_shards[0].data
    assert sum(part.size for part in moved) <= 2 * sum(len(local) * min(k, local.shape[-1]) for k in OFFSETS)
    assert bool(moved) == (axis_name is not None)


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
    in_parts = [array.reshape(4, 4, 4) for array in (TOKENS, ALLOWED, SEGMENTS)]
    mapped = jax.vmap(partial(at_offsets, axis_name="s"), in_axes=1, out_axes=1, axis_name="s")(*in_parts)
    for found, wanted in zip(mapped, WANTED_AT_OFFSETS, strict=True):
        np.testing.assert_array_equal(found.reshape(4, 16), wanted)
    rows = jax.vmap(jax.vmap(partial(jxent.next_token_labels, ignore_index=0, axis_name="s"), axis_name="s"))(parts)
    np.testing.assert_array_equal(rows.reshape(4, 16), np.maximum(WANTED, 0))


def test_a_loss_of_a_sharded_sequence():
    """As `docs/guides/sharding.md` writes it: no label is lost, with the mean over all positions."""
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
