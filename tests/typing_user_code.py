"""Code as users write it, for pyright and mypy to find nothing in it; no test runs it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jxent


def plain(x: jax.Array, y: jax.Array) -> jax.Array:
    return jxent.cross_entropy(x, y)


def of_language_model(hidden: jax.Array, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    labels = jxent.next_token_labels(tokens)
    return jxent.linear_cross_entropy(hidden, embedding, labels, vocab_axis=0, block_size=256, recompute=True)


def with_stats(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jxent.Stats]:
    return jxent.cross_entropy(x, y, return_stats=True, label_smoothing=0.1)


def of_either(x: jax.Array, y: jax.Array, *, stats: bool) -> jax.Array:
    out = jxent.cross_entropy(x, y, return_stats=stats)
    return out[0] if isinstance(out, tuple) else out


def arithmetic(x: jax.Array, y: jax.Array) -> jax.Array:
    loss = jxent.cross_entropy(x, y, z_loss_weight=jnp.float32(1e-4)) * 2
    loss += jxent.nll_loss(jxent.log_softmax(x), y)
    loss, stats = loss + 1, with_stats(x, y)[1]
    accuracy = jnp.sum(stats.correct) / stats.count
    return loss + accuracy + jxent.logsumexp(x, axis=None) + jxent.softmax(x, -1)[0, 0]


def on_numpy(x: np.ndarray, y: np.ndarray) -> float:
    losses = jxent.cross_entropy(x, y, where=y >= 0, class_weight=np.ones(3), reduction="none", ignore_index=None)
    return float(losses.mean()) + float(jxent.cross_entropy([[1.0, 2.0, 3.0]], [2], class_weight=[1, 2, 3]))


def from_disk(x: jax.Array, indices: np.ndarray, probabilities: np.ndarray) -> jax.Array:
    return jxent.cross_entropy(x, jxent.SparseLabels(indices, probabilities))


smooth = partial(jxent.cross_entropy, label_smoothing=0.1, axis=1)
per_example = jax.vmap(partial(jxent.cross_entropy, reduction="none"))


@jax.jit
def step(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    def loss_of(params: dict[str, jax.Array]) -> tuple[jax.Array, jxent.Stats]:
        return jxent.linear_cross_entropy(x, params["kernel"], y, bias=params["bias"], return_stats=True)

    (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss + stats.entropy.mean(), gradients["kernel"]
