"""The costs of logits that are never held at once: a sweep over blocks of positions, on one device.

The logits of a block are hidden @ kernel + bias. Logits, costs and the sums over blocks are at least float32; what the
backward matmuls round to the operands' dtype is only the gradient of a block's logits. Memory: the logits of a block
and their gradient, and each gradient that is asked for, the kernel's once more in float32 while it is being summed.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jxent._core.costs import CostInputs, Form, steepness, weighs_classes
from jxent._core.forward_mode import in_one_piece
from jxent._core.labels import by_index
from jxent._core.passes import apart, barrier, compute_dtype, given, on_cpu
from jxent._core.rule import costs_bwd, costs_fwd, costs_of_block, counted
from jxent._core.shards import cast, cast_alike, checked, largest, varying
from jxent._core.terms import rounded
from jxent._core.weights import along, only
from jxent._sweep import order
from jxent._sweep.blocks import blocks_of, not_repeated, put, take
from jxent._sweep.matmuls import as_kernel, dot, kernel_gradient, operands_of_block


class Sweep(NamedTuple):
    """The static part of a sweep: the form of the costs, and how to go over the positions."""

    function: str  # the name of the public function, for profiles
    form: Form
    vocab_axis: int
    block_size: int | None  # None for the default
    precision: Any  # as `jax.lax.dot_general` takes it
    vocab_axis_p: int = 1  # of `Inputs.kernel_p`


class Inputs(NamedTuple):
    """Arrays; their gradients, or what `symbolic_zeros` makes of them in a forward rule; None for none."""

    hidden: Any  # (*positions, features)
    kernel: Any  # two axes, that of the vocabulary being `Sweep.vocab_axis`
    bias: Any  # (vocab,)
    labels: Any  # (*positions,) class indices, or (*positions, vocab) class probabilities
    class_weight: Any  # (vocab,), see `CostInputs`
    keep: Any  # (*positions,), False where a position does not count
    first: Any = None  # see `CostInputs`
    indices: Any = None  # (*positions, k), the classes of sparse labels, whose probabilities are `labels`
    temperature: Any = None  # likewise, and the rest for divergences: what else the logits of P are made of
    hidden_p: Any = None
    kernel_p: Any = None
    bias_p: Any = None


class Swept(NamedTuple):
    """What a sweep returns for each position, arrays of the positions' shape."""

    costs: dict[str, Array]  # by name
    prediction: Array | None  # if statistics are wanted


POSITIONAL = ("hidden", "labels", "keep", "indices", "hidden_p")


# --- one block --------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """The output layer of a block, as its matmuls take it."""

    hidden: Array  # 0 where a position does not count
    kernel: Array
    vocab_axis: int
    suffix: str  # of the names of its arrays in `Inputs`

    def logits(self, bias, precision):
        last = self.hidden.ndim - 1
        with jax.named_scope("logits" + self.suffix):
            logits = dot(self.hidden, self.kernel, ((last,), (1 - self.vocab_axis,)), precision)
            if self.hidden.shape[-1] == 1:  # a product that XLA:CPU takes anew in each pass, with another rounding
                logits = rounded(logits, barrier(jnp.ones((), logits.dtype)))
            if bias is None:
                return logits
            dtype = compute_dtype(logits.dtype, bias.dtype)
            return logits.astype(dtype) + given(along(bias, logits.ndim, last, dtype))

    def gradients(self, asked, dlogits, cpu, precision):
        """Those of the hidden states and the kernel that are asked for."""
        g, grads = dlogits.astype(self.hidden.dtype), {}
        if (name := "hidden" + self.suffix) in asked:
            with jax.named_scope(name + "_gradient"):
                grads[name] = dot(g, self.kernel, ((g.ndim - 1,), (self.vocab_axis,)), precision)
        if (name := "kernel" + self.suffix) in asked:
            with jax.named_scope(name + "_gradient"):
                grads[name] = kernel_gradient(self.hidden, g, self.vocab_axis, cpu, precision)
        return grads


