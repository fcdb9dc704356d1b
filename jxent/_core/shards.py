"""Classes and positions in shards: reductions over named axes of a mesh, and what they mean to a gradient.

An axis name is a tuple of axes of `jax.shard_map` or `jax.vmap`. It is empty where nothing is sharded, and every
function here is then the identity. All shards of the classes have one size, and they lie along the axes in order.

JAX differentiates the sum, over all devices, of what each device returns. So where all devices return the same number,
each of them has a cotangent of its own for it, and what the number was computed from gets the sum of these cotangents.
Under the replication check of `jax.shard_map` the type of the number says that it is the same on all devices, and it
has one cotangent.
"""

import typing
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

T = TypeVar("T")
Maybe = TypeVar("Maybe", Array, Array | None)


class Shards(NamedTuple):
    """The shards of the classes. Static, because a rule's backward pass may run where the axes are out of scope."""

    axis_name: tuple = ()
    number: int = 1
    checked: bool = True  # whether types say what is the same on every shard


def shards_of(axis_name):
    return Shards(axis_name, lax.axis_size(axis_name), bool(checked(axis_name))) if axis_name else Shards()


def total(values, axis_name):
    """The sum over the shards."""
    return lax.psum(values, axis_name) if axis_name else values


def largest(values, axis_name):
    return lax.pmax(values, axis_name) if axis_name else values


def smallest(values, axis_name):
    return lax.pmin(values, axis_name) if axis_name else values


def first_class(shards, classes):
    """The global index of the first of this shard's `classes` classes; None where the classes are not sharded."""
    return lax.axis_index(shards.axis_name) * classes if shards.axis_name else None


def local_index(labels, first):
    """Global class indices counted from this shard's first class; those of other shards are out of its range."""
    return labels if first is None else labels - first.astype(labels.dtype)


def each_shards_own(values, shards, first):
    """Values that all shards share, as values of each shard: `shared_cotangent` then has a cotangent from each."""
    if shards.checked:
        return values
    return jax.tree.map(lambda v: jnp.where(first >= 0, v, v), values)


def shared_cotangent(cotangents, shards):
    """The cotangents of values that all shards share: the sums of the shards' cotangents."""

    def axes(cotangent):
        if not shards.checked:
            return shards.axis_name
        return tuple(a for a in shards.axis_name if a in varying(cotangent))

    return jax.tree.map(lambda c: total(c, axes(c)), cotangents)


# --- what types say of an array ---------------------------------------------------------------------------------------


def mesh_in_use(*arrays):
    """The mesh of `jax.set_mesh`, or else one that the arrays' types know; an empty one where there is none."""
    meshes = jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def varying(array) -> frozenset:
    """The axes of `shard_map` along which an array, or what `jax.eval_shape` returns, differs, if that is checked."""
    if array is None:
        return frozenset()
    kind = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    if not hasattr(kind, "manual_axis_type"):  # JAX before 0.10
        return frozenset(getattr(kind, "vma", None) or ())
    return frozenset() if kind.manual_axis_type is None else kind.manual_axis_type.varying


def checked(axis_name):
    """The axes of `axis_name` whose replication is checked: all or none."""
    return varying(lax.axis_index(axis_name)) if axis_name else frozenset()


def varying_together(*arrays, axis_name=()):
    """The axes along which any of the arrays varies, and those of `axis_name`."""
    return frozenset().union(checked(axis_name), *map(varying, arrays))


def cast(array, axes):
    """`array`, if it is replicated over some of these axes, as one that varies along them; None for None.

    A custom gradient must vary as its argument does; the transpose of this cast sums the gradient over the axes.
    """
    missing = frozenset(axes) - varying(array)
    for of_one_kind in _of_one_kind(array, missing) if missing else ():
        array = lax.pcast(array, of_one_kind, to="varying")
    return array


def _of_one_kind(array, axes):
    """Axes along which an array does not vary, in tuples that `lax.pcast` takes: those over which it is `reduced`."""
    kind = None if array is None else getattr(jax.typeof(array), "manual_axis_type", None)
    reduced = axes & getattr(kind, "reduced", frozenset())
    return [tuple(some) for some in (reduced, axes - reduced) if some]


def cast_alike(shards, labels, of_classes, of_positions) -> tuple[typing.Any, typing.Any, typing.Any]:
    """(`labels`, `of_classes`, `of_positions`), all cast to vary along the axes along which any of them varies.

    Arrays with one entry for each position, such as class indices, stay the same on every shard of the classes.
    """
    leaves = jax.tree.leaves((labels, of_classes, of_positions))
    axes = varying_together(*leaves, axis_name=shards.axis_name)
    positional = axes - frozenset(shards.axis_name)
    if labels is not None:
        labels = cast(labels, positional if jnp.issubdtype(labels.dtype, jnp.integer) else axes)
    of_classes = jax.tree.map(partial(cast, axes=axes), of_classes)
    return labels, of_classes, jax.tree.map(partial(cast, axes=positional), of_positions)


