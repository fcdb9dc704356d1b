"""Bad labels raise: class indices, class probabilities, `SparseLabels`, tokens, and bad `ignore_index`."""

import jax.numpy as jnp
import numpy as np
from bad_calls import (
    BINARY,
    LINEAR,
    LINEAR_BINARY,
    LOSSES,
    PROBABILITIES,
    SPARSE,
    STATIC,
    C,
    N,
    Row,
    assert_raises,
    each_row,
    floats,
    ints,
    rows_of,
)

import jxent


def label_rows(function, name):
    kind = r"must be integers \(class indices\) or floating point \(class probabilities\)"
    index = f"integer labels must have the shape of {name} without its class axis"
    probability = f"class probabilities and must have the shape of {name}"
    if function in (LINEAR, LINEAR_BINARY):
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
    if function in (LINEAR, LINEAR_BINARY):
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


def ignore_index_rows(function):
    integer = "must be a Python integer"
    return rows_of(
        function,
        "ignore_index",
        ("float", -100.0, TypeError, integer, "got -100.0"),
        ("bool", True, TypeError, integer, "got True"),
        ("text", "pad", TypeError, integer, "got 'pad'"),
        ("array", jnp.int32(0), TypeError, integer, "got ", STATIC),
    ) + rows_of(
        function,
        "ignore_index",
        ("probabilities", 0, ValueError, "integer labels", "class probabilities.*float32", "where="),
        labels=jnp.asarray(PROBABILITIES),
    )


def binary_rows():
    kind = "must be floating point, integers or booleans"
    return rows_of(
        BINARY,
        "labels",
        ("complex", jnp.ones((N, C), jnp.complex64), TypeError, kind, "got complex64"),
        ("none", None, TypeError, "must be an array", "got None"),
        ("sparse", SPARSE, TypeError, "must be an array", "got SparseLabels"),
        ("indices", ints(N), ValueError, rf"\({N}, {C}\)", rf"got \({N},\)", "given by its index", "cross_entropy"),
        ("column", ints(N, 1), ValueError, rf"\({N}, {C}\)", rf"got \({N}, 1\)", "cross_entropy"),
        ("long", ints(N + 1, C), ValueError, rf"\({N}, {C}\)", rf"got \({N + 1}, {C}\)$"),
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
        + rows_of(
            function,
            "offset",
            ("zero", 0, ValueError, "must be at least 1", "got 0"),
            ("negative", -1, ValueError, "must be at least 1", "got -1"),
            ("float", 1.0, TypeError, "must be a Python integer", "got 1.0"),
            ("none", None, TypeError, "must be a Python integer", "got None"),
            ("array", jnp.int32(1), TypeError, "must be a Python integer", "got ", STATIC),
        )
        + rows_of(
            function,
            "where",
            ("ints", ints(N), TypeError, "must be boolean", "got int32", "mask != 0"),
            ("shape", jnp.ones(N + 1, bool), ValueError, rf"must broadcast to the tokens, \({N},\)", rf"\({N + 1},\)"),
        )
        + rows_of(
            function,
            "segment_ids",
            ("float", floats(N), TypeError, "must be integers", "got float32"),
            ("bool", jnp.ones(N, bool), TypeError, "must be integers", "got bool"),
            ("shape", ints(N + 1), ValueError, rf"must broadcast to the tokens, \({N},\)", rf"\({N + 1},\)"),
            ("one", ints(1), ValueError, f"an id for each of the {N} tokens", r"got shape \(1,\)"),
            ("scalar", ints(), ValueError, f"an id for each of the {N} tokens", r"got shape \(\)"),
        )
        + rows_of(function, "ignore_index", ("40-bits", 2**40, ValueError, f"ignore_index={2**40}", f"{fits} int32"))
        + [Row(function, "ignore_index", "default-in-uint8", unsigned, ValueError, ("-100", f"{fits} uint8", "astype"))]
    )


ROWS = [row for function, name in LOSSES.items() for row in label_rows(function, name) + ignore_index_rows(function)]
ROWS += label_rows(LINEAR, None) + ignore_index_rows(LINEAR)
ROWS += label_rows(LINEAR_BINARY, None) + ignore_index_rows(LINEAR_BINARY)
ROWS += (
    sparse_rows("cross_entropy") + sparse_rows(LINEAR) + sparse_rows(LINEAR_BINARY) + binary_rows() + next_token_rows()
)


@each_row(ROWS, "next_token_labels-tokens-scalar-eager")
def test_raises(row, how):
    assert_raises(row, how)
