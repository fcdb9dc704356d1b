"""What eight devices send and hold, from compiled programs: `compiled.py sharding` and `compiled.py steps`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import platforms
from hlo import collectives
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from platforms import ONE_LOOP, compiled, linear, temporaries
from report import MIB, table
from train_step import Rules, Step, shapes_of, update_of

BLOCKS = 16
# name, mesh, spec of the hidden states, spec of the kernel
LAYOUTS = (
    ("batch", {"data": 8}, P("data"), P()),
    ("batch, sequence", {"data": 4, "sequence": 2}, P("data", "sequence"), P()),
    ("vocabulary", {"vocab": 8}, P(), P(None, "vocab")),
    ("batch, sequence, vocabulary", {"data": 2, "sequence": 2, "vocab": 2}, P("data", "sequence"), P(None, "vocab")),
    ("FSDP", {"data": 8}, P("data"), P("data")),
    ("FSDP, vocabulary", {"data": 4, "vocab": 2}, P("data"), P("data", "vocab")),
    ("FSDP of the vocabulary", {"data": 8}, P("data"), P(None, "data")),
)
# name, mesh, rules of the parameters and activations
STEP_LAYOUTS = (
    ("FSDP", {"data": 8}, Rules(batch="data", embed="data")),
    ("FSDP, vocabulary", {"data": 4, "model": 2}, Rules(batch="data", embed="data", vocab="model", mlp="model")),
)
STEP_WAYS = {
    "named": {"named": True},
    "not named": {},
    "full logits, not named": {"full_logits": True},
    "named, activations not constrained": {"named": True, "constrain": False},
    "not named, activations not constrained": {"constrain": False},
}
MOVED = ("gathered", "reduce-scattered", "all-reduced", "temporaries")  # the first three outside of loops


def mesh_of(devices, axes, kind="Auto"):
    return Mesh(np.array(devices).reshape([*axes.values()]), tuple(axes), axis_types=(AxisType[kind],) * len(axes))


def moved(program, turns=1, of_size=lambda size: True):
    """MiB on each device: collectives in the loop, and by kind outside of it; temporaries."""
    found = [c for c in collectives(program.as_text()) if of_size(c.size)]
    sums = [sum(c.bytes for c in found if c.in_loop) * turns]
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        sums.append(sum(c.bytes for c in found if c.kind == kind and not c.in_loop))
    return [f"{n / MIB:,.2f}" for n in (*sums, temporaries(program))]


def sharded_program(mesh, named, sizes, hidden, kernel):
    batch, length, features, vocab = sizes
    positions, vocab_axes = P(*hidden[:2]), kernel[1] if len(kernel) == 2 else None
    names = {"batch_axis_name": positions, "axis_name": None if vocab_axes in hidden else vocab_axes}

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    loss = linear(block_size=batch * length // BLOCKS, **ONE_LOOP, **(names if named else {}))
    arrays = (
        array((batch, length, features), jnp.bfloat16, hidden),
        array((features, vocab), jnp.bfloat16, kernel),
        array((batch, length), jnp.int32, positions),
    )
    # The gradients are kept as a training step keeps them, sharded as the arrays.
    shardings = NamedSharding(mesh, P()), tuple(array.sharding for array in arrays[:2])
    return compiled(jax.value_and_grad(loss, (0, 1)), arrays, mesh.devices.flat[0], out_shardings=shardings)


def sharding(platform, smoke):
    devices = platforms.eight_devices(platform)
    sizes = (8, 64, 64, 2048) if smoke else (8, 2048, 2048, 131072)

    def rows():
        for name, axes, hidden, kernel in LAYOUTS:
            for way in ("Explicit", "Auto, named", "Auto"):
                mesh = mesh_of(devices, axes, way.split(",")[0])
                program = sharded_program(mesh, "named" in way, sizes, hidden, kernel)
                yield name, way, *moved(program, turns=BLOCKS)

    batch, length, features, vocab = sizes
    print(f"{batch} x {length} positions, {features} features, {vocab} classes, bfloat16, {BLOCKS} blocks")
    print("MiB on each device")
    table(("layout", "axes", "in the loop, all blocks", *MOVED), rows(), texts=2)


def step_program(mesh, step, rules):
    graph, state, tokens = shapes_of(step, rules, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, state), NamedSharding(mesh, P())
    options = {"context": jax.set_mesh(mesh), "donate_argnums": 0, "out_shardings": shardings}
    return compiled(partial(update_of(step)[1], graph), (state, tokens), mesh.devices.flat[0], **options)


def steps(platform, smoke):
    """Of collectives those of the kernel's size count, or of the part that a device has of its gradient."""
    devices = platforms.eight_devices(platform)
    step = Step(*((2048, 64, 1, 2, 8, 64) if smoke else (128256, 2048, 2, 16, 16, 2048)))

    def rows():
        for name, axes, rules in STEP_LAYOUTS:
            mesh = mesh_of(devices, axes)
            kernel = step.vocab * step.features // axes.get("model", 1)
            for way, options in STEP_WAYS.items():
                program = step_program(mesh, step._replace(**options), rules)
                yield name, way, *moved(program, of_size=(kernel, kernel // axes["data"]).__contains__)

    print(f"{step.batch} x {step.length} positions, {step.features} features, {step.vocab} classes")
    print("MiB on each device")
    table(("parameters", "the loss", "in a loop", *MOVED), rows(), texts=2)
