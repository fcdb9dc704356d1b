"""A sweep is a loop over blocks of positions, on one device: it computes costs without storing all logits.

Sums over blocks are at least float32. A sweep stores the logits of a block, their gradient, and each gradient that is
asked for. It also stores the kernel's gradient in float32 while it is being summed.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jxent._backend.backend import Backend, BlockNeeds
from jxent._backend.platform import by_platform, itself
from jxent._core.dtypes import compute_dtype
from jxent._core.forward_mode import in_one_piece
from jxent._core.shards import AxisNames, cast, checked, largest, varying
from jxent._objective.objective import RowInputs
from jxent._sweep import order
from jxent._sweep.block import Gradients, Inputs, Sweep, Swept, block_of, row_mode_of
from jxent._sweep.blocks import Blocks, blocks_of, not_repeated, put, take

Coefficients = dict[str, Array]
"""The factors of the costs at each position, by the names of the costs."""

OneBlock = Callable[..., tuple[Any, Gradients]]
"""A function of a block's arrays. It returns (results for each position, gradients to sum over blocks)."""


def _storable(name: str, dtype: Any) -> Any:
    """The dtype in which a gradient is kept until its factor is known.

    A gradient by a float16 array might not fit into float16. Gradients of biases, class weights and the temperature
    are small. They keep the dtype of their sum, because devices may still sum them.
    """
    wide = dtype == jnp.float16 or name in ("bias", "class_weight", "temperature", "bias_p")
    return compute_dtype(dtype) if wide else dtype


def _float16_scale(sweep: Sweep, inputs: Inputs, coefficients: Coefficients) -> Array:
    """The divisor of the coefficients with which the gradient of the logits neither overflows float16 nor vanishes.

    Float16 ends at 2**16. The largest entries of the gradient come to about 2**12. The entries of a confident position
    may be 2**-36 times as large, and then still reach the smallest number, 2**-24. The gradient of the squared
    normalizer has a factor of 2 (m + log_z). With its `largest_gradient` of 2**6, this factor may be up to 2**10.
    """
    dtype, objective = compute_dtype(*(c.dtype for c in coefficients.values())), sweep.objective
    temperature, by_position = inputs.temperature, "temperature" in inputs.positional

    def largest_of(name: str, coefficient: Array) -> Array:
        if temperature is not None and by_position:
            coefficient = coefficient / _with_axes(coefficient.ndim, temperature.astype(dtype))
        size = jnp.max(jnp.abs(coefficient), initial=0).astype(dtype) * objective.largest_gradient(name)
        if inputs.class_weight is None or not objective.takes_class_weight(name, inputs.labels):
            return size
        weight, least = jnp.max(jnp.abs(inputs.class_weight)).astype(dtype), objective.least_class_weight(name)
        return size * (jnp.maximum(weight, least) if least else weight)

    largest = jnp.max(jnp.stack([largest_of(*each) for each in coefficients.items()]))
    if temperature is not None and not by_position:
        largest /= temperature.astype(dtype)
    least = 2.0**-100  # keeps the scale a normal number of float32, even if all weights are 0
    return jnp.where(largest < jnp.inf, jnp.maximum(largest, least), 1) / 2**12


def swept(
    sweep: Sweep,
    wrt: tuple[str, ...],
    inputs: Inputs,
    coefficients: Coefficients,
    in_step: AxisNames | None = None,
    backend: Backend | None = None,
) -> tuple[Swept, Gradients]:
    """The costs of all positions, and their gradients as `block_of` defines them, in `_storable` dtypes.

    If the classes are sharded over `axis_name`, the gradients of `hidden` are this shard's share: the shards must be
    summed. If `in_step` is None, all positions are computed. Otherwise the arrays are one device's, and blocks have
    only unmasked positions. The devices of the mesh axes in `in_step` then all take as many blocks as the fullest
    device. If `backend` is None, the platform is not known yet, and the programs of all backends are traced.
    """

    def program(in_step: AxisNames | None) -> Callable[..., tuple[Swept, Gradients]]:
        of_backend = partial(_swept, sweep, wrt, in_step)
        return partial(by_platform, itself, of_backend) if backend is None else partial(of_backend, backend)

    plain = program(None)
    return in_one_piece(plain if in_step is None else program(in_step), plain, inputs, coefficients)


