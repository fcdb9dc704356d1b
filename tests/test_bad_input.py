"""Bad input is named: what cannot be right raises at trace time, and a label out of range shows as NaN and in checkify.

A message names the function, the argument, what was wanted, what came, and the remedy where there is one. The table
below holds one row per thing that can be wrong with an argument; each row is tried eagerly and under transformations.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jxent
from jxent._loss import reports

N, C, F = 5, 7, 3
RNG = np.random.default_rng(20240611)
LOGITS = RNG.normal(size=(N, C)).astype(np.float32)
LABELS = np.array([1, 0, 6, 3, 2])
PROBABILITIES = RNG.dirichlet(np.ones(C), N).astype(np.float32)
LOSSES = {"nll_loss": "log_probs", "cross_entropy": "logits"}
LINEAR = "linear_cross_entropy"
SOFTMAXES = ("logsumexp", "softmax", "log_softmax")
DIVERGENCES = ("kl_divergence", "js_divergence")
BINARY = "sigmoid_cross_entropy"
LINEAR_DIVERGENCES = ("linear_kl_divergence", "linear_js_divergence")

SPARSE = jxent.SparseLabels(np.zeros((N, 2), np.int32), np.full((N, 2), 0.5, np.float32))
FLAX_LAYER = nnx.Linear(F, C, rngs=nnx.Rngs(0))
FLAX_EMBEDDING = nnx.Embed(C, F, rngs=nnx.Rngs(0))

# --- the table --------------------------------------------------------------------------------------------------------


# What to do about an option that is an array, traced or not.
STATIC = "static: .*static_argnames"


class Row(NamedTuple):
    """A call that raises, and what its message says: these patterns, in this order, after the function's name."""

    function: str
    argument: str
    what: str
    arguments: dict[str, Any]  # those that differ from a good call
    error: type[Exception]
    says: tuple[str, ...]


def ints(*shape):
    return jnp.zeros(shape, jnp.int32)


def floats(*shape):
    return jnp.ones(shape, jnp.float32)


def good(function):
    """The arguments of a good call, as arrays."""
    if function == "next_token_labels":
        return {"tokens": jnp.asarray(LABELS, jnp.int32)}
    if function in SOFTMAXES:
        return {"logits": jnp.asarray(LOGITS)}
    if function == LINEAR:
        return {"hidden": floats(N, F), "kernel": floats(F, C), "labels": jnp.asarray(LABELS, jnp.int32)}
    if function == BINARY:
        return {"logits": jnp.asarray(LOGITS), "labels": ints(N, C)}
    if function in DIVERGENCES:
        return {"logits_p": jnp.asarray(LOGITS), "logits_q": floats(N, C)}
    if function in LINEAR_DIVERGENCES:
        of_p = {"hidden_p": floats(N, F), "kernel_p": floats(F, C)}
        return of_p | {"hidden_q": floats(N, F + 1), "kernel_q": floats(F + 1, C)}
    return {LOSSES[function]: jnp.asarray(LOGITS), "labels": jnp.asarray(LABELS, jnp.int32)}


def rows_of(function, argument, *table, **others):
    """Rows from tuples (what, value, error, *says); `others` go with each call."""
    return [Row(function, argument, what, {argument: v} | others, error, says) for what, v, error, *says in table]


def scores_rows(function, name):
    """The first argument, whose dtype and whose being an array are checked alike everywhere."""
    wanted = "must be floating point .*float16, bfloat16, float32, float64"
    return rows_of(
        function,
        name,
        ("int", ints(N, C), TypeError, wanted, "got int32", "astype"),
        ("bool", jnp.ones((N, C), bool), TypeError, wanted, "got bool", "astype"),
        ("complex", jnp.ones((N, C), jnp.complex64), TypeError, wanted, "got complex64"),
        (
            "float8",
            jnp.ones((N, C), jnp.float8_e4m3fn),
            TypeError,
            wanted,
            "got float8_e4m3fn",
            r"jnp\.bfloat16.*scale",
        ),
        ("int-list", [[1, 2], [0, 1]], TypeError, wanted, "got int32", rf"jnp\.asarray\({name}, jnp\.float32\)"),
        ("sparse", SPARSE, TypeError, "must be an array", "got SparseLabels", "labels"),
        ("tuple-of-arrays", tuple(SPARSE), TypeError, "must be an array", "got a tuple of 2 arrays"),
        ("record", jxent.Stats(*[floats()] * len(jxent.Stats._fields)), TypeError, "got a Stats", "one of its fields"),
        ("parameters", {"kernel": 1, "bias": 0}, TypeError, "must be an array", "keys 'kernel', 'bias'$"),
        ("boxed", linen.Partitioned(floats(N, C), (None, None)), TypeError, "must be an array", r"\.unbox\(\)"),
        ("layer", FLAX_LAYER, TypeError, "must be an array", r"pass its \.kernel$"),
        ("embedding", FLAX_EMBEDDING, TypeError, "must be an array", r"\.embedding with vocab_axis=0$"),
        ("none", None, TypeError, "must be an array", "got None"),
        ("text", "logits", TypeError, "must be an array", "got 'logits'"),
        ("dict", {"a": 1.0}, TypeError, "must be an array", r"got \{'a': 1.0\} \(dict\)"),
        ("ragged", [[1.0, 2.0], [1.0]], TypeError, "must be an array", r"got \[\[1.0, 2.0\], \[1.0\]\] \(list\)"),
    )


def axis_rows(function, name):
    rows = rows_of(
        function,
        "axis",
        ("float", 1.0, TypeError, "must be a Python integer", r"got 1.0 \(float\)"),
        ("bool", True, TypeError, "must be a Python integer", "got True"),
        ("text", "classes", TypeError, "must be a Python integer", "got 'classes'"),
        ("array", jnp.int32(1), TypeError, "must be a Python integer", "got ", STATIC),
        ("too-large", 2, ValueError, r"must be in \[-2, 2\)", rf"{name} of shape \({N}, {C}\)", "got 2"),
        ("too-small", -3, ValueError, r"must be in \[-2, 2\)", rf"{name} of shape \({N}, {C}\)", "got -3"),
    )
    if function in SOFTMAXES:
        return rows + rows_of(
            function,
            "axis",
            ("none-inside", (0, None), TypeError, "must be a Python integer", "got None"),
            ("array-inside", (0, jnp.int32(1)), TypeError, "must be a Python integer", "got ", STATIC),
            ("too-large-inside", (0, 2), ValueError, r"must be in \[-2, 2\)", "got 2"),
            ("twice", (1, 1), ValueError, "must not name an axis twice", r"got \(1, 1\)"),
            ("twice-from-the-end", (1, -1), ValueError, "must not name an axis twice", r"got \(1, -1\)"),
        )
    return rows + rows_of(
        function,
        "axis",
        ("none", None, TypeError, "must be a Python integer", "got None"),
        ("tuple", (0, 1), TypeError, "must be a Python integer", r"got \(0, 1\)"),
    )


