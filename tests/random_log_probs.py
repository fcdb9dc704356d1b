"""Random calls of `linear_log_probs` and `linear_top_k`, judged by their definitions: random_calls.py again.

Each position has k + 1 classes: those of its list, and the rest. With cotangents c[j], whose sum is C, the gradients by
the logits of these classes are c[j] (1 - p[j]) - p[j] (C - c[j]), or c[j] - p[j] C. An error is relative to the sum of
the terms' magnitudes in the better form, as in random_calls.py, and that of a log-probability to itself.
"""

from functools import partial
from typing import Any, NamedTuple

import mpmath
import numpy as np
import oracle
import random_calls as calls

import jxent


class Config(NamedTuple):
    function: str = "linear_log_probs"  # or linear_top_k
    positions: tuple[int, ...] = (4,)
    classes: int = 5
    features: int = 3
    axis: int = -1  # the vocabulary's of the kernel
    dtype: str = "float32"
    entries: int = 2  # k
    where: bool = False
    logit_softcap: float | None = None
    temperature: float = 1.0
    by_position: bool = False  # the temperature, which is then drawn
    traced: bool = False  # the temperature as an array, by which there is a gradient
    bias: bool = False
    block_size: int | None = None
    forward: bool = False  # the gradients in forward mode
    level: int | None = None  # as in random_calls.py

    linear = backward_matmuls = True
    differentiated = "log_probs", "log_rest"
    reduction = "none"

    @property
    def number(self):
        return int(np.prod(self.positions))

    @property
    def cooled(self):
        return self.temperature != 1 or self.by_position


# --- values -----------------------------------------------------------------------------------------------------------


def draw(config, rng, cases):
    """NumPy arrays of `cases` cases in the dtypes of the call: (cases, number, entries)."""
    n, c, wide = config.number, config.classes, calls.wide_of(config)
    row, shape = (cases, n), (cases, n, config.entries)
    values: dict[str, Any] = calls.layer(config, rng, cases)
    if config.bias:  # of some cases far from 0, of some with masked classes
        masked = (rng.random((cases, c)) < 0.3) & (rng.random((cases, 1)) < 0.3) & (np.arange(c) > 0)
        bias = values["bias"] + rng.choice([0, 0, 4096], (cases, 1))
        values["bias"] = np.where(masked, -np.inf, bias).astype(wide)
    if config.function == "linear_log_probs":
        near = rng.integers(0, c, row)[..., None]  # some classes repeat
        indices = np.where(rng.random(shape) < 0.3, near, rng.integers(0, c, shape))
        indices = np.where(rng.random(shape) < 0.1, -1, indices)
        bad = (rng.random(shape) < 0.1) & (rng.random((cases, 1, 1)) < calls.of_bad_labels(config))
        values["indices"] = np.where(bad, rng.choice([c, -2, -100, 2**31 - 1], shape), indices).astype(np.int32)
    if config.where:
        values["where"] = rng.random(row) < 0.7
    values |= calls.temperatures(config, rng, row)
    some = rng.random((cases, 1)) < 0.8
    masked = np.isneginf(values["bias"])[:, None] if config.bias else np.zeros((cases, 1, c), bool)
    inside = np.clip(_indices(config, values), 0, c - 1)
    of_masked = np.take_along_axis(np.broadcast_to(masked, (cases, n, c)), inside, -1)
    values["log_probs cotangent"] = np.where(of_masked, 0, rng.uniform(-2, 2, shape) * some[..., None]).astype(wide)
    values["log_rest cotangent"] = (rng.uniform(-2, 2, row) * (1 - some * (rng.random((cases, 1)) < 0.3))).astype(wide)
    of_positions = ("hidden", "temperature") if config.by_position else ("hidden",)
    return values | calls.anything_elsewhere(rng, counts(config, values), values, of_positions)


def counts(config, values):
    return values["where"] if config.where else np.ones(values["hidden"].shape[:2], bool)


# --- jxent ------------------------------------------------------------------------------------------------------------


def call(config, values):
    """(the numbers, None, gradients by name) of one case, as a JAX function of its arrays."""
    shape, function = config.positions, getattr(jxent, config.function)
    of_classes = values["indices"].reshape(*shape, -1) if "indices" in values else config.entries
    options = {name: getattr(config, name) for name in ("logit_softcap", "block_size")} | {"vocab_axis": config.axis}
    if config.where:
        options["where"] = values["where"].reshape(shape)

    def numbers(wanted):
        temperature = wanted.get("temperature", config.temperature)
        temperature = temperature.reshape(shape) if config.by_position else temperature
        given = options | {"bias": wanted.get("bias"), "temperature": temperature}
        out = function(*calls.layer_of(config, wanted), of_classes, **given)
        return {name: getattr(out, name) for name in config.differentiated}, out._asdict()

    wanted = {name: values[name] for name in ("hidden", "kernel", "bias", "temperature") if name in values}
    cotangents = {"log_probs": values["log_probs cotangent"].reshape(*shape, -1)}
    cotangents["log_rest"] = values["log_rest cotangent"].reshape(shape)
    found, gradients = calls.gradients_of(config, numbers, wanted, cotangents)
    return found, None, gradients


run = partial(calls.run, call=call)


# --- the definitions --------------------------------------------------------------------------------------------------


