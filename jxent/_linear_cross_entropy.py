"""`linear_cross_entropy`: its arguments."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import jax
from jaxtyping import Array, Bool, Float, Int

from jxent._core.costs import weighs_classes
from jxent._core.labels import SparseLabels
from jxent._core.passes import compute_dtype
from jxent._linear_loss import loss_by_sweep
from jxent._loss import checks, label_checks
from jxent._loss.annotations import ArrayLike, AxisName, LinearLossOptions, Reduction
from jxent._loss.axis_names import Sharded, mesh_axes
from jxent._loss.loss import Stats, label_dimensions, weight_dimensions, with_stats
from jxent._loss.names import known_names
from jxent._loss.options import Weights, options_of
from jxent._loss.placement import CLASSES, placed
from jxent._loss.positions import coefficients_of, denominator, positions_of
from jxent._loss.reports import report_labels, report_values
from jxent._mesh.sharded import covers_its_mesh
from jxent._sweep.sweep import Inputs, Sweep


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
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
    return_stats: bool = False,
    block_size: int | None = None,
    recompute: bool = False,
    precision: Any = None,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Stats]:
    r"""``cross_entropy(hidden @ kernel + bias, labels)`` in the memory of a few rows of logits, in nats.

    The loss of a language model, or of any classifier of many classes, whose logits would not fit: they are computed,
    turned into the loss and its gradients, and forgotten, `block_size` positions at a time. Value, options and
    exactness are those of `cross_entropy`.

    The mean and the sum take their gradients in the forward pass, with three matmuls in all, and keep them for the
    backward pass, which scales them. Only what is differentiated is computed and kept: for a frozen `kernel` nothing of
    its size is.

    Args:
      hidden: hidden states of any leading shape, float16, bfloat16, float32 or float64.
      kernel: the output layer's weights, (features, vocab) as in ``flax.nnx.Linear.kernel``, or (vocab, features) with
        ``vocab_axis=0`` as in ``flax.nnx.Embed.embedding`` and ``torch.nn.Linear.weight``. The matmuls take both
        operands in the common dtype of `hidden` and `kernel` and accumulate in float32 (float64 for float64): for
        bfloat16 matmuls both must be bfloat16.
      labels: class indices, integers of the leading shape of `hidden`; or class probabilities, floating point with the
        vocabulary as a last axis; or `SparseLabels`. See `cross_entropy`.
      bias: added to the logits in at least float32. A class with a bias of -inf is masked.
      vocab_axis: the axis of `kernel` that is the vocabulary, -1 or 0.
      class_weight: one weight per class, shape (vocab,).
      sample_weight: multiplies each position's loss and its share of the mean's denominator; broadcasts to the leading
        shape of `hidden`.
      where: boolean, broadcasts to the leading shape of `hidden`; False leaves a position out, whatever its hidden
        state holds. The blocks are of the positions that count, after this and `ignore_index`, and the time follows
        their number; docs/performance.md says where not.
      ignore_index: a position with this index label is left out; None leaves none out.
      label_smoothing: in [0, 1]; the share of each label that is spread evenly over the classes.
      z_loss_weight: adds ``z_loss_weight * logsumexp(logits)**2`` to the loss of each position that counts.
      logit_softcap: a Python number c > 0; the logits become ``c * tanh(logits / c)`` first.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as for `cross_entropy`. With ``"none"`` the gradients are computed
        in the backward pass. If statistics of `return_stats` are part of what you differentiate, take ``"none"`` and
        reduce the losses yourself, or `recompute`: four matmuls, and one gradient of the kernel. Otherwise a mean
        takes six matmuls and two such gradients, since it computes its own before those of the statistics are known.
      axis_name: the mesh axis or axes over which the vocabulary is sharded, as in `cross_entropy`. Inside
        `jax.shard_map` `kernel`, `bias`, `class_weight` and probability labels are this shard's, `hidden` and index
        labels are the same on every shard.
      batch_axis_name: likewise for the positions, as in `cross_entropy`. Where the two name axes of the mesh in use, a
        kernel that is sharded in any other way is gathered once before the sweep, and its gradient summed once after.
        In `jax.pmap`, `jax.vmap` and `jax.shard_map` with ``check_vma=False``, average gradients that you take inside,
        with `jax.lax.pmean`: their psum is too large by the number of shards.
      return_stats: also return `Stats`.
      block_size: how many positions are in flight at once, at most; under `jax.vmap`, of each example; where `jax.jit`
        shards the positions, on all devices together. The temporaries are ``block_size * vocab`` logits and as many
        gradients of logits; the answer does not depend on it. The default is a quarter of the positions, or as many
        as have 64 MiB of float32 logits if that is less, but at least 256; on a GPU or TPU 1 GiB and 1024, or half as
        much where the kernel has no gradient. Where arrays are sharded it counts the positions and classes of a device;
        for `Auto` axes on a TPU that are not named, those of all devices.
        A larger block makes larger matmuls and fewer updates of the kernel's gradient, a smaller one takes less memory.
      recompute: compute the gradients in the backward pass, for a fourth matmul, so that no gradient is kept between
        the two passes; ``reduction="none"`` always does.
      precision: of the matmuls, as in `jax.lax.dot_general`. A TPU multiplies float32 in bfloat16 unless told
        ``"highest"``, a GPU in TensorFloat-32.

    Returns:
      The loss in float32, or in float64 if an input is: a scalar, or for ``reduction="none"`` the leading shape of
      `hidden`. With `return_stats`, the pair (loss, `Stats`).

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Example:
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
    labels = label_checks.class_labels(name, None, logits, labels, logits.ndim - 1)
    bias = checks.per_class(name, "bias", bias, classes, hidden.dtype)
    arrays = checks.weights(name, class_weight, sample_weight, where, logits, logits.ndim - 1)
    of_kernel, of_hidden = Sharded("kernel", kernel, (vocab_axis,)), Sharded("hidden", hidden, range(hidden.ndim - 1))
    over = mesh_axes(name, axis_name, of_kernel, batch_axis_name, of_hidden, reduction)
    checks.one_device_if_symbolic(name, hidden, kernel)
    scalars = checks.scalars(name, label_smoothing, z_loss_weight)
    options, traced = options_of(
        (name, "hidden"), logits.ndim - 1, labels, over, scalars, ignore_index, reduction, logit_softcap, return_stats
    )
    sweep = Sweep(
        function=name,
        form=options.form,
        vocab_axis=vocab_axis,
        block_size=None if block_size is None else checks.positive(name, "block_size", block_size),
        precision=checks.matmul_precision(name, precision),
    )
    recompute = checks.flag(name, "recompute", recompute)
    weights = Weights(*arrays, traced)
    positions = tuple(range(hidden.ndim - 1))
    dimensions = (
        (*positions, None),
        (None, CLASSES) if vocab_axis else (CLASSES, None),
        (CLASSES,),
        label_dimensions(labels, positions, (*positions, CLASSES)),
        weight_dimensions(weights, positions),
    )
    arrays = hidden, kernel, bias, labels, weights
    return placed(name, over.placement, _linear_cross_entropy, (options, sweep, recompute), arrays, dimensions)


