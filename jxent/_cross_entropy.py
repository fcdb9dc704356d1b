"""`cross_entropy`: arguments, the jit-compiled loss, and its statistics."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jxent import _checks
from jxent._axis_names import AxisName, mesh_axes
from jxent._costs import Form, costs
from jxent._debug import report_labels, report_values
from jxent._labels import by_index
from jxent._reduce import Coefficients, counted, denominator, only, product_of, reduce, share_of, weigh, weight_of
from jxent._shards import Shards, alike, along_positions, first_class, sharded_like


class Stats(NamedTuple):
    """What `return_stats=True` adds to a loss, taken in the same pass. No gradient flows through it.

    All but `weight` have the shape of the positions. Where a position does not count, `log_prob`, `log_normalizer` and
    `entropy` are 0 and `prediction` is -2**31, which no label is. So for a loss without class and sample weights the
    accuracy is `jnp.sum(stats.prediction == labels) / stats.weight`, and the loss without smoothing and z-loss is
    `-jnp.sum(stats.log_prob) / stats.weight`.
    """

    log_prob: Float[Array, "*positions"]
    """Log-probability of the label in nats; for class probabilities q, the sum of q[j] log p[j]."""
    log_normalizer: Float[Array, "*positions"]
    """log sum exp of the logits."""
    entropy: Float[Array, "*positions"]
    """Entropy of the softmax, in nats."""
    prediction: Int[Array, "*positions"]
    """Class with the largest logit (int32)."""
    weight: Float[Array, ""]
    """Denominator of the mean."""


def cross_entropy(
    logits: Float[Array, "*shape"],
    labels: Int[Array, "*positions"] | Float[Array, "*shape"],
    *,
    axis: int = -1,
    class_weight: Float[Array, " classes"] | None = None,
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
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Stats]:
    r"""Cross-entropy between logits and labels, in nats.

    For class indices :math:`t` the loss of a position is :math:`-w_t \log p_t`, for class probabilities :math:`q` it
    is :math:`-\sum_j w_j q_j \log p_j`, with :math:`p` the softmax of the logits. Loss and gradients keep full relative
    precision at any margin and offset. PyTorch's ``cross_entropy`` means the same, with ``axis=1``.

    Args:
      logits: unnormalized log-probabilities, float16, bfloat16, float32 or float64. A class whose logit is -inf is
        masked: its probability and its gradient are 0, and smoothing passes it by.
      labels: class indices, integers of the shape of `logits` without its class axis; or class probabilities, floating
        point of the shape of `logits`. The dtype decides. An index out of range makes its position's loss and gradient
        NaN, and is reported by name under `jax.experimental.checkify`.
      axis: the class axis.
      class_weight: one weight per class, shape (classes,).
      sample_weight: multiplies each position's loss and its share of the mean's denominator; broadcasts to the shape of
        the positions, which is that of `logits` without its class axis.
      where: boolean, broadcasts to the shape of the positions; False leaves a position out, whatever it holds.
      ignore_index: a position with this index label is left out.
      label_smoothing: in [0, 1]; the share of each label that is spread evenly over the classes. A Python number is
        static; a floating-point scalar array is traced, and its value is not checked.
      z_loss_weight: adds ``z_loss_weight * logsumexp(logits)**2`` to the loss of each position that counts;
        `sample_weight` scales it, `class_weight` does not. Python number or scalar array, as above.
      logit_softcap: a Python number c > 0; the logits become ``c * tanh(logits / c)`` first.
      reduction: ``"mean"`` divides the sum by the weights of the labels that count (class weight times sample weight;
        for class probabilities the sample weight alone), ``"sum"`` does not, ``"none"`` gives each position's loss.
        Where nothing counts the mean is nan and the sum 0, with gradients of 0.
      axis_name: inside `jax.shard_map` (or `jax.vmap` with an axis name), the mesh axis or axes over which the classes
        are sharded. `logits`, probability labels and `class_weight` are then this shard's, class indices count the
        classes of all shards, and loss and statistics are those of all classes, on every shard.
      batch_axis_name: likewise for the positions, when the reduction is a mean or sum: it and its denominator are taken
        over the positions of all shards. Arrays that are sharded under plain `jax.jit` need neither of the two.
      return_stats: also return `Stats`.

    Returns:
      The loss in float32, or in float64 if an input is: a scalar, or for ``reduction="none"`` the positions' shape.
      With `return_stats`, the pair (loss, `Stats`).

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Example:
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
    logits = _checks.floating(name, "logits", logits, "convert it with .astype(jnp.float32), or swap it with labels")
    axis = _checks.class_axis(name, "logits", logits, axis)
    labels = _checks.class_labels(name, "logits", logits, labels, axis)
    class_weight, sample_weight, where = _checks.weights(name, class_weight, sample_weight, where, logits, axis)
    over = mesh_axes(name, axis_name, batch_axis_name, reduction, ("logits", logits))
    options, traced = options_of(
        name, labels, ignore_index, label_smoothing, z_loss_weight, logit_softcap, reduction, return_stats, over
    )
    return _cross_entropy(options, axis, logits, labels, class_weight, sample_weight, where, traced)


