"""The sweep over arrays that are sharded over `Auto` axes, as a primitive of its own.

Only the compiler knows how they are sharded. `custom_partitioning` asks it, and has each device sweep over its shards.
It does not exist for a TPU (https://github.com/jax-ml/jax/issues/38196), whose compiler moves sums and gathers out
of the loop by itself where it is told that features stay together.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jxent._core.config import traced_config
from jxent._core.forward_mode import jvp_of_moving, linear, linear_p
from jxent._core.shards import mesh_in_use
from jxent._mesh.device import all_dimensions, on_each_device
from jxent._mesh.layout import argument_dimension, is_dimensions, layout
from jxent._sweep.sweep import Sweep, swept, swept_shapes

# The sweep as a primitive, because `custom_partitioning` has no rules for derivatives and `vmap`: these take the plain
# sweep.
_sweep_p = Primitive("sweep")
_sweep_p.multiple_results = True
_sweep_p.is_high = linear_p.is_high


class _Static(NamedTuple):
    """Of a sweep as it was called: lowering and partitioning come later, outside of the caller's `with` blocks."""

    sweep: Sweep
    asked: tuple[str, ...]
    tree: Any  # of (inputs, coefficients)
    mesh: Any  # `mesh_in_use`
    config: Any  # `traced_config`
    moving: tuple[int, ...] | None = None  # the leaves that have tangents, which follow; the results are tangents then

    def pushed(self, function, arrays):
        """``function(*arrays)``, or the tangents of that."""
        if self.moving is None:
            return function(*arrays)
        number = self.tree.num_leaves
        return jvp_of_moving(function, self.moving, arrays[:number], arrays[number:])[1]


def swept_by_compiler(sweep, asked, inputs, coefficients):
    """`swept`, of arrays whose sharding the compiler knows."""
    arrays, tree = jax.tree.flatten((inputs, coefficients))
    static = _Static(sweep, asked, tree, mesh_in_use(*arrays), traced_config())
    results = jax.tree.structure(swept_shapes(sweep, asked, inputs))
    return jax.tree.unflatten(results, _bind(static, arrays))


def _bind(static, arrays):
    """The sweep, or its tangents. Blocks are traced where it is lowered, for that platform alone."""
    # The program is a parameter, for JAX to see that its lowering depends on the devices.
    return _sweep_p.bind(*arrays, static=static, program=depends_on_devices())


@cache
def depends_on_devices():
    """A program whose lowering depends on the devices, as that of a sweep does."""
    f = custom_partitioning(lambda x: x)
    f.def_partition(lambda mesh, arguments, _: (mesh, lambda x: x, arguments[0].sharding, ()), sharding_rule="-> ")
    return jax.make_jaxpr(f)(0.0)


def _plain(*arrays, static, program=None, together=None, cpu=None):
    del program

    def sweep(*arrays):
        inputs, coefficients = static.tree.unflatten(arrays)
        return jax.tree.leaves(swept(static.sweep, static.asked, inputs, coefficients, together, cpu))

    return static.pushed(sweep, arrays)


def _partitioned(*arrays, static, cpu):
    sweep, asked, tree = static.sweep, static.asked, static.tree
    names = all_dimensions(sweep, asked, *tree.unflatten(arrays[: tree.num_leaves]))
    arguments, results = (jax.tree.leaves(dims, is_leaf=is_dimensions) for dims in names)
    arguments += [arguments[i] for i in static.moving or ()]

    def planned(mesh, arrays):
        """(the layout, shardings of the results, shardings of the arguments)."""
        plan = layout(dict(mesh.shape), tree.unflatten(arrays[: tree.num_leaves])[0], names[0][0])
        return plan, *jax.tree.map(partial(NamedSharding, mesh), plan.specs([results, arguments]))

    def partition(mesh, arguments, _):
        plan, of_results, of_arguments = planned(mesh, *arguments)

        def on_this_device(*shards):
            mine = tree.unflatten(shards)
            return jax.tree.leaves(on_each_device(sweep, asked, dict(mesh.shape), plan, (), *mine, cpu=cpu))

        def local(arrays):
            # The compiler asks for this program by itself, which so lacks the names of what is around it.
            with static.config(), jax.named_scope(sweep.function):
                return static.pushed(on_this_device, arrays)

        return mesh, local, of_results, (of_arguments,)

    def rule(arrays):
        # To the compiler the kernel's gradient is sharded as the kernel is.
        return ", ".join(" ".join(map(argument_dimension, array)) for array in arrays)

    on_one_device = partial(_plain, static=static, together=(), cpu=cpu)
    f = custom_partitioning(lambda arrays: on_one_device(*arrays))
    f.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, arguments, _: planned(mesh, *arguments)[1],
        sharding_rule=f"{rule(arguments)} -> {rule(results)}",
    )
    return f(list(arrays))


