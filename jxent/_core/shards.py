"""Classes and positions in shards: reductions over named axes of a mesh, and their effect on gradients.

An axis name is a tuple of axes of `jax.shard_map` or `jax.vmap`. If nothing is sharded, the tuple is empty, and the
reductions return their argument. All shards of the classes have the same size, and lie along the axes in order.

JAX differentiates the sum of the results of all devices. If all devices return the same number, each device has its own
cotangent for the number, and the gradient takes the sum of these cotangents. With the replication check of
`jax.shard_map`, the type says that the number is the same on all devices, and the number has one cotangent.
"""

import typing
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Int

T = TypeVar("T")
AxisNames = tuple[Hashable, ...]
Maybe = TypeVar("Maybe", Array, Array | None)


class Shards(NamedTuple):
    """The shards of the classes. Static, because JAX may run a rule's backward pass outside of the axes' scope."""

    axis_name: AxisNames = ()
    number: int = 1
    checked: bool = True  # whether types say which arrays are the same on every shard


class ClassAxis(NamedTuple):
    """The class axis of an array, and the range of classes that this shard has."""

    axis: int
    size: int  # of this shard
    shards: Shards
    offset: Int[Array, ""] | None  # the class that this shard begins with; None if the classes are not sharded

    @property
    def number(self) -> int:
        """The number of classes on all shards."""
        return self.size * self.shards.number


def shards_of(axis_name: AxisNames) -> Shards:
    if not axis_name:
        return Shards()
    return Shards(axis_name=axis_name, number=lax.axis_size(axis_name), checked=bool(checked(axis_name)))


def total(values: Array, axis_name: AxisNames) -> Array:
    """The sum over the shards."""
    if varying(values) & {*axis_name}:  # JAX refuses values that vary along some of the axes
        values = cast(values, checked(axis_name))
    return lax.psum(values, axis_name) if axis_name else values


def largest(values: Array, axis_name: AxisNames) -> Array:
    return lax.pmax(values, axis_name) if axis_name else values


def smallest(values: Array, axis_name: AxisNames) -> Array:
    return lax.pmin(values, axis_name) if axis_name else values


def class_offset(shards: Shards, classes: int) -> Int[Array, ""] | None:
    """The global index of the first of this shard's `classes` classes; None if the classes are not sharded."""
    return lax.axis_index(shards.axis_name) * classes if shards.axis_name else None


def local_index(labels: Int[Array, "*shape"], offset: Int[Array, ""] | None) -> Int[Array, "*shape"]:
    """Global class indices, counted from this shard's first class. Classes of other shards are out of range."""
    return labels if offset is None else labels - offset.astype(labels.dtype)


def each_shards_own(values: T, shards: Shards, offset: Int[Array, ""] | None) -> T:
    """The values, equal on all shards, marked as each shard's own. So `shared_cotangent` gets a cotangent from each.

    If replication is not checked, JAX takes a value as different on each shard if any operand is. A selection that
    changes nothing makes the values depend on the shard's class offset, which differs.
    """
    if shards.checked or offset is None:
        return values
    return jax.tree.map(lambda v: jnp.where(offset >= 0, v, v), values)


def shared_cotangent(cotangents: T, shards: Shards) -> T:
    """The cotangents of values that are equal on all shards: the sum over the shards of their cotangents."""

    def axes(cotangent: Array) -> AxisNames:
        if not shards.checked:
            return shards.axis_name
        return tuple(a for a in shards.axis_name if a in varying(cotangent))

    return jax.tree.map(lambda c: total(c, axes(c)), cotangents)


def gradient_of_copies(share: Array, array: Array, shards: Shards) -> Array:
    """The gradient by an array of which every shard has a copy, from this shard's share of the gradient.

    It is the sum of the shares if types say that the copies are equal. Otherwise each copy has its own gradient.
    """
    return total(share, tuple(a for a in shards.axis_name if shards.checked and a not in varying(array)))


# --- the types of arrays ----------------------------------------------------------------------------------------------


