"""Bad options raise: numbers, flags, reductions, the sizes of blocks, precisions, and options by position."""

import re

import jax.numpy as jnp
import pytest
from bad_calls import (
    BINARY,
    FUNCTIONS,
    LINEAR,
    LINEAR_BINARY,
    LOSSES,
    STATIC,
    C,
    N,
    assert_raises,
    each_row,
    flag_rows,
    floats,
    good,
    rows_of,
)

import jxent


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
    """The options that `nll_loss` does not take."""
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
        + temperature_rows(function)
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


def temperature_rows(function):
    values = (0, -1.0, float("nan"), float("inf"), 1e-46, 1e-38, 1e39)
    rows = scalar_rows(function, "temperature", "must be finite and positive", values)
    return [row for row in rows if row.what != "vector"] + rows_of(
        function,
        "temperature",
        ("of-classes", floats(N, C), ValueError, "must broadcast to the positions", rf"got shape \({N}, {C}\)"),
        ("of-others", floats(N + 1), ValueError, "must broadcast to the positions", rf"got shape \({N + 1},\)"),
        ("integers", jnp.ones((N, 1, 1), int), ValueError, "must broadcast to the positions"),
        ("flags", jnp.ones(N, bool), TypeError, "must be floating point", "got bool"),
        ("list", ["warm"], TypeError, "must be an array", "got .*warm"),
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


ROWS = [row for function in LOSSES for row in reduction_rows(function)] + cross_entropy_rows("cross_entropy")
ROWS += flag_rows("logsumexp", "keepdims")
ROWS += reduction_rows(LINEAR) + cross_entropy_rows(LINEAR) + sweep_rows(LINEAR)
for binary in (BINARY, LINEAR_BINARY):
    ROWS += reduction_rows(binary) + scalar_rows(binary, "label_smoothing", r"must be in \[0, 1\]", (-0.1, 1.5))
ROWS += sweep_rows(LINEAR_BINARY)
# Except for `beta`, the other divergence of each pair takes the same arguments, in the same code.
ROWS += reduction_rows("kl_divergence") + temperature_rows("kl_divergence") + beta_rows("js_divergence")
ROWS += reduction_rows("linear_kl_divergence") + temperature_rows("linear_kl_divergence")
ROWS += sweep_rows("linear_kl_divergence") + beta_rows("linear_js_divergence")


@each_row(ROWS)
def test_raises(row, how):
    assert_raises(row, how)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_options_are_keyword_only(function):
    arrays = list(good(function).values())
    extra = {"logsumexp": [1], "softmax": [1], "log_softmax": [1]}.get(function, [])
    with pytest.raises(
        TypeError, match=rf"^{function}: takes .* by position, got {len(arrays) + len(extra) + 1}; options"
    ):
        getattr(jxent, function)(*arrays, *extra, None)