def swept_shapes(sweep: Sweep, wrt: tuple[str, ...], inputs: Any) -> Any:
    """The shapes and dtypes of the results of `swept`, from those of the inputs; no block is traced.

    The inputs are `Inputs`, of arrays or of their types.
    """

    def array(shape: tuple[int, ...], *dtypes: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, compute_dtype(*dtypes))

    def logits(hidden: Any, kernel: Any, bias: Any) -> Any:  # as in `block_of`, except for the shape
        return array((), jnp.promote_types(hidden.dtype, kernel.dtype), *([] if bias is None else [bias.dtype]))

    shape, logits_p = inputs.hidden.shape[:-1], None
    if inputs.hidden_p is not None and inputs.kernel_p is not None:
        logits_p = logits(inputs.hidden_p, inputs.kernel_p, inputs.bias_p)
    of_block = RowInputs(
        logits=logits(inputs.hidden, inputs.kernel, inputs.bias),
        labels=inputs.labels,
        logits_p=logits_p,
        class_weight=inputs.class_weight,
        temperature=inputs.temperature,
    )
    objective, prediction = sweep.objective, None
    names = objective.names if inputs.rows is None else ()

    def result(name: str, dtype: Any) -> Any:
        entries = objective.entries(name)
        return jax.ShapeDtypeStruct((*shape, entries) if entries else shape, dtype)

    if objective.predicts(inputs.indices) and inputs.rows is None:
        prediction: Any = result("prediction", jnp.int32)
    gradients = {name: inputs.array(name) for name in wrt}
    return (
        Swept(costs={name: result(name, of_block.dtype) for name in names}, prediction=prediction),
        {name: jax.ShapeDtypeStruct(like.shape, _storable(name, like.dtype)) for name, like in gradients.items()},
    )


def _swept(
    sweep: Sweep,
    wrt: tuple[str, ...],
    in_step: AxisNames | None,
    backend: Backend,
    inputs: Inputs,
    coefficients: Coefficients,
) -> tuple[Swept, Gradients]:
    shape, classes = inputs.hidden.shape[:-1], inputs.kernel.shape[sweep.vocab_axis]
    layers = [(inputs.hidden, inputs.kernel)]
    if inputs.hidden_p is not None and inputs.kernel_p is not None:
        layers.append((inputs.hidden_p, inputs.kernel_p))
    needs = BlockNeeds(
        gradients=bool(wrt) or sweep.pushes_tangents,
        kernel_gradient="kernel" in wrt or "kernel_p" in wrt,
        mode=row_mode_of(sweep, wrt, backend, inputs),
    )
    divisor = len(layers) * sweep.objective.block_divisor
    default = backend.block_size(math.prod(shape), classes, needs) // divisor
    size = sweep.block_size or max(1, default)
    blocks = blocks_of(shape, size) if all(isinstance(length, int) for length in shape) else None
    scale = None
    if wrt and jnp.float16 in [jnp.promote_types(hidden.dtype, kernel.dtype) for hidden, kernel in layers]:
        scale = lax.stop_gradient(_float16_scale(sweep, inputs, coefficients))
        coefficients = jax.tree.map(lambda c: c / scale, coefficients)

    def finished(name: str, gradient: Array) -> Array:
        # The product is taken while the gradient is still float32.
        gradient = gradient if scale is None else gradient * scale
        return gradient.astype(_storable(name, inputs.array(name).dtype))

    def block(part: dict[str, Any], weights: Coefficients) -> tuple[tuple[Swept, Gradients], Gradients]:
        """((costs of each position, their gradients), the gradients of arrays that all blocks share)."""
        out, gradients = block_of(sweep, wrt, backend, inputs._replace(**part), weights)
        each = {name: finished(name, gradient) for name, gradient in gradients.items() if name in positional}
        return (out, each), {name: gradient for name, gradient in gradients.items() if name not in positional}

    positional = inputs.positional
    arrays = {name: getattr(inputs, name) for name in positional}, coefficients
    if blocks is None:
        (out, gradients), sums = _blocks_of_symbolic(shape, size, backend.least_step, in_step, block, arrays)
    elif blocks.number == 1:
        (out, gradients), sums = block(*arrays)
    elif in_step is not None and inputs.mask is not None:
        size = math.prod(blocks.size)
        unmasked = order.order_of(inputs.mask, size)
        (out, gradients), sums = _unmasked_blocks(unmasked, size, backend.least_step, in_step, block, arrays)
    else:
        (out, gradients), sums = _all_blocks(blocks, block, arrays)
    one_block = blocks is not None and blocks.number == 1
    for name, vocab_axis in (("kernel", sweep.vocab_axis), ("kernel_p", sweep.vocab_axis_p)):
        if name in sums:
            sums[name] = backend.in_layout_of_kernel(sums[name], vocab_axis, one_block)
    return out, gradients | {name: finished(name, gradient) for name, gradient in sums.items()}


