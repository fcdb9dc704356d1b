"""`linear_kl_divergence`, `linear_js_divergence` and `linear_tv_distance`, and the checks of their arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float

from jxent._call import checks
from jxent._call.annotations import ArrayLike, AxisName, Reduction
from jxent._call.axis_names import Sharded, mesh_axes
from jxent._call.loss import weight_dimensions
from jxent._call.names import known_names
from jxent._call.options import Options, Weights, divergence_weights, options_of
from jxent._call.placement import CLASSES, placed
from jxent._call.positions import coefficients_of, denominator, positions_of
from jxent._core.dtypes import compute_dtype
from jxent._core.reports import report_values
from jxent._linear_loss import loss_by_sweep
from jxent._mesh.sharded import covers_its_mesh
from jxent._objective.divergence import (
    Divergence,
    DivergenceObjective,
    JensenShannon,
    KullbackLeibler,
    TotalVariation,
)
from jxent._rows.costs import Scalars
from jxent._sweep.block import Inputs, Sweep


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
    temperature: Float[ArrayLike, "*#positions"] = 1.0,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
    block_size: int | None = None,
    recompute: bool = False,
    precision: Any = None,
) -> Float[Array, "..."]:
    """KL(P || Q) of the logits of two output layers, ``hidden @ kernel + bias``, in the memory of a few rows of them.

    Use it for distillation over a large vocabulary. It keeps the logits of only `block_size` positions of each side in
    memory. Gradients are computed only for arguments that you differentiate, so a frozen teacher costs one matmul. To
    freeze it, stop the gradients of its hidden states and kernel, or differentiate with respect to the student's
    arrays alone. The result is as exact as `kl_divergence`.

    Args:
      hidden_p: hidden states of P of any leading shape, float16, bfloat16, float32 or float64.
      kernel_p: the weights of its output layer, (features, vocab), or (vocab, features) with ``vocab_axis=0``.
      hidden_q: hidden states of Q, of the same leading shape; the number of features may differ.
      kernel_q: the weights of its output layer, of the same vocabulary.
      bias_p: added to the logits of P in at least float32. A class with a bias of -inf is masked.
      bias_q: the same for Q.
      vocab_axis: the axis of both kernels that is the vocabulary, -1 or 0; or a pair, for `kernel_p` and `kernel_q`.
      temperature: divides both logits first; the result is not multiplied by its square. A Python number is static.
        It must be positive and finite in float32, and so must its inverse. A scalar array is traced, and so is an array
        that broadcasts to the leading shape, with one temperature for each. Their values are not checked: a
        temperature of 0 or NaN makes its positions NaN, unless they are masked.
      sample_weight: multiplies each position's divergence and its term of the mean's denominator; broadcasts to the
        leading shape.
      where: boolean, broadcasts to the leading shape; False masks a position, even if its hidden states contain NaN.
        Blocks skip masked positions, as in `linear_cross_entropy`.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `kl_divergence`. With ``"none"`` the gradients are computed
        in the backward pass, which skips positions whose cotangents are all 0.
      axis_name: the mesh axis or axes over which the vocabulary of both sides is sharded, as in `linear_cross_entropy`.
      batch_axis_name: the same for the positions.
      block_size: the largest number of positions in a block; the default is half of that of `linear_cross_entropy`,
        because there are logits of two sides.
      recompute: compute the gradients in the backward pass, with the logits' matmuls once more, so that no gradient is
        kept between the two passes. ``reduction="none"`` always does this.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`.

    Returns:
      The divergence is in float32, or in float64 if an input is. It is a scalar, or has the leading shape with
      ``reduction="none"``.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
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
    name = "linear_kl_divergence"
    p_axis, q_axis = checks.pair(name, "vocab_axis", vocab_axis)
    return _linear_divergence(
        name,
        KullbackLeibler(),
        _checked_layer(name, "_p", hidden_p, kernel_p, bias_p, p_axis),
        _checked_layer(name, "_q", hidden_q, kernel_q, bias_q, q_axis),
        temperature=temperature,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        block_size=block_size,
        recompute=recompute,
        precision=precision,
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
    temperature: Float[ArrayLike, "*#positions"] = 1.0,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
    block_size: int | None = None,
    recompute: bool = False,
    precision: Any = None,
) -> Float[Array, "..."]:
    """Jensen-Shannon divergence of the logits of two output layers, in the memory of a few rows of them, in nats.

    The value is that of `js_divergence`. Blocks, memory and gradients are as in `linear_kl_divergence`.

    Args:
      hidden_p: hidden states of P of any leading shape, float16, bfloat16, float32 or float64.
      kernel_p: the weights of its output layer, (features, vocab), or (vocab, features) with ``vocab_axis=0``.
      hidden_q: hidden states of Q, of the same leading shape; the number of features may differ.
      kernel_q: the weights of its output layer, of the same vocabulary.
      beta: the share of P in M, a Python number between 0 and 1.
      bias_p: added to the logits of P in at least float32. A class with a bias of -inf is masked.
      bias_q: the same for Q.
      vocab_axis: the axis of the vocabulary, -1 or 0, or a pair of them, as in `linear_kl_divergence`.
      temperature: divides both logits first.
      sample_weight: multiplies each position's divergence and its term of the mean's denominator.
      where: boolean; False masks a position, even if its hidden states contain NaN. Blocks skip masked positions.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `kl_divergence`.
      axis_name: the mesh axis or axes over which the vocabulary of both sides is sharded.
      batch_axis_name: the same for the positions.
      block_size: the largest number of positions in a block.
      recompute: compute the gradients in the backward pass.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`.

    Returns:
      The divergence is in float32, or in float64 if an input is. It is a scalar, or has the leading shape with
      ``reduction="none"``.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
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
    p_axis, q_axis = checks.pair(name, "vocab_axis", vocab_axis)
    return _linear_divergence(
        name,
        JensenShannon(beta=checks.inner_share(name, "beta", beta)),
        _checked_layer(name, "_p", hidden_p, kernel_p, bias_p, p_axis),
        _checked_layer(name, "_q", hidden_q, kernel_q, bias_q, q_axis),
        temperature=temperature,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        block_size=block_size,
        recompute=recompute,
        precision=precision,
    )


