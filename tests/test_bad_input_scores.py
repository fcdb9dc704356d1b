"""Bad scores raise: logits, log-probabilities, and hidden states with their kernel and bias; and bad class axes."""

import jax.numpy as jnp
import pytest
from bad_calls import (
    BINARY,
    LINEAR,
    LINEAR_BINARY,
    LOSSES,
    SOFTMAXES,
    SPARSE,
    STATIC,
    C,
    F,
    N,
    assert_raises,
    each_row,
    floats,
    ints,
    rows_of,
)
from flax import linen, nnx

import jxent

FLAX_LAYER = nnx.Linear(F, C, rngs=nnx.Rngs(0))
FLAX_EMBEDDING = nnx.Embed(C, F, rngs=nnx.Rngs(0))


def scores_rows(function, name):
    """The dtype of scores, and whether they are an array. Every function checks these alike."""
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


def loss_rows(function, name):
    return rows_of(
        function,
        name,
        ("scalar", floats(), ValueError, "class axis", r"got a scalar"),
        ("no-classes", floats(N, 0), ValueError, "at least one class", rf"got shape \({N}, 0\)"),
    )


def kernel_rows():
    """Hidden states, kernel and bias of the linear loss, and the axis of its vocabulary."""
    function, integer = LINEAR, "must be a Python integer"
    shapes = rf"got {F} in hidden of shape \({N}, {F}\) and"
    return (
        rows_of(
            function,
            "hidden",
            ("scalar", floats(), ValueError, "needs a features axis", "got a scalar"),
            ("channels", floats(N, F, F + 1), ValueError, "number of features", r"pass jnp.moveaxis\(hidden, 1, -1\)$"),
        )
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
    )


def pair_rows(function):
    """The logits of P and Q."""
    return rows_of(
        function,
        "logits_p",
        ("positions", floats(N + 1, C), ValueError, "same shape", rf"\({N + 1}, {C}\) in logits_p", rf"\({N}, {C}\)"),
        ("classes", floats(N, C - 1), ValueError, "same shape", rf"\({N}, {C - 1}\) in logits_p", "in logits_q$"),
        ("row", floats(C), ValueError, "same shape", rf"\({C},\) in logits_p", "in logits_q$"),
    )


def kernel_pair_rows(function):
    """Hidden states, kernels and biases of P and Q, and the axes of their vocabularies."""
    rows = []
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


ROWS = [row for function in SOFTMAXES for row in scores_rows(function, "logits") + axis_rows(function, "logits")]
for function, name in LOSSES.items():
    ROWS += scores_rows(function, name) + loss_rows(function, name) + axis_rows(function, name)
ROWS += scores_rows(LINEAR, "hidden") + scores_rows(LINEAR, "kernel") + kernel_rows()
ROWS += scores_rows(BINARY, "logits") + scores_rows(LINEAR_BINARY, "hidden")
# The other divergence of each pair takes the same arguments, in the same code.
ROWS += scores_rows("kl_divergence", "logits_p") + scores_rows("kl_divergence", "logits_q")
ROWS += pair_rows("kl_divergence") + axis_rows("kl_divergence", "logits_q")
ROWS += kernel_pair_rows("linear_kl_divergence")


@each_row(ROWS)
def test_raises(row, how):
    assert_raises(row, how)


def test_a_tensor_of_torch():
    class Tensor:
        """A tensor with a gradient, as far as `jnp.asarray` looks."""

        def __array__(self, *args, **kwargs):
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    Tensor.__module__ = "torch"
    with pytest.raises(TypeError, match=r"^softmax: logits must be an array, .*from_dlpack\(tensor\.detach\(\)\)$"):
        jxent.softmax(Tensor())