def _layers(sweep, inputs, row_keep):
    """(the `_Layer` of the logits, that of P in a divergence or None)."""
    # Selected before the matmul, because in the kernel's gradient 0 * NaN would be NaN.
    hidden, kernel = operands_of_block(only(row_keep, inputs.hidden), inputs.kernel)
    of_q = _Layer(hidden, kernel, sweep.vocab_axis, "")
    if inputs.hidden_p is None:
        return of_q, None
    hidden, kernel = operands_of_block(only(row_keep, inputs.hidden_p), inputs.kernel_p)
    return of_q, _Layer(hidden, kernel, sweep.vocab_axis_p, "_p")


def _block(sweep, asked, cpu, inputs, coefficients):
    """(`Swept`, gradients) of one block, the gradients a dictionary of what is asked for.

    The gradient is that of the costs' sum with these coefficients. Gradients of what all blocks share come in the dtype
    to sum them in, that of the kernel as of `kernel_gradient`. A CPU has room for exponentials.
    """
    row_keep = None if inputs.keep is None else inputs.keep[..., None]
    layer, layer_p = _layers(sweep, inputs, row_keep)
    logits, labels = layer.logits(inputs.bias, sweep.precision), inputs.labels
    if layer_p is not None:
        labels = layer_p.logits(inputs.bias_p, sweep.precision)
    others = inputs.class_weight, row_keep, inputs.first, inputs.temperature, inputs.indices
    of_block = CostInputs(logits, labels, *others)
    if not by_index(labels):
        of_block = counted(of_block)  # the hidden states are selected, but probabilities of what does not count are not
    if asked:
        with jax.named_scope("rows"):
            out, residuals = costs_fwd(sweep.form, cpu, of_block)
    else:
        # Their gradients must vary over a mesh as they do.
        of_classes = of_block.logits, of_block.class_weight, of_block.temperature
        labels, (logits, class_weight, temperature), keep = cast_alike(
            sweep.form.shards, of_block.labels, of_classes, of_block.keep
        )
        of_block = CostInputs(logits, labels, class_weight, keep, inputs.first, temperature, inputs.indices)
        with jax.named_scope("rows"):
            out, residuals = costs_of_block((sweep.form, cpu), of_block), None
    swept = Swept(*jax.tree.map(lambda row: only(inputs.keep, row[..., 0]), out))
    if residuals is None:
        return swept, {}

    to_costs = {name: c[..., None].astype(swept.costs[name].dtype) for name, c in coefficients.items()}
    with jax.named_scope("logits_gradient"):
        to_given = costs_bwd(sweep.form, residuals, to_costs)
    grads = layer.gradients(asked, to_given.logits, cpu, sweep.precision)
    if layer_p is not None:
        grads |= layer_p.gradients(asked, to_given.labels, cpu, sweep.precision)
    for name, field in (("bias", "logits"), ("bias_p", "labels")):
        if name in asked:
            # Once more, for the sum alone: for two uses at once XLA:CPU would write every term of the gradient.
            with jax.named_scope(name + "_gradient"):
                again, _ = barrier(((residuals, to_costs), getattr(to_given, field)))
                terms = apart(getattr(costs_bwd(sweep.form, *again), field))
                grads[name] = jnp.sum(terms, tuple(range(terms.ndim - 1)))
    for name in ("labels", "class_weight", "temperature"):
        if name in asked:
            grads[name] = getattr(to_given, name)
    return swept, grads


# --- all of them ------------------------------------------------------------------------------------------------------


def _storable(name, dtype):
    """The dtype to keep a gradient in until its factor is known.

    That of float16 might not fit into float16. Those of `bias` and `class_weight` are small, and stay as they were
    summed, because they may be summed over devices yet.
    """
    wide = dtype == jnp.float16 or name in ("bias", "class_weight", "temperature", "bias_p")
    return compute_dtype(dtype) if wide else dtype


def _float16_scale(coefficients, labels, class_weight, temperature):
    """What to divide the coefficients by, so that the gradient of the logits neither overflows float16 nor vanishes.

    Its largest entries come to some 2**12 of at most 2**16, so that those of a confident position, 2**-36 times as
    large, are above the smallest, 2**-24. The gradient of the squared normalizer has a factor of 2 (m + log_z), taken
    to be below 2**10, for which its `steepness` stands.
    """
    dtype = compute_dtype(*(c.dtype for c in coefficients.values()))

    def largest_of(name, coefficient):
        size = jnp.max(jnp.abs(coefficient), initial=0).astype(dtype) * steepness(name)
        if class_weight is None or not weighs_classes((name,), labels):
            return size
        return size * jnp.max(jnp.abs(class_weight)).astype(dtype)

    largest = jnp.max(jnp.stack([largest_of(*each) for each in coefficients.items()]))
    if temperature is not None:
        largest /= temperature.astype(dtype)
    least = 2.0**-100  # so that the scale is a normal number of float32, even if nothing has a weight
    return jnp.where(largest < jnp.inf, jnp.maximum(largest, least), 1) / 2**12


