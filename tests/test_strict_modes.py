"""Every public function in the modes in which JAX refuses promotions, leaks or NaN, and without jit.

Each function is called, and differentiated by all of its floating-point arguments, with dtypes that users have.
"""

import contextlib
import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jxent

RNG = np.random.default_rng(16)
POSITIONS, CLASSES, FEATURES = (2, 3), 5, 4
FLOATS = {
    "logits": (*POSITIONS, CLASSES),
    "hidden": (*POSITIONS, FEATURES),
    "kernel": (FEATURES, CLASSES),
    "hidden_p": (*POSITIONS, 3),
    "kernel_p": (3, CLASSES),
    "bias": (CLASSES,),
    "class_weight": (CLASSES,),
    "sample_weight": (POSITIONS[-1],),
    "q": (*POSITIONS, CLASSES),
}
FLOATS = {name: RNG.uniform(0.5, 2, shape) for name, shape in FLOATS.items()}
FLOATS["q"] /= FLOATS["q"].sum(-1, keepdims=True)
WEIGHTS = ("class_weight", "sample_weight")
ALL = {"label_smoothing": 0.1, "z_loss_weight": 0.01, "logit_softcap": 5.0}


def log_probs(*args, **options):
    """Log-probabilities first, as the test takes them."""
    out = jxent.linear_log_probs(*args, np.arange(6, dtype=np.int8).reshape(*POSITIONS, 1) % 5, block_size=2, **options)
    return out.log_probs[..., 0] + out.log_rest, out.indices


def top_k(*args, **options):
    out = jxent.linear_top_k(*args, 2, block_size=2, **options)
    return out.log_probs[..., 0] + out.log_rest, out.indices


# name: (function, floating-point arguments by position, the others by name, options)
CALLS = {
    "logsumexp": (jxent.logsumexp, ("logits",), (), {"where": RNG.random(CLASSES) < 0.8}),
    "softmax": (jxent.softmax, ("logits",), (), {"where": RNG.random((*POSITIONS, CLASSES)) < 0.8}),
    "log_softmax": (jxent.log_softmax, ("logits",), (), {}),
    "nll_loss": (jxent.nll_loss, ("logits", "labels"), WEIGHTS, {"where": RNG.random(POSITIONS[-1]) < 0.8}),
    "nll_loss-probabilities": (jxent.nll_loss, ("logits", "q"), WEIGHTS, {}),
    "cross_entropy": (jxent.cross_entropy, ("logits", "labels"), (), {}),
    "cross_entropy-all": (jxent.cross_entropy, ("logits", "labels"), WEIGHTS, {"return_stats": True, **ALL}),
    "cross_entropy-probabilities": (jxent.cross_entropy, ("logits", "q"), WEIGHTS, {"return_stats": True, **ALL}),
    "linear": (jxent.linear_cross_entropy, ("hidden", "kernel", "labels"), (), {"block_size": 2}),
    "linear-all": (
        jxent.linear_cross_entropy,
        ("hidden", "kernel", "labels"),
        ("bias", *WEIGHTS),
        {"block_size": 2, "return_stats": True, **ALL},
    ),
    "linear-none": (
        jxent.linear_cross_entropy,
        ("hidden", "kernel", "q"),
        ("bias", *WEIGHTS),
        {"block_size": 2, "reduction": "none", **ALL},
    ),
}
PAIR = ("hidden_p", "kernel_p", "hidden", "kernel")
CALLS |= {
    "sigmoid": (
        jxent.sigmoid_cross_entropy,
        ("logits", "q"),
        (),
        {"label_smoothing": 0.1, "where": RNG.random(5) < 0.8},
    ),
    "linear-sigmoid": (
        jxent.linear_sigmoid_cross_entropy,
        ("hidden", "kernel", "labels"),
        ("bias", "sample_weight"),
        {"block_size": 2, "label_smoothing": 0.1, "pos_weight": 2.0},
    ),
    "linear-kl": (jxent.linear_kl_divergence, PAIR, ("sample_weight",), {"block_size": 2, "temperature": 1.5}),
    "tv": (jxent.tv_distance, ("logits", "q"), ("sample_weight",), {"temperature": 1.5}),
    "linear-js-none": (jxent.linear_js_divergence, PAIR, (), {"block_size": 2, "reduction": "none"}),
    "log_probs": (log_probs, ("hidden", "kernel"), ("bias",), {"where": RNG.random(POSITIONS) < 0.8}),
    "top_k": (top_k, ("hidden", "kernel"), ("bias",), {"logit_softcap": 5.0}),
}
MODES = {
    "strict": (partial(jax.numpy_dtype_promotion, "strict"), partial(jax.numpy_rank_promotion, "raise")),
    "leaks": (jax.checking_leaks,),
    "NaN": (partial(jax.debug_nans, True),),
    "no jit": (jax.disable_jit,),
}
# The other modes, which do not look at dtypes, take the first.
DTYPES = [("float32", "int32"), ("bfloat16", "int8"), ("float16", "uint16"), ("float32", "int16")]


def arrays_of(names, dtype, label_dtype):
    labels = jnp.asarray(RNG.integers(0, CLASSES, POSITIONS), label_dtype)
    return {name: labels if name == "labels" else jnp.asarray(FLOATS[name], dtype) for name in names}


def result(name, dtype, label_dtype, jit):
    function, positional, by_name, options = CALLS[name]
    arrays = arrays_of((*positional, *by_name), dtype, label_dtype)

    def f(floats, rest):
        given = floats | rest
        out = function(*(given[name] for name in positional), **{name: given[name] for name in by_name}, **options)
        loss, *stats = out if isinstance(out, tuple) else (out,)
        return jnp.sum(jnp.sin(loss.astype(jnp.float32))), stats

    floats = {name: array for name, array in arrays.items() if name != "labels"}
    rest = {name: array for name, array in arrays.items() if name == "labels"}
    f = jax.value_and_grad(f, has_aux=True)
    return (jax.jit(f) if jit else f)(floats, rest)


def cases():
    """(name, mode, dtypes)."""
    for name, mode in itertools.product(CALLS, MODES):
        for dtypes in DTYPES if mode == "strict" else DTYPES[:1]:
            yield pytest.param(name, mode, dtypes, id=f"{name}-{mode}-{'-'.join(dtypes)}")


# Each function with one of the pairs of dtypes, and a call of each kind with the first.
SHORT = [f"{name}-strict-{'-'.join(DTYPES[i % 4])}" for i, name in enumerate(CALLS)]
SHORT += [f"{name}-strict-float32-int32" for name in ("cross_entropy-all", "linear-all", "linear-kl")]


@pytest.mark.covering(
    *dict.fromkeys(SHORT),
    *(f"{name}-float32-int32" for name in ("linear-all-NaN", "cross_entropy-leaks", "nll_loss-probabilities-no jit")),
)
@pytest.mark.parametrize(("name", "mode", "dtypes"), list(cases()))
def test_strict_mode(name, mode, dtypes):
    """The mode refuses nothing, with gradients. The losses are jitted anyway; a leak may be into a `jit` around."""
    if mode != "strict":  # JAX keeps traces of each kind of promotion apart
        jax.clear_caches()  # what was traced before would not be looked at
    with contextlib.ExitStack() as stack:
        for enter in MODES[mode]:
            stack.enter_context(enter())
        (value, stats), gradients = result(name, *dtypes, jit=mode == "leaks")
        chex.assert_tree_all_finite((value, stats, gradients))
        for gradient in jax.tree.leaves(gradients):
            assert gradient.dtype == dtypes[0]
            assert np.any(np.asarray(gradient))
