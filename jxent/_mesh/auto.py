"""The sweep over arrays that are sharded over `Auto` axes, as a primitive of its own.

Only the compiler knows how they are sharded. `custom_partitioning` asks it, and has each device sweep over its shards.
It does not exist for a TPU (https://github.com/jax-ml/jax/issues/38196), whose compiler moves the sums out of the loop
by itself, and the gathering of a kernel if it is told to.
"""

import contextlib
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jxent._mesh.device import all_dimensions, on_each_device
from jxent._mesh.layout import is_dimensions, layout
from jxent._sweep.sweep import Sweep, swept

# The sweep as a primitive, because `custom_partitioning` has no rules for derivatives and `vmap`: these take the plain
# sweep.
_sweep_p = Primitive("sweep")
_sweep_p.multiple_results = True


class _Static(NamedTuple):
    """Of a sweep as it was called: lowering and partitioning come later, outside of the caller's `with` blocks."""

    sweep: Sweep
    asked: tuple[str, ...]
    tree: Any  # of (inputs, coefficients)
    mesh: Any  # of `jax.set_mesh`
    x64: bool
    matmul_precision: Any

    @contextlib.contextmanager
    def config(self):
        with jax.enable_x64(self.x64), jax.default_matmul_precision(self.matmul_precision):
            yield


def swept_by_compiler(sweep, asked, inputs, coefficients):
    """`swept`, of arrays whose sharding the compiler knows."""
    arrays, tree = jax.tree.flatten((inputs, coefficients))
    config: Any = jax.config
    mesh = jax.sharding.get_abstract_mesh()
    static = _Static(sweep, asked, tree, mesh, config.jax_enable_x64, config.jax_default_matmul_precision)
    names = all_dimensions(sweep, asked, inputs, coefficients)
    # A parameter, for JAX to see that its lowering depends on the devices.
    program = jax.make_jaxpr(partial(_partitioned, static=static, names=names))(*arrays)
    results = jax.tree.structure(names[1], is_leaf=is_dimensions)
    return jax.tree.unflatten(results, _sweep_p.bind(*arrays, static=static, program=program))


def _plain(*arrays, static, program=None):
    del program
    return jax.tree.leaves(swept(static.sweep, static.asked, *jax.tree.unflatten(static.tree, arrays)))


def _partitioned(*arrays, static, names):
    sweep, asked, tree = static.sweep, static.asked, static.tree
    arguments, results = (jax.tree.leaves(dims, is_leaf=is_dimensions) for dims in names)

    def planned(mesh, arrays):
        """(the layout, shardings of the results, shardings of the arguments)."""
        plan = layout(dict(mesh.shape), jax.tree.unflatten(tree, arrays)[0], names[0][0])
        return plan, *jax.tree.map(partial(NamedSharding, mesh), plan.specs([results, arguments]))

    def partition(mesh, arguments, _):
        plan, of_results, of_arguments = planned(mesh, *arguments)

        def local(arrays):
            with static.config():
                shards = jax.tree.unflatten(tree, arrays)
                return jax.tree.leaves(on_each_device(sweep, asked, dict(mesh.shape), plan, *shards))

        return mesh, local, of_results, (of_arguments,)

    def rule(arrays):
        # To the compiler the kernel's gradient is sharded as the kernel is.
        return ", ".join(" ".join(name.removeprefix("d") for name in array) for array in arrays)

    f = custom_partitioning(lambda arrays: _plain(*arrays, static=static))
    f.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, arguments, _: planned(mesh, *arguments)[1],
        sharding_rule=f"{rule(arguments)} -> {rule(results)}",
    )
    return f(list(arrays))


def _on_mesh(*arrays, static, program):
    del static
    return jaxpr_as_fun(program)(*arrays)


def _by_tpu(*arrays, static, program):
    del program
    inputs, coefficients = jax.tree.unflatten(static.tree, arrays)
    if not static.mesh.empty:
        spec = PartitionSpec(*(PartitionSpec.UNCONSTRAINED if a == static.sweep.vocab_axis else None for a in range(2)))
        kernel = lax.with_sharding_constraint(inputs.kernel, NamedSharding(static.mesh, spec))
        inputs = inputs._replace(kernel=kernel)
    with static.config():
        return _plain(*jax.tree.leaves((inputs, coefficients)), static=static)


def _abstract(*arrays, static, program):
    del arrays, static
    return program.out_avals


def _batched(arrays, axes, *, static, program):
    del program
    out = jax.vmap(partial(_plain, static=static), tuple(axes))(*arrays)
    return out, [0] * len(out)


def _jvp(primals, tangents, *, static, program):
    del program
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def f(*arrays):
        every = list(primals)
        for i, array in zip(moving, arrays, strict=True):
            every[i] = array
        return _plain(*every, static=static)

    return jax.jvp(f, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))


_sweep_p.def_impl(_plain)
_sweep_p.def_abstract_eval(_abstract)
batching.primitive_batchers[_sweep_p] = _batched
ad.primitive_jvps[_sweep_p] = _jvp
mlir.register_lowering(_sweep_p, mlir.lower_fun(_on_mesh, multiple_results=True))
mlir.register_lowering(_sweep_p, mlir.lower_fun(_by_tpu, multiple_results=True), platform="tpu")
