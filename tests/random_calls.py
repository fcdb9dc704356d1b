"""Random calls of the losses, judged in float64 or with 50 digits: for test_properties.py and benchmarks/fuzz.py.

A `Config` is what a compiled program is made for: function, shapes, dtypes, options. `draw` fills it with values, some
of them hostile; `run` takes the loss, the statistics and every gradient; `expected` has the same from the definitions
of oracle.py; `judge` compares. Cases come in batches, one leading axis (`jax.vmap`), so that a program serves many.

An error is relative to the sum of the magnitudes of the terms that make a quantity up, in the better of its two forms:
V p[j] - a[j] or V (p[j] - 1) + sum over k != j of a[k], where V is the sum of the label weights a. So nothing is asked
of digits that cancel in every form, and full relative precision wherever one form does not cancel. The gradients of
statistics have such terms, too; those of the entropy are p[j] (m - x[j]) and p[j] times the mean of m - x.

Sparse labels are judged as the class probabilities that they stand for.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
from jax.sharding import reshard

import jxent

STATS = ("log_prob", "log_normalizer", "entropy")


class Config(NamedTuple):
    function: str = "cross_entropy"  # or linear_cross_entropy, nll_loss
    positions: tuple[int, ...] = (4,)
    classes: int = 5
    features: int = 3  # of linear_cross_entropy
    axis: int = -1  # the class axis; the vocabulary's of a kernel
    dtype: str = "float32"
    probabilities: bool = False
    entries: int = 0  # of `SparseLabels`, which are probabilities; 0 for labels of another kind
    class_weight: bool = False
    sample_weight: bool = False
    where: bool = False
    ignored: bool = False
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0
    logit_softcap: float | None = None
    temperature: float = 1.0
    by_position: bool = False  # the temperature, which is then drawn
    traced: bool = False  # smoothing, z-loss and the temperature as arrays; there is a gradient by the last
    bias: bool = False
    block_size: int | None = None
    recompute: bool = False
    reduction: str = "mean"
    differentiated: tuple[str, ...] = ("loss",)  # what has a cotangent: the loss, statistics, or both
    producer: str | None = None  # what makes the logits within the program, which a compiler may do anew in each pass
    level: int | None = None  # of XLA's optimisations, None for its default
    shared: str = ""  # an array that all cases have in common, so that `jax.vmap` does not map it

    @property
    def linear(self):
        return self.function == "linear_cross_entropy"

    @property
    def backward_matmuls(self):
        """Whether gradients are taken in the backward pass alone, all in one, and not those of the loss forwards."""
        return self.reduction == "none" or self.recompute

    @property
    def number(self):
        return int(np.prod(self.positions))

    @property
    def cooled(self):
        return self.temperature != 1 or self.by_position


# --- values -----------------------------------------------------------------------------------------------------------


def draw(config, rng, cases):
    """NumPy arrays of `cases` cases in the dtypes of the call, the class axis last: (cases, number, classes)."""
    n, c = config.number, config.classes
    shape = (cases, n, c)
    wide = wide_of(config)

    def in_common(name, array):
        return np.repeat(array[:1], cases, 0) if name == config.shared else array

    values: dict[str, Any] = {}
    if config.linear:
        values = {name: in_common(name, array) for name, array in layer(config, rng, cases).items()}
    else:
        values["logits"] = scores(config, rng, shape)
        if config.producer:
            values["logits"], values["right"] = operands(config, rng, values["logits"])
        values = {name: in_common("logits", array) for name, array in values.items()}
    labels, masked = rng.integers(0, c, (cases, n)), np.zeros(shape, bool)
    if not config.linear:  # of some, a class that is not masked; half the time the largest
        x = produced(config, values["logits"], values.get("right")).astype(np.float64)
        largest, masked = np.argmax(x, -1), np.isneginf(x)
        label_masked = np.take_along_axis(masked, labels[..., None], -1)[..., 0]
        labels = np.where(label_masked | (rng.random((cases, n)) < 0.5), largest, labels)
    if config.entries:
        values["indices"], q = entries(config, rng, labels, masked)
        values["labels"] = q.astype(config.dtype)
    elif config.probabilities:
        q = rng.dirichlet(np.full(c, 0.3), (cases, n))
        q *= rng.random(shape) < 0.8
        q = np.where(rng.random((cases, n, 1)) < 0.2, np.eye(c)[labels], q)
        values["labels"] = np.where(masked, 0, q).astype(config.dtype)
    else:
        if config.ignored:
            labels = np.where(rng.random((cases, n)) < 0.3, -100, labels)
        values["labels"] = labels.astype(np.int32)
    if config.class_weight:
        values["class_weight"] = (rng.uniform(0.25, 4, (cases, c)) * (rng.random((cases, c)) < 0.9)).astype(wide)
    if config.sample_weight:
        values["sample_weight"] = (rng.uniform(0.25, 4, (cases, n)) * (rng.random((cases, n)) < 0.9)).astype(wide)
    if config.where:
        values["where"] = rng.random((cases, n)) < 0.7
    for name in config.differentiated:  # of statistics, in some cases only of some
        some = 1 if name == "loss" else rng.random((cases, 1)) < 0.8
        values[f"{name} cotangent"] = (rng.uniform(-2, 2, (cases, n)) * some).astype(wide)
    for name in ("bias", "class_weight", "sample_weight", "where"):
        if name in values:
            values[name] = in_common(name, values[name])
    values |= temperatures(config, rng, (cases, n))
    of_positions = ("logits", "hidden", "temperature") if config.by_position else ("logits", "hidden")
    of_positions += ("labels",) if config.probabilities else ()
    of_positions = [name for name in of_positions if name != config.shared]
    return values | anything_elsewhere(rng, counts(config, values), values, of_positions)


def layer(config, rng, cases):
    """Small multiples of a power of 2: their products and sums are exact, so the logits have no rounding."""
    unit = 2.0 ** rng.integers(-3, 2, (cases, 1, 1))
    hidden = rng.integers(-3, 4, (cases, config.number, config.features)) * 1.0
    kernel = rng.integers(-4, 5, (cases, config.features, config.classes)) * unit
    if config.features == 1 and not config.bias:  # one product, which any compiler rounds alike, if it rounds it
        hidden, kernel = (array * rng.uniform(1, 2, array.shape) for array in (hidden, kernel))
    values = {"hidden": hidden.astype(config.dtype), "kernel": kernel.astype(config.dtype)}
    if config.bias:
        values["bias"] = (rng.integers(-8, 9, (cases, config.classes)) * unit[:, 0]).astype(config.dtype)
    return values


def of_bad_labels(config):
    """The share of cases with indices of no class. In forward mode these would make all positions' tangents NaN."""
    return 0 if config.forward else 0.02


