"""No copy of the logits, read from the compiled CPU program (docs/guides/memory.md)."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from compiling import optimized

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
    return optimized(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.covering("logsumexp-(2048, 1000)-float32", "index-(64, 131072)-bfloat16", pairs=True)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, shape, dtype):
    """Forward: at most 2% of the logits' bytes. With gradients: the index of each class, 15 numbers for each position.

    And, of more than 2**15 classes, a position's sums of 256 blocks of them.
    """
    args, size = arguments(shape, dtype)
    loss = LOSSES[name]
    assert temporaries(loss, *args) <= 0.02 * size
    has_aux = name.endswith(("stats", "everything"))
    positions, classes = shape
    numbers = classes + 15 * positions + (256 * positions if classes > 2**15 else 0)
    assert temporaries(jax.value_and_grad(loss, has_aux=has_aux), *args) <= 4 * numbers


@pytest.mark.covering("index-(2048, 1000)-float32", "index, softcap-(64, 131072)-bfloat16")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode(name, shape, dtype):
    """Numbers for each position, besides the tangent that is given.

    But where a CPU keeps float32 exponentials for a gradient to come (docs/guides/memory.md) it has taken them once.
    """
    args, size = arguments(shape, dtype)
    has_aux = name.endswith(("stats", "everything"))

    def tangent(logits, direction, *rest):
        return jax.jvp(lambda x: LOSSES[name](x, *rest), (logits,), (direction,), has_aux=has_aux)

    exponentials = name in ("index", "index, weights", "index, none", "index, stats") and dtype == jnp.float32
    positions, classes = shape
    numbers = classes + 20 * positions + (256 * positions if classes > 2**15 else 0)
    assert temporaries(tangent, args[0], *args) <= exponentials * size + 4 * numbers


def test_float16_logits_are_copied_once():
    """In float32: XLA:CPU fuses a sum with the upcast of bfloat16, but not with that of float16."""
    (logits, labels, *_), size = arguments((2048, 1000), jnp.float16)
    for function in (jxent.cross_entropy, jax.value_and_grad(jxent.cross_entropy)):
        assert 2 * size <= temporaries(function, logits, labels) <= 2.02 * size


@pytest.mark.covering
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
    forward = optimized(lambda x, t: jxent.cross_entropy(x, t, reduction=reduction))
    text = forward.lower(logits, labels).compile().as_text()
    entry = text[text.index("ENTRY") :]
    for dtype in ("pred", "s8", "s32", "s64", "u32"):
        assert f" {dtype}[64,32000]" not in entry


# --- linear_cross_entropy ---------------------------------------------------------------------------------------------

LINEAR_OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "recompute": {"recompute": True},
    "smoothing": {"label_smoothing": 0.1},
    "everything": {
        "bias": True,
        "class_weight": True,
        "sample_weight": True,
        "label_smoothing": 0.1,
        "z_loss_weight": 1e-4,
        "logit_softcap": 30.0,
        "return_stats": True,
    },
}


def linear_program(shape, features, vocab, dtype, *, wrt=("hidden", "kernel"), probabilities=False, **options):
    """The compiled `value_and_grad` of `linear_cross_entropy`, with respect to these arguments."""
    vocab_axis = options.get("vocab_axis", -1)
    per_class = S((vocab,), jnp.float32)
    abstract = {
        "hidden": S((*shape, features), dtype),
        "kernel": S((features, vocab) if vocab_axis else (vocab, features), dtype),
        "labels": S((*shape, vocab), jnp.float32) if probabilities else S(shape, jnp.int32),
    }
    weights = {"bias": per_class, "class_weight": per_class, "sample_weight": S(shape, jnp.float32)}
    abstract |= {name: weights[name] for name in weights if options.get(name)}
    options = {name: value for name, value in options.items() if name not in weights}

    def loss(floats, rest):
        out = jxent.linear_cross_entropy(**floats, **rest, **options)
        return jnp.sum(out[0] if options.get("return_stats") else out)

    floats = {name: abstract.pop(name) for name in wrt}
    return optimized(jax.value_and_grad(loss)).lower(floats, abstract).compile()


def largest_array(text):
    """The number of elements of the largest array in a compiled program."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_linear_takes_a_fraction_of_full_logits():
    """8191 positions, 256 features, 50257 classes: 8% of the temporaries with full logits, 5% with a frozen kernel.

    The full logits are those of Optax's formula: logsumexp of the logits less the logit of the label.
    """
    positions, features, vocab = 8191, 256, 50257

    def full(hidden, kernel, labels):
        logits = hidden @ kernel
        picked = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)

    args = S((positions, features), jnp.float32), S((features, vocab), jnp.float32), S((positions,), jnp.int32)
    whole = temporaries(jax.value_and_grad(full, (0, 1)), *args)
    assert whole >= positions * vocab * 4
    for wrt, share in ((("hidden", "kernel"), 0.08), (("hidden",), 0.05)):
        program = linear_program((positions,), features, vocab, jnp.float32, wrt=wrt)
        assert program.memory_analysis().temp_size_in_bytes <= share * whole
        assert largest_array(program.as_text()) <= 400 * vocab


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1031,), (3, 347)], ids=str)
@pytest.mark.parametrize("name", LINEAR_OPTIONS)
def test_linear_holds_blocks(name, shape, dtype):
    """With any options, at sizes that divide by nothing: some blocks of logits, and no array of the size of them all.

    Two blocks are the logits and their gradient; smoothing adds one for the exponentials, a bias one for its own
    gradient, and JAX 0.12 two more for positions of two axes and all options.
    """
    features, vocab, block = 16, 20011, 64
    options = LINEAR_OPTIONS[name]
    wrt = ("hidden", "kernel", *(["bias"] if options.get("bias") else []))
    vocab_axis = -1 if len(shape) == 1 else 0
    program = linear_program(shape, features, vocab, dtype, wrt=wrt, vocab_axis=vocab_axis, block_size=block, **options)
    sizes = {"logits of a block": block * vocab, "kernel": features * vocab, "hidden": math.prod(shape) * features}
    assert largest_array(program.as_text()) <= max(sizes.values())
    blocks = {"everything": 5.8, "smoothing": 3.0}.get(name, 2.0)
    allowed = 4 * (blocks * sizes["logits of a block"] + sizes["kernel"] + 3 * sizes["hidden"])
    assert program.memory_analysis().temp_size_in_bytes <= allowed


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocab_axis", [-1, 0])
@pytest.mark.parametrize("shape", [(64,), (4, 16)], ids=str)
def test_linear_copies_no_kernel(shape, vocab_axis, dtype):
    """Frozen, it is neither transposed nor upcast: what is held is blocks, here a thirtieth of it."""
    features, vocab, block = 512, 5003, 16
    program = linear_program(shape, features, vocab, dtype, wrt=("hidden",), vocab_axis=vocab_axis, block_size=block)
    assert program.memory_analysis().temp_size_in_bytes <= 4 * (3 * block * vocab) < features * vocab


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_linear_with_probabilities_copies_no_labels(name):
    """Labels of the logits' size are read block by block, and only the array that the caller holds is of that size."""
    vocab, block = 20011, 64
    program = linear_program(
        (1031,), 16, vocab, jnp.float32, probabilities=True, block_size=block, **LINEAR_OPTIONS[name]
    )
    assert program.memory_analysis().temp_size_in_bytes <= 4 * (4 * block * vocab + 2 * 16 * vocab)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_forward_mode(reduction):
    """A tangent, and a Hessian-vector product by either order of the modes: a fraction of the logits."""
    positions, features, vocab = 2048, 64, 16001
    args = S((positions, features), jnp.float32), S((features, vocab), jnp.float32)

    def loss(hidden, kernel, labels):
        return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels, reduction=reduction, block_size=128))

    def tangent(labels, at, directions):
        return jax.jvp(lambda *at: loss(*at, labels), at, directions)

    def forward_over_reverse(labels, at, directions):
        return jax.jvp(lambda *at: jax.grad(loss, (0, 1))(*at, labels), at, directions)[1]

    def reverse_over_forward(labels, at, directions):
        return jax.grad(lambda *at: tangent(labels, at, directions)[1], (0, 1))(*at)

    block, kernel = 4 * 128 * vocab, 4 * features * vocab
    for function, blocks in ((tangent, 3), (forward_over_reverse, 5), (reverse_over_forward, 7)):
        held = temporaries(function, S((positions,), jnp.int32), args, args)
        assert held <= blocks * block + 4 * kernel < 4 * positions * vocab, function.__name__


