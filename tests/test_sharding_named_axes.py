"""`axis_name` and `batch_axis_name` outside `shard_map`: they name axes of the mesh in use, and fix the layout."""

import contextlib
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import short
from hlo import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_calls import (
    ARRAYS,
    BLOCK,
    HIDDEN,
    KERNEL,
    LABELS,
    LENGTH,
    POSITIONS,
    SOFTMAXES,
    VOCAB,
    assert_equal,
    mesh_of,
    on_one_device,
    put,
)
from sharded_layouts import LAYOUTS, MOVED, NAMED_LAYOUTS, numbers_alone_in_the_loop, run

import jxent

pytestmark = pytest.mark.usefixtures("x64")


NAMED = "batch, sequence, vocabulary"
OVER_ALL = {"axis_name": "vocab", "batch_axis_name": P("data", "sequence")}
NO_NAMES = {"axis_name": None, "batch_axis_name": None}


@pytest.mark.covering
@pytest.mark.parametrize("layout", NAMED_LAYOUTS)
@pytest.mark.parametrize(
    "name",
    short(
        ("linear-all", "linear-probabilities", "linear-sparse", "linear-recompute", "linear-none", "linear-sigmoid"),
        *("linear-all", "linear-sparse", "linear-none", "linear-sigmoid"),
    ),
)
def test_linear_with_named_axes(name, layout):
    """XLA:CPU sums gradients that a TPU scatters; tests/test_tpu_compiler.py looks at a TPU."""
    (value, grads), program, _ = run(name, layout, "Named")
    assert_equal((value, grads), on_one_device(name))
    found = numbers_alone_in_the_loop(program.as_text(), layout)
    gathered = sum(c.size for c in found if c.kind == "all-gather" and c.size >= KERNEL.size // 8)
    assert gathered <= sum(size for kind, size in MOVED.get(layout, []) if kind == "all-gather")


@pytest.mark.parametrize("how", ["set_mesh", "the arrays' mesh", "not jitted", "Explicit", "with mesh"])
def test_the_mesh_in_use(how):
    """It is that of `jax.set_mesh`, or that of the arrays. The results are sharded like the positions."""
    (axes, hidden, kernel), mode = LAYOUTS[NAMED], "Explicit" if how == "Explicit" else "Auto"
    mesh = mesh_of(mode, **axes)
    labels = put(mesh, LABELS, P(*hidden)) if how != "set_mesh" else jnp.asarray(LABELS)
    arrays = put(mesh, HIDDEN, hidden), put(mesh, KERNEL, kernel), labels
    options = {"reduction": "none", "return_stats": True, "label_smoothing": jnp.array(0.1)}
    f = partial(jxent.linear_cross_entropy, block_size=BLOCK, **options)
    named = partial(f, **OVER_ALL)
    with contextlib.ExitStack() as stack:
        if how in ("set_mesh", "not jitted"):
            stack.enter_context(jax.set_mesh(mesh))
        elif how == "with mesh":
            stack.enter_context(warnings.catch_warnings(action="ignore", category=DeprecationWarning))
            stack.enter_context(mesh)
        out = (named if how == "not jitted" else jax.jit(named))(*arrays)
    assert_equal(jax.device_get(out), f(HIDDEN, KERNEL, LABELS))
    losses, stats = out
    for array in (losses, *stats[:-2]):
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "sequence")), 2)
    assert stats.weight.sharding.is_fully_replicated
    assert stats.count.sharding.is_fully_replicated


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmaxes_with_named_axes(name, mode):
    """They name only the axis of the classes. The positions stay where they are."""
    mesh, spec = mesh_of(mode, data=4, vocab=2), P("data", None, "vocab")
    f = partial(SOFTMAXES[name], axis_name="vocab", where=np.arange(VOCAB) % 3 > 0)
    program = jax.jit(f).lower(put(mesh, ARRAYS["logits"], spec)).compile()
    out = program(put(mesh, ARRAYS["logits"], spec))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    assert_equal(jax.device_get(out), SOFTMAXES[name](ARRAYS["logits"], where=np.arange(VOCAB) % 3 > 0))
    assert all(c.kind == "all-reduce" and c.size <= POSITIONS // 4 for c in collectives(program.as_text()))


def test_named_axes_of_other_layouts():
    """The classes may be on any axis. Hidden states are gathered over the batch or along the length."""
    mesh = mesh_of("Auto", data=4, vocab=2)
    logits = np.moveaxis(ARRAYS["logits"], 2, 1)
    named = partial(jxent.cross_entropy, axis=1, axis_name="vocab", batch_axis_name=P(None, "data"))
    labels = put(mesh, LABELS, P(None, "data"))
    placed = put(mesh, logits, P(None, "vocab", "data")), labels
    assert_equal(
        jax.jit(jax.value_and_grad(named))(*placed), jax.value_and_grad(partial(named, **NO_NAMES))(logits, LABELS)
    )

    step = jax.value_and_grad(partial(jxent.linear_cross_entropy, block_size=BLOCK), (0, 1))
    wanted = step(HIDDEN, KERNEL, LABELS)
    for options, hidden, kernel, gathered in (
        ({"axis_name": "vocab"}, P("vocab"), P(None, "vocab"), HIDDEN.size),
        ({"axis_name": "vocab", "batch_axis_name": "data"}, P("data", "vocab"), P(None, "vocab"), HIDDEN.size // 4),
    ):
        f = jax.value_and_grad(partial(jxent.linear_cross_entropy, block_size=BLOCK, **options), (0, 1))
        arrays = put(mesh, HIDDEN, hidden), put(mesh, KERNEL, kernel), jnp.asarray(LABELS)
        program = jax.jit(f).lower(*arrays).compile()
        assert_equal(program(*arrays), wanted)
        large = [c for c in collectives(program.as_text()) if c.kind == "all-gather" and c.size >= KERNEL.size // 8]
        assert [(c.size, c.in_loop) for c in large] == [(gathered, False)]


def test_named_axes_of_examples():
    """`vmap` goes over examples, whose positions and classes are sharded. A mask that is broadcast has no shards."""
    mesh = mesh_of("Auto", data=4, vocab=2)
    where = np.arange(LENGTH) % 5 > 0
    options = {"where": where[:1], "sample_weight": ARRAYS["sample_weight"][0]}

    def loss(hidden, kernel, labels, **more):
        f = partial(jxent.linear_cross_entropy, block_size=BLOCK, **options, **more)
        return jnp.sum(jax.vmap(f, (0, None, 0))(hidden, kernel, labels))

    named = partial(loss, axis_name="vocab", batch_axis_name="data")
    arrays = HIDDEN, KERNEL, LABELS
    with jax.set_mesh(mesh):
        assert_equal(jax.jit(jax.value_and_grad(named, (0, 1)))(*arrays), jax.value_and_grad(loss, (0, 1))(*arrays))


def test_export_with_named_axes():
    """Programs are exported for several devices, and lowered for a mesh without devices."""
    mesh = mesh_of("Auto", data=4, vocab=2)
    f = jax.jit(
        jax.value_and_grad(partial(jxent.linear_cross_entropy, axis_name="vocab", batch_axis_name="data"), (0, 1))
    )
    specs = P("data"), P("data", "vocab"), P("data")
    arrays = [put(mesh, a, s) for a, s in zip((HIDDEN, KERNEL, LABELS), specs, strict=True)]
    read = jax.export.deserialize(jax.export.export(f)(*arrays).serialize())
    assert_equal(jax.jit(read.call)(*arrays), f(*arrays))
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh.abstract_mesh, s))
        for a, s in zip(arrays, specs, strict=True)
    ]
    assert f.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_names_of_the_mesh_inside_shard_map():
    """JAX cannot differentiate `Explicit` axes inside `shard_map`, so these are `Auto`."""
    mesh = mesh_of("Auto", data=4, vocab=2)
    f = jax.shard_map(
        partial(jxent.linear_cross_entropy, batch_axis_name="data", axis_name="vocab"),
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P(),
        axis_names={"data"},
    )
    with pytest.raises(
        ValueError, match=r"axis_name='vocab' .* inside jax.shard_map over \('data',\).*axis_names.*leave"
    ):
        f(HIDDEN, KERNEL, LABELS)


