"""Bugs that losses of this kind had elsewhere: each test fails for an implementation that has the bug.

Above each test stands the bug's report, or its source where nobody reported it, and what went wrong there. Unless a
test is about rounding it runs in float64, against the float64 oracle.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiling import optimized
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jxent

VOCAB, FEATURES = 1003, 4  # 17 * 59 classes: a multiple of no tile
each_way = pytest.mark.parametrize("way", ["logits", "linear", "recompute"])
each_linear_way = pytest.mark.parametrize("way", ["linear", "recompute"])


def loss_of(way, hidden, kernel, labels, *, bias=0.0, block_size=2, **options):
    """The loss of `hidden @ kernel + bias`: by `cross_entropy`, or by `linear_cross_entropy` in blocks."""
    if way == "logits":
        return jxent.cross_entropy(hidden @ kernel + bias, labels, **options)
    options |= {"bias": jnp.broadcast_to(bias, kernel.shape[1]), "block_size": block_size}
    return jxent.linear_cross_entropy(hidden, kernel, labels, recompute=way == "recompute", **options)


def arrays(positions, vocab=VOCAB):
    """hidden, kernel and index labels, the last class among them."""
    rng = np.random.default_rng(positions)
    labels = rng.integers(0, vocab, positions)
    labels[-1] = vocab - 1
    return rng.normal(size=(positions, FEATURES)), rng.normal(size=(FEATURES, vocab)), labels


def pulled(rows, hidden, kernel):
    """The gradients of hidden and kernel, `rows` being that of the logits."""
    return rows @ kernel.T, hidden.T @ rows


def assert_close(got, want):
    """In float64, where a thousand terms of size 1 that cancel leave 1000 * 2**-53 = 1e-13 of rounding."""
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-11, atol=1e-12)


def assert_right(loss, rows, hidden, kernel, labels, bias=0.0, **options):
    """`loss(hidden, kernel)` is what the oracle has for these options, and `rows` is its gradient of the logits."""
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel)
    want = oracle.cross_entropy(hidden @ kernel + bias, labels, **options)
    assert_close((value, *grads), (want, *pulled(rows, hidden, kernel)))


# https://github.com/openxla/tokamax/blob/5f95bae539377b77eca2e6768149575e80853a2e/tokamax/_src/ops/linear_softmax_cross_entropy_loss/pallas_mosaic_tpu_kernel.py
# https://github.com/verl-project/verl/issues/2899
# The last tile of the vocabulary was filled up with columns of zeros, whose logits of 0 then counted as classes.
@pytest.mark.covering
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("vocab", [VOCAB, 50257])
@each_way
def test_pad_columns_are_no_classes(way, vocab):
    hidden, kernel, labels = arrays(5, vocab)
    hidden, kernel = np.abs(hidden) + 1, -np.abs(kernel) - 2  # logits of -8 or less: a 0 outweighs a thousand of them
    rows = oracle.logit_gradient(hidden @ kernel, labels) / 5
    assert_right(lambda h, k: loss_of(way, h, k, labels), rows, hidden, kernel, labels)


# https://github.com/linkedin/Liger-Kernel/pull/1298
# With reduction="none" every gradient was multiplied by the first position's cotangent.
# https://github.com/AI-Hypercomputer/maxtext/pull/4699
# The kernel's gradient was multiplied by the loss's cotangent and the hidden states' gradient was not.
@pytest.mark.covering
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("cotangent", [np.array([0.0, -2.0, 0.5, 3.0, 1.0]), np.float64(7)], ids=["none", "mean"])
@each_way
def test_cotangent_reaches_every_gradient_by_position(way, cotangent):
    hidden, kernel, labels = arrays(5)
    bias = np.linspace(0, 1, VOCAB)
    options = {"reduction": "none" if cotangent.ndim else "mean"}

    @jax.jit
    def pull(cotangent, *arrays):
        return jax.vjp(lambda h, k, b: loss_of(way, h, k, labels, bias=b, **options), *arrays)[1](cotangent)

    share = cotangent if cotangent.ndim else np.full(5, cotangent / 5)
    rows = share[:, None] * oracle.logit_gradient(hidden @ kernel + bias, labels)
    assert_close(pull(cotangent, hidden, kernel, bias), (*pulled(rows, hidden, kernel), rows.sum(0)))


# https://github.com/google-research/t5x/blob/247d329f4da9506c515a564a52ef385146784fb1/t5x/losses.py
# The custom rule returned a gradient of 0 for the weight of the z-loss.
# https://github.com/AI-Hypercomputer/maxtext/pull/2858
# The custom rule stopped returning the gradient of the soft targets, which then was 0.
@pytest.mark.usefixtures("x64")
@each_way
def test_z_loss_weight_and_soft_labels_have_gradients(way):
    hidden, kernel, _ = arrays(5)
    q = np.random.default_rng(3).dirichlet(np.ones(VOCAB), 5)

    def loss(hidden, kernel, q, weight):
        return loss_of(way, hidden, kernel, q, z_loss_weight=weight)

    grads = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(hidden, kernel, q, 0.1)
    log_p, log_z = oracle.log_softmax(hidden @ kernel), oracle.logsumexp(hidden @ kernel)
    rows = ((1 + 2 * 0.1 * log_z)[:, None] * np.exp(log_p) - q) / 5
    assert_close(grads, (*pulled(rows, hidden, kernel), -log_p / 5, np.mean(log_z**2)))


# https://github.com/marin-community/marin/pull/8217
# The forward pass rounded the logits to bfloat16, the backward pass took their exponentials from float32 logits.
@each_linear_way
def test_both_passes_have_the_same_float32_logits(way):
    # The second feature adds up to 1/4 to logits of up to 64, where bfloat16 goes in steps of 1/4.
    rng = np.random.default_rng(4)
    hidden = jnp.array([[1.0, 2.0**-8]], jnp.bfloat16)
    kernel = jnp.asarray([np.round(20 * rng.normal(size=VOCAB)), rng.uniform(-64, 64, VOCAB)], jnp.bfloat16)
    h, k = (np.asarray(a, np.float64) for a in (hidden, kernel))
    for label in [*np.argsort(h @ k)[0, -2:], VOCAB - 1]:
        labels = np.array([label])
        loss, grad = jax.value_and_grad(lambda k, labels=labels: loss_of(way, hidden, k, labels))(kernel)
        # Float32 rounds logits within 4e-6, their differences within 8e-6. The gradient is rounded to bfloat16 for the
        # matmul, within 2**-8; its one product is then exact. What is below float32's normal numbers may be 0.
        np.testing.assert_allclose(loss, oracle.cross_entropy(h @ k, labels), rtol=1e-5)
        want = h.T @ oracle.logit_gradient(h @ k, labels)
        np.testing.assert_allclose(np.asarray(grad, np.float64), want, rtol=2**-8 + 3e-5, atol=1.2e-38)


# https://github.com/axolotl-ai-cloud/axolotl/pull/1601
# The kernel's gradient was added up over the chunks in the kernel's own bfloat16.
@pytest.mark.covering
@pytest.mark.parametrize("block_size", [1, 7])
@each_linear_way
def test_kernel_gradient_is_accumulated_in_float32(way, block_size):
    # One label and positive hidden states: all terms of an element have one sign, and a bfloat16 sum of 256 of them
    # would grow no more. Each is rounded once for the matmul and their sum once, by 2**-8 at most.
    rng = np.random.default_rng(5)
    hidden = jnp.asarray(rng.uniform(0.5, 1, (2048, FEATURES)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(FEATURES, 67)), jnp.bfloat16)
    labels = np.full(2048, 66)
    grad = jax.jit(jax.grad(lambda k: loss_of(way, hidden, k, labels, block_size=block_size)))(kernel)
    h, k = (np.asarray(a, np.float64) for a in (hidden, kernel))
    want = h.T @ oracle.logit_gradient(h @ k, labels) / 2048
    # And 2048 float32 additions of 2**-24 each, at worst.
    np.testing.assert_allclose(np.asarray(grad, np.float64), want, rtol=2**-7 + 2**-13)


# https://github.com/NVIDIA-NeMo/Automodel/issues/3803
# Each chunk's mean was taken and these were added up; with reduction="none" the chunks' losses were added up, too.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("way", "block_size"), [("linear", 1), ("linear", 5), ("recompute", 8)])
def test_mean_is_over_all_positions(way, block_size):
    """Whatever the blocks, and from micro-batches by their sums and weights."""
    hidden, kernel, labels = arrays(24)
    labels[:13] = labels[14:18] = -100  # of three micro-batches of 8 positions 0, 1 and 6 positions count

    def loss(hidden, kernel, labels=labels, **options):
        return loss_of(way, hidden, kernel, labels, block_size=block_size, **options)

    rows = np.where(labels[:, None] == -100, 0, oracle.logit_gradient(hidden @ kernel, np.maximum(labels, 0))) / 7
    assert_right(loss, rows, hidden, kernel, labels)

    @jax.jit
    def others(kernel):
        def micro(batch):
            options = {"labels": batch[1], "reduction": "sum", "return_stats": True}
            (total, stats), grad = jax.value_and_grad(lambda k: loss(batch[0], k, **options), has_aux=True)(kernel)
            return total, grad, stats.weight

        batches = jax.lax.map(micro, (hidden.reshape(3, 8, FEATURES), labels.reshape(3, 8)))
        total, grad, weight = jax.tree.map(lambda a: a.sum(0), batches)
        return loss(hidden, kernel, reduction="none"), total / weight, grad / weight

    losses = oracle.cross_entropy(hidden @ kernel, labels, reduction="none")
    assert_close(others(kernel), (losses, losses.sum() / 7, hidden.T @ rows))


# https://github.com/ml-explore/mlx/pull/4188
# The label's logit was taken off the log-normalizer, both rounded at the size of an offset common to all logits.
@each_way
def test_common_offset_changes_nothing(way):
    x = np.random.default_rng(7).integers(-16, 17, (4, VOCAB)) / 16  # float32 holds sixteenths up to 2**20
    x[:, -1] = [1, 6, 11, 21]
    x = np.concatenate([x + offset for offset in (0, 1e4, -1e4, 1e6, 1e8)]).astype(np.float32)
    labels = np.full(20, VOCAB - 1)

    @jax.jit
    def run(x):
        losses, pull = jax.vjp(lambda k: loss_of(way, jnp.eye(20), k, labels, reduction="none"), x)
        return losses, *pull(jnp.ones(20))

    losses, grad = run(x)
    # x - m is exact; half an ulp of numbers up to 32, 1e-6, is lost with log_z and again with (x - m) - log_z.
    np.testing.assert_allclose(losses, oracle.cross_entropy(x, labels, reduction="none"), rtol=3e-6)
    np.testing.assert_allclose(grad, oracle.logit_gradient(x, labels), rtol=3e-6)


# https://github.com/google-deepmind/optax/blob/1f9a88f30be514e707e384754e366d25c7340963/optax/losses/_classification.py
# Negative labels counted from the end: -1, and with more than 100 classes -100, was taken for a class.
# https://github.com/Coffeempty/jax-cce/blob/5c8d2c18ecef965ff0254b5b090bc965bd75e8fd/src/jax_cce/core.py
# So they did there, and a label beyond the vocabulary was taken for the last class.
@pytest.mark.covering
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ignore_index", [-100, -1])
@each_way
def test_no_label_out_of_range_is_a_class(way, ignore_index):
    hidden, kernel, _ = arrays(7)
    labels = np.array([0, -1, VOCAB, 5, -100, VOCAB + 100, VOCAB - 1])
    ignored = labels == ignore_index
    bad = ~ignored & ((labels < 0) | (labels >= VOCAB))

    @jax.jit
    def run(hidden):
        def loss(hidden, reduction="mean"):
            return loss_of(way, hidden, kernel, labels, ignore_index=ignore_index, reduction=reduction)

        losses, pull = jax.vjp(lambda h: loss(h, "none"), hidden)
        return loss(hidden), losses, *pull(jnp.ones(7))

    mean, losses, grad = run(hidden)
    want = oracle.cross_entropy(hidden @ kernel, np.where(bad, 0, labels), ignore_index=ignore_index, reduction="none")
    assert_close([losses], [np.where(bad, np.nan, want)])
    np.testing.assert_array_equal(np.isnan(grad).all(-1), bad)
    np.testing.assert_array_equal((grad == 0).all(-1), ignored)
    assert np.isnan(mean)


def over_shards(way, labels, kernel_spec, **options):
    """The loss as a function of hidden and kernel, inside shard_map over eight devices."""
    return jax.shard_map(
        lambda h, k: loss_of(way, h, k, labels, axis_name="vocab", **options),
        mesh=jax.make_mesh((8,), ("vocab",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), kernel_spec),
        out_specs=P(),
    )


# https://github.com/NVIDIA/Megatron-LM/issues/737, https://github.com/NVIDIA/Megatron-LM/issues/7464
# Smoothing divided by a shard's number of classes and took the mean of a shard's log-probabilities.
@pytest.mark.usefixtures("x64")
@each_way
def test_smoothing_is_over_the_classes_of_all_shards(way):
    hidden, kernel, labels = arrays(5, vocab=1000)
    kernel += np.arange(1000) / 500  # the means of the shards differ
    q = 0.9 * oracle.one_hot(labels, 1000) + 0.1 / 1000
    rows = (np.exp(oracle.log_softmax(hidden @ kernel)) - q) / 5
    loss = over_shards(way, labels, P(None, "vocab"), label_smoothing=0.1)
    assert_right(loss, rows, hidden, kernel, labels, label_smoothing=0.1)


# https://github.com/NVIDIA/Megatron-LM/issues/7452
# Logits that every shard had all of were taken for shards, which added the logarithm of the axis size to the loss.
@pytest.mark.usefixtures("x64")
@each_way
def test_gathered_classes_are_refused(way):
    hidden, kernel, labels = arrays(5)
    with pytest.raises(ValueError, match=r"must be sharded over axis_name='vocab'"):
        over_shards(way, labels, P())(hidden, kernel)


# https://github.com/google-deepmind/optax/issues/896, https://github.com/google-deepmind/optax/pull/1762
# A probability of 0 times a log-probability of -inf made NaN of the loss, and in the mended loss of its tangent.
@pytest.mark.covering
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_masked_classes_make_no_nan(kind, label_smoothing):
    """In value, gradient and Hessian-vector product."""
    rng = np.random.default_rng(10)
    x, v = rng.normal(size=(2, 3, VOCAB))
    kept = np.arange(VOCAB) % 3 != 1
    x[:, ~kept] = -np.inf
    labels = np.array([0, 3, VOCAB - 1])
    q = oracle.one_hot(labels, VOCAB) if kind == "index" else kept * rng.dirichlet(np.ones(VOCAB), 3)
    given, options = labels if kind == "index" else q, {"label_smoothing": label_smoothing, "reduction": "sum"}

    gradient = jax.value_and_grad(lambda x: jxent.cross_entropy(x, given, **options))
    (value, grad), (along, product) = jax.jit(lambda x, v: jax.jvp(gradient, (x,), (v,)))(x, v)
    q = (1 - label_smoothing) * q + label_smoothing * kept / kept.sum()
    p, total = np.exp(oracle.log_softmax(x)), q.sum(-1, keepdims=True)
    want_product = total * p * (v - (p * v).sum(-1, keepdims=True))
    want = oracle.cross_entropy(x, given, **options), total * p - q, ((total * p - q) * v).sum(), want_product
    assert_close((value, grad, along, product), want)
    if kind == "probabilities":
        assert np.isfinite(jax.jit(jax.grad(lambda q: jxent.cross_entropy(x, q, **options)))(given)).all()


# https://github.com/jax-ml/jax/issues/6811
# A row of nothing but -inf had a gradient of NaN.
@pytest.mark.parametrize("function", [jxent.logsumexp, jxent.softmax, jxent.log_softmax])
def test_rows_of_masked_classes_make_no_nan(function):
    x = jnp.zeros((2, 5)).at[1].set(-jnp.inf)
    cotangent = 1.0 + jnp.arange(function(x).size).reshape(function(x).shape)
    gradient = jax.jvp(lambda x: jax.vjp(function, x)[1](cotangent)[0], (x,), (jnp.ones_like(x),))
    for value_or_tangent in gradient:
        assert np.isfinite(value_or_tangent[0]).all()
        np.testing.assert_array_equal(value_or_tangent[1], np.zeros(5))


# https://github.com/unslothai/unsloth/pull/10616
# Masked classes were softcapped, which made of -inf the cap's negative: a finite logit, and so a class.
@pytest.mark.usefixtures("x64")
@each_way
def test_masked_classes_stay_masked_under_softcap(way):
    hidden, kernel, labels = arrays(5)
    hidden, kernel = np.abs(hidden) + 1, -np.abs(kernel) - 2  # logits near the cap's negative, as one of -inf would be
    kept = np.arange(VOCAB) % 3 != 1
    labels = np.where(kept[labels], labels, labels - 1)
    bias, options = np.where(kept, 0, -np.inf), {"logit_softcap": 6.0}
    slope = np.where(kept, np.cosh(hidden @ kernel / 6) ** -2, 0)
    rows = slope * oracle.logit_gradient(oracle.softcap(hidden @ kernel + bias, 6.0), labels) / 5
    assert_right(
        lambda h, k: loss_of(way, h, k, labels, bias=bias, **options), rows, hidden, kernel, labels, bias, **options
    )


# https://github.com/pytorch/pytorch/issues/11551
# An ignored position whose logits were infinite had a gradient of NaN.
@pytest.mark.usefixtures("x64")
@each_way
def test_what_an_excluded_position_holds_reaches_nothing(way):
    hidden, kernel, labels = arrays(13)
    out = np.arange(13) % 2 == 1
    labels[out] = [-100, -100, -100, 0, 0, 0]
    options = {"where": labels != 0, "label_smoothing": 0.1, "z_loss_weight": 0.1}
    rows = hidden @ kernel if way == "logits" else hidden
    poisoned = rows.copy()
    poisoned[out] = np.array([np.nan, np.inf, -np.inf] * 2)[:, None]

    @jax.jit
    def run(rows):
        def loss(rows, kernel, weight):
            if way == "logits":
                return jxent.cross_entropy(rows, labels, sample_weight=weight, **options)
            return loss_of(way, rows, kernel, labels, sample_weight=weight, **options)

        return jax.value_and_grad(loss, (0, 1, 2))(rows, kernel, np.linspace(1, 2, 13))

    got = run(poisoned)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(got))
    jax.tree.map(np.testing.assert_array_equal, got, run(rows))
    np.testing.assert_array_equal((np.asarray(got[1][0]) == 0).all(-1), out)


# https://github.com/jax-ml/jax/issues/40344, https://github.com/jax-ml/jax/issues/40384,
# https://github.com/jax-ml/jax/issues/40386
# Derivatives of `jax.nn.softmax` and `jax.nn.log_softmax` are 0 at the largest logit, and not at the others.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("margin", [37.42994775023705, 40.0])
def test_derivatives_of_a_confident_row_sum_to_0(margin):
    """In every mode and order; what `jax.nn` gives stands beside it, so that one sees when it has been mended."""
    x, v = jnp.array([margin, 0.0]), jnp.array([1.0, 0.0])
    tail = np.exp(-margin) / (1 + np.exp(-margin)) ** 2  # p (1 - p), p being that of either class
    want = np.array([tail, -tail])

    def derivatives(module):
        def at_top(x):
            return module.softmax(x)[0]

        def log_at_top(x):
            return module.log_softmax(x)[0]

        def gradient_of_loss(x):
            return jax.grad(lambda x: -log_at_top(x))(x)

        return {
            "softmax, backwards": jax.grad(at_top)(x),
            "softmax, forwards": jax.jacfwd(at_top)(x),
            "log_softmax, backwards": jax.grad(log_at_top)(x) * jnp.exp(log_at_top(x)),
            "log_softmax, forwards": jax.jacfwd(log_at_top)(x) * jnp.exp(log_at_top(x)),
            "Hessian of the loss": jax.jvp(gradient_of_loss, (x,), (v,))[1],
        }

    ours, theirs = jax.jit(lambda: (derivatives(jxent), derivatives(jax.nn)))()
    for name, got in ours.items():
        np.testing.assert_allclose(got, want, rtol=1e-13, err_msg=name)
        assert theirs[name][0] == 0, name  # all digits lost


# https://github.com/jax-ml/jax/issues/40383, https://github.com/jax-ml/jax/issues/40385,
# https://github.com/jax-ml/jax/issues/40387
# The second derivatives of `jax.nn.log_sigmoid` and `softplus`, and the first of `sigmoid`, are 0 where 1 - p is
# less than a rounding of 1.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("x", [37.42994775023705, -37.42994775023705, 40.0])
def test_curvature_of_a_sure_yes_or_no(x, label):
    def loss(x):
        return jxent.sigmoid_cross_entropy(x, jnp.array(label))

    e = np.exp(-abs(x))
    for second in (jax.grad(jax.grad(loss)), jax.jacfwd(jax.grad(loss)), jax.jacfwd(jax.jacfwd(loss))):
        np.testing.assert_allclose(second(x), e / (1 + e) ** 2, rtol=1e-12)


# XLA:CPU ends the process for the transpose of a small matmul under `jax.vmap` ("dot_op_emitter.cc ... Check failed:
# shape.has_layout()") in JAX 0.10; not in 0.12.
@pytest.mark.parametrize("compiled", [jax.jit, optimized], ids=["quick", "optimized"])
@pytest.mark.parametrize("sizes", [(3, 6, 5), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("mapped", ["hidden", "hidden and kernel"])
def test_small_matmuls_do_not_end_the_process(mapped, sizes, compiled):
    positions, features, vocab = sizes
    rng = np.random.default_rng(len(mapped) + positions)
    labels = jnp.arange(positions)
    examples = rng.normal(size=(2, positions, features)).astype(np.float32)
    kernel = rng.normal(size=(2, vocab, features)).astype(np.float32)
    axes = (0, 0 if "kernel" in mapped else None)

    def loss(hidden, kernel):
        return jxent.linear_cross_entropy(hidden, kernel, labels, vocab_axis=0, reduction="none").sum()

    kernel = kernel if "kernel" in mapped else kernel[0]
    got = compiled(jax.vmap(jax.grad(loss, (0, 1)), axes))(examples, kernel)
    for i, hidden in enumerate(examples):
        want = oracle_gradients(hidden, kernel[i] if kernel.ndim == 3 else kernel, labels)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=1e-6), got, want)


def oracle_gradients(hidden, kernel, labels):
    """Those of the sum of the losses, in float64."""
    hidden, kernel = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    exp = np.exp(hidden @ kernel.T)
    dlogits = exp / exp.sum(-1, keepdims=True) - np.eye(len(kernel))[np.asarray(labels)]
    return dlogits @ kernel, dlogits.T @ hidden
