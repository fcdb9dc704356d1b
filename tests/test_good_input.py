"""Good input that looks like bad input: lists, Python numbers, weights of any dtype, ends of ranges, no positions."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from bad_calls import (
    BINARY,
    DIVERGENCES,
    FUNCTIONS,
    LABELS,
    LINEAR,
    LINEAR_BINARY,
    LINEAR_DIVERGENCES,
    LOGITS,
    LOSSES,
    C,
    N,
    good,
    loss_of,
)

import jxent

RNG = np.random.default_rng(20240611)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_good_call_raises_nothing(function):
    """Each row of a test_bad_input_*.py changes one argument of this call, so that argument is what raises."""
    getattr(jxent, function)(**good(function))


def test_array_likes_are_taken():
    """An error that asks for an array or a Python number also takes NumPy arrays, lists and NumPy numbers."""
    expected = jxent.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABELS), label_smoothing=0.25, axis=1)
    assert jxent.cross_entropy(LOGITS.tolist(), LABELS.tolist(), label_smoothing=np.float32(0.25), axis=1) == expected
    assert jxent.cross_entropy(LOGITS, LABELS, label_smoothing=np.array(0.25, np.float32), axis=np.int64(1)) == expected


WEIGHTS = [
    *((function, "class_weight", (C,)) for function in (*LOSSES, LINEAR)),
    *(
        (function, "sample_weight", (N,))
        for function in (*LOSSES, LINEAR, LINEAR_BINARY, *DIVERGENCES, *LINEAR_DIVERGENCES)
    ),
    (LINEAR_BINARY, "pos_weight", (C,)),
    *((BINARY, name, (N, C)) for name in ("sample_weight", "pos_weight")),
    *((LINEAR_DIVERGENCES[0], name, (C,)) for name in ("bias_p", "bias_q")),
    (LINEAR, "bias", (C,)),
]


@pytest.mark.parametrize(("function", "name", "shape"), WEIGHTS)
def test_weights_are_numbers_of_any_kind(function, name, shape):
    """Integers, booleans and lists weigh like floating-point numbers, and so does a Python number that broadcasts."""
    call = partial(getattr(jxent, function), **good(function))
    whole, kept = RNG.integers(1, 4, shape), RNG.random(shape) < 0.7
    for given in (whole, whole.tolist(), jnp.asarray(whole), whole + 2**33, kept, kept.tolist()):
        out = call(**{name: given})
        assert out.dtype == jnp.float32
        assert out == call(**{name: np.asarray(given).astype(np.float32)})
    if "sample" in name or "pos" in name:
        for given in (2, 2.0, True, np.int64(2)):
            assert call(**{name: given}) == call(**{name: np.full(shape, given, np.float32)})


@pytest.mark.usefixtures("x64")
def test_a_python_number_is_of_the_losses_dtype():
    for weight in (2, 2.0, True, [1] * N, np.arange(N)):
        assert jxent.cross_entropy(LOGITS, LABELS, sample_weight=weight).dtype == jnp.float32
        assert jxent.cross_entropy(LOGITS.astype(float), LABELS, sample_weight=weight).dtype == jnp.float64


@pytest.mark.parametrize("number", [1, np.int32(1), np.array(1), jnp.int32(1)])
def test_a_number_without_a_fraction(number):
    expected = jxent.cross_entropy(LOGITS, LABELS, label_smoothing=1.0, z_loss_weight=1.0)
    assert jxent.cross_entropy(LOGITS, LABELS, label_smoothing=number, z_loss_weight=number) == expected
    of_one = jxent.kl_divergence(LOGITS, LOGITS[::-1])
    np.testing.assert_allclose(jxent.kl_divergence(LOGITS, LOGITS[::-1], temperature=number), of_one, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0, 1, 0.0, 1.0])
def test_ends_of_the_range_of_label_smoothing(smoothing):
    assert np.isfinite(jxent.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing))


@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_no_positions(function):
    call = partial(loss_of(function), LOGITS[:0], LABELS[:0])
    assert np.isnan(call())
    assert call(reduction="sum") == 0
    assert call(reduction="none").shape == (0,)