def softmax_rows(function):
    rows = scores_rows(function, "logits") + axis_rows(function, "logits")
    rows += rows_of(
        function,
        "where",
        ("int", ints(N, C), TypeError, "must be boolean", "got int32", r"mask != 0"),
        ("float", floats(N, C), TypeError, "must be boolean", "got float32", r"mask != 0"),
        ("list", [1] * C, TypeError, "must be boolean", "got int32", r"jnp\.asarray\(mask\) != 0"),
        ("text", "classes", TypeError, "must be an array", "got 'classes'"),
        ("shape", jnp.ones(N, bool), ValueError, rf"broadcast to the logits, \({N}, {C}\)", rf"got shape \({N},\)"),
        ("rank", jnp.ones((1, N, C), bool), ValueError, "broadcast to the logits", rf"got shape \(1, {N}, {C}\)"),
    )
    if function == "logsumexp":
        rows += flag_rows(function, "keepdims")
    return rows


def flag_rows(function, name):
    return rows_of(
        function,
        name,
        ("none", None, TypeError, "must be True or False", "got None"),
        ("int", 1, TypeError, "must be True or False", "got 1"),
        ("text", "yes", TypeError, "must be True or False", "got 'yes'"),
        ("array", jnp.array(True), TypeError, "must be True or False", "got ", STATIC),
    )


def label_rows(function, name):
    kind = r"must be integers \(class indices\) or floating point \(class probabilities\)"
    index = f"integer labels must have the shape of {name} without its class axis"
    probability = f"class probabilities and must have the shape of {name}"
    if function == LINEAR:
        index = "integer labels must have the leading shape of hidden"
        probability = "class probabilities and must have the leading shape of hidden and the vocabulary"
    flat = rows_of(
        function,
        "labels",
        ("bool", jnp.ones(N, bool), TypeError, kind, "got bool", r"convert them with .astype\(jnp\.int32\)$"),
        ("bool-one-hot", jnp.ones((N, C), bool), TypeError, kind, "got bool", r"one-hot.*\.astype\(jnp\.float32\)$"),
        ("complex", jnp.ones(N, jnp.complex64), TypeError, kind, "got complex64"),
        ("float8", jnp.ones((N, C), jnp.float8_e4m3fn), TypeError, kind, "got float8_e4m3fn"),
        ("plain-pair", tuple(SPARSE), TypeError, "must be an array", r"jxent\.SparseLabels\(indices, probabilities\)"),
        ("pair-in-lists", [*SPARSE], ValueError, probability, rf"got \(2, {N}, 2\)", r"jxent\.SparseLabels\("),
        ("none", None, TypeError, "must be an array", "got None"),
        ("text", "cat", TypeError, "must be an array", "got 'cat'"),
        ("index-short", ints(N - 1), ValueError, index, rf"\({N},\)", rf"got \({N - 1},\)"),
        ("index-scalar", ints(), ValueError, index, rf"\({N},\)", r"got \(\)"),
        ("index-column", ints(N, 1), ValueError, index, rf"got \({N}, 1\)", rf"\.reshape\(\({N},\)\)"),
        ("index-row", ints(1, N), ValueError, index, rf"got \(1, {N}\)", rf"\.reshape\(\({N},\)\)"),
        ("index-one-hot", ints(N, C), ValueError, index, rf"got \({N}, {C}\)", r"one-hot.*\.astype\(jnp\.float32\)"),
        ("probability-rows", floats(N - 1, C), ValueError, probability, rf"\({N}, {C}\)", rf"got \({N - 1}, {C}\)"),
        ("probability-classes", floats(N, C - 1), ValueError, probability, rf"got \({N}, {C - 1}\)"),
        ("probability-scalar", floats(), ValueError, probability, r"got \(\)"),
        ("float-indices", floats(N), ValueError, probability, rf"got \({N},\)", r"indices.*\.astype\(jnp\.int32\)"),
    )
    if function == LINEAR:
        return flat
    scores = {name: floats(2, C, 3)}
    torch_layout = rows_of(
        function, "labels", ("torch-layout", ints(2, 3), ValueError, index, r"got \(2, 3\)", "axis=1"), **scores
    )
    last_layout = rows_of(
        function,
        "labels",
        ("last-layout", ints(2, 3), ValueError, index, r"got \(2, 3\)", "axis=-1"),
        **{name: floats(2, 3, C), "axis": 1},
    )
    binary_loss = r"binary problem.*sigmoid_cross_entropy"
    binary = rows_of(
        function, "labels", ("binary", ints(N), ValueError, index, rf"got \({N},\)", binary_loss), **{name: floats(N)}
    ) + rows_of(
        function,
        "labels",
        ("binary-column", ints(N, 1), ValueError, index, rf"got \({N}, 1\)", binary_loss),
        **{name: floats(N, 1)},
    )
    return flat + torch_layout + last_layout + binary


def sparse_rows(function):
    entries, shares = ints(N, 3), floats(N, 3)
    sparse = jxent.SparseLabels
    return rows_of(
        function,
        "labels",
        ("entries-float", sparse(shares, shares), TypeError, "labels.indices must be integers", "got float32"),
        ("shares-int", sparse(entries, entries), TypeError, "labels.probabilities must be floating point", "got int32"),
        ("entries-flat", sparse(ints(N), floats(N)), ValueError, "labels.indices must have", "k", rf"got \({N},\)"),
        ("no-entries", sparse(ints(N, 0), floats(N, 0)), ValueError, "at least one entry", rf"got \({N}, 0\)"),
        ("positions", sparse(ints(N + 1, 3), floats(N + 1, 3)), ValueError, "labels.indices", rf"got \({N + 1}, 3\)"),
        ("unlike", sparse(entries, floats(N, 2)), ValueError, "labels.probabilities must have", rf"got \({N}, 2\)"),
    )


def weight_rows(function):
    classes = rf"one entry per class, shape \({C},\)"
    return position_rows(function) + rows_of(
        function,
        "class_weight",
        ("complex", jnp.ones(C, jnp.complex64), TypeError, "must be floating point", "got complex64", "astype"),
        ("text", "balanced", TypeError, "must be an array", "got 'balanced'"),
        ("number", 2.0, ValueError, classes, r"got .*\(\)"),
        ("short", floats(C - 1), ValueError, classes, rf"got .*\({C - 1},\)"),
        ("column", floats(C, 1), ValueError, classes, rf"got .*\({C}, 1\)"),
        ("scalar", floats(), ValueError, classes, r"got .*\(\)"),
        ("per-position", floats(N), ValueError, classes, rf"got .*\({N},\)"),
    )


def position_rows(function):
    floating, positions = "must be floating point", rf"broadcast to the positions.*\({N},\)"
    return rows_of(
        function,
        "sample_weight",
        ("complex", jnp.ones(N, jnp.complex64), TypeError, floating, "got complex64", "astype"),
        ("float8", jnp.ones(N, jnp.float8_e4m3fn), TypeError, floating, "got float8_e4m3fn", "bfloat16"),
        ("text", "balanced", TypeError, "must be an array", "got 'balanced'"),
        ("long", floats(N + 1), ValueError, positions, rf"got shape \({N + 1},\)"),
        ("column", floats(N, 1), ValueError, positions, rf"got shape \({N}, 1\)"),
        ("row", floats(1, N), ValueError, positions, rf"got shape \(1, {N}\)"),
    ) + rows_of(
        function,
        "where",
        ("int", ints(N), TypeError, "must be boolean", "got int32", "mask != 0", "sample_weight"),
        ("float", floats(N), TypeError, "must be boolean", "got float32", "mask != 0", "sample_weight"),
        ("text", "all", TypeError, "must be an array", "got 'all'"),
        ("long", jnp.ones(N + 1, bool), ValueError, positions, rf"got shape \({N + 1},\)"),
        ("column", jnp.ones((N, 1), bool), ValueError, positions, rf"got shape \({N}, 1\)"),
        ("logits-shaped", jnp.ones((N, C), bool), ValueError, positions, rf"got shape \({N}, {C}\)"),
    )