def temperatures(config, rng, shape):
    """The temperature, if it is an array."""
    if config.by_position:
        return {"temperature": rng.uniform(0.5, 4, shape).astype(wide_of(config))}
    if config.traced and config.temperature != 1:
        return {"temperature": np.full(shape[0], config.temperature, wide_of(config))}
    return {}


def anything_elsewhere(rng, keep, values, names):
    """Those of the named arrays that there are, with garbage where a position does not count."""
    spoilt = {}
    for name in (name for name in names if name in values):
        array = values[name]
        garbage = rng.choice([np.nan, np.inf, -np.inf, 6e4, 0.0], array.shape).astype(array.dtype)
        spoilt[name] = np.where(keep if array.ndim == keep.ndim else keep[..., None], array, garbage)
    return spoilt


def entries(config, rng, labels, masked):
    """(indices, probabilities) of sparse labels: classes that repeat, padding of any index, sums of less than 1."""
    shape, row = (*labels.shape, config.entries), (*labels.shape, 1)
    indices = np.where(np.arange(config.entries) == 0, labels[..., None], rng.integers(0, config.classes, shape))
    q = rng.dirichlet(np.full(config.entries, 0.3), labels.shape) * (rng.random(shape) < 0.8)
    q = np.where(rng.random(row) < 0.2, np.arange(config.entries) == 0, q * rng.choice([1.0, 1.0, 0.9, 0.3], row))
    q = np.where(np.take_along_axis(masked, indices, -1), 0, q)
    padding = (q == 0) & (rng.random(shape) < 0.5)
    indices = np.where(padding, rng.choice([-100, -1, -7, config.classes, 2**31 - 1], shape), indices)
    if config.ignored:
        indices = np.where(rng.random(row) < 0.3, -100, indices)
    return indices.astype(np.int32), q


