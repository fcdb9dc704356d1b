"""`kl_divergence` and `js_divergence`: their arguments."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from jxent._core.divergences import JensenShannon, KullbackLeibler
from jxent._core.rule import costs
from jxent._loss import checks
from jxent._loss.annotations import ArrayLike, AxisName, Reduction
from jxent._loss.axis_names import loss_axes
from jxent._loss.loss import placed_loss_of
from jxent._loss.names import known_names
from jxent._loss.options import divergence_options, divergence_weights


@known_names
def kl_divergence(
    logits_p: Float[ArrayLike, "*shape"],
    logits_q: Float[ArrayLike, "*shape"],
    *,
    axis: int = -1,
    temperature: Float[ArrayLike, ""] = 1.0,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Kullback-Leibler divergence KL(P || Q) between the distributions of two rows of logits, in nats.

    :math:`\sum_j p_j (\log p_j - \log q_j)`, with :math:`p` and :math:`q` the softmax of the logits. Distillation is
    ``kl_divergence(teacher, student)``, and ``kl_divergence(student, teacher)`` is the reverse one of on-policy
    distillation. Value and gradients keep full relative precision where P and Q nearly agree, at any offset, as long as
    the classes that matter lie less than about 80 below the largest (in float64 700); the value is never negative. Both
    arguments are differentiable: stop the gradient of one that is not to learn, or do not differentiate with respect to
    it.

    Args:
      logits_p: unnormalized log-probabilities of P, float16, bfloat16, float32 or float64.
      logits_q: those of Q, of the same shape. A class that both sides mask with -inf counts for nothing. One that Q
        alone masks makes the divergence infinite; its gradient is then finite, as for the smallest q there is.
      axis: the class axis.
      temperature: divides both logits first; no factor of its square is added. A Python number is static.
        It must be positive and finite in float32, and so must its inverse. A floating-point scalar array is traced, and
        its value is not checked.
      sample_weight: multiplies each position's divergence and its share of the mean's denominator; broadcasts to the
        shape of the positions, which is that of the logits without their class axis.
      where: boolean, broadcasts to the shape of the positions; False leaves a position out, whatever it holds.
      reduction: ``"mean"`` divides the sum over the positions by their number, or by the sum of `sample_weight`; that
        is PyTorch's ``"batchmean"`` for logits of two axes. ``"sum"`` does not, ``"none"`` gives each position's.
      axis_name, batch_axis_name: mesh axes over which classes and positions are sharded, as in `cross_entropy`.

    Returns:
      The divergence in float32, or in float64 if an input is: a scalar, or for ``reduction="none"`` the positions'
      shape.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Example:
      >>> import jax.numpy as jnp, jxent
      >>> teacher = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 3.0]])
      >>> student = jnp.array([[1.0, 0.5, 0.0], [0.0, 0.0, 4.0]])
      >>> print(f"{jxent.kl_divergence(teacher, student, temperature=2.0):.4f}")
      0.0521

    References:
      Distillation: Hinton et al., https://arxiv.org/abs/1503.02531. On-policy distillation: Agarwal et al.,
      https://arxiv.org/abs/2306.13649.
      https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.kl_div.html
    """
    weights, over = (temperature, sample_weight, where), (axis_name, batch_axis_name)
    divergence = KullbackLeibler()
    return _divergence("kl_divergence", divergence, logits_p, logits_q, axis, weights, reduction, over)


@known_names
def js_divergence(
    logits_p: Float[ArrayLike, "*shape"],
    logits_q: Float[ArrayLike, "*shape"],
    *,
    beta: float = 0.5,
    axis: int = -1,
    temperature: Float[ArrayLike, ""] = 1.0,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Jensen-Shannon divergence between the distributions of two rows of logits, in nats.

    :math:`\beta\, KL(P \| M) + (1 - \beta)\, KL(Q \| M)` with :math:`M = \beta P + (1 - \beta) Q`; it is finite
    whatever classes either side masks. For small :math:`\beta` it is near :math:`\beta\, KL(P \| Q)`, for
    :math:`\beta` near 1 near :math:`(1 - \beta)\, KL(Q \| P)`. Exactness is that of `kl_divergence`.

    Args:
      logits_p: unnormalized log-probabilities of P, float16, bfloat16, float32 or float64.
      logits_q: those of Q, of the same shape.
      beta: the share of P in M, a Python number between 0 and 1.
      axis: the class axis.
      temperature: divides both logits first.
      sample_weight: multiplies each position's divergence and its share of the mean's denominator.
      where: boolean; False leaves a position out, whatever it holds.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `kl_divergence`.
      axis_name, batch_axis_name: mesh axes over which classes and positions are sharded, as in `cross_entropy`.

    Returns:
      The divergence in float32, or in float64 if an input is: a scalar, or for ``reduction="none"`` the positions'
      shape.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Example:
      >>> import jax.numpy as jnp, jxent
      >>> teacher = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 3.0]])
      >>> student = jnp.array([[1.0, 0.5, 0.0], [0.0, 0.0, 4.0]])
      >>> print(f"{jxent.js_divergence(teacher, student):.4f} {jnp.log(2.0):.4f}")  # never above log 2
      0.0299 0.6931

    References:
      Lin, Divergence measures based on the Shannon entropy, https://doi.org/10.1109/18.61115. In distillation: Agarwal
      et al., https://arxiv.org/abs/2306.13649.
    """
    weights, over = (temperature, sample_weight, where), (axis_name, batch_axis_name)
    divergence = JensenShannon(checks.inner_share("js_divergence", "beta", beta))
    return _divergence("js_divergence", divergence, logits_p, logits_q, axis, weights, reduction, over)


def _divergence(name, divergence, logits_p, logits_q, axis, weights, reduction, over):
    logits_p, logits_q = (checks.floating(name, *side) for side in (("logits_p", logits_p), ("logits_q", logits_q)))
    axis = checks.class_axis(name, "logits_q", logits_q, axis)
    checks.same_shape(name, "logits_p", logits_p, "logits_q", logits_q)
    weights = divergence_weights(name, *weights, logits_q, axis, logits_p)
    over = loss_axes(name, "logits_q", logits_q, axis, *over, reduction)
    options = divergence_options((name, "logits_q"), axis, over, divergence, reduction)
    return placed_loss_of(over.placement, options, costs, logits_q, logits_p, weights)
