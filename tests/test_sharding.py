"""Sharded losses: those of one device, to 1e-10 in float64, and nothing gathered that need not be.

Four ways: plain `jit` on sharded arrays, for mesh axes of both types; `axis_name` and `batch_axis_name` of the mesh in
use; the same inside `shard_map`, with and without its replication check, and inside `vmap`; and several processes.
"""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import warnings
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import short
from hlo import collectives
from jax import lax
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jxent

pytestmark = pytest.mark.usefixtures("x64")

BATCH, LENGTH, FEATURES, VOCAB = 8, 16, 24, 64
POSITIONS = BATCH * LENGTH
BLOCK = 32
RNG = np.random.default_rng(11)
KERNEL = 0.5 * RNG.normal(size=(FEATURES, VOCAB))
HIDDEN = RNG.normal(size=(BATCH, LENGTH, FEATURES))
BIAS = RNG.normal(size=VOCAB)
# The first and the last class of each of 8 shards, and others.
LABELS = np.concatenate([np.arange(0, VOCAB, 8), np.arange(7, VOCAB, 8), RNG.integers(0, VOCAB, POSITIONS - 16)])
LABELS = RNG.permutation(LABELS).astype(np.int32).reshape(BATCH, LENGTH)
LABELS[0, :5] = -100
LABELS[3] = -100  # all that one of 8 devices has
ARRAYS = {
    "hidden": HIDDEN,
    "kernel": KERNEL,
    "bias": BIAS,
    "logits": HIDDEN @ KERNEL + BIAS,
    "labels": LABELS,
    "probabilities": RNG.dirichlet(np.ones(VOCAB), (BATCH, LENGTH)),
    "shares": RNG.dirichlet(np.ones(6), (BATCH, LENGTH)) * 0.9,  # of sparse labels
    "indices": RNG.integers(0, VOCAB, (BATCH, LENGTH, 6)).astype(np.int32),
    "class_weight": RNG.uniform(0.5, 2, VOCAB),
    "sample_weight": RNG.uniform(0.5, 2, (BATCH, LENGTH)),
}
ARRAYS |= {
    "hidden_p": RNG.normal(size=(BATCH, LENGTH, 16)),
    "kernel_p": 0.5 * RNG.normal(size=(VOCAB, 16)),  # the other layout
    "bias_p": RNG.normal(size=VOCAB),
    "temperature": np.array(1.5),
}
ARRAYS["logits_p"] = ARRAYS["hidden_p"] @ ARRAYS["kernel_p"].T
COTANGENTS = RNG.normal(size=(BATCH, LENGTH))
SMOOTH = {"label_smoothing": 0.1, "z_loss_weight": 0.01, "logit_softcap": 6.0}


def weighed(losses, cotangents):
    return jnp.sum(losses * cotangents) if losses.ndim else losses


def logits_loss(logits, labels, class_weight=None, sample_weight=None, **options):
    return jxent.cross_entropy(logits, labels, class_weight=class_weight, sample_weight=sample_weight, **options)


def linear_loss(hidden, kernel, labels, bias=None, class_weight=None, sample_weight=None, **options):
    weights = {"bias": bias, "class_weight": class_weight, "sample_weight": sample_weight}
    return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=BLOCK, **weights, **options)


def of_sparse(loss, *arrays, **options):
    """A loss of these arrays, `indices` and `shares` in the place of labels."""
    at = 2 if loss is linear_loss else 1
    labels = jxent.SparseLabels(*arrays[at : at + 2])
    return loss(*arrays[:at], labels, *arrays[at + 2 :], **options)


def with_stats(loss, *arrays, **options):
    loss, stats = loss(*arrays, return_stats=True, **options)
    numbers = jax.tree.map(jnp.sum, stats)
    return jnp.sum(loss) + jnp.sum(jnp.sin(stats.entropy)) + sum(numbers)


def of_log_probs(log_probs, labels, class_weight, **options):
    return jxent.nll_loss(log_probs, labels, class_weight=class_weight, **options)


def divergence(function, logits_p, logits, temperature, sample_weight, **options):
    return function(logits_p, logits, temperature=temperature, sample_weight=sample_weight, **options)


def linear_divergence(
    function, hidden_p, kernel_p, hidden, kernel, bias_p, bias, temperature, sample_weight, **options
):
    given = {"bias_p": bias_p, "bias_q": bias, "temperature": temperature, "sample_weight": sample_weight}
    layout = {"vocab_axis": (0, -1), "block_size": BLOCK}
    return function(hidden_p, kernel_p, hidden, kernel, **given, **layout, **options)


# name: (loss, its arguments' names, options); a loss of each position is weighed with the cotangents
LOGITS = ("logits", "labels", "class_weight", "sample_weight")
LINEAR = ("hidden", "kernel", "labels", "bias", "class_weight", "sample_weight")
SPARSE = ("indices", "shares")
PAIR = ("logits_p", "logits", "temperature", "sample_weight")
LINEAR_PAIR = ("hidden_p", "kernel_p", "hidden", "kernel", "bias_p", "bias", *PAIR[2:])
CALLS = {
    "cross_entropy": (logits_loss, LOGITS[:2], {}),
    "cross_entropy-all": (logits_loss, LOGITS, SMOOTH),
    "cross_entropy-probabilities": (logits_loss, ("logits", "probabilities", *LOGITS[2:]), SMOOTH),
    "cross_entropy-none": (logits_loss, LOGITS, {"reduction": "none"}),
    "cross_entropy-stats": (partial(with_stats, logits_loss), LOGITS[:2], {}),
    "nll_loss": (of_log_probs, LOGITS[:3], {}),
    "nll_loss-probabilities": (of_log_probs, ("logits", "probabilities", "class_weight"), {}),
    "cross_entropy-sparse": (partial(of_sparse, logits_loss), ("logits", *SPARSE, *LOGITS[2:]), SMOOTH),
    "nll_loss-sparse": (partial(of_sparse, of_log_probs), ("logits", *SPARSE, "class_weight"), {"reduction": "none"}),
    "linear-sparse": (partial(of_sparse, linear_loss), (*LINEAR[:2], *SPARSE, *LINEAR[3:]), SMOOTH),
    "linear-none-sparse": (partial(of_sparse, linear_loss), (*LINEAR[:2], *SPARSE), {"reduction": "none"}),
    "logsumexp": (jxent.logsumexp, ("logits",), {}),
    "linear": (linear_loss, LINEAR[:3], {}),
    "linear-all": (linear_loss, LINEAR, SMOOTH),
    "linear-probabilities": (linear_loss, ("hidden", "kernel", "probabilities", *LINEAR[3:]), SMOOTH),
    "linear-recompute": (linear_loss, LINEAR, {"recompute": True, **SMOOTH}),
    "linear-none": (linear_loss, LINEAR, {"reduction": "none", **SMOOTH}),
    "linear-stats": (partial(with_stats, linear_loss), LINEAR, SMOOTH),
    "linear-none-stats": (partial(with_stats, linear_loss), LINEAR, {"reduction": "none", **SMOOTH}),
    "kl": (partial(divergence, jxent.kl_divergence), PAIR, {}),
    "js-none": (partial(divergence, jxent.js_divergence), PAIR, {"beta": 0.3, "reduction": "none"}),
    "linear-kl": (partial(linear_divergence, jxent.linear_kl_divergence), LINEAR_PAIR, {}),
    "linear-js-none": (partial(linear_divergence, jxent.linear_js_divergence), LINEAR_PAIR, {"reduction": "none"}),
}
DIVERGENCES = ("kl", "js-none", "linear-kl", "linear-js-none")
# Not a loss: their cotangent is of the logits' shape.
SOFTMAXES = {"softmax": jxent.softmax, "log_softmax": jxent.log_softmax}