def _linear_cross_entropy(options, sweep, recompute, hidden, kernel, bias, labels, weights):
    classes = kernel.shape[sweep.vocab_axis]
    positions = positions_of(options, weights, labels, hidden, hidden.ndim - 1, classes)
    labels, indices = positions.labels, positions.indices
    # Elsewhere a report would make checkify fail, at the `shard_map` that is to come.
    if covers_its_mesh(hidden, kernel, bias, labels, weights.class_weight):
        row_keep = None if positions.keep is None else positions.keep[..., None]
        all_classes = classes * options.form.shards.number
        labels = report_labels(options, row_keep, labels, all_classes, hidden.ndim - 1, indices)
        labels = report_values(options, row_keep, labels, hidden=hidden)
        labels = report_values(options, None, labels, masked=("bias",), kernel=kernel, bias=bias)
    class_weight = weights.class_weight if weighs_classes(options.form.costs, labels) else None
    inputs = Inputs(hidden, kernel, bias, labels, class_weight, positions.keep, positions.first, indices)
    coefficients = coefficients_of(options, weights, positions)
    weight = denominator(options, positions, hidden.shape[:-1], compute_dtype(hidden.dtype, kernel.dtype))
    loss, costs, prediction = loss_by_sweep(options, sweep, recompute, inputs, coefficients, weight)
    return with_stats(options, positions, loss, costs, prediction, weight)
