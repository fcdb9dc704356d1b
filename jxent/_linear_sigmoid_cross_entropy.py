"""`linear_sigmoid_cross_entropy` and the checks of its arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jxent._call import checks, label_checks
from jxent._call.annotations import ArrayLike, AxisName, Reduction
from jxent._call.axis_names import Sharded, mesh_axes
from jxent._call.loss import weight_dimensions
from jxent._call.names import known_names
from jxent._call.options import Options, Weights, options_of, traced_of
from jxent._call.placement import CLASSES, placed
from jxent._call.positions import coefficients_of, denominator, positions_of
from jxent._core.dtypes import compute_dtype
from jxent._core.reports import report_values
from jxent._core.weights import is_used
from jxent._labels.labels import Labels
from jxent._labels.sparse import SparseLabels
from jxent._linear_loss import loss_by_sweep
from jxent._mesh.sharded import covers_its_mesh
from jxent._objective.sigmoid_of_classes import SigmoidOfClasses
from jxent._sweep.block import Inputs, Sweep


@known_names
def linear_sigmoid_cross_entropy(
    hidden: Float[ArrayLike, "*positions features"],
    kernel: Float[ArrayLike, "features vocab"] | Float[ArrayLike, "vocab features"],
    labels: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*positions vocab"] | SparseLabels,
    *,
    bias: Float[ArrayLike, " vocab"] | None = None,
    vocab_axis: int = -1,
    pos_weight: Float[ArrayLike, ""] | Float[ArrayLike, " vocab"] | None = None,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    ignore_index: int | None = -100,
    label_smoothing: Float[ArrayLike, ""] = 0.0,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
    block_size: int | None = None,
    recompute: bool = False,
    precision: Any = None,
) -> Float[Array, "..."]:
    """Binary cross-entropy of the logits ``hidden @ kernel + bias``, in the memory of a few rows of them, in nats.

    Each class is a yes or no of its own. The loss of a position is the sum of the `sigmoid_cross_entropy` of all its
    classes. Use it for a contrastive loss such as SigLIP, or for a classifier with many classes, of which several may
    be right. Blocks, memory and gradients are as in `linear_cross_entropy`. Loss and derivatives of every order keep
    full relative precision for any logit.

    Args:
      hidden: hidden states of any leading shape, float16, bfloat16, float32 or float64.
      kernel: the output layer's weights, (features, vocab), or (vocab, features) with ``vocab_axis=0``.
      labels: class indices, integers of the leading shape of `hidden`: the class of the label is a yes, and every other
        class is a no. Or `SparseLabels`: a few classes with their probabilities of a yes, and every other class is a
        no. Or the probability of a yes for each class, floating point with the vocabulary as a last axis. If the
        probability of a class lies outside [0, 1] by more than rounding, or an index is out of range, the loss of its
        position is NaN, and `jax.experimental.checkify` reports the label.
      bias: added to the logits in at least float32. A class with a bias of -inf is a certain no, which costs nothing
        unless it is labelled a yes or smoothed.
      vocab_axis: the axis of `kernel` that is the vocabulary, -1 or 0.
      pos_weight: multiplies the loss of a yes; a number, or one number for each class. The product of 0 and infinity is
        0, so an infinite logit costs nothing with a weight of 0.
      sample_weight: multiplies each position's loss and its term of the mean's denominator; broadcasts to the leading
        shape of `hidden`.
      where: boolean, broadcasts to the leading shape of `hidden`; False masks a position, even if its hidden state
        contains NaN. Blocks skip masked positions, as in `linear_cross_entropy`.
      ignore_index: a position with this index label is masked; None masks none.
      label_smoothing: e in [0, 1]; each class's probability y of a yes becomes ``(1 - e) * y + e / 2``. A Python number
        is static; a floating-point scalar array is traced, and its value is not checked.
      reduction: ``"mean"`` divides the sum by the number of unmasked positions, or by the sum of their `sample_weight`.
        It does not divide by the number of classes. ``"sum"`` does not divide, and ``"none"`` gives each position's
        loss, with gradients computed in the backward pass.
      axis_name: the mesh axis or axes over which the vocabulary is sharded, as in `linear_cross_entropy`. Inside
        `jax.shard_map`, pass this shard's `kernel`, `bias`, `pos_weight` and probability labels; pass the same `hidden`
        and index labels on every shard.
      batch_axis_name: the same for the positions.
      block_size: the largest number of positions in a block, as in `linear_cross_entropy`.
      recompute: compute the gradients in the backward pass, with a fourth matmul, so that no gradient is kept between
        the two passes. ``reduction="none"`` always does this.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`.

    Returns:
      The loss is in float32, or in float64 if an input is. It is a scalar, or has the leading shape of `hidden` with
      ``reduction="none"``.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      SigLIP: each image has one text, and each pair of an image and a text is a yes or no of its own.

      >>> import jax, jax.numpy as jnp, jxent
      >>> keys = jax.random.split(jax.random.key(0))
      >>> image, text = (jax.random.normal(key, (8, 16)) for key in keys)
      >>> image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
      >>> scale, bias = jnp.exp(2.3), -10.0
      >>> loss = jxent.linear_sigmoid_cross_entropy(
      ...     scale * image, text, jnp.arange(8), vocab_axis=0, bias=jnp.full(8, bias)
      ... )
      >>> pairs = jxent.sigmoid_cross_entropy(scale * image @ text.T + bias, jnp.eye(8), reduction="sum")
      >>> print(f"{loss:.4f} {pairs / 8:.4f}")
      10.3690 10.3690

    References:
      Zhai et al., Sigmoid Loss for Language Image Pre-Training, https://arxiv.org/abs/2303.15343.
      https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html
    """
    name = "linear_sigmoid_cross_entropy"
    hidden = checks.floating(name, "hidden", hidden, "convert it with .astype(jnp.float32), or swap it with labels")
    kernel = checks.floating(name, "kernel", kernel)
    vocab_axis = checks.kernel_axis(name, hidden, kernel, vocab_axis)
    classes = kernel.shape[vocab_axis]
    logits = jax.ShapeDtypeStruct((*hidden.shape[:-1], classes), hidden.dtype)
    of_kind = label_checks.class_labels(name, None, logits, labels, logits.ndim - 1)
    bias = checks.per_class(name, "bias", bias, classes, hidden.dtype)
    pos_weight = checks.number_or_per_class(name, "pos_weight", pos_weight, classes, hidden.dtype)
    _, sample_weight, where = checks.weights(name, None, sample_weight, where, logits, logits.ndim - 1)
    of_kernel = Sharded(name="kernel", array=kernel, axes=(vocab_axis,))
    of_hidden = Sharded(name="hidden", array=hidden, axes=range(hidden.ndim - 1))
    over = mesh_axes(name, axis_name, of_kernel, batch_axis_name, of_hidden, reduction)
    checks.one_device_if_symbolic(name, hidden, kernel)
    scalars = checks.scalars(name, label_smoothing, z_loss_weight=0.0)
    smoothed = is_used(scalars.label_smoothing)
    objective = SigmoidOfClasses(axis=logits.ndim - 1, shards=over.shards, smoothed=smoothed)
    options = options_of(
        name,
        "hidden",
        objective=objective,
        over=over,
        scalars=scalars,
        reduction=reduction,
        ignore_index=checks.ignored_class(name, ignore_index, of_kind),
    )
    sweep = Sweep(
        function=name,
        objective=objective,
        vocab_axis=vocab_axis,
        block_size=None if block_size is None else checks.positive(name, "block_size", block_size),
        precision=checks.matmul_precision(name, precision),
    )
    recompute = checks.flag(name, "recompute", recompute)
    weights = Weights(class_weight=None, sample_weight=sample_weight, where=where, scalars=traced_of(scalars))
    positions = tuple(range(hidden.ndim - 1))
    dimensions = (
        (*positions, None),
        (None, CLASSES) if vocab_axis else (CLASSES, None),
        (CLASSES,),
        of_kind.dimensions(positions, (*positions, CLASSES), None),
        (CLASSES,),
        weight_dimensions(weights, positions),
    )
    arrays = hidden, kernel, bias, of_kind, pos_weight, weights
    return placed(name, over.placement, _linear_sigmoid, (options, sweep, recompute), arrays, dimensions)


def _linear_sigmoid(
    options: Options,
    sweep: Sweep,
    recompute: bool,
    hidden: Array,
    kernel: Array,
    bias: Array | None,
    labels: Labels,
    pos_weight: Array | None,
    weights: Weights,
) -> Float[Array, "..."]:
    classes, objective = kernel.shape[sweep.vocab_axis], options.objective
    positions = positions_of(options, weights, labels, hidden, hidden.ndim - 1, classes)
    assert positions.labels is not None
    labels, mask = positions.labels, positions.mask
    # Otherwise checkify would fail on a report, at the `shard_map` of the sweep below.
    if covers_its_mesh(hidden, kernel, bias, labels, pos_weight):
        function, row_mask = options.function, None if mask is None else mask[..., None]
        of_classes = objective.classes(classes, positions.class_offset)
        labels = labels.reported(function, mask, of_classes, distribution=False)
        array = report_values(function, row_mask, labels.array, hidden=hidden)
        array = report_values(function, None, array, masked=("bias",), kernel=kernel, bias=bias)
        labels = labels.with_array(array)
    inputs = Inputs(
        hidden=hidden,
        kernel=kernel,
        bias=bias,
        labels=labels,
        class_weight=None if pos_weight is None else jnp.broadcast_to(pos_weight, (classes,)),
        mask=mask,
        class_offset=positions.class_offset,
    )
    coefficients = coefficients_of(options, weights, positions)
    weight = denominator(options, positions, hidden.shape[:-1], compute_dtype(hidden.dtype, kernel.dtype))
    loss, _, _ = loss_by_sweep(options, sweep, recompute, inputs, coefficients, weight)
    return loss
