"""What a sharded `linear_cross_entropy` sends and holds, from compiled programs: the table of docs/sharding.md.

    pip install -e ".[test]"
    python benchmarks/sharding.py              # for 8 simulated CPU devices
    pip install "jax[tpu]" && python benchmarks/sharding.py --tpu     # for a TPU v5e 2x4; needs no TPU
    python benchmarks/sharding.py --smoke      # small sizes, to see that it works

Prints in Markdown, for each layout and each kind of mesh axes, the MiB that a device sends in the loop over blocks and
outside of it, and its temporaries.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tpu import chips

import jxent

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hlo import collectives

BLOCKS = 16
# name, mesh, spec of the hidden states, spec of the kernel
LAYOUTS = (
    ("batch", {"data": 8}, P("data"), P()),
    ("batch, sequence", {"data": 4, "sequence": 2}, P("data", "sequence"), P()),
    ("vocabulary", {"vocab": 8}, P(), P(None, "vocab")),
    ("batch, sequence, vocabulary", {"data": 2, "sequence": 2, "vocab": 2}, P("data", "sequence"), P(None, "vocab")),
    ("FSDP", {"data": 8}, P("data"), P("data")),
    ("FSDP, vocabulary", {"data": 4, "vocab": 2}, P("data"), P("data", "vocab")),
)
WAYS = ("Explicit", "Auto, `jax.set_mesh`", "Auto")


def program(mesh, way, sizes, hidden, kernel):
    batch, length, features, vocab = sizes

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def loss(hidden, kernel, labels):
        return jxent.linear_cross_entropy(hidden, kernel, labels, block_size=batch * length // BLOCKS)

    arrays = (
        array((batch, length, features), jnp.bfloat16, hidden),
        array((features, vocab), jnp.bfloat16, kernel),
        array((batch, length), jnp.int32, P(*hidden[:2])),
    )
    platform = mesh.devices.flat[0].platform
    with jax.set_mesh(mesh) if "set_mesh" in way else contextlib.nullcontext():
        traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*arrays)
        return traced.lower(lowering_platforms=(platform,)).compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e 2x4; needs libtpu, but no TPU")
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    sizes = (8, 64, 64, 2048) if args.smoke else (8, 2048, 2048, 131072)
    devices = chips("v5e:2x4") if args.tpu else jax.devices()
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
