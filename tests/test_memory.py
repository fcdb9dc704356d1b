"""No copy of the logits, read from the compiled CPU program (design: "Never the logits")."""

import jax
import jax.numpy as jnp
import pytest

import jxent

SHAPES = ((2048, 1000), (64, 131072))
S = jax.ShapeDtypeStruct


def ce(kind, **options):
    def loss(logits, labels, probabilities, class_weight, sample_weight):
        weights = {"class_weight": class_weight, "sample_weight": sample_weight}
        chosen = {k: weights.get(k, v) for k, v in options.items()}
        if chosen.pop("where", False):
            chosen["where"] = sample_weight > 0.5
        return jxent.cross_entropy(logits, labels if kind == "index" else probabilities, **chosen)

    return loss


LOSSES = {
    "logsumexp": lambda x, *_: jnp.sum(jxent.logsumexp(x).astype(jnp.float32)),
    "nll_loss": lambda x, t, *_: jxent.nll_loss(x, t),
    "nll_loss, probabilities": lambda x, _, q, *__: jxent.nll_loss(x, q),
    "index": ce("index"),
    "index, weights": ce("index", class_weight=True, sample_weight=True, where=True),
    "index, none": lambda x, t, *_: jnp.sum(jxent.cross_entropy(x, t, reduction="none") ** 2),
    "index, smoothing": ce("index", label_smoothing=0.1),
    "index, stats": ce("index", return_stats=True),
    "index, softcap": ce("index", logit_softcap=30.0),
    "index, everything": ce(
        "index",
        class_weight=True,
        sample_weight=True,
        label_smoothing=0.1,
        z_loss_weight=1e-4,
        logit_softcap=30.0,
        return_stats=True,
    ),
    "probabilities": ce("probabilities"),
    "probabilities, everything": ce(
        "probabilities",
        class_weight=True,
        sample_weight=True,
        label_smoothing=0.1,
        z_loss_weight=1e-4,
        logit_softcap=30.0,
        return_stats=True,
    ),
}


def arguments(shape, dtype):
    """Abstract logits, labels, probabilities, class weights and sample weights, and the bytes of the logits."""
    n, classes = shape
    logits = S(shape, dtype)
    f32 = jnp.float32
    return (logits, S((n,), jnp.int32), logits, S((classes,), f32), S((n,), f32)), logits.size * logits.dtype.itemsize


def temporaries(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, shape, dtype):
    """Forward: at most 2% of the logits' bytes. With gradients: no array of the logits' size but the gradient."""
    args, size = arguments(shape, dtype)
    loss = LOSSES[name]
    assert temporaries(loss, *args) <= 0.02 * size
    has_aux = name.endswith(("stats", "everything"))
    assert temporaries(jax.value_and_grad(loss, has_aux=has_aux), *args) <= 0.03 * size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [jxent.softmax, jxent.log_softmax])
def test_softmaxes(function, shape, dtype):
    logits = S(shape, dtype)
    size = logits.size * logits.dtype.itemsize
    assert temporaries(function, logits) <= 0.02 * size
    assert temporaries(lambda x, g: jax.vjp(function, x)[1](g), logits, logits) <= 0.03 * size


@pytest.mark.parametrize("axis", [0, 1])
def test_class_axis_in_front(axis):
    shape = (1000, 64, 32) if axis == 0 else (4, 1000, 16, 32)
    logits, labels = S(shape, jnp.float32), S(shape[:axis] + shape[axis + 1 :], jnp.int32)
    loss = jax.value_and_grad(lambda x, t: jxent.cross_entropy(x, t, axis=axis))
    assert temporaries(loss, logits, labels) <= 0.03 * logits.size * 4


def test_logits_that_are_computed():
    """Behind a matmul the logits themselves are the only array of their size, the gradient taking its turn after."""
    n, features, classes = 512, 64, 8192
    args = S((n, features), jnp.float32), S((features, classes), jnp.float32), S((n,), jnp.int32)
    step = jax.value_and_grad(lambda h, k, t: jxent.cross_entropy(h @ k, t), (0, 1))
    assert temporaries(step, *args) <= 2.05 * n * classes * 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_one_hot(reduction):
    """The compiled program holds no boolean or integer array as large as the logits."""
    (logits, labels, *_), _ = arguments((64, 32000), jnp.float32)
    forward = jax.jit(lambda x, t: jxent.cross_entropy(x, t, reduction=reduction))
    text = forward.lower(logits, labels).compile().as_text()
    entry = text[text.index("ENTRY") :]
    for dtype in ("pred", "s8", "s32", "s64", "u32"):
        assert f" {dtype}[64,32000]" not in entry
