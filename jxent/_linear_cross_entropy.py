"""`linear_cross_entropy` and the checks of its arguments."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import jax
from jaxtyping import Array, Bool, Float, Int

from jxent._call import checks, label_checks
from jxent._call.annotations import ArrayLike, AxisName, LinearLossOptions, Reduction
from jxent._call.axis_names import Sharded, mesh_axes
from jxent._call.loss import Stats, weight_dimensions, with_stats
from jxent._call.names import known_names
from jxent._call.options import Options, Weights, cross_entropy_options, traced_of
from jxent._call.placement import CLASSES, placed
from jxent._call.positions import coefficients_of, denominator, positions_of
from jxent._core.dtypes import compute_dtype
from jxent._core.reports import report_values
from jxent._labels.labels import Labels
from jxent._labels.sparse import SparseLabels
from jxent._linear_loss import loss_by_sweep
from jxent._mesh.sharded import covers_its_mesh
from jxent._sweep.block import Inputs, Sweep


@overload
def linear_cross_entropy(
    hidden: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features vocab"] | Float[ArrayLike, "vocab features"],
    labels: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*positions vocab"] | SparseLabels,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LinearLossOptions],
) -> Float[Array, "..."]: ...
@overload
def linear_cross_entropy(
    hidden: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features vocab"] | Float[ArrayLike, "vocab features"],
    labels: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*positions vocab"] | SparseLabels,
    *,
    return_stats: Literal[True],
    **options: Unpack[LinearLossOptions],
) -> tuple[Float[Array, "..."], Stats]: ...
@overload
def linear_cross_entropy(
    hidden: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features vocab"] | Float[ArrayLike, "vocab features"],
    labels: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*positions vocab"] | SparseLabels,
    *,
    return_stats: bool,
    **options: Unpack[LinearLossOptions],
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Stats]: ...
@known_names
def linear_cross_entropy(
    hidden: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features vocab"] | Float[ArrayLike, "vocab features"],
    labels: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*positions vocab"] | SparseLabels,
    *,
    bias: Float[ArrayLike, " vocab"] | None = None,
    vocab_axis: int = -1,
    class_weight: Float[ArrayLike, " classes"] | None = None,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    ignore_index: int | None = -100,
    label_smoothing: Float[ArrayLike, ""] = 0.0,
    z_loss_weight: Float[ArrayLike, ""] = 0.0,
    logit_softcap: float | None = None,
    temperature: Float[ArrayLike, "*#positions"] = 1.0,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
    return_stats: bool = False,
    block_size: int | None = None,
    recompute: bool = False,
    precision: Any = None,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Stats]:
    """``cross_entropy(hidden @ kernel + bias, labels)`` in the memory of a few rows of logits, in nats.

    Use it for a language model, or for any classifier whose logits do not fit in memory. A sweep (a loop) goes over
    blocks of `block_size` positions. It computes the logits of a block, turns them into the loss and its gradients, and
    discards them. Value, options and exactness are those of `cross_entropy`.

    With a mean or sum, the forward pass computes the gradients too, with three matmuls in all. The backward pass scales
    them. Gradients are computed only for arguments that you differentiate. A frozen `kernel` needs no gradient buffer.

    Args:
      hidden: hidden states of any leading shape, float16, bfloat16, float32 or float64.
      kernel: the output layer's weights, (features, vocab) as in ``flax.nnx.Linear.kernel``, or (vocab, features) with
        ``vocab_axis=0`` as in ``flax.nnx.Embed.embedding`` and ``torch.nn.Linear.weight``. The matmuls take both
        operands in the common dtype of `hidden` and `kernel` and accumulate in float32 (float64 for float64). For
        bfloat16 matmuls, both must be bfloat16.
      labels: class indices, integers of the leading shape of `hidden`; or class probabilities, floating point with the
        vocabulary as a last axis; or `SparseLabels`. See `cross_entropy`.
      bias: added to the logits in at least float32. A class with a bias of -inf is masked.
      vocab_axis: the axis of `kernel` that is the vocabulary, -1 or 0.
      class_weight: one weight per class, shape (vocab,).
      sample_weight: multiplies each position's loss and its term of the mean's denominator; broadcasts to the leading
        shape of `hidden`.
      where: boolean, broadcasts to the leading shape of `hidden`; False masks a position, even if its hidden state
        contains NaN. Blocks skip the positions that `where` or `ignore_index` masks, so the time follows the number of
        unmasked positions; docs/benchmarks/skipping.md lists the exceptions.
      ignore_index: a position with this index label is masked; None masks none.
      label_smoothing: in [0, 1]; the part of each label that is spread evenly over the classes.
      z_loss_weight: adds ``z_loss_weight * logsumexp(logits)**2`` to the loss of each unmasked position.
      logit_softcap: a Python number c > 0; the logits become ``c * tanh(logits / c)`` first.
      temperature: divides the float32 logits, after the soft cap. Pass a number, a scalar array, or an array that
        broadcasts to the leading shape of `hidden`, as in `cross_entropy`. Do not divide bfloat16 hidden states
        instead. That rounds them, and log-probabilities are then wrong by up to 0.1 nats.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as for `cross_entropy`. With ``"none"`` the gradients are computed
        in the backward pass, which skips positions whose cotangents are all 0. If you differentiate statistics of
        `return_stats`, pass ``recompute=True``, or pass ``"none"`` and reduce the losses yourself. Both take four
        matmuls and one gradient of the kernel. Otherwise a mean takes six and two, because it computes its gradients
        before it knows those of the statistics.
      axis_name: the mesh axis or axes over which the vocabulary is sharded, as in `cross_entropy`. Inside
        `jax.shard_map`, pass this shard's `kernel`, `bias`, `class_weight` and probability labels; pass the same
        `hidden` and index labels on every shard.
      batch_axis_name: the same for the positions, as in `cross_entropy`. If the two name axes of the mesh in use, a
        kernel sharded in any other way is gathered once, before the sweep. Its gradient is summed once, after it.
        In `jax.pmap`, `jax.vmap` and `jax.shard_map` with ``check_vma=False``, average gradients that you take inside
        with `jax.lax.pmean`. Their psum is the number of shards times too large.
      return_stats: also return `Stats`.
      block_size: the largest number of positions in a block. Under `jax.vmap`, it counts the positions of each example;
        if `jax.jit` shards the positions, those of all devices together. A block needs temporary arrays of
        ``block_size * vocab`` logits and as many gradients of logits. The result does not depend on `block_size`. The
        default is a quarter of the positions, or as many as have 64 MiB of float32 logits if that is less, but at least
        256. On a GPU it is 2 GiB, but from 1024 to 2048 positions, and on a TPU 1024 positions. If the kernel has no
        gradient, it is 512 MiB there, but at least 512; for a loss without gradients on a TPU, which never writes the
        logits, 2048 positions. For sharded arrays the default counts the positions and classes of one device; for
        `Auto` axes on a TPU that you do not name, those of all devices. A larger block makes larger matmuls and fewer
        updates of the kernel's gradient; a smaller one takes less memory.
      recompute: compute the gradients in the backward pass, with a fourth matmul, so that no gradient is kept between
        the two passes. ``reduction="none"`` always does this.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`. Without ``"highest"``, a TPU multiplies
        float32 in bfloat16, and a GPU in TensorFloat-32.

    Returns:
      The loss is in float32, or in float64 if an input is. It is a scalar, or has the leading shape of `hidden` with
      ``reduction="none"``. With `return_stats`, you get the pair (loss, `Stats`).

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax, jax.numpy as jnp, jxent
      >>> hidden = jax.random.normal(jax.random.key(0), (2, 8, 16))  # (batch, length, features)
      >>> embedding = 0.1 * jax.random.normal(jax.random.key(1), (1000, 16))  # (vocab, features)
      >>> labels = jxent.next_token_labels(jnp.arange(16).reshape(2, 8))
      >>> loss = jxent.linear_cross_entropy(hidden, embedding, labels, vocab_axis=0)
      >>> print(f"{loss:.4f} {jxent.cross_entropy(hidden @ embedding.T, labels):.4f}")
      7.1297 7.1297

    References:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, https://arxiv.org/abs/2411.09009. Hsu et al.,
      Liger Kernel, https://arxiv.org/abs/2410.10989.
      https://docs.pytorch.org/docs/2.13/generated/torch.nn.functional.linear_cross_entropy.html
    """
    name = "linear_cross_entropy"
    hidden = checks.floating(name, "hidden", hidden, "convert it with .astype(jnp.float32), or swap it with labels")
    kernel = checks.floating(name, "kernel", kernel)
    vocab_axis = checks.kernel_axis(name, hidden, kernel, vocab_axis)
    classes = kernel.shape[vocab_axis]
    logits = jax.ShapeDtypeStruct((*hidden.shape[:-1], classes), hidden.dtype)
    of_kind = label_checks.class_labels(name, None, logits, labels, logits.ndim - 1)
    bias = checks.per_class(name, "bias", bias, classes, hidden.dtype)
    class_weight, sample_weight, where = checks.weights(
        name, class_weight, sample_weight, where, logits, logits.ndim - 1
    )
    of_kernel = Sharded(name="kernel", array=kernel, axes=(vocab_axis,))
    of_hidden = Sharded(name="hidden", array=hidden, axes=range(hidden.ndim - 1))
    over = mesh_axes(name, axis_name, of_kernel, batch_axis_name, of_hidden, reduction)
    checks.one_device_if_symbolic(name, hidden, kernel)
    scalars = checks.scalars(name, label_smoothing, z_loss_weight)
    options = cross_entropy_options(
        name,
        "hidden",
        axis=logits.ndim - 1,
        labels=of_kind,
        over=over,
        scalars=scalars,
        logit_softcap=logit_softcap,
        ignore_index=ignore_index,
        reduction=reduction,
        return_stats=return_stats,
    )
    sweep = Sweep(
        function=name,
        objective=options.objective,
        vocab_axis=vocab_axis,
        block_size=None if block_size is None else checks.positive(name, "block_size", block_size),
        precision=checks.matmul_precision(name, precision),
    )
    recompute = checks.flag(name, "recompute", recompute)
    dtype = checks.common_dtype(hidden, kernel, bias, of_kind.array, class_weight)
    weights = Weights(
        class_weight=class_weight,
        sample_weight=sample_weight,
        where=where,
        scalars=traced_of(scalars),
        temperature=checks.temperature(name, temperature, logits, logits.ndim - 1, dtype),
    )
    positions = tuple(range(hidden.ndim - 1))
    dimensions = (
        (*positions, None),
        (None, CLASSES) if vocab_axis else (CLASSES, None),
        (CLASSES,),
        of_kind.dimensions(positions, (*positions, CLASSES), None),
        weight_dimensions(weights, positions),
    )
    arrays = hidden, kernel, bias, of_kind, weights
    return placed(name, over.placement, _linear_cross_entropy, (options, sweep, recompute), arrays, dimensions)


def _linear_cross_entropy(
    options: Options,
    sweep: Sweep,
    recompute: bool,
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    labels: Labels,
    weights: Weights,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Stats]:
    classes, objective = kernel.shape[sweep.vocab_axis], options.objective
    positions = positions_of(options, weights, labels, hidden, hidden.ndim - 1, classes)
    assert positions.labels is not None
    labels, mask = positions.labels, positions.mask
    # Otherwise checkify would fail on a report, at the `shard_map` of the sweep below.
    if covers_its_mesh(hidden, kernel, bias, labels, weights.class_weight):
        function, row_mask = options.function, None if mask is None else mask[..., None]
        labels = labels.reported(function, mask, objective.classes(classes, positions.class_offset))
        array = report_values(function, row_mask, labels.array, hidden=hidden)
        array = report_values(function, None, array, masked=("bias",), kernel=kernel, bias=bias)
        labels = labels.with_array(array)
    takes_class_weight = any(objective.takes_class_weight(name, labels) for name in objective.names)
    inputs = Inputs(
        hidden=hidden,
        kernel=kernel,
        bias=bias,
        labels=labels,
        class_weight=weights.class_weight if takes_class_weight else None,
        mask=mask,
        class_offset=positions.class_offset,
        temperature=positions.temperature,
    )
    coefficients = coefficients_of(options, weights, positions)
    weight = denominator(options, positions, hidden.shape[:-1], compute_dtype(hidden.dtype, kernel.dtype))
    loss, costs, prediction = loss_by_sweep(options, sweep, recompute, inputs, coefficients, weight)
    return with_stats(options, positions, loss, costs, prediction, weight, classes)
