"""`kl_divergence`, `js_divergence` and `tv_distance`, and the checks of their arguments."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from jxent._call import checks
from jxent._call.annotations import ArrayLike, AxisName, Reduction
from jxent._call.axis_names import loss_axes
from jxent._call.loss import placed_loss_of
from jxent._call.names import known_names
from jxent._call.options import divergence_weights, options_of
from jxent._objective.divergence import (
    Divergence,
    DivergenceObjective,
    JensenShannon,
    KullbackLeibler,
    TotalVariation,
)
from jxent._rows.costs import Scalars


@known_names
def kl_divergence(
    logits_p: Float[ArrayLike, "*shape"],
    logits_q: Float[ArrayLike, "*shape"],
    *,
    axis: int = -1,
    temperature: Float[ArrayLike, "*#positions"] = 1.0,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Kullback-Leibler divergence KL(P || Q) between the distributions of two rows of logits, in nats.

    It is ``sum(p * (log(p) - log(q)))``, where p and q are the softmax of the two rows. For distillation, call
    ``kl_divergence(teacher, student)``. For the reverse divergence of on-policy distillation, call
    ``kl_divergence(student, teacher)``. Value and gradients keep full relative precision even if P and Q nearly agree,
    and at any offset (a constant that all logits share). This holds as long as the classes that matter lie less than
    about 80 below the largest (700 in float64). The value is never negative. Both arguments are differentiable. If one
    of them should not learn, stop its gradient, or do not differentiate with respect to it.

    Args:
      logits_p: unnormalized log-probabilities of P, float16, bfloat16, float32 or float64.
      logits_q: those of Q, of the same shape. A class that both sides mask with -inf adds nothing. If only Q masks a
        class, the divergence is infinite; its gradient is then finite, as for the smallest q there is.
      axis: the class axis.
      temperature: divides both logits first; the result is not multiplied by its square. A Python number is static.
        It must be positive and finite in float32, and so must its inverse. A scalar array is traced, and so is an array
        that broadcasts to the shape of the positions, with one temperature for each. Their values are not checked: a
        temperature of 0 or NaN makes its positions NaN, unless they are masked.
      sample_weight: multiplies each position's divergence and its term of the mean's denominator; broadcasts to the
        shape of the positions, which is that of the logits without their class axis.
      where: boolean, broadcasts to the shape of the positions; False masks a position, even if it contains NaN.
      reduction: ``"mean"`` divides the sum over the unmasked positions by their number, or by the sum of their
        `sample_weight`. For logits of two axes, PyTorch calls this ``"batchmean"``. ``"sum"`` does not divide, and
        ``"none"`` gives each position's divergence.
      axis_name: the mesh axis or axes over which the classes are sharded, as in `cross_entropy`.
      batch_axis_name: the same for the positions.

    Returns:
      The divergence is in float32, or in float64 if an input is. It is a scalar, or has the positions' shape with
      ``reduction="none"``.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
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
    return _divergence(
        "kl_divergence",
        KullbackLeibler(),
        logits_p,
        logits_q,
        axis=axis,
        temperature=temperature,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
    )


@known_names
def js_divergence(
    logits_p: Float[ArrayLike, "*shape"],
    logits_q: Float[ArrayLike, "*shape"],
    *,
    beta: float = 0.5,
    axis: int = -1,
    temperature: Float[ArrayLike, "*#positions"] = 1.0,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Jensen-Shannon divergence between the distributions of two rows of logits, in nats.

    It is ``beta * KL(P || M) + (1 - beta) * KL(Q || M)``, where the mixture M is ``beta * P + (1 - beta) * Q``. It is
    finite even if P and Q mask different classes. For a beta near 0 it is about ``beta * KL(P || Q)``. For a beta near
    1 it is about ``(1 - beta) * KL(Q || P)``. It is as exact as `kl_divergence`.

    Args:
      logits_p: unnormalized log-probabilities of P, float16, bfloat16, float32 or float64.
      logits_q: those of Q, of the same shape.
      beta: the share of P in M, a Python number between 0 and 1.
      axis: the class axis.
      temperature: divides both logits first.
      sample_weight: multiplies each position's divergence and its term of the mean's denominator.
      where: boolean; False masks a position, even if it contains NaN.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `kl_divergence`.
      axis_name: the mesh axis or axes over which the classes are sharded, as in `cross_entropy`.
      batch_axis_name: the same for the positions.

    Returns:
      The divergence is in float32, or in float64 if an input is. It is a scalar, or has the positions' shape with
      ``reduction="none"``.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> teacher = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 3.0]])
      >>> student = jnp.array([[1.0, 0.5, 0.0], [0.0, 0.0, 4.0]])
      >>> print(f"{jxent.js_divergence(teacher, student):.4f} {jnp.log(2.0):.4f}")  # never above log 2
      0.0299 0.6931

    References:
      Lin, Divergence measures based on the Shannon entropy, https://doi.org/10.1109/18.61115. In distillation: Agarwal
      et al., https://arxiv.org/abs/2306.13649.
    """
    return _divergence(
        "js_divergence",
        JensenShannon(beta=checks.inner_share("js_divergence", "beta", beta)),
        logits_p,
        logits_q,
        axis=axis,
        temperature=temperature,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
    )


