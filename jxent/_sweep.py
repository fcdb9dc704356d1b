"""The costs of `_costs`, of logits that are never held at once: a sweep over blocks of positions.

The logits of a block are hidden @ kernel + bias. Matmuls take operands in the common dtype of `hidden` and `kernel` and
accumulate in at least float32; logits, costs and the sums over blocks are at least float32 too, and what the backward
matmuls round to the operands' dtype is only the gradient of a block's logits. Memory: the logits of a block and their
gradient, and each gradient that is wanted, the kernel's once more in float32 while it is being summed.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jxent._blocks import blocks_of, owned, put, take
from jxent._costs import Form, costs_bwd, costs_fwd
from jxent._passes import barrier, on_cpu
from jxent._reduce import only
from jxent._rows import compute_dtype
from jxent._shards import cast, varying


class Sweep(NamedTuple):
    """The static part of a sweep: the costs that are wanted, and how to go over the positions."""

    form: Form
    vocab_axis: int
    block_size: int | None  # None for the default
    precision: Any


class Inputs(NamedTuple):
    """Arrays, their gradients (None for none), or what `symbolic_zeros` makes of them in a forward rule."""

    hidden: Any  # (*positions, features)
    kernel: Any  # two axes, that of the vocabulary being `Sweep.vocab_axis`
    bias: Any  # (vocab,), or None
    labels: Any  # (*positions,) class indices, or (*positions, vocab) class probabilities
    class_weight: Any  # (vocab,), as `costs` takes it, or None
    keep: Any  # (*positions,), or None
    first: Any = None  # of the classes, as `costs` takes it


# --- one block --------------------------------------------------------------------------------------------------------


def _dot(sweep, a, b, axes):
    accumulator = compute_dtype(a.dtype)
    return lax.dot_general(a, b, (axes, ((), ())), sweep.precision, preferred_element_type=accumulator)


def _block(sweep, wanted, inputs, coefficients):
    """(costs, gradients) of one block: the costs without the class axis, a dictionary of what is `wanted`.

    The gradient is that of the costs' sum with these coefficients. Gradients of what all blocks share come in the dtype
    to sum them in, that of the kernel as (features, vocab).
    """
    hidden, kernel, bias, labels, class_weight, keep, first = inputs
    operand = jnp.promote_types(hidden.dtype, kernel.dtype)
    positions = tuple(range(hidden.ndim - 1))
    # Selected before the matmul, because in the kernel's gradient 0 * NaN would be NaN. The barrier gives the block a
    # kernel of its own, or XLA would make one transposed copy for all blocks where that seems cheaper to it.
    keep_features = None if keep is None else keep[..., None]
    h, k = barrier((only(keep_features, hidden).astype(operand), kernel.astype(operand)))
    logits = _dot(sweep, h, k, ((h.ndim - 1,), (1 - sweep.vocab_axis,)))
    if bias is not None:
        logits = logits + bias
    rows, residuals = costs_fwd(sweep.form, logits, labels, class_weight, keep_features, first)
    rows = jax.tree.map(lambda row: only(keep, row[..., 0]), rows)
    grads = {}
    if wanted:
        to_costs = [None if c is None else c[..., None].astype(rows.label.dtype) for c in coefficients]
        dlogits, dlabels, dweight = costs_bwd(sweep.form, residuals, to_costs)
        g = dlogits.astype(operand)
        if "hidden" in wanted:
            grads["hidden"] = _dot(sweep, g, k, ((g.ndim - 1,), (sweep.vocab_axis,)))
        if "kernel" in wanted:
            grads["kernel"] = _kernel_gradient(sweep, h, g, positions)
        if "bias" in wanted:
            # Once more, for the sum alone: for two uses at once XLA:CPU would write every term of the gradient. And
            # with a selection that changes nothing, because the sum would fuse with the arithmetic before it.
            (residuals, to_costs), _ = barrier(((residuals, to_costs), g))
            terms = costs_bwd(sweep.form, residuals, to_costs)[0]
            grads["bias"] = jnp.sum(jnp.where(terms == jnp.inf, jnp.inf, terms), positions)
        if "labels" in wanted:
            grads["labels"] = dlabels
        if "class_weight" in wanted:
            grads["class_weight"] = dweight
    return rows, grads


def _kernel_gradient(sweep, h, g, positions):
    """(features, vocab), whatever the kernel is: the hidden states are cheaper to transpose than the other operand.

    XLA:CPU multiplies 16-bit operands as they are only if the first one is contracted over its last axes, and otherwise
    writes both in float32. The barrier makes it transpose, and the axis of size 1 in memory, not by layout.
    """
    h = barrier(jnp.moveaxis(h[..., None, :], -1, 0))
    positions = (*positions, len(positions))
    return _dot(sweep, h, g[..., None, :], (tuple(a + 1 for a in positions), positions))


# --- all of them ------------------------------------------------------------------------------------------------------

_POSITIONAL = ("hidden", "labels", "keep")


def _storable(dtype):
    """The dtype to keep a gradient in until its factor is known; that of float16 might not fit into float16."""
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


def _float16_scale(coefficients, class_weight):
    """What to divide the coefficients by, so that the gradient of the logits neither overflows float16 nor vanishes.

    Its largest entries come to some 2**12 of at most 2**16, so that those of a confident position, 2**-36 times as
    large, are above the smallest, 2**-24. Class weights multiply the costs; the gradient of z has a factor of 2 (m +
    log_z), taken to be below 2**10.
    """
    bounds = zip(coefficients, (1, 1, 64), strict=True)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(c), initial=0) * bound for c, bound in bounds if c is not None]))
    if class_weight is not None:
        largest *= jnp.maximum(jnp.max(jnp.abs(class_weight)), jnp.finfo(jnp.float32).tiny)
    return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1) / 2**12


def default_block_size(cpu, wanted, positions, classes):
    """Positions, by a budget for the float32 logits. Larger blocks read and write the kernel's gradient less often."""
    least, budget = (256, 64 * 2**20) if cpu else (1024, 2**30) if "kernel" in wanted else (512, 2**29)
    return max(least, min(positions // 4, budget // (4 * classes)))


def swept(sweep, wanted, inputs, coefficients):
    """(costs, gradients) as of `_block`, of all positions; the gradients in `_storable` dtypes.

    Where the classes are sharded over `axis_name`, those of `hidden` are this shard's share.
    """
    return on_cpu(partial(_swept, sweep, wanted), inputs, coefficients)


def _swept(sweep, wanted, cpu, inputs, coefficients):
    sweep = sweep._replace(form=sweep.form._replace(room=cpu))
    shape, classes = inputs.hidden.shape[:-1], inputs.kernel.shape[sweep.vocab_axis]
    blocks = blocks_of(shape, sweep.block_size or default_block_size(cpu, wanted, math.prod(shape), classes))
    operand = jnp.promote_types(inputs.hidden.dtype, inputs.kernel.dtype)
    scale = None
    if wanted and operand == jnp.float16:
        scale = lax.stop_gradient(_float16_scale(coefficients, inputs.class_weight))
        coefficients = jax.tree.map(lambda c: c / scale, coefficients)
    positional = {name: getattr(inputs, name) for name in _POSITIONAL}

    def finished(name, grad):
        # While it is float32 still.
        grad = grad if scale is None else grad * scale
        return grad.astype(_storable(getattr(inputs, name).dtype))

    def block(i):
        part = {name: None if a is None else take(blocks, i, a) for name, a in positional.items()}
        weights = jax.tree.map(lambda c: take(blocks, i, c), coefficients)
        own = owned(blocks, i)
        if own is not None:
            weights = jax.tree.map(lambda c: jnp.where(own, c, 0), weights)
        rows, grads = _block(sweep, wanted, inputs._replace(**part), weights)
        each = {name: finished(name, grad) for name, grad in grads.items() if name in _POSITIONAL}
        sums = {name: grad for name, grad in grads.items() if name not in _POSITIONAL}
        return (rows, each), sums

    if blocks.number == 1:
        (rows, grads), sums = block(0)
    else:

        def zeros(leading, like):
            return jax.tree.map(
                lambda a: cast(jnp.zeros((*leading, *a.shape[len(leading) :]), a.dtype), varying(a)), like
            )

        def step(i, carry):
            each, sums = block(i)
            each = jax.tree.map(partial(put, blocks, i), carry[0], each)
            return each, jax.tree.map(jnp.add, carry[1], sums)

        each, sums = jax.eval_shape(block, 0)
        carry = zeros(blocks.shape, each), zeros((), sums)
        (rows, grads), sums = lax.fori_loop(0, blocks.number, step, carry)
    if "kernel" in sums and sweep.vocab_axis == 0:
        # The barrier keeps XLA:CPU from transposing the operands instead, for it cannot multiply 16-bit ones that way.
        sums["kernel"] = (barrier(sums["kernel"]) if cpu else sums["kernel"]).T
    for name, total in sums.items():
        grads[name] = finished(name, total)
    return rows, grads