def mesh_in_use(*arrays: Array) -> AbstractMesh:
    """The mesh of `jax.set_mesh`, or else the first mesh in the arrays' types, or else an empty mesh."""
    meshes = jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def varying(array: Any) -> frozenset[Hashable]:
    """The axes of `shard_map` along which the type of an array or a `ShapeDtypeStruct` says that it differs."""
    if array is None:
        return frozenset()
    kind = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    if not hasattr(kind, "manual_axis_type"):  # JAX before 0.10
        return frozenset(getattr(kind, "vma", None) or ())
    return frozenset() if kind.manual_axis_type is None else kind.manual_axis_type.varying


def checked(axis_name: AxisNames) -> frozenset[Hashable]:
    """The axes of `axis_name` whose replication is checked: all or none."""
    return varying(lax.axis_index(axis_name)) if axis_name else frozenset()


def varying_together(*arrays: Any, axis_name: AxisNames = ()) -> frozenset[Hashable]:
    """The axes along which any of the arrays varies, and those of `axis_name`."""
    return frozenset().union(checked(axis_name), *map(varying, arrays))


def cast(array: Any, axes: Iterable[Hashable]) -> Any:
    """`array`, with a type that varies along all these axes; None for None.

    A custom gradient must vary along the same axes as its argument. The transpose of this cast sums the gradient over
    the axes that the cast adds.
    """
    missing = frozenset(axes) - varying(array)
    for of_one_kind in _of_one_kind(array, missing) if missing else ():
        array = lax.pcast(array, of_one_kind, to="varying")
    return array


def _of_one_kind(array: Any, axes: frozenset[Hashable]) -> list[AxisNames]:
    """The axes in tuples, because one call of `lax.pcast` takes either `reduced` axes of the array or other axes."""
    kind = None if array is None else getattr(jax.typeof(array), "manual_axis_type", None)
    reduced = axes & getattr(kind, "reduced", frozenset())
    return [tuple(some) for some in (reduced, axes - reduced) if some]


def cast_alike(shards: Shards, labels: Any, of_classes: Any, of_positions: Any) -> tuple[Any, Any, Any]:
    """(`labels`, `of_classes`, `of_positions`), all cast to vary along every axis along which any of them varies.

    Except along the axes of the classes: there `of_positions` and the integer arrays of labels, class indices, stay
    equal on every shard.
    """
    axes = varying_together(*jax.tree.leaves((labels, of_classes, of_positions)), axis_name=shards.axis_name)
    positional = axes - frozenset(shards.axis_name)

    def cast_label(array: Array) -> Array:
        return cast(array, positional if jnp.issubdtype(array.dtype, jnp.integer) else axes)

    labels = jax.tree.map(cast_label, labels)
    of_classes = jax.tree.map(partial(cast, axes=axes), of_classes)
    return labels, of_classes, jax.tree.map(partial(cast, axes=positional), of_positions)


def sharded_like(array: Maybe, other: Any, axes: list[int] | None = None) -> Maybe:
    """`array`, sharded like the `axes` of `other` (None for all axes); None for None.

    This changes only shardings along `Explicit` mesh axes, where JAX requires operands to be sharded alike and the type
    of `other` has the sharding.
    """
    if array is None or AxisType.Explicit not in jax.typeof(other).sharding.mesh.axis_types:
        return array
    entries = partitions(other)
    spec = PartitionSpec(*(entries if axes is None else (entries[a] for a in axes)))
    return jax.sharding.reshard(array, NamedSharding(jax.typeof(other).sharding.mesh, spec))


def broadcast_like(array: Array, other: Array) -> Array:
    """`array`, broadcast to the shape of `other` and sharded like it. Its gradient is summed without a gather."""
    if AxisType.Explicit not in jax.typeof(other).sharding.mesh.axis_types:
        return jnp.broadcast_to(array, other.shape)
    array, mesh = jnp.expand_dims(array, range(other.ndim - array.ndim)), jax.typeof(other).sharding.mesh
    entries = [None if size == 1 else entry for size, entry in zip(array.shape, partitions(other), strict=True)]
    array = jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*entries)))
    sharding = NamedSharding(mesh, PartitionSpec(*partitions(other)))
    return lax.broadcast_in_dim(array, other.shape, range(other.ndim), out_sharding=sharding)


