"""The sweep over sharded arrays under plain `jax.jit`: each device sweeps over its own positions and classes.

Left to XLA, the loop over blocks may sum the kernel's gradient over the devices in every block, and gather a kernel
whose features are sharded (FSDP) there too. Here a device runs the sweep on its shards. A kernel that is sharded over
an axis of the positions is gathered before; gradients are summed over devices, and scattered again, after. What moves
inside the loop is one number per position and sum over classes.

Mesh axes of type `Explicit` are in the types of the arrays, and the sweep is a `jax.shard_map` over them. What is
sharded over `Auto` axes only the compiler knows, which `custom_partitioning` asks. It does not exist for a TPU
(https://github.com/jax-ml/jax/issues/38196), whose compiler moves the sums out of the loop by itself, and the gathering
of a kernel if it is told to.
"""

import contextlib
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jxent._layout import dimensions, entries, is_dimensions, layout, result_dimensions
from jxent._passes import on_cpu
from jxent._shards import Shards, along_positions, by_compiler, first_class, own, sharded_like, total
from jxent._sweep import Sweep, swept


def sharded(sweep, wanted, inputs, coefficients) -> Any:
    """`swept` of arrays that may be sharded."""
    mesh = _mesh_of(inputs, coefficients)
    if AxisType.Explicit in mesh.axis_types:
        rows, grads = _explicit(mesh, sweep, wanted, inputs, coefficients)
    elif sweep.form.shards.axis_name or mesh.manual_axes:
        rows, grads = swept(sweep, wanted, inputs, coefficients)
    else:
        rows, grads = _automatic(sweep, wanted, inputs, coefficients)
    return own(rows, sweep.form.shards, inputs.first), grads


def _mesh_of(inputs, coefficients):
    """That of the types: where it has `Explicit` axes, some arrays may be on it and others on none."""
    meshes = [jax.typeof(a).sharding.mesh for a in jax.tree.leaves((inputs, coefficients))]
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), meshes[0])


def _on_each_device(sweep, wanted, sizes, plan, inputs, coefficients):
    """The sweep over this device's shards, and the sums of the gradients over the other devices."""
    vocab, positions = plan.axes["v"], plan.positions
    outer = sweep.form.shards  # over which the caller has mapped
    shards = Shards((*outer.axis_name, *vocab), outer.number * math.prod(sizes[a] for a in vocab))
    inputs = inputs._replace(first=first_class(shards, inputs.kernel.shape[sweep.vocab_axis]))
    local = sweep._replace(form=sweep.form._replace(shards=shards))
    if sweep.block_size is not None:
        local = local._replace(block_size=-(-sweep.block_size // math.prod(sizes[a] for a in positions)))
    rows, grads = swept(local, wanted, inputs, coefficients)
    for name, grad in grads.items():
        if name == "hidden":
            grads[name] = _in_float32(partial(total, axis_name=vocab), grad)
        elif name == "kernel":
            scattered = {1 - sweep.vocab_axis: plan.scattered("f"), sweep.vocab_axis: plan.scattered("v")}
            for axis, axes in scattered.items():
                if axes:
                    scatter = partial(lax.psum_scatter, axis_name=axes, scatter_dimension=axis, tiled=True)
                    # JAX 0.12 cannot lower it where other axes of the mesh are `Explicit`.
                    grad = _in_float32(partial(by_compiler, scatter, PartitionSpec(None, None)), grad)
            rest = tuple(a for a in positions if a not in sum(scattered.values(), ()))
            grads[name] = _in_float32(partial(total, axis_name=rest), grad)
        elif name != "labels":
            grads[name] = _in_float32(partial(total, axis_name=positions), grad)
    return rows, grads


def _in_float32(collective, grad):
    """`collective(grad)`, on a CPU of no less than float32.

    XLA:CPU widens a sum of 16-bit numbers itself, but ends the process if it is over some axes of a mesh and not all.
    """

    def summed(cpu, grad):
        return collective(grad.astype(jnp.float32)).astype(grad.dtype) if cpu else collective(grad)

    return on_cpu(summed, grad) if grad.dtype.itemsize == 2 else collective(grad)


def _dimensions(sweep, wanted, inputs, coefficients):
    """The dimensions of (arguments, results) of `swept`, as of `_layout`."""
    arguments = dimensions(sweep.vocab_axis, inputs, coefficients)
    arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (inputs, coefficients))
    return arguments, result_dimensions(arguments, *jax.eval_shape(partial(swept, sweep, wanted), *arrays))


def _explicit(mesh, sweep, wanted, inputs, coefficients):
    # Not all of the explicit ones: over some an enclosing `vmap` may have mapped.
    used = [axis for a in jax.tree.leaves((inputs, coefficients)) for entry in entries(a) for axis in entry]
    if not used:
        with jax.sharding.use_abstract_mesh(mesh):
            return swept(sweep, wanted, inputs, coefficients)
    sizes = {axis: mesh.shape[axis] for axis in used}
    arguments, results = _dimensions(sweep, wanted, inputs, coefficients)
    plan = layout(sizes, inputs, arguments[0])

    def reshard(array, spec):
        return jax.sharding.reshard(array, NamedSharding(mesh, spec))

    in_specs = plan.specs(arguments)
    arrays = jax.tree.map(reshard, (inputs, coefficients), in_specs)
    out_specs = plan.specs(results)
    local = partial(_on_each_device, sweep, wanted, sizes, plan)
    rows, grads = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=frozenset(sizes))(
        *arrays
    )
    rows = jax.tree.map(lambda row: along_positions(row, inputs.hidden, row.ndim), rows)
    return rows, {name: sharded_like(grad, getattr(inputs, name)) for name, grad in grads.items()}


# The sweep as a primitive, because `custom_partitioning` has no rules for derivatives and `vmap`: these take the plain
# sweep.
_sweep_p = Primitive("sweep")
_sweep_p.multiple_results = True


class _Static(NamedTuple):
    """Of a sweep as it was called: lowering and partitioning come later, outside of the caller's `with` blocks."""

    sweep: Sweep
    wanted: tuple[str, ...]
    tree: Any  # of (inputs, coefficients)
    mesh: Any  # of `jax.set_mesh`
    x64: bool
    matmul_precision: Any

    @contextlib.contextmanager
    def config(self):
        with jax.enable_x64(self.x64), jax.default_matmul_precision(self.matmul_precision):
            yield


def _automatic(sweep, wanted, inputs, coefficients):
    arrays, tree = jax.tree.flatten((inputs, coefficients))
    config: Any = jax.config
    mesh = jax.sharding.get_abstract_mesh()
    static = _Static(sweep, wanted, tree, mesh, config.jax_enable_x64, config.jax_default_matmul_precision)
    names = _dimensions(sweep, wanted, inputs, coefficients)
    # A parameter, for JAX to see that its lowering depends on the devices.
    program = jax.make_jaxpr(partial(_partitioned, static=static, names=names))(*arrays)
    results = jax.tree.structure(names[1], is_leaf=is_dimensions)
    return jax.tree.unflatten(results, _sweep_p.bind(*arrays, static=static, program=program))


def _plain(*arrays, static, program=None):
    del program
    return jax.tree.leaves(swept(static.sweep, static.wanted, *jax.tree.unflatten(static.tree, arrays)))


def _partitioned(*arrays, static, names):
    sweep, wanted, tree = static[:3]
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
                return jax.tree.leaves(_on_each_device(sweep, wanted, dict(mesh.shape), plan, *shards))

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
