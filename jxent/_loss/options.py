"""The options of a loss, static or traced, and the arrays that it takes besides logits and labels."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jxent._core.costs import Form, Scalars, wanted_costs
from jxent._core.passes import compute_dtype
from jxent._loss import checks
from jxent._loss.axis_names import Over


class Options(NamedTuple):
    """What is static of a call."""

    function: str  # the names of the public function and of its first argument, for what is reported
    argument: str
    form: Form
    scalars: Scalars  # None for one that is traced
    ignore_index: int | None  # None ignores no label
    reduction: str
    batch_axis_name: tuple


class Weights(NamedTuple):
    """The arrays of a call besides logits (or hidden states) and labels; None for what is not given."""

    class_weight: Array | None  # (classes,)
    sample_weight: Array | None  # this and `where` broadcast to the positions
    where: Array | None
    scalars: Scalars  # None for one that is static
    temperature: Array | None = None  # of shape (), see `CostInputs`


def options_of(names, axis, labels, over: Over, scalars, ignore_index, reduction, softcap=None, return_stats=False):
    """(`Options`, the `Scalars` that are traced). `scalars` are as of `checks`."""
    function, argument = names
    ignore_index = checks.ignored_class(function, ignore_index, labels)
    softcap, reduction = checks.softcap(function, softcap), checks.reduction(function, reduction)
    stats = checks.flag(function, "return_stats", return_stats)
    form = Form(axis, softcap, wanted_costs(scalars), stats, over.shards)
    static = Scalars._make(value if isinstance(value, float) else None for value in scalars)
    traced = Scalars._make(None if isinstance(value, float) else value for value in scalars)
    return Options(function, argument, form, static, ignore_index, reduction, over.batch), traced


def divergence_options(names, axis, over: Over, divergence, reduction):
    """`Options` of a divergence."""
    form = Form(axis, None, ("divergence",), False, over.shards, divergence)
    function, argument = names
    return Options(function, argument, form, Scalars(), None, checks.reduction(function, reduction), over.batch)


def divergence_weights(function, temperature, sample_weight, where, logits, axis, *others):
    """The `Weights` of a divergence between logits, of which only shape and dtype are read, and others."""
    temperature = checks.scalar(function, "temperature", temperature, 0, math.inf, positive=True)
    _, sample_weight, where = checks.weights(function, None, sample_weight, where, logits, axis)
    if not isinstance(temperature, Array):
        dtype = compute_dtype(logits.dtype, *(other.dtype for other in others))
        temperature = None if temperature == 1 else jnp.asarray(temperature, dtype)
    none_traced = Scalars._make(None for _ in Scalars._fields)
    return Weights(None, sample_weight, where, none_traced, temperature)


def scalars_of(options, weights):
    """All of the `Scalars`, static or traced."""
    return Scalars._make(b if a is None else a for a, b in zip(options.scalars, weights.scalars, strict=True))
