"""The sweep over arrays that may be sharded, under whatever mesh is in use."""

import jax
from jax import Array
from jax.sharding import AxisType

from jxent._core.shards import each_shards_own
from jxent._mesh.auto import swept_by_compiler
from jxent._mesh.device import in_step
from jxent._mesh.explicit import axes_in_use, mapped_axes, swept_by_types
from jxent._sweep.sweep import Swept, swept


def sharded(sweep, asked, inputs, coefficients) -> tuple[Swept, dict[str, Array]]:
    """`swept` of arrays that may be sharded."""
    mesh = _mesh_of((inputs, coefficients))
    if AxisType.Explicit in mesh.axis_types:
        out, grads = swept_by_types(mesh, sweep, asked, inputs, coefficients)
    elif sweep.form.shards.axis_name or mesh.manual_axes:
        others = mapped_axes(mesh) if mesh.manual_axes else None
        out, grads = swept(sweep, asked, inputs, coefficients, in_step(sweep.form.shards, others))
    else:
        out, grads = swept_by_compiler(sweep, asked, inputs, coefficients)
    return each_shards_own(out, sweep.form.shards, inputs.first), grads


def covers_its_mesh(*arrays):
    """Whether `sharded` takes no `shard_map` for arrays sharded as these are, or one over all axes of their mesh."""
    mesh = _mesh_of(arrays)
    return AxisType.Explicit not in mesh.axis_types or set(axes_in_use(arrays)) in (set(), {*mesh.axis_names})


def _mesh_of(arrays):
    """That of the types: where it has `Explicit` axes, some arrays may be on it and others on none."""
    meshes = [jax.typeof(a).sharding.mesh for a in jax.tree.leaves(arrays)]
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), meshes[0])