def reduction_rows(function):
    return rows_of(
        function,
        "reduction",
        ("none", None, TypeError, "'mean', 'sum', 'none'", "got None", 'pass "none"'),
        ("flag", True, TypeError, "'mean', 'sum', 'none'", "got True"),
        ("array", jnp.int32(0), TypeError, "'mean', 'sum', 'none'", "got ", STATIC),
        ("unknown", "avg", ValueError, "'mean', 'sum', 'none'", "got 'avg'"),
        ("upper-case", "MEAN", ValueError, "'mean', 'sum', 'none'", "got 'MEAN'"),
    )


def option_rows(function):
    integer = "must be a Python integer"
    return (
        rows_of(
            function,
            "ignore_index",
            ("float", -100.0, TypeError, integer, "got -100.0"),
            ("bool", True, TypeError, integer, "got True"),
            ("text", "pad", TypeError, integer, "got 'pad'"),
            ("array", jnp.int32(0), TypeError, integer, "got ", STATIC),
        )
        + rows_of(
            function,
            "ignore_index",
            ("probabilities", 0, ValueError, "integer labels", "class probabilities.*float32", "where="),
            labels=jnp.asarray(PROBABILITIES),
        )
        + reduction_rows(function)
    )


def loss_rows(function, name):
    scores = scores_rows(function, name) + rows_of(
        function,
        name,
        ("scalar", floats(), ValueError, "class axis", r"got a scalar"),
        ("no-classes", floats(N, 0), ValueError, "at least one class", rf"got shape \({N}, 0\)"),
    )
    return (
        scores + axis_rows(function, name) + label_rows(function, name) + weight_rows(function) + option_rows(function)
    )


def scalar_rows(function, name, wanted, values):
    return rows_of(
        function,
        name,
        ("none", None, TypeError, "must be a number", "got None"),
        ("bool", True, TypeError, "must be a number", "got True"),
        ("text", "some", TypeError, "must be a number", "got 'some'"),
        ("complex", 0.5j, TypeError, "must be a number", "got .*complex"),
        ("bool-array", jnp.bool_(True), TypeError, "must be a number or a floating-point scalar", "got .*bool"),
        ("float8-array", jnp.ones((), jnp.float8_e4m3fn), TypeError, "must be a number", "got .*float8_e4m3fn"),
        ("vector", floats(1), ValueError, "must be a number or a scalar", r"got shape \(1,\)"),
        *((str(v), v, ValueError, wanted, re.escape(f"got {v}")) for v in values),
    )


def cross_entropy_rows(function):
    """Of what `nll_loss` does not take."""
    positive = "must be positive and finite"
    number = "must be None or a Python number"
    return (
        scalar_rows(function, "label_smoothing", r"must be in \[0, 1\]", (-0.1, 1.5, 2, float("nan"), float("inf")))
        + scalar_rows(
            function, "z_loss_weight", "must be finite and at least 0", (-1e-4, float("nan"), float("inf"), 1e39)
        )
        + rows_of(
            function,
            "logit_softcap",
            ("bool", True, TypeError, number, "got True"),
            ("text", "gemma", TypeError, number, "got 'gemma'"),
            ("complex", 1j, TypeError, number, "got 1j"),
            ("array", jnp.float32(30), TypeError, number, "got ", STATIC),
            *(
                (str(v), v, ValueError, positive, re.escape(f"got {v}"), "None")
                for v in (0, -30.0, float("nan"), float("inf"), 1e-38, 2e38)
            ),
        )
        + flag_rows(function, "return_stats")
    )


def linear_rows():
    function, integer = LINEAR, "must be a Python integer"
    shapes = rf"got {F} in hidden of shape \({N}, {F}\) and"
    return (
        scores_rows(function, "hidden")
        + scores_rows(function, "kernel")
        + rows_of(function, "hidden", ("scalar", floats(), ValueError, "needs a features axis", "got a scalar"))
        + rows_of(
            function,
            "kernel",
            ("scalar", floats(), ValueError, "two axes, features and vocabulary", r"got shape \(\)"),
            ("vector", floats(F), ValueError, "two axes, features and vocabulary", rf"got shape \({F},\)"),
            ("rank-3", floats(1, F, C), ValueError, "two axes", rf"got shape \(1, {F}, {C}\)"),
            ("features", floats(F + 1, C), ValueError, "number of features", shapes, rf"\({F + 1}, {C}\)$"),
            ("vocab-first", floats(C, F), ValueError, shapes, rf"{C} in .*\({C}, {F}\)", "pass vocab_axis=0$"),
            ("no-classes", floats(F, 0), ValueError, "at least one class", rf"got shape \({F}, 0\)"),
        )
        + rows_of(
            function,
            "kernel",
            ("features-first", floats(F, C), ValueError, shapes, rf"{C} in .*\({F}, {C}\)", "pass vocab_axis=-1$"),
            ("features-last", floats(C, F + 1), ValueError, "number of features", shapes, rf"\({C}, {F + 1}\)$"),
            ("no-classes-first", floats(0, F), ValueError, "at least one class", rf"got shape \(0, {F}\)"),
            vocab_axis=0,
        )
        + rows_of(
            function,
            "bias",
            ("complex", jnp.ones(C, jnp.complex64), TypeError, "must be floating point", "got complex64", "astype"),
            ("flag", True, ValueError, "one entry per class", r"got \(\)"),
            ("text", "zeros", TypeError, "must be an array", "got 'zeros'"),
            ("short", floats(C - 1), ValueError, "one entry per class", rf"\({C},\)", rf"got \({C - 1},\)"),
            ("features", floats(F), ValueError, "one entry per class", rf"\({C},\)", rf"got \({F},\)"),
            ("row", floats(1, C), ValueError, "one entry per class", rf"\({C},\)", rf"got \(1, {C}\)"),
            ("scalar", floats(), ValueError, "one entry per class", r"got \(\)"),
        )
        + rows_of(
            function,
            "vocab_axis",
            ("too-large", 2, ValueError, "must be -1 or 0", "got 2"),
            ("too-small", -3, ValueError, "must be -1 or 0", "got -3"),
            ("float", 0.0, TypeError, integer, r"got 0.0 \(float\)"),
            ("bool", False, TypeError, integer, "got False"),
            ("array", jnp.int32(0), TypeError, integer, "got ", STATIC),
        )
        + label_rows(function, None)
        + weight_rows(function)
        + option_rows(function)
        + cross_entropy_rows(function)
        + sweep_rows(function)
    )


