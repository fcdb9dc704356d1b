"""`cross_entropy` and `nll_loss`: what their options mean, against the float64 oracle."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from grids import short

import jxent

N, D, C = 4, 3, 5
REDUCTIONS = ("mean", "sum", "none")


def data(kind, dtype=np.float64, seed=0):
    """Logits (N, D, C), labels of a kind, and every weight; one label is ignored, one position masked."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(N, D, C))).astype(dtype)
    if kind == "index":
        labels = rng.integers(0, C, (N, D)).astype(np.int32)
        labels[1, 2] = -100
    else:
        labels = rng.dirichlet(np.full(C, 0.4), (N, D)).astype(dtype)
    where = np.ones((N, D), bool)
    where[2, 0] = False
    class_weight = rng.uniform(0.2, 2, C).astype(dtype)
    sample_weight = rng.uniform(0, 2, (N, D)).astype(dtype)
    return logits, labels, {"class_weight": class_weight, "sample_weight": sample_weight, "where": where}


OPTIONS = {
    "label_smoothing": 0.1,
    "z_loss_weight": 0.05,
    "logit_softcap": 4.0,
    "class_weight": None,
    "sample_weight": None,
}


@pytest.mark.covering(pairs=True)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "given",
    [dict(zip(OPTIONS, given, strict=True)) for given in itertools.product((False, True), repeat=len(OPTIONS))],
    ids=lambda given: "+".join(name for name in given if given[name]) or "plain",
)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_every_set_of_options(kind, given):
    logits, labels, weights = data(kind)
    options = {k: weights.get(k, OPTIONS[k]) for k in OPTIONS if given[k]}
    if given["sample_weight"]:
        options["where"] = weights["where"]

    @jax.jit
    def losses(logits):  # in one program, which compiles three times as fast
        return [jxent.cross_entropy(logits, labels, reduction=r, **options) for r in REDUCTIONS]

    want = [oracle.cross_entropy(logits, labels, reduction=r, **options) for r in REDUCTIONS]
    chex.assert_trees_all_close(losses(logits), want, rtol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_nll_loss(kind, reduction):
    logits, labels, weights = data(kind)
    log_probs = jxent.log_softmax(logits)
    for options in ({}, {"class_weight": weights["class_weight"]}, weights):
        want = oracle.cross_entropy(logits, labels, reduction=reduction, **options)
        for axis in (-1, 0):
            x, t = (np.moveaxis(a, -1, axis) if a.ndim == 3 else a for a in (log_probs, labels))
            got = jxent.nll_loss(x, t, axis=axis, reduction=reduction, **options)
            np.testing.assert_allclose(got, want, rtol=1e-13)


@pytest.mark.covering
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_axis(kind, axis):
    logits, labels, weights = data(kind, np.float32)
    moved = np.moveaxis(logits, -1, axis)
    moved_labels = labels if kind == "index" else np.moveaxis(labels, -1, axis)
    options = weights | {"label_smoothing": 0.1, "z_loss_weight": 0.1, "return_stats": True}

    def loss(x, q, axis):
        return jxent.cross_entropy(x, q, axis=axis, **options)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (value, stats), gradient = run(moved, moved_labels, axis)
    (want, want_stats), want_gradient = run(logits, labels, -1)
    # The same sums in another order.
    chex.assert_trees_all_close((value, stats), (want, want_stats), rtol=1e-6)
    chex.assert_trees_all_close(np.moveaxis(gradient, axis, -1), want_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.covering("20000--1", "20000-0", "50257-0", "16418--1")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("classes", [16418, 20000, 32771, 50257])
def test_many_classes(classes, axis):
    """So many that a CPU adds them up in blocks, 16418 in two, but not 32771, a prime; labels in the first and last."""
    rng = np.random.default_rng(classes)
    logits = 3 * rng.normal(size=(5, classes))
    labels = np.array([0, classes // 2, classes - 1, 7, -100])
    logits[3, 7] = 60
    q = rng.dirichlet(np.full(classes, 0.1), 5)
    weight = rng.uniform(0.2, 2, classes)
    everything = {"class_weight": weight, "label_smoothing": 0.1, "z_loss_weight": 0.01}
    cases = [(labels, {}), (labels, everything), (q, {}), (q, everything)]

    def losses(x):
        given = [(t if t is labels else jnp.moveaxis(t, -1, axis), options) for t, options in cases]
        return [jxent.cross_entropy(x, t, axis=axis, reduction="none", **options) for t, options in given]

    moved = np.moveaxis(logits, -1, axis)
    want = [oracle.cross_entropy(logits, t, reduction="none", **options) for t, options in cases]
    chex.assert_trees_all_close(jax.jit(losses)(moved), want, rtol=1e-12)
    log_p = np.moveaxis(np.asarray(jxent.log_softmax(moved, axis)), axis, -1)
    np.testing.assert_allclose(log_p, oracle.log_softmax(logits), rtol=1e-12)
    got = jax.jit(jax.grad(lambda x: jxent.cross_entropy(x, labels, axis=axis, reduction="sum")))(moved)
    gradient = np.where(labels[:, None] == -100, 0, oracle.logit_gradient(logits, labels))
    np.testing.assert_allclose(np.moveaxis(np.asarray(got), axis, -1), gradient, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("classes", [20000, 50257])
def test_many_classes_with_the_last_but_one_as_the_label(classes, x64):
    """The last block of classes is added up anew without the label, but with the last class."""
    logits = np.zeros((1, classes))
    logits[0, -2:] = 1, 9
    loss = jxent.cross_entropy(jnp.asarray(logits), jnp.array([classes - 2]))
    np.testing.assert_allclose(loss, np.log(np.exp(logits).sum()) - 1, rtol=1e-12)


def test_unbatched():
    logits, labels, _ = data("index", np.float32)
    value = jxent.cross_entropy(logits[0, 0], labels[0, 0])
    np.testing.assert_allclose(value, oracle.cross_entropy(logits[0, 0], labels[0, 0]), rtol=1e-6)
    chex.assert_shape(jxent.cross_entropy(logits[0, 0], labels[0, 0], reduction="none"), ())
    chex.assert_shape(jxent.nll_loss(logits[0, 0], labels[0, 0], reduction="none"), ())


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_excluded_positions_reach_nothing(reduction, poison, kind):
    """Whatever the logits, the sample weight and the label hold where `where` is False."""
    logits, labels, weights = data(kind, np.float32)
    out = ~weights["where"]
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.1, "logit_softcap": 10.0, "reduction": reduction}

    def evaluate(logits, labels, sample_weight):
        def loss(logits, labels, class_weight, sample_weight):
            arrays = {"class_weight": class_weight, "sample_weight": sample_weight, "where": weights["where"]}
            value, stats = jxent.cross_entropy(logits, labels, **arrays, **options, return_stats=True)
            return jnp.sum(value), (value, stats)

        wrt = (0, 2, 3) if kind == "index" else (0, 1, 2, 3)
        arguments = (logits, labels, weights["class_weight"], sample_weight)
        return jax.value_and_grad(loss, wrt, has_aux=True)(*arguments)

    clean = evaluate(logits, labels, weights["sample_weight"])
    bad_labels = np.where(out, C + 7, labels) if kind == "index" else np.where(out[..., None], np.nan, labels)
    bad_logits = np.where(out[..., None], poison, logits)
    poisoned = evaluate(bad_logits, bad_labels, np.where(out, np.nan, weights["sample_weight"]))
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(clean, poisoned)
    assert np.all(np.asarray(poisoned[1][0])[out] == 0)


@pytest.mark.covering("int8--100", "uint8-255", "int32--2147483648", "int32-2147483647")
@pytest.mark.parametrize("ignore_index", [-(2**31), -100, -1, 2, 255, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.uint32])
def test_ignore_index(dtype, ignore_index):
    if not np.iinfo(dtype).min <= ignore_index <= np.iinfo(dtype).max:
        labels = np.array([0, 2, 4, 1], dtype)  # no label can be it: nothing is ignored
        keep = np.ones(4, bool)
    else:
        labels = np.array([0, ignore_index, 4, ignore_index], dtype)
        keep = np.array([True, False, True, False])
    logits = np.random.default_rng(0).normal(size=(4, C)).astype(np.float32)
    logits[~keep] = np.nan
    got, gradient = jax.value_and_grad(lambda x: jxent.cross_entropy(x, labels, ignore_index=ignore_index))(logits)
    want = oracle.cross_entropy(logits[keep], labels[keep].astype(np.int64))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.all(gradient[~keep] == 0)
    assert np.all(gradient[keep] != 0)


@pytest.mark.parametrize("nothing", ["ignored", "masked", "no positions", "weight 0"])
@pytest.mark.parametrize("function", [jxent.cross_entropy, jxent.nll_loss])
def test_nothing_counts(function, nothing):
    n = 0 if nothing == "no positions" else 3
    logits = jnp.zeros((n, C))
    labels = jnp.full((n,), -100 if nothing == "ignored" else 1)
    class_weight = jnp.ones(C) if nothing != "weight 0" else jnp.zeros(C)
    sample_weight = jnp.ones(n)
    where = jnp.full((n,), nothing != "masked")

    def loss(reduction, *weights):
        return lambda x, cw, sw: function(
            x, labels, class_weight=cw, sample_weight=sw, where=where, reduction=reduction
        )

    for reduction, value in (("mean", np.nan), ("sum", 0.0)):
        got, gradients = jax.value_and_grad(loss(reduction), (0, 1, 2))(logits, class_weight, sample_weight)
        np.testing.assert_equal(np.asarray(got), np.float32(value))
        if nothing == "weight 0":
            gradients = gradients[:1] if reduction == "sum" else gradients
        for gradient in gradients:
            assert np.all(np.asarray(gradient) == 0)
    chex.assert_shape(loss("none")(logits, class_weight, sample_weight), (n,))


@pytest.mark.covering("{}-probabilities", "{'logit_softcap': 5.0}-index", "{'label_smoothing': 0.1}-index")
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"logit_softcap": 5.0}, {"z_loss_weight": 0.1}], ids=str
)
def test_a_masked_class_is_no_class(options, kind):
    """A logit of -inf gives the loss and the gradients of the rows without that class."""
    logits, labels, _ = data(kind, np.float32)
    weight = np.linspace(0.5, 2, C).astype(np.float32)
    wider = np.where(labels >= 2, labels + 1, labels) if kind == "index" else np.insert(labels, 2, 0, -1)
    masked = {"logits": np.insert(logits, 2, -np.inf, -1), "class_weight": np.insert(weight, 2, 7)}
    loss = jax.jit(jax.value_and_grad(lambda arrays, labels: jxent.cross_entropy(**arrays, labels=labels, **options)))
    for arrays in ({"logits": logits}, {"logits": logits, "class_weight": weight}):
        value, gradients = loss({name: masked[name] for name in arrays}, wider)
        want, want_gradients = loss(arrays, labels)
        np.testing.assert_allclose(value, want, rtol=1e-6)
        want_gradients = {name: np.insert(g, 2, 0, -1) for name, g in want_gradients.items()}
        chex.assert_trees_all_close(gradients, want_gradients, rtol=1e-5, atol=1e-8)


def test_the_label_of_a_masked_class_has_no_gradient():
    logits, labels = jnp.array([-jnp.inf, 0.0, 0.0]), jnp.array([0.0, 0.25, 0.75])
    gradient = jax.grad(lambda q: jxent.cross_entropy(logits, q))(labels)
    np.testing.assert_allclose(gradient, [0, np.log(2), np.log(2)], rtol=1e-6)


def test_smoothing_over_no_class_costs_infinity():
    assert jxent.cross_entropy(jnp.full(3, -jnp.inf), jnp.array(0), label_smoothing=0.1) == np.inf


def test_smoothing_over_one_class():
    loss = jax.value_and_grad(lambda x: jxent.cross_entropy(x, jnp.array(1), label_smoothing=0.1))
    value, gradient = loss(jnp.array([-jnp.inf, 3.0, -jnp.inf]))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_a_masked_label():
    loss, gradient = jax.value_and_grad(lambda x: jxent.cross_entropy(x, jnp.array(0)))(jnp.array([-jnp.inf, 0.0, 0.0]))
    assert loss == np.inf
    np.testing.assert_array_equal(gradient, [-1.0, 0.5, 0.5])


@pytest.mark.parametrize("share", [1e-6, 0.5])
def test_a_probability_of_a_masked_class_costs_infinity(share):
    logits, labels = jnp.array([-jnp.inf, 0.0, 0.0]), jnp.array([share, 0.5, 0.5 - share])
    assert jxent.cross_entropy(logits, labels) == np.inf
    assert jxent.nll_loss(jxent.log_softmax(logits), labels) == np.inf


def test_nan_logits_are_not_hidden():
    logits, labels = jnp.array([[0.0, jnp.nan], [0.0, 1.0]]), jnp.array([0, 0])
    losses, vjp = jax.vjp(lambda x: jxent.cross_entropy(x, labels, reduction="none"), logits)
    np.testing.assert_array_equal(np.isnan(losses), [True, False])
    (gradient,) = vjp(jnp.ones(2))
    assert np.isnan(gradient[0]).all()
    assert np.isfinite(gradient[1]).all()


@pytest.mark.covering
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes(dtype, kind):
    """Losses in float32; each gradient in its own argument's dtype."""
    logits, labels, weights = data(kind, np.float32)
    logits = jnp.asarray(logits, dtype)
    labels = jnp.asarray(labels) if kind == "index" else jnp.asarray(labels, dtype)
    class_weight, sample_weight = (jnp.asarray(weights[k], jnp.bfloat16) for k in ("class_weight", "sample_weight"))

    def loss(logits, class_weight, sample_weight):
        return jxent.cross_entropy(
            logits, labels, class_weight=class_weight, sample_weight=sample_weight, label_smoothing=0.1
        )

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(logits, class_weight, sample_weight)
    chex.assert_type(value, jnp.float32)
    chex.assert_type(gradients, [dtype, jnp.bfloat16, jnp.bfloat16])


@pytest.mark.usefixtures("x64")
def test_mixed_dtypes_promote():
    logits, labels, weights = data("probabilities", np.float32)
    chex.assert_type(jxent.cross_entropy(logits, labels.astype(np.float64)), jnp.float64)
    chex.assert_type(jxent.cross_entropy(logits, labels, sample_weight=weights["sample_weight"] * 1.0), jnp.float32)
    weight = weights["sample_weight"].astype(np.float64)
    chex.assert_type(jxent.cross_entropy(logits, labels, sample_weight=weight), jnp.float64)


def test_more_classes_than_float32_counts():
    """Beyond 2**24 classes a float32 iota would leave the label's neighbour out of the sum, too, which holds it all."""
    classes, label = 2**24 + 43, 2**24 + 1  # a prime number, not cut into blocks
    logits = jnp.zeros(classes).at[label - 1].set(20.0)
    want = 20 + np.log1p((classes - 1) * np.exp(-20.0))
    np.testing.assert_allclose(jxent.cross_entropy(logits, jnp.array(label)), want, rtol=1e-5)


def test_next_token_labels():
    tokens = jnp.array([[5, 6, 7], [1, 2, 3]])
    np.testing.assert_array_equal(jxent.next_token_labels(tokens), [[6, 7, -100], [2, 3, -100]])
    np.testing.assert_array_equal(jxent.next_token_labels(tokens[0], ignore_index=0), [6, 7, 0])
    np.testing.assert_array_equal(jxent.next_token_labels(tokens[:, :1]), [[-100], [-100]])
    chex.assert_type(jxent.next_token_labels(tokens.astype(jnp.int16)), jnp.int16)
    for dtype, bound in ((jnp.int8, -128), (jnp.int8, 127), (jnp.uint32, 2**32 - 1)):
        labels = jxent.next_token_labels(tokens[0].astype(dtype), ignore_index=bound)
        np.testing.assert_array_equal(labels, [6, 7, bound])
    logits = jnp.zeros((2, 3, 9))
    assert jxent.cross_entropy(logits, jxent.next_token_labels(tokens), return_stats=True)[1].weight == 4


@pytest.mark.parametrize("value", [-1e38, -3e38, float(np.finfo(np.float32).min)])
def test_huge_finite_logits_are_no_mask(value):
    """Only -inf masks: a class at the largest negative number costs what it costs."""
    logits = jnp.array([[1.0, 2.0, value]])
    probabilities = jnp.array([[0.5, 0.4, 0.1]])
    np.testing.assert_allclose(jxent.cross_entropy(logits, probabilities), -0.1 * value, rtol=1e-6)
    np.testing.assert_allclose(jxent.nll_loss(logits - 5, probabilities), -0.1 * value, rtol=1e-6)
    smooth, gradient = jax.value_and_grad(lambda x: jxent.cross_entropy(x, jnp.array([0]), label_smoothing=0.1))(logits)
    np.testing.assert_allclose(smooth, -value / 30, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 2], -0.1 / 3, rtol=1e-6)
    _, pull = jax.vjp(jxent.log_softmax, logits)
    np.testing.assert_allclose(pull(jnp.ones((1, 3)))[0][0, 2], 1, rtol=1e-6)
    capped = [jxent.cross_entropy(x, probabilities, logit_softcap=5.0) for x in (logits, logits.at[0, 2].set(-1e4))]
    np.testing.assert_allclose(*capped, rtol=1e-6)


