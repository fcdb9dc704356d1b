"""A loss whose arrays are sharded as a caller's `axis_name` and `batch_axis_name` say, over axes of the mesh in use.

While the loss is traced these mesh axes are `Explicit`: the types of arrays say how they are sharded, the compiler has
nothing to decide, and a sweep is a `jax.shard_map` (`_mesh.explicit`).
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

from jxent._core.shards import partitions, reduced_axes
from jxent._loss.jitted import jitted

CLASSES = "classes"


class Placement(NamedTuple):
    """The mesh axes for the classes, and for each axis of the positions. Static."""

    mesh: AbstractMesh
    classes: tuple[Hashable, ...]
    positions: tuple[tuple[Hashable, ...], ...]

    @property
    def axes(self):
        return (*self.classes, *sum(self.positions, ()))

    def spec(self, array: Array | None, dimensions) -> PartitionSpec | None:
        """`dimensions` says what each axis of the array is: `CLASSES`, the number of an axis of the positions, or None.

        An array of fewer axes has the last of them; one of length 1 is broadcast. Mesh axes that are not named, and
        `Explicit` already, shard what they did.
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


def placed(name: str, placement: Placement | None, function: Callable, static: tuple, arrays: tuple, dimensions) -> Any:
    """`function(*static, *arrays)`, of arrays that are sharded by the `Placement`, or as they are if there is none.

    It is `jitted` under the name of the public function. `dimensions`, as of `Placement.spec`, has a tuple in the place
    of each array, also of one that is None.
    """
    if placement is None:
        return jitted(name, function, tuple(range(len(static))))(*static, *arrays)
    specs = jax.tree.map(placement.spec, arrays, dimensions, is_leaf=lambda array: array is None)
    leaves, tree = jax.tree.flatten(arrays)
    of_leaves = jitted(name, _placed, (0, 1, 2, 3, 4))
    return of_leaves(placement, function, static, tree, tuple(jax.tree.leaves(specs)), *leaves)


def _placed(placement, function, static, tree, specs, *leaves):
    def of_leaves(*leaves):
        return function(*static, *jax.tree.unflatten(tree, leaves))

    with jax.sharding.use_abstract_mesh(placement.mesh):
        return jax.sharding.explicit_axes(of_leaves, axes=placement.axes, in_sharding=specs)(*leaves)