def sweep_rows(function):
    integer = "must be a Python integer"
    return (
        rows_of(
            function,
            "block_size",
            ("zero", 0, ValueError, "must be at least 1", "got 0"),
            ("negative", -8, ValueError, "must be at least 1", "got -8"),
            ("float", 2.0, TypeError, integer, r"got 2.0 \(float\)"),
            ("bool", True, TypeError, integer, "got True"),
            ("text", "auto", TypeError, integer, "got 'auto'"),
            ("array", jnp.int32(2), TypeError, integer, "got ", STATIC),
        )
        + flag_rows(function, "recompute")
        + rows_of(
            function,
            "precision",
            ("text", "best", ValueError, "dot_general", "best"),
            ("texts", ["best", "worst"], ValueError, "dot_general", "best"),
            ("number", 3, TypeError, "dot_general", r"got 3 \(int\)"),
            ("one-of-two", ("highest", "best"), ValueError, "dot_general", "best"),
            ("unhashable", {"tpu": "highest"}, TypeError, "dot_general", "tpu"),
            ("array", jnp.float32(3), TypeError, "dot_general", "got ", STATIC),
        )
    )


def binary_rows():
    function, positions = BINARY, rf"must broadcast to the logits, \({N}, {C}\)"
    kind = "must be floating point, integers or booleans"
    return (
        scores_rows(function, "logits")
        + reduction_rows(function)
        + scalar_rows(function, "label_smoothing", r"must be in \[0, 1\]", (-0.1, 1.5))
        + rows_of(
            function,
            "labels",
            ("complex", jnp.ones((N, C), jnp.complex64), TypeError, kind, "got complex64"),
            ("none", None, TypeError, "must be an array", "got None"),
            ("sparse", SPARSE, TypeError, "must be an array", "got SparseLabels"),
            ("indices", ints(N), ValueError, rf"\({N}, {C}\)", rf"got \({N},\)", "given by its index", "cross_entropy"),
            ("column", ints(N, 1), ValueError, rf"\({N}, {C}\)", rf"got \({N}, 1\)", "cross_entropy"),
            ("long", ints(N + 1, C), ValueError, rf"\({N}, {C}\)", rf"got \({N + 1}, {C}\)$"),
        )
        + rows_of(
            function,
            "pos_weight",
            ("complex", jnp.ones(C, jnp.complex64), TypeError, "must be floating point", "got complex64", "astype"),
            ("long", floats(C + 1), ValueError, positions, rf"got shape \({C + 1},\)"),
            ("rank", floats(1, N, C), ValueError, positions, rf"got shape \(1, {N}, {C}\)"),
        )
        + rows_of(
            function,
            "sample_weight",
            ("complex", jnp.ones((N, C), jnp.complex64), TypeError, "must be floating point", "got complex64"),
            ("rows", floats(N), ValueError, "broadcast to the positions", rf"got shape \({N},\)"),
        )
        + rows_of(
            function,
            "where",
            ("int", ints(N, C), TypeError, "must be boolean", "got int32", "mask != 0"),
            ("rows", jnp.ones(N, bool), ValueError, "broadcast to the positions", rf"got shape \({N},\)"),
        )
    )


def divergence_rows(function):
    """Of any of the four."""
    rows = position_rows(function) + reduction_rows(function)
    return rows + scalar_rows(
        function,
        "temperature",
        "must be finite and positive",
        (0, -1.0, float("nan"), float("inf"), 1e-46, 1e-38, 1e39),
    )


def beta_rows(function):
    other = function.replace("js", "kl")
    return rows_of(
        function,
        "beta",
        ("none", None, TypeError, "must be a Python number", "got None"),
        ("bool", True, TypeError, "must be a Python number", "got True"),
        ("text", "half", TypeError, "must be a Python number", "got 'half'"),
        ("array", jnp.float32(0.5), TypeError, "must be a Python number", "got ", STATIC),
        *((str(v), v, ValueError, "must lie between 0 and 1", f"got {v}", f"take {other}") for v in (0.0, 1.0, 2.5)),
    )


def logits_divergence_rows(function):
    scores = [row for name in ("logits_p", "logits_q") for row in scores_rows(function, name)]
    scores += rows_of(
        function,
        "logits_p",
        ("positions", floats(N + 1, C), ValueError, "same shape", rf"\({N + 1}, {C}\) in logits_p", rf"\({N}, {C}\)"),
        ("classes", floats(N, C - 1), ValueError, "same shape", rf"\({N}, {C - 1}\) in logits_p", "in logits_q$"),
        ("row", floats(C), ValueError, "same shape", rf"\({C},\) in logits_p", "in logits_q$"),
    )
    return scores + axis_rows(function, "logits_q") + divergence_rows(function)


def linear_divergence_rows(function):
    rows = divergence_rows(function) + sweep_rows(function)
    for of, features in (("_p", F), ("_q", F + 1)):
        rows += scores_rows(function, "hidden" + of) + scores_rows(function, "kernel" + of)
        rows += rows_of(
            function,
            "kernel" + of,
            ("vector", floats(F), ValueError, f"kernel{of} must have two axes", rf"got shape \({F},\)"),
            ("features", floats(9, C), ValueError, f"hidden{of} and kernel{of}", rf"got {features} .* 9 in kernel{of}"),
            ("vocab-first", floats(C, features), ValueError, "number of features", "pass vocab_axis=0$"),
            ("classes", floats(features, C + 1), ValueError, "same vocabulary", "may be a pair"),
        )
        rows += rows_of(
            function,
            "bias" + of,
            ("complex", jnp.ones(C, jnp.complex64), TypeError, "must be floating point", "got complex64", "astype"),
            ("short", floats(C - 1), ValueError, "one entry per class", rf"\({C},\)", rf"got \({C - 1},\)"),
        )
    return (
        rows
        + rows_of(
            function,
            "hidden_p",
            ("positions", floats(N + 1, F), ValueError, "same leading shape", rf"\({N + 1}, {F}\) in hidden_p"),
        )
        + rows_of(
            function,
            "vocab_axis",
            ("too-large", 2, ValueError, "must be -1 or 0", "got 2"),
            ("three", (0, 0, 0), ValueError, "one integer, or a pair for P and Q", r"got \(0, 0, 0\)"),
            ("float-inside", (0.0, -1), TypeError, "must be a Python integer", "got 0.0"),
            ("array", jnp.int32(0), TypeError, "must be a Python integer", "got ", STATIC),
        )
    )


