"""Losses inside `jax.shard_map` and `jax.vmap`: `axis_name` for the classes, `batch_axis_name` for the positions.

Loss and gradients are those of the whole batch on one device, with and without the replication check of `shard_map`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import short
from hlo import collectives
from jax import lax
from jax.sharding import PartitionSpec as P
from sharded_calls import (
    ARRAYS,
    BIAS,
    BLOCK,
    CALLS,
    HIDDEN,
    KERNEL,
    LABELS,
    LINEAR,
    POSITIONS,
    SOFTMAXES,
    SPECS,
    arrays_of,
    assert_equal,
    floating,
    in_shards,
    mapped_by_vmap,
    mesh_of,
    on_one_device,
    put,
    specs_in_shard_map,
    value_and_grad,
)

import jxent

pytestmark = pytest.mark.usefixtures("x64")


SOME = ("cross_entropy-all", "linear-all")
# Calls whose kinds of labels, options or terms the short run has in other calls, or over the positions as well.
FOR_OTHER_TESTS = (
    *("cross_entropy", "cross_entropy-none", "cross_entropy-sparse", "cross_entropy-stats", "cross_entropy-all"),
    *(
        "nll_loss-probabilities",
        "linear",
        "linear-stats",
        "linear-none-sparse",
        "kl",
        "tv",
        "linear-kl",
        "linear-sigmoid-sparse",
    ),
)


# --- classes ----------------------------------------------------------------------------------------------------------


def mapped(name, shards, check_vma, inside=False):
    """The call under `shard_map`, with sharded classes. With `inside`, the map differentiates it."""
    f, wrt = value_and_grad(name, axis_name="vocab")
    specs = specs_in_shard_map(name)
    f = jax.value_and_grad(f, wrt) if inside else f
    out = (P(), tuple(specs[i] for i in wrt)) if inside else P()
    f = jax.shard_map(f, mesh=mesh_of("Auto", vocab=shards), in_specs=specs, out_specs=out, check_vma=check_vma)
    return jax.jit(f if inside else jax.value_and_grad(f, wrt))


@pytest.mark.covering(
    *("8-linear-all-True", "8-linear-none-False", "8-nll_loss-False", "8-logsumexp-True", "8-logsumexp-False"),
)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("shards", "name"),
    short(
        [(n, name) for n in (1, 2, 4, 8) for name in (CALLS if n == 8 else SOME)],
        *((1, "linear-all"), (2, "cross_entropy-all")),
        *((8, name) for name in CALLS if name not in FOR_OTHER_TESTS),
    ),
)
def test_axis_name_in_shard_map(name, shards, check_vma):
    assert_equal(mapped(name, shards, check_vma)(*arrays_of(name)), on_one_device(name))


@pytest.mark.parametrize("name", short(CALLS, *SOME, "nll_loss"))
def test_gradient_inside_shard_map(name):
    assert_equal(mapped(name, 4, check_vma=True, inside=True)(*arrays_of(name)), on_one_device(name))


@pytest.mark.parametrize("name", short((*SOME, "nll_loss", "logsumexp"), *SOME))
def test_gradient_inside_shard_map_unchecked(name):
    """JAX then differentiates the sum of all devices' losses, 4 times the loss. `lax.psum` behaves alike."""
    f, wrt = value_and_grad(name, axis_name="vocab")
    specs = specs_in_shard_map(name)

    def inside(*arrays):
        value, grads = jax.value_and_grad(f, wrt)(*arrays)
        # An array with a copy on every device has a gradient for each copy.
        return value, tuple(g if specs[i] != P() else lax.psum(g, "vocab") for i, g in zip(wrt, grads, strict=True))

    f_ = jax.shard_map(
        inside,
        mesh=mesh_of("Auto", vocab=4),
        in_specs=specs,
        out_specs=(P(), tuple(specs[i] for i in wrt)),
        check_vma=False,
    )
    value, grads = jax.jit(f_)(*arrays_of(name))
    assert_equal((value, jax.tree.map(lambda g: g / 4, grads)), on_one_device(name))


@pytest.mark.parametrize("name", short((*SOME, "cross_entropy-probabilities", "nll_loss"), *SOME, "nll_loss"))
def test_axis_name_in_vmap(name):
    (f, axes), (_, wrt) = mapped_by_vmap(name), value_and_grad(name)
    arrays = map(in_shards, arrays_of(name), axes)
    value, grads = jax.jit(jax.value_and_grad(f, wrt))(*arrays)
    wanted, wanted_grads = on_one_device(name)
    assert_equal(value, wanted)
    assert_equal(grads, tuple(in_shards(g, axes[i]) for i, g in zip(wrt, wanted_grads, strict=True)))


