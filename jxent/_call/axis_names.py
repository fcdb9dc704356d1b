"""`axis_name` and `batch_axis_name`: the axes that shard classes and positions, checked at trace time as in `checks`.

Inside `jax.shard_map` or `jax.vmap(..., axis_name=...)` they name axes in scope, and arrays are one device's shards.
Elsewhere they name axes of the mesh in use, and arrays are whole; the loss shards these arrays through `placement`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

from jxent._call.checks import shown
from jxent._call.placement import Placement
from jxent._core.shards import Shards, checked, mesh_in_use, shards_of, varying

NAMES = tuple[Hashable, ...]


class Sharded(NamedTuple):
    """An argument that an axis name shards, and those of the argument's axes that may be sharded."""

    name: str
    array: Array
    axes: Sequence[int]


class Over(NamedTuple):
    """The axes that shard classes and positions: axes in scope, and axes of the mesh in use."""

    shards: Shards = Shards()
    batch: NAMES = ()
    placement: Placement | None = None


def mesh_axes(
    function: str,
    axis_name: Any,
    classes: Sharded,
    batch_axis_name: Any = None,
    positions: Sharded | None = None,
    reduction: Any = "mean",
) -> Over:
    """The axes as `Over`. If a name comes without a spec, it shards the first axis of `classes` or `positions`.

    A `reduction` of None stands for a function that is no loss.
    """
    of_classes = _entries(function, "axis_name", axis_name)
    of_positions = _entries(function, "batch_axis_name", batch_axis_name)
    axes, batch = sum(of_classes, ()), sum(of_positions, ())
    if set(axes) & set(batch):
        raise ValueError(
            f"{function}: axis_name and batch_axis_name must name different axes, got {axis_name!r} and "
            f"{batch_axis_name!r}"
        )
    shards = Shards()
    if _in_scope(function, "axis_name", axis_name, axes, classes):
        shards, of_classes = shards_of(axes), ()
    if not _in_scope(function, "batch_axis_name", batch_axis_name, batch, positions):
        batch = ()
    elif reduction in ("none", None):
        raise ValueError(
            f"{function}: batch_axis_name={batch_axis_name!r} is for a mean or sum over the positions of all shards; "
            + (
                'reduction="none" takes none'
                if reduction
                else "leave it out inside jax.shard_map, as there is none here"
            )
        )
    else:
        of_positions = ()
    if not any((*of_classes, *of_positions)):
        return Over(shards=shards, batch=batch)
    mesh = mesh_in_use(*(argument.array for argument in (positions, classes) if argument is not None))
    for name, value, entries, argument in (
        ("axis_name", axis_name, of_classes, classes),
        ("batch_axis_name", batch_axis_name, of_positions, positions),
    ):
        if any(entries):
            _check_names(function, name, value, entries, argument, mesh)
    placement = Placement(mesh=mesh, classes=sum(of_classes, ()), positions=of_positions)
    return Over(shards=shards, batch=batch, placement=placement)


def loss_axes(
    function: str, argument: Any, logits: Array, axis: Any, axis_name: Any, batch_axis_name: Any, reduction: Any
) -> Over:
    """`mesh_axes` of a loss whose logits, or log-probabilities, have the axes of both classes and positions."""
    positions = [a for a in range(logits.ndim) if a != axis]
    classes, positions = (Sharded(name=argument, array=logits, axes=axes) for axes in ((axis,), positions))
    return mesh_axes(function, axis_name, classes, batch_axis_name, positions, reduction)


def _entries(function: str, name: str, value: Any) -> tuple[NAMES, ...]:
    """The names for each axis that may be sharded. Without a spec, all names are for the first axis."""
    if value is None:
        return ()
    of_each_axis = isinstance(value, PartitionSpec) and name == "batch_axis_name"
    entries = tuple(_names(entry) for entry in (value if of_each_axis else (value,)))
    axes = sum(entries, ())
    if not all(isinstance(axis, Hashable) and not isinstance(axis, int | PartitionSpec) for axis in axes):
        raise TypeError(f"{function}: {name} must be the name of a mesh axis or a tuple of names, got {shown(value)}")
    if len(set(axes)) < len(axes):
        raise ValueError(f"{function}: {name} must not name an axis twice, got {value!r}")
    return entries


