"""Properties of random calls: the definitions in float64 and with many digits, and identities that need no oracle.

conftest.py says how many: a few, with `--exhaustive` more, and with `HYPOTHESIS_PROFILE=long` a thousand, anew each
time. benchmarks/fuzz.py runs a million.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import random_calls as calls
import random_divergences as divergences
import random_linear_sigmoid as linear_sigmoid
import random_log_probs as log_probs
import random_sigmoid as sigmoid
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from random_calls import Config

import jxent

BOUND = 5e-6
seeds = st.integers(0, 2**32 - 1)


@st.composite
def configs(draw, **fixed):
    """Any call of the three losses; the sets are small, so that programs are compiled once for several."""
    function = draw(st.sampled_from(("cross_entropy", "linear_cross_entropy", "nll_loss")))
    positions = draw(st.sampled_from(((4,), (2, 3), (1,))))
    linear, nll = function == "linear_cross_entropy", function == "nll_loss"
    flag, entries = st.booleans(), draw(st.sampled_from((0, 3, 1)))
    config = Config(
        function=function,
        positions=positions,
        classes=draw(st.sampled_from((5, 2, 1, 11))),
        axis=draw(st.sampled_from((-1, 0) if linear else (-1, 0, 1))),
        dtype=draw(st.sampled_from(("float32", "bfloat16", "float64", "float16"))),
        probabilities=entries > 0 or draw(flag),
        entries=entries,
        class_weight=draw(flag),
        sample_weight=draw(flag),
        where=draw(flag),
        label_smoothing=0.0 if nll else draw(st.sampled_from((0.0, 0.1, 1.0))),
        z_loss_weight=0.0 if nll else draw(st.sampled_from((0.0, 1e-3))),
        logit_softcap=None if nll else draw(st.sampled_from((None, 30.0, 5.0))),
        temperature=1.0 if nll else draw(st.sampled_from((1.0, 0.5))),
        by_position=not nll and draw(st.sampled_from((False, True))),
        traced=draw(flag),
        bias=linear and draw(flag),
        block_size=draw(st.sampled_from((None, 1, 3))) if linear else None,
        recompute=linear and draw(flag),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        differentiated=("loss",) if nll else draw(st.sampled_from((("loss",), ("loss", *calls.STATS), ("entropy",)))),
    )
    may_ignore = entries > 0 or not config.probabilities
    return config._replace(ignored=may_ignore and draw(flag))._replace(**fixed)


@st.composite
def divergence_configs(draw):
    linear, flag = draw(st.booleans()), st.booleans()
    name, beta = draw(
        st.sampled_from(
            (("kl_divergence", None), ("js_divergence", 0.5), ("js_divergence", 0.1), ("tv_distance", None))
        )
    )
    axes = ((-1, -1), (-1, 0), (0, -1)) if linear else (-1, 0, 1)
    return divergences.Config(
        function=f"{'linear_' if linear else ''}{name}",
        positions=draw(st.sampled_from(((4,), (2, 3), (1,)))),
        classes=draw(st.sampled_from((5, 2, 1, 11))),
        axis=draw(st.sampled_from(axes)),
        dtype=draw(st.sampled_from(("float32", "bfloat16", "float64", "float16"))),
        beta=beta,
        temperature=draw(st.sampled_from((1.0, 1.25, 0.5))),
        by_position=draw(st.sampled_from((False, True))),
        traced=draw(flag),
        sample_weight=draw(flag),
        where=draw(flag),
        bias=linear and draw(flag),
        block_size=draw(st.sampled_from((None, 1, 3))) if linear else None,
        recompute=linear and draw(flag),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
    )


sigmoid_configs = st.builds(
    sigmoid.Config,
    positions=st.sampled_from(((2, 3), (4,), (1,))),
    dtype=st.sampled_from(("float32", "bfloat16", "float64", "float16")),
    labels=st.sampled_from(("float", "int", "bool")),
    pos_weight=st.booleans(),
    sample_weight=st.booleans(),
    where=st.booleans(),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    traced=st.booleans(),
    reduction=st.sampled_from(("mean", "sum", "none")),
    level=st.none(),  # or it would be drawn by its type
)


of_layers = {
    "positions": st.sampled_from(((4,), (2, 3), (1,))),
    "classes": st.sampled_from((5, 2, 11)),
    "features": st.sampled_from((3, 1)),
    "axis": st.sampled_from((-1, 0)),
    "dtype": st.sampled_from(("float32", "bfloat16", "float64", "float16")),
    "where": st.booleans(),
    "traced": st.booleans(),
    "bias": st.booleans(),
    "block_size": st.sampled_from((None, 1, 3)),
    "forward": st.booleans(),
    "level": st.none(),
}
log_probs_configs = st.builds(
    log_probs.Config,
    function=st.sampled_from(("linear_log_probs", "linear_top_k")),
    entries=st.sampled_from((2, 1)),
    logit_softcap=st.sampled_from((None, 5.0)),
    temperature=st.sampled_from((1.0, 0.5)),
    by_position=st.booleans(),
    **of_layers,
)
linear_sigmoid_configs = st.builds(
    linear_sigmoid.Config,
    probabilities=st.booleans(),
    entries=st.sampled_from((0, 0, 3)),
    pos_weight=st.booleans(),
    sample_weight=st.booleans(),
    ignored=st.just(False),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    recompute=st.booleans(),
    reduction=st.sampled_from(("mean", "sum", "none")),
    **of_layers,
)


def assert_as_defined(module, config, seed):
    """Value and every gradient, against many digits for a few cases and float64 for more."""
    few, many = (3, 0) if config.dtype == "float64" else (1, 64)
    for cases, arithmetic in ((few, oracle.Digits), (many, oracle.Float64)):
        if cases:
            values = module.draw(config, np.random.default_rng(seed), cases)
            want = module.expected(config, values, arithmetic)
            worst = module.judge(config, values, module.run(config, values), want)
            assert max(worst.values()) <= 1, worst


@settings(max_examples=2 * settings().max_examples)
@given(configs(), seeds)
def test_definitions(config, seed):
    assert_as_defined(calls, config, seed)


@given(divergence_configs(), seeds)
def test_definitions_of_divergences(config, seed):
    assert_as_defined(divergences, config, seed)


@settings(max_examples=2 * settings().max_examples)
@given(sigmoid_configs, seeds)
def test_definition_of_a_yes_or_no(config, seed):
    assert_as_defined(sigmoid, config, seed)


@given(log_probs_configs, seeds)
def test_definitions_of_log_probabilities(config, seed):
    assert_as_defined(log_probs, config, seed)


@given(linear_sigmoid_configs, seeds)
def test_definition_of_a_yes_or_no_for_each_class(config, seed):
    assert_as_defined(linear_sigmoid, config, seed)


# --- identities -------------------------------------------------------------------------------------------------------


def drawn(config, seed, cases=None):
    """Values of one case, or of several."""
    values = calls.draw(config, np.random.default_rng(seed), cases or 1)
    return values if cases else {name: array[0] for name, array in values.items()}


def assert_close(got, want, scale=0.0, bound=BOUND):
    """Within a relative error, of the value or of a given magnitude; equal infinities and NaN count as close."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    tiny = 8 * float(jnp.finfo(jnp.float32).tiny)
    with np.errstate(invalid="ignore"):
        error, most = np.abs(got - want), bound * np.maximum(np.abs(want), scale) + tiny
    assert np.all(same | (error <= most)), (got, want)


