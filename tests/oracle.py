"""The losses from their definitions, in float64 NumPy or with 50 digits; imports nothing from jxent.

The class axis is the last one here. The largest entry is left out of the sum of exponentials, which makes float64 more
than exact enough to judge float32; the rest is written for clarity. With `arithmetic=Digits` everything has 50 digits,
inside `mpmath.workdps(50)`, in arrays of objects. reference.py has the same losses for JAX to differentiate.
"""

from typing import NamedTuple

import mpmath
import numpy as np


class Float64:
    """Arithmetic enough to judge float32."""

    exp, log1p, expm1, tanh, cosh = np.exp, np.log1p, np.expm1, np.tanh, np.cosh

    @staticmethod
    def array(values):
        return np.asarray(values, np.float64)


class Digits:
    """The same with as many digits as mpmath has at work."""

    exp, log1p, expm1 = (np.frompyfunc(f, 1, 1) for f in (mpmath.exp, mpmath.log1p, mpmath.expm1))
    tanh, cosh = (np.frompyfunc(f, 1, 1) for f in (mpmath.tanh, mpmath.cosh))
    array = staticmethod(
        np.vectorize(lambda v: v if isinstance(v, mpmath.mpf) else mpmath.mpf(float(v)), otypes=[object])
    )


def normalized(logits, arithmetic=Float64):
    """(log p, the maximum m, log of the sum of exp(logits - m)), the last two without the class axis."""
    a = arithmetic
    x = a.array(logits)
    index = np.argmax(x, -1)[..., None]
    top = np.take_along_axis(x, index, -1)
    top = np.where(top == -np.inf, 0 * a.array(1), top)
    terms = a.exp(x - top)
    np.put_along_axis(terms, index, a.array(0), -1)
    log_z = a.log1p(np.sum(terms, -1, keepdims=True))
    return (x - top) - log_z, top[..., 0], log_z[..., 0]


def log_softmax(logits):
    return normalized(logits)[0]


def logsumexp(logits):
    _, top, log_z = normalized(logits)
    return top + log_z


def softcap(logits, cap, arithmetic=Float64):
    x = arithmetic.array(logits)
    masked = x == -np.inf
    return x if cap is None else np.where(masked, x, cap * arithmetic.tanh(np.where(masked, 0 * cap, x) / cap))


def times(weight, cost):
    """weight * cost, where a weight of 0 makes 0 of any cost."""
    return np.where(weight == 0, 0 * weight, weight * np.where(weight == 0, 0 * weight, cost))


def one_hot(labels, classes):
    return (np.asarray(labels)[..., None] == np.arange(classes)).astype(np.float64)


class Terms(NamedTuple):
    """What the losses of positions are made of; those that do not count have logits, labels and weights of 0."""

    keep: np.ndarray  # whether a position counts
    logits: np.ndarray
    masked: np.ndarray  # whether a class is, by a logit of -inf
    log_p: np.ndarray
    top: np.ndarray  # the maximum, and the rest of the log-normalizer
    log_z: np.ndarray
    q: np.ndarray  # the labels' probabilities
    class_weight: np.ndarray
    share: np.ndarray  # of the cost of each class, before its weight
    sample_weight: np.ndarray
    loss: np.ndarray  # before the sample weight, as is
    weight: np.ndarray  # the share of the mean's denominator


def terms(
    logits,
    labels,
    *,
    class_weight=None,
    sample_weight=None,
    where=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss_weight=0.0,
    logit_softcap=None,
    log_probs=False,
    arithmetic=Float64,
):
    """With `log_probs` they are what `logits` holds, as in `nll_loss`."""
    a = arithmetic
    x, labels = a.array(logits), np.asarray(labels)
    *positions, classes = x.shape
    index = np.issubdtype(labels.dtype, np.integer)
    keep = np.broadcast_to(True if where is None else where, positions)
    keep = keep & (labels != ignore_index) if index else keep
    counts, zero = keep[..., None], 0 * a.array(1)
    x = np.where(counts, x, zero)
    q = a.array(np.where(counts, one_hot(labels, classes) if index else labels, 0))
    w = a.array(np.ones(classes) if class_weight is None else class_weight)
    s = a.array(np.where(keep, 1 if sample_weight is None else sample_weight, 0))

    masked = x == -np.inf
    x_capped = softcap(x, logit_softcap, a)
    log_p, top, log_z = (x, zero, zero) if log_probs else normalized(x_capped, a)
    present = a.array(~masked)
    uniform = present / np.sum(present, -1, keepdims=True) * a.array(counts)
    share = (a.array(1) - label_smoothing) * q + label_smoothing * uniform
    loss = np.sum(times(w * share, -log_p), -1) + z_loss_weight * (top + log_z) ** 2 * a.array(keep)
    weight = np.sum(w * q, -1) if index else a.array(keep)
    return Terms(keep, x, masked, log_p, top, log_z, q, w, share, s, loss, weight)


def position_losses(logits, labels, **options):
    """(loss, weight) of each position, the weight being its share of the mean's denominator; 0 where it counts not."""
    with np.errstate(invalid="ignore"):
        t = terms(logits, labels, **options)
        return times(t.sample_weight, t.loss), t.sample_weight * t.weight


def cross_entropy(logits, labels, *, reduction="mean", **options):
    loss, weight = position_losses(logits, labels, **options)
    if reduction == "none":
        return loss
    with np.errstate(invalid="ignore", divide="ignore"):
        return loss.sum() / weight.sum() if reduction == "mean" else loss.sum()


def logit_gradient(logits, labels):
    """d loss / d logits of each position for index labels: p at the other classes, p - 1 at the label."""
    log_p = log_softmax(logits)
    gradient = np.exp(log_p)
    at_label = np.asarray(labels)[..., None]
    loss = -np.take_along_axis(log_p, at_label, -1)
    np.put_along_axis(gradient, at_label, np.expm1(-loss), -1)
    return gradient


class Derivatives(NamedTuple):
    """Along v, each with the sum of its terms' magnitudes, of which it may be what is left."""

    tangent: np.ndarray  # of the loss of each position
    tangent_terms: np.ndarray
    product: np.ndarray  # the loss's Hessian times v
    product_terms: np.ndarray


def derivatives(logits, labels, v, label_smoothing=0.0, arithmetic=Float64):
    """For index labels. With u = v - v[top] nothing cancels but what u itself has of both signs."""
    a = arithmetic
    p = a.exp(normalized(logits, a)[0])
    top = np.argmax(a.array(logits), -1)[..., None]
    u = a.array(v) - np.take_along_axis(a.array(v), top, -1)
    smoothing = a.array(label_smoothing)
    share = (1 - smoothing) * a.array(one_hot(labels, p.shape[-1])) + smoothing / p.shape[-1]
    mean, size = (p * u).sum(-1, keepdims=True), (p * abs(u)).sum(-1, keepdims=True)
    tangent, terms = mean - (share * u).sum(-1, keepdims=True), size + (share * abs(u)).sum(-1, keepdims=True)
    return Derivatives(tangent[..., 0], terms[..., 0], p * (u - mean), p * (abs(u) + size))
