"""Random calls of the six divergences, judged by their definitions: random_calls.py again, with two sides.

Rows of Q are those of P with noise of 30 to 1e-6, at any offset, or have nothing to do with them. The value has terms
of one sign, and its error is relative to it. Those of a gradient are relative to the largest element of its row, as
docs/theory/formulas.md promises.
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
    function: str = "kl_divergence"  # or js_divergence or tv_distance, or each with linear_ in front
    positions: tuple[int, ...] = (4,)
    classes: int = 5
    features: tuple[int, int] = (3, 3)  # of P and of Q, in a linear form
    axis: Any = -1  # the class axis; of a linear form the vocabulary's of both kernels
    dtype: str = "float32"
    beta: float | None = None  # for the Jensen-Shannon divergence
    temperature: float = 1.0
    by_position: bool = False  # the temperature, which is then drawn
    traced: bool = False  # the temperature as an array, by which there is a gradient
    sample_weight: bool = False
    where: bool = False
    bias: bool = False
    block_size: int | None = None
    recompute: bool = False
    reduction: str = "mean"
    producer: str | None = None  # as in random_calls.py, of the logits of both sides
    level: int | None = None

    @property
    def linear(self):
        return self.function.startswith("linear")

    @property
    def number(self):
        return int(np.prod(self.positions))


# --- values -----------------------------------------------------------------------------------------------------------


def draw(config, rng, cases):
    """NumPy arrays of `cases` cases in the dtypes of the call, the class axis last: (cases, number, classes)."""
    values = _layers(config, rng, cases) if config.linear else _rows(config, rng, cases)
    shape, wide = (cases, config.number), calls.wide_of(config)
    if config.by_position:
        values["temperature"] = rng.uniform(0.5, 4, shape).astype(wide)
    elif config.traced:
        values["temperature"] = np.full(cases, config.temperature, wide)
    if config.sample_weight:
        values["sample_weight"] = (rng.uniform(0.25, 4, shape) * (rng.random(shape) < 0.9)).astype(wide)
    if config.where:
        values["where"] = rng.random(shape) < 0.7
    values["cotangent"] = rng.uniform(-2, 2, shape).astype(wide)
    of_positions = ("logits_p", "logits_q", "hidden_p", "hidden_q", *["temperature"] * config.by_position)
    return values | calls.anything_elsewhere(rng, counts(config, values), values, of_positions)


def _rows(config, rng, cases):
    shape, row = (cases, config.number, config.classes), (cases, config.number, 1)
    p = calls.scores(config, rng, shape)
    noise = rng.normal(size=shape) * rng.choice([30, 1, 1e-2, 1e-4, 1e-6, 0], row)
    near = p.astype(np.float64) + noise + rng.choice([0, 0, 1e4, -300], row)
    q = np.where(rng.random(row) < 0.3, calls.scores(config, rng, shape), calls.held(config, near))
    if not config.producer:
        return {"logits_p": p, "logits_q": q}
    p, right = calls.operands(config, rng, p)
    return {"logits_p": p, "logits_q": calls.left_operand(config, q, right), "right": right}


def _layers(config, rng, cases):
    """Small multiples of a power of 2, as in random_calls.py. If the layers can be, some are nearly alike."""
    c, values = config.classes, {}
    unit = 2.0 ** rng.integers(-3, 2, (cases, 1, 1))
    step = unit * {"bfloat16": 2.0**-5, "float16": 2.0**-8, "float32": 2.0**-12, "float64": 2.0**-30}[config.dtype]
    for side, features in zip("pq", config.features, strict=True):
        values[f"hidden_{side}"] = rng.integers(-3, 4, (cases, config.number, features)) * 1.0
        values[f"kernel_{side}"] = rng.integers(-4, 5, (cases, features, c)) * unit
        if features == 1 and not config.bias:
            for name in (f"hidden_{side}", f"kernel_{side}"):
                values[name] = values[name] * rng.uniform(1, 2, values[name].shape)
        if config.bias:
            offset = rng.choice([0, 0, 200], (cases, 1))
            values[f"bias_{side}"] = (rng.integers(-8, 9, (cases, c)) + offset) * unit[:, 0]
    if config.features[0] == config.features[1]:
        near = rng.random((cases, 1, 1)) < 0.6
        values["hidden_q"] = np.where(near, values["hidden_p"], values["hidden_q"])
        beside = values["kernel_p"] + rng.integers(-1, 2, values["kernel_p"].shape) * step
        values["kernel_q"] = np.where(near, beside, values["kernel_q"])
        if config.bias:
            values["bias_q"] = np.where(near[..., 0], values["bias_p"], values["bias_q"])
    if config.bias:
        masked = (rng.random((cases, c)) < 0.3) & (rng.random((cases, 1)) < 0.3) & (np.arange(c) > 0)
        for side in "pq":  # both sides mask most of these
            here = masked & (rng.random((cases, 1)) < 0.9)
            values[f"bias_{side}"] = np.where(here, -np.inf, values[f"bias_{side}"])
    wide = calls.wide_of(config)
    return {name: array.astype(wide if "bias" in name else config.dtype) for name, array in values.items()}


def counts(config, values):
    first = values["hidden_p" if config.linear else "logits_p"]
    return values["where"] if config.where else np.ones(first.shape[:2], bool)


# --- jxent ------------------------------------------------------------------------------------------------------------


def call(config, values):
    """(divergence, gradients by name) of one case, as a JAX function of its arrays."""
    shape = config.positions
    function = getattr(jxent, config.function)
    options: dict[str, Any] = {} if config.beta is None else {"beta": config.beta}
    if config.where:
        options["where"] = values["where"].reshape(shape)
    wanted = {name: array for name, array in values.items() if name not in ("where", "cotangent", "right")}

    def divergence(wanted):
        temperature = wanted.get("temperature", config.temperature)
        temperature = temperature.reshape(shape) if config.by_position else temperature
        given = options | {"reduction": config.reduction, "temperature": temperature}
        if config.sample_weight:
            given["sample_weight"] = wanted["sample_weight"].reshape(shape)
        if not config.linear:
            rows = [wanted["logits_p"], wanted["logits_q"]]
            if config.producer:
                rows = [calls.producer(config.producer, row, values["right"]) for row in rows]
            rows = [row.reshape(*shape, config.classes) for row in rows]
            return function(*(jnp.moveaxis(x, -1, config.axis) for x in rows), axis=config.axis, **given)
        layers = []
        for side, axis in zip("pq", config.axis, strict=True):
            kernel = wanted[f"kernel_{side}"]
            layers += [wanted[f"hidden_{side}"].reshape(*shape, -1), kernel if axis else kernel.T]
            given[f"bias_{side}"] = wanted.get(f"bias_{side}")
        given |= {"vocab_axis": config.axis, "block_size": config.block_size, "recompute": config.recompute}
        return function(*layers, **given)

    value, pull = jax.vjp(divergence, wanted)
    cotangent = values["cotangent"].astype(value.dtype)
    return value, None, pull(cotangent.reshape(shape) if config.reduction == "none" else cotangent[0])[0]


run = partial(calls.run, call=call)


# --- the definitions --------------------------------------------------------------------------------------------------


@mpmath.workdps(400)  # so that what is left of terms that cancel is below the smallest float64
def expected(config, values, arithmetic=oracle.Float64):
    """Name -> `random_calls.Expected`, for the names of `run`."""
    with np.errstate(all="ignore"):
        return _expected(config, values, arithmetic)


def _expected(config, values, a):
    keep = counts(config, values)
    n, tiny = config.number, calls.tiny(config)
    least = 16 * tiny
    x, layers = {}, {}
    for side in "pq":
        if config.linear:
            hidden = a.array(np.where(keep[..., None], values[f"hidden_{side}"].astype(np.float64), 0))
            layers[side] = hidden, a.array(values[f"kernel_{side}"])
            x[side] = calls.matmul(*layers[side])
            if hidden.shape[-1] == 1:
                x[side] = a.array(x[side].astype(calls.wide_of(config)))  # else it has no rounding
            if config.bias:
                x[side] = x[side] + a.array(values[f"bias_{side}"])[:, None]
        else:
            logits = calls.produced(config, values[f"logits_{side}"], values.get("right")).astype(np.float64)
            logits = np.where(keep[..., None], logits, 0)
            x[side] = a.array(np.where(abs(logits) < tiny, 0, logits))  # XLA takes subnormal numbers for 0
    temperature = calls.as_held(config, config.temperature)
    if config.by_position:
        temperature = a.array(np.where(keep, values["temperature"], 1))[..., None]
    beta = "tv" if config.function.endswith("tv_distance") else config.beta
    of_row = oracle.divergence(x["p"], x["q"], temperature, beta, np.finfo(calls.wide_of(config)), a)
    far = np.where(_margins(x, temperature) > 64, 2.0, 1.0)

    weight = a.array(np.where(keep, values["sample_weight"] if config.sample_weight else 1, 0))
    total = np.sum(weight, -1, keepdims=True)
    mean, none = config.reduction == "mean", config.reduction == "none"
    divisor = np.where(total == 0, a.array(np.nan), total) if mean else a.array(1)
    g = a.array(values["cotangent"] if none else np.repeat(values["cotangent"][:, :1], n, 1))
    per = np.where(total == 0, 0 * g, g / divisor) if mean else g
    losses = oracle.times(weight, of_row.value)
    lost = weight * of_row.underflow + weight * (config.classes * least)
    found = {}

    def add(name, value, scale, slack=1.0, lost=least):
        found[name] = calls.Expected(*(np.asarray(array, np.float64) for array in (value, scale, slack, lost)))

    slack = far if none else np.max(far, -1, keepdims=True)
    if not none:
        losses, lost = (np.sum(array, -1, keepdims=True) / divisor for array in (losses, lost))
    add("loss", losses, losses, slack, lost)
    if config.sample_weight:
        value, terms = of_row.value, of_row.value
        under = of_row.underflow + config.classes * least
        if mean:
            value, terms, under = value - losses, value + losses, under + lost
        value, terms, under = (np.where(keep, per * array, 0 * per) for array in (value, terms, under))
        add("d sample_weight", value, abs(terms), slack, abs(under) + least)

    step = float(jnp.finfo(np.float16).smallest_subnormal) if config.dtype == "float16" else 0.0
    of_result = 1 + float(jnp.finfo(config.dtype).eps) / 2  # the rounding of an element that may be 0 as well
    coefficient = (per * weight)[..., None] / temperature
    size, by_temperature = abs(coefficient), []
    for side, of_side in (("p", of_row.of_p), ("q", of_row.of_q)):
        dx = coefficient * of_side.gradient
        largest = size * of_side.size
        lost = of_result * (config.classes * least * (1 + size) + size * of_side.underflow)
        if config.linear:
            hidden, kernel = layers[side]
            back, transposed = np.swapaxes(hidden, 1, 2), np.swapaxes(kernel, 1, 2)
            scale, under = np.broadcast_to(largest, dx.shape), 2 * step + lost
            slack = float(np.max(far))
            lost_hidden, lost_kernel = (
                step + calls.matmul(*pair) for pair in ((under, abs(transposed)), (abs(back), under))
            )
            matmul = calls.matmul
            add(f"d hidden_{side}", matmul(dx, transposed), matmul(scale, abs(transposed)), slack, lost_hidden)
            add(f"d kernel_{side}", matmul(back, dx), matmul(abs(back), scale), slack, lost_kernel)
            if config.bias:
                add(f"d bias_{side}", np.sum(dx, 1), np.sum(scale, 1), slack, np.sum(lost, 1))
        else:
            add(f"d logits_{side}", dx, largest, far[..., None], step + lost)
        dx = np.where(
            (of_row.value == np.inf)[..., None], np.nan * size, dx
        )  # of an infinite divergence by its temperature
        terms = np.minimum(largest, size * of_side.terms) * abs(of_side.z)
        by_temperature.append((-dx * of_side.z, terms, lost * (1 + abs(of_side.z))))
    if "temperature" in values:
        over = -1 if config.by_position else (1, 2)
        value, scale, lost = (np.sum(sum(parts), over) for parts in zip(*by_temperature, strict=True))
        add("d temperature", value, scale, far if config.by_position else np.max(far, -1), lost)
    return found


def _margins(x, temperature):
    """How far the second class lies below the first, on the side where that is more."""
    sides = []
    for logits in x.values():
        ordered = np.sort(np.asarray(logits, np.float64), -1)
        second = ordered[..., -2:-1] if ordered.shape[-1] > 1 else ordered
        sides.append(((ordered[..., -1:] - second) / np.asarray(temperature, np.float64))[..., 0])
    return np.maximum(*sides)


# --- the judgement ----------------------------------------------------------------------------------------------------


def bound(config, name):
    """The promised relative error; a temperature rounds z twice more."""
    if config.dtype == "float64":
        return 1e-12
    most = 5e-6 if config.temperature == 1 and not config.by_position else 9e-6
    kind = jnp.finfo(config.dtype)
    if name.startswith(("d logits", "d hidden", "d kernel")) and kind.bits == 16:
        kept = config.linear and config.dtype == "bfloat16" and config.reduction != "none" and not config.recompute
        most += (1 + config.linear + kept) * float(kind.eps) / 2
    return most


judge = partial(calls.judge, bound=bound)
