"""The sweep on a mesh with `Explicit` axes, which are in the types of the arrays: a `jax.shard_map` over them."""

from functools import partial

import jax
from jax.sharding import NamedSharding

from jxent._core.shards import gradient_like, not_reduced, reduced_axes, sharded_as_positions
from jxent._mesh.device import all_dimensions, in_step, on_each_device
from jxent._mesh.layout import entries, layout
from jxent._sweep.sweep import swept


def mapped_axes(mesh):
    """The axes of a `jax.shard_map` around; None if over others of this mesh the compiler may have sharded arrays."""
    by_compiler = [a for a in mesh.auto_axes if mesh.shape[a] > 1]
    return None if by_compiler else mesh.manual_axes


def axes_in_use(arrays):
    """Not all of the explicit axes: over some an enclosing `vmap` may have mapped."""
    return [axis for a in jax.tree.leaves(arrays) for entry in entries(a) for axis in entry]


def swept_by_types(mesh, sweep, asked, inputs, coefficients):
    """`swept`, of arrays whose types say how they are sharded."""
    given, inputs = inputs, jax.tree.map(not_reduced, inputs)
    used = axes_in_use((inputs, coefficients))
    others = mapped_axes(mesh)
    if not used:
        with jax.sharding.use_abstract_mesh(mesh):
            out, grads = swept(sweep, asked, inputs, coefficients, in_step(sweep.form.shards, others))
        return out, {name: gradient_like(grad, getattr(given, name)) for name, grad in grads.items()}
    sizes = {axis: mesh.shape[axis] for axis in used}
    arguments, results = all_dimensions(sweep, asked, inputs, coefficients)
    plan = layout(sizes, inputs, arguments[0])
    unsummed = {name: reduced_axes(getattr(given, name)) & {*plan.positions} for name in asked}
    plan = plan._replace(unsummed=unsummed)

    def reshard(array, spec):
        return jax.sharding.reshard(array, NamedSharding(mesh, spec))

    in_specs = plan.specs(arguments)
    arrays = jax.tree.map(reshard, (inputs, coefficients), in_specs)
    local = partial(on_each_device, sweep, asked, sizes, plan, others)
    out_specs, axis_names = plan.specs(results), frozenset(sizes)
    for name, axes in unsummed.items():
        if axes:
            out_specs[1][name] = out_specs[1][name].update(unreduced=axes)
            axis_names = frozenset(mesh.explicit_axes)  # JAX 0.10 wants all of them then
    out, grads = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axis_names)(*arrays)
    out = jax.tree.map(lambda row: sharded_as_positions(row, inputs.hidden, row.ndim), out)
    return out, {name: gradient_like(grad, getattr(given, name)) for name, grad in grads.items()}