def _names(value: Any) -> NAMES:
    return () if value is None else tuple(value) if isinstance(value, tuple | list) else (value,)


def _in_scope(function: str, name: str, value: Any, axes: NAMES, argument: Any) -> bool:
    """Whether the axes are in scope: all or none. If they are, the argument must be sharded over them."""
    known = [_is_bound(axis) for axis in axes]
    if not all(known):
        if any(known):
            raise ValueError(
                f"{function}: {name}={value!r} names axes in scope of jax.shard_map or jax.vmap and others that are "
                "not; give all of them, or none, to jax.shard_map"
            )
        return False
    if not axes:
        return False
    missing = checked(axes) - varying(argument.array)
    if missing:
        raise ValueError(
            f"{function}: {argument.name} must be sharded over {name}={value!r}, got the same array all along "
            f"{sorted(map(str, missing))}; name the axis in its spec in in_specs of jax.shard_map"
        )
    return True


def _is_bound(axis: Any) -> bool:
    try:
        jax.lax.axis_size(axis)
    except NameError:
        return False
    return True


def _axes_of_older_mesh() -> NAMES:
    """The axes of the mesh of ``with mesh:``, which JAX shows only to sharding constraints; () without such a mesh."""
    try:
        program = jax.make_jaxpr(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()))(0.0)
    except RuntimeError:  # JAX found no mesh
        return ()
    return program.eqns[0].params["sharding"].mesh.axis_names


def _check_names(
    function: str, name: str, value: Any, entries: tuple[NAMES, ...], argument: Any, mesh: AbstractMesh
) -> None:
    """The mesh in use must have these axes, and their sizes must divide the lengths of the argument's axes."""
    if mesh.empty:
        older = _axes_of_older_mesh()
        raise ValueError(
            f"{function}: {name}={value!r} names no axis in scope, and "
            + (
                f'the mesh of "with mesh:", whose axes are {older}, is not seen by arrays that are not on it: write '
                '"with jax.set_mesh(mesh):" instead, or call inside jax.shard_map'
                if older
                else "no mesh is in use: call within jax.set_mesh(mesh), or inside jax.shard_map, or leave it out on "
                "one device"
            )
        )
    unknown = [axis for axis in sum(entries, ()) if axis not in mesh.axis_names]
    if unknown:
        raise ValueError(
            f"{function}: {name}={value!r} names no axis in scope nor of the mesh in use, whose axes are "
            f"{mesh.axis_names}"
        )
    if mesh.manual_axes:
        raise ValueError(
            f"{function}: {name}={value!r} names axes of the mesh inside jax.shard_map over {mesh.manual_axes}; give "
            "them to that jax.shard_map too, in axis_names, or leave them out for the compiler to see to"
        )
    if len(entries) > len(argument.axes):
        what = "classes" if name == "axis_name" else "positions"
        raise ValueError(
            f"{function}: {name}={value!r} is for {len(entries)} axes of the {what}, of which {argument.name} of shape "
            f"{argument.array.shape} has {len(argument.axes)}"
        )
    for axis, names in zip(argument.axes, entries, strict=False):
        devices = math.prod(mesh.shape[name] for name in names)
        if argument.array.shape[axis] % devices:
            raise ValueError(
                f"{function}: {name}={value!r} shards axis {axis} of {argument.name} over {devices} devices, which do "
                f"not divide its length, {argument.array.shape[axis]}, in shape {argument.array.shape}; "
                + (
                    "pad the classes, with logits or a bias of -inf"
                    if name == "axis_name" and argument.name != "tokens"
                    else "pad the positions, with labels of ignore_index, or name fewer axes"
                )
            )