LEAST_STEP = {True: 64, False: 256}  # positions of the smallest blocks, by whether it is a CPU


def default_block_size(cpu, asked, positions, classes):
    """Positions, by a budget for the float32 logits. Larger blocks read and write the kernel's gradient less often."""
    of_kernel = "kernel" in asked or "kernel_p" in asked
    least, budget = (256, 64 * 2**20) if cpu else (1024, 2**30) if of_kernel else (512, 2**29)
    sizes = (positions // 4, budget // (4 * classes))
    return max(least, min((size for size in sizes if isinstance(size, int)), default=least))


def swept(sweep, asked, inputs, coefficients, together=None, cpu=None) -> tuple[Swept, dict[str, Array]]:
    """(`Swept`, gradients) as of `_block`, of all positions; the gradients in `_storable` dtypes.

    Where the classes are sharded over `axis_name`, the gradients of `hidden` are this shard's share. `together` is None
    where all positions are computed; of arrays that are one device's, blocks are of those that count, and it names the
    mesh axes, if any, whose devices take as many blocks as the fullest of them. `cpu` is None where the platform is not
    known yet, and both programs are traced.
    """

    def program(together):
        of_platform = partial(_swept, sweep, asked, together)
        return partial(on_cpu, of_platform) if cpu is None else partial(of_platform, cpu)

    plain = program(None)
    return in_one_piece(plain if together is None else program(together), plain, inputs, coefficients)


def swept_shapes(sweep, asked, inputs):
    """The shapes and dtypes of what `swept` returns, by those of the inputs alone: nothing of a block is traced."""

    def array(shape, *dtypes) -> Any:
        return jax.ShapeDtypeStruct(shape, compute_dtype(*dtypes))

    def logits(hidden, kernel, bias):  # as `_Layer.logits` makes them, but for the shape
        return array((), jnp.promote_types(hidden.dtype, kernel.dtype), *([] if bias is None else [bias.dtype]))

    labels, shape = inputs.labels, inputs.hidden.shape[:-1]
    if inputs.hidden_p is not None:
        labels = logits(inputs.hidden_p, inputs.kernel_p, inputs.bias_p)
    others = inputs.class_weight, inputs.keep, inputs.first, inputs.temperature, inputs.indices
    of_block = CostInputs(logits(inputs.hidden, inputs.kernel, inputs.bias), labels, *others)
    prediction: Any = jax.ShapeDtypeStruct(shape, jnp.int32) if sweep.form.stats else None
    grads = {name: getattr(inputs, name) for name in asked}
    return (
        Swept({name: array(shape, of_block.dtype) for name in sweep.form.names}, prediction),
        {name: jax.ShapeDtypeStruct(like.shape, _storable(name, like.dtype)) for name, like in grads.items()},
    )


def _swept(sweep, asked, together, cpu, inputs, coefficients):
    shape, classes = inputs.hidden.shape[:-1], inputs.kernel.shape[sweep.vocab_axis]
    sides = ((inputs.hidden, inputs.kernel), (inputs.hidden_p, inputs.kernel_p))[: 1 if inputs.hidden_p is None else 2]
    default = default_block_size(cpu, asked, math.prod(shape), classes) // len(sides)
    size = sweep.block_size or max(1, default)
    blocks = blocks_of(shape, size) if all(isinstance(length, int) for length in shape) else None
    scale = None
    if asked and jnp.float16 in [jnp.promote_types(hidden.dtype, kernel.dtype) for hidden, kernel in sides]:
        scale = lax.stop_gradient(_float16_scale(coefficients, inputs.labels, inputs.class_weight, inputs.temperature))
        coefficients = jax.tree.map(lambda c: c / scale, coefficients)

    def finished(name, grad):
        # While it is float32 still.
        grad = grad if scale is None else grad * scale
        return grad.astype(_storable(name, getattr(inputs, name).dtype))

    def block(part, weights):
        """((what each position has, its gradients included), the gradients of what all blocks share)."""
        out, grads = _block(sweep, asked, cpu, inputs._replace(**part), weights)
        each = {name: finished(name, grad) for name, grad in grads.items() if name in POSITIONAL}
        return (out, each), {name: grad for name, grad in grads.items() if name not in POSITIONAL}

    arrays = {name: getattr(inputs, name) for name in POSITIONAL}, coefficients
    if blocks is None:
        (out, grads), sums = _blocks_of_symbolic(shape, size, LEAST_STEP[cpu], together, block, arrays)
    elif blocks.number == 1:
        (out, grads), sums = block(*arrays)
    elif together is not None and inputs.keep is not None:
        size = math.prod(blocks.size)
        counted = order.order_of(inputs.keep, size)
        (out, grads), sums = _counted_blocks(counted, size, LEAST_STEP[cpu], together, block, arrays)
    else:
        (out, grads), sums = _all_blocks(blocks, block, arrays)
    for name, vocab_axis in (("kernel", sweep.vocab_axis), ("kernel_p", sweep.vocab_axis_p)):
        if name in sums:
            sums[name] = as_kernel(sums[name], vocab_axis, cpu, blocks is not None and blocks.number == 1)
    return out, grads | {name: finished(name, grad) for name, grad in sums.items()}


def _all_blocks(blocks, block, arrays):
    """What `block` returns, of all blocks: arrays of all positions, and sums over the blocks."""

    def one_block(i):
        part, weights = jax.tree.map(partial(take, blocks, i), arrays)
        repeated = not_repeated(blocks, i)
        if repeated is not None:
            weights = jax.tree.map(lambda c: jnp.where(repeated, c, 0), weights)
        return block(part, weights)

    # The jit traces it once for the shapes and for the loop; a gradient of the loop computes a block again.
    traced_once = jax.jit(jax.checkpoint(one_block, prevent_cse=False), inline=True)

    def step(i, carry):
        return _with_block(partial(put, blocks, i), carry, traced_once(i))

    each, sums = jax.eval_shape(traced_once, 0)
    return lax.fori_loop(0, blocks.number, step, (_zeros(blocks.shape, each), _zeros((), sums)))


def _counted_blocks(counted, size, least_step, together, block, arrays):
    """What `_all_blocks` returns, but of the positions that count, with zeros for the others."""
    counted = counted._replace(counted=largest(cast(counted.counted, checked(together)), together))
    step_size = min(size, max(least_step, size // 8))
    return order.by_blocks(counted, size, step_size, *_by_rows(counted, size, block, arrays))


def _blocks_of_symbolic(shape, size, least_step, together, block, arrays):
    """What `_all_blocks` returns, where only `jax.export.Exported.call` will know how many positions there are."""
    keep, everything = arrays[0]["keep"], order.all_of(shape, size)
    if together is None:
        return order.by_scan(everything, size, *_by_rows(everything, size, block, arrays))
    counted = everything if keep is None else order.order_of(keep, size)
    return _counted_blocks(counted, size, least_step, together, block, arrays)


def _by_rows(counted, size, block, arrays):
    """The step of `order.by_blocks`, and what it begins with."""

    def one_block(rows):
        return block(*jax.tree.map(partial(order.take, counted, rows), arrays))

    traced_once = jax.jit(jax.checkpoint(one_block, prevent_cse=False), inline=True)

    def step(rows, carry):
        return _with_block(partial(order.put, counted, rows), carry, traced_once(rows))

    each, sums = jax.eval_shape(traced_once, counted.rows[:size])
    return step, (_zeros(counted.shape, each), _zeros((), sums))


def _with_block(put, carry, of_block):
    """`carry`, arrays of all positions and sums, with what a block has of them."""
    with jax.named_scope("sum_over_blocks"):
        sums = jax.tree.map(jnp.add, carry[1], of_block[1])
    return jax.tree.map(put, carry[0], of_block[0]), sums


def _zeros(leading, like):
    return jax.tree.map(lambda a: cast(jnp.zeros((*leading, *a.shape[len(leading) :]), a.dtype), varying(a)), like)
