"""The tables of docs/memory.md: what the loss of a language model holds, read from programs compiled for the CPU.

    pip install -e ".[bench]"
    python benchmarks/memory.py            # a minute; arrays of these sizes are never allocated
    python benchmarks/memory.py --smoke    # a small size

Prints in Markdown the temporaries of the loss with its gradients beside Optax's with full logits, by the size of a
block, and what the forward pass keeps for the backward pass.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import optax

import jxent

SIZES = ((8191, 256, 50257), (8192, 1024, 151936), (4096, 1024, 131072))
MIB = 2**20


def arguments(positions, features, vocab, dtype):
    shapes = ((positions, features), dtype), ((features, vocab), dtype), ((positions,), jnp.int32)
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def full_logits(hidden, kernel, labels):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def linear(**options):
    def loss(hidden, kernel, labels):
        return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels, **options))

    return loss


def temporaries(loss, args, wrt=(0, 1)):
    """Bytes that the loss and its gradients need besides arguments and results."""
    program = jax.jit(jax.value_and_grad(loss, wrt)).lower(*args).compile()
    return program.memory_analysis().temp_size_in_bytes


def kept(loss, args, wrt=(0, 1)):
    """Bytes of what the forward pass leaves for the backward pass, the arguments themselves aside."""

    def pull(*args):
        return jax.vjp(lambda *chosen: loss(*chosen, *args[len(wrt) :]), *args[: len(wrt)])[1]

    jaxpr = jax.make_jaxpr(pull)(*args).jaxpr
    kept = [v.aval for v in jaxpr.outvars if not any(v is argument for argument in jaxpr.invars)]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept)


def table(title, heads, rows):
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---:|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def mib(size):
    return f"{size / MIB:,.0f} MiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small size, to see that it runs")
    sizes = ((1023, 32, 5003),) if parser.parse_args().smoke else SIZES
    print(f"JAX {jax.__version__}, {jax.default_backend()}")

    rows = []
    for size in sizes:
        for dtype in (jnp.float32, jnp.bfloat16):
            args = arguments(*size, dtype)
            logits = size[0] * size[2] * 4
            full, ours = temporaries(full_logits, args), temporaries(linear(), args)
            frozen = temporaries(linear(), args, (0,))
            name = f"{size[0]} x {size[1]} x {size[2]}"
            held = (mib(full), mib(ours), f"{ours / full:.1%}", mib(frozen), f"{frozen / full:.1%}")
            rows.append((name, jnp.dtype(dtype).name, mib(logits), *held))
    heads = ("positions x features x vocab", "dtype", "logits in float32", "Optax, full logits")
    heads += ("jxent", "", "frozen", "")
    table("Temporaries of `value_and_grad`", heads, rows)

    args = arguments(*sizes[0], jnp.float32)
    rows = []
    for block_size in (64, 256, 1024, sizes[0][0]):
        losses = linear(block_size=block_size)
        rows.append((str(block_size), mib(temporaries(losses, args)), mib(temporaries(losses, args, (0,)))))
    table(f"By `block_size`, {sizes[0]}", ("`block_size`", "hidden and kernel", "frozen kernel"), rows)

    rows = []
    for name, loss in {
        '`"mean"`': linear(),
        '`"mean"`, `recompute=True`': linear(recompute=True),
        '`"none"`': linear(reduction="none"),
    }.items():
        rows.append((name, mib(temporaries(loss, args)), mib(kept(loss, args))))
    heads = ("reduction", "temporaries", "kept between the passes")
    table(f"Between the passes, {sizes[0]}", heads, rows)


if __name__ == "__main__":
    main()
