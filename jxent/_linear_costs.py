"""The costs of `_costs`, of logits that are never held at once: a sweep over blocks of positions.

The logits of a block are hidden @ kernel + bias. Matmuls take operands in the common dtype of `hidden` and `kernel` and
accumulate in at least float32; logits, costs and the sums over blocks are at least float32 too, and what the backward
matmuls round to the operands' dtype is only the gradient of a block's logits. Memory: the logits of a block and their
gradient, and each gradient that is wanted, the kernel's once more in float32 while it is being summed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jxent._blocks import Blocks, owned, put, take
from jxent._costs import Costs, Form, costs_bwd, costs_fwd
from jxent._labels import alike
from jxent._reduce import Coefficients, only, weigh
from jxent._rows import compute_dtype


class Sweep(NamedTuple):
    """The static part of a sweep: the costs that are wanted, and how to go over the positions."""

    form: Form
    vocab_axis: int
    blocks: Blocks
    precision: Any


class Inputs(NamedTuple):
    """Arrays, their gradients (None for none), or what `symbolic_zeros` makes of them in a forward rule."""

    hidden: Any  # (*positions, features)
    kernel: Any  # two axes, that of the vocabulary being `Sweep.vocab_axis`
    bias: Any  # (vocab,), or None
    labels: Any  # (*positions,) class indices, or (*positions, vocab) class probabilities
    class_weight: Any  # (vocab,), as `costs` takes it, or None
    keep: Any  # (*positions,), or None


# --- one block --------------------------------------------------------------------------------------------------------


def _dot(sweep, a, b, axes):
    accumulator = compute_dtype(a.dtype)
    return lax.dot_general(a, b, (axes, ((), ())), sweep.precision, preferred_element_type=accumulator)


def _block(sweep, wanted, inputs, coefficients):
    """(costs, gradients) of one block: the costs without the class axis, a dictionary of what is `wanted`.

    The gradient is that of the costs' sum with these coefficients. Gradients of what all blocks share come in the dtype
    to sum them in, that of the kernel as (features, vocab).
    """
    hidden, kernel, bias, labels, class_weight, keep = inputs
    operand = jnp.promote_types(hidden.dtype, kernel.dtype)
    positions = tuple(range(hidden.ndim - 1))
    # Selected before the matmul, because in the kernel's gradient 0 * NaN would be NaN. The barrier gives the block a
    # kernel of its own, or XLA would make one transposed copy for all blocks where that seems cheaper to it.
    keep_features = None if keep is None else keep[..., None]
    h, k = lax.optimization_barrier((only(keep_features, hidden).astype(operand), kernel.astype(operand)))
    logits = _dot(sweep, h, k, ((h.ndim - 1,), (1 - sweep.vocab_axis,)))
    if bias is not None:
        logits = logits + bias
    rows, residuals = costs_fwd(sweep.form, logits, labels, class_weight, keep_features)
    rows = jax.tree.map(lambda row: only(keep, row[..., 0]), rows)
    grads = {}
    if wanted:
        to_costs = [None if c is None else c[..., None].astype(rows.label.dtype) for c in coefficients]
        dlogits, dlabels, dweight, _ = costs_bwd(sweep.form, residuals, to_costs)
        g = dlogits.astype(operand)
        if "hidden" in wanted:
            grads["hidden"] = _dot(sweep, g, k, ((g.ndim - 1,), (sweep.vocab_axis,)))
        if "kernel" in wanted:
            grads["kernel"] = _kernel_gradient(sweep, h, g, positions)
        if "bias" in wanted:
            # Once more, for the sum alone: for two uses at once XLA:CPU would write every term of the gradient. And
            # with a selection that changes nothing, because the sum would fuse with the arithmetic before it.
            (residuals, to_costs), _ = lax.optimization_barrier(((residuals, to_costs), g))
            terms = costs_bwd(sweep.form, residuals, to_costs)[0]
            grads["bias"] = jnp.sum(jnp.where(terms == jnp.inf, jnp.inf, terms), positions)
        if "labels" in wanted:
            grads["labels"] = dlabels
        if "class_weight" in wanted and dweight is not None:
            grads["class_weight"] = dweight.astype(compute_dtype(dweight.dtype))
    return rows, grads


def _kernel_gradient(sweep, h, g, positions):
    """(features, vocab), whatever the kernel is: the hidden states are cheaper to transpose than the other operand.

    XLA:CPU multiplies 16-bit operands as they are only if the first one is contracted over its last axes, and otherwise
    writes both in float32. The barrier makes it transpose, and the axis of size 1 in memory, not by layout.
    """
    h = lax.optimization_barrier(jnp.moveaxis(h[..., None, :], -1, 0))
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


def _swept(sweep, wanted, inputs, coefficients):
    """(costs, gradients) as of `_block`, of all positions; the gradients in `_storable` dtypes."""
    blocks, operand = sweep.blocks, jnp.promote_types(inputs.hidden.dtype, inputs.kernel.dtype)
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
            return jax.tree.map(lambda a: jnp.zeros((*leading, *a.shape[len(leading) :]), a.dtype), like)

        def step(i, carry):
            each, sums = block(i)
            each = jax.tree.map(partial(put, blocks, i), carry[0], each)
            return each, jax.tree.map(jnp.add, carry[1], sums)

        each, sums = jax.eval_shape(block, 0)
        carry, tree = jax.tree.flatten((zeros(blocks.shape, each), zeros((), sums)))
        carry = jax.tree.unflatten(tree, alike(inputs.hidden, *carry)[1:])
        (rows, grads), sums = lax.fori_loop(0, blocks.number, step, carry)
    for name, total in sums.items():
        grads[name] = finished(name, total.T if name == "kernel" and sweep.vocab_axis == 0 else total)
    return rows, grads


def _values(primals):
    """(values, the inputs that are differentiated) of a forward rule's arguments, as `symbolic_zeros` gives them.

    The second is a dictionary of empty arrays, one for the dtype of each such input.
    """
    values = jax.tree.map(lambda a: a.value, primals)
    perturbed = {name for name, a in primals._asdict().items() if a is not None and a.perturbed}
    return values, {name: jnp.zeros(0, a.dtype) for name, a in values._asdict().items() if name in perturbed}


def _gradients(wanted, grads, factor=None):
    """`Inputs` of gradients, each in its input's dtype and times a factor; None where there is none."""
    out = dict.fromkeys(Inputs._fields)
    for name, like in wanted.items():
        grad = grads[name] if factor is None else grads[name].astype(compute_dtype(like.dtype)) * factor
        out[name] = grad.astype(like.dtype)
    return Inputs(**out)