def _all_blocks(blocks: Blocks, block: OneBlock, arrays: Any) -> tuple[Any, Gradients]:
    """The results of `block` for all blocks: arrays of all positions, and sums over the blocks."""

    def one_block(i: Any) -> tuple[Any, Gradients]:
        part, weights = jax.tree.map(partial(take, blocks, i), arrays)
        repeated = not_repeated(blocks, i)
        if repeated is not None:
            weights = jax.tree.map(lambda c: jnp.where(_with_axes(c.ndim, repeated), c, 0), weights)
        return block(part, weights)

    # The jit traces a block once, for the shapes and for the loop. A gradient of the loop computes a block again.
    traced_once = jax.jit(jax.checkpoint(one_block, prevent_cse=False), inline=True)

    def step(i: Array, carry: Any) -> Any:
        return _with_block(partial(put, blocks, i), carry, traced_once(i))

    each, sums = jax.eval_shape(traced_once, 0)
    return lax.fori_loop(0, blocks.number, step, (_zeros(blocks.shape, each), _zeros((), sums)))


def _with_axes(ndim: int, array: Array) -> Array:
    """The array with further axes of size 1 at its end, `ndim` in all."""
    return array if array.ndim == ndim else array.reshape(*array.shape, *[1] * (ndim - array.ndim))


def _unmasked_blocks(
    unmasked: order.Order, size: int, least_step: int, in_step: AxisNames, block: OneBlock, arrays: Any
) -> tuple[Any, Gradients]:
    """The results of `_all_blocks`, computed only for unmasked positions, with zeros for the others."""
    unmasked = unmasked._replace(number=largest(cast(unmasked.number, checked(in_step)), in_step))
    step_size = min(size, max(least_step, size // 8))
    return order.by_blocks(unmasked, size, step_size, *_by_rows(unmasked, size, block, arrays))


def _blocks_of_symbolic(
    shape: tuple[Any, ...], size: int, least_step: int, in_step: AxisNames | None, block: OneBlock, arrays: Any
) -> tuple[Any, Gradients]:
    """The results of `_all_blocks`, if only `jax.export.Exported.call` will know the number of positions."""
    mask, everything = arrays[0]["mask"], order.all_of(shape, size)
    if in_step is None:
        return order.by_scan(everything, size, *_by_rows(everything, size, block, arrays))
    unmasked = everything if mask is None else order.order_of(mask, size)
    return _unmasked_blocks(unmasked, size, least_step, in_step, block, arrays)


def _by_rows(
    positions: order.Order, size: int, block: OneBlock, arrays: Any
) -> tuple[Callable[[Array, Any], Any], Any]:
    """The step of `order.by_blocks`, and the carry that it begins with."""

    def one_block(rows: Array) -> tuple[Any, Gradients]:
        def taken(tree: Any, fill: float = 0) -> Any:
            return jax.tree.map(partial(order.take, positions, rows, fill=fill), tree)

        part, weights = arrays
        # A temperature beyond the last position is 1, so that nothing is divided by 0.
        part = {name: taken(array, 1 if name == "temperature" else 0) for name, array in part.items()}
        return block(part, taken(weights))

    traced_once = jax.jit(jax.checkpoint(one_block, prevent_cse=False), inline=True)

    def step(rows: Array, carry: Any) -> Any:
        return _with_block(partial(order.put, positions, rows), carry, traced_once(rows))

    each, sums = jax.eval_shape(traced_once, positions.rows[:size])
    return step, (_zeros(positions.shape, each), _zeros((), sums))


def _with_block(put: Callable[[Array, Array], Array], carry: Any, of_block: Any) -> Any:
    """`carry` (arrays of all positions, and sums) with the results of a block put in and added."""
    with jax.named_scope("sum_over_blocks"):
        sums = jax.tree.map(jnp.add, carry[1], of_block[1])
    return jax.tree.map(put, carry[0], of_block[0]), sums


def _zeros(leading: tuple[int, ...], like: Any) -> Any:
    return jax.tree.map(lambda a: cast(jnp.zeros((*leading, *a.shape[len(leading) :]), a.dtype), varying(a)), like)
