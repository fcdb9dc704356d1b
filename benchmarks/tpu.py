"""What losses hold, read and write on one TPU chip, from programs that XLA's TPU compiler makes without a TPU.

    pip install -e ".[bench]" "jax[tpu]"
    python benchmarks/tpu.py --out tpu.json      # v5e, v6e and v5p; a quarter of an hour on a core of its own
    python benchmarks/tpu.py --chips v6e         # one of them
    python benchmarks/tpu.py --smoke             # small sizes, v5e

Prints Markdown tables, and with `--out` writes a record. First it checks its own counts against the compiler's.

Temporaries are what the compiler allocates besides arguments and results; it may use a result's memory for others while
that is not written yet. Bytes are operands and results of each fusion in HBM, and those of a loop count as often as it
turns. Of flops only multiplications of matrices count. The time that follows, the larger of flops / peak and bytes /
bandwidth, is an estimate: a lower bound of a model, and no measurement. Cycles are the compiler's own estimate of its
fusions, other instructions left out.

The TPU kernel of tokamax 0.0.12, which pip installs on Python 3.11, pads classes to blocks of 512 or 2048 and counts
the padding: its loss is wrong where the vocabulary is not a multiple of that, as here. Its gradients come in float32.
The kernel of 0.0.17, for newer Pythons, masks the padding; `chunked_xla` counts it.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from hlo_work import Program
from peers import linear_losses, logits_losses

import jxent

# topology, bfloat16 flops per second, bytes per second, of one chip: docs.cloud.google.com/tpu/docs/v5e, v6e and v5p
CHIPS = {
    "v5e": ("v5e:2x2", 197e12, 819e9),
    "v6e": ("v6e:2x2", 918e12, 1638e9),
    "v5p": ("v5p:2x2x1", 459e12, 2765e9),
}
SIZES, SMALL = (8192, 2048, 151936), (1024, 128, 5003)  # a loop even where small
HEADS = ("temporaries", "of logits", "of them in float32", "with results", "accessed", "flops", "at least", "cycles")
MIB = 2**20


# --- programs ---------------------------------------------------------------------------------------------------------


@functools.cache
def chips(topology):
    """The devices to compile for, of which none need be there."""
    from jax.experimental import topologies

    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}  # for libtpu not to look for chips
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # others may use the chips or compile meanwhile
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def chip(name):
    return chips(CHIPS[name][0])[0]


@contextlib.contextmanager
def on_tpu(name):
    """For libraries that ask where they run, as jxent does for the size of a block, and Pallas for the kind of TPU."""
    with jax.default_device(chip(name)), mock.patch.object(jax, "default_backend", return_value="tpu"):
        yield


def compiled(name, f, *shapes):
    sharding = jax.sharding.SingleDeviceSharding(chip(name))
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    with on_tpu(name):
        return jax.jit(f).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


def check_counts(name):
    """That the counts are the compiler's own where it has no loop to leave out, and go up with a loop's length."""

    def count(f, *shapes):
        program = compiled(name, f, *((shape, jnp.bfloat16) for shape in shapes))
        return Program(program.as_text()).work(), program.cost_analysis()

    # Of sizes that the fast memory does not hold: what is copied there ahead of its use is no traffic of its own.
    for f, *shapes in (
        (jnp.add, (8192, 32768), (8192, 32768)),
        (jax.nn.softmax, (8192, 32768)),
        (jnp.matmul, (8192, 16384), (16384, 32768)),
        (lambda a, b: jnp.sum(jnp.exp(a @ b), 1), (16384, 16384), (16384, 32768)),
    ):
        work, own = count(f, *shapes)
        np.testing.assert_allclose(work.bytes, own["bytes accessed"], rtol=1e-3)
        if work.flops:
            np.testing.assert_allclose(work.flops, own["flops"], rtol=1e-2)

    def product(hidden, kernel, length):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ kernel), None), hidden, None, length=length)[0]

    def total(array, _, length):
        return jax.lax.fori_loop(0, length, lambda i, s: s + jnp.sum(array * i, dtype=jnp.float32), 0.0)

    for f, flops, moved in ((product, 2 * 16384**3, None), (total, 0, 2 * 16384**2)):
        shapes = (16384, 16384), (16384, 16384)
        (few, own), (many, same) = (count(functools.partial(f, length=length), *shapes) for length in (7, 19))
        assert (few.flops, many.flops) == (7 * flops, 19 * flops)
        assert own["flops"] == same["flops"], "the compiler's own counts include the length of a loop by now"
        if moved:
            np.testing.assert_allclose([few.bytes, many.bytes], [7 * moved, 19 * moved], rtol=1e-3)


def cases(name, sizes):
    """(title, losses, shapes, differentiated)"""
    positions, features, vocab = sizes
    hidden, kernel = ((positions, features), jnp.bfloat16), ((features, vocab), jnp.bfloat16)
    labels, logits = ((positions,), jnp.int32), ((positions, vocab), jnp.bfloat16)
    with on_tpu(name):
        losses = linear_losses()
    # Where no label is ignored, for a loop of known length.
    losses["jxent"] = functools.partial(jxent.linear_cross_entropy, ignore_index=None)
    losses["jxent, 256 positions"] = functools.partial(losses["jxent"], block_size=256)
    yield "hidden states and kernel", losses, (hidden, kernel, labels), (0, 1)
    yield "hidden states; the kernel is frozen", losses, (hidden, kernel, labels), (0,)
    yield "logits, given", logits_losses(), (logits, labels), (0,)


def measured(name, loss, shapes, wrt):
    _, peak, bandwidth = CHIPS[name]
    try:
        program = compiled(name, jax.value_and_grad(loss, wrt), *shapes)
    except Exception as error:  # whatever a peer raises is its result
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    held, text = program.memory_analysis(), Program(program.as_text())
    work = text.work()
    return {
        "temporaries": held.temp_size_in_bytes,
        "results": held.output_size_in_bytes,
        "flops": work.flops,
        "bytes": work.bytes,
        "cycles": work.cycles,
        "custom_kernels": text.kernels(),
        "seconds_for_flops": work.flops / peak,
        "seconds_for_bytes": work.bytes / bandwidth,
    }


def row(found, full):
    if "error" in found:
        return [found["error"].replace("|", "/")[:160]] + [""] * 7
    held, seconds = found["temporaries"], max(found["seconds_for_flops"], found["seconds_for_bytes"])
    cells = [f"{held / MIB:,.1f} MiB", f"{held / full:.1%}", f"{held / full / 2:.1%}"]
    cells.append(f"{(held + found['results']) / MIB:,.1f} MiB")
    if found["custom_kernels"]:
        return [*cells, "in a kernel", "in a kernel", "", ""]
    cells += [f"{found['bytes'] / 1e9:,.1f} GB", f"{found['flops'] / 1e12:.2f} T", f"{1e3 * seconds:.1f} ms"]
    return [*cells, f"{found['cycles'] / 1e6:.1f} M"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="all by default")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="small sizes, v5e")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    sizes = SMALL if args.smoke else SIZES
    positions, features, vocab = sizes
    full = 2 * positions * vocab
    results = []
    print(f"{positions} positions, {features} features, {vocab} classes, bfloat16; value and gradients of the mean")
    print(f"JAX {jax.__version__}; full logits: {full / MIB:,.0f} MiB in bfloat16, {full / MIB * 2:,.0f} in float32")
    for name in ("v5e",) if args.smoke else args.chips:
        check_counts(name)
        for title, losses, shapes, wrt in cases(name, sizes):
            if args.smoke:
                losses = dict([*losses.items()][:2])
            print(f"\n{chip(name).device_kind}, with respect to: {title}\n")
            print(f"| | {' | '.join(HEADS)} |\n|---|{'---:|' * len(HEADS)}")
            for label, loss in losses.items():
                found = measured(name, loss, shapes, wrt)
                results.append({"chip": name, "sizes": sizes, "with_respect_to": title, "loss": label, **found})
                print(f"| {label} | " + " | ".join(row(found, full)) + " |", flush=True)
            if args.out:
                args.out.write_text(json.dumps({"jax": jax.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
