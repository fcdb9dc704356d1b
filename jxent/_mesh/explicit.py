"""The sweep on a mesh with `Explicit` axes, which are in the types of the arrays: a `jax.shard_map` over them."""

from functools import partial

import jax
from jax.sharding import NamedSharding

from jxent._core.shards import sharded_as_positions, sharded_like
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
    used = axes_in_use((inputs, coefficients))
    others = mapped_axes(mesh)
    if not used:
        with jax.sharding.use_abstract_mesh(mesh):
            return swept(sweep, asked, inputs, coefficients, in_step(sweep.form.shards, others))
    sizes = {axis: mesh.shape[axis] for axis in used}
    arguments, results = all_dimensions(sweep, asked, inputs, coefficients)
    plan = layout(sizes, inputs, arguments[0])

    def reshard(array, spec):
        return jax.sharding.reshard(array, NamedSharding(mesh, spec))

    in_specs = plan.specs(arguments)
    arrays = jax.tree.map(reshard, (inputs, coefficients), in_specs)
    local = partial(on_each_device, sweep, asked, sizes, plan, others)
    out, grads = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=plan.specs(results), axis_names=frozenset(sizes)
    )(*arrays)
    out = jax.tree.map(lambda row: sharded_as_positions(row, inputs.hidden, row.ndim), out)
    return out, {name: sharded_like(grad, getattr(inputs, name)) for name, grad in grads.items()}