def partitions(array: Any) -> tuple[Any, ...]:
    """The mesh axes of each axis of an array, as its type says: a name, a tuple of names, or None."""
    spec = jax.typeof(array).sharding.spec
    return spec.partitions if reduced_axes(array) else tuple(spec)


def reduced_axes(array: Any) -> frozenset[Hashable]:
    """The `Explicit` mesh axes over which the type of an array says that its gradient is not to be summed."""
    return getattr(jax.typeof(array).sharding.spec, "reduced", frozenset())


def not_reduced(array: Maybe) -> Maybe:
    """`array` without `reduced_axes` in its type, so that any operation takes it. Its gradient is summed."""
    return sharded_like(array, array) if array is not None and reduced_axes(array) else array


def gradient_like(gradient: Maybe, array: Any) -> Maybe:
    """The gradient, sharded like `array` and not summed over the `reduced_axes` of `array`; None for None."""
    if gradient is None or not (unsummed := reduced_axes(array)):
        return sharded_like(gradient, array)
    sharding = jax.typeof(array).sharding
    spec = sharding.spec.update(reduced=frozenset(), unreduced=unsummed)
    return jax.sharding.reshard(gradient, NamedSharding(sharding.mesh, spec))


def sharded_as_positions(array: Array, other: Any, axis: int) -> Array:
    """`sharded_like` for an array with all axes of `other` except `axis`, and perhaps further axes at its end."""
    if AxisType.Explicit not in jax.typeof(other).sharding.mesh.axis_types:
        return array
    entries = [entry for a, entry in enumerate(partitions(other)) if a != axis]
    spec = PartitionSpec(*entries, *[None] * (array.ndim - len(entries)))
    return jax.sharding.reshard(array, NamedSharding(jax.typeof(other).sharding.mesh, spec))


def at_positions(values: Array, index: Array) -> Array:
    """``values[index]`` for values with one axis. Their gradient is not summed over their `reduced_axes`."""
    spec, sharding = jax.typeof(index).sharding.spec, jax.typeof(values).sharding
    unsummed = reduced_axes(values)
    used = frozenset(a for entry in partitions(index) for a in (entry if isinstance(entry, tuple) else (entry,)))
    if not unsummed or not unsummed <= used:
        return by_compiler(lambda values, index: values[index], spec, not_reduced(values), index)

    def on_each_device(values: Array, index: Array) -> Array:
        values = cast(values, varying(index))
        return values[index]

    of_values = PartitionSpec(None, reduced=unsummed)
    mesh, axes = sharding.mesh, frozenset(sharding.mesh.explicit_axes)
    values = jax.sharding.reshard(values, NamedSharding(mesh, of_values))
    in_specs = of_values, spec
    return jax.shard_map(on_each_device, mesh=mesh, in_specs=in_specs, out_specs=spec, axis_names=axes)(values, index)


def scaled(array: Array, factor: Array) -> Array:
    """``array * factor`` with a scalar factor, also for an array not yet summed over some `Explicit` mesh axes."""
    sharding = jax.typeof(array).sharding
    if unsummed := getattr(sharding.spec, "unreduced", frozenset()):
        factor = jax.sharding.reshard(factor, NamedSharding(sharding.mesh, PartitionSpec(reduced=unsummed)))
    return array * factor


def by_compiler(function: Callable[..., T], spec: PartitionSpec, *arrays: Array) -> T:
    """`function(*arrays)`, which the compiler partitions even if mesh axes are `Explicit`.

    Use this for operations that the types of sharded arrays forbid, although they partition well. The result is sharded
    by `spec`.
    """
    meshes = [mesh for a in arrays if AxisType.Explicit in (mesh := jax.typeof(a).sharding.mesh).axis_types]
    if not meshes:
        return function(*arrays)
    mesh = meshes[0]
    by_mesh = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=NamedSharding(mesh, spec))
    return typing.cast(Callable[..., T], by_mesh)(*arrays)