def floating(names):
    return tuple(i for i, name in enumerate(names) if name not in ("labels", "indices"))


def value_and_grad(name, **more):
    """The call as a function of (cotangents, *arrays), with the gradients of all floating-point arguments."""
    function, names, options = CALLS[name]

    def f(cotangents, *arrays):
        return weighed(function(*arrays, **options, **more), cotangents)

    return f, tuple(i + 1 for i in floating(names))


def on_one_device(name):
    f, wrt = value_and_grad(name)
    return jax.jit(jax.value_and_grad(f, wrt))(COTANGENTS, *(ARRAYS[a] for a in CALLS[name][1]))


class Expected(dict):
    """The results of one device by name, each computed where it is first wanted."""

    def __missing__(self, name):
        self[name] = jax.tree.map(np.asarray, on_one_device(name))
        return self[name]


@pytest.fixture(scope="module")
def expected():
    return Expected()


def assert_equal(actual, wanted):
    chex.assert_trees_all_close(actual, wanted, rtol=1e-10, atol=1e-12)


def mesh_of(mode, **axes):
    devices = np.array(jax.devices()[: int(np.prod([*axes.values()]))])
    kinds = (AxisType[mode],) * len(axes) if isinstance(mode, str) else tuple(AxisType[kind] for kind in mode)
    return jax.sharding.Mesh(devices.reshape([*axes.values()]), tuple(axes), axis_types=kinds)


