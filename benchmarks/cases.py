"""The inputs of compare.py and growth.py, and their loss and a sample of its gradients in float64 NumPy."""

from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

DISTINCT = 1024  # rows repeat after so many, with labels of their own: the float64 loss of a large case takes seconds
CONFIDENT = 16  # rows of these that are sure of their label


class Case(NamedTuple):
    loss: str  # cross_entropy or linear_cross_entropy
    size: tuple[int, ...]  # positions x classes, or positions x features x classes
    dtype: str

    @property
    def linear(self):
        return self.loss == "linear_cross_entropy"

    @property
    def logits_bytes(self):
        return self.size[0] * self.size[-1] * jnp.dtype(self.dtype).itemsize

    def __str__(self):
        axes = ("positions", "features", "classes") if self.linear else ("positions", "classes")
        return " x ".join(f"{n:,} {axis}" for n, axis in zip(self.size, axes, strict=True)) + f", {self.dtype}"


class Truth(NamedTuple):
    """The loss, and for each gradient an index and the values there, all in float64."""

    loss: float
    gradients: tuple[tuple[Any, np.ndarray], ...]


def shapes(case):
    """Abstract arguments of the case's losses."""
    positions, dtype = case.size[0], jnp.dtype(case.dtype)
    floats = [case.size[:2], case.size[1:]] if case.linear else [case.size]
    return *(jax.ShapeDtypeStruct(shape, dtype) for shape in floats), jax.ShapeDtypeStruct((positions,), jnp.int32)


def inputs(case, seed):
    """Arguments of the case's losses: random normal logits, and a few rows whose label leads by some 20."""
    positions, classes = case.size[0], case.size[-1]
    few = min(CONFIDENT, positions // 8)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, positions)
    rows = np.arange(positions) % DISTINCT
    labels[rows < few] = labels[rows[rows < few]]

    def make(labels):
        keys = jax.random.split(jax.random.key(seed), 2)
        sure = jnp.arange(few)
        if case.linear:
            kernel = jax.random.normal(keys[1], case.size[1:], case.dtype) / np.sqrt(case.size[1]).astype(case.dtype)
            rows = jax.random.normal(keys[0], (min(positions, DISTINCT), case.size[1]), case.dtype)
            rows = rows.at[sure].set(20 * kernel[:, labels[:few]].T)
        else:
            rows = jax.random.normal(keys[0], (min(positions, DISTINCT), classes), case.dtype)
            rows = rows.at[sure, labels[:few]].set(25)
        rows = rows[jnp.arange(positions) % DISTINCT]
        return (rows, kernel, labels) if case.linear else (rows, labels)

    return jax.block_until_ready(jax.jit(make)(jnp.asarray(labels, jnp.int32)))


def truth(case, arguments):
    """The loss, and the gradients of eight positions (and of their labels' columns of the kernel)."""
    labels = np.asarray(arguments[-1])
    positions, classes = len(labels), case.size[-1]
    distinct = np.asarray(arguments[0][:DISTINCT]).astype(np.float64)
    kernel = np.asarray(arguments[1]) if case.linear else None
    rows = np.arange(positions) % DISTINCT
    step = max(1, 2**25 // len(distinct))
    chunks = [np.arange(start, min(start + step, classes)) for start in range(0, classes, step)]

    def columns(at, rows=slice(None)):
        """Logits of these classes."""
        return distinct[rows] @ kernel[:, at].astype(np.float64) if case.linear else distinct[rows][:, at]

    log_normalizer = reduce(np.logaddexp, (logsumexp(columns(at), axis=-1) for at in chunks))
    picked = []
    for start in range(0, positions, DISTINCT):
        at = labels[start : start + DISTINCT]
        if case.linear:
            picked.append(np.einsum("nf,fn->n", distinct[: len(at)], kernel[:, at].astype(np.float64)))
        else:
            picked.append(distinct[np.arange(len(at)), at])
    loss = np.mean(log_normalizer[rows] - np.concatenate(picked))

    some = np.unique(np.linspace(0, min(positions, DISTINCT) - 1, 8).astype(int))
    gradient = np.zeros((len(some), case.size[1]))
    for at in chunks:
        dlogits = np.exp(columns(at, some) - log_normalizer[some, None]) - (labels[some, None] == at)
        if case.linear:
            gradient += dlogits @ kernel[:, at].T.astype(np.float64)
        else:
            gradient[:, at] = dlogits
    samples = [(some, gradient / positions)]
    if case.linear:
        at = np.unique(labels[some])
        dlogits = np.exp(columns(at) - log_normalizer[:, None]) * np.bincount(rows)[:, None]
        for column, label in enumerate(at):
            np.subtract.at(dlogits[:, column], rows[labels == label], 1)
        samples.append(((slice(None), at), distinct.T @ dlogits / positions))
    return Truth(float(loss), tuple(samples))