def sharded_like(array: Maybe, other: Array, axes: list[int] | None = None) -> Maybe:
    """`array`, whose axes are these of `other` (None for all), sharded as they are; None for None.

    Only along `Explicit` mesh axes: there arrays that meet must be sharded alike, and the type of `other` says how.
    """
    if array is None or AxisType.Explicit not in jax.typeof(other).sharding.mesh.axis_types:
        return array
    entries = partitions(other)
    spec = PartitionSpec(*(entries if axes is None else (entries[a] for a in axes)))
    return jax.sharding.reshard(array, NamedSharding(jax.typeof(other).sharding.mesh, spec))


def partitions(array):
    """The mesh axes of each axis of an array, as its type says: a name, a tuple of names, or None."""
    spec = jax.typeof(array).sharding.spec
    return spec.partitions if reduced_axes(array) else tuple(spec)


def reduced_axes(array):
    """The `Explicit` mesh axes over which the type of an array says that its gradient is not to be summed."""
    return getattr(jax.typeof(array).sharding.spec, "reduced", frozenset())


def not_reduced(array: Maybe) -> Maybe:
    """`array` as one whose gradient is summed: any operation takes it, and the gradient is for the caller to see to."""
    return sharded_like(array, array) if array is not None and reduced_axes(array) else array


def gradient_like(gradient: Maybe, array: Array) -> Maybe:
    """The gradient of `array` sharded as that is, and not summed over its `reduced_axes`; None for None."""
    if gradient is None or not (unsummed := reduced_axes(array)):
        return sharded_like(gradient, array)
    sharding = jax.typeof(array).sharding
    spec = sharding.spec.update(reduced=frozenset(), unreduced=unsummed)
    return jax.sharding.reshard(gradient, NamedSharding(sharding.mesh, spec))


def sharded_as_positions(array, other, axis):
    """`sharded_like` for an array that has all axes of `other` but the class axis."""
    return sharded_like(array, other, [a for a in range(other.ndim) if a != axis])


def sharded_but(array: Maybe, other: Array, axis: int) -> Maybe:
    """`sharded_like` for an array that has another length along one axis, which is not sharded."""
    if array is None or AxisType.Explicit not in jax.typeof(other).sharding.mesh.axis_types:
        return array
    spec = PartitionSpec(*(None if a == axis else entry for a, entry in enumerate(partitions(other))))
    return jax.sharding.reshard(array, NamedSharding(jax.typeof(other).sharding.mesh, spec))


def at_positions(values: Array, index: Array) -> Array:
    """``values[index]`` of an array of one axis; the gradient of `values` is not summed over its `reduced_axes`."""
    spec, sharding = jax.typeof(index).sharding.spec, jax.typeof(values).sharding
    unsummed = reduced_axes(values)
    used = frozenset(a for entry in partitions(index) for a in (entry if isinstance(entry, tuple) else (entry,)))
    if not unsummed or not unsummed <= used:
        return by_compiler(lambda values, index: values[index], spec, not_reduced(values), index)

    def on_each_device(values, index):
        values = cast(values, varying(index))
        return values[index]

    of_values = PartitionSpec(None, reduced=unsummed)
    mesh, axes = sharding.mesh, frozenset(sharding.mesh.explicit_axes)
    values = jax.sharding.reshard(values, NamedSharding(mesh, of_values))
    in_specs = of_values, spec
    return jax.shard_map(on_each_device, mesh=mesh, in_specs=in_specs, out_specs=spec, axis_names=axes)(values, index)


def scaled(array: Array, factor: Array) -> Array:
    """``array * factor``, a scalar factor, of an array that is not summed yet over some `Explicit` mesh axes too."""
    sharding = jax.typeof(array).sharding
    if unsummed := getattr(sharding.spec, "unreduced", frozenset()):
        factor = jax.sharding.reshard(factor, NamedSharding(sharding.mesh, PartitionSpec(reduced=unsummed)))
    return array * factor


def by_compiler(function: Callable[..., T], spec, *arrays) -> T:
    """`function(*arrays)`, which the compiler is to partition even where mesh axes are `Explicit`.

    For what the types of sharded arrays do not allow, though it partitions well. The result is sharded by `spec`.
    """
    meshes = [mesh for a in arrays if AxisType.Explicit in (mesh := jax.typeof(a).sharding.mesh).axis_types]
    if not meshes:
        return function(*arrays)
    mesh = meshes[0]
    by_mesh = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=NamedSharding(mesh, spec))
    return typing.cast(Callable[..., T], by_mesh)(*arrays)