def scores(config, rng, shape):
    """Logits of every kind: margins, offsets, ties, masked classes, subnormals, signed zeros, and huge ones."""
    row, each = (*shape[:-1], 1), shape
    x = rng.normal(size=each) * rng.choice([1e-4, 0.3, 1.0, 10.0, 40.0], row)
    x = np.where(np.arange(shape[-1]) == rng.integers(0, shape[-1], row), x + rng.choice([0, 5, 20, 45, 80], row), x)
    x = x + rng.choice([0.0, 0.0, 50.0, -300.0, 1e4], row)
    if config.function == "nll_loss":
        x = -np.abs(x)
    else:
        kind = rng.integers(0, 24, row)
        x = np.where(kind == 0, np.round(x), x)  # ties
        x = np.where(kind == 1, rng.choice([0.0, -0.0, 0.1, -0.1, 1e-6], each) * tiny(config), x)
        # The rounding of a huge logit is a huge number, and a compiler may or may not do it within a program.
        made = getattr(config, "producer", None)
        limit = 6e4 if config.dtype == "float16" else 1e5 if made else 1e36
        x = np.where(kind == 2, rng.choice([limit, -limit, limit / 4, 1.0, 0.0], each), x)
        # With such numbers others mask classes. A sum of costs is to be finite.
        least = -limit if made else float(jnp.finfo(config.dtype).min) / 4
        x = np.where(kind == 3, least, x)
        x = np.where((kind == 4) & (rng.random(each) < 0.5), least / 256, x)
        x = np.where((kind >= 20) & (rng.random(each) < 0.3), -np.inf, x)
        x = np.where(np.all(np.isneginf(x), -1, keepdims=True), 0.0, x)
    return held(config, x)


PRODUCERS = {"product": np.multiply, "sum": np.add}  # of the logits


def operands(config, rng, logits):
    """The left and the right operand of which the producer makes logits that are near these."""
    right = held(config, rng.uniform(1, 2, logits.shape))
    return left_operand(config, logits, right), right


def left_operand(config, logits, right):
    """The left operand for this right one; 0 for a logit that rounding would make infinite."""
    x = logits.astype(np.float64)
    left = x / right if config.producer == "product" else x - right
    left = held(config, np.where(np.abs(left) < 4 * tiny(config), 0, left))  # subnormal numbers are taken for 0
    with np.errstate(over="ignore"):
        return np.where(np.isposinf(produced(config, left, right)), left.dtype.type(0), left)


def produced(config, left, right):
    """The logits."""
    return PRODUCERS[config.producer](left, right).astype(config.dtype) if config.producer else left


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def producer(name, left, right):
    """The logits within a program, whose gradients are given to the left operand as they are."""
    return getattr(jnp, PRODUCERS[name].__name__)(left, right)


@producer.defjvp
def _producer_jvp(name, primals, tangents):
    return producer(name, *primals), tangents[0]


def held(config, x):
    """Logits as their dtype has them, within its range; masked ones stay so."""
    x = np.where(np.isneginf(x), x, np.clip(x, -65504, 65504)) if config.dtype == "float16" else x
    return x.astype(config.dtype)


def tiny(config):
    """The least normal number of what the loss computes in."""
    return float(jnp.finfo(wide_of(config)).tiny)


def wide_of(config):
    """The dtype that a loss computes in."""
    return "float64" if config.dtype == "float64" else "float32"


def counts(config, values):
    labels = values["labels"]
    if config.entries:
        keep = np.any(values["indices"] != -100, -1)
    else:
        keep = np.ones(labels.shape[:2], bool) if config.probabilities else labels != -100
    return keep & values["where"] if config.where else keep


def dense(config, values, arithmetic):
    """The labels, of which sparse ones are written as the class probabilities that they stand for."""
    if not config.entries:
        return values["labels"]
    a, q = arithmetic, 0
    for index, share in zip(*(np.moveaxis(values[name], -1, 0) for name in ("indices", "labels")), strict=True):
        here = index[..., None] == np.arange(config.classes)
        q = q + np.where(here, a.array(share)[..., None], 0 * a.array(1))
    return q


