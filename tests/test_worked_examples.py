"""The examples that people meet first, with the numbers that they are shown."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jxent

LOGITS = [
    [0.9826, 1.0630, -0.4096],
    [-0.6213, 0.2511, 0.5659],
    [0.5662, 0.7360, -0.6783],
    [-0.4638, -1.4961, -1.0877],
    [1.8186, -0.2998, 0.1128],
]
LABELS = [1, 0, 1, 1, 1]


def rounds_to(value, shown):
    """Whether a number, rounded to as many digits as `shown` has, is `shown`."""
    digits = len(shown.lower().split("e")[0].replace(".", "").replace("-", "").lstrip("0"))
    return float(f"{float(value):.{digits}g}") == float(shown)


def test_four_ways_to_the_same_loss():
    logits, labels = jnp.array(LOGITS), jnp.array(LABELS)
    rows = jnp.arange(5)
    ways = [
        -jnp.log(jxent.softmax(logits))[rows, labels].mean(),
        -jxent.log_softmax(logits)[rows, labels].mean(),
        jxent.nll_loss(jxent.log_softmax(logits), labels),
        jxent.cross_entropy(logits, labels),
    ]
    assert [f"{way:.4f}" for way in ways] == ["1.4904"] * 4


@pytest.mark.parametrize(("logits", "shown"), [([4.0, 3, 2, 10], "0.0037"), ([20.0, 2, 3, 4], "16.000")])
def test_one_row(logits, shown):
    assert rounds_to(jxent.cross_entropy(jnp.array([logits]), jnp.array([3])), shown)


def test_classes_on_axis_1():
    logits = jnp.array([[[4.0, 10], [3, 2], [2, 3], [10, 4]]])
    losses = jxent.cross_entropy(logits, jnp.array([[3, 1]]), axis=1, reduction="none")
    assert all(map(rounds_to, losses[0], ["3.7192e-03", "8.0037"]))

    logits = jnp.array([[[4.0, 4], [3, 3], [2, 2], [2, 20]], [[20, 20], [3, 3], [2, 2], [10, 10]]])
    labels = jnp.array([[3, 3], [0, 0]])
    losses = jxent.cross_entropy(logits, labels, axis=1, reduction="none")
    assert rounds_to(losses[0, 0], "2.4938")
    assert rounds_to(losses[0, 1], "1.6916e-07")  # PyTorch: 1.1921e-07
    # 4.54551e-05 in PyTorch's documentation style; the exact value is 4.545549e-05, and PyTorch prints 4.5418e-05.
    exact = oracle.cross_entropy(np.moveaxis(logits, 1, -1), labels, reduction="none")
    np.testing.assert_allclose(losses, exact, rtol=1e-6)
    np.testing.assert_allclose(losses[1], 4.5455e-05, rtol=2e-5)


def test_identity():
    assert rounds_to(jxent.cross_entropy(jnp.eye(3), jnp.arange(3)), "0.5514")
    assert jxent.cross_entropy(10 * jnp.eye(3), jnp.arange(3)) < 1e-4
    assert jxent.cross_entropy(10 * jnp.eye(3), jnp.arange(3)) > 0


def test_three_rows():
    logits = jnp.array([[1.0, 4, 1, 1], [5, 1, 2, 1], [1, 2, 5, 1]])
    exact = oracle.cross_entropy(logits, np.array([1, 0, 2]))  # 0.101659681; float32 formulas print ...66 to ...69
    np.testing.assert_allclose(jxent.cross_entropy(logits, jnp.array([1, 0, 2])), exact, rtol=2e-7)
    np.testing.assert_allclose(exact, 0.10165966, rtol=3e-7)


def test_naive_softmax_overflows_and_ours_does_not():
    """exp(88.8) is beyond float32."""
    logits = jnp.array([88.8, 0.0, 1.0])
    exps = jnp.exp(logits)
    assert np.isnan(exps / exps.sum())[0]
    np.testing.assert_allclose(jxent.softmax(logits), [1, 0, 0], atol=1e-38)
    assert np.isfinite(jxent.cross_entropy(logits, jnp.array(1)))


def test_soft_labels():
    """The mean of the losses of the two labels, weighted by their probabilities."""
    logits = jnp.array([2.0, 0.5, -1.0])
    soft = jxent.cross_entropy(logits, jnp.array([0.7, 0.3, 0.0]))
    each = [jxent.cross_entropy(logits, jnp.array(t)) for t in range(2)]
    np.testing.assert_allclose(soft, 0.7 * each[0] + 0.3 * each[1], rtol=1e-6)


def test_class_weights_of_unbalanced_classes():
    """With weights 1 / count each class has an equal say, and the mean divides by the weights of the labels."""
    logits, labels = jnp.array([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.5, 0.0]]), jnp.array([0, 0, 0, 1])
    weight = jnp.array([1 / 3, 1.0])
    losses = jxent.cross_entropy(logits, labels, reduction="none")
    balanced = (losses[:3].mean() + losses[3]) / 2
    np.testing.assert_allclose(jxent.cross_entropy(logits, labels, class_weight=weight), balanced, rtol=1e-6)


def test_a_right_answer_still_has_a_loss():
    """The loss is -log p of the label: being right is not enough, p would have to be 1."""
    losses = [jxent.cross_entropy(jnp.array([margin, 0.0]), jnp.array(0)) for margin in (0.1, 1.0, 10.0, 60.0)]
    assert np.all(np.diff(losses) < 0)
    np.testing.assert_allclose(losses, np.log1p(np.exp(-np.array([0.1, 1, 10, 60]))), rtol=2e-6)
    assert losses[-1] > 0


def test_gradient_is_probability_minus_label():
    logits, labels = jnp.array(LOGITS), jnp.array(LABELS)
    gradient = jax.grad(jxent.cross_entropy)(logits, labels)
    np.testing.assert_allclose(gradient, (jxent.softmax(logits) - jax.nn.one_hot(labels, 3)) / 5, rtol=1e-5, atol=1e-8)
