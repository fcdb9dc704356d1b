"""Bad weights and masks raise: `class_weight`, `sample_weight`, `pos_weight`, and `where`."""

import jax.numpy as jnp
from bad_calls import (
    BINARY,
    LINEAR,
    LINEAR_BINARY,
    LOSSES,
    SOFTMAXES,
    C,
    N,
    assert_raises,
    each_row,
    floats,
    ints,
    rows_of,
)


def class_rows(function):
    classes = rf"one entry per class, shape \({C},\)"
    return rows_of(
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


def mask_rows(function):
    """The mask of a softmax, which is over classes."""
    return rows_of(
        function,
        "where",
        ("int", ints(N, C), TypeError, "must be boolean", "got int32", r"mask != 0"),
        ("float", floats(N, C), TypeError, "must be boolean", "got float32", r"mask != 0"),
        ("list", [1] * C, TypeError, "must be boolean", "got int32", r"jnp\.asarray\(mask\) != 0"),
        ("text", "classes", TypeError, "must be an array", "got 'classes'"),
        ("shape", jnp.ones(N, bool), ValueError, rf"broadcast to the logits, \({N}, {C}\)", rf"got shape \({N},\)"),
        ("rank", jnp.ones((1, N, C), bool), ValueError, "broadcast to the logits", rf"got shape \(1, {N}, {C}\)"),
    )


def binary_rows():
    function, positions = BINARY, rf"must broadcast to the logits, \({N}, {C}\)"
    return (
        rows_of(
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


def class_pos_weight_rows():
    wanted = rf"must be a number or have one entry per class, shape \({C},\)"
    return rows_of(
        LINEAR_BINARY,
        "pos_weight",
        ("complex", jnp.ones(C, jnp.complex64), TypeError, "must be floating point", "got complex64", "astype"),
        ("text", "rare", TypeError, "must be an array", "got 'rare'"),
        ("long", floats(C + 1), ValueError, wanted, rf"got \({C + 1},\)"),
        ("positions", floats(N, C), ValueError, wanted, rf"got \({N}, {C}\)"),
    )


ROWS = [row for function in SOFTMAXES for row in mask_rows(function)]
ROWS += [row for function in (*LOSSES, LINEAR) for row in position_rows(function) + class_rows(function)]
# The other divergence of each pair takes the same arguments, in the same code.
ROWS += binary_rows() + class_pos_weight_rows() + position_rows(LINEAR_BINARY)
ROWS += position_rows("kl_divergence") + position_rows("linear_kl_divergence")


@each_row(ROWS)
def test_raises(row, how):
    assert_raises(row, how)