# --- jxent ------------------------------------------------------------------------------------------------------------


def call(config, values):
    """(loss, statistics, gradients by name) of one case, as a JAX function of its arrays."""
    shape, last = config.positions, config.axis == -1

    def place(x):
        x = x.reshape(*shape, config.classes)
        return x if last else jnp.moveaxis(x, -1, config.axis)

    dtype = jnp.float64 if config.dtype == "float64" else jnp.float32
    options = {} if config.function == "nll_loss" else {"return_stats": True, "logit_softcap": config.logit_softcap}
    for name in () if config.function == "nll_loss" else ("label_smoothing", "z_loss_weight"):
        options[name] = jnp.asarray(getattr(config, name), dtype) if config.traced else getattr(config, name)
    if "where" in values:
        options["where"] = values["where"].reshape(shape)
    names = ("logits", "hidden", "kernel", "bias", "class_weight", "sample_weight", "temperature")
    wanted = {name: values[name] for name in names if name in values}
    if config.probabilities:
        wanted["labels"] = values["labels"]

    def loss(wanted):
        given = dict(options)
        if "class_weight" in wanted:
            given["class_weight"] = wanted["class_weight"]
        if "sample_weight" in wanted:
            given["sample_weight"] = wanted["sample_weight"].reshape(shape)
        if "temperature" in wanted:
            given["temperature"] = wanted["temperature"].reshape(shape if config.by_position else ())
        elif config.temperature != 1:
            given["temperature"] = config.temperature
        labels = wanted["labels"].reshape(*shape, -1) if config.probabilities else values["labels"].reshape(shape)
        if config.entries:
            labels = jxent.SparseLabels(values["indices"].reshape(*shape, -1), labels)
        given["reduction"] = config.reduction
        if config.linear:
            given |= {"bias": wanted.get("bias"), "vocab_axis": config.axis}
            given |= {"block_size": config.block_size, "recompute": config.recompute}
            out = jxent.linear_cross_entropy(*layer_of(config, wanted), labels, **given)
        else:
            labels = place(labels) if config.probabilities and not config.entries else labels
            logits = wanted["logits"]
            if config.producer:
                logits = producer(config.producer, logits, values["right"])
            out = getattr(jxent, config.function)(place(logits), labels, axis=config.axis, **given)
        value, stats = out if isinstance(out, tuple) else (out, None)
        differentiated = {name: value if name == "loss" else getattr(stats, name) for name in config.differentiated}
        return differentiated, (value, stats)

    differentiated, pull, (value, stats) = jax.vjp(loss, wanted, has_aux=True)

    def cotangent(name, like):
        given = values[f"{name} cotangent"].astype(like.dtype)
        given = given.reshape(shape) if like.ndim else given[0]
        sharding = jax.typeof(like).sharding
        return given if sharding.mesh.empty else reshard(given, sharding)

    (gradients,) = pull({name: cotangent(name, like) for name, like in differentiated.items()})
    return value, stats, gradients


one = jax.jit(call, static_argnums=0)


def gradients_of(config, function, wanted, cotangents):
    """(what `function` returns besides, the gradients by the arrays wanted), in the mode of the config.

    Forward mode has one tangent for each element of the arrays. One array moves at a time, because a tangent of 0 times
    an infinite derivative by another array would be NaN.
    """
    if not config.forward:
        differentiated, pull, found = jax.vjp(function, wanted, has_aux=True)
        (gradients,) = pull({name: cotangents[name].astype(like.dtype) for name, like in differentiated.items()})
        return found, gradients

    def total(wanted):
        differentiated, found = function(wanted)
        return sum(jnp.sum(x * cotangents[name]) for name, x in differentiated.items()), found

    def gradient(name):
        return jax.jacfwd(lambda array: total(wanted | {name: array})[0])(wanted[name])

    return total(wanted)[1], {name: gradient(name) for name in wanted}


def layer_of(config, wanted):
    """(hidden states, kernel) as the call takes them."""
    return wanted["hidden"].reshape(*config.positions, -1), wanted["kernel"] if config.axis else wanted["kernel"].T


