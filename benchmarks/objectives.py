"""Objectives of post-training, by jxent and as one writes them without it, for compare.py and compiled.py.

Without jxent they take full logits, or `jax.lax.map` over parts of the positions, each computed again for its gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
from cases import Case, in_parts
from peers import log_softmax

import jxent


def normal(seed, *shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients_of(title, inputs, losses, matmuls, reference, **options):
    """A case of compare.py in float32, whose floor is the matmuls alone."""
    floor = ("the matmuls alone", matmuls)
    passes = ("value_and_grad",)
    return Case(title, "float32", inputs, lambda: losses, reference, lambda grad: floor, passes=passes, **options)


# --- divergences: a student learns from a teacher ---------------------------------------------------------------------


def kl_of_logits(hidden_p, kernel_p, hidden_q, kernel_q):
    log_p, log_q = log_softmax(hidden_p @ kernel_p), log_softmax(hidden_q @ kernel_q)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))


def js_of_logits(hidden_p, kernel_p, hidden_q, kernel_q):
    log_p, log_q = log_softmax(hidden_p @ kernel_p), log_softmax(hidden_q @ kernel_q)
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m), axis=-1)) / 2


def tv_of_logits(hidden_p, kernel_p, hidden_q, kernel_q):
    log_p, log_q = log_softmax(hidden_p @ kernel_p), log_softmax(hidden_q @ kernel_q)
    return jnp.mean(jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), -1)) / 2


def divergence_in_parts(of_logits, hidden_p, kernel_p, hidden_q, kernel_q):
    part = jax.checkpoint(lambda part: of_logits(part[0], kernel_p, part[1], kernel_q))
    return jnp.mean(jax.lax.map(part, (in_parts(hidden_p), in_parts(hidden_q))))


def divergence_matmuls(hidden_p, kernel_p, hidden_q, kernel_q):
    def part(kernel_gradient, hidden):
        g = hidden[0] @ kernel_p + hidden[1] @ kernel_q
        return kernel_gradient + hidden[1].T @ g, g @ kernel_q.T

    return jax.lax.scan(part, jnp.zeros_like(kernel_q), (in_parts(hidden_p), in_parts(hidden_q)))


def divergence(name, ours, of_logits, size, **options):
    positions, features_p, features, classes = size
    student, both = (2, 3), (0, 1, 2, 3)
    mapped = partial(divergence_in_parts, of_logits)

    def inputs(seed):
        shapes = (positions, features_p), (features_p, classes), (positions, features), (features, classes)
        hidden_p, kernel_p, hidden_q, kernel_q = normal(seed, *shapes)
        return hidden_p, kernel_p / features_p**0.5, hidden_q, kernel_q / features**0.5

    losses = {
        "jxent": (ours, student),
        "jxent, both sides": (ours, both),
        "jax.nn, full logits": (of_logits, student),
        "jax.nn, lax.map and checkpoint": (mapped, student),
    }
    models = f"a teacher of {features_p:,} features, a student of {features:,}"
    title = f"{name}: {positions:,} positions, {models}, {classes:,} classes, float32"
    return with_gradients_of(title, inputs, losses, divergence_matmuls, mapped, **options)


def divergences(*size):
    """Positions, features of the teacher, features of the student, classes."""
    return [
        divergence("KL", jxent.linear_kl_divergence, kl_of_logits, size),
        divergence("JS", jxent.linear_js_divergence, js_of_logits, size),
        # The gradient jumps where two probabilities are equal. float32 logits may round to the other side of that.
        divergence("TV", jxent.linear_tv_distance, tv_of_logits, size, gradient_error=0.05),
    ]


# --- policies: loss, log-probability and entropy of each token, all three differentiated ------------------------------


def of_tokens(hidden, kernel, labels):
    # No label is ignored, so that the program has one loop forwards and one backwards, whose matmuls are counted.
    options = {"reduction": "none", "return_stats": True, "ignore_index": None}
    loss, stats = jxent.linear_cross_entropy(hidden, kernel, labels, **options)
    return loss, stats.log_prob, stats.entropy


def of_tokens_of_logits(hidden, kernel, labels):
    log_p = log_softmax(hidden @ kernel)
    log_prob = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return -log_prob, log_prob, -jnp.sum(jnp.exp(log_p) * log_p, -1)


def of_tokens_in_parts(hidden, kernel, labels):
    part = jax.checkpoint(lambda part: of_tokens_of_logits(part[0], kernel, part[1]))
    return [a.reshape(labels.shape) for a in jax.lax.map(part, (in_parts(hidden), in_parts(labels)))]


def policy_objective(of_tokens, hidden, kernel, labels, coefficients):
    loss, log_prob, entropy = of_tokens(hidden, kernel, labels)
    return jnp.sum(coefficients * loss + jnp.cos(coefficients) * log_prob + 0.1 * entropy)


def policy_matmuls(hidden, kernel, labels, coefficients):
    """With a maximum, without which the compiler would leave the first matmul out."""
    del labels, coefficients

    def backwards(kernel_gradient, part):
        g = part @ kernel
        return kernel_gradient + part.T @ g, g @ kernel.T

    tops = jax.lax.map(lambda part: jnp.max(part @ kernel, -1), in_parts(hidden))
    return tops, jax.lax.scan(backwards, jnp.zeros_like(kernel), in_parts(hidden))


def policy(positions, features, classes):
    def inputs(seed):
        hidden, kernel, coefficients = normal(seed, (positions, features), (features, classes), (positions,))
        labels = jax.random.randint(jax.random.key(seed + 1), (positions,), 0, classes)
        return hidden, kernel / features**0.5, labels, coefficients

    of_all = {
        "jxent": of_tokens,
        "jax.nn, full logits": of_tokens_of_logits,
        "jax.nn, lax.map and checkpoint": of_tokens_in_parts,
    }
    losses = {name: (partial(policy_objective, f), (0, 1)) for name, f in of_all.items()}
    mapped = partial(policy_objective, of_tokens_in_parts)
    title = f"A policy's tokens: {positions:,} positions, {features:,} features, {classes:,} classes, float32"
    return with_gradients_of(title, inputs, losses, policy_matmuls, mapped)


# --- as in Liger's benchmark, with kernels of (classes, features) -----------------------------------------------------


def js(teacher, kernel_p, student, kernel_q, labels):
    del labels
    return jxent.linear_js_divergence(teacher, kernel_p, student, kernel_q, vocab_axis=0)


def js_of_full_logits(teacher, kernel_p, student, kernel_q, labels):
    del labels
    return js_of_logits(teacher, kernel_p.T, student, kernel_q.T)


def log_probs(hidden, kernel, labels):
    _, stats = jxent.linear_cross_entropy(hidden, kernel, labels, vocab_axis=0, reduction="none", return_stats=True)
    return stats.log_prob


def log_probs_of_full_logits(hidden, kernel, labels):
    return jnp.take_along_axis(log_softmax(hidden @ kernel.T), labels[..., None], axis=-1)[..., 0]


def grpo(log_probs, reference, kernel_r, policy, kernel, labels):
    """With the ratio of the first update, and the divergence from a reference model, both as Liger's."""
    log_prob = log_probs(policy, kernel, labels)
    behind = jax.lax.stop_gradient(log_probs(reference, kernel_r, labels)) - log_prob
    ratio = jnp.exp(log_prob - jax.lax.stop_gradient(log_prob))
    advantages = jnp.linspace(-1, 1, len(labels), dtype=jnp.float32)
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
    return jnp.mean(0.1 * (jnp.expm1(behind) - behind) - gain)
