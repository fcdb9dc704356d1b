"""The axes of a mesh that shard each dimension while a device sweeps over its shards, from the arrays' shardings.

Dimensions have names. p0, p1, ... are those of the positions, and h is that of the hidden states' features. f and v are
the features and the vocabulary of the kernel, df and dv those of its gradient. k is that of a few classes of each
position, as in sparse labels. In a divergence, hp, fp, dfp and dvp are the dimensions of P, whose kernel has the same
v.
"""

import math
from collections.abc import Container, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import PartitionSpec

from jxent._core.shards import partitions
from jxent._sweep.block import Inputs

Dimensions = tuple[str, ...]


def dimensions(
    vocab_axis: int, vocab_axis_p: int, inputs: Inputs, coefficients: dict[str, Array]
) -> tuple[Inputs, dict[str, Dimensions]]:
    """The dimensions of each array, as a tuple of names in the array's place."""
    positions = tuple(f"p{i}" for i in range(inputs.hidden.ndim - 1))
    names: dict[str, Any] = {
        "hidden": (*positions, "h"),
        "kernel": ("f", "v") if vocab_axis else ("v", "f"),
        "bias": ("v",),
        "labels": None if inputs.labels is None else inputs.labels.dimensions(positions, (*positions, "v"), "k"),
        "class_weight": ("v",),
        "mask": positions,
        "class_offset": (),
        "temperature": positions if "temperature" in inputs.positional else (),
        "hidden_p": (*positions, "hp"),
        "kernel_p": ("fp", "v") if vocab_axis_p else ("v", "fp"),
        "bias_p": ("v",),
        "indices": (*positions, "k"),
        "rows": None if inputs.rows is None else dict.fromkeys(inputs.rows, positions),
    }
    there: dict[str, Any] = {name: None if array is None else names[name] for name, array in inputs._asdict().items()}
    return Inputs(**there), jax.tree.map(partial(_of_result, positions), coefficients)


def _of_result(positions: Dimensions, array: Any) -> Dimensions:
    """The dimensions of a cost, its coefficient or the prediction: those of the positions, and perhaps of entries."""
    return (*positions, "k")[: len(array.shape)]


def result_dimensions(arguments: tuple[Inputs, Any], out: Any, gradients: dict[str, Any]) -> tuple[Any, Any]:
    """The dimensions of a sweep's results; `out` and `gradients` have the structure of these results."""
    inputs, _ = arguments
    names: dict[str, Any] = {name: inputs.array(name) for name in gradients}
    if "kernel" in names:
        names["kernel"] = tuple("d" + name for name in names["kernel"])
    if "kernel_p" in names:
        names["kernel_p"] = tuple(_end_of_p(name) for name in names["kernel_p"])
    hidden: Any = inputs.hidden
    return jax.tree.map(partial(_of_result, hidden[:-1]), out), names


def _end_of_p(name: str) -> str:
    """The name of a dimension of the gradient by the kernel of P, from the name in the kernel."""
    return "d" + name.removesuffix("p") + "p"


def argument_dimension(name: str) -> str:
    """The dimension of an argument that belongs to a dimension of a gradient; other names stay as they are."""
    return "v" if name == "dvp" else name.removeprefix("d")


def is_dimensions(value: Any) -> bool:
    return type(value) is tuple and all(isinstance(name, str) for name in value)


class Layout(NamedTuple):
    """The mesh axes of each dimension. No axis shards both positions and vocabulary."""

    axes: dict[str, tuple[str, ...]]
    unsummed: Mapping[str, frozenset[Any]] = MappingProxyType({})  # by gradient, axes that the caller sums

    @property
    def positions(self) -> tuple[str, ...]:
        return tuple(axis for name, axes in self.axes.items() if name.startswith("p") for axis in axes)

    def scattered(self, name: str, suffix: str = "") -> tuple[str, ...]:
        """The axes that shard a dimension of a kernel's gradient, but not that dimension of the kernel in the sweep."""
        during = self.axes["v" if name == "v" else name + suffix]
        return self.axes["d" + name + suffix][len(during) :]

    def specs(self, tree: Any) -> Any:
        """The tree with a partition spec in place of each tuple of names."""
        return jax.tree.map(
            lambda names: PartitionSpec(*(self.axes[name] or None for name in names)), tree, is_leaf=is_dimensions
        )


def layout(sizes: Mapping[Any, int], inputs: Inputs, names: Any) -> Layout:
    """The `Layout` on a mesh of these axis sizes, for the shardings of `hidden` and `kernel`, with dimensions `names`.

    Features are gathered, because a matmul sums over them. An axis cannot shard positions and vocabulary at once. If an
    axis does, the smaller of hidden states and kernel is gathered along it.
    """

    def fitting(axes: tuple[Any, ...], length: int) -> tuple[Any, ...]:
        """As many of the axes as divide the length."""
        while length % size(axes):
            axes = axes[:-1]
        return axes

    def size(axes: Iterable[Any], but: Container[Any] = ()) -> int:
        return math.prod(sizes[a] for a in axes if a not in but)

    sharded, lengths = {}, {}
    for array, dims in ((inputs.hidden, names.hidden), (inputs.kernel, names.kernel)):
        for name, length, entry in zip(dims, array.shape, entries(array), strict=True):
            lengths[name] = length
            sharded[name] = fitting(tuple(a for a in entry if a in sizes), length)

    positions = {name: sharded[name] for name in names.hidden[:-1]}
    vocab, both = sharded["v"], set(sharded["v"]) & {a for axes in positions.values() for a in axes}
    rows = math.prod(lengths[name] // size(axes, both) for name, axes in positions.items())
    if rows < lengths["v"] // size(vocab, both):
        positions = {name: tuple(a for a in axes if a not in both) for name, axes in positions.items()}
    else:
        vocab = vocab[: min((vocab.index(a) for a in both), default=None)]
    out = Layout(axes={**positions, **dict.fromkeys(("h", "f", "k", "hp", "fp"), ()), "v": vocab})

    # The kernel's gradient, summed over the positions, ends on the devices that the kernel came from.
    def ending(before: tuple[Any, ...], name: str) -> tuple[Any, ...]:
        during = out.axes[name]
        rest = before[len(during) :] if before[: len(during)] == during else ()
        return during + tuple(a for a in rest if a in out.positions)

    ends = {"d" + name: ending(sharded[name], name) for name in ("f", "v")}
    if inputs.kernel_p is not None:
        for name, length, entry in zip(names.kernel_p, inputs.kernel_p.shape, entries(inputs.kernel_p), strict=True):
            before = fitting(tuple(a for a in entry if a in sizes), length)
            ends[_end_of_p(name)] = ending(before, name)
    return Layout(axes=out.axes | ends)


def entries(array: Any) -> list[tuple[Any, ...]]:
    """The mesh axes of each dimension of an array, from its sharding or its type."""
    spec = partitions(array) if isinstance(array, jax.Array) else array.sharding.spec
    padded = [*spec, *[None] * (len(array.shape) - len(spec))]
    return [entry if isinstance(entry, tuple) else () if entry is None else (entry,) for entry in padded]