@pytest.mark.covering("log_softmax-False")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmaxes_with_axis_name(name, check_vma):
    function = SOFTMAXES[name]
    spec = SPECS["logits"]
    f = jax.shard_map(
        partial(function, axis_name="vocab"),
        mesh=mesh_of("Auto", vocab=8),
        in_specs=spec,
        out_specs=spec,
        check_vma=check_vma,
    )
    value, pull = jax.vjp(jax.jit(f), ARRAYS["logits"])
    wanted, wanted_pull = jax.vjp(function, jnp.asarray(ARRAYS["logits"]))
    assert_equal((value, pull(ARRAYS["probabilities"])), (wanted, wanted_pull(jnp.asarray(ARRAYS["probabilities"]))))


def test_classes_over_two_axes():
    """`axis_name` has the axes in the order of the partition spec."""
    f, wrt = value_and_grad("linear-all", axis_name=("outer", "inner"))
    both = {name: P(*(("outer", "inner") if e == "vocab" else e for e in spec)) for name, spec in SPECS.items()}
    specs = (P(), *(both.get(a, P()) for a in LINEAR))
    f = jax.shard_map(f, mesh=mesh_of("Auto", inner=2, outer=4), in_specs=specs, out_specs=P())
    assert_equal(jax.jit(jax.value_and_grad(f, wrt))(*arrays_of("linear-all")), on_one_device("linear-all"))


@pytest.mark.parametrize(
    "name", short(("linear", "linear-recompute", "cross_entropy-all"), "linear", "cross_entropy-all")
)
def test_labels_typed_as_varying(name):
    """After an `all_gather`, labels are typed as varying. Then the loss is too, with a cotangent for each shard."""
    f, wrt = value_and_grad(name, axis_name="vocab")
    names = CALLS[name][1]
    specs = (P(), *(SPECS.get(a, P()) for a in names))

    def local(*arrays):
        arrays = [
            lax.pcast(a, "vocab", to="varying") if name == "labels" else a
            for a, name in zip(arrays, ("", *names), strict=True)
        ]
        return lax.pmean(f(*arrays), "vocab")

    sharded = jax.shard_map(local, mesh=mesh_of("Auto", vocab=4), in_specs=specs, out_specs=P())
    assert_equal(jax.jit(jax.value_and_grad(sharded, wrt))(*arrays_of(name)), on_one_device(name))


@pytest.mark.parametrize("label_smoothing", short((0.0, 0.1), 0.1))
def test_padded_vocabulary(label_smoothing):
    """61 classes are padded to 8 shards of 8. A bias of -inf masks the padding."""
    kernel = np.pad(KERNEL[:, :61], ((0, 0), (0, 3)))
    bias = np.pad(BIAS[:61], (0, 3), constant_values=-np.inf)
    labels = np.minimum(LABELS, 60)

    def loss(hidden, kernel, bias, labels, **options):
        return jxent.linear_cross_entropy(
            hidden, kernel, labels, bias=bias, label_smoothing=label_smoothing, block_size=BLOCK, **options
        )

    f = jax.shard_map(
        partial(loss, axis_name="vocab"),
        mesh=mesh_of("Auto", vocab=8),
        in_specs=(P(), SPECS["kernel"], P("vocab"), P()),
        out_specs=P(),
    )
    value, (dh, dk, db) = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(HIDDEN, kernel, bias, labels)
    assert_equal(
        (value, (dh, dk[:, :61], db[:61])),
        jax.value_and_grad(loss, (0, 1, 2))(HIDDEN, KERNEL[:, :61], BIAS[:61], labels),
    )
    assert not np.any(dk[:, 61:])
    assert not np.any(db[61:])


