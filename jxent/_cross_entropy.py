"""`cross_entropy`: its arguments."""

from jaxtyping import Array, Bool, Float, Int

from jxent._core.rule import costs
from jxent._loss import checks
from jxent._loss.axis_names import AxisName, mesh_axes
from jxent._loss.loss import Stats, loss_of
from jxent._loss.options import Weights, options_of


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
    logits, labels, axis = checks.logits_and_labels(name, "logits", logits, labels, axis)
    arrays = checks.weights(name, class_weight, sample_weight, where, logits, axis)
    over = mesh_axes(name, axis_name, batch_axis_name, reduction, ("logits", logits))
    scalars = checks.scalars(name, label_smoothing, z_loss_weight)
    options, traced = options_of(
        (name, "logits"), axis, labels, over, scalars, ignore_index, reduction, logit_softcap, return_stats
    )
    return loss_of(options, costs, logits, labels, Weights(*arrays, traced))