@functools.cache
def batched(call, config):
    """The program of a config."""
    options = {} if config.level is None else {"xla_backend_optimization_level": config.level}
    shared = getattr(config, "shared", "")

    def of_all(values):
        mapped = {name: array for name, array in values.items() if name != shared}
        common = {name: array[0] for name, array in values.items() if name == shared}
        return jax.vmap(lambda mapped: call(config, mapped | common))(mapped)

    return jax.jit(of_all, compiler_options=options)


def run(config, values, call=call):
    """Name -> array of (cases, ...), in float64: "loss", statistics, and "d " + the name of each gradient."""
    with jax.enable_x64(config.dtype == "float64"):
        value, stats, gradients = jax.device_get(batched(call, config)(jax.tree.map(jnp.asarray, values)))
    return named(config, value, stats, gradients)


def named(config, value, stats, gradients):
    values = value if isinstance(value, dict) else {"loss": value}
    found = {name: array.reshape(len(array), -1) for name, array in values.items()}
    found |= {f"d {name}": g for name, g in gradients.items()}
    if stats is not None:
        found |= {name: getattr(stats, name).reshape(len(value), -1) for name in (*STATS, "prediction")}
        found |= {name: getattr(stats, name)[:, None] for name in ("weight", "count")}
    return {name: np.asarray(array) for name, array in found.items()}


# --- the definitions --------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    value: np.ndarray  # float64
    scale: np.ndarray  # the magnitude that errors are relative to
    slack: np.ndarray | float = 1.0  # a factor of the bound
    lost: np.ndarray | float = 0.0  # what may underflow on the way


@mpmath.workdps(50)
def expected(config, values, arithmetic=oracle.Float64):
    """Name -> `Expected`, for the names of `run`."""
    with np.errstate(all="ignore"):
        return _expected(config, values, arithmetic)


