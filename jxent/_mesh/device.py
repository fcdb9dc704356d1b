"""The work of one device of a mesh: it sweeps over its shards, and sums gradients with the other devices.

XLA alone might sum the kernel's gradient over the devices in every block of the loop. It might also gather a kernel
whose features are sharded (FSDP) in every block. Here a device runs the sweep on its shards. Before the sweep, it
gathers a kernel that is sharded over an axis of the positions. After the sweep, gradients are summed over devices and
scattered again. Inside the loop, devices exchange one number per position and sum over classes.
"""

import math
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from jxent._backend.backend import Backend
from jxent._backend.platform import by_platform
from jxent._core.shards import AxisNames, Shards, by_compiler, class_offset, total
from jxent._mesh.layout import Layout, dimensions, result_dimensions
from jxent._sweep.block import Gradients, Inputs, Sweep, Swept
from jxent._sweep.sweep import Coefficients, swept, swept_shapes


def on_each_device(
    sweep: Sweep,
    wrt: tuple[str, ...],
    sizes: Mapping[Any, int],
    plan: Layout,
    others: AxisNames | None,
    inputs: Inputs,
    coefficients: Coefficients,
    backend: Backend | None = None,
) -> tuple[Swept, Gradients]:
    """`swept` for this device's shards, on a mesh of these axis sizes and with this `Layout`.

    `others` are further axes over which a caller has mapped; None if the compiler shards the shards once more. `swept`
    explains `backend`.
    """
    outer = sweep.objective.shards  # the shards over which the caller has mapped
    vocab = plan.axes["v"]
    number = outer.number * math.prod(sizes[a] for a in vocab)
    shards = Shards(axis_name=(*outer.axis_name, *vocab), number=number)
    inputs = inputs._replace(class_offset=class_offset(shards, inputs.kernel.shape[sweep.vocab_axis]))
    local = sweep._replace(objective=sweep.objective.on(shards))
    if sweep.block_size is not None:
        local = local._replace(block_size=-(-sweep.block_size // math.prod(sizes[a] for a in plan.positions)))
    together = axes_in_step(shards, plan.positions, others)
    out, gradients = swept(local, wrt, inputs, coefficients, together, backend)
    shares = {"hidden", "hidden_p"}  # each shard of the classes has a share (one term of the sum) of these
    if inputs.labels is not None and inputs.labels.gradient_is_a_share:
        shares.add("labels")
    if sweep.objective.temperature_gradient_is_a_share:
        shares.add("temperature")
    positional = inputs.positional
    return out, {name: _over_devices(sweep, plan, shares, positional, name, each) for name, each in gradients.items()}


def axes_in_step(shards: Shards, *axes: AxisNames | None) -> AxisNames | None:
    """The `in_step` of `swept`: all axes whose devices take the same number of blocks; None if a tuple is None.

    Devices sum over the classes of a block together, so none may leave the loop before the others. Devices that share
    a position should have one mask. If a caller's masks differ, a wrong number is better than a device that waits for
    ever.
    """
    known = [names for names in axes if names is not None]
    if len(known) < len(axes):
        return None
    return tuple(dict.fromkeys(a for names in (shards.axis_name, *known) for a in names)) if shards.axis_name else ()


def _over_devices(
    sweep: Sweep, plan: Layout, shares: Container[str], positional: Container[str], name: str, gradient: Array
) -> Array:
    """The sum of a gradient over the devices that have a share of it; each device keeps its own part of the sum.

    The type of an array may say that the caller sums its gradient over some axes. The sum here leaves out these axes.
    """
    if name in positional and name not in shares:
        return gradient
    axes = (*(plan.axes["v"] if name in shares else ()), *(() if name in positional else plan.positions))
    kernels = {"kernel": (sweep.vocab_axis, ""), "kernel_p": (sweep.vocab_axis_p, "p")}
    if name in kernels:
        vocab_axis, suffix = kernels[name]
        scattered = {1 - vocab_axis: plan.scattered("f", suffix), vocab_axis: plan.scattered("v", suffix)}
        for axis, over in scattered.items():
            if over:
                scatter = partial(lax.psum_scatter, axis_name=over, scatter_dimension=axis, tiled=True)
                # JAX 0.12 cannot lower `psum_scatter` by itself if other axes of the mesh are `Explicit`.
                gradient = _collective(partial(by_compiler, scatter, PartitionSpec(None, None)), gradient)
        axes = tuple(a for a in axes if a not in sum(scattered.values(), ()))
    unsummed = tuple(a for a in axes if a in plan.unsummed.get(name, ()))
    gradient = _collective(partial(total, axis_name=tuple(a for a in axes if a not in unsummed)), gradient)
    return lax.pcast(gradient, unsummed, to="unreduced") if unsummed else gradient


def _collective(function: Callable[[Array], Array], gradient: Array) -> Array:
    """``function(gradient)``, in the dtype in which the platform adds up over devices."""

    def in_dtype(dtype: jnp.dtype, gradient: Array) -> Array:
        return function(gradient.astype(dtype)).astype(gradient.dtype)

    return by_platform(lambda backend: backend.dtype_over_devices(gradient.dtype), in_dtype, gradient)


def all_dimensions(
    sweep: Sweep, wrt: tuple[str, ...], inputs: Inputs, coefficients: Coefficients
) -> tuple[tuple[Inputs, Any], tuple[Any, Any]]:
    """The dimensions of (arguments, results) of `swept`, by the names that `_mesh.layout` explains."""
    arguments = dimensions(sweep.vocab_axis, sweep.vocab_axis_p, inputs, coefficients)
    return arguments, result_dimensions(arguments, *swept_shapes(sweep, wrt, inputs))