def next_token_rows():
    function = "next_token_labels"
    fits = "does not fit into tokens of dtype"
    unsigned = {"tokens": jnp.ones(N, jnp.uint8)}
    return (
        rows_of(
            function,
            "tokens",
            ("float", floats(N), TypeError, "must be integers", "got float32"),
            ("bool", jnp.ones(N, bool), TypeError, "must be integers", "got bool"),
            ("none", None, TypeError, "must be an array", "got None"),
            ("text", "abc", TypeError, "must be an array", "got 'abc'"),
            ("scalar", ints(), ValueError, "need a sequence axis", "got a scalar"),
            ("40-bits", np.array([1, 2**40]), ValueError, "an integer that does not fit into 32 bits"),
            ("32-bits", [1, 2**31], ValueError, "an integer that does not fit into 32 bits"),
        )
        + rows_of(
            function,
            "ignore_index",
            ("float", 0.0, TypeError, "must be a Python integer", "got 0.0"),
            ("none", None, TypeError, "must be a Python integer", "got None"),
            ("bool", False, TypeError, "must be a Python integer", "got False"),
            ("array", jnp.int32(0), TypeError, "must be a Python integer", "got ", STATIC),
        )
        + rows_of(
            function,
            "ignore_index",
            ("negative-in-uint8", -1, ValueError, "ignore_index=-1", f"{fits} uint8", "astype"),
            ("256-in-uint8", 256, ValueError, "ignore_index=256", f"{fits} uint8", "astype"),
            **unsigned,
        )
        + rows_of(function, "ignore_index", ("40-bits", 2**40, ValueError, f"ignore_index={2**40}", f"{fits} int32"))
        + [Row(function, "ignore_index", "default-in-uint8", unsigned, ValueError, ("-100", f"{fits} uint8", "astype"))]
    )


def mesh_axis_rows(function, *arguments):
    """Of axes that are not in scope; tests/test_sharding.py has what can be wrong on a mesh and inside `shard_map`."""
    scope = "names no axis in scope"
    return [
        row
        for argument in arguments
        for row in rows_of(
            function,
            argument,
            ("unknown", "vocab", ValueError, f"='vocab' {scope}"),
            ("unknown-tuple", ("a", "b"), ValueError, scope),
            ("twice", ("a", "a"), ValueError, "must not name an axis twice", "got"),
            ("integer", 0, TypeError, "must be the name of a mesh axis", "got 0"),
            ("spec-in-tuple", (jax.sharding.PartitionSpec("a"),), TypeError, "must be the name of a mesh axis", "got"),
            ("unhashable", {"a": 1}, TypeError, "must be the name of a mesh axis", "got"),
        )
    ]


ROWS = [row for function in SOFTMAXES for row in softmax_rows(function)]
ROWS += [row for function, name in LOSSES.items() for row in loss_rows(function, name)]
ROWS += cross_entropy_rows("cross_entropy") + linear_rows() + next_token_rows()
# The others of each pair take the same arguments, in the same code, but for `beta`.
ROWS += sparse_rows("cross_entropy") + sparse_rows(LINEAR) + binary_rows()
ROWS += logits_divergence_rows("kl_divergence") + beta_rows("js_divergence")
ROWS += linear_divergence_rows("linear_kl_divergence") + beta_rows("linear_js_divergence")
ROWS += [row for function in (*SOFTMAXES, "next_token_labels") for row in mesh_axis_rows(function, "axis_name")]
MEAN_TAKERS = (*LOSSES, LINEAR, *DIVERGENCES, *LINEAR_DIVERGENCES)
ROWS += [row for function in MEAN_TAKERS for row in mesh_axis_rows(function, "axis_name", "batch_axis_name")]


def rows(**keywords):
    return pytest.mark.parametrize("row", ROWS, ids=["-".join(row[:3]) for row in ROWS], **keywords)


def assert_says(row, message):
    """The message opens with the function, names the argument, and then says everything that the row lists."""
    assert message.startswith(f"{row.function}: ")
    assert re.search(rf"\b{row.argument}\b", message)
    assert re.search(".*".join(row.says), message, re.DOTALL), message


def split(row):
    """The call's arguments, JAX arrays apart from everything else; arrays within a tuple count as something else."""
    arguments = good(row.function) | row.arguments
    arrays = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}
    return arrays, {k: v for k, v in arguments.items() if k not in arrays}


def batched(arrays):
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (2, *a.shape)), arrays)


def in_shard_map(call):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(call, mesh=mesh, in_specs=P(), out_specs=P())


TRANSFORMED = {
    "eager": lambda call, arrays: call(arrays),
    "jit": lambda call, arrays: jax.jit(call)(arrays),
    "vmap": lambda call, arrays: jax.vmap(call, axis_size=2)(batched(arrays)),
    "shard_map": lambda call, arrays: in_shard_map(call)(arrays),
    "eval_shape": lambda call, arrays: jax.eval_shape(call, arrays),
}


@pytest.mark.covering("next_token_labels-tokens-scalar-eager")
@pytest.mark.parametrize("how", TRANSFORMED)
@rows()
def test_raises(row, how):
    arrays, others = split(row)
    call = partial(getattr(jxent, row.function), **others)
    with pytest.raises(row.error) as raised:
        TRANSFORMED[how](lambda arrays: call(**arrays), arrays)
    assert type(raised.value) is row.error
    assert_says(row, str(raised.value))


@pytest.mark.parametrize("function", [*SOFTMAXES, *MEAN_TAKERS, BINARY, "next_token_labels"])
def test_good_call_raises_nothing(function):
    """The rows change one argument of this call, so what they raise comes from that one."""
    getattr(jxent, function)(**good(function))


@pytest.mark.parametrize("function", [*SOFTMAXES, *MEAN_TAKERS, BINARY, "next_token_labels"])
def test_options_are_keyword_only(function):
    arrays = list(good(function).values())
    extra = {"logsumexp": [1], "softmax": [1], "log_softmax": [1]}.get(function, [])
    with pytest.raises(
        TypeError, match=rf"^{function}: takes .* by position, got {len(arrays) + len(extra) + 1}; options"
    ):
        getattr(jxent, function)(*arrays, *extra, None)


WEIGHTS = [
    *((function, "class_weight", (C,)) for function in (*LOSSES, LINEAR)),
    *((function, "sample_weight", (N,)) for function in (*LOSSES, LINEAR, *DIVERGENCES, *LINEAR_DIVERGENCES)),
    *((BINARY, name, (N, C)) for name in ("sample_weight", "pos_weight")),
    *((LINEAR_DIVERGENCES[0], name, (C,)) for name in ("bias_p", "bias_q")),
    (LINEAR, "bias", (C,)),
]


@pytest.mark.parametrize(("function", "name", "shape"), WEIGHTS)
def test_weights_are_numbers_of_any_kind(function, name, shape):
    """Integers, booleans, lists, and where it broadcasts a Python number, are what the same in floating point is."""
    call = partial(getattr(jxent, function), **good(function))
    whole, kept = RNG.integers(1, 4, shape), RNG.random(shape) < 0.7
    for given in (whole, whole.tolist(), jnp.asarray(whole), whole + 2**33, kept, kept.tolist()):
        out = call(**{name: given})
        assert out.dtype == jnp.float32
        assert out == call(**{name: np.asarray(given).astype(np.float32)})
    if "sample" in name or "pos" in name:
        for given in (2, 2.0, True, np.int64(2)):
            assert call(**{name: given}) == call(**{name: np.full(shape, given, np.float32)})


@pytest.mark.usefixtures("x64")
def test_a_python_number_is_of_the_losses_dtype():
    for weight in (2, 2.0, True, [1] * N, np.arange(N)):
        assert jxent.cross_entropy(LOGITS, LABELS, sample_weight=weight).dtype == jnp.float32
        assert jxent.cross_entropy(LOGITS.astype(float), LABELS, sample_weight=weight).dtype == jnp.float64


