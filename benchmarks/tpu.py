"""What losses hold, read and write on one TPU chip, from programs that XLA's TPU compiler makes without a TPU.

    pip install "jax[tpu]" optax jax-cce tokamax
    python benchmarks/tpu.py --out tpu.json    # v5e, v6e and v5p; a quarter of an hour on a core of its own
    python benchmarks/tpu.py --smoke           # small sizes, v5e

Temporaries are what the compiler allocates besides arguments and results; it may use a result's memory for others while
that is not written yet. Bytes are operands and results of each fusion in HBM, and those of a loop count as often as it
turns. Of flops only multiplications of matrices count. The time that follows, the larger of flops / peak and bytes /
bandwidth, is an estimate: a lower bound of a model, and no measurement. Cycles are the compiler's own estimate of its
fusions, other instructions left out.

tokamax's kernel for TPUs (0.0.12) pads the classes to blocks of 512 or 2048 and counts the padding: its loss is wrong
where the vocabulary is not a multiple of that, as here, and its gradients come in float32.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from peers import linear_losses, logits_losses

import jxent

# topology, bfloat16 flops per second, bytes per second, of one chip: docs.cloud.google.com/tpu/docs/v5e, v6e and v5p
CHIPS = {
    "v5e": ("v5e:2x2", 197e12, 819e9),
    "v6e": ("v6e:2x2", 918e12, 1638e9),
    "v5p": ("v5p:2x2x1", 459e12, 2765e9),
}
SIZES, SMALL = (8192, 2048, 151936), (512, 128, 5003)
HEADS = ("temporaries", "of logits", "of them in float32", "with results", "accessed", "flops", "at least", "cycles")
MIB = 2**20


# --- what a program does, from its text -------------------------------------------------------------------------------

WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional"}
FREE |= {"call", "opt-barrier", "partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update"}
SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str  # of the line


class Work(NamedTuple):
    flops: int
    bytes: int
    cycles: int

    def __add__(self, other):
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times):
        return Work(*(times * a for a in self))


NOTHING = Work(0, 0, 0)


def dimensions(array):
    return [int(n) for n in re.search(r"\[([\d,]*)\]", array)[1].split(",") if n]


def size_in_hbm(type_):
    """Bytes of the arrays in HBM: those in another memory have a layout with S(1), or some other number."""
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", type_)
    return sum(math.prod(dimensions(a)) * WIDTH.get(a.split("[")[0], 4) for a in arrays if not re.search(r"S\(\d", a))


class Program:
    """The text of an optimised HLO module."""

    def __init__(self, text):
        self.computations, self.types, self.made, body = {}, {}, {}, None
        for line in text.splitlines():
            if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                body = self.computations[start[2]] = []
                if start[1]:
                    self.entry = start[2]
            elif parts := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)", line):
                name, type_, opcode, operands, rest = parts.groups()
                found = [] if opcode in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", operands)
                made = Instruction(name, type_, opcode, found, operands + rest if not found else rest)
                body.append(made)
                self.types[name], self.made[name] = type_, made

    def called(self, instruction, *keys):
        names = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.rest)
        return re.findall(r"[\w.\-]+", " ".join(names))

    def turns(self, loop):
        """How often a loop turns that counts from 0 in steps of 1, as those of `scan` and `fori_loop` do."""
        if known := re.search(r'known_trip_count"?:\{"?n"?:"(\d+)"', loop.rest):
            return int(known[1])
        (condition,) = self.called(loop, "condition")
        *rest, root = self.computations[condition]
        while root.opcode == "fusion":
            *inner, root = self.computations[self.called(root, "calls")[0]]
            rest += inner
        assert root.opcode == "compare", root
        assert "direction=LT" in root.rest, root
        (limit,) = (int(re.match(r"\d+", i.rest)[0]) for i in rest if i.opcode == "constant" and i.type[:5] == "s32[]")
        index = next(int(i.rest.split("index=")[1].split(",")[0]) for i in rest if i.opcode == "get-tuple-element")
        counter = self.made[self.made[loop.operands[0]].operands[index]]
        while counter.opcode == "copy":
            counter = self.made[counter.operands[0]]
        assert counter.opcode == "constant", counter
        return limit - int(re.match(r"\d+", counter.rest)[0])

    def moved(self, i):
        """Bytes of HBM that an instruction reads and writes, of an array that it takes or sets a part of only these."""
        if i.opcode in FREE or 'target="AllocateBuffer"' in i.rest:
            return 0
        size = {name: size_in_hbm(self.types[name]) for name in i.operands}
        if i.opcode == "copy-start":  # of (result, operand, context)
            first = re.match(r"\((\w+\[[\d,]*\](?:\{[^}]*\})?)", i.type)[1]
            return size_in_hbm(first) + sum(size.values())
        result = size_in_hbm(i.type)
        if i.opcode in SLICES:
            return 2 * size_in_hbm(i.type) + sum(size[name] for name in i.operands[1:])
        if i.opcode == "dynamic-update-slice":
            return 2 * size[i.operands[1]]
        if i.opcode != "fusion":
            return result + sum(size.values())
        (body,) = (self.computations[name] for name in self.called(i, "calls"))
        parameters = {j.name: int(re.match(r"\d+", j.rest)[0]) for j in body if j.opcode == "parameter"}
        total = result
        for name, number in parameters.items():
            whole = size_in_hbm(self.types[i.operands[number]])
            users = [j for j in body if name in j.operands]
            if all(j.opcode in SLICES and j.operands[0] == name for j in users):
                total += min(whole, sum(size_in_hbm(j.type) for j in users))
            elif all(j.opcode == "dynamic-update-slice" and j.operands[0] == name for j in users):
                # Written in place: what stays as it is neither is read nor is part of the result.
                written = sum(size_in_hbm(self.types[j.operands[1]]) for j in users)
                total += 0 if whole == 0 else 2 * written - sum(size_in_hbm(j.type) for j in users)
            else:
                total += whole
        return total

    def multiplied(self, i):
        """Flops of a multiplication of matrices, which the TPU compiler writes as a convolution."""
        if i.opcode == "convolution":
            kernel = re.search(r"dim_labels=\w+_(\w+)->", i.rest)[1]
            other = dimensions(self.types[i.operands[1]])
            return 2 * math.prod(dimensions(i.type)) * math.prod(other) // other[kernel.index("o")]
        if i.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1].split(",")
            left = dimensions(self.types[i.operands[0]])
            return 2 * math.prod(dimensions(i.type)) * math.prod(left[int(n)] for n in contracted if n)
        return 0

    def work(self, name=None, fused=False):
        """Of a computation, the entry if none is named."""
        total = NOTHING
        for i in self.computations[name or self.entry]:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
            if not fused:
                total += Work(0, self.moved(i), int(cycles[1]) if cycles else 0)
            total += Work(self.multiplied(i), 0, 0)
            if i.opcode == "fusion":
                total += self.work(*self.called(i, "calls"), fused=True)
            elif i.opcode == "while":
                total += self.work(*self.called(i, "body")) * self.turns(i)
            elif i.opcode == "call":
                total += self.work(*self.called(i, "to_apply"))
            elif i.opcode == "conditional":
                branches = self.called(i, "branch_computations", "true_computation", "false_computation")
                total += max(self.work(branch) for branch in branches)
        return total

    def kernels(self):
        """Custom kernels, of which neither the flops nor the bytes read twice are known."""
        return sum('target="tpu_custom_call"' in i.rest for i in self.made.values())


# --- programs ---------------------------------------------------------------------------------------------------------


@functools.cache
def chip(name):
    from jax.experimental import topologies

    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name][0]).devices[0]


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
    losses["jxent, 256 positions"] = functools.partial(jxent.linear_cross_entropy, block_size=256)
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
    cells = [f"{(held + found['results']) / MIB:,.1f} MiB"]
    cells = [f"{held / MIB:,.1f} MiB", f"{held / full:.1%}", f"{held / full / 2:.1%}", *cells]
    if found["custom_kernels"]:
        return [*cells, "in a kernel", "in a kernel", "", ""]
    cells += [f"{found['bytes'] / 1e9:,.1f} GB", f"{found['flops'] / 1e12:.2f} T", f"{1e3 * seconds:.1f} ms"]
    return [*cells, f"{found['cycles'] / 1e6:.1f} M"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default="v5e,v6e,v5p", help="comma-separated")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="small sizes, v5e")
    args = parser.parse_args()
    del sys.argv[1:]  # tokamax would read it, too
    jax.config.update("jax_platforms", "cpu")
    sizes = SMALL if args.smoke else SIZES
    positions, features, vocab = sizes
    full = 2 * positions * vocab
    results = []
    print(f"{positions} positions, {features} features, {vocab} classes, bfloat16; value and gradients of the mean")
    print(f"JAX {jax.__version__}; full logits: {full / MIB:,.0f} MiB in bfloat16, {full / MIB * 2:,.0f} in float32")
    for name in ("v5e",) if args.smoke else args.chips.split(","):
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
                with open(args.out, "w") as file:
                    json.dump({"jax": jax.__version__, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
