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
    temperature: np.ndarray  # with a class axis; 1 where a position does not count
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
    temperature=1.0,
    log_probs=False,
    arithmetic=Float64,
):
    """With `log_probs` they are what `logits` holds, as in `nll_loss`. A temperature broadcasts to the positions."""
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
    divisor = a.array(np.where(keep, temperature, 1))[..., None]
    cooled = softcap(x, logit_softcap, a) / divisor
    log_p, top, log_z = (x, zero, zero) if log_probs else normalized(cooled, a)
    present = a.array(~masked)
    uniform = present / np.sum(present, -1, keepdims=True) * a.array(counts)
    share = (a.array(1) - label_smoothing) * q + label_smoothing * uniform
    loss = np.sum(times(w * share, -log_p), -1) + z_loss_weight * (top + log_z) ** 2 * a.array(keep)
    weight = np.sum(w * q, -1) if index else a.array(keep)
    return Terms(keep, x, divisor, masked, log_p, top, log_z, q, w, share, s, loss, weight)


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


# --- divergences ------------------------------------------------------------------------------------------------------


class Divergence(NamedTuple):
    """The divergence of rows, and what belongs to its gradients by the logits of either side, divided as they are."""

    value: np.ndarray
    underflow: np.ndarray  # what may be lost of it
    of_p: "Side"
    of_q: "Side"


class Side(NamedTuple):
    gradient: np.ndarray
    terms: np.ndarray  # the magnitudes of the terms of each element
    size: np.ndarray  # what its error is relative to: the largest element or term of its row
    underflow: np.ndarray
    z: np.ndarray  # the logits divided by the temperature, less the largest; 0 for a masked class


def divergence(logits_p, logits_q, temperature, beta, kind, arithmetic=Float64):
    """KL(P || Q), or for a number beta the Jensen-Shannon divergence, or for "tv" the total variation distance.

    With digits to spare it is the definition. In float64 d = z_q - z_p is taken from the logits, u = log q - log p from
    d, and differences of neighbours from these, or rows that nearly agree would leave nothing to judge by. In the
    gradient of an infinite KL a class that Q alone masks has the smallest exponential.

    What underflows is for a dtype, `kind` being its `np.finfo`: a probability a below 16 times the smallest number is
    lost with its multiples, among which are up to 60 a / eps of another probability b in b - a - a (log b - log a).
    """
    a, least = arithmetic, 16 * float(kind.tiny)
    x_p, x_q = a.array(logits_p), a.array(logits_q)
    masked_p, masked_q = x_p == -np.inf, x_q == -np.inf
    zero, infinite = 0 * a.array(1), a.array(np.inf)
    top_p, top_q = (np.max(x, -1, keepdims=True) for x in (x_p, x_q))
    z_p, z_q = (x_p - top_p) / temperature, (x_q - top_q) / temperature
    (log_p, _, log_z_p), (log_q, _, log_z_q) = normalized(z_p, a), normalized(z_q, a)
    p, q = a.exp(log_p), a.exp(log_q)
    d = ((x_q - top_q) - (x_p - top_p)) / temperature
    d = np.where(masked_p, np.where(masked_q, zero, infinite), np.where(masked_q, -infinite, d))
    ratio = (log_z_q - log_z_p)[..., None]
    if a is Float64:
        difference = np.sum(_difference(np.exp(z_p), np.exp(z_q), d, a), -1, keepdims=True)
        ratio = np.where(abs(ratio) < 1, np.log1p(difference / np.exp(log_z_p)[..., None]), ratio)
    u = d - ratio
    z_p, z_q = np.where(masked_p, zero, z_p), np.where(masked_q, zero, z_q)
    largest_p, largest_q = np.argmax(x_p, -1)[..., None], np.argmax(x_q, -1)[..., None]

    def small(weight, cost):
        return np.where((weight == 0) | (weight >= least), zero, 16 * weight * abs(cost))

    def small_excess(weight, other, cost):
        return np.sum(small(weight, cost) + np.minimum(small(weight, 60 / float(kind.eps)), 16 * other), -1)

    def by_scores(weight, p, x, scores, distance, z):
        """Of the mean of scores. Relative to that of the largest logit they add nothing for a class with p near 1.

        A score has the rounding of its distance, which is as small as itself if the rows nearly agree. That of a
        largest logit of which there is one alone is 0, and has none.
        """
        masked, largest = x == -np.inf, x == np.max(x, -1, keepdims=True)
        alone = largest & (np.sum(largest, -1, keepdims=True) == 1)
        v, size = np.where(masked, zero, scores), np.where(masked | alone, zero, abs(scores) + distance)
        lost = small(p, v)
        mean, mean_size, all_lost = (np.sum(part, -1, keepdims=True) for part in (p * v, p * size, lost))
        gradient, terms, lost = (
            weight * part for part in (p * (v - mean), p * (size + mean_size), lost + p * all_lost)
        )
        return Side(gradient, terms, np.max(terms, -1, keepdims=True), lost, z)

    def relative(array, at):
        return array - np.take_along_axis(array, at, -1)

    if beta == "tv":
        both = _difference(a.exp(z_p), a.exp(z_q), d, a) / a.exp(log_z_p)[..., None]
        size = abs(d) + abs(ratio) + np.sum(abs(both), -1, keepdims=True)
        under = least + p.shape[-1] * float(kind.tiny)  # of a probability, and of each term of the sum in `ratio`
        unsure = 16 * float(kind.eps) * size + under
        more_p, more_q = ((1 + np.sign(v)) * a.array(0.5) for v in (-u, u))
        return Divergence(
            np.sum(abs(_difference(p, q, u, a)), -1) * a.array(0.5),
            np.sum(0 * p, -1),
            _by_signs(p, more_p, more_q, abs(u) < unsure, z_p, kind),
            _by_signs(q, more_q, more_p, abs(u) < unsure, z_q, kind),
        )
    if beta is None:
        lost = ~masked_p & masked_q
        value = np.sum(np.where(lost, zero, _excess(p, q, u, a)), -1)
        value = np.where(np.any(lost & (p >= float(kind.tiny)), -1), infinite, value)
        d = np.where(lost, a.array(np.log(float(kind.tiny))), d)
        far = abs(d) + abs(np.take_along_axis(d, largest_p, -1))
        of_p = by_scores(1, p, x_p, -relative(d, largest_p), far, z_p)
        to_q = _difference(p, q, u, a)
        # With p and q near 1 an element is minus the sum of the others, which may cancel.
        size, at_largest = abs(to_q), np.arange(p.shape[-1]) == largest_q
        of_others = np.where(at_largest, np.sum(np.where(at_largest, zero, size), -1, keepdims=True), zero)
        of_q = Side(to_q, p + q, np.maximum(np.max(size, -1, keepdims=True), of_others), 0 * p, z_q)
        return Divergence(value, small_excess(p, q, np.where(lost, zero, u)), of_p, of_q)
    beta = a.array(beta)
    to_m_p, to_m_q = _log_mean(u, beta, a), _log_mean(-u, 1 - beta, a)  # log m - log p, log m - log q
    m = beta * p + (1 - beta) * q
    value = np.sum(beta * _excess(p, m, to_m_p, a) + (1 - beta) * _excess(q, m, to_m_q, a), -1)
    underflow = small_excess(p, m, to_m_p) + small_excess(q, m, to_m_q)

    def of_side(share, p, x, u, d, largest, z):
        # Of a distance as much as the other side has of the mean.
        far = times(1 / (1 + share / (1 - share) * a.exp(-u)), abs(d))
        far = far + np.take_along_axis(far, largest, -1)
        return by_scores(share, p, x, -_log_mean_step(u, d, largest, share, a), far, z)

    of_p = of_side(beta, p, x_p, u, d, largest_p, z_p)
    return Divergence(value, underflow, of_p, of_side(1 - beta, q, x_q, -u, -d, largest_q, z_q))


