"""Calls on meshes: their arrays, and their results on one device, which sharding must not change.

`CALLS` has the calls by name. Tests run `value_and_grad(name)` on a mesh, and compare with `on_one_device(name)`.
sharded_layouts.py says how `jax.jit` shards the arrays, and `SPECS` how `jax.shard_map` does.
"""

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jxent

# --- arrays -----------------------------------------------------------------------------------------------------------


BATCH, LENGTH, FEATURES, VOCAB = 8, 16, 24, 64
POSITIONS = BATCH * LENGTH
BLOCK = 32
RNG = np.random.default_rng(11)
KERNEL = 0.5 * RNG.normal(size=(FEATURES, VOCAB))
HIDDEN = RNG.normal(size=(BATCH, LENGTH, FEATURES))
BIAS = RNG.normal(size=VOCAB)
# The first and the last class of each of 8 shards, and random classes.
LABELS = np.concatenate([np.arange(0, VOCAB, 8), np.arange(7, VOCAB, 8), RNG.integers(0, VOCAB, POSITIONS - 16)])
LABELS = RNG.permutation(LABELS).astype(np.int32).reshape(BATCH, LENGTH)
LABELS[0, :5] = -100
LABELS[3] = -100  # all labels of one device of eight
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
    "kernel_p": 0.5 * RNG.normal(size=(VOCAB, 16)),  # with the vocabulary first
    "bias_p": RNG.normal(size=VOCAB),
    "temperature": np.array(1.5),
    "temperatures": np.linspace(0.7, 1.6, BATCH)[:, None],  # of sequences
}
ARRAYS["logits_p"] = ARRAYS["hidden_p"] @ ARRAYS["kernel_p"].T
COTANGENTS = RNG.normal(size=(BATCH, LENGTH))


# --- calls ------------------------------------------------------------------------------------------------------------


def weighed(losses, cotangents):
    """The sum of the losses times the cotangents; a loss that is one number stays as it is."""
    return jnp.sum(losses * cotangents) if losses.ndim else losses


def logits_loss(logits, labels, class_weight=None, sample_weight=None, temperature=1.0, **options):
    weights = {"class_weight": class_weight, "sample_weight": sample_weight, "temperature": temperature}
    return jxent.cross_entropy(logits, labels, **weights, **options)


def linear_loss(hidden, kernel, labels, bias=None, class_weight=None, sample_weight=None, temperature=1.0, **options):
    weights = {"bias": bias, "class_weight": class_weight, "sample_weight": sample_weight, "temperature": temperature}
    return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=BLOCK, **weights, **options)


def of_sparse(loss, *arrays, **options):
    """A loss of these arrays, in which `indices` and `shares` stand in the place of labels."""
    at = 2 if loss in (linear_loss, linear_sigmoid) else 1
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


def linear_sigmoid(hidden, kernel, labels, bias=None, pos_weight=None, sample_weight=None, **options):
    weights = {"bias": bias, "pos_weight": pos_weight, "sample_weight": sample_weight}
    return jxent.linear_sigmoid_cross_entropy(hidden, kernel, labels, block_size=BLOCK, **weights, **options)


