"""A label out of range makes NaN at its own position alone, in every dtype; an ignored position may have any label."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_calls import LABELS, LINEAR, LOGITS, LOSSES, PROBABILITIES, C, N, loss_of
from bad_labels import BAD, BAD_LABELS, OPTION_SETS, OPTIONS, with_label

import jxent


def loss_and_gradient(function, **options):
    """A compiled function of scores and labels: the loss, and the gradient of its sum by the scores."""

    def summed(scores, labels):
        out = loss_of(function)(scores, labels, **options)
        loss = out[0] if options.get("return_stats") else out
        return jnp.sum(loss), loss

    @jax.jit
    def run(scores, labels):
        (_, loss), gradient = jax.value_and_grad(summed, has_aux=True)(scores, labels)
        return loss, gradient

    return run


def assert_bad_row_alone(run, dtype, reduction):
    """The bad position has NaN in its loss and in its row of the gradient. Every other number is as with a good label.

    The same program runs with both labels, so the numbers are the same to the last bit.
    """
    expected_loss, expected_gradient = run(LOGITS, with_label(C - 1, dtype))
    assert np.isfinite(expected_loss).all()
    assert np.isfinite(expected_gradient).all()
    assert np.any(expected_gradient[BAD] != 0)
    others = np.arange(N) != BAD
    for label in BAD_LABELS[dtype]:
        loss, gradient = run(LOGITS, with_label(label, dtype))
        if reduction == "none":
            assert np.isnan(loss[BAD]), label
            np.testing.assert_array_equal(loss[others], expected_loss[others])
        else:
            assert np.isnan(loss), label
        assert np.isnan(gradient[BAD]).all(), (label, gradient[BAD])
        np.testing.assert_array_equal(gradient[others], expected_gradient[others])


@pytest.mark.covering("cross_entropy-plain-none")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("function", "options"), OPTION_SETS)
def test_label_out_of_range_is_nan_in_its_row_alone(function, options, reduction):
    run = loss_and_gradient(function, reduction=reduction, **OPTIONS[function][options])
    assert_bad_row_alone(run, "int32", reduction)


@pytest.mark.parametrize("dtype", [d for d in BAD_LABELS if d not in ("int32", "int64")])
@pytest.mark.parametrize("function", LOSSES)
def test_label_out_of_range_in_each_dtype(function, dtype):
    assert_bad_row_alone(loss_and_gradient(function, reduction="none"), dtype, "none")


@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_label_out_of_range_in_int64(function, x64):
    assert_bad_row_alone(loss_and_gradient(function, reduction="none"), "int64", "none")


@pytest.mark.parametrize("label", [2**31, 2**40, 2**70, -(2**31) - 1])
@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_labels_beyond_an_int32(function, label):
    """They are out of range in lists, numbers, NumPy arrays and `SparseLabels`, and do not wrap to 32 bits."""
    labels = [label, *LABELS[1:].tolist()]
    loss = partial(loss_of(function), LOGITS, reduction="none")
    given = [labels, tuple(labels), jxent.SparseLabels([[i] for i in labels], np.ones((N, 1), np.float32))]
    if label < 2**63:
        given += [np.array(labels), jxent.SparseLabels(np.array(labels)[:, None], np.ones((N, 1), np.float32))]
    for labels in given:
        np.testing.assert_array_equal(np.isnan(loss(labels)), np.arange(N) == 0)
    assert np.isnan(loss_of(function)(LOGITS[0], label))


@pytest.mark.parametrize("function", LOSSES)
def test_label_out_of_range_beside_a_masked_class(function):
    """The whole row of the gradient is NaN, even at a class of -inf."""
    scores = LOGITS.copy()
    scores[BAD, 3] = -np.inf
    run = loss_and_gradient(function, reduction="sum")
    loss, gradient = run(scores, with_label(C, "int32"))
    assert np.isnan(loss)
    assert np.isnan(gradient[BAD]).all()
    assert np.isfinite(np.delete(gradient, BAD, 0)).all()


def test_label_out_of_range_of_a_shared_kernel():
    """All positions share the kernel, so one bad label makes the kernel's whole gradient NaN."""
    run = jax.jit(jax.grad(jxent.linear_cross_entropy, argnums=(0, 1)), static_argnames="block_size")
    hidden, kernel = jnp.asarray(LOGITS), jnp.eye(C)
    _, expected = run(hidden, kernel, with_label(C - 1, "int32"), block_size=2)
    gradient, of_kernel = run(hidden, kernel, with_label(C, "int32"), block_size=2)
    assert np.isfinite(expected).all()
    assert np.isnan(of_kernel).all()
    np.testing.assert_array_equal(np.isnan(gradient).all(1), np.arange(N) == BAD)


# --- positions that do not count --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*LOSSES, LINEAR])
def test_no_label_is_ignored(function):
    """With `ignore_index=None`, even -100 is a bad label."""
    loss = partial(loss_of(function), ignore_index=None, reduction="none")
    plain = partial(loss_of(function), reduction="none")
    np.testing.assert_allclose(loss(LOGITS, LABELS), plain(LOGITS, LABELS), rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(loss(LOGITS, with_label(-100, "int32"))), np.arange(N) == BAD)
    np.testing.assert_allclose(loss(LOGITS, PROBABILITIES), plain(LOGITS, PROBABILITIES), rtol=1e-6)


@pytest.mark.covering
@pytest.mark.parametrize(("function", "options"), OPTION_SETS)
def test_excluded_positions_hold_any_label(function, options):
    run = loss_and_gradient(function, where=jnp.arange(N) != BAD, **OPTIONS[function][options])
    expected_loss, expected_gradient = run(LOGITS, with_label(C - 1, "int32"))
    assert np.isfinite(expected_loss)
    assert not expected_gradient[BAD].any()
    for label in BAD_LABELS["int32"]:
        loss, gradient = run(LOGITS, with_label(label, "int32"))
        assert loss == expected_loss, label
        np.testing.assert_array_equal(gradient, expected_gradient)


@pytest.mark.covering
@pytest.mark.parametrize(
    ("function", "options", "ignored"),
    [
        *((function, "plain", ignored) for function in LOSSES for ignored in (-100, -1, C, C + 7)),
        *(("cross_entropy", "all", ignored) for ignored in (-100, -1, C)),
    ],
)
def test_ignored_positions_hold_any_label(function, options, ignored):
    """Even the ignored label may be out of range. Its position counts no more than one that `where` excludes."""
    run = loss_and_gradient(function, ignore_index=ignored, **OPTIONS[function][options])
    loss, gradient = run(LOGITS, with_label(ignored, "int32"))
    excluded = loss_and_gradient(function, where=jnp.arange(N) != BAD, **OPTIONS[function][options])
    expected_loss, expected_gradient = excluded(LOGITS, with_label(C - 1, "int32"))
    # The two programs may add up N terms in different orders.
    np.testing.assert_allclose(loss, expected_loss, rtol=N * np.finfo(np.float32).eps)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=N * np.finfo(np.float32).eps)
    assert not gradient[BAD].any()