of_loss = {"entries": 0, "differentiated": ("loss",), "temperature": 1.0, "by_position": False}
plain = configs(dtype="float32", reduction="none", traced=False, **of_loss)


@given(seeds, st.sampled_from((1, 2, 5, 11)), st.sampled_from((1.0, 256.0, -4096.0)))
def test_a_shift_of_a_row_changes_nothing(seed, classes, shift):
    """Of logits that are multiples of 2**-8, which stay representable: the loss is the same to the last bit."""
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-2000, 2000, (4, classes)) / 256).astype(np.float32)
    labels = rng.integers(0, classes, 4)
    loss = jax.value_and_grad(lambda x: jnp.sum(jxent.cross_entropy(x, labels, reduction="none")))
    for a, b in zip(loss(logits), loss(logits + np.float32(shift)), strict=True):
        np.testing.assert_array_equal(a, b)


@given(plain.filter(lambda c: c.function == "cross_entropy"), seeds)
def test_gradient_rows_sum_to_0(config, seed):
    """Without z-loss and soft cap, within the rounding of the row."""
    config = config._replace(z_loss_weight=0.0, logit_softcap=None)
    values = drawn(config, seed)
    loss, _, gradients = calls.one(config, values)
    rows = np.asarray(gradients["logits"], np.float64)[np.isfinite(loss).reshape(-1)]
    assert_close(np.sum(rows, -1), 0, np.sum(np.abs(rows), -1))


