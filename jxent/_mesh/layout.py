"""Which axes of a mesh shard which dimensions while a device sweeps over its shards, from the arrays' shardings.

Dimensions have names: p0, p1, ... of the positions, h the features of the hidden states, f and v the features and the
vocabulary of the kernel, df and dv those of its gradient, and k the entries of sparse labels. In a divergence hp, fp,
dfp and dvp are those of P, whose kernel has the same v.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from jxent._core.labels import by_index
from jxent._core.shards import partitions
from jxent._sweep.sweep import Inputs


def dimensions(vocab_axis, vocab_axis_p, inputs, coefficients):
    """The dimensions of each array, as a tuple of names in place of it."""
    positions = tuple(f"p{i}" for i in range(inputs.hidden.ndim - 1))
    names = Inputs(
        hidden=(*positions, "h"),
        kernel=("f", "v") if vocab_axis else ("v", "f"),
        bias=("v",),
        labels=positions if by_index(inputs.labels) else (*positions, "v" if inputs.indices is None else "k"),
        class_weight=("v",),
        keep=positions,
        first=(),
        indices=(*positions, "k"),
        temperature=(),
        hidden_p=(*positions, "hp"),
        kernel_p=("fp", "v") if vocab_axis_p else ("v", "fp"),
        bias_p=("v",),
    )
    given = Inputs(*(None if a is None else name for a, name in zip(inputs, names, strict=True)))
    return given, jax.tree.map(lambda _: positions, coefficients)


def result_dimensions(arguments, out, grads):
    """The same for the results of a sweep, with which `out` and `grads` share their structure."""
    inputs, _ = arguments
    names = inputs._asdict() | {"kernel": tuple("d" + name for name in inputs.kernel)}
    if inputs.kernel_p is not None:
        names["kernel_p"] = tuple(_end_of_p(name) for name in inputs.kernel_p)
    return jax.tree.map(lambda _: inputs.hidden[:-1], out), {name: names[name] for name in grads}


def _end_of_p(name):
    """The dimension of the gradient by the kernel of P, for that of the kernel."""
    return "d" + name.removesuffix("p") + "p"


def argument_dimension(name):
    """The dimension of an argument to which that of a gradient belongs; any other is one of an argument."""
    return "v" if name == "dvp" else name.removeprefix("d")


def is_dimensions(value):
    return type(value) is tuple and all(isinstance(name, str) for name in value)


class Layout(NamedTuple):
    """The mesh axes of each dimension, those of positions and vocabulary apart from each other."""

    axes: dict[str, tuple[str, ...]]
    unsummed: Mapping[str, frozenset] = MappingProxyType({})  # axes of positions, by gradient

    @property
    def positions(self):
        return tuple(axis for name, axes in self.axes.items() if name.startswith("p") for axis in axes)

    def scattered(self, name, suffix=""):
        """The axes over which a dimension of a kernel's gradient is sharded, but not that of the kernel."""
        during = self.axes["v" if name == "v" else name + suffix]
        return self.axes["d" + name + suffix][len(during) :]

    def specs(self, tree):
        """Partition specs in place of tuples of names."""
        return jax.tree.map(
            lambda names: PartitionSpec(*(self.axes[name] or None for name in names)), tree, is_leaf=is_dimensions
        )


def layout(sizes, inputs, names):
    """The `Layout` on a mesh of these axis sizes, for the shardings of `hidden` and `kernel`, whose `names` are given.

    Features are gathered: a matmul sums over them. An axis cannot shard positions and vocabulary at once: one that does
    is taken from the smaller array, hidden states or kernel, which is gathered along it.
    """

    def fitting(axes, length):
        """As many of the axes as divide the length."""
        while length % size(axes):
            axes = axes[:-1]
        return axes

    def size(axes, but=()):
        return math.prod(sizes[a] for a in axes if a not in but)

    given, lengths = {}, {}
    for array, dims in ((inputs.hidden, names.hidden), (inputs.kernel, names.kernel)):
        for name, length, entry in zip(dims, array.shape, entries(array), strict=True):
            lengths[name] = length
            given[name] = fitting(tuple(a for a in entry if a in sizes), length)

    positions = {name: given[name] for name in names.hidden[:-1]}
    vocab, both = given["v"], set(given["v"]) & {a for axes in positions.values() for a in axes}
    rows = math.prod(lengths[name] // size(axes, both) for name, axes in positions.items())
    if rows < lengths["v"] // size(vocab, both):
        positions = {name: tuple(a for a in axes if a not in both) for name, axes in positions.items()}
    else:
        vocab = vocab[: min((vocab.index(a) for a in both), default=None)]
    out = Layout({**positions, **dict.fromkeys(("h", "f", "k", "hp", "fp"), ()), "v": vocab})

    # The kernel's gradient, summed over the positions, ends where the kernel came from.
    def ending(before, name):
        during = out.axes[name]
        rest = before[len(during) :] if before[: len(during)] == during else ()
        return during + tuple(a for a in rest if a in out.positions)

    ends = {"d" + name: ending(given[name], name) for name in ("f", "v")}
    if inputs.kernel_p is not None:
        for name, length, entry in zip(names.kernel_p, inputs.kernel_p.shape, entries(inputs.kernel_p), strict=True):
            before = fitting(tuple(a for a in entry if a in sizes), length)
            ends[_end_of_p(name)] = ending(before, name)
    return Layout(out.axes | ends)


def entries(array):
    """The mesh axes of each dimension, as its sharding (or its type's) says."""
    spec = partitions(array) if isinstance(array, jax.Array) else array.sharding.spec
    padded = [*spec, *[None] * (len(array.shape) - len(spec))]
    return [entry if isinstance(entry, tuple) else () if entry is None else (entry,) for entry in padded]
