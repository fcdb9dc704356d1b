"""The sweep on a mesh with `Explicit` axes: a `jax.shard_map` over the axes in the types of the arrays."""

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jxent._core.shards import AxisNames, gradient_like, not_reduced, reduced_axes, sharded_as_positions
from jxent._mesh.device import all_dimensions, axes_in_step, on_each_device
from jxent._mesh.layout import entries, layout
from jxent._sweep.block import Gradients, Inputs, Sweep, Swept
from jxent._sweep.sweep import Coefficients, swept


def mapped_axes(mesh: Any) -> AxisNames | None:
    """The axes of an enclosing `jax.shard_map`; None if the compiler may shard arrays over other axes of this mesh."""
    by_compiler = [a for a in mesh.auto_axes if mesh.shape[a] > 1]
    return None if by_compiler else mesh.manual_axes


def axes_in_use(arrays: Any) -> list[Any]:
    """The axes that shard the arrays. An enclosing `vmap` may have mapped over other explicit axes."""
    return [axis for a in jax.tree.leaves(arrays) for entry in entries(a) for axis in entry]


def swept_by_types(
    mesh: Any, sweep: Sweep, wrt: tuple[str, ...], inputs: Inputs, coefficients: Coefficients
) -> tuple[Swept, Gradients]:
    """`swept` for arrays whose types say how they are sharded."""
    given, inputs = inputs, jax.tree.map(not_reduced, inputs)
    used = axes_in_use((inputs, coefficients))
    others = mapped_axes(mesh)
    if not used:
        with jax.sharding.use_abstract_mesh(mesh):
            out, gradients = swept(sweep, wrt, inputs, coefficients, axes_in_step(sweep.objective.shards, others))
        return out, {name: gradient_like(gradient, given.array(name)) for name, gradient in gradients.items()}
    sizes = {axis: mesh.shape[axis] for axis in used}
    arguments, results = all_dimensions(sweep, wrt, inputs, coefficients)
    plan = layout(sizes, inputs, arguments[0])
    unsummed = {name: reduced_axes(given.array(name)) & {*plan.positions} for name in wrt}
    plan = plan._replace(unsummed=unsummed)

    def reshard(array: Array, spec: PartitionSpec) -> Array:
        return jax.sharding.reshard(array, NamedSharding(mesh, spec))

    in_specs = plan.specs(arguments)
    arrays = jax.tree.map(reshard, (inputs, coefficients), in_specs)
    local = partial(on_each_device, sweep, wrt, sizes, plan, others)
    out_specs, axis_names = plan.specs(results), frozenset(sizes)
    for name, axes in unsummed.items():
        if axes:
            out_specs[1][name] = out_specs[1][name].update(unreduced=axes)
            axis_names = frozenset(mesh.explicit_axes)  # JAX 0.10 then needs all of them
    shards = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axis_names)
    out, gradients = shards(*arrays)
    out = jax.tree.map(lambda row: sharded_as_positions(row, inputs.hidden, inputs.hidden.ndim - 1), out)
    return out, {name: gradient_like(gradient, given.array(name)) for name, gradient in gradients.items()}
