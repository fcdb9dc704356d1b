"""`linear_cross_entropy`: arguments, the jit-compiled loss, and how many positions it takes at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jxent import _checks
from jxent._axis_names import AxisName, mesh_axes
from jxent._cross_entropy import Stats, coefficients_of, options_of, stats_of
from jxent._debug import report_labels, report_values
from jxent._labels import by_index
from jxent._linear_costs import linear_costs, linear_total
from jxent._reduce import Coefficients, counted, denominator, only, reduce, share_of, weigh, weight_of
from jxent._rows import compute_dtype
from jxent._shards import alike, along_positions, first_class, total
from jxent._sweep import Inputs, Sweep


def linear_cross_entropy(
    hidden: Float[Array, "*positions features"],
    kernel: Float[Array, "features vocab"] | Float[Array, "vocab features"],
    labels: Int[Array, "*positions"] | Float[Array, "*positions vocab"],
    *,
    bias: Float[Array, " vocab"] | None = None,
    vocab_axis: int = -1,
    class_weight: Float[Array, " vocab"] | None = None,
    sample_weight: Float[Array, "*#positions"] | None = None,
    where: Bool[Array, "*#positions"] | None = None,
    ignore_index: int = -100,
    label_smoothing: float | Float[Array, ""] = 0.0,
    z_loss_weight: float | Float[Array, ""] = 0.0,
    logit_softcap: float | None = None,
    reduction: str = "mean",
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
        vocabulary as a last axis. See `cross_entropy`.
      bias: added to the logits in at least float32. A class with a bias of -inf is masked.
      vocab_axis: the axis of `kernel` that is the vocabulary, -1 or 0.
      class_weight: one weight per class, shape (vocab,).
      sample_weight: multiplies each position's loss and its share of the mean's denominator; broadcasts to the leading
        shape of `hidden`.
      where: boolean, broadcasts to the leading shape of `hidden`; False leaves a position out, whatever its hidden
        state holds.
      ignore_index: a position with this index label is left out.
      label_smoothing: in [0, 1]; the share of each label that is spread evenly over the classes.
      z_loss_weight: adds ``z_loss_weight * logsumexp(logits)**2`` to the loss of each position that counts.
      logit_softcap: a Python number c > 0; the logits become ``c * tanh(logits / c)`` first.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as for `cross_entropy`. With ``"none"`` the gradients are computed
        in the backward pass.
      axis_name: inside `jax.shard_map` (or `jax.vmap` with an axis name), the mesh axis or axes over which the
        vocabulary is sharded, as in `cross_entropy`: `kernel`, `bias`, `class_weight` and probability labels are then
        this shard's, `hidden` and index labels are the same on every shard.
      batch_axis_name: likewise for the positions, as in `cross_entropy`. Arrays that are sharded under plain `jax.jit`
        need neither of the two.
      return_stats: also return `Stats`.
      block_size: how many positions are in flight at once, at most; under `jax.vmap`, of each example; where `jax.jit`
        shards the positions, on all devices together. The temporaries are ``block_size * vocab`` logits and as many
        gradients of logits; the answer does not depend on it. The default is a quarter of the positions, or as many
        as have 64 MiB of float32 logits if that is less, but at least 256; on a GPU or TPU 1 GiB and 1024, or half as
        much where the kernel has no gradient. Where arrays are sharded it counts the positions and classes of a device;
        for `Auto` axes on a TPU those of all devices.
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
    hidden = _checks.floating(name, "hidden", hidden, "convert it with .astype(jnp.float32), or swap it with labels")
    kernel = _checks.floating(name, "kernel", kernel)
    vocab_axis = _checks.kernel_axis(name, hidden, kernel, vocab_axis)
    classes = kernel.shape[vocab_axis]
    _checks.concrete(name, hidden, classes)
    logits = jax.ShapeDtypeStruct((*hidden.shape[:-1], classes), hidden.dtype)
    axis = logits.ndim - 1
    labels = _checks.class_labels(name, None, logits, labels, axis)
    bias = _checks.per_class(name, "bias", bias, classes)
    class_weight, sample_weight, where = _checks.weights(name, class_weight, sample_weight, where, logits, axis)
    over = mesh_axes(name, axis_name, batch_axis_name, reduction, ("hidden", hidden), classes=("kernel", kernel))
    options, traced = options_of(
        name, labels, ignore_index, label_smoothing, z_loss_weight, logit_softcap, reduction, return_stats, over
    )
    form = options.form(axis)
    sweep = Sweep(
        form=form,
        vocab_axis=vocab_axis,
        block_size=None if block_size is None else _checks.positive(name, "block_size", block_size),
        precision=_checks.matmul_precision(name, precision),
    )
    recompute = _checks.flag(name, "recompute", recompute)
    in_sums = class_weight if form.uniform or not by_index(labels) else None
    inputs = Inputs(hidden, kernel, bias, labels, in_sums, None)
    return _linear_cross_entropy(options, sweep, recompute, inputs, class_weight, sample_weight, where, traced)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _linear_cross_entropy(options, sweep, recompute, inputs, class_weight, sample_weight, where, traced):
    hidden, labels, shape = inputs.hidden, inputs.labels, inputs.hidden.shape[:-1]
    classes = inputs.kernel.shape[sweep.vocab_axis]
    placed = partial(along_positions, other=hidden, axis=hidden.ndim - 1)
    labels = placed(labels) if by_index(labels) else labels
    keep = counted(labels, where, options.ignore_index, shape, placed)
    if by_index(labels):
        labels = only(keep, labels)  # 0 where ignored: in range
        report_labels("linear_cross_entropy", labels, classes * options.shards.number)
    row_keep = None if keep is None else keep[..., None]
    report_values("linear_cross_entropy", row_keep, hidden=hidden, labels=labels)
    report_values("linear_cross_entropy", None, masked=("bias",), kernel=inputs.kernel, bias=inputs.bias)
    first = first_class(options.shards, classes)
    inputs = inputs._replace(labels=labels, keep=keep, first=first)

    label_weight = weight_of(labels, class_weight, keep, options.shards, first)
    share = share_of(sample_weight, keep, shape, placed)
    coefficients = coefficients_of(options, traced, label_weight, share)
    dtype = compute_dtype(inputs.hidden.dtype, inputs.kernel.dtype)
    weight = denominator(label_weight, share, keep, shape, dtype, options.batch_axis_name)
    if options.reduction == "none" or recompute:
        inputs, _ = _alike(options, inputs, ())
        rows = linear_costs(sweep, inputs)
        loss = reduce(weigh(coefficients, rows), weight, options.reduction, options.batch_axis_name)
    else:
        # Divided by the denominator before the sweep: what is kept for the backward pass is then the gradient itself.
        divisor = jnp.where(weight == 0, 1, weight) if options.reduction == "mean" else 1
        every = [
            _everywhere(c, keep, shape, dtype) / divisor if wanted else None
            for c, wanted in zip(coefficients, (True, sweep.form.uniform, sweep.form.z), strict=True)
        ]
        inputs, every = _alike(options, inputs, every)
        swept: Any = linear_total(sweep, inputs, Coefficients(*every))
        loss, rows = swept
        loss = total(loss, options.batch_axis_name)
        loss = jnp.where(weight == 0, jnp.nan, loss) if options.reduction == "mean" else loss
    return (loss, stats_of(rows, keep, weight)) if options.return_stats else loss


def _everywhere(coefficient, keep, shape, dtype):
    """A coefficient, None standing for 1, at each position that counts and 0 elsewhere, in at least `dtype`."""
    if isinstance(coefficient, jax.Array):
        dtype = jnp.promote_types(coefficient.dtype, dtype)
    return only(keep, jnp.broadcast_to(jnp.asarray(1 if coefficient is None else coefficient, dtype), shape))


def _alike(options, inputs, coefficients):
    """Both, as `alike` casts them."""
    hidden, kernel, bias, labels, class_weight, keep, first = inputs
    labels, (hidden, kernel, bias, class_weight, first), (keep, *coefficients) = alike(
        options.shards, labels, (hidden, kernel, bias, class_weight, first), (keep, *coefficients)
    )
    return Inputs(hidden, kernel, bias, labels, class_weight, keep, first), coefficients
