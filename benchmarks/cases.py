"""What a case of compare.py and growth.py is: its inputs, losses, floor and truth; and those of cross-entropy."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers

PARTS = 8
CONFIDENT = 16  # rows that are sure of their label
LARGE = 2**40  # multiplications of one matmul


class Case(NamedTuple):
    title: str
    dtype: str
    inputs: Callable[[int], tuple]  # of a seed
    losses: Callable[[], dict[str, tuple]]  # name -> (function of the inputs, which of them are differentiated)
    reference: Callable[..., jax.Array]  # a loss of the inputs, which is the truth if they are float64
    floor: Callable[[bool], tuple[str, Callable]]  # with gradients or without: what nobody can do without, and its name
    torch_losses: Callable[[], dict[str, Callable]] = dict
    passes: tuple[str, ...] = ("forward", "value_and_grad")
    size: tuple[int, ...] = ()
    gradient_error: float | None = None  # allowed, relative to the largest element of a sample; None goes by the dtype

    def __str__(self):
        return self.title

    def shapes(self):
        """The inputs without their values."""
        return jax.eval_shape(lambda: self.inputs(0))


class Truth(NamedTuple):
    loss: float
    gradients: dict[int, np.ndarray]  # number of an input -> some rows of its gradient


def truth(case, arguments):
    """Of the same inputs, as one writes it in JAX: in float64, and of sizes too large for a CPU in float32 here."""
    floats = [i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating)]

    def sampled(*arguments):
        loss, gradients = jax.value_and_grad(case.reference, tuple(floats))(*arguments)
        return loss, [gradient[rows_of(gradient)] for gradient in gradients]

    if math.prod(case.size) > LARGE:
        wide = [a.astype(jnp.float32) if i in floats else a for i, a in enumerate(arguments)]
        with jax.default_matmul_precision("highest"):
            loss, gradients = jax.jit(sampled)(*wide)
        return Truth(float(loss), dict(zip(floats, map(np.asarray, gradients), strict=True)))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = [np.asarray(a).astype(np.float64) if i in floats else np.asarray(a) for i, a in enumerate(arguments)]
        loss, gradients = jax.jit(sampled)(*wide)
    return Truth(float(loss), dict(zip(floats, map(np.asarray, gradients), strict=True)))


def rows_of(gradient):
    return np.linspace(0, len(gradient) - 1, 8).astype(int)


def in_parts(array):
    """An axis of parts of the positions in front, for `jax.lax.map`."""
    return array.reshape(math.gcd(len(array), PARTS), -1, *array.shape[1:])


# --- cross-entropy ----------------------------------------------------------------------------------------------------


def of_logits(positions, classes, dtype):
    def inputs(seed):
        labels = jax.random.randint(jax.random.key(seed), (positions,), 0, classes)
        logits = jax.random.normal(jax.random.key(seed + 100), (positions, classes), dtype)
        sure = jnp.arange(min(CONFIDENT, positions // 8))
        return logits.at[sure, labels[sure]].set(25), labels

    def floor(grad):
        if grad:
            return "read and write", lambda logits, labels: logits + 1
        return "read the logits", lambda logits, labels: jnp.sum(logits, dtype=jnp.float32)

    return Case(
        f"`cross_entropy`, {positions:,} positions x {classes:,} classes, {dtype}",
        dtype,
        inputs,
        losses=lambda: {name: (loss, (0,)) for name, loss in peers.logits_losses().items()},
        reference=peers.log_softmax_loss,
        floor=floor,
        torch_losses=peers.torch_logits_losses,
        size=(positions, classes),
    )


def of_hidden(positions, features, classes, dtype):
    def inputs(seed):
        labels = jax.random.randint(jax.random.key(seed), (positions,), 0, classes)
        hidden = jax.random.normal(jax.random.key(seed + 100), (positions, features), dtype)
        kernel = jax.random.normal(jax.random.key(seed + 200), (features, classes), dtype)
        kernel /= np.sqrt(features).astype(dtype)
        sure = jnp.arange(min(CONFIDENT, positions // 8))
        return hidden.at[sure].set(20 * kernel[:, labels[sure]].T), kernel, labels

    def reference(hidden, kernel, labels):
        part = jax.checkpoint(lambda part: peers.log_softmax_loss(part[0] @ kernel, part[1]))
        return jnp.mean(jax.lax.map(part, (in_parts(hidden), in_parts(labels))))

    def three_matmuls(hidden, kernel, labels):
        logits = hidden @ kernel
        return logits @ kernel.T, hidden.T @ logits

    def floor(grad):
        return ("three matmuls", three_matmuls) if grad else ("one matmul", lambda h, k, labels: h @ k)

    return Case(
        f"`linear_cross_entropy`, {positions:,} positions x {features:,} features x {classes:,} classes, {dtype}",
        dtype,
        inputs,
        losses=lambda: {name: (loss, (0, 1)) for name, loss in peers.linear_losses().items()},
        reference=reference,
        floor=floor,
        torch_losses=lambda: peers.torch_linear_losses(positions),
        size=(positions, features, classes),
    )


def of_size(size, dtype):
    """Of positions x classes, or of positions x features x classes."""
    return (of_logits if len(size) == 2 else of_hidden)(*size, dtype)
