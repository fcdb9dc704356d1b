"""The first examples of cross-entropy, worked out by hand, by the usual formula and by jxent.

Each function below is one question that people ask, with the numbers that answer it:

- naive:   softmax in float32, then -log of the label's probability.
- usual:   -log_softmax in float32, `x[t] - m - log(sum exp(x - m))`, as in PyTorch and JAX.
- jxent:   `jxent.cross_entropy` in float32.
- float64: the same loss in double precision, to judge the others by.

    pip install jxent
    python worked_examples.py
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jxent


@partial(jax.jit, static_argnames="axis")
def naive_loss(logits, labels, axis=-1):
    """exp, divide, log: what the definition says, and what overflows."""
    exps = jnp.exp(logits)
    probs = exps / exps.sum(axis, keepdims=True)
    label_probs = jnp.take_along_axis(probs, jnp.expand_dims(labels, axis), axis)
    return -jnp.log(label_probs).squeeze(axis)


@partial(jax.jit, static_argnames="axis")
def usual_loss(logits, labels, axis=-1):
    """The stable formula of most libraries."""
    log_probs = jax.nn.log_softmax(logits, axis)
    return -jnp.take_along_axis(log_probs, jnp.expand_dims(labels, axis), axis).squeeze(axis)


def float64_loss(logits, labels, axis=-1):
    """log sum exp(x - x[t]) in NumPy's float64, one pair at a time, each with log1p."""
    logits = np.asarray(logits, np.float64)
    label_logits = np.take_along_axis(logits, np.expand_dims(labels, axis), axis)
    return np.logaddexp.reduce(logits - label_logits, axis)


def title(text):
    print(f"\n{text}\n{'-' * len(text)}")


def print_losses(logits, labels, axis=-1):
    """Prints the loss of each position by the four formulas, one row for each position."""
    logits, labels = jnp.array(logits, jnp.float32), jnp.array(labels)
    losses = [
        naive_loss(logits, labels, axis),
        usual_loss(logits, labels, axis),
        jxent.cross_entropy(logits, labels, axis=axis, reduction="none"),
        float64_loss(logits, labels, axis),
    ]
    print(f"  {'logits':<24} label {'naive':>12} {'usual':>12} {'jxent':>12} {'float64':>12}")
    rows, labels, *losses = map(np.asarray, (jnp.moveaxis(logits, axis, -1), labels, *losses))
    for position in np.ndindex(labels.shape):
        row = "[" + ", ".join(f"{x:g}" for x in rows[position]) + "]"
        values = " ".join(f"{loss[position] + 0.0:12.5g}" for loss in losses)  # + 0.0: -0 is 0
        print(f"  {row:<24} {labels[position]:5d} {values}")


def four_ways():
    title("Four ways to the same loss")
    print("Cross-entropy is softmax, then log, then the negative entry of the label, averaged.")
    logits = jnp.array(
        [
            [0.9826, 1.0630, -0.4096],
            [-0.6213, 0.2511, 0.5659],
            [0.5662, 0.7360, -0.6783],
            [-0.4638, -1.4961, -1.0877],
            [1.8186, -0.2998, 0.1128],
        ]
    )
    labels = jnp.array([1, 0, 1, 1, 1])
    rows = jnp.arange(len(labels))
    ways = {
        "-log(softmax(logits)[label])": -jnp.log(jxent.softmax(logits)[rows, labels]).mean(),
        "-log_softmax(logits)[label]": -jxent.log_softmax(logits)[rows, labels].mean(),
        "nll_loss(log_softmax(logits), labels)": jxent.nll_loss(jxent.log_softmax(logits), labels),
        "cross_entropy(logits, labels)": jxent.cross_entropy(logits, labels),
    }
    for name, loss in ways.items():
        print(f"  {name:<40} {loss:.4f}")


def confident():
    title("Confidently right, confidently wrong")
    print("The loss of a wrong answer grows like the gap to the largest logit, here 20 - 4 = 16.")
    print_losses([[4, 3, 2, 10], [20, 2, 3, 4]], [3, 3])


def batch_mean():
    title("A small batch")
    print("The default reduction averages the losses of the rows.")
    logits = jnp.array([[1.0, 4, 1, 1], [5, 1, 2, 1], [1, 2, 5, 1]])
    labels = jnp.array([1, 0, 2])
    print_losses(logits, labels)
    print(f"  mean: {jxent.cross_entropy(logits, labels):.7f}")