@mpmath.workdps(50)
def expected(config, values, arithmetic=oracle.Float64):
    """Name -> `random_calls.Expected`, for the names of `run`."""
    with np.errstate(all="ignore"):
        return _expected(config, values, arithmetic)


def _indices(config, values):
    """The list of each position: as given, or those of `lax.top_k`, to which -0 is less than 0."""
    if "indices" in values:
        return values["indices"]
    x = calls.logits_of(config, values, counts(config, values), oracle.Float64)[2]
    below = np.zeros(x.shape)
    if config.features == 1 and not config.bias:  # more products are added to a 0 of XLA's
        below = (x == 0) & np.signbit(values["hidden"] * values["kernel"])
    return np.lexsort((below, -x), -1)[..., : config.entries]


def _expected(config, values, a):
    keep, zero, one = counts(config, values), 0 * a.array(1), a.array(1)
    hidden, kernel, x = calls.logits_of(config, values, keep, a)
    cap, least = config.logit_softcap, 16 * calls.tiny(config)
    temperature = values["temperature"] if config.by_position else calls.as_held(config, config.temperature)
    labels = np.zeros(keep.shape, int)
    t = oracle.terms(x, labels, where=keep, logit_softcap=cap, temperature=temperature, arithmetic=a)
    p, below, (cases, _, c) = a.exp(t.log_p), calls._below(t, cap, a), x.shape
    indices = _indices(config, values)
    inside, none = np.clip(indices, 0, c - 1), indices == -1
    bad = (indices != inside) & ~none
    entries = (inside[..., None] == np.arange(c)) & (indices == inside)[..., None]
    listed = np.any(entries, -2)
    log_p = np.take_along_axis(t.log_p, inside, -1)
    log_p = np.where(bad, a.array(np.nan), np.where(none, a.array(-np.inf), log_p))
    empty, bad_row = np.all(listed | t.masked, -1), np.any(bad, -1)
    _, top, log_z = oracle.normalized(np.where(listed, a.array(-np.inf), t.log_p), a)
    of_listed = np.sum(np.where(listed, p, zero), -1)
    log_rest = np.where(of_listed < 0.5, a.log1p(-np.where(of_listed < 0.5, of_listed, zero)), top + log_z)
    log_rest = np.where(empty, a.array(-np.inf), log_rest)
    found = {}

    def add(name, value, scale, slack=1.0, lost=least):
        found[name] = calls.Expected(*(np.asarray(array, np.float64) for array in (value, scale, slack, lost)))

    found["indices"] = calls.Expected(np.where(keep[..., None], indices, 0).reshape(cases, -1), np.zeros(1))
    out = np.where(keep[..., None], log_p, zero).reshape(cases, -1)
    add("log_probs", out, abs(out), lost=c * least)
    out = np.where(keep, np.where(bad_row, a.array(np.nan), log_rest), zero)
    add("log_rest", out, abs(out), lost=c * least)

    g = a.array(np.where(keep[..., None], values["log_probs cotangent"], 0))[..., None]
    to_rest = np.where(empty | ~keep, zero, a.array(values["log_rest cotangent"]))[..., None]
    parts, sizes = (
        np.concatenate([np.sum(np.where(entries, f(g), zero), -2), f(to_rest)], -1) for f in (lambda v: v, abs)
    )
    log_p = np.concatenate([t.log_p, log_rest[..., None]], -1)
    near, p_of_all = log_p > np.log(0.5), a.exp(log_p)
    not_p = -a.expm1(np.where(near, log_p, -one))
    of_others, of_all = calls._others(parts), np.sum(parts, -1, keepdims=True)
    to_y = np.where(near, parts * not_p - p_of_all * of_others, parts - p_of_all * of_all)
    of_others, of_all = calls._others(sizes), np.sum(sizes, -1, keepdims=True)
    scale = np.where(near, sizes * not_p + p_of_all * of_others, sizes + p_of_all * of_all)
    no_share = t.masked | listed | empty[..., None]
    share = np.where(no_share, zero, a.exp(t.log_p - np.where(empty, zero, log_rest)[..., None]))
    dx, scale = (np.where(listed, array[..., :-1], array[..., -1:] * share) for array in (to_y, scale))
    dx, scale = (np.where(t.masked, zero, array) for array in (dx, scale))
    dx = np.where(bad_row[..., None] & keep[..., None], a.array(np.nan), dx)
    lost = np.broadcast_to(least * (1 + of_all), dx.shape)
    far = np.where(np.asarray(t.log_p, np.float64) < -64, 2.0, 1.0)
    slope = one
    if cap is not None:
        u = np.where(t.masked, zero, t.logits) / cap
        far, slope = far + np.asarray(abs(u), np.float64) * 2 * np.finfo(np.float32).eps / 5e-6, 1 / a.cosh(u) ** 2
    if "temperature" in values:
        over = -1 if config.by_position else (1, 2)
        terms = dx * below, scale * below, lost * (1 + below) ** 2
        value, size, under = (np.sum(array / t.temperature, over) for array in terms)
        add("d temperature", value, size, np.max(far, over), under)
    slope = slope / t.temperature
    dx, scale, lost = dx * slope, scale * slope, lost / np.minimum(t.temperature, one)
    for name, (value, size, under) in calls.of_layer(config, hidden, kernel, dx, scale, lost).items():
        add(name, value, size, float(np.max(far)), under)
    return found


bound, judge = calls.bound, calls.judge