def put(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


# --- plain jit --------------------------------------------------------------------------------------------------------


# name: (mesh, spec of the hidden states, spec of the kernel)
LAYOUTS: dict[str, tuple] = {
    "batch": ({"data": 8}, P("data"), P()),
    "batch and sequence": ({"data": 4, "sequence": 2}, P("data", "sequence"), P()),
    "vocabulary": ({"vocab": 8}, P(), P(None, "vocab")),
    "batch, sequence, vocabulary": (
        {"data": 2, "sequence": 2, "vocab": 2},
        P("data", "sequence"),
        P(None, "vocab"),
    ),
    "FSDP": ({"data": 8}, P("data"), P("data")),
    "FSDP and vocabulary": ({"data": 4, "vocab": 2}, P("data"), P("data", "vocab")),
    "FSDP of the vocabulary": ({"data": 8}, P("data"), P(None, "data")),
    "sequence and vocabulary on one axis": ({"data": 4, "model": 2}, P("data", "model"), P(None, "model")),
    "features": ({"data": 4, "model": 2}, P("data", None, "model"), P("model")),
    "vocabulary, then FSDP of it": ({"data": 4, "vocab": 2}, P("data"), P(None, ("vocab", "data"))),
    "FSDP of the vocabulary, and it": ({"data": 4, "vocab": 2}, P("data"), P(None, ("data", "vocab"))),
}


# What is gathered and scattered, and not merely summed: (kind, elements on one device).
SCATTERED = ("reduce-scatter", KERNEL.size // 8)
MOVED = {
    "FSDP": [("all-gather", KERNEL.size), SCATTERED],
    "FSDP and vocabulary": [("all-gather", KERNEL.size // 2), SCATTERED],
    "FSDP of the vocabulary": [("all-gather", KERNEL.size), SCATTERED],
    "sequence and vocabulary on one axis": [("all-gather", HIDDEN.size // 4)],
    "features": [("all-gather", HIDDEN.size // 4), ("all-gather", KERNEL.size)],
    "vocabulary, then FSDP of it": [("all-gather", KERNEL.size // 2), SCATTERED],
    "FSDP of the vocabulary, and it": [("all-gather", KERNEL.size), ("reduce-scatter", KERNEL.size // 4)],
}


def specs_of(layout):
    _, hidden, kernel = LAYOUTS[layout]
    positions, vocab = P(*hidden[:2]), kernel[1] if len(kernel) == 2 else None
    vocab_of_logits = tuple(a for a in (vocab if isinstance(vocab, tuple) else (vocab,)) if a not in (None, *hidden))
    logits = P(*[*positions, None, None][:2], vocab_of_logits or None)
    return {
        **{"hidden": hidden, "kernel": kernel, "labels": positions, "sample_weight": positions},
        **{"logits": logits, "probabilities": logits, "bias": P(vocab), "class_weight": P(vocab)},
        **{"indices": positions, "shares": positions},
        **{"hidden_p": hidden, "kernel_p": P(*kernel[::-1], *[None] * (2 - len(kernel))), "bias_p": P(vocab)},
        **{"logits_p": logits, "temperature": P()},
    }


def axes_of(name, layout):
    """The options that name the mesh axes of a layout."""
    specs = specs_of(layout)
    classes = {"axis_name": specs["logits"][2]}
    return classes if name in ("logsumexp", *SOFTMAXES) else classes | {"batch_axis_name": specs["labels"]}


def run(name, layout, mode):
    """(result, the program, the sharded arrays). Mode "Named": `Auto` axes that the call names."""
    f, wrt = value_and_grad(name, **(axes_of(name, layout) if mode == "Named" else {}))
    mesh, specs = mesh_of("Auto" if mode == "Named" else mode, **LAYOUTS[layout][0]), specs_of(layout)
    arrays = [put(mesh, COTANGENTS, specs["labels"]), *(put(mesh, ARRAYS[a], specs[a]) for a in CALLS[name][1])]
    # As a training step has it: the gradients are sharded as the parameters are.
    shardings = {"out_shardings": (None, tuple(arrays[i].sharding for i in wrt))} if mode == "Named" else {}
    program = jax.jit(jax.value_and_grad(f, wrt), **shardings).lower(*arrays).compile()
    return program(*arrays), program, arrays


@pytest.mark.covering(
    "nll_loss-batch, sequence, vocabulary-Explicit",
    "nll_loss-probabilities-batch, sequence, vocabulary-Explicit",
    "cross_entropy-all-batch, sequence, vocabulary-Explicit",
    "cross_entropy-probabilities-batch, sequence, vocabulary-Named",
)
@pytest.mark.parametrize("mode", ["Auto", "Explicit", "Named"])
@pytest.mark.parametrize("layout", ["batch and sequence", "vocabulary", "batch, sequence, vocabulary"])
@pytest.mark.parametrize("name", [name for name in CALLS if "linear" not in name])
def test_logits_under_jit(expected, name, layout, mode):
    (value, grads), program, arrays = run(name, layout, mode)
    assert_equal((value, grads), expected[name])
    for i, grad in zip(value_and_grad(name)[1], grads, strict=True):
        if CALLS[name][1][i - 1] in ("logits", "logits_p", "probabilities"):
            assert grad.sharding.is_equivalent_to(arrays[i].sharding, 3)
    # A number or two for each position and shard: a prediction takes a value and an index of each. Of sparse labels as
    # many for each entry.
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
def test_linear_under_jit(expected, name, layout, mode):
    (value, grads), program, arrays = run(name, layout, mode)
    assert_equal((value, grads), expected[name])
    for i, grad in zip(value_and_grad(name)[1], grads, strict=True):
        if CALLS[name][1][i - 1] in ("hidden", "kernel"):
            assert grad.sharding.is_equivalent_to(arrays[i].sharding, grad.ndim)
    assert_nothing_else_moves(program.as_text(), layout)


NAMED_LAYOUTS = (
    *("batch, sequence, vocabulary", "FSDP and vocabulary"),
    *("FSDP of the vocabulary", "vocabulary, then FSDP of it"),
)


@pytest.mark.covering
@pytest.mark.parametrize("layout", NAMED_LAYOUTS)
@pytest.mark.parametrize(
    "name", ["linear-all", "linear-probabilities", "linear-sparse", "linear-recompute", "linear-none"]
)
def test_linear_with_named_axes(expected, name, layout):
    """XLA:CPU sums gradients where others scatter them: tests/test_tpu_compiler.py looks at that."""
    (value, grads), program, _ = run(name, layout, "Named")
    assert_equal((value, grads), expected[name])
    found = numbers_alone_in_the_loop(program.as_text(), layout)
    gathered = sum(c.size for c in found if c.kind == "all-gather" and c.size >= KERNEL.size // 8)
    assert gathered <= sum(size for kind, size in MOVED.get(layout, []) if kind == "all-gather")


@pytest.mark.parametrize(
    ("name", "layout", "mode"),
    short(
        [
            *itertools.product(("linear-kl", "linear-js-none"), LAYOUTS, ("Auto", "Explicit")),
            *itertools.product(("linear-kl", "linear-js-none"), NAMED_LAYOUTS, ("Named",)),
        ],
        ("linear-kl", "FSDP and vocabulary", "Auto"),
        ("linear-kl", "vocabulary, then FSDP of it", "Explicit"),
        ("linear-js-none", "FSDP of the vocabulary, and it", "Auto"),
        ("linear-js-none", "batch, sequence, vocabulary", "Named"),
    ),
)
def test_linear_divergences_under_jit(expected, name, layout, mode):
    """In the loop no more moves than for one side."""
    (value, grads), program, arrays = run(name, layout, mode)
    assert_equal((value, grads), expected[name])
    for i, grad in zip(value_and_grad(name)[1], grads, strict=True):
        if mode != "Named" and CALLS[name][1][i - 1].startswith(("hidden", "kernel")):
            assert grad.sharding.is_equivalent_to(arrays[i].sharding, grad.ndim)
    numbers_alone_in_the_loop(program.as_text(), layout)


def assert_nothing_else_moves(text, layout):
    """Than `MOVED`, outside of the loop."""
    found = numbers_alone_in_the_loop(text, layout)
    large = sorted((c.kind, c.size) for c in found if c.size >= KERNEL.size // 8 and c.kind != "all-reduce")
    assert large == MOVED.get(layout, [])


def numbers_alone_in_the_loop(text, layout):
    """The collectives: in the loop only numbers per position. `block_size` counts the positions of all devices."""
    found = collectives(text)
    local_block = BLOCK // int(np.prod([LAYOUTS[layout][0].get(a, 1) for a in ("data", "sequence")]))
    assert " while(" in text  # or there would be one block, of more positions
    assert all(c.kind == "all-reduce" and c.size <= local_block for c in found if c.in_loop), found
    return found


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_one_axis_of_positions_under_jit(mode):
    """Its shards stay where they are, as those of two axes do."""
    mesh, layout = mesh_of(mode, data=4, vocab=2), "FSDP and vocabulary"
    arrays = HIDDEN.reshape(POSITIONS, FEATURES), KERNEL, LABELS.reshape(POSITIONS)
    step = jax.jit(jax.value_and_grad(partial(jxent.linear_cross_entropy, block_size=BLOCK), (0, 1)))
    sharded = [put(mesh, a, s) for a, s in zip(arrays, (P("data"), P("data", "vocab"), P("data")), strict=True)]
    program = step.lower(*sharded).compile()
    assert_equal(program(*sharded), step(*map(jnp.asarray, arrays)))
    assert_nothing_else_moves(program.as_text(), layout)


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_one_position_under_jit(mode):
    """Sharded by its features; alone, and as one of those that `vmap` goes over."""
    mesh, label = mesh_of(mode, data=4, vocab=2), jnp.array(3)
    arrays = jnp.asarray(HIDDEN[0, 0]), jnp.asarray(KERNEL)
    sharded = [put(mesh, a, s) for a, s in zip(arrays, (P("data"), P("data", "vocab")), strict=True)]
    step = jax.value_and_grad(jxent.linear_cross_entropy, (0, 1))
    wanted = jax.value_and_grad(lambda h, k: jxent.cross_entropy(h @ k, label), (0, 1))(*arrays)
    assert_equal(jax.jit(step)(*sharded, label), wanted)
    each = jax.jit(jax.vmap(step, (0, None, None)))(jnp.stack([arrays[0]] * 2), sharded[1], label)
    assert_equal(jax.tree.map(lambda a: a[1], each), wanted)


def test_without_shardy():
    """The partitioner that JAX had before, which asks for shardings in another way."""
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        (value, grads), program, arrays = run("linear-all", "FSDP and vocabulary", "Auto")
        assert_equal((value, grads), on_one_device("linear-all"))
        assert_nothing_else_moves(program.as_text(), "FSDP and vocabulary")
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    assert grads[1].sharding.is_equivalent_to(arrays[2].sharding, 2)


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    "name", ["linear", "linear-probabilities", "linear-sparse", "linear-none-sparse", "linear-recompute"]
)
def test_other_linear_losses_under_jit(expected, name, mode):
    assert_equal(run(name, "FSDP and vocabulary", mode)[0], expected[name])


@pytest.mark.covering("linear-all-mode2", *(f"cross_entropy-all-{mode}" for mode in ("Auto", "Explicit", "mode3")))
@pytest.mark.parametrize("mode", ["Auto", "Explicit", ("Auto", "Explicit"), ("Explicit", "Auto")])
@pytest.mark.parametrize("name", ["linear-all", "cross_entropy-all"])
def test_arrays_that_are_sharded_unlike_each_other(expected, name, mode):
    """The loss is that of one device whatever the shardings are; axes of both types in one mesh too."""
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
        assert_equal(actual, expected[name])


@pytest.mark.covering("13-64-7-Explicit", "16-61-32-Auto")
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize(("length", "vocab", "block_size"), [(13, 64, 7), (13, 64, None), (16, 61, 32), (16, 64, 3)])
def test_what_does_not_divide(length, vocab, block_size, mode):
    """Lengths, vocabularies and blocks that divide by nothing; what cannot be sharded evenly is not sharded here."""
    arrays = [HIDDEN[:, :length], KERNEL[:, :vocab], np.minimum(LABELS[:, :length], vocab - 1)]
    mesh = mesh_of(mode, data=4, vocab=2)
    specs = P("data"), P(None, "vocab" if vocab % 2 == 0 else None), P("data")

    @partial(jax.value_and_grad, argnums=(0, 1))
    def f(hidden, kernel, labels):
        if mode == "Auto":  # where a sharding within the program may be uneven
            hidden = lax.with_sharding_constraint(hidden, NamedSharding(mesh, P("data", "vocab")))
            kernel = lax.with_sharding_constraint(kernel, NamedSharding(mesh, P("data", "vocab")))
        return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=block_size)

    sharded = [put(mesh, a, spec) for a, spec in zip(arrays, specs, strict=True)]
    plain = jax.value_and_grad(lambda h, k, labels: jxent.cross_entropy(h @ k, labels), (0, 1))
    assert_equal(jax.jit(f)(*sharded), plain(*map(jnp.asarray, arrays)))


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_transformations_of_sharded_losses(mode):
    """Per-example losses, Hessian-vector products, checkpoints in a scan."""
    mesh = mesh_of(mode, data=4, vocab=2)
    arrays = HIDDEN, KERNEL, LABELS
    sharded = [put(mesh, a, s) for a, s in zip(arrays, (P("data"), P(None, "vocab"), P("data")), strict=True)]

    def loss(hidden, kernel, labels):
        return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=BLOCK)

    def each(hidden, kernel, labels):
        return jax.vmap(jax.value_and_grad(loss, 1), in_axes=(0, None, 0))(hidden, kernel, labels)

    def product(hidden, kernel, labels):
        return jax.jvp(lambda k: jax.grad(loss, 1)(hidden, k, labels), (kernel,), (jnp.cos(kernel),))[1]

    def scanned(hidden, kernel, labels):
        def step(kernel, total, scale):
            return total + jax.checkpoint(loss)(scale * hidden, kernel, labels), None

        return jax.grad(lambda kernel: lax.scan(partial(step, kernel), 0.0, jnp.arange(1.0, 3))[0])(kernel)

    for f in (each, product, scanned):
        assert_equal(jax.jit(f)(*sharded), jax.jit(f)(*map(jnp.asarray, arrays)))


@pytest.mark.covering
@pytest.mark.parametrize("way", ["Auto", "Explicit", "shard_map"])
@pytest.mark.parametrize("nan", [[0], [0, 4], [0, 8, 16, 24, 32, 40, 48, 56]])
def test_nan_is_not_passed_over(nan, way):
    """The largest of several numbers may be one of the others; where all shards have a NaN it may be -inf."""
    bias, hidden = BIAS.copy(), HIDDEN.copy()
    bias[nan] = np.nan
    hidden[1, 2, 3] = np.nan

    def f(logits, hidden, kernel, bias, labels, **axis_name):
        """What is NaN where one class is, and what is at all positions of `hidden` that have a NaN."""
        options = {"reduction": "none", **axis_name}
        return (
            jxent.cross_entropy(logits, labels, **options),
            jxent.linear_cross_entropy(HIDDEN, kernel, labels, bias=bias, **options),
            jxent.logsumexp(logits, **axis_name),
            jnp.sum(jxent.softmax(logits, **axis_name), -1),
        ), jxent.linear_cross_entropy(hidden, kernel, labels, **options)

    mesh = mesh_of("Auto" if way == "shard_map" else way, vocab=8)
    specs = P(None, None, "vocab"), P(), P(None, "vocab"), P("vocab"), P()
    arrays = [
        put(mesh, a, spec)
        for a, spec in zip((ARRAYS["logits"] + bias, hidden, KERNEL, bias, LABELS), specs, strict=True)
    ]
    if way == "shard_map":  # the results of every shard, one after the other

        def on_each(*arrays):
            return jax.tree.map(lambda a: a[None], f(*arrays, axis_name="vocab"))

        f_ = jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=P("vocab"), check_vma=False)
    else:
        f_ = f
    of_all, of_hidden = jax.tree.map(np.asarray, jax.jit(f_)(*arrays))
    counts = LABELS != -100
    for number, values in enumerate(of_all):
        assert values.shape == ((8, *LABELS.shape) if way == "shard_map" else LABELS.shape)
        assert np.isnan(values[..., counts] if number < 2 else values).all()
    np.testing.assert_array_equal(np.isnan(of_hidden), np.isnan(np.broadcast_to(hidden[..., 3], of_hidden.shape)))


def test_weights_without_a_mesh():
    """Class weights of one device, beside logits on a mesh of explicit axes."""
    mesh = mesh_of("Explicit", data=8)
    logits, labels = (put(mesh, ARRAYS[a], P("data")) for a in ("logits", "labels"))
    actual = jax.jit(jxent.cross_entropy)(logits, labels, class_weight=jnp.asarray(ARRAYS["class_weight"]))
    wanted = jxent.cross_entropy(*(jnp.asarray(ARRAYS[a]) for a in LOGITS[:2]), class_weight=ARRAYS["class_weight"])
    assert_equal(actual, wanted)


@pytest.mark.parametrize("single", ["hidden", "kernel", "labels"])
def test_an_array_without_a_mesh(expected, single):
    """One array of one device, beside others on a mesh of explicit axes."""
    mesh = mesh_of("Explicit", data=4, vocab=2)
    specs = {"hidden": P("data"), "kernel": P(None, "vocab"), "labels": P("data")}
    arrays = [jnp.asarray(ARRAYS[a]) if a == single else put(mesh, ARRAYS[a], specs[a]) for a in LINEAR[:3]]
    actual = jax.jit(jax.value_and_grad(linear_loss, (0, 1)))(*arrays)
    assert_equal(actual, expected["linear"])


@pytest.mark.covering("Explicit-P('data',)-bfloat16")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kernel", [P(), P("data"), P(None, "data")], ids=str)
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_16_bit_gradients_on_some_axes_of_a_mesh(mode, kernel, dtype):
    """Replicated over the other axis: XLA:CPU ends the process if it is to sum 16-bit numbers over some axes alone."""
    mesh = mesh_of(mode, data=4, unused=2)
    arrays = [jnp.asarray(HIDDEN, dtype), jnp.asarray(KERNEL, dtype), LABELS]
    step = jax.jit(jax.value_and_grad(partial(linear_loss, reduction="sum"), (0, 1)))
    loss, want = step(*arrays)
    hidden = P() if len(kernel) == 2 else P("data")
    got, grads = step(*(put(mesh, a, spec) for a, spec in zip(arrays, (hidden, kernel, hidden), strict=True)))
    np.testing.assert_allclose(got, loss, rtol=1e-6)
    for a, b in zip(grads, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=2 * float(jnp.finfo(dtype).eps) * np.max(np.abs(b)))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("Auto", "linear-all"),
        *short([("Explicit", "linear"), ("Explicit", "linear-none")], ("Explicit", "linear-none")),
    ],
)
def test_positions_on_a_mesh_of_the_caller(mode, name):
    """Inside a shard_map over the classes alone, the positions still sharded by jit."""
    mesh = mesh_of(mode, data=4, vocab=2)
    function, names, options = CALLS[name]
    # JAX has no gradient of indexing there for `Explicit` axes, which class weights would need.
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


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_a_16_bit_bias_gradient_is_rounded_once(mode):
    """After the sum over devices. Their shares are larger than it here, and so would be the errors of rounding them."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(8, 4, 3)).astype(np.float32), rng.normal(size=(3, 64)).astype(np.float32)
    labels, weights = rng.integers(0, 64, (8, 4)).astype(np.int32), np.ones((8, 4), np.float32)
    hidden[1::2], labels[1::2], weights[1::2] = 1.1 * hidden[::2], labels[::2], -1  # nearly the same again, taken off

    def loss(bias, hidden, kernel, labels, weights):
        return jxent.linear_cross_entropy(
            hidden, kernel, labels, bias=bias, sample_weight=weights, reduction="sum", recompute=True
        )

    gradient = jax.jit(jax.grad(loss))
    exact = np.asarray(gradient(jnp.zeros(64), hidden, kernel, labels, weights))
    mesh = mesh_of(mode, data=8)
    arrays = zip(
        (jnp.zeros(64, jnp.bfloat16), kernel, hidden, labels, weights), (P(), P(), *[P("data")] * 3), strict=True
    )
    bias, kernel, *positional = (put(mesh, array, spec) for array, spec in arrays)
    rounded = gradient(bias, positional[0], kernel, *positional[1:])
    chex.assert_type(rounded, jnp.bfloat16)
    error = np.abs(np.asarray(rounded, np.float32) - exact)
    assert (error <= 2**-8 * np.abs(exact) + 1e-6).all()  # half a unit in the last place, and sums in another order


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_prediction_in_float64(mode):
    """The compiler's threads, which lower the program of a device, do not know that float64 is switched on here."""
    rng = np.random.default_rng(1)
    hidden, kernel, labels = rng.normal(size=(8, 2, 3)), rng.normal(size=(3, 8)), np.zeros((8, 2), np.int32)
    mesh = mesh_of(mode, data=8)
    arrays = put(mesh, hidden, P("data")), put(mesh, kernel, P()), put(mesh, labels, P("data"))
    _, stats = jax.jit(partial(jxent.linear_cross_entropy, return_stats=True))(*arrays)
    np.testing.assert_array_equal(stats.prediction, np.argmax(hidden @ kernel, -1))


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_contexts_of_the_trace(mode):
    """What the program is made of is said where it is traced: lowering and compiling may come later, outside of it."""
    mesh = mesh_of(mode, data=4, vocab=2)
    specs = P("data"), P("data", "vocab"), P("data")
    arrays = [put(mesh, a, s) for a, s in zip((HIDDEN, KERNEL, LABELS), specs, strict=True)]
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        traced = jax.jit(jax.value_and_grad(linear_loss, (0, 1))).trace(*arrays)
    program = traced.lower().compile()
    dots = [line for line in program.as_text().splitlines() if " dot(" in line]
    assert len(dots) >= 3
    assert all("operand_precision={highest,highest}" in line for line in dots)
    assert_equal(program(*arrays), jax.value_and_grad(linear_loss, (0, 1))(*map(jnp.asarray, (HIDDEN, KERNEL, LABELS))))

    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    dots = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(dots) >= 3
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)
    if mode == "Auto":  # on the caller's mesh the kernel is gathered along its features, before the loop
        assert "sharding_constraint %arg1 <@mesh, [{}, {?}]>" in lowered[: lowered.index("stablehlo.while")]


# --- inside shard_map and vmap ----------------------------------------------------------------------------------------

SPECS = {
    **{"logits": P(None, None, "vocab"), "probabilities": P(None, None, "vocab"), "kernel": P(None, "vocab")},
    **{"bias": P("vocab"), "class_weight": P("vocab")},  # what has no classes is the same on every shard
    **{"logits_p": P(None, None, "vocab"), "kernel_p": P("vocab"), "bias_p": P("vocab")},
}


def mapped(name, shards, check_vma, inside=False):
    """The call under shard_map, the classes sharded: a function of the cotangents and the arrays."""
    f, wrt = value_and_grad(name, axis_name="vocab")
    specs = (P(), *(SPECS.get(a, P()) for a in CALLS[name][1]))
    f = jax.value_and_grad(f, wrt) if inside else f
    out = (P(), tuple(specs[i] for i in wrt)) if inside else P()
    f = jax.shard_map(f, mesh=mesh_of("Auto", vocab=shards), in_specs=specs, out_specs=out, check_vma=check_vma)
    return jax.jit(f if inside else jax.value_and_grad(f, wrt))


def arrays_of(name):
    return COTANGENTS, *(ARRAYS[a] for a in CALLS[name][1])


SOME = ("cross_entropy-all", "linear-all")


@pytest.mark.covering(
    *("8-linear-all-True", "8-linear-all-False", "8-cross_entropy-True", "8-nll_loss-False"),
    *("8-nll_loss-probabilities-False", "8-logsumexp-True", "8-logsumexp-False"),
)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("shards", "name"),
    short(
        [(n, name) for n in (1, 2, 4, 8) for name in (CALLS if n == 8 else SOME)],
        *((n, name) for n in (1, 2, 4) for name in SOME),
        *((8, name) for name in CALLS if name not in ("cross_entropy-sparse", "linear-none-sparse", "kl", "linear-kl")),
    ),
)
def test_axis_name_in_shard_map(expected, name, shards, check_vma):
    assert_equal(mapped(name, shards, check_vma)(*arrays_of(name)), expected[name])


@pytest.mark.parametrize("name", short(CALLS, *SOME, "cross_entropy-probabilities", "nll_loss", "logsumexp"))
def test_gradient_inside_shard_map(expected, name):
    assert_equal(mapped(name, 4, check_vma=True, inside=True)(*arrays_of(name)), expected[name])


@pytest.mark.parametrize("name", short((*SOME, "nll_loss", "logsumexp"), *SOME))
def test_gradient_inside_shard_map_unchecked(expected, name):
    """JAX then differentiates the sum of what the devices return: 4 times the loss. So it does for `lax.psum`."""
    f, wrt = value_and_grad(name, axis_name="vocab")
    specs = (P(), *(SPECS.get(a, P()) for a in CALLS[name][1]))

    def inside(*arrays):
        value, grads = jax.value_and_grad(f, wrt)(*arrays)
        # What every device has a copy of has a gradient for each copy.
        return value, tuple(g if specs[i] != P() else lax.psum(g, "vocab") for i, g in zip(wrt, grads, strict=True))

    f_ = jax.shard_map(
        inside,
        mesh=mesh_of("Auto", vocab=4),
        in_specs=specs,
        out_specs=(P(), tuple(specs[i] for i in wrt)),
        check_vma=False,
    )
    value, grads = jax.jit(f_)(*arrays_of(name))
    assert_equal((value, jax.tree.map(lambda g: g / 4, grads)), expected[name])


SECOND_DERIVATIVES = pytest.mark.parametrize(
    "name", ["cross_entropy", "cross_entropy-all", "cross_entropy-probabilities", "linear", "linear-all", "logsumexp"]
)


def argument_of(name):
    """Which argument of `value_and_grad(name)` is sharded over the vocabulary."""
    return 2 if "linear" in name else 1


def hessian_vector_product(f, argument, order, *arrays):
    """That of the function of one of its arguments; the direction is the cosine of the argument."""
    arrays = list(map(jnp.asarray, arrays))
    at, direction = arrays[argument], jnp.cos(arrays[argument])

    def gradient(at):
        return jax.grad(f, argument)(*arrays[:argument], at, *arrays[argument + 1 :])

    def tangent(at):
        return jax.jvp(lambda at: f(*arrays[:argument], at, *arrays[argument + 1 :]), (at,), (direction,))[1]

    if order == "forward over reverse":
        return jax.jvp(gradient, (at,), (direction,))[1]
    return jax.grad(tangent if order == "reverse over forward" else lambda at: jnp.vdot(gradient(at), direction))(at)


@pytest.mark.covering("linear-all-reverse over forward")
@pytest.mark.parametrize("order", ["forward over reverse", "reverse over forward", "reverse over reverse"])
@SECOND_DERIVATIVES
def test_second_derivatives_in_shard_map(name, order):
    """A Hessian-vector product by what is sharded, one shard of it on each device."""
    argument, (whole, _), (f, _) = argument_of(name), value_and_grad(name), value_and_grad(name, axis_name="vocab")
    specs = (P(), *(SPECS.get(a, P()) for a in CALLS[name][1]))
    product = partial(hessian_vector_product, f, argument, order)
    product = jax.shard_map(product, mesh=mesh_of("Auto", vocab=4), in_specs=specs, out_specs=specs[argument])
    wanted = jax.jit(partial(hessian_vector_product, whole, argument, order))(*arrays_of(name))
    assert_equal(jax.jit(product)(*arrays_of(name)), wanted)


def in_shards(array, axis):
    """Four shards of the axis, along an axis of their own; None for no axis."""
    if axis is None:
        return jnp.asarray(array)
    return array.reshape(*array.shape[:axis], 4, -1, *array.shape[axis + 1 :])


def mapped_by_vmap(name):
    """(the loss as a function of arrays `in_shards`, the axes of these, None for an array in one piece)."""
    f, _ = value_and_grad(name, axis_name="vocab")
    axes = (None, *(SPECS[a].index("vocab") if a in SPECS else None for a in CALLS[name][1]))
    over_shards = jax.vmap(f, in_axes=axes, axis_name="vocab")
    return lambda *arrays: over_shards(*arrays)[0], axes


@pytest.mark.parametrize("name", short((*SOME, "cross_entropy-probabilities", "nll_loss"), *SOME, "nll_loss"))
def test_axis_name_in_vmap(expected, name):
    (f, axes), (_, wrt) = mapped_by_vmap(name), value_and_grad(name)
    arrays = map(in_shards, arrays_of(name), axes)
    value, grads = jax.jit(jax.value_and_grad(f, wrt))(*arrays)
    wanted = expected[name][0], tuple(in_shards(g, axes[i]) for i, g in zip(wrt, expected[name][1], strict=True))
    assert_equal((value, grads), wanted)


@pytest.mark.covering("linear-all-reverse over forward")
@pytest.mark.parametrize("order", ["forward over reverse", "reverse over forward", "reverse over reverse"])
@SECOND_DERIVATIVES
def test_second_derivatives_in_vmap(name, order):
    argument, (whole, _), (f, axes) = argument_of(name), value_and_grad(name), mapped_by_vmap(name)
    product = jax.jit(partial(hessian_vector_product, f, argument, order))(*map(in_shards, arrays_of(name), axes))
    wanted = jax.jit(partial(hessian_vector_product, whole, argument, order))(*arrays_of(name))
    assert_equal(product, in_shards(wanted, axes[argument]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["cross_entropy", "linear"])
def test_third_derivatives_in_vmap(name):
    """In every order of the modes; but of the linear loss, where the second is reverse, JAX finds none of `pmax`."""
    argument, (whole, _), (f, axes) = argument_of(name), value_and_grad(name), mapped_by_vmap(name)

    def along(f, modes, *arrays):
        arrays = list(map(jnp.asarray, arrays))
        direction = jnp.cos(arrays[argument])

        def of_one(f, mode):
            if mode == "f":
                return lambda at: jax.jvp(f, (at,), (direction,))[1]
            return lambda at: jnp.vdot(jax.grad(f)(at), direction)

        def g(at):
            return f(*arrays[:argument], at, *arrays[argument + 1 :])

        for mode in reversed(modes):
            g = of_one(g, mode)
        return g(arrays[argument])

    for modes in itertools.product("fr", repeat=3):
        run = jax.jit(partial(along, f, modes))
        shards = list(map(in_shards, arrays_of(name), axes))
        if name == "linear" and modes[1] == "r":
            with pytest.raises(NotImplementedError, match="pmax"):
                run(*shards)
        else:
            assert_equal(run(*shards), jax.jit(partial(along, whole, modes))(*arrays_of(name)))


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


def test_classes_over_two_axes(expected):
    """The axes in the order of the partition spec."""
    f, wrt = value_and_grad("linear-all", axis_name=("outer", "inner"))
    both = {name: P(*(("outer", "inner") if e == "vocab" else e for e in spec)) for name, spec in SPECS.items()}
    specs = (P(), *(both.get(a, P()) for a in LINEAR))
    f = jax.shard_map(f, mesh=mesh_of("Auto", inner=2, outer=4), in_specs=specs, out_specs=P())
    assert_equal(jax.jit(jax.value_and_grad(f, wrt))(*arrays_of("linear-all")), expected["linear-all"])


@pytest.mark.parametrize(
    "name", short(("linear", "linear-recompute", "cross_entropy-all"), "linear", "cross_entropy-all")
)
def test_labels_typed_as_varying(expected, name):
    """As after an `all_gather`: the loss then varies by its type, too, and every shard has a cotangent of its own."""
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
    assert_equal(jax.jit(jax.value_and_grad(sharded, wrt))(*arrays_of(name)), expected[name])


@pytest.mark.parametrize("label_smoothing", short((0.0, 0.1), 0.1))
def test_padded_vocabulary(label_smoothing):
    """61 classes on 8 shards of 8: a bias of -inf makes the padding no class."""
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


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "linear"])
def test_labels_out_of_range_on_shards(name):
    """NaN at their own position, on whatever shard a wrapped or clamped index would fall; and `checkify` names them."""
    labels = LABELS.copy()
    labels[1, :4] = [-1, -8, VOCAB, VOCAB + 8]
    function, names, _ = CALLS[name]
    f = jax.shard_map(
        partial(function, axis_name="vocab", reduction="none"),
        mesh=mesh_of("Auto", vocab=8),
        in_specs=tuple(SPECS.get(a, P()) for a in names),
        out_specs=P(),
    )
    arrays = [jnp.asarray(labels if a == "labels" else ARRAYS[a]) for a in names]
    losses, pull = jax.vjp(jax.jit(f), *arrays)
    bad = np.zeros_like(labels, bool)
    bad[1, :4] = True
    np.testing.assert_array_equal(np.isnan(losses), bad)
    np.testing.assert_array_equal(np.isnan(pull(jnp.ones_like(losses))[0]).all(-1), bad)
    error, _ = jax.jit(checkify.checkify(f, errors=checkify.user_checks))(*arrays)
    with pytest.raises(checkify.JaxRuntimeError, match=rf"label -1 is out of range for {VOCAB} classes, at \[1 0\]"):
        error.throw()


@pytest.mark.covering("nll_loss-Explicit", "linear-Explicit")
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy-probabilities", "nll_loss", "linear"])
def test_checkify_on_meshes(name, mode):
    """It names what is bad in sharded arrays, and which example it is under `vmap`."""
    function, names, options = CALLS[name]
    # checkify cannot have a `shard_map` over some axes of a mesh: with `vmap` there is no report.
    alone = name == "linear" and mode == "Explicit"
    mesh, specs = mesh_of(mode, **LAYOUTS["batch, sequence, vocabulary"][0]), specs_of("batch, sequence, vocabulary")
    in_axes = [0 if specs[a][:1] == ("data",) else None for a in names]

    def of_examples(*arrays):
        return jnp.sum(jax.vmap(partial(function, **options), in_axes)(*arrays))

    def errors(arrays):
        arrays = [put(mesh, arrays[a], specs[a]) for a in names]
        for f in (partial(function, **options), of_examples, jax.grad(of_examples)):
            # On `Explicit` axes JAX cannot read the error of a program with a `shard_map` in it as it is.
            yield jax.device_get(jax.jit(checkify.checkify(f, errors=checkify.user_checks))(*arrays)[0])

    bad = {name: ARRAYS[name].copy() for name in ("labels", "probabilities")}
    bad["labels"][1, 2] = VOCAB
    bad["probabilities"][1, 2] *= 2
    said = rf"label {VOCAB} is out of range .* at \[1 2\]" if "labels" in names else r"sum to 2\.0 .* at \[1 2\]"
    for error in errors(ARRAYS):
        assert error.get() is None
    for number, error in enumerate(errors(ARRAYS | bad)):
        if alone and number > 0:
            assert error.get() is None
            continue
        with pytest.raises(checkify.JaxRuntimeError, match=said):
            error.throw()


def test_what_moves_in_shard_map():
    """Numbers per position, and one sum of the gradient of the hidden states."""
    program = mapped("linear-all", 8, check_vma=True).lower(*arrays_of("linear-all")).compile()
    found = collectives(program.as_text())
    assert all(c.kind == "all-reduce" for c in found)
    assert all(c.size <= BLOCK for c in found if c.in_loop)
    assert [c.size for c in found if c.size > POSITIONS] == [HIDDEN.size]


# --- forward mode -----------------------------------------------------------------------------------------------------


def along(name, second, f=None, **more):
    """The call and its derivative along the cosines of all floating-point arguments; for `second` its gradient too.

    `f` is the call, if it is to be made in another way.
    """
    plain, wrt = value_and_grad(name, **more)
    f = plain if f is None else f

    def derivatives(*arrays):
        arrays = list(map(jnp.asarray, arrays))
        at = tuple(arrays[i] for i in wrt)

        def derivative(*at):
            def moving(*at):
                every = dict(enumerate(arrays)) | dict(zip(wrt, at, strict=True))
                return f(*every.values())

            return jax.jvp(moving, at, tuple(map(jnp.cos, at)))

        if not second:
            return derivative(*at)
        return derivative(*at), jax.grad(lambda *at: derivative(*at)[1], tuple(range(len(at))))(*at)

    return derivatives


MOVING = (
    *("cross_entropy", "cross_entropy-all", "cross_entropy-probabilities", "nll_loss-probabilities"),
    *("linear-all", "linear-probabilities", "linear-none"),
    *("cross_entropy-sparse", "nll_loss-sparse", "linear-sparse", *DIVERGENCES),
)
SHORT_MOVING = (*MOVING[:5], "linear-none", "linear-kl")
SECOND = ("cross_entropy-probabilities", "linear-none")


@pytest.mark.covering("linear-none-Auto", "cross_entropy-probabilities-Explicit")
@pytest.mark.parametrize("mode", ["Auto", "Explicit", "Named"])
@pytest.mark.parametrize("name", short(MOVING, *SHORT_MOVING))
def test_forward_mode_under_jit(name, mode):
    layout = "FSDP and vocabulary" if "linear" in name else "batch, sequence, vocabulary"
    names = axes_of(name, layout) if mode == "Named" else {}
    mesh, specs = mesh_of("Auto" if mode == "Named" else mode, **LAYOUTS[layout][0]), specs_of(layout)
    arrays = [put(mesh, COTANGENTS, specs["labels"]), *(put(mesh, ARRAYS[a], specs[a]) for a in CALLS[name][1])]
    program = jax.jit(along(name, second=False, **names)).lower(*arrays).compile()
    assert_equal(program(*arrays), jax.jit(along(name, second=False))(*arrays_of(name)))
    if name in SECOND:
        assert_equal(jax.jit(along(name, True, **names))(*arrays), jax.jit(along(name, True))(*arrays_of(name)))
    text = program.as_text()
    if "linear" in name:
        found = numbers_alone_in_the_loop(text, layout)
        gathered = sum(c.size for c in found if c.kind == "all-gather" and c.size >= KERNEL.size // 8)
        # The kernel and its tangent, of one side or of two.
        times = 4 if name in DIVERGENCES else 2
        assert gathered <= times * sum(size for kind, size in MOVED.get(layout, []) if kind == "all-gather")
        assert all(c.size <= POSITIONS for c in found if c.kind != "all-gather")
    else:
        assert all(c.size <= POSITIONS * 8 for c in collectives(text))


@pytest.mark.parametrize("mode", ["Auto", "Explicit", "Named", "checked", "unchecked"])
@pytest.mark.parametrize("name", short(("linear-sparse", "js-none", "linear-kl")))
def test_gradients_of_tangents(name, mode):
    """Reverse over forward, as the tests below have it of `SECOND`."""
    if mode in ("checked", "unchecked"):
        specs = (P(), *(SPECS.get(a, P()) for a in CALLS[name][1]))
        f, _ = value_and_grad(name, axis_name="vocab")
        mesh, checked = mesh_of("Auto", vocab=4), mode == "checked"
        mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=checked)
        found = jax.jit(along(name, True, mapped))(*arrays_of(name))
    else:
        layout = "FSDP and vocabulary" if "linear" in name else "batch, sequence, vocabulary"
        mesh, specs = mesh_of("Auto" if mode == "Named" else mode, **LAYOUTS[layout][0]), specs_of(layout)
        arrays = [put(mesh, COTANGENTS, specs["labels"]), *(put(mesh, ARRAYS[a], specs[a]) for a in CALLS[name][1])]
        found = jax.jit(along(name, True, **(axes_of(name, layout) if mode == "Named" else {})))(*arrays)
    assert_equal(found, jax.jit(along(name, True))(*arrays_of(name)))


@pytest.mark.covering("linear-none-True-False")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", short(MOVING, *SHORT_MOVING))
def test_forward_mode_in_shard_map(name, check_vma, inside):
    """Of the mapped loss, or of each device's within the map."""
    specs = (P(), *(SPECS.get(a, P()) for a in CALLS[name][1]))
    mapped = partial(jax.shard_map, mesh=mesh_of("Auto", vocab=4), in_specs=specs, check_vma=check_vma)
    second = name in SECOND and not inside
    if inside:
        f = mapped(along(name, second, axis_name="vocab"), out_specs=P())
    else:
        f = along(name, second, mapped(value_and_grad(name, axis_name="vocab")[0], out_specs=P()))
    wanted = along(name, second)
    assert_equal(jax.jit(f)(*arrays_of(name)), jax.jit(wanted)(*arrays_of(name)))


# --- positions sharded inside shard_map -------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize(("check_vma", "inside"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "name",
    [
        *("cross_entropy-all", "cross_entropy-probabilities", "cross_entropy-sparse", "linear-all", "linear-sparse"),
        *("nll_loss", "kl", "linear-kl"),
    ],
)
def test_batch_axis_name(name, reduction, check_vma, inside):
    """Uneven masks, nothing that counts on one device: the loss and the gradients of the whole batch, as they are."""
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
    """The positions by hand, the classes by the compiler."""
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


def test_no_positions():
    """Batches of nothing are no special case: the sum is 0, and so are its gradients."""
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


# --- axes of the mesh in use, by name ---------------------------------------------------------------------------------

NAMED = "batch, sequence, vocabulary"
OVER_ALL = {"axis_name": "vocab", "batch_axis_name": P("data", "sequence")}
NO_NAMES = {"axis_name": None, "batch_axis_name": None}


@pytest.mark.parametrize("how", ["set_mesh", "the arrays' mesh", "not jitted", "Explicit", "with mesh"])
def test_the_mesh_in_use(how):
    """Is that of `jax.set_mesh`, or that of the arrays; the results are sharded as the positions."""
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
    """Only the classes are named: the positions stay as they are."""
    mesh, spec = mesh_of(mode, data=4, vocab=2), P("data", None, "vocab")
    f = partial(SOFTMAXES[name], axis_name="vocab", where=np.arange(VOCAB) % 3 > 0)
    program = jax.jit(f).lower(put(mesh, ARRAYS["logits"], spec)).compile()
    out = program(put(mesh, ARRAYS["logits"], spec))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    assert_equal(jax.device_get(out), SOFTMAXES[name](ARRAYS["logits"], where=np.arange(VOCAB) % 3 > 0))
    assert all(c.kind == "all-reduce" and c.size <= POSITIONS // 4 for c in collectives(program.as_text()))


def test_named_axes_of_other_layouts():
    """Classes along another axis than the last; hidden states that are gathered, over the batch or along the length."""
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


def test_export_with_named_axes():
    """For several devices, and lowered for a mesh without devices; `custom_partitioning` can do neither."""
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


def test_names_of_the_mesh_inside_shard_map():
    """JAX cannot differentiate `Explicit` axes inside `shard_map`."""
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
    """JAX shows its mesh to no function; arrays that are on the mesh show it themselves (`test_the_mesh_in_use`)."""
    mesh = mesh_of("Auto", data=4, vocab=2)
    f = partial(jxent.linear_cross_entropy, batch_axis_name="data", axis_name="vocab")
    if how == "in_shardings":
        f = jax.jit(f, in_shardings=[NamedSharding(mesh, spec) for spec in (P("data"), P(), P("data"))])
    with mesh, pytest.raises(ValueError, match=r"\"with mesh:\", whose axes are \('data', 'vocab'\).*jax.set_mesh"):
        f(HIDDEN, KERNEL, LABELS)


def test_named_axes_of_examples():
    """`vmap` over examples, each of whose positions and classes are sharded; a mask that is broadcast is not."""
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


def test_error_without_a_mesh():
    message = (
        r"axis_name='vocab' names no axis .*, and no mesh .* jax.set_mesh\(mesh\), .* jax.shard_map, .* one device"
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(partial(jxent.linear_cross_entropy, axis_name="vocab"))(HIDDEN, KERNEL, LABELS)


@pytest.mark.parametrize("what", WRONG_NAMES)
def test_errors_of_named_axes(what):
    options, message = WRONG_NAMES[what]
    hidden, labels = (a[0, 0] if what == "one position" else a[:4] for a in (HIDDEN, LABELS))
    with jax.set_mesh(mesh_of("Auto", data=4, vocab=2)), pytest.raises(ValueError, match=message):
        jxent.linear_cross_entropy(hidden, KERNEL[:, :60], labels, **options)


# --- several processes ------------------------------------------------------------------------------------------------

# What each of them runs; the first one writes what they agree on.
PROCESS = r"""
import sys
import jax, jax.numpy as jnp, numpy as np, jxent
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

address, processes, index, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, index, initialization_timeout=60)
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 4 // processes
rng = np.random.default_rng(5)
arrays = rng.normal(size=(8, 6, 12)), rng.normal(size=(12, 32)), rng.integers(0, 32, (8, 6)).astype(np.int32)
arrays[2][0] = -100

def loss(hidden, kernel, labels):
    return jxent.linear_cross_entropy(hidden, kernel, labels, label_smoothing=0.1, block_size=16)

results = []
for mode in ("Auto", "Explicit"):
    mesh = jax.make_mesh((2, 2), ("data", "vocab"), axis_types=(AxisType[mode],) * 2)
    for kernel in (P(None, "vocab"), P("data", "vocab")):
        specs = P("data"), kernel, P("data")
        put = [
            jax.make_array_from_callback(a.shape, NamedSharding(mesh, s), lambda i, a=a: a[i])
            for a, s in zip(arrays, specs)
        ]
        # Every process gets all of the gradients, to compare them.
        f = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=NamedSharding(mesh, P()))
        value, grads = f(*put)
        results += [np.asarray(a.addressable_data(0)) for a in (value, *grads)]
if index == 0:
    np.savez(f"{folder}/{processes}.npz", *results)
if processes > 1:
    jax.distributed.shutdown()
"""


def run_processes(number, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [[sys.executable, "-c", PROCESS, address, str(number), str(i), str(folder)] for i in range(number)]
    environment = os.environ | {"XLA_FLAGS": ""}
    started = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for c in commands
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()
            process.wait()
    with np.load(folder / f"{number}.npz") as file:
        return [file[name] for name in file]


@pytest.mark.exhaustive
def test_two_processes(tmp_path):
    """Two devices each, over the loopback interface; the time limit is that of `run_processes`."""
    two, one = run_processes(2, tmp_path), run_processes(1, tmp_path)
    assert len(two) == 12
    assert_equal(two, one)
    for i in range(3):
        assert_equal(two[i], two[i + 3])