def test_what_moves_in_shard_map():
    """Shards exchange numbers for each position, and one sum of the gradient of the hidden states."""
    program = mapped("linear-all", 8, check_vma=True).lower(*arrays_of("linear-all")).compile()
    found = collectives(program.as_text())
    assert all(c.kind == "all-reduce" for c in found)
    assert all(c.size <= BLOCK for c in found if c.in_loop)
    assert [c.size for c in found if c.size > POSITIONS] == [HIDDEN.size]


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize(("check_vma", "inside"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "name",
    short(
        (
            *("cross_entropy-all", "cross_entropy-probabilities", "cross_entropy-sparse", "linear-all"),
            *("linear-sparse", "nll_loss", "kl", "linear-kl"),
        ),
        *("cross_entropy-all", "cross_entropy-sparse", "linear-all", "nll_loss", "linear-kl"),
    ),
)
def test_batch_axis_name(name, reduction, check_vma, inside):
    """Masks differ between devices, and one device has no label. Loss and gradients are those of the whole batch."""
    function, names, options = CALLS[name]
    wrt = floating(names)
    positional = ("logits", "logits_p", "probabilities", "indices", "shares", "hidden", "hidden_p", "labels")
    over_positions = {a: P("data", *SPECS.get(a, P())[1:]) for a in positional}
    specs = tuple((SPECS | over_positions | {"sample_weight": P("data")}).get(a, P()) for a in names)
    arrays = [ARRAYS[a] for a in names]

    def f(*arrays, **axis_names):
        return function(*arrays, reduction=reduction, **options, **axis_names)

    wanted = jax.jit(jax.value_and_grad(f, wrt))(*map(jnp.asarray, arrays))
    local = partial(f, axis_name="vocab", batch_axis_name="data")
    out = P()
    if inside:
        local, out = jax.value_and_grad(local, wrt), (P(), tuple(specs[i] for i in wrt))
    mesh = mesh_of("Auto", data=4, vocab=2)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check_vma)
    assert_equal(jax.jit(sharded if inside else jax.value_and_grad(sharded, wrt))(*arrays), wanted)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_some_axes(check_vma):
    """`shard_map` shards the positions, and the compiler the classes."""
    mesh = mesh_of("Auto", data=4, vocab=2)
    f = jax.shard_map(
        partial(jxent.linear_cross_entropy, batch_axis_name="data", block_size=BLOCK),
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=P(),
        axis_names={"data"},
        check_vma=check_vma,
    )
    arrays = HIDDEN, KERNEL, LABELS
    placed = [put(mesh, a, s) for a, s in zip(arrays, (P("data"), P(None, "vocab"), P("data")), strict=True)]
    wanted = jax.jit(jax.value_and_grad(jxent.linear_cross_entropy, (0, 1)))(*map(jnp.asarray, arrays))
    assert_equal(jax.jit(jax.value_and_grad(f, (0, 1)))(*placed), wanted)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("Auto", "linear-all"),
        *short([("Explicit", "linear"), ("Explicit", "linear-none")], ("Explicit", "linear-none")),
    ],
)
def test_positions_on_a_mesh_of_the_caller(mode, name):
    """`shard_map` is over the classes alone, and `jit` still shards the positions."""
    mesh = mesh_of(mode, data=4, vocab=2)
    function, names, options = CALLS[name]
    # Class weights need the gradient of indexing, which JAX lacks there for `Explicit` axes.
    names = [a for a in names if mode == "Auto" or a != "class_weight"]
    wrt = floating(names)

    def f(*arrays, **axis_name):
        return jnp.sum(function(**dict(zip(names, arrays, strict=True)), **options, **axis_name))

    placed = {"hidden": P("data"), "labels": P("data"), "sample_weight": P("data"), **SPECS}
    arrays = [put(mesh, ARRAYS[a], placed.get(a, P())) for a in names]
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(
            partial(f, axis_name="vocab"),
            in_specs=tuple(SPECS.get(a, P()) for a in names),
            out_specs=P(),
            axis_names={"vocab"},
        )
        actual = jax.jit(jax.value_and_grad(sharded, wrt))(*arrays)
    assert_equal(actual, jax.jit(jax.value_and_grad(f, wrt))(*(jnp.asarray(ARRAYS[a]) for a in names)))


# --- errors -----------------------------------------------------------------------------------------------------------


WRONG = {
    "replicated kernel": (
        {"axis_name": "data"},
        r"linear_cross_entropy: kernel must be sharded over axis_name='data', .* \['data'\]; name the axis .* in_specs",
    ),
    "replicated hidden": ({"batch_axis_name": "vocab"}, "hidden must be sharded over batch_axis_name='vocab'"),
    "one axis twice": ({"axis_name": "vocab", "batch_axis_name": ("data", "vocab")}, "must name different axes"),
    "no reduction": ({"batch_axis_name": "data", "reduction": "none"}, "batch_axis_name='data' is for a mean or sum"),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_in_shard_map(what):
    options, message = WRONG[what]
    both = P("data"), P(None, "vocab"), P("data")
    specs = (P(("data", "vocab")), *both[1:2], P(("data", "vocab"))) if what == "one axis twice" else both
    f = partial(jxent.linear_cross_entropy, **options)
    sharded = jax.shard_map(f, mesh=mesh_of("Auto", data=4, vocab=2), in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match=message):
        sharded(HIDDEN, KERNEL, LABELS)