def _expected(config, values, a):
    keep = counts(config, values)
    k = a.array(keep)
    one = a.array(1.0)
    if config.linear:
        hidden, kernel, x = logits_of(config, values, keep, a)
    else:
        logits = produced(config, values["logits"], values.get("right")).astype(np.float64)
        subnormal = np.abs(logits) < tiny(config)  # which XLA takes for 0
        x = a.array(np.where(subnormal, 0, logits))
    b, n, _ = x.shape
    eps, z = as_held(config, config.label_smoothing), as_held(config, config.z_loss_weight)
    t = oracle.terms(
        x,
        dense(config, values, a),
        class_weight=values["class_weight"][:, None] if config.class_weight else None,
        sample_weight=values.get("sample_weight"),
        where=keep,
        label_smoothing=eps,
        z_loss_weight=z,
        logit_softcap=config.logit_softcap,
        temperature=values["temperature"] if config.by_position else as_held(config, config.temperature),
        log_probs=config.function == "nll_loss",
        arithmetic=a,
    )
    x, masked, log_p, q, w, share, s = t.logits, t.masked, t.log_p, t.q, t.class_weight, t.share, t.sample_weight
    g = {name: a.array(values.get(f"{name} cotangent", np.zeros((b, n)))) for name in ("loss", *STATS)}
    of_loss = g["loss"] if config.reduction == "none" else np.repeat(g["loss"][:, :1], n, 1)
    u = None if config.logit_softcap is None else np.where(masked, 0 * one, x) / config.logit_softcap
    p, cost = a.exp(log_p), -log_p
    label_weight = w * share
    lse, unweighted = t.top + t.log_z, t.loss
    lse_scale = abs(t.top) + t.log_z
    unweighted_scale = unweighted + 2 * z * abs(lse) * lse_scale * k
    loss, loss_scale = oracle.times(s, unweighted), oracle.times(s, unweighted_scale)
    of_weight = t.weight
    weight = s * of_weight
    total = np.sum(weight, -1, keepdims=True)
    divisor = np.where(total == 0, a.array(np.nan), total)  # the mean of nothing
    mean = config.reduction == "mean"
    per = np.where(total == 0, 0 * one, of_loss / divisor) if mean else of_loss  # what multiplies each position's loss
    found = {}

    least = 16 * tiny(config)
    step = subnormal_of(config)

    def add(name, value, scale, slack=1.0, lost=least):
        found[name] = Expected(*(np.asarray(array, np.float64) for array in (value, scale, slack, lost)))

    lost = config.classes * least  # each class may underflow, with weights of at most 4 * 4
    if config.reduction == "none":
        add("loss", loss, loss_scale, lost=lost)
    else:
        by = divisor if mean else one
        total_loss, scale = (np.sum(array, -1, keepdims=True) / by for array in (loss, loss_scale))
        add("loss", total_loss, scale, lost=n * lost)
    if config.function != "nll_loss":
        log_prob = np.sum(oracle.times(q, cost), -1)
        add("log_prob", -log_prob, log_prob)
        add("log_normalizer", np.where(keep, lse, 0 * one), np.where(keep, lse_scale, 0 * one))
        entropy = np.sum(oracle.times(p, cost), -1) * k
        add("entropy", entropy, entropy, lost=50 * config.classes * least)
        add("weight", total, total)
        found["prediction"] = Expected(np.where(keep, np.argmax(x, -1), 0), np.zeros((b, n)))
        found["count"] = Expected(np.sum(keep, -1, keepdims=True), np.zeros((b, 1)))

    ks = (per * s)[..., None]
    if config.function == "nll_loss":
        add("d logits", -ks * label_weight, abs(ks) * label_weight, lost=step + least)
    else:
        v = np.sum(label_weight, -1, keepdims=True)
        others = _others(label_weight)
        near = p > 0.5
        not_p = -a.expm1(np.where(near, log_p, -one))
        dz = 2 * z * (lse * k)[..., None] * p
        dy = np.where(near, others - v * not_p, v * p - label_weight) + dz
        plain = np.where(near, others + v * not_p, v * p + label_weight)
        scale = plain + 2 * z * lse_scale[..., None] * p
        lost = least * (1 + abs(ks) * (v + 2 * z * lse_scale[..., None]))  # a probability that is multiplied
        far = np.where(np.asarray(log_p, np.float64) < -64, 2.0, 1.0)
        below = _below(t, config.logit_softcap, a)
        slope = one if u is None else 1 / a.cosh(u) ** 2
        if u is not None:
            far = far + np.asarray(abs(u), np.float64) * 2 * np.finfo(np.float32).eps / 5e-6
        cotangents = {name: (g[name] * k)[..., None] for name in STATS}
        of_stats, scale_of_stats, lost_of_stats = _of_statistics(cotangents, t, p, not_p, near, below)
        dy, scale, lost = ks * dy + of_stats, abs(ks) * scale + scale_of_stats, lost + least * lost_of_stats
        dy, scale = np.where(masked, 0 * one, dy), np.where(masked, 0 * one, scale)
        if "temperature" in values:
            of_normalizer = ks * 2 * z * (lse * k)[..., None], cotangents["log_normalizer"]
            of_position = _of_temperature(dy, scale, lost, below, t, p, of_normalizer, cotangents["entropy"])
            if not config.by_position:
                of_position = [np.sum(array, -1) for array in of_position]
            value, by_scale, by_lost = of_position
            by_far = np.max(far, -1) if config.by_position else np.max(far, (1, 2))
            add("d temperature", value, by_scale, by_far, by_lost)
        slope = slope / t.temperature
        dy, scale, lost = dy * slope, scale * slope, lost / np.minimum(t.temperature, one)
        if config.linear:
            for name, (value, size, under) in of_layer(config, hidden, kernel, dy, scale, lost).items():
                add(name, value, size, float(np.max(far)), under)
        else:
            add("d logits", dy, scale, far, step + lost)
    if config.probabilities:
        parts = ks * w * (one - eps), -(g["log_prob"] * k)[..., None]
        cost_of_present, size = np.where(masked, 0 * one, cost), sum(map(abs, parts))
        dq, scale, lost = sum(parts) * cost_of_present, size * cost_of_present, step + least * (1 + size)
        if config.entries:
            dq, scale, lost = (
                _at_entries(config, values, array) for array in (dq, scale, np.broadcast_to(lost, dq.shape))
            )
        add("d labels", dq, scale, lost=lost)
    lost = np.where(total == 0, 0 * one, np.sum(loss, -1, keepdims=True) / divisor) if mean else None
    if config.sample_weight:
        # Where nothing weighs, this 0 times a cost that overflows is NaN.
        size = abs(np.where(total == 0, of_loss, per)) if mean else abs(per)
        ds, scale = per * unweighted, size * unweighted_scale
        if mean:
            ds, scale = ds - per * lost * of_weight, scale + abs(per * lost) * of_weight
        add("d sample_weight", ds, scale)
    if config.class_weight:
        terms = ks * oracle.times(share, cost)
        dw, scale = np.sum(terms, 1), np.sum(abs(terms), 1)
        if mean and not config.probabilities:
            taken = np.sum((per * s * lost)[..., None] * q, 1)
            dw, scale = dw - taken, scale + abs(taken)
        add("d class_weight", dw, scale)
    return found


