"""`cross_entropy` and the checks of its arguments."""

from __future__ import annotations

from typing import Literal, Unpack, overload

from jaxtyping import Array, Bool, Float, Int

from jxent._call import checks, label_checks
from jxent._call.annotations import ArrayLike, AxisName, LogitsLossOptions, Reduction
from jxent._call.axis_names import loss_axes
from jxent._call.loss import Stats, placed_loss_of
from jxent._call.names import known_names
from jxent._call.options import Weights, cross_entropy_options, traced_of
from jxent._labels.sparse import SparseLabels


@overload
def cross_entropy(
    logits: Float[ArrayLike, "*shape"],
    labels: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*shape"] | SparseLabels,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[LogitsLossOptions],
) -> Float[Array, "..."]: ...
@overload
def cross_entropy(
    logits: Float[ArrayLike, "*shape"],
    labels: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*shape"] | SparseLabels,
    *,
    return_stats: Literal[True],
    **options: Unpack[LogitsLossOptions],
) -> tuple[Float[Array, "..."], Stats]: ...
@overload
def cross_entropy(
    logits: Float[ArrayLike, "*shape"],
    labels: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*shape"] | SparseLabels,
    *,
    return_stats: bool,
    **options: Unpack[LogitsLossOptions],
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Stats]: ...
@known_names
def cross_entropy(
    logits: Float[ArrayLike, "*shape"],
    labels: Int[ArrayLike, "*positions"] | Float[ArrayLike, "*shape"] | SparseLabels,
    *,
    axis: int = -1,
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
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Stats]:
    """Cross-entropy between logits and labels, in nats.

    With a class index t as the label, the loss of a position is ``-w[t] * log(p[t])``. With class probabilities q it is
    ``-sum(w * q * log(p))``. Here p is the softmax of the logits, and w is `class_weight`. PyTorch's ``cross_entropy``
    has the same definition, with ``axis=1``. Loss and gradients keep full relative precision at any offset (a constant
    that all logits share). In float32 they keep it up to a margin of about 80 (in float64 about 700). The margin is the
    distance from the label's logit down to the next one.

    Args:
      logits: unnormalized log-probabilities, float16, bfloat16, float32 or float64. A class whose logit is -inf is
        masked: its probability and its gradient are 0, and smoothing skips it.
      labels: class indices, integers of the shape of `logits` without its class axis; or class probabilities, floating
        point of the shape of `logits`; or `SparseLabels`. The dtype decides. If an index is out of range, the loss and
        gradient of its position are NaN, and `jax.experimental.checkify` reports the index.
      axis: the class axis.
      class_weight: one weight per class, shape (classes,).
      sample_weight: multiplies each position's loss and its term of the mean's denominator; broadcasts to the shape of
        the positions, which is that of `logits` without its class axis.
      where: boolean, broadcasts to the shape of the positions; False masks a position. A masked position changes
        neither the loss nor a gradient, even if it contains NaN.
      ignore_index: a position with this index label is masked; None masks none.
      label_smoothing: in [0, 1]; the part of each label that is spread evenly over the classes. A Python number is
        static; a floating-point scalar array is traced, and its value is not checked.
      z_loss_weight: adds ``z_loss_weight * logsumexp(logits)**2`` to the loss of each unmasked position.
        `sample_weight` scales this term, `class_weight` does not. Pass a number or an array, as for `label_smoothing`.
      logit_softcap: a Python number c > 0; the logits become ``c * tanh(logits / c)`` first.
      temperature: divides the logits, in at least float32, after the soft cap. Loss, z-loss and statistics are those of
        the divided logits. Pass a number, a scalar array, or an array that broadcasts to the shape of the positions:
        shape (batch, 1) has one temperature for each sequence. A Python number is static. It must be positive and
        finite in float32, and so must its inverse. The values of arrays are not checked: a temperature of 0 or NaN
        makes its positions NaN, unless they are masked. Do not divide 16-bit logits yourself, because that rounds.
      reduction: ``"mean"`` divides the sum by the weights of the unmasked labels (class weight times sample weight;
        for class probabilities the sample weight alone). ``"sum"`` does not divide, and ``"none"`` gives each
        position's loss. If all positions are masked, the mean is nan and the sum 0, with gradients of 0.
      axis_name: the mesh axis or axes over which the classes are sharded. Inside `jax.shard_map` (or `jax.vmap` with an
        axis name), pass this shard's `logits`, probability labels and `class_weight`. Class indices count the classes
        of all shards, and every shard gets the loss and statistics of all classes. Elsewhere, pass whole arrays: the
        loss shards them over the mesh of `jax.set_mesh`, or else of the arrays.
      batch_axis_name: the same for the positions. Inside `jax.shard_map`, the reduction must be a mean or sum: it and
        its denominator are taken over the positions of all shards. Elsewhere, a name shards the first axis of the
        positions. A `jax.sharding.PartitionSpec` names mesh axes for each of them, as the spec of the labels does.
        Under plain `jax.jit`, you can pass sharded arrays and neither name; the compiler then chooses what it moves.
        Gradients that you take inside `jax.shard_map` are those of the global loss: do not sum them. With
        ``check_vma=False``, in `jax.pmap` and in `jax.vmap`, average them with `jax.lax.pmean`. Their psum is the
        number of shards times too large, and so is each shard's gradient of an array of its own.
      return_stats: also return `Stats`.

    Returns:
      The loss is in float32, or in float64 if an input is. It is a scalar, or has the positions' shape with
      ``reduction="none"``. With `return_stats`, you get the pair (loss, `Stats`).

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax, jax.numpy as jnp, jxent
      >>> logits = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 3.0]])
      >>> labels = jnp.array([0, 2])
      >>> print(f"{jxent.cross_entropy(logits, labels):.4f}")
      0.1755
      >>> loss, stats = jxent.cross_entropy(logits, labels, label_smoothing=0.1, return_stats=True)
      >>> print(f"{loss:.4f}", stats.prediction)
      0.3455 [0 2]

    References:
      Softmax collapse: Prieto et al., Grokking at the Edge of Numerical Stability, https://arxiv.org/abs/2501.04697.
      Label smoothing: Szegedy et al., https://arxiv.org/abs/1512.00567. z-loss: Chowdhery et al., PaLM,
      https://arxiv.org/abs/2204.02311. Soft cap: Gemma 2, https://arxiv.org/abs/2408.00118.
      Reductions: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    """
    name = "cross_entropy"
    logits, of_kind, axis = label_checks.logits_and_labels(name, "logits", logits, labels, axis)
    class_weight, sample_weight, where = checks.weights(name, class_weight, sample_weight, where, logits, axis)
    over = loss_axes(name, "logits", logits, axis, axis_name, batch_axis_name, reduction)
    scalars = checks.scalars(name, label_smoothing, z_loss_weight)
    options = cross_entropy_options(
        name,
        "logits",
        axis=axis,
        labels=of_kind,
        over=over,
        scalars=scalars,
        logit_softcap=logit_softcap,
        ignore_index=ignore_index,
        reduction=reduction,
        return_stats=return_stats,
    )
    dtype = checks.common_dtype(logits, of_kind.array, class_weight)
    weights = Weights(
        class_weight=class_weight,
        sample_weight=sample_weight,
        where=where,
        scalars=traced_of(scalars),
        temperature=checks.temperature(name, temperature, logits, axis, dtype),
    )
    return placed_loss_of(over.placement, options, logits, weights, labels=of_kind)