@pytest.mark.parametrize("number", [1, np.int32(1), np.array(1), jnp.int32(1)])
def test_a_number_without_a_fraction(number):
    expected = jxent.cross_entropy(LOGITS, LABELS, label_smoothing=1.0, z_loss_weight=1.0)
    assert jxent.cross_entropy(LOGITS, LABELS, label_smoothing=number, z_loss_weight=number) == expected
    of_one = jxent.kl_divergence(LOGITS, LOGITS[::-1])
    np.testing.assert_allclose(jxent.kl_divergence(LOGITS, LOGITS[::-1], temperature=number), of_one, rtol=1e-6)


@pytest.mark.parametrize("label", [2**31, 2**40, 2**70, -(2**31) - 1])
@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_labels_beyond_an_int32(function, label):
    """They are out of range, as a list, a number, of NumPy, and within `SparseLabels`, and not a label of 32 bits."""
    labels = [label, *LABELS[1:].tolist()]
    loss = partial(loss_of(function), LOGITS, reduction="none")
    given = [labels, tuple(labels), jxent.SparseLabels([[i] for i in labels], np.ones((N, 1), np.float32))]
    if label < 2**63:
        given += [np.array(labels), jxent.SparseLabels(np.array(labels)[:, None], np.ones((N, 1), np.float32))]
    for labels in given:
        np.testing.assert_array_equal(np.isnan(loss(labels)), np.arange(N) == 0)
    assert np.isnan(loss_of(function)(LOGITS[0], label))


def test_a_tensor_of_torch():
    class Tensor:
        """A tensor with a gradient, as far as `jnp.asarray` looks."""

        def __array__(self, *args, **kwargs):
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    Tensor.__module__ = "torch"
    with pytest.raises(TypeError, match=r"^softmax: logits must be an array, .*from_dlpack\(tensor\.detach\(\)\)$"):
        jxent.softmax(Tensor())


@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_no_label_is_ignored(function):
    loss = partial(loss_of(function), ignore_index=None, reduction="none")
    plain = partial(loss_of(function), reduction="none")
    np.testing.assert_allclose(loss(LOGITS, LABELS), plain(LOGITS, LABELS), rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(loss(LOGITS, with_label(-100, "int32"))), np.arange(N) == BAD)
    np.testing.assert_allclose(loss(LOGITS, PROBABILITIES), plain(LOGITS, PROBABILITIES), rtol=1e-6)


# --- good input that looks like bad input -----------------------------------------------------------------------------


def loss_of(function):
    """The loss as a function of scores and labels.

    With the identity for a kernel, the scores are the hidden states of `linear_cross_entropy` and also its logits. Of
    its blocks of two positions the last one holds a position of the block before it too.
    """
    if function == LINEAR:
        return lambda scores, labels, **options: jxent.linear_cross_entropy(
            scores, np.eye(C, dtype=np.float32), labels, block_size=2, **options
        )
    return getattr(jxent, function)


def test_array_likes_are_taken():
    """NumPy arrays, lists and NumPy numbers are what the message of an array or a Python number may mean."""
    expected = jxent.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS), label_smoothing=0.25, axis=1)
    assert jxent.cross_entropy(LOGITS.tolist(), LABELS.tolist(), label_smoothing=np.float32(0.25), axis=1) == expected
    assert jxent.cross_entropy(LOGITS, LABELS, label_smoothing=np.array(0.25, np.float32), axis=np.int64(1)) == expected


@pytest.mark.parametrize("smoothing", [0, 1, 0.0, 1.0])
def test_ends_of_the_range_of_label_smoothing(smoothing):
    assert np.isfinite(jxent.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing))


@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_no_positions(function):
    call = partial(loss_of(function), LOGITS[:0], LABELS[:0])
    assert np.isnan(call())
    assert call(reduction="sum") == 0
    assert call(reduction="none").shape == (0,)


# --- labels out of range ----------------------------------------------------------------------------------------------

BAD = 2  # the position of the bad label, whose good label is C - 1
SIGNED = (-1, C, C + 7)
BAD_LABELS = {
    "int8": (*SIGNED, -128, 127),
    "int16": SIGNED,
    "int32": (*SIGNED, -(2**31), 2**31 - 1),
    "int64": (*SIGNED, 2**32, 2**32 + 1, -(2**63), 2**63 - 1),  # the second and third are 0 and 1 in their low 32 bits
    "uint8": (C, C + 7, 255),
    "uint16": (C, C + 7),
    "uint32": (C, C + 7, 2**32 - 1),
}
# An index out of range has the weight of a class at the edge, and it enters the mean's denominator: here that of the
# good label, so that the other positions' gradients can be compared.
CLASS_WEIGHT = np.array([0.5, 2.0, 1.0, 0.25, 3.0, 1.0, 0.5], np.float32)
OPTIONS = {
    "cross_entropy": {
        "plain": {},
        "smoothing": {"label_smoothing": 0.1},
        "z_loss": {"z_loss_weight": 0.1},
        "class_weight": {"class_weight": CLASS_WEIGHT},
        "all": {"label_smoothing": 0.1, "z_loss_weight": 0.1, "class_weight": CLASS_WEIGHT, "logit_softcap": 3.0},
        "stats": {"return_stats": True},
        "traced": {"label_smoothing": jnp.float32(0.1), "z_loss_weight": jnp.float32(0.1)},
        "sample_weight": {"sample_weight": np.linspace(0.5, 1.5, N, dtype=np.float32)},
    },
    "nll_loss": {
        "plain": {},
        "class_weight": {"class_weight": CLASS_WEIGHT},
        "sample_weight": {"sample_weight": np.linspace(0.5, 1.5, N, dtype=np.float32)},
    },
    LINEAR: {
        "all": {"label_smoothing": 0.1, "z_loss_weight": 0.1, "class_weight": CLASS_WEIGHT, "logit_softcap": 3.0},
    },
}
OPTION_SETS = [(function, name) for function, sets in OPTIONS.items() for name in sets]


def with_label(label, dtype):
    labels = LABELS.astype(dtype)
    labels[BAD] = label
    return jnp.asarray(labels)


def loss_and_gradient(function, **options):
    """A compiled function of (scores, labels): the loss, and the gradient of its sum with respect to the scores."""

    def summed(scores, labels):
        out = loss_of(function)(scores, labels, **options)
        loss = out[0] if options.get("return_stats") else out
        return jnp.sum(loss), loss

    @jax.jit
    def run(scores, labels):
        (_, loss), gradient = jax.value_and_grad(summed, has_aux=True)(scores, labels)
        return loss, gradient

    return run


