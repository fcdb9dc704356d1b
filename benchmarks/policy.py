"""Loss, log-probability and entropy of each token, all three differentiated: memory and time beside full logits.

An objective of reinforcement learning is made of these three. Others are what one would write without a library: full
logits, or `lax.map` over parts, each computed again for its gradient.

    pip install -e ".[bench]"
    python benchmarks/policy.py --smoke                    # seconds
    python benchmarks/policy.py --out benchmarks/records   # and the record, a minute
"""

import argparse
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
from report import headline, machine, save
from turns import measured, print_measured

import jxent

PARTS = 8


def from_jxent(hidden, kernel, labels):
    # Where no label is ignored, for a program of one loop forwards and one backwards, whose matmuls are counted.
    options = {"reduction": "none", "return_stats": True, "ignore_index": None}
    loss, stats = jxent.linear_cross_entropy(hidden, kernel, labels, **options)
    return loss, stats.log_prob, stats.entropy


def dense(hidden, kernel, labels):
    log_p = jax.nn.log_softmax(hidden @ kernel)
    log_prob = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return -log_prob, log_prob, -jnp.sum(jnp.exp(log_p) * log_p, -1)


def in_parts(array):
    return array.reshape(PARTS, -1, *array.shape[1:])


def mapped(hidden, kernel, labels):
    part = jax.checkpoint(lambda part: dense(part[0], kernel, part[1]))
    return [a.reshape(labels.shape) for a in jax.lax.map(part, (in_parts(hidden), in_parts(labels)))]


def objective(of_tokens, hidden, kernel, labels, coefficients):
    loss, log_prob, entropy = of_tokens(hidden, kernel, labels)
    return jnp.sum(coefficients * loss + jnp.cos(coefficients) * log_prob + 0.1 * entropy)


def floor(hidden, kernel, labels, coefficients):
    """The matmuls of a sweep forwards and one backwards, in parts, and between them nothing but a maximum."""
    del labels, coefficients

    def backwards(kernel_gradient, part):
        g = part @ kernel
        return kernel_gradient + part.T @ g, g @ kernel.T

    tops = jax.lax.map(lambda part: jnp.max(part @ kernel, -1), in_parts(hidden))
    return tops, jax.lax.scan(backwards, jnp.zeros_like(kernel), in_parts(hidden))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder for policy.json")
    parser.add_argument("--smoke", action="store_true", help="small shapes, two rounds")
    args = parser.parse_args()
    shape = positions, features, classes = (64, 8, 1000) if args.smoke else (2048, 256, 32000)
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (positions, features))
    kernel = jax.random.normal(keys[1], (features, classes)) / features**0.5
    labels = jax.random.randint(keys[2], (positions,), 0, classes)
    arrays = hidden, kernel, labels, jax.random.normal(keys[3], (positions,))

    named = {"jxent": from_jxent, "jax.nn, full logits": dense, "jax.nn, lax.map and checkpoint": mapped}
    functions = {name: jax.value_and_grad(partial(objective, f), (0, 1)) for name, f in named.items()}
    functions["the four matmuls and a maximum"] = floor
    rows = measured(
        {name: jax.jit(f).lower(*arrays).compile() for name, f in functions.items()}, arrays, 2 if args.smoke else 9
    )
    print_measured(rows)
    if args.out:
        record = machine() | {"positions, features, classes": shape, "programs": rows}
        save(record, args.out, "policy.json")
        print(f"\n{headline(record)}")


if __name__ == "__main__":
    main()