def _by_signs(p, more, less, unsure, z, kind):
    """The gradient of the total variation distance by z, with `more` of this side in some classes and `less` in others.

    Rounding may turn the sign of an `unsure` class, where p and q are almost equal. A class more than 64 below the
    largest has one bit less than the others, and may decide the gradient of all.
    """
    of_more, of_less, of_unsure = (np.sum(p * part, -1, keepdims=True) for part in (more, less, unsure))
    terms = p * (more * of_less + less * of_more)
    far = 40 * float(kind.eps) * (abs(z) > 64)
    of_more_far, of_less_far = (np.sum(p * part * far, -1, keepdims=True) for part in (more, less))
    lost = p * (of_unsure + unsure + more * of_less_far + less * of_more_far) + terms * far
    return Side(p * (more * of_less - less * of_more), terms, np.max(terms, -1, keepdims=True), lost, z)


def _difference(a, b, u, arithmetic):
    """b - a, for numbers with u = log b - log a."""
    if arithmetic is Digits:
        return b - a
    near = abs(u) < 1
    return np.where(near, a * np.expm1(np.where(near, u, 0)), b - a)


def _excess(a, b, u, arithmetic):
    """b - a - a u, which over all classes sums to what -a u does, and has one sign; a is 0 where u is infinite."""
    direct = b - a - times(a, u)
    if arithmetic is Digits:
        return direct
    near = abs(u) < 1
    few = np.where(near, u, 0)
    return np.where(near, a * (np.expm1(few) - few), direct)


def _log_mean(u, share, arithmetic):
    """log(share + (1 - share) exp(u))."""
    a, zero = arithmetic, 0 * arithmetic.array(1)
    above, below = np.where(u > 0, u, zero), np.where(u < 0, u, zero)
    return np.where(u > 0, u + a.log1p(share * a.expm1(-above)), a.log1p((1 - share) * a.expm1(below)))


def _log_mean_step(u, d, at, share, arithmetic):
    """`_log_mean` less what it is at some class of each row; d differs from u by a number for each row."""
    a = arithmetic
    of_all = _log_mean(u, share, a)
    direct = of_all - np.take_along_axis(of_all, at, -1)
    if a is Digits:
        return direct
    there = np.take_along_axis(u, at, -1)
    step = np.where(u == there, 0, d - np.take_along_axis(d, at, -1))
    low, high = np.minimum(u, there), np.maximum(u, there)
    rise = (1 - share) * _difference(np.exp(low), np.exp(high), abs(step), a) / np.exp(_log_mean(low, share, a))
    return np.where(high < 700, np.sign(step) * np.log1p(rise), direct)