@known_names
def tv_distance(
    logits_p: Float[ArrayLike, "*shape"],
    logits_q: Float[ArrayLike, "*shape"],
    *,
    axis: int = -1,
    temperature: Float[ArrayLike, "*#positions"] = 1.0,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    """Total variation distance between the distributions of two rows of logits, a number from 0 to 1.

    It is ``sum(abs(p - q)) / 2``, where p and q are the softmax of the two rows. With a model and its draft model as
    the two sides, 1 minus the distance is the probability that speculative decoding accepts a drafted token. The
    distance is as exact as `kl_divergence`. The derivative of ``abs(p - q)`` is taken as 0 where both are equal, so
    equal rows have gradients of 0.

    Args:
      logits_p: unnormalized log-probabilities of P, float16, bfloat16, float32 or float64.
      logits_q: those of Q, of the same shape. Either side may mask classes with -inf.
      axis: the class axis.
      temperature: divides both logits first; a number, or an array that broadcasts to the positions, as in
        `kl_divergence`.
      sample_weight: multiplies each position's distance and its term of the mean's denominator.
      where: boolean; False masks a position, even if it contains NaN.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `kl_divergence`.
      axis_name: the mesh axis or axes over which the classes are sharded, as in `cross_entropy`.
      batch_axis_name: the same for the positions.

    Returns:
      The distance is in float32, or in float64 if an input is. It is a scalar, or has the positions' shape with
      ``reduction="none"``.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax.numpy as jnp, jxent
      >>> model = jnp.array([[2.0, 0.5, -1.0], [0.1, 0.2, 3.0]])
      >>> draft = jnp.array([[1.0, 0.5, 0.0], [0.0, 0.0, 4.0]])
      >>> print(f"the draft's tokens are accepted with a probability of {1 - jxent.tv_distance(model, draft):.2f}")
      the draft's tokens are accepted with a probability of 0.83

    References:
      Leviathan et al., Fast inference from transformers via speculative decoding, https://arxiv.org/abs/2211.17192.
      Training on the distance: Zhou et al., DistillSpec, https://arxiv.org/abs/2310.08461.
    """
    return _divergence(
        "tv_distance",
        TotalVariation(),
        logits_p,
        logits_q,
        axis=axis,
        temperature=temperature,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
    )


def _divergence(
    name: str,
    divergence: Divergence,
    logits_p: ArrayLike,
    logits_q: ArrayLike,
    *,
    axis: int,
    temperature: ArrayLike,
    sample_weight: ArrayLike | None,
    where: ArrayLike | None,
    reduction: Reduction,
    axis_name: AxisName | None,
    batch_axis_name: AxisName | None,
) -> Float[Array, "..."]:
    of_p, of_q = checks.floating(name, "logits_p", logits_p), checks.floating(name, "logits_q", logits_q)
    axis = checks.class_axis(name, "logits_q", of_q, axis)
    checks.same_shape(name, "logits_p", of_p, "logits_q", of_q)
    weights = divergence_weights(name, temperature, sample_weight, where, of_q, axis, of_p)
    over = loss_axes(name, "logits_q", of_q, axis, axis_name, batch_axis_name, reduction)
    objective = DivergenceObjective(axis=axis, shards=over.shards, divergence=divergence)
    options = options_of(name, "logits_q", objective=objective, over=over, scalars=Scalars(), reduction=reduction)
    return placed_loss_of(over.placement, options, of_q, weights, logits_p=of_p)
