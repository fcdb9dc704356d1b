"""The losses in float64 NumPy, written from the definitions; imports nothing from jxent.

The class axis is the last one here. `log_softmax` leaves the largest entry out of its sum, which makes float64 more
than exact enough to judge float32; the rest is written for clarity.
"""

import numpy as np


def log_softmax(logits):
    x = np.asarray(logits, np.float64)
    top = np.argmax(x, -1)[..., None]
    m = np.take_along_axis(x, top, -1)
    m = np.where(np.isneginf(m), 0, m)
    terms = np.exp(x - m)
    np.put_along_axis(terms, top, 0, -1)
    return (x - m) - np.log1p(terms.sum(-1, keepdims=True))


def logsumexp(logits):
    x = np.asarray(logits, np.float64)
    m = x.max(-1, keepdims=True)
    return (m + np.log(np.exp(x - m).sum(-1, keepdims=True)))[..., 0]


def softcap(logits, cap):
    x = np.asarray(logits, np.float64)
    return x if cap is None else np.where(np.isneginf(x), x, cap * np.tanh(x / cap))


def times(weight, cost):
    """weight * cost, where a weight of 0 makes 0 of any cost."""
    with np.errstate(invalid="ignore"):
        return np.where(weight == 0, 0, weight * cost)


def one_hot(labels, classes):
    return (np.asarray(labels)[..., None] == np.arange(classes)).astype(np.float64)


def position_losses(
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
):
    """(loss, weight) of each position, the weight being its share of the mean's denominator; 0 where it counts not."""
    logits = softcap(logits, logit_softcap)
    classes, positions = logits.shape[-1], logits.shape[:-1]
    w = np.ones(classes) if class_weight is None else np.asarray(class_weight, np.float64)
    s = np.broadcast_to(1.0 if sample_weight is None else np.asarray(sample_weight, np.float64), positions)
    keep = np.broadcast_to(True if where is None else where, positions)
    labels = np.asarray(labels)
    if np.issubdtype(labels.dtype, np.integer):
        keep = keep & (labels != ignore_index)
        q, weight = one_hot(labels, classes), w[np.where(keep, labels, 0)]
    else:
        q, weight = np.asarray(labels, np.float64), np.ones(positions)
    present = ~np.isneginf(logits)
    logits = np.where(keep[..., None], logits, 0.0)
    cost = -log_softmax(logits)
    present = np.where(keep[..., None], present, True)
    loss = (1 - label_smoothing) * times(q * w, cost).sum(-1)
    loss = loss + label_smoothing * times(present * w, cost).sum(-1) / present.sum(-1)
    if z_loss_weight:
        loss = loss + z_loss_weight * logsumexp(logits) ** 2
    return np.where(keep, s * loss, 0), np.where(keep, s * weight, 0)


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
