"""Checks of labels at trace time. Dtype and shape tell indices from probabilities; an error says what to do."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jxent._call import checks
from jxent._labels.index import IndexLabels
from jxent._labels.labels import Labels
from jxent._labels.probability import ProbabilityLabels
from jxent._labels.sparse import EntryLabels, SparseLabels


def logits_and_labels(
    function: str, name: str, logits: object, labels: object, axis: object
) -> tuple[Array, Labels, int]:
    """(logits, labels, the class axis counted from the front) of a loss of logits, which the caller calls `name`."""
    array = checks.floating(function, name, logits, "convert it with .astype(jnp.float32), or swap it with labels")
    axis = checks.class_axis(function, name, array, axis)
    return array, class_labels(function, name, array, labels, axis), axis


def class_labels(function: str, name: str | None, logits: checks.Shaped, given: object, axis: int) -> Labels:
    """The labels, told apart by type, dtype and shape: class indices, class probabilities, or `SparseLabels`.

    Class indices may have any integer dtype; the returned ones have at least 32 bits. The checks read only the shape of
    `logits`. `name` is the argument's name for the logits. It is None for `linear_cross_entropy`, which has hidden
    states instead, and no axis to choose.
    """
    shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    if isinstance(given, SparseLabels):
        return _sparse_labels(function, given, shape)
    labels = checks.array(function, "labels", _in_32_bits(given))
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if labels.shape != shape:
            wanted = f"the leading shape of hidden, {shape}"
            if name is not None:
                wanted = (
                    f"the shape of {name} without its class axis, {shape} for {name} of shape {logits.shape} with "
                    f"axis={axis}"
                )
            remedy = _index_remedy(logits, labels, shape, has_axis=name is not None)
            raise ValueError(f"{function}: integer labels must have {wanted}, got {labels.shape}{remedy}")
        return IndexLabels(indices=_at_least_32_bits(labels))
    if labels.dtype not in checks.FLOATING:
        raise TypeError(
            f"{function}: labels must be integers (class indices) or floating point (class probabilities), got "
            f"{labels.dtype}; {_dtype_remedy(logits, labels, shape)}"
        )
    if labels.shape != logits.shape:
        remedy = "; if they are class indices, convert them with .astype(jnp.int32)" if labels.shape == shape else ""
        if labels.shape[:1] == (2,) and labels.shape[1:-1] == shape:
            remedy = "; for indices and probabilities of some classes pass jxent.SparseLabels(indices, probabilities)"
        wanted = "the leading shape of hidden and the vocabulary" if name is None else f"the shape of {name}"
        raise ValueError(
            f"{function}: floating-point labels are class probabilities and must have {wanted}, {logits.shape}, got "
            f"{labels.shape}{remedy}"
        )
    return ProbabilityLabels(probabilities=labels)


def _at_least_32_bits(indices: Array) -> Array:
    return indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices


def _in_32_bits(labels: object) -> object:
    """Labels that JAX cannot hold, clipped to int32, and other labels as they are; none comes into range.

    JAX would keep only the low 32 bits of 64, and read a label of 2**32 as 0.
    """
    if isinstance(labels, int | list | tuple):
        try:
            jnp.asarray(labels)
        except OverflowError:
            labels = np.array(np.clip(np.asarray(labels, object), -(2**31), 2**31 - 1), np.int32)
        except (TypeError, ValueError):
            pass  # `checks.array` raises the error
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
        return labels
    if jax.dtypes.canonicalize_dtype(labels.dtype) == labels.dtype:
        return labels
    return np.clip(labels, -(2**31), 2**31 - 1).astype(np.int32)


def _sparse_labels(function: str, labels: SparseLabels, shape: tuple[int, ...]) -> EntryLabels:
    indices = checks.array(function, "labels.indices", _in_32_bits(labels.indices))
    probabilities = checks.floating(function, "labels.probabilities", labels.probabilities)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"{function}: labels.indices must be integers (class indices), got {indices.dtype}; SparseLabels takes "
            "(indices, probabilities)"
        )
    if indices.ndim != len(shape) + 1 or indices.shape[:-1] != shape or indices.shape[-1] == 0:
        raise ValueError(
            f"{function}: labels.indices must have the shape of the positions and a last axis of at least one entry, "
            f"{(*shape, 'k')}, got {indices.shape}"
        )
    if probabilities.shape != indices.shape:
        raise ValueError(
            f"{function}: labels.probabilities must have the shape of labels.indices, {indices.shape}, got "
            f"{probabilities.shape}"
        )
    return EntryLabels(indices=_at_least_32_bits(indices), probabilities=probabilities)


def class_indices(function: str, given: object, shape: tuple[int, ...]) -> Array:
    """Indices of k classes of each position, as int32. An index that has no class keeps that property."""
    indices = checks.array(function, "indices", _in_32_bits(given))
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"{function}: indices must be integers (class indices), got {indices.dtype}; convert them with "
            ".astype(jnp.int32)"
        )
    if indices.ndim != len(shape) + 1 or indices.shape[:-1] != shape or indices.shape[-1] == 0:
        remedy = ""
        if indices.shape == shape:
            remedy = "; for one class of each position pass indices[..., None]"
        elif indices.ndim == 1 and indices.shape[-1] != 0:
            remedy = f"; for the same classes at each position pass jnp.broadcast_to(indices, {(*shape, indices.size)})"
        raise ValueError(
            f"{function}: indices must have the leading shape of hidden and a last axis of at least one class, "
            f"{(*shape, 'k')}, got {indices.shape}{remedy}"
        )
    if indices.dtype.itemsize > 4 or indices.dtype == jnp.uint32:
        kind = jnp.iinfo(indices.dtype)
        indices = jnp.clip(indices, max(kind.min, -(2**31)), 2**31 - 1)
    return indices.astype(jnp.int32)


def number_of_classes(function: str, k: object, classes: Any) -> int:
    """`k`, at most the number of classes, unless that is symbolic."""
    number = checks.positive(function, "k", k)
    if isinstance(classes, int) and number > classes:
        raise ValueError(f"{function}: k must be at most the number of classes, {classes}, got {number}")
    return number


def binary_labels(function: str, logits: Array, given: object) -> Array:
    """The labels as an array of the logits' shape, in the dtype that they have."""
    labels = checks.array(function, "labels", given)
    if labels.dtype not in checks.FLOATING and not jnp.issubdtype(labels.dtype, jnp.integer) and labels.dtype != bool:
        raise TypeError(
            f"{function}: labels must be floating point, integers or booleans, taken as numbers, got {labels.dtype}"
        )
    if labels.shape != logits.shape:
        remedy = ""
        if labels.shape in (logits.shape[:-1], (*logits.shape[:-1], 1)):
            remedy = (
                "; for one class of each row, given by its index, take cross_entropy; for one-hot labels jax.nn.one_hot"
            )
        raise ValueError(
            f"{function}: labels must have the shape of logits, {logits.shape}, one yes or no for each, got "
            f"{labels.shape}{remedy}"
        )
    return labels