@given(plain, seeds)
def test_one_hot_probabilities_are_index_labels(config, seed):
    config = config._replace(probabilities=False, ignored=False)
    values = drawn(config, seed)
    one_hot = values | {"labels": np.eye(config.classes, dtype=np.float32)[values["labels"]]}
    index, _, by_index = calls.one(config, values)
    loss, _, by_probability = calls.one(config._replace(probabilities=True), one_hot)
    assert_close(loss, index)
    for name in set(by_index) - {"class_weight", "sample_weight"}:
        scale = np.max(np.abs(by_index[name]), initial=0) if config.linear else 0
        assert_close(by_probability[name], by_index[name], scale)


@given(plain.filter(lambda c: c.function == "linear_cross_entropy"), seeds)
def test_linear_cross_entropy_is_cross_entropy_of_the_logits(config, seed):
    values = drawn(config, seed)
    keep = calls.counts(config, {name: array[None] for name, array in values.items()})[0]
    logits = np.where(keep[:, None], values["hidden"], 0) @ values["kernel"] + values.get("bias", 0)
    loss, stats, gradients = calls.one(config, values)
    others = {name: array for name, array in values.items() if name not in ("hidden", "kernel", "bias")}
    want = calls.one(config._replace(function="cross_entropy"), others | {"logits": logits})
    assert_close(loss, want[0])
    jax.tree.map(assert_close, stats, want[1])
    hidden = np.where(keep[:, None], values["hidden"], 0)
    d = np.asarray(want[2]["logits"], np.float64)
    scale = np.abs(d) @ np.abs(values["kernel"]).T
    assert_close(gradients["hidden"], d @ values["kernel"].T, scale)
    assert_close(gradients["kernel"], hidden.T @ d, np.abs(hidden).T @ np.abs(d))


@given(configs(dtype="float32", positions=(6,), reduction="sum", **of_loss), seeds, st.sampled_from((1, 2, 3)))
def test_micro_batches_add_up(config, seed, size):
    """Sums of parts are the sum; divided by the sum of their weights, the mean."""
    values = drawn(config, seed)
    total, stats, _ = calls.one(config, values)
    of_positions = set(values) - {"kernel", "bias", "class_weight", "loss cotangent"}
    parts = []
    for start in range(0, 6, size):
        part = {k: v[start : start + size] if k in of_positions else v for k, v in values.items()}
        parts.append(calls.one(config._replace(positions=(size,)), part)[:2])
    assert_close(sum(np.float64(part[0]) for part in parts), total)
    if stats is not None:
        weight = sum(np.float64(part[1].weight) for part in parts)
        assert_close(weight, stats.weight)
        mean = calls.one(config._replace(reduction="mean"), values)[0]
        assert_close(mean, np.float64(total) / weight if weight else np.nan)


@given(configs(dtype="float32", **of_loss), seeds)
def test_order_does_not_matter(config, seed):
    """Permuted positions and classes give the same loss, and permuted gradients."""
    config = config._replace(positions=(config.number,), reduction="sum")
    values = drawn(config, seed)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(config.number), rng.permutation(config.classes)

    def permuted(name, array):
        if name in ("hidden", "sample_weight", "where", "logits") or name == "labels":
            array = array[rows]
        if name in ("kernel", "bias", "class_weight", "logits") or (name == "labels" and config.probabilities):
            array = array[..., columns]
        if name == "labels" and not config.probabilities:
            array = np.where(array == -100, -100, np.argsort(columns)[np.clip(array, 0, None)]).astype(np.int32)
        return array

    loss, _, gradients = calls.one(config, values)
    other, _, permuted_gradients = calls.one(config, {k: permuted(k, v) for k, v in values.items()})
    assert_close(other, loss)
    for name, gradient in gradients.items():
        want = permuted(name, np.asarray(gradient))
        assert_close(permuted_gradients[name], want, np.max(np.abs(want), initial=0))