def class_axis():
    title("Classes on axis 1, as in PyTorch's (N, C, L)")
    print("With axis=1 the labels have the shape (N, L), and so have the losses.")
    logits = jnp.array([[[4.0, 10], [3, 2], [2, 3], [10, 4]]])
    labels = jnp.array([[3, 1]])
    print(f"  logits {logits.shape}, labels {labels.shape}")
    print_losses(logits, labels, axis=1)

    logits = jnp.array([[[4.0, 4], [3, 3], [2, 2], [2, 20]], [[20, 20], [3, 3], [2, 2], [10, 10]]])
    labels = jnp.array([[3, 3], [0, 0]])
    print(f"  logits {logits.shape}, labels {labels.shape}")
    print_losses(logits, labels, axis=1)
    print("In float32 1 + 1.7e-07 is 1 + 1.2e-07: the second loss of the usual formula is 30% off.")


def right_but_not_zero():
    title("Why the loss of a right answer is not 0")
    print("Logits are not probabilities. [1, 0, 0] does not say that class 0 is certain, only that")
    print("it is e = 2.7 times as likely as each other class: its probability is 0.58, its loss")
    print("-log(0.58) = 0.55. Only an infinite gap would give 0, so the loss keeps falling while")
    print("the gap grows, long after every prediction is right.")
    labels = jnp.arange(3)
    print("  logits                 probability of the label         loss")
    for gap in (1, 2, 5, 10, 20, 40):
        logits = gap * jnp.eye(3)
        loss = jxent.cross_entropy(logits, labels)
        print(f"  {gap:2d} * identity matrix {jnp.exp(-loss):26.7f} {loss:12.5g}")


def overflow():
    title("Where the naive formula overflows")
    print("exp(88.73) is more than float32 holds: naive softmax divides by inf, then inf by inf.")
    print_losses([[x, x - 1.0, 0.0] for x in (10.0, 80.0, 88.7, 89.0, 1000.0)], [0] * 5)


def collapse():
    title("Where the usual formula collapses to 0")
    print("From a gap of 17 on, 1 + exp(-gap) is 1 in float32: loss and label gradient vanish.")
    print_losses([[x, 0.0, 0.0] for x in (5.0, 10.0, 15.0, 17.0, 20.0, 40.0)], [0] * 6)


def soft_labels():
    title("Soft labels")
    print("Floating-point labels are class probabilities, in the shape of the logits.")
    logits = jnp.array([2.0, 1.0, 0.0])
    print("  labels                     loss")
    for labels in ([1.0, 0, 0], [0.8, 0.1, 0.1], [0.5, 0.5, 0], [0.0, 0, 1]):
        loss = jxent.cross_entropy(logits, jnp.array(labels))
        print(f"  {labels!s:<22} {loss:8.4f}")
    smoothed = jxent.cross_entropy(logits, 0, label_smoothing=0.3)
    print(f"  {'0, label_smoothing=0.3':<22} {smoothed:8.4f}  the same as [0.8, 0.1, 0.1]")


def class_weights():
    title("Class weights for unbalanced classes")
    print("The weighted mean divides by the weights of the labels, not by their number.")
    logits = jnp.array([[2.0, 0], [2, 0], [2, 0], [2, 0]])
    labels = jnp.array([0, 0, 0, 1])
    class_weight = jnp.array([1.0, 3.0])  # class 1 is three times as rare
    losses = jxent.cross_entropy(logits, labels, reduction="none")
    print("  label   loss  weight  weight * loss")
    for label, loss in zip(labels, losses, strict=True):
        weight = class_weight[label]
        print(f"  {label:5d} {loss:6.4f}  {weight:6.1f}  {weight * loss:13.4f}")
    total = jxent.cross_entropy(logits, labels, class_weight=class_weight, reduction="sum")
    weight = class_weight[labels].sum()
    mean = jxent.cross_entropy(logits, labels, class_weight=class_weight)
    print(f"  sums         {weight:7.1f}  {total:13.4f}")
    print(f"  unweighted mean        {losses.mean():.4f}  = {losses.sum():.4f} / 4")
    print(f"  weighted mean          {mean:.4f}  = {total:.4f} / {weight:g}")


def main():
    four_ways()
    confident()
    batch_mean()
    class_axis()
    right_but_not_zero()
    overflow()
    collapse()
    soft_labels()
    class_weights()


if __name__ == "__main__":
    main()
