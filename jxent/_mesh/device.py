"""What one device of a mesh does: the sweep over its shards, and the sums of the gradients over the other devices.

Left to XLA, the loop over blocks may sum the kernel's gradient over the devices in every block, and gather a kernel
whose features are sharded (FSDP) there too. Here a device runs the sweep on its shards. A kernel that is sharded over
an axis of the positions is gathered before; gradients are summed over devices, and scattered again, after. What moves
inside the loop is one number per position and sum over classes.
"""

import math
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jxent._core.passes import on_cpu
from jxent._core.shards import Shards, by_compiler, first_class, total
from jxent._mesh.layout import dimensions, result_dimensions
from jxent._sweep.sweep import swept, swept_shapes


def on_each_device(sweep, asked, sizes, plan, others, inputs, coefficients, cpu=None):
    """`swept` of this device's shards, on a mesh of these axis sizes and by this `Layout`.

    `others` are further axes over which a caller has mapped; None if the compiler shards the shards once more. `cpu` is
    that of `swept`.
    """
    outer = sweep.form.shards  # over which the caller has mapped
    vocab = plan.axes["v"]
    shards = Shards((*outer.axis_name, *vocab), outer.number * math.prod(sizes[a] for a in vocab))
    inputs = inputs._replace(first=first_class(shards, inputs.kernel.shape[sweep.vocab_axis]))
    local = sweep._replace(form=sweep.form._replace(shards=shards))
    if sweep.block_size is not None:
        local = local._replace(block_size=-(-sweep.block_size // math.prod(sizes[a] for a in plan.positions)))
    out, grads = swept(local, asked, inputs, coefficients, in_step(shards, plan.positions, others), cpu)
    sparse = inputs.indices is not None
    return out, {name: _over_devices(sweep, plan, sparse, name, grad) for name, grad in grads.items()}


def in_step(shards, *axes):
    """The axes, of these tuples, whose devices take the same number of blocks, as of `swept`; None if one is None.

    While others sum over the classes of a block, no device may have left the loop. Those that share a position have one
    mask; but a number that is wrong, where a caller's masks differ, is better than a device that waits for ever.
    """
    if None in axes:
        return None
    return tuple(dict.fromkeys(a for of in (shards.axis_name, *axes) for a in of)) if shards.axis_name else ()


def _over_devices(sweep, plan, sparse, name, grad):
    """The sum of a gradient over the devices that have a share of it, each of which keeps what it is to hold.

    It is not summed over axes over which the type of its array says that a caller will do so.
    """
    if name == "labels" and not sparse:
        return grad
    axes = plan.axes["v"] if name in ("hidden", "labels", "hidden_p") else plan.positions
    if name == "temperature":
        axes = (*plan.axes["v"], *plan.positions)
    kernels = {"kernel": (sweep.vocab_axis, ""), "kernel_p": (sweep.vocab_axis_p, "p")}
    if name in kernels:
        vocab_axis, suffix = kernels[name]
        scattered = {1 - vocab_axis: plan.scattered("f", suffix), vocab_axis: plan.scattered("v", suffix)}
        for axis, over in scattered.items():
            if over:
                scatter = partial(lax.psum_scatter, axis_name=over, scatter_dimension=axis, tiled=True)
                # JAX 0.12 cannot lower it where other axes of the mesh are `Explicit`.
                grad = _in_float32(partial(by_compiler, scatter, PartitionSpec(None, None)), grad)
        axes = tuple(a for a in axes if a not in sum(scattered.values(), ()))
    unsummed = tuple(a for a in axes if a in plan.unsummed.get(name, ()))
    grad = _in_float32(partial(total, axis_name=tuple(a for a in axes if a not in unsummed)), grad)
    return lax.pcast(grad, unsummed, to="unreduced") if unsummed else grad


def _in_float32(collective, grad):
    """`collective(grad)`, on a CPU of no less than float32.

    XLA:CPU widens a sum of 16-bit numbers itself, but ends the process if it is over some axes of a mesh and not all.
    """

    def summed(cpu, grad):
        return collective(grad.astype(jnp.float32)).astype(grad.dtype) if cpu else collective(grad)

    return on_cpu(summed, grad) if grad.dtype.itemsize == 2 else collective(grad)


def all_dimensions(sweep, asked, inputs, coefficients):
    """The dimensions of (arguments, results) of `swept`, as of `layout`."""
    arguments = dimensions(sweep.vocab_axis, sweep.vocab_axis_p, inputs, coefficients)
    return arguments, result_dimensions(arguments, *swept_shapes(sweep, asked, inputs))