def logits_of(config, values, keep, a):
    """(hidden states, which are 0 where a position does not count, kernel, logits)."""
    hidden = a.array(np.where(keep[..., None], values["hidden"].astype(np.float64), 0))
    kernel = a.array(values["kernel"])
    x = matmul(hidden, kernel)
    if config.features == 1:
        x = a.array(x.astype(wide_of(config)))  # else it has no rounding
    return hidden, kernel, x + a.array(values["bias"])[:, None] if config.bias else x


def of_layer(config, hidden, kernel, dx, scale, lost):
    """Name -> (gradient, magnitude of its terms, what may underflow), from those of the gradient by the logits."""
    step = subnormal_of(config)
    back, transposed = np.swapaxes(hidden, 1, 2), np.swapaxes(kernel, 1, 2)
    under = 2 * step + lost  # the cotangent is at most 2
    step *= 1 + (len(config.differentiated) > 1)  # of two gradients that are added up
    found = {
        "d hidden": (matmul(dx, transposed), matmul(scale, abs(transposed)), step + matmul(under, abs(transposed))),
        "d kernel": (matmul(back, dx), matmul(abs(back), scale), step + matmul(abs(back), under)),
    }
    if config.bias:
        found["d bias"] = np.sum(dx, 1), np.sum(scale, 1), step + np.sum(lost, 1)
    return found


def subnormal_of(config):
    """The least number that a gradient in float16 may be; other dtypes have none that matters."""
    return float(jnp.finfo(np.float16).smallest_subnormal) if config.dtype == "float16" else 0.0


def _of_statistics(g, t, p, not_p, near, below):
    """(gradient by x, the magnitudes of its terms, what multiplies an underflow) of statistics with cotangents g."""
    of_label = np.sum(t.q, -1, keepdims=True)
    others = _others(t.q)
    to_label = np.where(near, of_label * not_p - others, t.q - of_label * p)
    label_scale = np.where(near, of_label * not_p + others, t.q + of_label * p)
    mean = np.sum(p * below, -1, keepdims=True)
    gradient = g["log_prob"] * to_label + g["log_normalizer"] * p + g["entropy"] * p * (below - mean)
    size = {name: abs(cotangent) for name, cotangent in g.items()}
    scale = size["log_prob"] * label_scale + size["log_normalizer"] * p + size["entropy"] * p * (below + mean)
    lost = size["log_prob"] * of_label + size["log_normalizer"] + size["entropy"] * (100 + mean)
    return gradient, scale, lost


def _of_temperature(dy, scale, lost, below, t, p, of_normalizer, of_entropy):
    """(gradient by the temperature, the magnitudes of its terms, what is lost) of each position.

    A loss that depends on the log-normalizer m / T + log Z depends on m / T besides z.
    """
    top = t.top[..., None]
    value = -np.sum(dy * -below, -1) - sum(np.sum(c * top, -1) for c in of_normalizer)
    mean = np.sum(p * below, -1, keepdims=True)
    # Of the entropy the sum is that of squares. Its terms, as elements of a gradient, may be larger.
    variance = abs(of_entropy) * p * (below - mean) ** 2
    terms = (scale - abs(of_entropy) * p * (below + mean)) * below + variance
    terms = terms + sum(abs(c) * p * (below + abs(top)) for c in of_normalizer)
    lost = np.sum(lost * (1 + below) ** 2 + lost * abs(top), -1)
    divisor = t.temperature[..., 0]
    return value / divisor, np.sum(terms, -1) / divisor, lost / divisor


