"""`linear_log_probs` and `linear_top_k`, and the checks of their arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jxent._call import checks, label_checks
from jxent._call.annotations import ArrayLike, AxisName
from jxent._call.axis_names import Sharded, mesh_axes
from jxent._call.names import known_names
from jxent._call.placement import CLASSES, placed
from jxent._core.dtypes import compute_dtype
from jxent._core.reports import NoSuchClass, report, report_values
from jxent._core.shards import cast_alike, class_offset, sharded_as_positions
from jxent._core.weights import only
from jxent._linear_rules import linear_costs
from jxent._mesh.sharded import covers_its_mesh
from jxent._objective.log_probs import ListedClasses
from jxent._rows.passes import known
from jxent._sweep.block import Inputs, Sweep


class ClassLogProbs(NamedTuple):
    """Log-probabilities of k classes of each position, and of all other classes together, in nats.

    The log-probabilities have their true gradients, and the indices have none. Together, the k classes and the rest
    have all probability: ``exp(log_probs).sum(-1) + exp(log_rest)`` is 1 if no class repeats. At a position that
    `where` masks, all numbers are 0.

    If a program returns `ClassLogProbs` and `jax.export` serializes it, its reader must import jxent. Return
    ``result._asdict()`` for other readers.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> kernel = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))  # one feature, three classes
      >>> top = jxent.linear_top_k(jnp.ones((1, 1)), kernel, 2)
      >>> print(top.indices, jnp.exp(top.log_probs).round(3), jnp.exp(top.log_rest).round(3))
      [[0 1]] [[0.5 0.3]] [0.2]
    """

    indices: Int[Array, "*positions k"]
    """Class indices (int32): those given to `linear_log_probs`, or the largest classes, in falling order."""
    log_probs: Float[Array, "*positions k"]
    """Log-probability of each class among all classes; -inf for an index of -1."""
    log_rest: Float[Array, "*positions"]
    """Logarithm of the probability of all other classes together; -inf if there are none.

    It is as accurate near a probability of 0 as near 1.
    """


jax.export.register_namedtuple_serialization(ClassLogProbs, serialized_name="jxent.ClassLogProbs")


@known_names
def linear_log_probs(
    hidden: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features vocab"] | Float[ArrayLike, "vocab features"],
    indices: Int[ArrayLike, "*positions k"],
    *,
    bias: Float[ArrayLike, " vocab"] | None = None,
    vocab_axis: int = -1,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    logit_softcap: float | None = None,
    temperature: Float[ArrayLike, "*#positions"] = 1.0,
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
    block_size: int | None = None,
    precision: Any = None,
) -> ClassLogProbs:
    """Log-probabilities of k classes of each position, for the logits ``hidden @ kernel + bias``, in blocks of them.

    Use it for the log-probabilities of sampled tokens, of candidates, or of the classes that a teacher has stored. It
    keeps the logits of only `block_size` positions in memory. Gradients are computed in the backward pass, and only
    for arguments that you differentiate. Log-probabilities are as exact as the loss of `linear_cross_entropy`.

    Args:
      hidden: hidden states of any leading shape, float16, bfloat16, float32 or float64.
      kernel: the output layer's weights, (features, vocab), or (vocab, features) with ``vocab_axis=0``.
      indices: class indices, integers of the leading shape of `hidden` and a last axis of k entries. They may repeat.
        A repeated class counts once in the rest. An index of -1 stands for no class: its log-probability is -inf.
        Any other index out of range makes its log-probability, the rest and the position's gradient NaN.
      bias: added to the logits in at least float32. A class with a bias of -inf is masked.
      vocab_axis: the axis of `kernel` that is the vocabulary, -1 or 0.
      where: boolean, broadcasts to the leading shape of `hidden`; False masks a position, even if its hidden state
        contains NaN. Blocks skip masked positions, as in `linear_cross_entropy`.
      logit_softcap: a Python number c > 0; the logits become ``c * tanh(logits / c)`` first.
      temperature: divides the float32 logits, after the soft cap: a number, a scalar array, or an array that broadcasts
        to the leading shape of `hidden`, as in `cross_entropy`.
      axis_name: the mesh axis or axes over which the vocabulary is sharded, as in `linear_cross_entropy`.
      batch_axis_name: the same for the positions, outside of `jax.shard_map`. Inside, nothing is summed over positions,
        so leave it out there.
      block_size: the largest number of positions in a block, as in `linear_cross_entropy`.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`.

    Returns:
      A `ClassLogProbs` of the indices (int32), their log-probabilities, and the log-probability of all other classes
      together. Both are in float32, or in float64 if an input is.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax, jax.numpy as jnp, jxent
      >>> hidden = jax.random.normal(jax.random.key(0), (2, 8, 16))  # (batch, length, features)
      >>> kernel = jax.random.normal(jax.random.key(1), (16, 1000)) / 4
      >>> sampled = jax.random.randint(jax.random.key(2), (2, 8, 3), 0, 1000)  # (batch, length, k)
      >>> out = jxent.linear_log_probs(hidden, kernel, sampled)
      >>> expected = jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel), sampled, -1)
      >>> print(out.log_probs.shape, bool(jnp.allclose(out.log_probs, expected, rtol=1e-5)))
      (2, 8, 3) True
    """
    name = "linear_log_probs"
    return _checked(
        name,
        hidden,
        kernel,
        bias=bias,
        vocab_axis=vocab_axis,
        indices=indices,
        k=None,
        where=where,
        logit_softcap=logit_softcap,
        temperature=temperature,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        block_size=block_size,
        precision=precision,
    )


@known_names
def linear_top_k(
    hidden: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features vocab"] | Float[ArrayLike, "vocab features"],
    k: int,
    *,
    bias: Float[ArrayLike, " vocab"] | None = None,
    vocab_axis: int = -1,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    logit_softcap: float | None = None,
    temperature: Float[ArrayLike, "*#positions"] = 1.0,
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
    block_size: int | None = None,
    precision: Any = None,
) -> ClassLogProbs:
    """The k most probable classes of each position, for the logits ``hidden @ kernel + bias``, in blocks of them.

    Use it to store a teacher's top k, or to restrict a loss or a sampler to the most probable classes. The
    log-probabilities are among all classes, and `log_rest` has what the k classes lack. The classes have the order of
    `jax.lax.top_k`: falling, and of equal logits the lower index first. Memory and gradients are those of
    `linear_log_probs` at the indices found.

    Args:
      hidden: hidden states of any leading shape, float16, bfloat16, float32 or float64.
      kernel: the output layer's weights, (features, vocab), or (vocab, features) with ``vocab_axis=0``.
      k: the number of classes, a Python integer of at most the size of the vocabulary.
      bias: added to the logits in at least float32. A class with a bias of -inf is masked.
      vocab_axis: the axis of `kernel` that is the vocabulary, -1 or 0.
      where: boolean, broadcasts to the leading shape of `hidden`; False masks a position, even if its hidden state
        contains NaN. Blocks skip masked positions.
      logit_softcap: a Python number c > 0; the logits become ``c * tanh(logits / c)`` first.
      temperature: divides the float32 logits, after the soft cap: a number, a scalar array, or an array that broadcasts
        to the leading shape of `hidden`, as in `cross_entropy`.
      axis_name: the mesh axis or axes over which the vocabulary is sharded. Each shard sends its own k largest logits
        of a position, and nothing of the vocabulary's size.
      batch_axis_name: the same for the positions, outside of `jax.shard_map`.
      block_size: the largest number of positions in a block.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`.

    Returns:
      A `ClassLogProbs` of the indices (int32), their log-probabilities, and the log-probability of all other classes
      together. Both are in float32, or in float64 if an input is.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      Store a teacher's two most probable classes, and train a student on them.

      >>> import jax, jax.numpy as jnp, jxent
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> teacher = jax.random.normal(keys[0], (2, 8, 32)), jax.random.normal(keys[1], (32, 1000)) / 2
      >>> student = jax.random.normal(keys[2], (2, 8, 16)), jax.random.normal(keys[3], (16, 1000)) / 4
      >>> top = jxent.linear_top_k(*teacher, 2)
      >>> labels = jxent.SparseLabels(top.indices, jnp.exp(top.log_probs))
      >>> print(f"{jxent.linear_cross_entropy(*student, labels):.3f} {jnp.exp(top.log_rest).mean():.3f}")
      1.690 0.770
    """
    name = "linear_top_k"
    return _checked(
        name,
        hidden,
        kernel,
        bias=bias,
        vocab_axis=vocab_axis,
        indices=None,
        k=k,
        where=where,
        logit_softcap=logit_softcap,
        temperature=temperature,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        block_size=block_size,
        precision=precision,
    )


def _checked(
    name: str,
    hidden: Any,
    kernel: Any,
    *,
    bias: Any,
    vocab_axis: Any,
    indices: Any,
    k: Any,
    where: Any,
    logit_softcap: Any,
    temperature: Any,
    axis_name: Any,
    batch_axis_name: Any,
    block_size: Any,
    precision: Any,
) -> ClassLogProbs:
    """The log-probabilities of these arguments: at the `indices`, or of the `k` largest classes if k is given."""
    hidden = checks.floating(name, "hidden", hidden)
    kernel = checks.floating(name, "kernel", kernel)
    vocab_axis = checks.kernel_axis(name, hidden, kernel, vocab_axis)
    bias = checks.per_class(name, "bias", bias, kernel.shape[vocab_axis], hidden.dtype)
    shape = hidden.shape[:-1]
    what, remedy = "the leading shape of hidden", "compare it (mask != 0)"
    where = checks.mask(name, where, shape, what, remedy)
    of_kernel = Sharded(name="kernel", array=kernel, axes=(vocab_axis,))
    of_hidden = Sharded(name="hidden", array=hidden, axes=range(hidden.ndim - 1))
    over = mesh_axes(name, axis_name, of_kernel, batch_axis_name, of_hidden, None)
    checks.one_device_if_symbolic(name, hidden, kernel)
    if k is None:
        indices = label_checks.class_indices(name, indices, shape)
        k = indices.shape[-1]
    else:
        k = label_checks.number_of_classes(name, k, kernel.shape[vocab_axis] * over.shards.number)
    cap = checks.softcap(name, logit_softcap)
    logits = jax.ShapeDtypeStruct((*shape, kernel.shape[vocab_axis]), hidden.dtype)
    dtype = checks.common_dtype(hidden, kernel, bias)
    temperature = checks.temperature(name, temperature, logits, logits.ndim - 1, dtype)
    sweep = Sweep(
        function=name,
        objective=ListedClasses(axis=hidden.ndim - 1, shards=over.shards, logit_softcap=cap, k=k),
        vocab_axis=vocab_axis,
        block_size=None if block_size is None else checks.positive(name, "block_size", block_size),
        precision=checks.matmul_precision(name, precision),
    )
    positions = tuple(range(hidden.ndim - 1))
    dimensions = (
        (*positions, None),
        (None, CLASSES) if vocab_axis else (CLASSES, None),
        (CLASSES,),
        positions,
        positions,
        (*positions, None),
    )
    arrays = hidden, kernel, bias, temperature, where, indices
    return placed(name, over.placement, _class_log_probs, (sweep,), arrays, dimensions)


def _class_log_probs(
    sweep: Sweep,
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    temperature: Array | None,
    where: Array | None,
    indices: Array | None,
) -> ClassLogProbs:
    objective, last, mask, row_mask = sweep.objective, hidden.ndim - 1, None, None
    if where is not None:
        mask = sharded_as_positions(jnp.broadcast_to(where, hidden.shape[:-1]), hidden, last)
        row_mask = mask[..., None]
    if temperature is not None and temperature.ndim:
        temperature = temperature.astype(compute_dtype(temperature.dtype))
        of_positions = sharded_as_positions(jnp.broadcast_to(temperature, hidden.shape[:-1]), hidden, last)
        temperature = only(mask, of_positions, 1)
    # Otherwise checkify would fail on a report, at the `shard_map` of the sweep.
    reports = covers_its_mesh(hidden, kernel, bias)
    classes = kernel.shape[sweep.vocab_axis]
    if indices is not None:
        given: Array = only(row_mask, sharded_as_positions(indices, hidden, last))
        of_range = NoSuchClass(function=sweep.function, classes=classes * objective.shards.number)
        indices = report(of_range, given, given) if reports else given
    of_classes = {"hidden": hidden, "kernel": kernel, "bias": bias}
    of_positions = {"mask": mask, "indices": indices, "temperature": temperature}
    _, of_classes, of_positions = cast_alike(objective.shards, None, of_classes, of_positions)
    inputs = Inputs(**of_classes, **of_positions, class_offset=class_offset(objective.shards, classes))
    costs, found = linear_costs(sweep, inputs)
    log_rest = costs["log_rest"]
    if reports:
        log_rest = report_values(sweep.function, row_mask, log_rest, hidden=hidden)
        log_rest = report_values(sweep.function, None, log_rest, masked=("bias",), kernel=kernel, bias=bias)
    return ClassLogProbs(
        indices=known(indices) if found is None else found, log_probs=costs["log_probs"], log_rest=log_rest
    )