def assert_bad_row_alone(run, dtype, reduction):
    """NaN in the bad position's loss and gradient row, and every other number as if its label were good.

    The same program runs with both labels, so the numbers are the same to the last bit.
    """
    expected_loss, expected_gradient = run(LOGITS, with_label(C - 1, dtype))
    assert np.isfinite(expected_loss).all()
    assert np.isfinite(expected_gradient).all()
    assert np.any(expected_gradient[BAD] != 0)
    others = np.arange(N) != BAD
    for label in BAD_LABELS[dtype]:
        loss, gradient = run(LOGITS, with_label(label, dtype))
        if reduction == "none":
            assert np.isnan(loss[BAD]), label
            np.testing.assert_array_equal(loss[others], expected_loss[others])
        else:
            assert np.isnan(loss), label
        assert np.isnan(gradient[BAD]).all(), (label, gradient[BAD])
        np.testing.assert_array_equal(gradient[others], expected_gradient[others])


@pytest.mark.covering("cross_entropy-plain-none")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("function", "options"), OPTION_SETS)
def test_label_out_of_range_is_nan_in_its_row_alone(function, options, reduction):
    run = loss_and_gradient(function, reduction=reduction, **OPTIONS[function][options])
    assert_bad_row_alone(run, "int32", reduction)


@pytest.mark.parametrize("dtype", [d for d in BAD_LABELS if d not in ("int32", "int64")])
@pytest.mark.parametrize("function", LOSSES)
def test_label_out_of_range_in_each_dtype(function, dtype):
    assert_bad_row_alone(loss_and_gradient(function, reduction="none"), dtype, "none")


@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_label_out_of_range_in_int64(function, x64):
    assert_bad_row_alone(loss_and_gradient(function, reduction="none"), "int64", "none")


@pytest.mark.parametrize("function", LOSSES)
def test_label_out_of_range_beside_a_masked_class(function):
    """The gradient row is NaN throughout, at a class of -inf too."""
    scores = LOGITS.copy()
    scores[BAD, 3] = -np.inf
    run = loss_and_gradient(function, reduction="sum")
    loss, gradient = run(scores, with_label(C, "int32"))
    assert np.isnan(loss)
    assert np.isnan(gradient[BAD]).all()
    assert np.isfinite(np.delete(gradient, BAD, 0)).all()


def test_label_out_of_range_of_a_shared_kernel():
    """Every position's logits are of the one kernel, so a bad label makes all of its gradient NaN."""
    run = jax.jit(jax.grad(jxent.linear_cross_entropy, argnums=(0, 1)), static_argnames="block_size")
    hidden, kernel = jnp.asarray(LOGITS), jnp.eye(C)
    _, expected = run(hidden, kernel, with_label(C - 1, "int32"), block_size=2)
    gradient, of_kernel = run(hidden, kernel, with_label(C, "int32"), block_size=2)
    assert np.isfinite(expected).all()
    assert np.isnan(of_kernel).all()
    np.testing.assert_array_equal(np.isnan(gradient).all(1), np.arange(N) == BAD)


@pytest.mark.covering
@pytest.mark.parametrize(("function", "options"), OPTION_SETS)
def test_excluded_positions_hold_any_label(function, options):
    run = loss_and_gradient(function, where=jnp.arange(N) != BAD, **OPTIONS[function][options])
    expected_loss, expected_gradient = run(LOGITS, with_label(C - 1, "int32"))
    assert np.isfinite(expected_loss)
    assert not expected_gradient[BAD].any()
    for label in BAD_LABELS["int32"]:
        loss, gradient = run(LOGITS, with_label(label, "int32"))
        assert loss == expected_loss, label
        np.testing.assert_array_equal(gradient, expected_gradient)


@pytest.mark.covering
@pytest.mark.parametrize(
    ("function", "options", "ignored"),
    [
        *((function, "plain", ignored) for function in LOSSES for ignored in (-100, -1, C, C + 7)),
        *(("cross_entropy", "all", ignored) for ignored in (-100, -1, C)),
    ],
)
def test_ignored_positions_hold_any_label(function, options, ignored):
    """The ignored label may itself be out of range; the position counts no more than one that `where` excludes."""
    run = loss_and_gradient(function, ignore_index=ignored, **OPTIONS[function][options])
    loss, gradient = run(LOGITS, with_label(ignored, "int32"))
    excluded = loss_and_gradient(function, where=jnp.arange(N) != BAD, **OPTIONS[function][options])
    expected_loss, expected_gradient = excluded(LOGITS, with_label(C - 1, "int32"))
    # Two programs, each of which may round a sum of N terms in its own order.
    np.testing.assert_allclose(loss, expected_loss, rtol=N * np.finfo(np.float32).eps)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=N * np.finfo(np.float32).eps)
    assert not gradient[BAD].any()


# --- checkify ---------------------------------------------------------------------------------------------------------


def checked(call):
    return checkify.checkify(call, errors=checkify.user_checks)


def summed_loss(function, **options):
    def loss(scores, labels):
        out = loss_of(function)(scores, labels, **options)
        return jnp.sum(out[0] if options.get("return_stats") else out)

    return loss


def over_examples(call):
    return jax.vmap(call, in_axes=(0, 0))


def scanned(call):
    """The sum over positions, one at a time."""
    return lambda scores, labels: jax.lax.scan(lambda s, xs: (s + call(*xs), None), 0.0, (scores, labels))[0]


CHECKED = {
    "eager": checked,
    "checkify-of-jit": lambda call: checked(jax.jit(call)),
    "jit-of-checkify": lambda call: jax.jit(checked(call)),
    "grad": lambda call: checked(jax.grad(call)),
    "jit-of-grad": lambda call: jax.jit(checked(jax.value_and_grad(call))),
    "vmap": lambda call: checked(over_examples(call)),
    "vmap-of-grad": lambda call: checked(over_examples(jax.grad(call))),
    "scan": lambda call: checked(scanned(call)),
    "checkpoint": lambda call: checked(jax.grad(jax.checkpoint(call))),
}


def assert_names_label(error, function, label):
    said = rf"^{function}: label {label} is out of range for {C} classes, at \[({BAD})?\]"
    with pytest.raises(checkify.JaxRuntimeError, match=said):
        error.throw()


@pytest.mark.covering
@pytest.mark.parametrize(
    ("function", "how"),
    [
        *((function, how) for function in LOSSES for how in CHECKED),
        *((LINEAR, how) for how in ("eager", "jit-of-grad", "vmap-of-grad", "checkpoint")),
    ],
)
def test_checkify_names_the_label(function, how):
    run = CHECKED[how](summed_loss(function))
    error, _ = run(jnp.asarray(LOGITS), with_label(-1, "int32"))
    assert_names_label(error, function, -1)
    error, _ = run(jnp.asarray(LOGITS), with_label(C - 1, "int32"))
    assert error.get() is None


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [d for d in BAD_LABELS if d != "int64"])
@pytest.mark.parametrize("function", LOSSES)
def test_checkify_in_each_dtype(function, dtype):
    run = jax.jit(checked(summed_loss(function)))
    for label in BAD_LABELS[dtype]:
        assert_names_label(run(LOGITS, with_label(label, dtype))[0], function, label)
    assert run(LOGITS, with_label(0, dtype))[0].get() is None


@pytest.mark.parametrize("function", LOSSES)
def test_checkify_in_int64(function, x64):
    run = jax.jit(checked(summed_loss(function)))
    for label in BAD_LABELS["int64"]:
        assert_names_label(run(LOGITS, with_label(label, "int64"))[0], function, label)


