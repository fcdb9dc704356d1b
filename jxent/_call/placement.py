"""A loss whose arrays are sharded over axes of the mesh in use, which `axis_name` and `batch_axis_name` name.

While the loss is traced, these mesh axes are `Explicit`: the types of arrays say how they are sharded. The compiler
decides nothing, and a sweep (a loop over blocks of positions) is a `jax.shard_map` (`_mesh.explicit`).
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

from jxent._call.jitted import jitted
from jxent._core.shards import partitions, reduced_axes

CLASSES = "classes"


class Placement(NamedTuple):
    """The mesh axes for the classes, and for each axis of the positions. Static."""

    mesh: AbstractMesh
    classes: tuple[Hashable, ...]
    positions: tuple[tuple[Hashable, ...], ...]

    @property
    def axes(self) -> tuple[Any, ...]:
        return (*self.classes, *sum(self.positions, ()))

    def spec(self, array: Array | None, dimensions: Any) -> PartitionSpec | None:
        """The spec of an array. `dimensions` has for each axis `CLASSES`, the number of a positions' axis, or None.

        If the array has fewer axes, it has the last ones of `dimensions`. The placement does not shard an axis of
        length 1, which is broadcast. If other mesh axes are `Explicit` already, they shard the same axes as before.
        """
        if array is None:
            return None
        names = {CLASSES: self.classes, **dict(enumerate(self.positions))}
        before = partitions(array)
        entries = []
        for axis, dimension in enumerate(dimensions[len(dimensions) - array.ndim :]):
            entry = before[axis] if isinstance(before[axis], tuple) else (before[axis],)
            others = tuple(name for name in entry if name is not None and name not in self.axes)
            entries.append((*others, *(names.get(dimension, ()) if array.shape[axis] > 1 else ())) or None)
        spec = PartitionSpec(*entries)
        return spec.update(reduced=unsummed) if (unsummed := reduced_axes(array)) else spec


def placed(
    name: str,
    placement: Placement | None,
    function: Callable[..., Any],
    static: tuple[Any, ...],
    arrays: Any,
    dimensions: Any,
) -> Any:
    """`function(*static, *arrays)`, with arrays sharded by the `Placement`, or left as they are if it is None.

    The function is `jitted` under the name of the public function. `dimensions` has a tuple in the place of each array
    (even of None), which `Placement.spec` explains.
    """
    if placement is None:
        return jitted(name, function, tuple(range(len(static))))(*static, *arrays)
    specs = jax.tree.map(placement.spec, arrays, dimensions, is_leaf=lambda array: array is None)
    leaves, tree = jax.tree.flatten(arrays)
    of_leaves = jitted(name, _placed, (0, 1, 2, 3, 4))
    return of_leaves(placement, function, static, tree, tuple(jax.tree.leaves(specs)), *leaves)


def _placed(
    placement: Placement,
    function: Callable[..., Any],
    static: tuple[Any, ...],
    tree: Any,
    specs: tuple[Any, ...],
    *leaves: Array,
) -> Any:
    def of_leaves(*leaves: Array) -> Any:
        return function(*static, *jax.tree.unflatten(tree, leaves))

    with jax.sharding.use_abstract_mesh(placement.mesh):
        return jax.sharding.explicit_axes(of_leaves, axes=placement.axes, in_sharding=specs)(*leaves)
