"""What a sharded `linear_cross_entropy` sends and holds, from compiled programs: the table of docs/sharding.md.

    pip install -e ".[test]"
    python benchmarks/sharding.py              # for 8 simulated CPU devices
    pip install "jax[tpu]" && python benchmarks/sharding.py --tpu     # for a TPU v5e 2x4; needs no TPU
    python benchmarks/sharding.py --h100       # for 8 H100s, without a GPU; h100.py says what that needs
    python benchmarks/sharding.py --steps --tpu    # whole training steps; some minutes for each
    python benchmarks/sharding.py --smoke      # small sizes, to see that it works

Prints in Markdown, for each layout and each kind of mesh axes, the MiB that a device sends in the loop over blocks and
outside of it, and its temporaries. Of whole steps it counts what is of the kernel's size, or of the part that a device
has of its gradient.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import h100
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tpu import chips

import jxent

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hlo import collectives
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
WAYS = ("Explicit", "Auto, named", "Auto")


def program(mesh, way, sizes, hidden, kernel):
    batch, length, features, vocab = sizes

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    positions, vocab_axes = P(*hidden[:2]), kernel[1] if len(kernel) == 2 else None
    names = {"batch_axis_name": positions, "axis_name": None if vocab_axes in hidden else vocab_axes}

    def loss(hidden, kernel, labels):
        # Where no label is ignored, so that there is one loop, whose length is known.
        options = {"block_size": batch * length // BLOCKS, "ignore_index": None}
        return jxent.linear_cross_entropy(hidden, kernel, labels, **options, **(names if "named" in way else {}))

    arrays = (
        array((batch, length, features), jnp.bfloat16, hidden),
        array((features, vocab), jnp.bfloat16, kernel),
        array((batch, length), jnp.int32, P(*hidden[:2])),
    )
    device = mesh.devices.flat[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    # The gradients are kept as a training step keeps them, sharded as the arrays.
    shardings = NamedSharding(mesh, P()), tuple(array.sharding for array in arrays[:2])
    with jax.default_device(device):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=shardings).trace(*arrays)
        return traced.lower(lowering_platforms=(platform,)).compile()


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


def step_program(mesh, step, rules):
    graph, state, tokens = shapes_of(step, rules, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, state), NamedSharding(mesh, P())
    update = jax.jit(partial(update_of(step)[1], graph), donate_argnums=0, out_shardings=shardings)
    with jax.set_mesh(mesh):
        traced = update.trace(state, tokens)
    return traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,)).compile()


def print_steps(devices, smoke):
    sizes = (2048, 64, 1, 2, 8, 64) if smoke else (128256, 2048, 2, 16, 16, 2048)
    of_all = Step(*sizes)
    print(f"{of_all.batch} x {of_all.length} positions, {of_all.features} features, {of_all.vocab} classes")
    print(f"MiB on each device\nJAX {jax.__version__}, {devices[0].device_kind}\n")
    print("| parameters | the loss | in a loop | gathered | reduce-scattered | all-reduced | temporaries |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, axes, rules in STEP_LAYOUTS:
        mesh = Mesh(np.array(devices).reshape([*axes.values()]), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
        kernel = of_all.vocab * of_all.features // axes.get("model", 1)
        for way, options in STEP_WAYS.items():
            compiled = step_program(mesh, of_all._replace(**options), rules)
            found = [c for c in collectives(compiled.as_text()) if c.size in (kernel, kernel // axes["data"])]
            moved = [sum(c.bytes for c in found if c.in_loop)]
            for kind in ("all-gather", "reduce-scatter", "all-reduce"):
                moved.append(sum(c.bytes for c in found if c.kind == kind and not c.in_loop))
            moved.append(compiled.memory_analysis().temp_size_in_bytes)
            print(f"| {name} | {way} | " + " | ".join(f"{n / 2**20:,.2f}" for n in moved) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e 2x4; needs libtpu, but no TPU")
    parser.add_argument("--h100", action="store_true", help="compile for 8 H100s; needs XLA's GPU compiler, but no GPU")
    parser.add_argument("--steps", action="store_true", help="whole training steps")
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    sizes = (8, 64, 64, 2048) if args.smoke else (8, 2048, 2048, 131072)
    devices = chips("v5e:2x4") if args.tpu else h100.chips("1x1x8") if args.h100 else jax.devices()
    if args.steps:
        return print_steps(devices, args.smoke)
    batch, length, features, vocab = sizes
    print(f"{batch} x {length} positions, {features} features, {vocab} classes, bfloat16, {BLOCKS} blocks")
    print("MiB on each device")
    print(f"JAX {jax.__version__}, {devices[0].device_kind}\n")
    print(
        "| layout | axes | in the loop, all blocks | outside: gathered | reduce-scattered | all-reduced | temporaries |"
    )
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, axes, hidden, kernel in LAYOUTS:
        for way in WAYS:
            mesh = Mesh(
                np.array(devices).reshape([*axes.values()]),
                tuple(axes),
                axis_types=(AxisType["Explicit" if way == "Explicit" else "Auto"],) * len(axes),
            )
            compiled = program(mesh, way, sizes, hidden, kernel)
            found = collectives(compiled.as_text())
            moved = [sum(c.bytes for c in found if c.in_loop) * BLOCKS]
            for kind in ("all-gather", "reduce-scatter", "all-reduce"):
                moved.append(sum(c.bytes for c in found if c.kind == kind and not c.in_loop))
            moved.append(compiled.memory_analysis().temp_size_in_bytes)
            print(f"| {name} | {way} | " + " | ".join(f"{n / 2**20:,.2f}" for n in moved) + " |", flush=True)


if __name__ == "__main__":
    main()
