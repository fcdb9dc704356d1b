"""The sweep over arrays that may be sharded, under any mesh or none."""

from typing import Any

import jax
from jax.sharding import AxisType

from jxent._core.shards import each_shards_own
from jxent._mesh.auto import swept_by_compiler
from jxent._mesh.device import axes_in_step
from jxent._mesh.explicit import axes_in_use, mapped_axes, swept_by_types
from jxent._sweep.block import Gradients, Inputs, Sweep, Swept
from jxent._sweep.sweep import Coefficients, swept


def sharded(sweep: Sweep, wrt: tuple[str, ...], inputs: Inputs, coefficients: Coefficients) -> tuple[Swept, Gradients]:
    """`swept` for arrays that may be sharded."""
    mesh = _mesh_of((inputs, coefficients))
    if AxisType.Explicit in mesh.axis_types:
        out, gradients = swept_by_types(mesh, sweep, wrt, inputs, coefficients)
    elif sweep.objective.shards.axis_name or mesh.manual_axes:
        others = mapped_axes(mesh) if mesh.manual_axes else None
        out, gradients = swept(sweep, wrt, inputs, coefficients, axes_in_step(sweep.objective.shards, others))
    else:
        out, gradients = swept_by_compiler(sweep, wrt, inputs, coefficients)
    return each_shards_own(out, sweep.objective.shards, inputs.class_offset), gradients


def covers_its_mesh(*arrays: Any) -> bool:
    """Whether `sharded` uses no `shard_map` for arrays sharded like these, or one over all axes of their mesh."""
    mesh = _mesh_of(arrays)
    return AxisType.Explicit not in mesh.axis_types or set(axes_in_use(arrays)) in (set(), {*mesh.axis_names})


def _mesh_of(arrays: Any) -> Any:
    """The mesh in the arrays' types. If it has `Explicit` axes, some arrays may be on it and others on no mesh."""
    meshes = [jax.typeof(a).sharding.mesh for a in jax.tree.leaves(arrays)]
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), meshes[0])