@given(plain.filter(lambda c: c.function == "cross_entropy" and c.classes > 2), seeds)
def test_a_masked_class_is_a_removed_class(config, seed):
    """Smoothing included, which spreads over the classes that are left."""
    config = config._replace(ignored=False)
    values = drawn(config, seed)
    last = config.classes - 1
    values["logits"][:, last] = -np.inf
    if config.probabilities:
        values["labels"][:, last] = 0
    else:
        values["labels"] = np.minimum(values["labels"], last - 1)
    fewer = {k: v[..., :last] if k in ("logits", "class_weight") else v for k, v in values.items()}
    if config.probabilities:
        fewer["labels"] = fewer["labels"][..., :last]
    loss, stats, gradients = calls.one(config, values)
    want = calls.one(config._replace(classes=last), fewer)
    assert_close(loss, want[0])
    jax.tree.map(assert_close, stats, want[1])
    got = np.asarray(gradients["logits"])
    judged = np.isfinite(np.asarray(loss)).reshape(-1)
    assert_close(got[judged, :last], np.asarray(want[2]["logits"])[judged])
    assert not np.any(got[judged, last])


@given(configs(dtype="float32", reduction="mean", **of_loss).filter(lambda c: c.function != "nll_loss"), seeds)
def test_the_mean_is_the_sum_by_the_weight(config, seed):
    values = drawn(config, seed)
    mean, stats, _ = calls.one(config, values)
    total = calls.one(config._replace(reduction="sum"), values)[0]
    assert_close(mean, np.float64(total) / np.float64(stats.weight) if stats.weight else np.nan)


@given(plain.filter(lambda c: c.function == "cross_entropy"), seeds)
def test_statistics_are_those_of_log_softmax(config, seed):
    config = config._replace(axis=-1, positions=(config.number,), logit_softcap=None)
    values = drawn(config, seed)
    _, stats, _ = calls.one(config, values)
    keep = calls.counts(config, {name: array[None] for name, array in values.items()})[0]
    log_p = np.asarray(jxent.log_softmax(values["logits"]), np.float64)
    q = values["labels"] if config.probabilities else np.eye(config.classes)[np.maximum(values["labels"], 0)]
    with np.errstate(invalid="ignore"):
        log_prob = np.sum(np.where(q == 0, 0, q * log_p), -1)
        entropy = -np.sum(np.where(np.isneginf(log_p), 0, np.exp(log_p) * log_p), -1)
    assert_close(np.asarray(stats.log_prob)[keep], log_prob[keep])
    assert_close(np.asarray(stats.entropy)[keep], entropy[keep], bound=2 * BOUND)  # of rounded log-probabilities
    assert not np.any(np.asarray(stats.log_prob)[~keep])


@given(
    configs(positions=(8, 2), classes=8, features=8),
    seeds,
    st.sampled_from((P("a"), P(None, "a"), P("a", None, "b"), P(None, None, "a"), P(("a", "b")))),
    st.sampled_from((AxisType.Auto, AxisType.Explicit)),
)
def test_sharding_changes_nothing(config, seed, spec, kind):
    """Positions and classes over eight devices, under plain jit: the definitions again."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    config = config._replace(axis=0 if config.linear and config.axis == 0 else -1)
    values = calls.draw(config, np.random.default_rng(seed), 1)

    def over(name, array):
        array = array[0]
        if name.endswith("cotangent") or array.ndim == 0 or (array.ndim == 1 and len(array) != 16):
            return array
        if len(array) == 16:
            array = array.reshape(8, 2, *array.shape[1:])
        of_positions = 2 if config.entries and name in ("labels", "indices") else array.ndim
        axes = P(None, spec[2] if len(spec) == 3 else None) if name == "kernel" else P(*spec[:of_positions])
        return jax.device_put(array, NamedSharding(mesh, axes))

    with jax.enable_x64(config.dtype == "float64"):
        placed = {name: over(name, array) for name, array in values.items()}
        found = jax.device_get(calls.one(config, placed))
    want = calls.expected(config, values, oracle.Digits if config.dtype == "float64" else oracle.Float64)
    got = calls.named(config, *jax.tree.map(lambda array: array[None], found))
    worst = calls.judge(config, values, {k: v.reshape(want[k].value.shape) for k, v in got.items()}, want)
    assert max(worst.values()) <= 1, worst