def test_negative_weights():
    logits = jnp.array([[1.0, 2.0, 0.0]])
    log_p = oracle.log_softmax(logits)[0]
    np.testing.assert_allclose(
        jxent.cross_entropy(logits, jnp.array([[-2.0, 1.0, 0.0]])), 2 * log_p[0] - log_p[1], rtol=1e-6
    )
    np.testing.assert_allclose(
        jxent.nll_loss(jxent.log_softmax(logits), jnp.array([[-2.0, 1.0, 0.0]])), 2 * log_p[0] - log_p[1], rtol=1e-6
    )


def test_a_weight_of_0_silences_an_infinite_loss():
    """And its gradient, but keeps that of a weight of 0 where the loss is finite."""
    logits, labels = jnp.array([[0.0, 1.0, -jnp.inf], [0.0, 1.0, -jnp.inf]]), jnp.array([2, 1])
    weight = jnp.array([0.0, 1.0])
    np.testing.assert_allclose(
        jxent.cross_entropy(logits, labels, sample_weight=weight), np.log1p(np.exp(-1)), rtol=1e-6
    )
    smooth = jxent.cross_entropy(logits[:1], labels[:1], label_smoothing=1.0)
    np.testing.assert_allclose(smooth, np.log1p(np.exp(-1)) + 0.5, rtol=1e-6)
    loss = partial(jxent.cross_entropy, logits, reduction="sum")
    for label, cost in ((0, np.log1p(np.exp(1))), (2, 0)):
        gradient = jax.grad(lambda w, t: loss(t, sample_weight=w))(weight, jnp.array([label, 1]))
        np.testing.assert_allclose(gradient, [cost, np.log1p(np.exp(-1))], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("weight", ["class_weight", "sample_weight"])
def test_narrow_weights_are_summed_in_float32(weight, dtype):
    """Denominators and the weights' gradients over 70000 positions, more than 16 bits can count."""
    n = 70000
    logits, labels = jnp.zeros((n, 2)), jnp.zeros(n, jnp.int32)
    ones = jnp.ones(2 if weight == "class_weight" else 1, dtype)

    def loss(w, reduction):
        return jxent.cross_entropy(logits, labels, **{weight: w}, reduction=reduction, return_stats=True)

    value, stats = loss(ones, "mean")
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert stats.weight == n
    chex.assert_type(stats.weight, jnp.float32)
    gradient = jax.grad(lambda w: loss(w, "sum")[0])(ones)
    eps = float(jnp.finfo(dtype).eps)
    # Float32 adds 70000 equal terms one by one: within half an ulp each, of up to 2**15 ulps.
    np.testing.assert_allclose(np.asarray(gradient[0], np.float64), n * np.log(2), rtol=eps + 1e-3)


@pytest.mark.parametrize("kind", short(("index", "probabilities"), "index"))
def test_replicated_weights_inside_shard_map(kind):
    """The class weights' gradient is summed over the shards of the positions."""
    logits, labels, weights = data(kind, np.float32)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(logits, labels, class_weight):
        options = {"class_weight": class_weight, "label_smoothing": 0.1, "reduction": "sum"}
        return jax.lax.psum(jxent.cross_entropy(logits, labels, **options), "data")

    split = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
        loss, mesh=mesh, in_specs=(split, split, jax.sharding.PartitionSpec()), out_specs=jax.sharding.PartitionSpec()
    )
    want = jax.grad(
        lambda *a: jxent.cross_entropy(*a[:2], class_weight=a[2], label_smoothing=0.1, reduction="sum"), (0, 2)
    )
    args = jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights["class_weight"])
    got = jax.jit(jax.grad(sharded, (0, 2)))(*args)
    chex.assert_trees_all_close(got, jax.jit(want)(*args), rtol=1e-5, atol=1e-6)


def test_numpy_labels_of_64_bits_do_not_wrap():
    labels = np.array([0, 2**32 + 1, -(2**32)])
    np.testing.assert_array_equal(np.isnan(jxent.cross_entropy(jnp.zeros((3, 3)), labels, reduction="none")), [0, 1, 1])
