"""The losses in plain jax.numpy, for JAX to differentiate as often as it likes; imports nothing from jxent.

As a textbook has them, without a thought to rounding: float64 makes them good enough. The class axis is the last one.
oracle.py has the same losses, exactly, without derivatives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Stats(NamedTuple):
    log_prob: jax.Array
    log_normalizer: jax.Array
    entropy: jax.Array
    prediction: jax.Array
    weight: jax.Array


def logsumexp(logits, *, where=True):
    x = jnp.where(where, logits, -jnp.inf)
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    return top[..., 0] + jnp.log(jnp.exp(x - top).sum(-1))


def log_softmax(logits, *, where=True):
    return jnp.where(where, logits, -jnp.inf) - logsumexp(logits, where=where)[..., None]


def softmax(logits, *, where=True):
    return jnp.exp(log_softmax(logits, where=where))


def nll_loss(log_probs, labels, **options):
    return reduced(log_probs, 0.0, log_probs, labels, **options)


def cross_entropy(logits, labels, *, logit_softcap=None, temperature=1.0, **options):
    x = logits if logit_softcap is None else logit_softcap * jnp.tanh(logits / logit_softcap)
    x = cooled(x, temperature)
    return reduced(x, logsumexp(x), log_softmax(x), labels, **options)


def cooled(logits, temperature):
    """The logits divided by a number, or by one that broadcasts to the positions."""
    return logits / (temperature[..., None] if jnp.ndim(temperature) else temperature)


def kl_divergence(logits_p, logits_q, *, temperature=1.0, **options):
    log_p, log_q = (log_softmax(cooled(x, temperature)) for x in (logits_p, logits_q))
    return weighed(_kl(log_p, log_q), **options)


def js_divergence(logits_p, logits_q, *, beta=0.5, temperature=1.0, **options):
    log_p, log_q = (log_softmax(cooled(x, temperature)) for x in (logits_p, logits_q))
    log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log(1 - beta))
    return weighed(beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m), **options)


def tv_distance(logits_p, logits_q, *, temperature=1.0, **options):
    p, q = softmax(logits_p / temperature), softmax(logits_q / temperature)
    return weighed(jnp.sum(jnp.abs(p - q), -1) / 2, **options)


def sigmoid_of_classes(logits, labels, *, pos_weight=1.0, label_smoothing=0.0, where=True, **options):
    if jnp.issubdtype(labels.dtype, jnp.integer):
        where &= labels != -100
        labels = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    yes = (1 - label_smoothing) * labels + label_smoothing / 2
    losses = -pos_weight * yes * jax.nn.log_sigmoid(logits) - (1 - yes) * jax.nn.log_sigmoid(-logits)
    return weighed(jnp.sum(losses, -1), where=where, **options)


def _kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def weighed(values, *, sample_weight=1.0, where=True, reduction="mean"):
    weight = jnp.where(jnp.broadcast_to(where, values.shape), sample_weight, 0)
    total = jnp.sum(values * weight)
    return {"mean": total / jnp.sum(weight), "sum": total, "none": values * weight}[reduction]


def reduced(
    x,
    log_normalizer,
    log_p,
    labels,
    *,
    class_weight=1.0,
    sample_weight=1.0,
    where=True,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss_weight=0.0,
    reduction="mean",
    return_stats=False,
):
    """The loss of scores `x` with these log-normalizers and log-probabilities."""
    classes = log_p.shape[-1]
    counts, q, of_weight = where, labels, 1.0
    if jnp.issubdtype(labels.dtype, jnp.integer):
        counts &= labels != ignore_index
        q = jax.nn.one_hot(labels, classes, dtype=log_p.dtype)
        of_weight = jnp.sum(q * class_weight, -1)
    share = (1 - label_smoothing) * q + label_smoothing / classes
    losses = -jnp.sum(share * class_weight * log_p, -1) + z_loss_weight * log_normalizer**2
    of_sample = jnp.where(jnp.broadcast_to(counts, losses.shape), sample_weight, 0)
    losses, weight = losses * of_sample, jnp.sum(of_weight * of_sample)
    loss = {"mean": jnp.sum(losses) / weight, "sum": jnp.sum(losses), "none": losses}[reduction]
    if not return_stats:
        return loss
    numbers = jnp.sum(q * log_p, -1), log_normalizer, -jnp.sum(jnp.exp(log_p) * log_p, -1)
    prediction = jnp.where(counts, jnp.argmax(x, -1).astype(jnp.int32), 0)
    return loss, Stats(*(jnp.where(counts, number, 0) for number in numbers), prediction, weight)