def _is_zero(cotangent) -> bool:
    return isinstance(cotangent, SymbolicZero)


def _array(cotangent):
    return jnp.zeros(cotangent.shape, cotangent.dtype) if _is_zero(cotangent) else cotangent


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_costs(sweep, inputs) -> Costs:
    """The costs of each position. The gradients take a sweep of their own, in the backward pass."""
    return _swept(sweep, {}, inputs, None)[0]


def _linear_costs_fwd(sweep, primals):
    inputs, wanted = _values(primals)
    return _swept(sweep, {}, inputs, None)[0], (inputs, wanted)


# The gradient of the sum of cotangent[i] * cost[i]: the cotangents are the coefficients.
def _linear_costs_bwd(sweep, residuals, cotangents):
    inputs, wanted = residuals
    coefficients = jax.tree.map(_array, Coefficients(*cotangents[:3]), is_leaf=_is_zero)
    return (_gradients(wanted, _swept(sweep, wanted, inputs, coefficients)[1]),)


linear_costs.defvjp(_linear_costs_fwd, _linear_costs_bwd, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_total(sweep, inputs, coefficients) -> tuple[Array, Costs]:
    """(total, costs): the sum of the costs with these coefficients, and the costs, which carry no gradient.

    One sweep takes the total and its gradients, which are kept for the backward pass.
    """
    rows = _swept(sweep, {}, inputs, None)[0]
    return jnp.sum(weigh(coefficients, rows)), rows


class Residuals(NamedTuple):
    wanted: dict[str, Array]
    gradients: dict[str, Array]  # of the total
    coefficients: Coefficients
    rows: Costs  # those that have coefficients


def _linear_total_fwd(sweep, primals, coefficients):
    inputs, wanted = _values(primals)
    coefficients = jax.tree.map(lambda c: c.value, coefficients)
    rows, grads = _swept(sweep, wanted, inputs, coefficients)
    residuals = Residuals(wanted, grads, coefficients, Costs(*rows[:3]))
    return (jnp.sum(weigh(coefficients, rows)), rows), residuals


# With coefficients c and costs of the inputs x, total = sum of c[i] cost[i](x). So d total / dx is the sweep's gradient
# for these coefficients, whatever the cotangent, which multiplies it; and d total / dc[i] = cost[i].
def _linear_total_bwd(sweep, residuals, cotangents):
    wanted, grads, coefficients, rows = residuals
    factor = _array(cotangents[0])
    _, pull = jax.vjp(lambda c: jnp.sum(weigh(c, rows)), coefficients)
    return _gradients(wanted, grads, factor), pull(factor)[0]


linear_total.defvjp(_linear_total_fwd, _linear_total_bwd, symbolic_zeros=True)