class Options(NamedTuple):
    """The options as the caller gave them; None for a scalar that is traced instead of static."""

    ignore_index: int
    label_smoothing: float | None
    z_loss_weight: float | None
    logit_softcap: float | None
    reduction: str
    return_stats: bool
    shards: Shards
    batch_axis_name: tuple

    def form(self, axis):
        uniform, z = self.label_smoothing != 0, self.z_loss_weight != 0
        return Form(axis, self.logit_softcap, uniform, z, self.return_stats, self.shards)


def options_of(
    name, labels, ignore_index, label_smoothing, z_loss_weight, logit_softcap, reduction, return_stats, over
):
    """(`Options`, the scalars that are traced) of a call."""
    ignore_index = _checks.ignored_class(name, ignore_index, labels)
    smoothing = _checks.scalar(name, "label_smoothing", label_smoothing, 0, 1)
    z_weight = _checks.scalar(name, "z_loss_weight", z_loss_weight, 0, float("inf"))
    options = Options(
        ignore_index=ignore_index,
        label_smoothing=smoothing if isinstance(smoothing, float) else None,
        z_loss_weight=z_weight if isinstance(z_weight, float) else None,
        logit_softcap=_checks.softcap(name, logit_softcap),
        reduction=_checks.reduction(name, reduction),
        return_stats=_checks.flag(name, "return_stats", return_stats),
        shards=over[0],
        batch_axis_name=over[1],
    )
    return options, tuple(None if isinstance(value, float) else value for value in (smoothing, z_weight))


def coefficients_of(options, traced, label_weight, share):
    """The `Coefficients` of the costs; the mean's denominator is left to the end."""
    smoothing = options.label_smoothing if traced[0] is None else traced[0]
    z_loss_weight = options.z_loss_weight if traced[1] is None else traced[1]
    form = options.form(None)
    return Coefficients(
        label=product_of(share, label_weight, 1 - smoothing if form.uniform else None),
        uniform=product_of(share, smoothing) if form.uniform else None,
        z=product_of(share, z_loss_weight) if form.z else None,
    )


def stats_of(costs, keep, weight):
    stats = Stats(
        log_prob=costs.log_prob,
        log_normalizer=costs.log_normalizer,
        entropy=costs.entropy,
        prediction=only(keep, costs.prediction, jnp.iinfo(jnp.int32).min),
        weight=weight,
    )
    return jax.lax.stop_gradient(stats)


@partial(jax.jit, static_argnums=(0, 1))
def _cross_entropy(options, axis, logits, labels, class_weight, sample_weight, where, traced):
    shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    form = options.form(axis)

    placed = partial(along_positions, other=logits, axis=axis)
    labels = placed(labels) if by_index(labels) else sharded_like(labels, logits)
    keep = counted(labels, where, options.ignore_index, shape, placed)
    if by_index(labels):
        labels = only(keep, labels)  # 0 where ignored: in range
        report_labels("cross_entropy", labels, logits.shape[axis] * options.shards.number)
    first = first_class(options.shards, logits.shape[axis])
    in_sums = class_weight if form.uniform or not by_index(labels) else None
    in_sums = sharded_like(in_sums, logits, [axis])
    row_keep = None if keep is None else jnp.expand_dims(keep, axis)
    report_values("cross_entropy", row_keep, masked=("logits",), logits=logits, labels=labels)
    each, (x, in_sums), (row_keep,) = alike(options.shards, labels, (logits, in_sums), (row_keep,))
    rows = costs(form, x, each, in_sums, row_keep, first)
    rows = jax.tree.map(lambda row: only(keep, jnp.squeeze(row, axis)), rows)

    label_weight = weight_of(labels, class_weight, keep, options.shards, first)
    share = share_of(sample_weight, keep, shape, placed)
    losses = weigh(coefficients_of(options, traced, label_weight, share), rows)
    weight = denominator(label_weight, share, keep, shape, losses.dtype, options.batch_axis_name)
    loss = reduce(losses, weight, options.reduction, options.batch_axis_name)
    return (loss, stats_of(rows, keep, weight)) if options.return_stats else loss