def test_heads_in_one_call():
    """Heads that predict several tokens take less memory in one call than in three, and give the same sum."""
    batch, length, features, vocab = 2, 256, 16, 50257
    shapes = [S((batch, length, features), jnp.float32)] * 3

    def labels(tokens):
        return [jxent.next_token_labels(tokens, offset=offset) for offset in (1, 2, 3)]

    def in_one(kernel, heads, tokens):
        return jxent.linear_cross_entropy(jnp.stack(heads), kernel, jnp.stack(labels(tokens)), reduction="sum")

    def in_three(kernel, heads, tokens):
        of_heads = zip(heads, labels(tokens), strict=True)
        return sum(jxent.linear_cross_entropy(hidden, kernel, y, reduction="sum") for hidden, y in of_heads)

    arguments = S((features, vocab), jnp.float32), shapes, S((batch, length), jnp.int32)
    one, three = (
        optimized(jax.value_and_grad(f, (0, 1))).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        for f in (in_one, in_three)
    )
    assert one <= three
    heads = [jnp.sin(jnp.arange(60.0) * (i + 1)).reshape(1, 10, 6) for i in range(3)]
    small = jnp.cos(jnp.arange(66.0)).reshape(6, 11), heads, jnp.arange(10)[None]
    assert abs(in_one(*small) / in_three(*small) - 1) < 1e-6