@known_names
def linear_tv_distance(
    hidden_p: Float[ArrayLike, "*positions features_p"],
    kernel_p: Float[ArrayLike, "features_p vocab"] | Float[ArrayLike, "vocab features_p"],
    hidden_q: Float[ArrayLike, "*positions features_q"],
    kernel_q: Float[ArrayLike, "features_q vocab"] | Float[ArrayLike, "vocab features_q"],
    *,
    bias_p: Float[ArrayLike, " vocab"] | None = None,
    bias_q: Float[ArrayLike, " vocab"] | None = None,
    vocab_axis: int | tuple[int, int] = -1,
    temperature: Float[ArrayLike, "*#positions"] = 1.0,
    sample_weight: Float[ArrayLike, "*#positions"] | None = None,
    where: Bool[ArrayLike, "*#positions"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
    block_size: int | None = None,
    recompute: bool = False,
    precision: Any = None,
) -> Float[Array, "..."]:
    """Total variation distance of the logits of two output layers, in the memory of a few rows of them, from 0 to 1.

    The value is that of `tv_distance`. Blocks, memory and gradients are as in `linear_kl_divergence`. With a model and
    its draft model as the two sides, 1 minus the mean is the acceptance rate of speculative decoding.

    Args:
      hidden_p: hidden states of P of any leading shape, float16, bfloat16, float32 or float64.
      kernel_p: the weights of its output layer, (features, vocab), or (vocab, features) with ``vocab_axis=0``.
      hidden_q: hidden states of Q, of the same leading shape; the number of features may differ.
      kernel_q: the weights of its output layer, of the same vocabulary.
      bias_p: added to the logits of P in at least float32. A class with a bias of -inf is masked.
      bias_q: the same for Q.
      vocab_axis: the axis of the vocabulary, -1 or 0, or a pair of them, as in `linear_kl_divergence`.
      temperature: divides both logits first; a number, or an array that broadcasts to the positions, as in
        `kl_divergence`.
      sample_weight: multiplies each position's distance and its term of the mean's denominator.
      where: boolean; False masks a position, even if its hidden states contain NaN. Blocks skip masked positions.
      reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in `kl_divergence`.
      axis_name: the mesh axis or axes over which the vocabulary of both sides is sharded.
      batch_axis_name: the same for the positions.
      block_size: the largest number of positions in a block.
      recompute: compute the gradients in the backward pass.
      precision: the precision of the matmuls, as in `jax.lax.dot_general`.

    Returns:
      The distance is in float32, or in float64 if an input is. It is a scalar, or has the leading shape with
      ``reduction="none"``.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Examples:
      >>> import jax, jax.numpy as jnp, jxent
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> teacher = jax.random.normal(keys[0], (2, 8, 32)), jax.random.normal(keys[1], (32, 1000)) / 6
      >>> student = jax.random.normal(keys[2], (2, 8, 16)), jax.random.normal(keys[3], (16, 1000)) / 4
      >>> print(f"{jxent.linear_tv_distance(*teacher, *student):.3f}")
      0.509

    References:
      Leviathan et al., https://arxiv.org/abs/2211.17192. Blocks: Hsu et al., Liger Kernel,
      https://arxiv.org/abs/2410.10989.
    """
    name = "linear_tv_distance"
    p_axis, q_axis = checks.pair(name, "vocab_axis", vocab_axis)
    return _linear_divergence(
        name,
        TotalVariation(),
        _checked_layer(name, "_p", hidden_p, kernel_p, bias_p, p_axis),
        _checked_layer(name, "_q", hidden_q, kernel_q, bias_q, q_axis),
        temperature=temperature,
        sample_weight=sample_weight,
        where=where,
        reduction=reduction,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        block_size=block_size,
        recompute=recompute,
        precision=precision,
    )


class _Layer(NamedTuple):
    """The output layer of one side; or the dimensions of its arrays, which `Placement.spec` explains."""

    hidden: Any  # Float[Array, "*positions features"]
    kernel: Any  # Float[Array, "features vocab"] or Float[Array, "vocab features"]
    bias: Any  # Float[Array, " vocab"] or None


def _checked_layer(name: str, of: str, hidden: Any, kernel: Any, bias: Any, vocab_axis: int) -> tuple[_Layer, int]:
    hidden = checks.floating(name, "hidden" + of, hidden)
    kernel = checks.floating(name, "kernel" + of, kernel)
    vocab_axis = checks.kernel_axis(name, hidden, kernel, vocab_axis, of)
    bias = checks.per_class(name, "bias" + of, bias, kernel.shape[vocab_axis], hidden.dtype)
    return _Layer(hidden=hidden, kernel=kernel, bias=bias), vocab_axis


def _linear_divergence(
    name: str,
    divergence: Divergence,
    side_p: tuple[_Layer, int],
    side_q: tuple[_Layer, int],
    *,
    temperature: Any,
    sample_weight: Any,
    where: Any,
    reduction: Any,
    axis_name: Any,
    batch_axis_name: Any,
    block_size: Any,
    recompute: Any,
    precision: Any,
) -> Float[Array, "..."]:
    (p, axis_p), (q, axis_q) = side_p, side_q
    checks.same_positions(name, p.hidden, q.hidden)
    checks.same_vocabulary(name, p.kernel, axis_p, q.kernel, axis_q)
    logits = jax.ShapeDtypeStruct((*q.hidden.shape[:-1], q.kernel.shape[axis_q]), q.hidden.dtype)
    arrays = p.hidden, p.kernel, q.hidden, q.kernel
    weights = divergence_weights(name, temperature, sample_weight, where, logits, logits.ndim - 1, *arrays)
    of_kernel = Sharded(name="kernel_q", array=q.kernel, axes=(axis_q,))
    of_hidden = Sharded(name="hidden_q", array=q.hidden, axes=range(q.hidden.ndim - 1))
    over = mesh_axes(name, axis_name, of_kernel, batch_axis_name, of_hidden, reduction)
    checks.one_device_if_symbolic(name, *arrays)
    objective = DivergenceObjective(axis=logits.ndim - 1, shards=over.shards, divergence=divergence)
    options = options_of(name, "hidden_q", objective=objective, over=over, scalars=Scalars(), reduction=reduction)
    sweep = Sweep(
        function=name,
        objective=objective,
        vocab_axis=axis_q,
        block_size=None if block_size is None else checks.positive(name, "block_size", block_size),
        precision=checks.matmul_precision(name, precision),
        vocab_axis_p=axis_p,
    )
    recompute = checks.flag(name, "recompute", recompute)
    positions = tuple(range(q.hidden.ndim - 1))
    dimensions = [
        _Layer(hidden=(*positions, None), kernel=(None, CLASSES) if axis else (CLASSES, None), bias=(CLASSES,))
        for axis in (axis_p, axis_q)
    ]
    return placed(
        name,
        over.placement,
        _divergence,
        (options, sweep, recompute),
        (p, q, weights),
        (*dimensions, weight_dimensions(weights, positions)),
    )


def _divergence(
    options: Options, sweep: Sweep, recompute: bool, p: _Layer, q: _Layer, weights: Weights
) -> Float[Array, "..."]:
    classes = q.kernel.shape[sweep.vocab_axis]
    dtype = compute_dtype(*(array.dtype for array in (p.hidden, p.kernel, q.hidden, q.kernel)))
    positions = positions_of(options, weights, None, q.hidden, q.hidden.ndim - 1, classes)
    inputs = Inputs(
        hidden=q.hidden,
        kernel=q.kernel,
        bias=q.bias,
        mask=positions.mask,
        class_offset=positions.class_offset,
        temperature=positions.temperature,
        hidden_p=p.hidden,
        kernel_p=p.kernel,
        bias_p=p.bias,
    )
    coefficients = coefficients_of(options, weights, positions)
    weight = denominator(options, positions, q.hidden.shape[:-1], dtype)
    loss, _, _ = loss_by_sweep(options, sweep, recompute, inputs, coefficients, weight)
    # Otherwise checkify would fail on a report, at the `shard_map` of the sweep.
    if covers_its_mesh(p.hidden, p.kernel, q.hidden, q.kernel):
        function, row_mask = options.function, None if positions.mask is None else positions.mask[..., None]
        loss = report_values(function, row_mask, loss, hidden_p=p.hidden, hidden_q=q.hidden)
        biases = {"bias_p": p.bias, "bias_q": q.bias}
        loss = report_values(function, None, loss, masked=tuple(biases), kernel_p=p.kernel, kernel_q=q.kernel, **biases)
    return loss
