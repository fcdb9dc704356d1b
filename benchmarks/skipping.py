"""Time by the share of positions that count, of `linear_cross_entropy` and its kin, and of others.

Optax takes full logits, and so the same time for any mask. PyTorch (optional) takes full logits too, of the rows that
the mask selects: an array whose shape depends on the data, which JAX cannot have.

    pip install -e ".[bench]"
    python benchmarks/skipping.py --smoke                    # seconds
    python benchmarks/skipping.py --out benchmarks/records   # and the record and the figure, some ten minutes

Each round runs a program once with every mask, so that what else the machine does meets all of them; the figures are
medians of the rounds' ratios to the same program where all positions count.
"""

import argparse
import pathlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from peers import torch_here
from report import headline, machine, mib, save
from tqdm import tqdm

import jxent

matplotlib.use("Agg")

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05, 0.005)
KINDS = ("scattered", "answers")


def kl(hidden, kernel, labels, where):
    del labels
    teacher = jax.lax.stop_gradient((2 * hidden, kernel))
    return jxent.linear_kl_divergence(*teacher, hidden, kernel, where=where)


def cross_entropy(**options):
    def loss(hidden, kernel, labels, where):
        return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels, where=where, **options))

    return loss


def with_gradients(loss):
    return jax.value_and_grad(loss, (0, 1))


def full_logits(hidden, kernel, labels, where):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
    return jnp.mean(losses, where=where)


PROGRAMS = {
    "value and gradients": with_gradients(cross_entropy()),
    'reduction="none"': with_gradients(cross_entropy(reduction="none")),
    "recompute=True": with_gradients(cross_entropy(recompute=True)),
    "the loss alone": cross_entropy(),
    "linear_kl_divergence": with_gradients(kl),
}


def rows_selected(arrays):
    """The loss and its gradients by PyTorch, a function of the mask."""
    torch = torch_here()
    hidden, weight, labels = (torch.from_numpy(np.array(a)) for a in (arrays[0], arrays[1].T, arrays[2]))
    hidden.requires_grad_()
    weight.requires_grad_()

    def run(mask):
        rows = torch.from_numpy(mask)
        logits = torch.nn.functional.linear(hidden[rows], weight)
        loss = torch.nn.functional.cross_entropy(logits, labels[rows].long())
        return loss, torch.autograd.grad(loss, (hidden, weight))

    return run


def masks(positions, rng):
    """By share and kind: scattered, and the ends of eight sequences, as of answers after prompts."""
    found, length = {}, positions // 8
    for share in SHARES:
        found[share, "scattered"] = rng.permutation(positions) < share * positions
        found[share, "answers"] = np.arange(positions) % length >= (1 - share) * length
    return found


def measured(run, all_masks, rounds):
    """(seconds where all positions count, the ratio to them with each mask)."""
    times = {name: [] for name in all_masks}
    for mask in all_masks.values():
        jax.block_until_ready(run(mask))
    for _ in range(rounds):
        for name, mask in all_masks.items():
            start = time.perf_counter()
            jax.block_until_ready(run(mask))
            times[name].append(time.perf_counter() - start)
    first = np.array(times[1.0, "scattered"])
    ratios = {name: float(np.median(np.array(t) / first)) for name, t in times.items()}
    return {
        "seconds": float(np.median(first)),
        "ratios": {kind: [ratios[share, kind] for share in SHARES] for kind in KINDS},
    }


def draw(record, path):
    figure, (relative, absolute) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    percent = [100 * share for share in SHARES]
    for name, found in record["programs"].items():
        relative.plot(percent, found["ratios"]["scattered"], "o-", ms=4, label=name)
    relative.plot([0, 100], [0, 1], color="0.6", ls="--", lw=1, label="in proportion")
    relative.set(title="jxent", ylabel="time relative to that where all count", ylim=(0, 1.08))
    peers = {"jxent": record["programs"]["value and gradients"]} | record["peers"]
    for name, found in peers.items():
        absolute.plot(percent, found["seconds"] * np.array(found["ratios"]["scattered"]), "o-", ms=4, label=name)
    absolute.set(title="loss and gradients", ylabel="seconds", ylim=(0, None))
    for panel in (relative, absolute):
        panel.set(xlabel="positions that count (%)", xlim=(0, 100))
        panel.grid(color="0.92")
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    for kind in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a small size, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, help="folder for skipping.json, .png and .svg")
    args = parser.parse_args()
    positions, features, vocab, rounds = (512, 16, 999, 2) if args.smoke else (4096, 256, 32000, 5)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(positions, features)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(features, vocab)) / features**0.5, jnp.float32)
    arrays = hidden, kernel, jnp.asarray(rng.integers(0, vocab, positions), jnp.int32)
    all_masks = masks(positions, rng)

    record = machine() | {"positions": positions, "features": features, "vocab": vocab, "shares": SHARES}
    record |= {"programs": {}, "peers": {}}
    others = {"Optax, full logits": with_gradients(full_logits)}
    for name, f in tqdm((PROGRAMS | others).items(), unit=" programs", disable=None):
        program = jax.jit(f).lower(*arrays, all_masks[1.0, "scattered"]).compile()
        found = measured(partial(program, *arrays), all_masks, rounds)
        found["temporaries"] = program.memory_analysis().temp_size_in_bytes
        record["peers" if name in others else "programs"][name] = found
    if torch_here():
        record["peers"]["PyTorch, full logits of the rows selected"] = measured(
            rows_selected(arrays), all_masks, rounds
        )

    print(f"{positions} x {features} x {vocab}; time relative to that where all count, scattered and answers\n")
    print(f"| | seconds, all | temporaries | {' | '.join(f'{share:.1%}' for share in SHARES[1:])} |")
    print(f"|---|{'---:|' * (len(SHARES) + 1)}")
    for name, found in (record["programs"] | record["peers"]).items():
        pairs = zip(*(found["ratios"][kind][1:] for kind in KINDS), strict=True)
        cells = " | ".join(", ".join(f"{ratio:.2f}" for ratio in pair) for pair in pairs)
        print(f"| {name} | {found['seconds']:.2f} | {mib(found.get('temporaries'))} | {cells} |")
    if args.out:
        draw(record, save(record, args.out, "skipping.json"))
        print(f"\n{headline(record)}\n{args.out}/skipping: .json, .png, .svg")


if __name__ == "__main__":
    main()
