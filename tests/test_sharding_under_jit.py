"""Plain `jax.jit` on sharded arrays: the loss of one device, and the same collectives as a careful user would write.

The mesh axes are of type `Auto`, of type `Explicit`, or "Named": `Auto` axes that the call names.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from grids import short
from hlo import collectives
from jax.sharding import PartitionSpec as P
from sharded_calls import (
    ARRAYS,
    BLOCK,
    CALLS,
    FEATURES,
    HIDDEN,
    KERNEL,
    LABELS,
    POSITIONS,
    assert_equal,
    mesh_of,
    on_one_device,
    put,
    value_and_grad,
)
from sharded_layouts import LAYOUTS, NAMED_LAYOUTS, assert_nothing_else_moves, numbers_alone_in_the_loop, run

import jxent

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.covering(
    "nll_loss-batch, sequence, vocabulary-Explicit",
    "nll_loss-probabilities-batch, sequence, vocabulary-Explicit",
    "cross_entropy-all-batch, sequence, vocabulary-Explicit",
    "cross_entropy-probabilities-batch, sequence, vocabulary-Named",
)
@pytest.mark.parametrize("mode", ["Auto", "Explicit", "Named"])
@pytest.mark.parametrize("layout", ["batch and sequence", "vocabulary", "batch, sequence, vocabulary"])
@pytest.mark.parametrize("name", [name for name in CALLS if "linear" not in name])
def test_logits_under_jit(name, layout, mode):
    (value, grads), program, arrays = run(name, layout, mode)
    assert_equal((value, grads), on_one_device(name))
    for i, grad in zip(value_and_grad(name)[1], grads, strict=True):
        if CALLS[name][1][i - 1] in ("logits", "logits_p", "probabilities"):
            assert grad.sharding.is_equivalent_to(arrays[i].sharding, 3)
    # A sum has one number for each position, or for each entry of sparse labels. A prediction takes a value and an
    # index of each shard.
    entries = ARRAYS["shares"].shape[-1] if "sparse" in name else 1
    assert all(c.size <= POSITIONS * 8 for c in collectives(program.as_text()) if c.kind != "all-reduce")
    assert all(c.size <= POSITIONS * entries for c in collectives(program.as_text()) if c.kind == "all-reduce")


@pytest.mark.covering(
    "linear-all-FSDP and vocabulary-Auto",
    "linear-all-sequence and vocabulary on one axis-Explicit",
    "linear-none-vocabulary, then FSDP of it-Auto",
    "linear-all-batch, sequence, vocabulary-Auto",
    "linear-all-batch, sequence, vocabulary-Explicit",
)
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["linear-all", "linear-none"])
def test_linear_under_jit(name, layout, mode):
    (value, grads), program, arrays = run(name, layout, mode)
    assert_equal((value, grads), on_one_device(name))
    for i, grad in zip(value_and_grad(name)[1], grads, strict=True):
        if CALLS[name][1][i - 1] in ("hidden", "kernel"):
            assert grad.sharding.is_equivalent_to(arrays[i].sharding, grad.ndim)
    assert_nothing_else_moves(program.as_text(), layout)


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    "name",
    [
        *("linear", "linear-probabilities", "linear-sparse", "linear-none-sparse", "linear-recompute"),
        *("linear-sigmoid", "linear-sigmoid-sparse"),
    ],
)
def test_other_linear_losses_under_jit(name, mode):
    found, program, _ = run(name, "FSDP and vocabulary", mode)
    assert_equal(found, on_one_device(name))
    if "sigmoid" in name:
        assert_nothing_else_moves(program.as_text(), "FSDP and vocabulary")


LINEAR_DIVERGENCES = ("linear-kl", "linear-js-none", "linear-tv")


@pytest.mark.parametrize(
    ("name", "layout", "mode"),
    short(
        [
            *itertools.product(LINEAR_DIVERGENCES, LAYOUTS, ("Auto", "Explicit")),
            *itertools.product(LINEAR_DIVERGENCES, NAMED_LAYOUTS, ("Named",)),
        ],
        ("linear-kl", "FSDP and vocabulary", "Auto"),
        ("linear-kl", "vocabulary, then FSDP of it", "Explicit"),
        ("linear-js-none", "batch, sequence, vocabulary", "Named"),
    ),
)
def test_linear_divergences_under_jit(name, layout, mode):
    """The loop sums numbers, as that of a loss with one kernel does."""
    (value, grads), program, arrays = run(name, layout, mode)
    assert_equal((value, grads), on_one_device(name))
    for i, grad in zip(value_and_grad(name)[1], grads, strict=True):
        if mode != "Named" and CALLS[name][1][i - 1].startswith(("hidden", "kernel")):
            assert grad.sharding.is_equivalent_to(arrays[i].sharding, grad.ndim)
    numbers_alone_in_the_loop(program.as_text(), layout)


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_one_axis_of_positions_under_jit(mode):
    """If one axis has all positions, its shards stay where they are."""
    mesh, layout = mesh_of(mode, data=4, vocab=2), "FSDP and vocabulary"
    arrays = HIDDEN.reshape(POSITIONS, FEATURES), KERNEL, LABELS.reshape(POSITIONS)
    step = jax.jit(jax.value_and_grad(partial(jxent.linear_cross_entropy, block_size=BLOCK), (0, 1)))
    sharded = [put(mesh, a, s) for a, s in zip(arrays, (P("data"), P("data", "vocab"), P("data")), strict=True)]
    program = step.lower(*sharded).compile()
    assert_equal(program(*sharded), step(*map(jnp.asarray, arrays)))
    assert_nothing_else_moves(program.as_text(), layout)


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_one_position_under_jit(mode):
    """A single position is sharded by its features, alone and under `vmap`."""
    mesh, label = mesh_of(mode, data=4, vocab=2), jnp.array(3)
    arrays = jnp.asarray(HIDDEN[0, 0]), jnp.asarray(KERNEL)
    sharded = [put(mesh, a, s) for a, s in zip(arrays, (P("data"), P("data", "vocab")), strict=True)]
    step = jax.value_and_grad(jxent.linear_cross_entropy, (0, 1))
    wanted = jax.value_and_grad(lambda h, k: jxent.cross_entropy(h @ k, label), (0, 1))(*arrays)
    assert_equal(jax.jit(step)(*sharded, label), wanted)
    each = jax.jit(jax.vmap(step, (0, None, None)))(jnp.stack([arrays[0]] * 2), sharded[1], label)
    assert_equal(jax.tree.map(lambda a: a[1], each), wanted)


def test_without_shardy():
    """JAX's older partitioner asks for shardings in another way."""
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        (value, grads), program, arrays = run("linear-all", "FSDP and vocabulary", "Auto")
        assert_equal((value, grads), on_one_device("linear-all"))
        assert_nothing_else_moves(program.as_text(), "FSDP and vocabulary")
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    assert grads[1].sharding.is_equivalent_to(arrays[2].sharding, 2)