@pytest.mark.filterwarnings("ignore:.with mesh:DeprecationWarning")
@pytest.mark.parametrize("how", ["numpy", "in_shardings"])
def test_the_older_context_is_named(how):
    """JAX shows that mesh to no function. Arrays on the mesh do show it (`test_the_mesh_in_use`)."""
    mesh = mesh_of("Auto", data=4, vocab=2)
    f = partial(jxent.linear_cross_entropy, batch_axis_name="data", axis_name="vocab")
    if how == "in_shardings":
        f = jax.jit(f, in_shardings=[NamedSharding(mesh, spec) for spec in (P("data"), P(), P("data"))])
    with mesh, pytest.raises(ValueError, match=r"\"with mesh:\", whose axes are \('data', 'vocab'\).*jax.set_mesh"):
        f(HIDDEN, KERNEL, LABELS)


def test_error_without_a_mesh():
    message = (
        r"axis_name='vocab' names no axis .*, and no mesh .* jax.set_mesh\(mesh\), .* jax.shard_map, .* one device"
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(partial(jxent.linear_cross_entropy, axis_name="vocab"))(HIDDEN, KERNEL, LABELS)


WRONG_NAMES = {
    "unknown": ({"axis_name": "model"}, r"axis_name='model' names no axis .* of the mesh .* \('data', 'vocab'\)"),
    "classes": ({"axis_name": ("data", "vocab")}, "shards axis 1 of kernel over 8 devices, .* 60, .* pad the classes"),
    "positions": (
        {"batch_axis_name": ("data", "vocab")},
        "shards axis 0 of hidden over 8 devices, .* 4, .* ignore_index",
    ),
    "both": ({"axis_name": "data", "batch_axis_name": "data"}, "must name different axes"),
    "spec": ({"batch_axis_name": P(None, None, "data")}, "is for 3 axes of the positions, of which hidden .* has 2"),
    "one position": ({"batch_axis_name": "data"}, "is for 1 axes of the positions, of which hidden .* has 0"),
}


@pytest.mark.parametrize("what", WRONG_NAMES)
def test_errors_of_named_axes(what):
    options, message = WRONG_NAMES[what]
    hidden, labels = (a[0, 0] if what == "one position" else a[:4] for a in (HIDDEN, LABELS))
    with jax.set_mesh(mesh_of("Auto", data=4, vocab=2)), pytest.raises(ValueError, match=message):
        jxent.linear_cross_entropy(hidden, KERNEL[:, :60], labels, **options)
