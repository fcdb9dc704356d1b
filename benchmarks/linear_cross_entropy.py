"""Time and memory of `linear_cross_entropy` with gradients, beside what it replaces, on the machine at hand.

    python benchmarks/linear_cross_entropy.py            # both sizes, float32, some ten minutes on two cores
    python benchmarks/linear_cross_entropy.py --smoke    # a few seconds

All candidates run in one process, taking turns, and time is compared round by round: each figure is the median of the
ratios to Optax on full logits. "Three matmuls" is the floor: the logits and the two gradients, and nothing else.
"""

import argparse
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jxent

SIZES = ((2048, 512, 50257), (4096, 256, 32000))
MIB = 2**20


def candidates():
    """Losses of (hidden, kernel, labels); a peer that is not installed is left out."""
    import optax

    def full_logits(hidden, kernel, labels):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels))

    losses = {"Optax, full logits": full_logits}
    try:
        import jax_cce
    except ImportError:
        print("jax-cce is not installed")
    else:
        losses["jax-cce"] = lambda hidden, kernel, labels: jax_cce.linear_cross_entropy(hidden, kernel.T, labels)
    losses["jxent, full logits"] = lambda hidden, kernel, labels: jxent.cross_entropy(hidden @ kernel, labels)
    losses["jxent"] = jxent.linear_cross_entropy
    return losses


def three_matmuls(hidden, kernel, dlogits):
    return hidden @ kernel, dlogits @ kernel.T, hidden.T @ dlogits


def measure(size, dtype, rounds):
    positions, features, vocab = size
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(positions, features)), dtype)
    kernel = jnp.asarray(rng.normal(size=(features, vocab)) / np.sqrt(features), dtype)
    labels = jnp.asarray(rng.integers(0, vocab, positions), jnp.int32)
    some = slice(0, 64)
    logits = np.asarray(hidden[some], np.float64) @ np.asarray(kernel, np.float64)
    top = logits.max(-1)
    picked = np.take_along_axis(logits, np.asarray(labels)[some, None], -1)[:, 0]
    want = np.mean(np.log(np.exp(logits - top[:, None]).sum(-1)) + top - picked)

    programs, memory = {}, {}
    for name, loss in candidates().items():
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        error = abs(float(step(hidden[some], kernel, labels[some])[0]) / want - 1)
        assert error < (1e-5 if dtype == jnp.float32 else 1e-2), f"{name}: the loss is wrong by {error:.1e}"
        programs[name] = step.lower(hidden, kernel, labels).compile(), (hidden, kernel, labels)
        memory[name] = programs[name][0].memory_analysis().temp_size_in_bytes
    dlogits = jnp.asarray(rng.normal(size=(positions, vocab)), dtype)
    floor = jax.jit(three_matmuls).lower(hidden, kernel, dlogits).compile()
    programs["three matmuls"] = floor, (hidden, kernel, dlogits)

    times = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, (program, args) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return times, memory


def ratio(times, name, to):
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one small size, to see that it runs")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    sizes, rounds = (((256, 64, 5003),), 2) if args.smoke else (SIZES, args.rounds)
    print(f"{jax.devices()[0].device_kind}, {platform.machine()}, JAX {jax.__version__}, {args.dtype}, value_and_grad")
    for size in sizes:
        times, memory = measure(size, jnp.dtype(args.dtype), rounds)
        print(f"\n{size[0]} positions x {size[1]} features x {size[2]} classes, {rounds} rounds")
        print("| | seconds, median (least to most) | of Optax | of three matmuls | temporaries |")
        print("|---|---|---:|---:|---:|")
        for name, taken in times.items():
            spread = f"{statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f})"
            of = [f"{ratio(times, name, to):.2f}" for to in ("Optax, full logits", "three matmuls")]
            held = f"{memory[name] / MIB:.0f} MiB" if name in memory else ""
            print(f"| {name} | {spread} | {of[0]} | {of[1]} | {held} |")


if __name__ == "__main__":
    main()
