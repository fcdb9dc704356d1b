"""The sweep over arrays that are sharded over `Auto` axes, as a primitive of its own.

Only the compiler knows how the arrays are sharded. `custom_partitioning` asks the compiler, and each device then sweeps
over its shards. A TPU has no `custom_partitioning` (https://github.com/jax-ml/jax/issues/38196). Its compiler moves
sums and gathers out of the loop by itself, if it is told that features stay together.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jxent._backend.backend import Backend
from jxent._backend.platform import BACKENDS, backend_of
from jxent._core.config import traced_config
from jxent._core.forward_mode import jvp_of_moving, linear, linear_p
from jxent._core.shards import AxisNames, mesh_in_use
from jxent._mesh.device import all_dimensions, on_each_device
from jxent._mesh.layout import Layout, argument_dimension, is_dimensions, layout
from jxent._sweep.block import Gradients, Inputs, Sweep, Swept
from jxent._sweep.sweep import Coefficients, swept, swept_shapes

# The sweep is a primitive, because `custom_partitioning` has no rules for derivatives and `vmap`. The end of this file
# gives the primitive such rules.
_sweep_p = Primitive("sweep")
_sweep_p.multiple_results = True
_sweep_p.is_high = linear_p.is_high


class _Static(NamedTuple):
    """The static part of a call: lowering and partitioning come later, outside of the caller's `with` blocks."""

    sweep: Sweep
    wrt: tuple[str, ...]
    tree: Any  # of (inputs, coefficients)
    mesh: Any  # `mesh_in_use`
    config: Any  # `traced_config`
    moving: tuple[int, ...] | None = None  # leaves with tangents; these follow the leaves, and results are tangents

    def pushed(self, function: Callable[..., list[Array]], arrays: Sequence[Array]) -> list[Array]:
        """``function(*arrays)``, or the tangents of its results."""
        if self.moving is None:
            return function(*arrays)
        number = self.tree.num_leaves
        return jvp_of_moving(function, self.moving, arrays[:number], arrays[number:])[1]


def swept_by_compiler(
    sweep: Sweep, wrt: tuple[str, ...], inputs: Inputs, coefficients: Coefficients
) -> tuple[Swept, Gradients]:
    """`swept` for arrays whose sharding only the compiler knows."""
    arrays, tree = jax.tree.flatten((inputs, coefficients))
    static = _Static(sweep=sweep, wrt=wrt, tree=tree, mesh=mesh_in_use(*arrays), config=traced_config())
    results = jax.tree.structure(swept_shapes(sweep, wrt, inputs))
    return jax.tree.unflatten(results, _bind(static, arrays))


def _bind(static: _Static, arrays: Sequence[Array]) -> list[Array]:
    """The sweep, or its tangents. Blocks are traced when the primitive is lowered, for one platform alone."""
    # The program is a parameter: it shows JAX that the lowering of the primitive depends on the devices.
    return _sweep_p.bind(*arrays, static=static, program=depends_on_devices())


@cache
def depends_on_devices() -> Any:
    """A program whose lowering depends on the devices, as the lowering of a sweep does."""
    f = custom_partitioning(lambda x: x)
    f.def_partition(lambda mesh, arguments, _: (mesh, lambda x: x, arguments[0].sharding, ()), sharding_rule="-> ")
    return jax.make_jaxpr(f)(0.0)


def _plain(
    *arrays: Array,
    static: _Static,
    program: Any = None,
    in_step: AxisNames | None = None,
    backend: Backend | None = None,
) -> list[Array]:
    del program

    def sweep(*arrays: Array) -> list[Array]:
        inputs, coefficients = static.tree.unflatten(arrays)
        return jax.tree.leaves(swept(static.sweep, static.wrt, inputs, coefficients, in_step, backend))

    return static.pushed(sweep, arrays)


def _partitioned(*arrays: Array, static: _Static, backend: Backend) -> list[Array]:
    sweep, wrt, tree = static.sweep, static.wrt, static.tree
    names = all_dimensions(sweep, wrt, *tree.unflatten(arrays[: tree.num_leaves]))
    arguments, results = (jax.tree.leaves(dims, is_leaf=is_dimensions) for dims in names)
    arguments += [arguments[i] for i in static.moving or ()]

    def planned(mesh: Any, arrays: Any) -> tuple[Layout, Any, Any]:
        """(the layout, shardings of the results, shardings of the arguments)."""
        plan = layout(dict(mesh.shape), tree.unflatten(arrays[: tree.num_leaves])[0], names[0][0])
        return plan, *jax.tree.map(partial(NamedSharding, mesh), plan.specs([results, arguments]))

    def partition(mesh: Any, arguments: Any, _: Any) -> Any:
        plan, of_results, of_arguments = planned(mesh, *arguments)

        def on_this_device(*shards: Array) -> list[Array]:
            mine = tree.unflatten(shards)
            return jax.tree.leaves(on_each_device(sweep, wrt, dict(mesh.shape), plan, (), *mine, backend=backend))

        def local(arrays: Any) -> list[Array]:
            # The compiler asks for this program by itself, so the program lacks the names of the scopes around it.
            with static.config(), jax.named_scope(sweep.function):
                return static.pushed(on_this_device, arrays)

        return mesh, local, of_results, (of_arguments,)

    def rule(arrays: Any) -> str:
        # This rule tells the compiler that the kernel's gradient is sharded as the kernel is.
        return ", ".join(" ".join(map(argument_dimension, array)) for array in arrays)

    on_one_device = partial(_plain, static=static, in_step=(), backend=backend)
    f = custom_partitioning(lambda arrays: on_one_device(*arrays))
    f.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, arguments, _: planned(mesh, *arguments)[1],
        sharding_rule=f"{rule(arguments)} -> {rule(results)}",
    )
    return f(list(arrays))