def _by_partitions(*arrays, static, program, cpu):
    del program
    with static.config():
        return _partitioned(*arrays, static=static, cpu=cpu)


def _by_tpu(*arrays, static, together):
    mesh, kernels = static.mesh, {"kernel": static.sweep.vocab_axis, "kernel_p": static.sweep.vocab_axis_p}

    def whole_features(vocab_axis):
        return [PartitionSpec.UNCONSTRAINED if a == vocab_axis else None for a in range(2)]

    def constrained(array, spec):
        if mesh.empty or array is None:
            return array
        return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))

    # Or the compiler shards the block's logits by features, where parameters or activations are sharded so, and sums or
    # gathers the kernel or its gradient in every block.
    def sweep(*arrays):
        inputs, coefficients = static.tree.unflatten(arrays)
        of_hidden = [*[PartitionSpec.UNCONSTRAINED] * (inputs.hidden.ndim - 1), None]
        of_kernels = {name: whole_features(vocab_axis) for name, vocab_axis in kernels.items()}
        specs = {"hidden": of_hidden, "hidden_p": of_hidden, **of_kernels}
        whole = {name: constrained(getattr(inputs, name), spec) for name, spec in specs.items()}
        out, grads = swept(static.sweep, static.asked, inputs._replace(**whole), coefficients, together, cpu=False)
        for name in of_kernels.keys() & grads.keys():
            grads[name] = constrained(grads[name], of_kernels[name])
        return jax.tree.leaves((out, grads))

    with static.config():
        return static.pushed(sweep, arrays)


def _lower_for_tpu(context, *arrays, static, program):
    del program
    # On several devices the compiler would gather the positions to put them in order.
    devices = getattr(context.module_context.axis_context, "num_devices", None)
    by_tpu = partial(_by_tpu, static=static, together=() if devices == 1 else None)
    return mlir.lower_fun(by_tpu, multiple_results=True)(context, *arrays)


def _abstract(*arrays, static, program):
    del program
    inputs, _ = static.tree.unflatten(arrays[: static.tree.num_leaves])
    types = [ShapedArray(a.shape, a.dtype) for a in jax.tree.leaves(swept_shapes(static.sweep, static.asked, inputs))]
    return types if static.moving is None else [type.to_tangent_aval() for type in types]


def _batched(arrays, axes, *, static, program):
    del program
    out = jax.vmap(partial(_plain, static=static), tuple(axes))(*arrays)
    return out, [0] * len(out)


# The tangents of a sweep are a sweep, too. Tangents of those, and gradients, are left to the compiler.
def _jvp(primals, tangents, *, static, program):
    moving = tuple(i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero)
    out = _sweep_p.bind(*primals, static=static, program=program)
    plain = partial(jvp_of_moving, partial(_plain, static=static), moving)
    floats = [i for i, array in enumerate(out) if jnp.issubdtype(array.dtype, jnp.floating)]

    def apply(primals, tangents):
        if static.moving is None:
            moved = _bind(static._replace(moving=moving), [*primals, *tangents])
        else:
            moved = plain(primals, tangents)[1]
        return [moved[i] for i in floats]

    def transpose(primals, cotangents):
        def moved(*tangents):
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
mlir.register_lowering(_sweep_p, mlir.lower_fun(partial(_by_partitions, cpu=False), multiple_results=True))
mlir.register_lowering(_sweep_p, mlir.lower_fun(partial(_by_partitions, cpu=True), multiple_results=True), "cpu")
mlir.register_lowering(_sweep_p, _lower_for_tpu, platform="tpu")
