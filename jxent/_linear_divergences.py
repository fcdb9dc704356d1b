"""`linear_kl_divergence` and `linear_js_divergence`: their arguments."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from jxent._core.divergences import JensenShannon, KullbackLeibler
from jxent._core.passes import compute_dtype
from jxent._linear_loss import loss_by_sweep
from jxent._loss import checks
from jxent._loss.annotations import ArrayLike, AxisName, Reduction
from jxent._loss.axis_names import Sharded, mesh_axes
from jxent._loss.loss import weight_dimensions
from jxent._loss.names import known_names
from jxent._loss.options import divergence_options, divergence_weights
from jxent._loss.placement import CLASSES, placed
from jxent._loss.positions import coefficients_of, denominator, positions_of
from jxent._loss.reports import report_values
from jxent._mesh.sharded import covers_its_mesh
from jxent._sweep.sweep import Inputs, Sweep


@known_names
def linear_kl_divergence(
    hidden_p: Float[ArrayLike, "*positions features_p"],
    kernel_p: Float[ArrayLike, "features_p vocab"] | Float[ArrayLike, "vocab features_p"],
    hidden_q: Float[ArrayLike, "*positions features_q"],
    kernel_q: Float[ArrayLike, "features_q vocab"] | Float[ArrayLike, "vocab features_q"],
    *,
    bias_p: Float[ArrayLike, " vocab"] | None = None,
    bias_q: Float[ArrayLike, " vocab"] | None = None,
    vocab_axis: int | tuple[int, int] = -1,
    temperature: Float[ArrayLike, ""] = 1.0,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
    block_size: int | None = None,
    recompute: bool = False,
    precision: Any = None,
) -> Float[Array, "..."]:
    r"""KL(P || Q) of the logits of two output layers, ``hidden @ kernel + bias``, in the memory of a few rows of them.

    Distillation over a large vocabulary: the logits of neither side are ever held, but those of `block_size` positions.
    Only what is differentiated has gradients computed. So a frozen teacher costs one matmul: stop the gradients of its
    hidden states and kernel, or differentiate with respect to the student's arrays alone. Exactness is that of
    `kl_divergence`.

    Args:
      hidden_p: hidden states of P of any leading shape, float16, bfloat16, float32 or float64.
      kernel_p: the weights of its output layer, (features, vocab), or (vocab, features) with ``vocab_axis=0``.
      hidden_q: hidden states of Q, of the same leading shape; its features may be any number.
      kernel_q: the weights of its output layer, of the same vocabulary.
      bias_p: added to the logits of P in at least float32. A class with a bias of -inf is masked.
      bias_q: likewise for Q.
      vocab_axis: the axis of both kernels that is the vocabulary, -1 or 0; or a pair, that of `kernel_p` and that of
        `kernel_q`.
      temperature: divides both logits first; no factor of its square is added. A Python number is static.
        It must be positive and finite in float32, and so must its inverse. A floating-point scalar array is traced, and
        its value is not checked.
      sample_weight: multiplies each position's divergence and its share of the mean's denominator; broadcasts to the
        leading shape.
      where: boolean, broadcasts to the leading shape; False leaves a position out, whatever its hidden states hold. It
        is not computed, as in `linear_cross_entropy`.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `kl_divergence`. With ``"none"`` the gradients are computed
        in the backward pass.
      axis_name, batch_axis_name: mesh axes over which vocabulary and positions are sharded, those of both sides alike,
        as in `linear_cross_entropy`.
      block_size: how many positions are in flight at once, at most; the default is half of that of
        `linear_cross_entropy`, because there are logits of two sides.
      recompute: compute the gradients in the backward pass, with the logits' matmuls once more, so that no gradient is
        kept between the two passes; ``reduction="none"`` always does.
      precision: of the matmuls, as in `jax.lax.dot_general`.

    Returns:
      The divergence in float32, or in float64 if an input is: a scalar, or for ``reduction="none"`` the leading shape.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Example:
      >>> import jax, jax.numpy as jnp, jxent
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> teacher = jax.random.normal(keys[0], (2, 8, 32)), jax.random.normal(keys[1], (32, 1000)) / 6
      >>> student = jax.random.normal(keys[2], (2, 8, 16)), jax.random.normal(keys[3], (16, 1000)) / 4
      >>> print(f"{jxent.linear_kl_divergence(*teacher, *student):.3f}")
      0.937

    References:
      Hinton et al., https://arxiv.org/abs/1503.02531. Blocks: Hsu et al., Liger Kernel,
      https://arxiv.org/abs/2410.10989.
    """
    sides = ((hidden_p, kernel_p, bias_p), (hidden_q, kernel_q, bias_q))
    weights, over = (temperature, sample_weight, where), (axis_name, batch_axis_name)
    sweep = block_size, recompute, precision
    return _linear_divergence(
        "linear_kl_divergence", KullbackLeibler(), sides, vocab_axis, weights, reduction, over, sweep
    )


@known_names
def linear_js_divergence(
    hidden_p: Float[ArrayLike, "*positions features_p"],
    kernel_p: Float[ArrayLike, "features_p vocab"] | Float[ArrayLike, "vocab features_p"],
    hidden_q: Float[ArrayLike, "*positions features_q"],
    kernel_q: Float[ArrayLike, "features_q vocab"] | Float[ArrayLike, "vocab features_q"],
    *,
    beta: float = 0.5,
    bias_p: Float[ArrayLike, " vocab"] | None = None,
    bias_q: Float[ArrayLike, " vocab"] | None = None,
    vocab_axis: int | tuple[int, int] = -1,
    temperature: Float[ArrayLike, ""] = 1.0,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
    block_size: int | None = None,
    recompute: bool = False,
    precision: Any = None,
) -> Float[Array, "..."]:
    r"""Jensen-Shannon divergence of the logits of two output layers, in the memory of a few rows of them, in nats.

    It is to `js_divergence` what `linear_kl_divergence` is to `kl_divergence`.

    Args:
      hidden_p: hidden states of P of any leading shape, float16, bfloat16, float32 or float64.
      kernel_p: the weights of its output layer, (features, vocab), or (vocab, features) with ``vocab_axis=0``.
      hidden_q: hidden states of Q, of the same leading shape; its features may be any number.
      kernel_q: the weights of its output layer, of the same vocabulary.
      beta: the share of P in M, a Python number between 0 and 1.
      bias_p: added to the logits of P in at least float32. A class with a bias of -inf is masked.
      bias_q: likewise for Q.
      vocab_axis: the axis of the vocabulary, -1 or 0, or a pair of them, as in `linear_kl_divergence`.
      temperature: divides both logits first.
      sample_weight: multiplies each position's divergence and its share of the mean's denominator.
      where: boolean; False leaves a position out, whatever its hidden states hold, and is not computed.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `kl_divergence`.
      axis_name, batch_axis_name: mesh axes over which vocabulary and positions are sharded, those of both sides alike.
      block_size: how many positions are in flight at once, at most.
      recompute: compute the gradients in the backward pass.
      precision: of the matmuls, as in `jax.lax.dot_general`.

    Returns:
      The divergence in float32, or in float64 if an input is: a scalar, or for ``reduction="none"`` the leading shape.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Example:
      >>> import jax, jax.numpy as jnp, jxent
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> teacher = jax.random.normal(keys[0], (2, 8, 32)), jax.random.normal(keys[1], (32, 1000)) / 6
      >>> student = jax.random.normal(keys[2], (2, 8, 16)), jax.random.normal(keys[3], (16, 1000)) / 4
      >>> print(f"{jxent.linear_js_divergence(*teacher, *student, beta=0.1):.3f}")
      0.076

    References:
      Agarwal et al., https://arxiv.org/abs/2306.13649. Blocks: Hsu et al., Liger Kernel,
      https://arxiv.org/abs/2410.10989.
    """
    name = "linear_js_divergence"
    divergence = JensenShannon(checks.inner_share(name, "beta", beta))
    sides = ((hidden_p, kernel_p, bias_p), (hidden_q, kernel_q, bias_q))
    weights, over = (temperature, sample_weight, where), (axis_name, batch_axis_name)
    sweep = block_size, recompute, precision
    return _linear_divergence(name, divergence, sides, vocab_axis, weights, reduction, over, sweep)


def _linear_divergence(name, divergence, sides, vocab_axis, weights, reduction, over, sweep_options):
    block_size, recompute, precision = sweep_options
    axes = checks.pair(name, "vocab_axis", vocab_axis)
    (hidden_p, kernel_p, bias_p, axis_p), (hidden_q, kernel_q, bias_q, axis_q) = (
        _checked_layer(name, of, side, axis) for of, side, axis in zip(("_p", "_q"), sides, axes, strict=True)
    )
    classes = kernel_q.shape[axis_q]
    checks.same_positions(name, hidden_p, hidden_q)
    checks.same_vocabulary(name, kernel_p, axis_p, kernel_q, axis_q)
    logits = jax.ShapeDtypeStruct((*hidden_q.shape[:-1], classes), hidden_q.dtype)
    arrays = hidden_p, kernel_p, hidden_q, kernel_q
    weights = divergence_weights(name, *weights, logits, logits.ndim - 1, *arrays)
    of_kernel = Sharded("kernel_q", kernel_q, (axis_q,))
    of_hidden = Sharded("hidden_q", hidden_q, range(hidden_q.ndim - 1))
    over = mesh_axes(name, over[0], of_kernel, over[1], of_hidden, reduction)
    checks.one_device_if_symbolic(name, *arrays)
    options = divergence_options((name, "hidden_q"), logits.ndim - 1, over, divergence, reduction)
    sweep = Sweep(
        function=name,
        form=options.form,
        vocab_axis=axis_q,
        block_size=None if block_size is None else checks.positive(name, "block_size", block_size),
        precision=checks.matmul_precision(name, precision),
        vocab_axis_p=axis_p,
    )
    recompute = checks.flag(name, "recompute", recompute)
    positions = tuple(range(hidden_q.ndim - 1))
    of_layer = [((*positions, None), (None, CLASSES) if axis else (CLASSES, None)) for axis in (axis_p, axis_q)]
    dimensions = *of_layer[0], *of_layer[1], (CLASSES,), (CLASSES,), weight_dimensions(weights, positions)
    arrays = *arrays, bias_p, bias_q, weights
    return placed(name, over.placement, _divergence, (options, sweep, recompute), arrays, dimensions)


def _checked_layer(name, of, side, vocab_axis):
    hidden, kernel, bias = side
    hidden = checks.floating(name, "hidden" + of, hidden)
    kernel = checks.floating(name, "kernel" + of, kernel)
    vocab_axis = checks.kernel_axis(name, hidden, kernel, vocab_axis, of)
    bias = checks.per_class(name, "bias" + of, bias, kernel.shape[vocab_axis], hidden.dtype)
    return hidden, kernel, bias, vocab_axis


def _divergence(options, sweep, recompute, hidden_p, kernel_p, hidden_q, kernel_q, bias_p, bias_q, weights):
    classes = kernel_q.shape[sweep.vocab_axis]
    arrays = {"hidden_p": hidden_p, "kernel_p": kernel_p, "hidden_q": hidden_q, "kernel_q": kernel_q}
    dtype = compute_dtype(*(array.dtype for array in arrays.values()))
    positions = positions_of(options, weights, None, hidden_q, hidden_q.ndim - 1, classes)
    inputs = Inputs(
        hidden_q,
        kernel_q,
        bias_q,
        labels=None,
        class_weight=None,
        keep=positions.keep,
        first=positions.first,
        temperature=weights.temperature,
        hidden_p=hidden_p,
        kernel_p=kernel_p,
        bias_p=bias_p,
    )
    coefficients = coefficients_of(options, weights, positions)
    weight = denominator(options, positions, hidden_q.shape[:-1], dtype)
    loss, _, _ = loss_by_sweep(options, sweep, recompute, inputs, coefficients, weight)
    # Elsewhere a report would make checkify fail, at the `shard_map` that is to come.
    if covers_its_mesh(*arrays.values()):
        row_keep = None if positions.keep is None else positions.keep[..., None]
        loss = report_values(options, row_keep, loss, hidden_p=hidden_p, hidden_q=hidden_q)
        biases = {"bias_p": bias_p, "bias_q": bias_q}
        loss = report_values(options, None, loss, masked=biases, kernel_p=kernel_p, kernel_q=kernel_q, **biases)
    return loss
