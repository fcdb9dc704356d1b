"""Calls with one wrong argument, in rows of a table: what the call says, under each of JAX's transformations.

A message names the function, the argument, what it must be and what came. If there is a remedy, it names that too.
The rows are in the files test_bad_input_*.py, each of which is about one kind of argument.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jxent

N, C, F = 5, 7, 3
RNG = np.random.default_rng(20240611)
LOGITS = RNG.normal(size=(N, C)).astype(np.float32)
LABELS = np.array([1, 0, 6, 3, 2])
PROBABILITIES = RNG.dirichlet(np.ones(C), N).astype(np.float32)
SPARSE = jxent.SparseLabels(np.zeros((N, 2), np.int32), np.full((N, 2), 0.5, np.float32))
LOSSES = {"nll_loss": "log_probs", "cross_entropy": "logits"}
LINEAR = "linear_cross_entropy"
SOFTMAXES = ("logsumexp", "softmax", "log_softmax")
DIVERGENCES = ("kl_divergence", "js_divergence", "tv_distance")
BINARY = "sigmoid_cross_entropy"
LINEAR_DIVERGENCES = ("linear_kl_divergence", "linear_js_divergence", "linear_tv_distance")
LINEAR_BINARY = "linear_sigmoid_cross_entropy"
MEAN_TAKERS = (*LOSSES, LINEAR, LINEAR_BINARY, *DIVERGENCES, *LINEAR_DIVERGENCES)
LOG_PROBS = {"linear_log_probs": "indices", "linear_top_k": "k"}
FUNCTIONS = (*SOFTMAXES, *MEAN_TAKERS, BINARY, *LOG_PROBS, "next_token_labels")
# The remedy for an option that is an array, traced or not.
STATIC = "static: .*static_argnames"


# --- calls ------------------------------------------------------------------------------------------------------------


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
    if function in (LINEAR, LINEAR_BINARY):
        return {"hidden": floats(N, F), "kernel": floats(F, C), "labels": jnp.asarray(LABELS, jnp.int32)}
    if function in LOG_PROBS:
        third = ints(N, 2) if function == "linear_log_probs" else 2
        return {"hidden": floats(N, F), "kernel": floats(F, C), LOG_PROBS[function]: third}
    if function == BINARY:
        return {"logits": jnp.asarray(LOGITS), "labels": ints(N, C)}
    if function in DIVERGENCES:
        return {"logits_p": jnp.asarray(LOGITS), "logits_q": floats(N, C)}
    if function in LINEAR_DIVERGENCES:
        of_p = {"hidden_p": floats(N, F), "kernel_p": floats(F, C)}
        return of_p | {"hidden_q": floats(N, F + 1), "kernel_q": floats(F + 1, C)}
    return {LOSSES[function]: jnp.asarray(LOGITS), "labels": jnp.asarray(LABELS, jnp.int32)}


def loss_of(function):
    """The loss as a function of scores and labels.

    The linear loss has the identity for a kernel, so that the scores are its hidden states and also its logits. Of its
    blocks of two positions, the last block also has a position of the block before it.
    """
    if function == LINEAR:
        return lambda scores, labels, **options: jxent.linear_cross_entropy(
            scores, np.eye(C, dtype=np.float32), labels, block_size=2, **options
        )
    return getattr(jxent, function)


# --- rows -------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A call that raises, and its message: after the function's name these patterns, in this order."""

    function: str
    argument: str
    what: str
    arguments: dict[str, Any]  # the arguments that differ from a good call
    error: type[Exception]
    says: tuple[str, ...]


def rows_of(function, argument, *table, **others):
    """Rows from tuples (what, value, error, *says). The arguments `others` go with each call."""
    return [Row(function, argument, what, {argument: v} | others, error, says) for what, v, error, *says in table]


def flag_rows(function, name):
    return rows_of(
        function,
        name,
        ("none", None, TypeError, "must be True or False", "got None"),
        ("int", 1, TypeError, "must be True or False", "got 1"),
        ("text", "yes", TypeError, "must be True or False", "got 'yes'"),
        ("array", jnp.array(True), TypeError, "must be True or False", "got ", STATIC),
    )


# --- the test of a row ------------------------------------------------------------------------------------------------


def split(row):
    """(The call's JAX arrays, its other arguments). A tuple of arrays is among the others."""
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


def each_row(rows, *covered):
    """Decorates the test of rows, each under each transformation; the short run takes these ids among others."""

    def decorate(test):
        test = pytest.mark.parametrize("row", rows, ids=["-".join(row[:3]) for row in rows])(test)
        return pytest.mark.covering(*covered)(pytest.mark.parametrize("how", TRANSFORMED)(test))

    return decorate


def assert_raises(row, how):
    arrays, others = split(row)
    call = partial(getattr(jxent, row.function), **others)
    with pytest.raises(row.error) as raised:
        TRANSFORMED[how](lambda arrays: call(**arrays), arrays)
    assert type(raised.value) is row.error
    assert_says(row, str(raised.value))


def assert_says(row, message):
    """The message starts with the function, names the argument, and then says everything that the row lists."""
    assert message.startswith(f"{row.function}: ")
    assert re.search(rf"\b{row.argument}\b", message)
    assert re.search(".*".join(row.says), message, re.DOTALL), message