SMOOTH = {"label_smoothing": 0.1, "z_loss_weight": 0.01, "logit_softcap": 6.0}
LOGITS = ("logits", "labels", "class_weight", "sample_weight")
LINEAR = ("hidden", "kernel", "labels", "bias", "class_weight", "sample_weight")
SPARSE = ("indices", "shares")
PAIR = ("logits_p", "logits", "temperature", "sample_weight")
LINEAR_PAIR = ("hidden_p", "kernel_p", "hidden", "kernel", "bias_p", "bias", *PAIR[2:])
BY_SEQUENCE = (*LINEAR_PAIR[:6], "temperatures", "sample_weight")
# name: (loss, the names of its arguments, options)
CALLS = {
    "cross_entropy": (logits_loss, LOGITS[:2], {}),
    "cross_entropy-all": (logits_loss, LOGITS, SMOOTH),
    "cross_entropy-probabilities": (logits_loss, ("logits", "probabilities", *LOGITS[2:]), SMOOTH),
    "cross_entropy-none": (logits_loss, (*LOGITS, "temperature"), {"reduction": "none"}),
    "cross_entropy-stats": (partial(with_stats, logits_loss), (*LOGITS, "temperatures"), {}),
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
    "linear-recompute": (linear_loss, (*LINEAR, "temperatures"), {"recompute": True, **SMOOTH}),
    "linear-none": (linear_loss, LINEAR, {"reduction": "none", **SMOOTH}),
    "linear-stats": (partial(with_stats, linear_loss), LINEAR, SMOOTH),
    "linear-none-stats": (
        *(partial(with_stats, linear_loss), (*LINEAR, "temperature")),
        {"reduction": "none", **SMOOTH},
    ),
    "kl": (partial(divergence, jxent.kl_divergence), PAIR, {}),
    "js-none": (partial(divergence, jxent.js_divergence), PAIR, {"beta": 0.3, "reduction": "none"}),
    "tv": (partial(divergence, jxent.tv_distance), PAIR, {}),
    "linear-kl": (partial(linear_divergence, jxent.linear_kl_divergence), LINEAR_PAIR, {}),
    "linear-js-none": (partial(linear_divergence, jxent.linear_js_divergence), BY_SEQUENCE, {"reduction": "none"}),
    "linear-tv": (partial(linear_divergence, jxent.linear_tv_distance), LINEAR_PAIR, {}),
    "linear-sigmoid": (linear_sigmoid, LINEAR, {"label_smoothing": 0.1}),
    "linear-sigmoid-sparse": (
        partial(of_sparse, linear_sigmoid),
        (*LINEAR[:2], *SPARSE, *LINEAR[3:]),
        {"reduction": "none"},
    ),
}
DIVERGENCES = ("kl", "js-none", "tv", "linear-kl", "linear-js-none", "linear-tv")
# Not losses: their cotangents have the shape of the logits.
SOFTMAXES = {"softmax": jxent.softmax, "log_softmax": jxent.log_softmax}


def floating(names):
    return tuple(i for i, name in enumerate(names) if name not in ("labels", "indices"))


def value_and_grad(name, **more):
    """(The call as a function of `arrays_of(name)`, the numbers of its floating-point arguments)."""
    function, names, options = CALLS[name]

    def f(cotangents, *arrays):
        return weighed(function(*arrays, **options, **more), cotangents)

    return f, tuple(i + 1 for i in floating(names))


def arrays_of(name):
    """The cotangents, and the arguments of the call."""
    return COTANGENTS, *(ARRAYS[a] for a in CALLS[name][1])


@functools.cache
def on_one_device(name):
    """The value and the gradients without a mesh."""
    assert jax.config.jax_enable_x64
    f, wrt = value_and_grad(name)
    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(f, wrt))(*arrays_of(name)))


def assert_equal(actual, wanted):
    chex.assert_trees_all_close(actual, wanted, rtol=1e-10, atol=1e-12)


# --- meshes -----------------------------------------------------------------------------------------------------------


def mesh_of(mode, **axes):
    devices = np.array(jax.devices()[: int(np.prod([*axes.values()]))])
    kinds = (AxisType[mode],) * len(axes) if isinstance(mode, str) else tuple(AxisType[kind] for kind in mode)
    return jax.sharding.Mesh(devices.reshape([*axes.values()]), tuple(axes), axis_types=kinds)


def put(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


# Every shard has a copy of each array without classes.
SPECS = {
    **{"logits": P(None, None, "vocab"), "probabilities": P(None, None, "vocab"), "kernel": P(None, "vocab")},
    **{"bias": P("vocab"), "class_weight": P("vocab")},
    **{"logits_p": P(None, None, "vocab"), "kernel_p": P("vocab"), "bias_p": P("vocab")},
}


def specs_in_shard_map(name):
    """The specs of `arrays_of(name)` for a `shard_map` over the classes."""
    return (P(), *(SPECS.get(a, P()) for a in CALLS[name][1]))


def in_shards(array, axis):
    """The array in four shards of the axis, along a new axis; the whole array if the axis is None."""
    if axis is None:
        return jnp.asarray(array)
    return array.reshape(*array.shape[:axis], 4, -1, *array.shape[axis + 1 :])


def mapped_by_vmap(name):
    """(The loss as a function of arrays `in_shards`, the axes of these shards)."""
    f, _ = value_and_grad(name, axis_name="vocab")
    axes = (None, *(SPECS[a].index("vocab") if a in SPECS else None for a in CALLS[name][1]))
    over_shards = jax.vmap(f, in_axes=axes, axis_name="vocab")
    return lambda *arrays: over_shards(*arrays)[0], axes