BINARY = (
    "where each logit is a yes or no of its own (a binary problem), take sigmoid_cross_entropy, with labels of 0 and 1 "
    "in the shape of logits"
)


def _dtype_remedy(logits: checks.Shaped, labels: Array, shape: tuple[int, ...]) -> str:
    if labels.shape == logits.shape != shape:
        return "if they are one-hot, convert them with .astype(jnp.float32)"
    if labels.shape == shape:
        return "convert them with .astype(jnp.int32)"
    return "convert them with .astype(jnp.int32) or .astype(jnp.float32)"


def _index_remedy(logits: checks.Shaped, labels: Array, shape: tuple[int, ...], has_axis: bool) -> str:
    if has_axis and labels.shape == logits.shape and (logits.ndim == 1 or logits.shape[-1] == 1):
        return f"; {BINARY}; if they are one-hot, convert them with .astype(jnp.float32)"
    if labels.shape == logits.shape:
        return "; if they are one-hot, convert them with .astype(jnp.float32)"
    if has_axis and logits.ndim > 1 and labels.shape == logits.shape[:1] + logits.shape[2:]:
        return "; for PyTorch's layout (N, C, d1, ..., dk) pass axis=1"
    if has_axis and logits.ndim > 1 and labels.shape == logits.shape[:-1]:
        return "; for classes on the last axis pass axis=-1"
    if math.prod(labels.shape) == math.prod(shape) and 1 in labels.shape:
        return f"; drop the axes of size 1 with .reshape({shape})"
    return ""
