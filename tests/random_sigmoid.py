"""Random calls of `sigmoid_cross_entropy`, judged by its definition: random_calls.py again, each logit a yes or no.

An error is relative to the sum of the magnitudes of the terms, w a s(-x) and b s(x) in the notation of the loss, and of
those that their derivatives have.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import random_calls as calls

import jxent


class Config(NamedTuple):
    positions: tuple[int, ...] = (2, 3)
    dtype: str = "float32"
    labels: str = "float"  # or int, bool
    pos_weight: bool = False
    sample_weight: bool = False
    where: bool = False
    label_smoothing: float = 0.0
    traced: bool = False  # the smoothing as an array, by which there is a gradient
    reduction: str = "mean"
    level: int | None = None  # as in random_calls.py

    @property
    def function(self):
        return "sigmoid_cross_entropy"

    @property
    def number(self):
        return int(np.prod(self.positions))


# --- values -----------------------------------------------------------------------------------------------------------


def draw(config, rng, cases):
    """NumPy arrays of `cases` cases in the dtypes of the call, (cases, number); `pos_weight` is of the last axis."""
    shape, wide = (cases, config.number), calls.wide_of(config)
    x = calls.scores(config, rng, shape)
    if config.dtype != "float16":
        x = np.where(np.isinf(x), x, np.clip(x, -1e36, 1e36)).astype(config.dtype)  # so that the sum is finite
    x = np.where(rng.random(shape) < 0.5, x, -x)
    y = rng.random(shape)
    y = np.where((config.labels != "float") | np.isinf(x) | (rng.random(shape) < 0.5), np.round(y), y)
    dtypes = {"float": config.dtype, "int": "int32", "bool": "bool"}
    values: dict[str, Any] = {"logits": x, "labels": y.astype(dtypes[config.labels])}
    if config.pos_weight:
        values["pos_weight"] = rng.uniform(0.25, 4, (cases, config.positions[-1])).astype(wide)
    if config.sample_weight:
        values["sample_weight"] = (rng.uniform(0.25, 4, shape) * (rng.random(shape) < 0.9)).astype(wide)
    if config.traced:
        values["label_smoothing"] = np.full(cases, config.label_smoothing, wide)
    if config.where:
        values["where"] = rng.random(shape) < 0.7
    values["cotangent"] = rng.uniform(-2, 2, shape).astype(wide)
    of_positions = ("logits", "labels") if config.labels == "float" else ("logits",)
    return values | calls.anything_elsewhere(rng, counts(config, values), values, of_positions)


def counts(config, values):
    return values["where"] if config.where else np.ones(values["logits"].shape, bool)


# --- jxent ------------------------------------------------------------------------------------------------------------


def call(config, values):
    """(loss, None, gradients by name) of one case, as a JAX function of its arrays."""
    wanted = {name: array for name, array in values.items() if name not in ("where", "cotangent")}
    if config.labels != "float":
        del wanted["labels"]

    def loss(wanted):
        given = {name: array.reshape(config.positions) for name, array in wanted.items() if array.size == config.number}
        given |= {name: wanted[name] for name in ("pos_weight", "label_smoothing") if name in wanted}
        if config.where:
            given["where"] = values["where"].reshape(config.positions)
        given.setdefault("labels", values["labels"].reshape(config.positions))
        given.setdefault("label_smoothing", config.label_smoothing)
        return jxent.sigmoid_cross_entropy(
            given.pop("logits"), given.pop("labels"), **given, reduction=config.reduction
        )

    value, pull = jax.vjp(loss, wanted)
    cotangent = values["cotangent"].astype(value.dtype)
    return value, None, pull(cotangent.reshape(value.shape) if value.ndim else cotangent[0])[0]


run = partial(calls.run, call=call)


# --- the definitions --------------------------------------------------------------------------------------------------


@mpmath.workdps(50)
def expected(config, values, arithmetic=oracle.Float64):
    """Name -> `random_calls.Expected`, for the names of `run`."""
    with np.errstate(all="ignore"):
        return _expected(config, values, arithmetic)


def _expected(config, values, a):
    keep, one = counts(config, values), a.array(1)
    n, least = config.number, 16 * calls.tiny(config)
    logits = np.where(keep, values["logits"].astype(np.float64), 0)
    x = a.array(np.where(abs(logits) < calls.tiny(config), 0, logits))  # XLA takes subnormal numbers for 0
    y = a.array(np.where(keep, values["labels"].astype(np.float64), 0))
    w = np.tile(values["pos_weight"], n // config.positions[-1]) if config.pos_weight else np.ones(keep.shape)
    w, e = a.array(w), a.array(calls.as_held(config, config.label_smoothing))
    yes, no = (1 - e) * y + e / 2, (1 - e) * (1 - y) + e / 2
    cost_of_yes, cost_of_no = costs(x, a)
    p_yes, p_no = a.exp(-cost_of_yes), a.exp(-cost_of_no)
    losses = w * oracle.times(yes, cost_of_yes) + oracle.times(no, cost_of_no)

    s = a.array(np.where(keep, values["sample_weight"] if config.sample_weight else 1, 0))
    total = np.sum(s, -1, keepdims=True)
    mean, none = config.reduction == "mean", config.reduction == "none"
    divisor = np.where(total == 0, a.array(np.nan), total) if mean else one
    g = a.array(values["cotangent"] if none else np.repeat(values["cotangent"][:, :1], n, 1))
    per = np.where(total == 0, 0 * g, g / divisor) if mean else g
    step = float(jnp.finfo(np.float16).smallest_subnormal) if config.dtype == "float16" else 0.0
    found = {}

    def add(name, value, scale, lost=least):
        found[name] = calls.Expected(*(np.asarray(array, np.float64) for array in (value, abs(scale), 1.0, lost)))

    loss = oracle.times(s, losses)
    loss = loss if none else np.sum(loss, -1, keepdims=True) / divisor
    add("loss", loss, loss)
    ks = per * s
    size, lost = abs(ks), step + least * (1 + abs(ks))
    add("d logits", ks * (no * p_yes - w * yes * p_no), size * (no * p_yes + w * yes * p_no), lost)
    by_label, terms = w * cost_of_yes - cost_of_no, w * cost_of_yes + cost_of_no
    if config.labels == "float":
        add("d labels", ks * (1 - e) * by_label, size * (1 - e) * terms, lost)
    if config.traced:
        by_smoothing, terms = ks * (one / 2 - y) * by_label, size * abs(one / 2 - y) * terms
        add("d label_smoothing", np.sum(by_smoothing, -1), np.sum(terms, -1))
    if config.pos_weight:
        by_weight = (ks * oracle.times(yes, cost_of_yes)).reshape(len(x), -1, config.positions[-1])
        add("d pos_weight", np.sum(by_weight, 1), np.sum(abs(by_weight), 1))
    if config.sample_weight:
        value, terms = (losses - loss, losses + loss) if mean else (losses, losses)
        add("d sample_weight", *(np.where(keep, per * array, 0 * per) for array in (value, terms)))
    return found


def costs(x, a):
    """(s(-x), s(x))."""
    zero, log_z = 0 * a.array(1), a.log1p(a.exp(-abs(x)))
    return np.where(x < 0, -x, zero) + log_z, np.where(x > 0, x, zero) + log_z


# --- the judgement ----------------------------------------------------------------------------------------------------


def bound(config, name):
    """The promised relative error."""
    if config.dtype == "float64":
        return 1e-12
    kind = jnp.finfo(config.dtype)
    rounded = kind.bits == 16 and name in ("d logits", "d labels")
    return 5e-6 + rounded * float(kind.eps) / 2


judge = partial(calls.judge, bound=bound)