def _below(t, cap, a):
    """(m - x[j]) / T. With a soft cap it is sinh(r - s) / (cosh r cosh s), and no difference of two tanh."""
    zero = 0 * t.log_z[..., None]
    if cap is None:
        return np.where(t.masked, zero, -t.log_p - t.log_z[..., None])
    r, s = np.max(t.logits, -1, keepdims=True) / cap, np.where(t.masked, zero, t.logits) / cap
    # The exponentials of all three, each without its smaller part, are those of r - s - |r| - |s|.
    larger = a.exp(2 * np.minimum(r, zero) - 2 * np.maximum(s, zero))
    smaller = -a.expm1(2 * (s - r)) / ((1 + a.exp(-2 * abs(r))) * (1 + a.exp(-2 * abs(s))))
    return np.where(t.masked, zero, 2 * cap * larger * smaller / t.temperature)


def _at_entries(config, values, array):
    """What an array with a class axis has at the entries of sparse labels; 0 where an index is that of no class."""
    index = values["indices"]
    inside = np.clip(index, 0, config.classes - 1)
    return np.where(index == inside, np.take_along_axis(array, inside, -1), 0)


def _others(terms):
    """For each class the sum of the other classes' terms, none of which is taken off again."""
    zero = 0 * terms[..., :1]
    before = np.cumsum(np.concatenate([zero, terms[..., :-1]], -1), -1)
    return before + np.cumsum(np.concatenate([zero, terms[..., :0:-1]], -1), -1)[..., ::-1]


def matmul(left, right):
    return np.sum(left[..., :, :, None] * right[..., None, :, :], -2)


def as_held(config, value):
    """An option as the loss holds it: in float32 unless the loss is float64."""
    return float(value if config.dtype == "float64" else np.float32(value))


# --- the judgement ----------------------------------------------------------------------------------------------------


def bound(config, name):
    """The promised relative error; with a temperature, 1 / T and its product with x - m round besides."""
    if config.dtype == "float64":
        return 1e-12
    most = 8e-6 if config.cooled else 5e-6
    most += 0 if config.logit_softcap is None else 6e-7 * config.logit_softcap
    kind = jnp.finfo(config.dtype)
    if name.startswith("d ") and kind.bits == 16 and name not in ("d class_weight", "d sample_weight", "d temperature"):
        roundings = 2 if name in ("d hidden", "d kernel") else 1  # of the logits' gradient, and at the end
        if config.linear and not config.backward_matmuls:
            # What was kept between the passes is multiplied by a cotangent, and that of statistics comes on top.
            roundings += (config.dtype == "bfloat16") + (len(config.differentiated) > 1)
        most += roundings * float(kind.eps) / 2
    return most


def judge(config, values, got, want, bound=bound):
    """Name -> the largest error, as a fraction of the bound; inf for a wrong NaN or infinity, or a number for one."""
    worst = {}
    for name, (value, scale, slack, lost) in want.items():
        result = np.asarray(got[name], np.float64)
        if name in ("prediction", "count", "indices"):
            worst[name] = 0.0 if np.array_equal(result, value) else np.inf
            continue
        kind = jnp.finfo(got[name].dtype)
        with np.errstate(all="ignore"):
            error = np.abs(result - value) / (bound(config, name) * slack * scale + lost)
        same = (result == value) | (np.isnan(result) & np.isnan(value))
        error = np.where(same, 0, np.where(np.isfinite(error), error, np.inf))
        excused = _overflows(kind, value, scale)
        if name.startswith("d "):
            excused |= ~np.isfinite(value)  # the gradient of an infinite loss
        if config.reduction == "mean" and name in ("d sample_weight", "d class_weight"):
            # A mean divides by the weights: its gradient by a weight is a difference from the mean itself.
            excused |= _overflows(jnp.finfo(got["loss"].dtype), *want["loss"][:2])
        worst[name] = float(np.where(excused, 0, error).max(initial=0))
    return worst


def _overflows(kind, value, scale):
    return np.isfinite(value) & (np.maximum(np.abs(value), scale) > float(kind.max) / 4)