def _by_partitions(*arrays: Array, static: _Static, program: Any, platform: str | None) -> list[Array]:
    del program
    with static.config():
        return _partitioned(*arrays, static=static, backend=backend_of(platform))


def _by_tpu(*arrays: Array, static: _Static, in_step: AxisNames | None) -> list[Array]:
    mesh, kernels = static.mesh, {"kernel": static.sweep.vocab_axis, "kernel_p": static.sweep.vocab_axis_p}

    def whole_features(vocab_axis: int) -> list[Any]:
        return [PartitionSpec.UNCONSTRAINED if a == vocab_axis else None for a in range(2)]

    def constrained(array: Any, spec: Any) -> Any:
        if mesh.empty or array is None:
            return array
        return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))

    # Without these constraints the compiler shards a block's logits by features, if parameters or activations are. It
    # then sums or gathers the kernel or its gradient in every block.
    def sweep(*arrays: Array) -> list[Array]:
        inputs, coefficients = static.tree.unflatten(arrays)
        of_hidden = [*[PartitionSpec.UNCONSTRAINED] * (inputs.hidden.ndim - 1), None]
        of_kernels = {name: whole_features(vocab_axis) for name, vocab_axis in kernels.items()}
        specs = {"hidden": of_hidden, "hidden_p": of_hidden, **of_kernels}
        whole = {name: constrained(getattr(inputs, name), spec) for name, spec in specs.items()}
        inputs, backend = inputs._replace(**whole), backend_of("tpu")
        out, grads = swept(static.sweep, static.wrt, inputs, coefficients, in_step, backend)
        for name in of_kernels.keys() & grads.keys():
            grads[name] = constrained(grads[name], of_kernels[name])
        return jax.tree.leaves((out, grads))

    with static.config():
        return static.pushed(sweep, arrays)


def _lower_for_tpu(context: Any, *arrays: Any, static: _Static, program: Any) -> Any:
    del program
    # On several devices the compiler would gather all positions to put the unmasked ones in order.
    devices = getattr(context.module_context.axis_context, "num_devices", None)
    by_tpu = partial(_by_tpu, static=static, in_step=() if devices == 1 else None)
    return mlir.lower_fun(by_tpu, multiple_results=True)(context, *arrays)


def _abstract(*arrays: Any, static: _Static, program: Any) -> list[ShapedArray]:
    del program
    inputs, _ = static.tree.unflatten(arrays[: static.tree.num_leaves])
    types = [ShapedArray(a.shape, a.dtype) for a in jax.tree.leaves(swept_shapes(static.sweep, static.wrt, inputs))]
    return types if static.moving is None else [type.to_tangent_aval() for type in types]


def _batched(arrays: Any, axes: Any, *, static: _Static, program: Any) -> tuple[Any, list[int]]:
    del program
    out = jax.vmap(partial(_plain, static=static), tuple(axes))(*arrays)
    return out, [0] * len(out)


# The tangents of a sweep are a sweep, too. Their own tangents, and gradients, use the plain sweep, which the compiler
# partitions.
def _jvp(primals: Any, tangents: Any, *, static: _Static, program: Any) -> tuple[Any, Any]:
    moving = tuple(i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero)
    out = _sweep_p.bind(*primals, static=static, program=program)
    plain = partial(jvp_of_moving, partial(_plain, static=static), moving)
    floats = [i for i, array in enumerate(out) if jnp.issubdtype(array.dtype, jnp.floating)]

    def apply(primals: list[Array], tangents: list[Array]) -> list[Array]:
        if static.moving is None:
            moved = _bind(static._replace(moving=moving), [*primals, *tangents])
        else:
            moved = plain(primals, tangents)[1]
        return [moved[i] for i in floats]

    def transpose(primals: list[Array], cotangents: list[Array]) -> Any:
        def moved(*tangents: Array) -> list[Array]:
            every = plain(primals, tangents)[1]
            return [every[i] for i in floats]

        return jax.linear_transpose(moved, *(primals[i] for i in moving))(cotangents)

    moved = linear(apply, transpose, primals, [tangents[i] for i in moving], [out[i] for i in floats], program)
    every = dict.fromkeys(range(len(out))) | dict(zip(floats, moved, strict=True))
    return out, [
        ad.Zero(jax.typeof(out[i]).to_tangent_aval()) if tangent is None else tangent for i, tangent in every.items()
    ]


_sweep_p.def_impl(_plain)
_sweep_p.def_abstract_eval(_abstract)
batching.primitive_batchers[_sweep_p] = _batched
ad.primitive_jvps[_sweep_p] = _jvp
for of_platform in [None, *BACKENDS]:
    lowering = mlir.lower_fun(partial(_by_partitions, platform=of_platform), multiple_results=True)
    mlir.register_lowering(_sweep_p, lowering, of_platform)
mlir.register_lowering(_sweep_p, _lower_for_tpu, platform="tpu")
