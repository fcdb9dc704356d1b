"""Random calls of `linear_sigmoid_cross_entropy`, judged by its definition: random_sigmoid.py again, with a layer.

Each class of a position is a yes or no, and the loss of a position is the sum. An error is relative to the sum of the
magnitudes of the terms, those of all classes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import random_calls as calls
import random_sigmoid as sigmoid

import jxent


class Config(NamedTuple):
    positions: tuple[int, ...] = (4,)
    classes: int = 5
    features: int = 3
    axis: int = -1  # the vocabulary's of the kernel
    dtype: str = "float32"
    probabilities: bool = False  # labels for each class; these or `entries`, or else one index
    entries: int = 0  # of `SparseLabels`
    pos_weight: bool = False
    sample_weight: bool = False
    where: bool = False
    ignored: bool = False  # some labels, which are one index or sparse
    label_smoothing: float = 0.0
    traced: bool = False  # the smoothing as an array, by which there is a gradient
    bias: bool = False
    block_size: int | None = None
    recompute: bool = False
    reduction: str = "mean"
    forward: bool = False  # the gradients in forward mode
    level: int | None = None  # as in random_calls.py

    function = "linear_sigmoid_cross_entropy"
    linear, cooled, logit_softcap = True, False, None
    differentiated = ("loss",)

    @property
    def backward_matmuls(self):
        return self.reduction == "none" or self.recompute

    @property
    def number(self):
        return int(np.prod(self.positions))


# --- values -----------------------------------------------------------------------------------------------------------


def draw(config, rng, cases):
    """NumPy arrays of `cases` cases in the dtypes of the call: (cases, number, classes)."""
    n, c, wide = config.number, config.classes, calls.wide_of(config)
    row, shape = (cases, n), (cases, n, c)
    values: dict[str, Any] = calls.layer(config, rng, cases)
    if config.bias:
        # Not in forward mode, where a tangent of 0 times the infinite derivative by another class would be NaN.
        masked = (rng.random((cases, c)) < 0.3) & (rng.random((cases, 1)) < 0.3 * (not config.forward))
        values["bias"] = np.where(masked, -np.inf, values["bias"]).astype(wide)
    labels = rng.integers(0, c, row)
    if config.entries:
        values["indices"], y = calls.entries(config, rng, labels, np.zeros(shape, bool))
        values["labels"] = y.astype(config.dtype)
    elif config.probabilities:
        y = rng.random(shape)
        values["labels"] = np.where(rng.random(shape) < 0.5, np.round(y), y).astype(config.dtype)
    else:
        labels = np.where(rng.random(row) < 0.3 * config.ignored, -100, labels)
        bad = (rng.random(row) < 0.1) & (rng.random((cases, 1)) < calls.of_bad_labels(config))
        values["labels"] = np.where(bad, rng.choice([c, -1, 2**31 - 1], row), labels).astype(np.int32)
    if config.pos_weight:
        values["pos_weight"] = (rng.uniform(0.25, 4, (cases, c)) * (rng.random((cases, c)) < 0.9)).astype(wide)
    if config.sample_weight:
        values["sample_weight"] = (rng.uniform(0.25, 4, row) * (rng.random(row) < 0.9)).astype(wide)
    if config.traced:
        values["label_smoothing"] = np.full(cases, config.label_smoothing, wide)
    if config.where:
        values["where"] = rng.random(row) < 0.7
    values["loss cotangent"] = rng.uniform(-2, 2, row).astype(wide)
    of_positions = ("hidden", "labels") if config.probabilities or config.entries else ("hidden",)
    return values | calls.anything_elsewhere(rng, counts(config, values), values, of_positions)


def counts(config, values):
    return calls.counts(config, values)


# --- jxent ------------------------------------------------------------------------------------------------------------


def call(config, values):
    """(loss, None, gradients by name) of one case, as a JAX function of its arrays."""
    shape = config.positions
    names = ("hidden", "kernel", "bias", "pos_weight", "sample_weight", "label_smoothing")
    names += ("labels",) if config.probabilities or config.entries else ()
    wanted = {name: values[name] for name in names if name in values}

    def loss(wanted):
        given = {name: wanted[name] for name in ("bias", "pos_weight") if name in wanted}
        given |= {name: getattr(config, name) for name in ("block_size", "recompute", "reduction")}
        given |= {"vocab_axis": config.axis, "label_smoothing": wanted.get("label_smoothing", config.label_smoothing)}
        if config.sample_weight:
            given["sample_weight"] = wanted["sample_weight"].reshape(shape)
        if config.where:
            given["where"] = values["where"].reshape(shape)
        labels = wanted["labels"].reshape(*shape, -1) if "labels" in wanted else values["labels"].reshape(shape)
        if config.entries:
            labels = jxent.SparseLabels(values["indices"].reshape(*shape, -1), labels)
        value = jxent.linear_sigmoid_cross_entropy(*calls.layer_of(config, wanted), labels, **given)
        return {"loss": value}, value

    cotangent = values["loss cotangent"]
    cotangent = cotangent.reshape(shape) if config.reduction == "none" else cotangent[0]
    value, gradients = calls.gradients_of(config, loss, wanted, {"loss": cotangent})
    return value, None, gradients


run = partial(calls.run, call=call)


# --- the definitions --------------------------------------------------------------------------------------------------


@mpmath.workdps(50)
def expected(config, values, arithmetic=oracle.Float64):
    """Name -> `random_calls.Expected`, for the names of `run`."""
    with np.errstate(all="ignore"):
        return _expected(config, values, arithmetic)


def _expected(config, values, a):
    keep, one = counts(config, values), a.array(1)
    hidden, kernel, x = calls.logits_of(config, values, keep, a)
    n, c, least, row = config.number, config.classes, 16 * calls.tiny(config), keep[..., None]
    if config.entries or config.probabilities:
        y = np.where(row, calls.dense(config, values, a), 0 * one)
        bad = np.zeros(keep.shape, bool)
    else:
        y = a.array(oracle.one_hot(values["labels"], c))
        bad = keep & ~np.isin(values["labels"], np.arange(c))
    w = a.array(values.get("pos_weight", np.ones((len(x), c))))[:, None]
    e = a.array(calls.as_held(config, config.label_smoothing))
    yes, no = (1 - e) * y + e / 2, (1 - e) * (1 - y) + e / 2
    cost_of_yes, cost_of_no = sigmoid.costs(x, a)
    p_yes, p_no = a.exp(-cost_of_yes), a.exp(-cost_of_no)
    losses = np.sum(oracle.times(w * yes, cost_of_yes) + oracle.times(no, cost_of_no), -1)
    # The probabilities of a class that is listed twice are added up, and 1 less their sum has that rounding.
    rounded = 0 * y
    if config.entries:
        listed = (values["indices"][..., None] == np.arange(c)) & (values["labels"] != 0)[..., None]
        again = np.maximum(np.sum(listed, -2) - 1, 0) * float(jnp.finfo(calls.wide_of(config)).eps)
        rounded = (1 - e) * y * again
    of_rounding = np.sum(oracle.times(rounded * w, cost_of_yes) + oracle.times(rounded, cost_of_no), -1)
    of_rounding = np.where(of_rounding == np.inf, 0, of_rounding)  # of an infinite loss

    s = a.array(np.where(keep, values["sample_weight"] if config.sample_weight else 1, 0))
    total = np.sum(s, -1, keepdims=True)
    mean, none = config.reduction == "mean", config.reduction == "none"
    divisor = np.where(total == 0, a.array(np.nan), total) if mean else one
    g = a.array(values["loss cotangent"] if none else np.repeat(values["loss cotangent"][:, :1], n, 1))
    per = np.where(total == 0, 0 * g, g / divisor) if mean else g
    found = {}

    def add(name, value, scale, lost=least):
        found[name] = calls.Expected(*(np.asarray(array, np.float64) for array in (value, abs(scale), 1.0, lost)))

    # An index out of range is an error whatever its weight.
    losses, loss = (np.where(bad, a.array(np.nan), array) for array in (losses, oracle.times(s, losses)))
    loss = loss if none else np.sum(loss, -1, keepdims=True) / divisor
    of_loss = oracle.times(s, of_rounding)
    of_loss = of_loss if none else np.sum(of_loss, -1, keepdims=True) / divisor
    add("loss", loss, loss, lost=n * c * least + of_loss)
    ks = np.where(bad, a.array(np.nan), per * s)[..., None]
    size = abs(ks)
    lost = least * (1 + size) + size * rounded * (p_no + w * p_yes)
    dx, scale = ks * (no * p_yes - w * yes * p_no), size * (no * p_yes + w * yes * p_no)
    for name, (value, terms, under) in calls.of_layer(config, hidden, kernel, dx, scale, lost).items():
        add(name, value, terms, under)
    by_label, terms = w * cost_of_yes - cost_of_no, w * cost_of_yes + cost_of_no
    if config.entries or config.probabilities:
        of_labels = ks * (1 - e) * by_label, size * (1 - e) * terms, calls.subnormal_of(config) + lost
        if config.entries:
            of_labels = (calls._at_entries(config, values, array) for array in of_labels)
        add("d labels", *of_labels)
    if config.traced:
        # The loss is that of the labels and that of shares of 1/2, weighted, and its derivative is their difference.
        by_smoothing, of_labels = ks * (one / 2 - y) * by_label, y * w * cost_of_yes + (1 - y) * cost_of_no
        add("d label_smoothing", np.sum(by_smoothing, (1, 2)), np.sum(size * (terms / 2 + of_labels), (1, 2)))
    if config.pos_weight:
        by_weight = ks * oracle.times(yes, cost_of_yes)
        add("d pos_weight", np.sum(by_weight, 1), np.sum(abs(by_weight), 1))
    if config.sample_weight:
        value, terms, rounding = losses, losses, of_rounding
        if mean:
            value, terms, rounding = losses - loss, losses + loss, of_rounding + of_loss
        value, terms, rounding = (np.where(keep, per * array, 0 * per) for array in (value, terms, rounding))
        add("d sample_weight", value, terms, least + abs(rounding))
    return found


def bound(config, name):
    """The promised relative error."""
    return calls.bound(config, "d sample_weight" if name in ("d pos_weight", "d label_smoothing") else name)


judge = partial(calls.judge, bound=bound)
