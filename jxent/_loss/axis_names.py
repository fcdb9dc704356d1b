"""`axis_name` and `batch_axis_name`: what a caller may give for them, checked at trace time as in `_checks`."""

from collections.abc import Hashable

import jax
from jax.sharding import PartitionSpec

from jxent._core.shards import checked, shards_of, varying
from jxent._loss.checks import shown

AxisName = Hashable | tuple[Hashable, ...]


def mesh_axis(function, name, value, argument, array):
    """`axis_name` and its like as a tuple of axes in scope, () for None; `array` must be sharded over them."""
    axes = () if value is None else tuple(value) if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(axis, Hashable) and not isinstance(axis, int | PartitionSpec) for axis in axes):
        raise TypeError(f"{function}: {name} must be the name of a mesh axis or a tuple of names, got {shown(value)}")
    if len(set(axes)) < len(axes):
        raise ValueError(f"{function}: {name} must not name an axis twice, got {value!r}")
    for axis in axes:
        try:
            jax.lax.axis_size(axis)
        except NameError as error:
            raise ValueError(
                f"{function}: {name}={value!r} names no axis in scope: it is for calls inside jax.shard_map or "
                "jax.vmap(..., axis_name=...); arrays that are sharded under plain jax.jit need no argument"
            ) from error
    missing = checked(axes) - varying(array)
    if missing:
        raise ValueError(
            f"{function}: {argument} must be sharded over {name}={value!r}, got the same array all along "
            f"{sorted(map(str, missing))}; name the axis in its spec in in_specs of jax.shard_map"
        )
    return axes


def mesh_axes(function, axis_name, batch_axis_name, reduction, positions, classes=None):
    """(`Shards` of `axis_name`, axes of `batch_axis_name`).

    `positions` is (name, array) of the argument that has them, and `classes` that of the one with the classes, if that
    is another one.
    """
    over_classes = mesh_axis(function, "axis_name", axis_name, *(classes or positions))
    over_positions = mesh_axis(function, "batch_axis_name", batch_axis_name, *positions)
    if set(over_classes) & set(over_positions):
        raise ValueError(
            f"{function}: axis_name and batch_axis_name must name different axes, got {axis_name!r} and "
            f"{batch_axis_name!r}"
        )
    if over_positions and reduction == "none":
        raise ValueError(
            f"{function}: batch_axis_name={batch_axis_name!r} is for a mean or sum over the positions of all shards; "
            'reduction="none" takes none'
        )
    return shards_of(over_classes), over_positions