@pytest.mark.covering
@pytest.mark.parametrize(("function", "options"), OPTION_SETS)
def test_checkify_with_each_option(function, options):
    run = jax.jit(checked(summed_loss(function, **OPTIONS[function][options])))
    assert_names_label(run(LOGITS, with_label(C, "int32"))[0], function, C)
    assert run(LOGITS, with_label(C - 1, "int32"))[0].get() is None


@pytest.mark.parametrize("function", LOSSES)
def test_checkify_with_torch_layout(function):
    """The number of classes is that of the class axis."""
    run = jax.jit(checked(summed_loss(function, axis=0)))
    assert_names_label(run(LOGITS.T, with_label(C, "int32"))[0], function, C)
    assert run(LOGITS.T, with_label(C - 1, "int32"))[0].get() is None


@pytest.mark.parametrize("function", LOSSES)
def test_checkify_leaves_excluded_labels_alone(function):
    where = jnp.arange(N) != BAD
    assert checked(summed_loss(function, where=where))(LOGITS, with_label(C, "int32"))[0].get() is None
    assert checked(summed_loss(function))(LOGITS, with_label(-100, "int32"))[0].get() is None
    assert checked(summed_loss(function, ignore_index=C))(LOGITS, with_label(C, "int32"))[0].get() is None
    assert checked(summed_loss(function))(LOGITS[:0], LABELS[:0])[0].get() is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_checkify_names_a_value_that_is_not_finite(function, value):
    """And where it is, unless the position does not count; -inf in logits masks a class."""
    name = {**LOSSES, LINEAR: "hidden"}[function]
    scores = LOGITS.copy()
    scores[BAD, 3] = value
    for how in ("eager", "jit-of-grad", "vmap"):
        run = CHECKED[how](summed_loss(function))
        error, _ = run(scores, jnp.asarray(LABELS))
        if value == -np.inf and function != LINEAR:
            assert error.get() is None
        else:
            with pytest.raises(checkify.JaxRuntimeError, match=rf"^{function}: {name} has {value} at \[{BAD} 3\]"):
                error.throw()
    run = checked(summed_loss(function, where=jnp.arange(N) != BAD))
    assert run(scores, jnp.asarray(LABELS))[0].get() is None


@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_checkify_names_parameters_that_are_not_finite(name):
    arrays = {**good(LINEAR), "bias": floats(C)}
    arrays[name] = arrays[name].at[..., 4].set(jnp.nan)
    index = r"\[0 4\]" if name == "kernel" else r"\[4\]"
    error, _ = checked(jxent.linear_cross_entropy)(**arrays)
    with pytest.raises(checkify.JaxRuntimeError, match=rf"^{LINEAR}: {name} has nan at {index}"):
        error.throw()
    if name == "bias":  # it masks a class
        assert checked(jxent.linear_cross_entropy)(**arrays | {"bias": floats(C).at[4].set(-jnp.inf)})[0].get() is None


def test_checkify_where_masks_are_mapped():
    """Of logits that all examples share, and of masks that they share; what no example counts is not reported."""
    logits = LOGITS.copy()
    logits[BAD, 3] = np.nan
    masks = np.arange(N) != np.array([[BAD], [0]])

    def loss(logits, where):
        return jxent.cross_entropy(logits, LABELS, where=where)

    def error(in_axes, *arrays):
        return checked(jax.vmap(loss, in_axes))(*arrays)[0].get()

    assert f"logits has nan at [{BAD} 3]" in error((None, 0), logits, masks)
    assert error((None, 0), logits, masks[[0, 0]]) is None
    both = np.stack([LOGITS, logits])
    with jax.numpy_rank_promotion("raise"):
        assert f"logits has nan at [1 {BAD} 3]" in error((0, None), both, masks[1])
    assert f"logits has nan at [1 {BAD} 3]" in error((0, -1), both, masks[[0, 1]].T)
    assert error((0, None), both, masks[0]) is None


def test_checkify_counts_no_position_beyond_an_int32():
    """Of 2**32 logits the position of the first bad one is looked for axis by axis."""
    shapes = jax.ShapeDtypeStruct((2**20, 2**12), jnp.float32), jax.ShapeDtypeStruct((2**20,), jnp.int32)
    program = str(jax.make_jaxpr(checkify.checkify(jxent.cross_entropy))(*shapes))
    assert "bool[1048576,4096]" in program
    assert str(2**32) not in program


@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_checkify_names_labels_that_are_no_probabilities(function):
    """Unless their position does not count; what rounding makes of probabilities is nothing to report."""
    loss = summed_loss(function)

    def named(change, said):
        bad = PROBABILITIES.copy()
        bad[BAD] = change(bad[BAD])
        for run in (checked(loss), checked(over_examples(loss)), jax.jit(checked(jax.grad(loss)))):
            with pytest.raises(checkify.JaxRuntimeError, match=rf"^{function}: labels {said}"):
                run(LOGITS, bad)[0].throw()
        assert checked(summed_loss(function, where=np.arange(N) != BAD))(LOGITS, bad)[0].get() is None

    named(lambda row: np.where(np.arange(C) == 3, np.nan, row), rf"has nan at \[{BAD} 3\]")
    named(lambda row: np.where(np.arange(C) == 3, -0.25, row), rf"are .* one is -0\.25, at \[{BAD} 3\]")
    named(lambda row: 0.75 * row, rf"are .* sum to 0\.75\d* instead of 1, at \[{BAD}\]")
    for dtype in ("float16", "bfloat16", "float32"):
        assert checked(loss)(LOGITS, jnp.asarray(PROBABILITIES, dtype))[0].get() is None


@pytest.mark.parametrize("labels", [LABELS, PROBABILITIES], ids=["index", "probabilities"])
@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_without_checkify_the_check_costs_nothing(function, labels, monkeypatch):
    """It is in the jaxpr, without an effect, and nothing of it is in the program."""
    call = jax.jit(summed_loss(function))
    traced = call.trace(LOGITS, labels)
    assert "jxent_reported" in str(traced.jaxpr)
    assert not traced.jaxpr.effects
    jax.clear_caches()
    monkeypatch.setattr(reports, "_reported", lambda report, labels, array, keep=None: labels)
    unchecked = call.trace(LOGITS, labels)
    assert "jxent_reported" not in str(unchecked.jaxpr)
    assert unchecked.lower().compile().cost_analysis() == traced.lower().compile().cost_analysis()
    jax.clear_caches()


@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_unchecked_calls_work_where_effects_do_not(function):
    """A label out of range raises nothing under transformations that refuse effects; it is NaN."""
    call = summed_loss(function)
    labels = with_label(C, "int32")
    assert np.isnan(scanned(call)(jnp.asarray(LOGITS), labels))
    np.testing.assert_array_equal(np.isnan(over_examples(call)(LOGITS, labels)), np.arange(N) == BAD)
    assert np.isnan(jax.grad(jax.checkpoint(call))(LOGITS, labels)[BAD]).all()
    exported = jax.export.export(jax.jit(call))(LOGITS, labels)  # refuses unordered effects that it does not know
    assert np.isnan(exported.call(LOGITS, labels))
    assert np.isfinite(exported.call(LOGITS, with_label(0, "int32")))
