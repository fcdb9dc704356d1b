"""What a loss that rounds does to training, once all examples are learned with confidence.

    pip install -e ".[bench,examples]"
    python benchmarks/confidence.py --out benchmarks/records   # docs/theory/confident-training.md, five minutes
    python benchmarks/confidence.py --smoke                    # few steps, to see that it runs

A network of 64, 128 and 10 units learns scikit-learn's digits (nothing is downloaded) in float32, at a constant
learning rate, without weight decay or smoothing. jxent's loss and Optax's each train one, from the same parameters and
on the same batches. At steps in between, with the logits of all training examples of the network that jxent trained:
the error of each library's gradient of the logits against float64 at the same logits, and the model's own rounding,
which no loss can mend. That is the error of the exact gradient at the float32 logits, against the gradient at the
logits that the same parameters have in float64.
"""

import argparse
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from report import headline, machine, save, save_figure, steps, table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jxent

matplotlib.use("Agg")

BATCH_SIZE = 128
LOSSES = {
    "jxent": partial(jxent.cross_entropy, reduction="none"),
    "Optax": optax.softmax_cross_entropy_with_integer_labels,
}
OPTIMIZERS = {  # and how many steps
    "Adam, 0.005": (optax.adam(5e-3), 40_000),
    "Adam, 0.005, eps=1e-30": (optax.adam(5e-3, eps=1e-30), 40_000),
    "SGD, 0.5": (optax.sgd(0.5), 30_000),
}


def load_data():
    """((images, labels) of training, those held out)."""
    digits = load_digits()
    images, labels = digits.data.astype(np.float32) / 16, digits.target.astype(np.int32)
    a, b, c, d = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return (a, c), (b, d)


def parameters(seed):
    first, second = jax.random.split(jax.random.key(seed))
    initial = jax.nn.initializers.lecun_normal()
    return [(initial(first, (64, 128)), jnp.zeros(128)), (initial(second, (128, 10)), jnp.zeros(10))]


def network(parameters, images, xp=jnp):
    (w, b), (v, c) = parameters
    return xp.maximum(images @ w + b, 0) @ v + c


def trainer(loss, optimizer, images, labels, seed):
    """A function that trains a state from one step to another."""
    images, labels = jnp.asarray(images), jnp.asarray(labels)

    def step(i, state):
        parameters, moments = state
        # Drawn from the step's number alone, so that both losses get the same batches.
        batch = jax.random.randint(jax.random.fold_in(jax.random.key(seed), i), (BATCH_SIZE,), 0, len(labels))
        gradients = jax.grad(lambda p: jnp.mean(loss(network(p, images[batch]), labels[batch])))(parameters)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    return jax.jit(lambda state, start, stop: jax.lax.fori_loop(start, stop, step, state))


# --- the truth, and what is off ---------------------------------------------------------------------------------------


def exact(logits, labels):
    """(losses, gradients) in float64, with the label left out of the sum: nothing cancels."""
    x, rows = np.asarray(logits, np.float64), np.arange(len(labels))
    z = x - x.max(-1, keepdims=True)
    terms = np.exp(z)
    terms[rows, labels] = 0
    log_z = np.log1p(terms.sum(-1) + np.expm1(z[rows, labels]))
    losses, gradients = log_z - z[rows, labels], np.exp(z - log_z[:, None])
    gradients[rows, labels] = np.expm1(-losses)
    return losses, gradients


def difference(got, want):
    """Relative errors: that of an example's gradient in the middle of all examples, and that of all together."""
    size = np.max(np.abs(want), -1, keepdims=True)
    seen = size[:, 0] > 0  # beyond a margin of 745 float64 has 0 as well
    got, want, size = got[seen], want[seen], size[seen]
    each = np.linalg.norm((got - want) / size, axis=-1) / np.linalg.norm(want / size, axis=-1)
    return {"median": float(np.median(each)), "whole": float(np.linalg.norm(got - want) / np.linalg.norm(want))}


@partial(jax.jit, static_argnums=0)
def losses_and_gradients(name, logits, labels):
    values, pull = jax.vjp(lambda logits: LOSSES[name](logits, labels), logits)
    return values, pull(jnp.ones_like(values))[0]


def measured(parameters, training, held_out):
    images, labels = training
    rows = np.arange(len(labels))
    logits = np.asarray(jax.jit(network)(parameters, images))
    others = logits.copy()
    others[rows, labels] = -np.inf
    in_float64 = jax.tree.map(lambda a: np.asarray(a, np.float64), parameters)
    loss, ideal = exact(network(in_float64, images.astype(np.float64), np), labels)
    _, want = exact(logits, labels)
    found = {
        "loss": float(np.mean(loss)),
        "margins": [float(q) for q in np.quantile(logits[rows, labels] - others.max(-1), (0, 0.5, 1))],
        "model": difference(want, ideal),
        "held_out_accuracy": float(np.mean(np.argmax(network(parameters, held_out[0]), -1) == held_out[1])),
    }
    for name in LOSSES:
        values, gradients = (np.asarray(a, np.float64) for a in losses_and_gradients(name, logits, labels))
        zero = float(np.mean(gradients[rows, labels] == 0))
        found[name] = difference(gradients, want) | {"reported": float(np.mean(values)), "zero_at_label": zero}
    return found


def run(name, trained_by, data, until, seed):
    """What is measured at each of these steps."""
    optimizer = OPTIMIZERS[name][0]
    advance = trainer(LOSSES[trained_by], optimizer, *data[0], seed)
    state, found = (parameters(seed), optimizer.init(parameters(seed))), []
    for start, stop in steps(zip([0, *until], until, strict=False), f"{name}, {trained_by}"):
        state = advance(state, start, stop)
        found.append({"step": stop} | measured(state[0], *data))
    return found


# --- the table and the figure -----------------------------------------------------------------------------------------


def short(number):
    return "0" if number == 0 else f"{number:.0e}" if number < 1e-3 else f"{number:.1%}"


def print_table(runs):
    def rows():
        for own, peer in list(zip(runs["jxent"], runs["Optax"], strict=True))[-1::-4][::-1]:
            yield (
                f"{own['step']:,}",
                f"{own['margins'][0]:.0f}, {own['margins'][1]:.0f}",
                f"{own['loss']:.1e}, {peer['loss']:.1e}",
                f"{peer['Optax']['reported']:.1e}",
                ", ".join(f"{own[name]['zero_at_label']:.0%}" for name in LOSSES),
                *(", ".join(short(own[name][key]) for name in LOSSES) for key in ("median", "whole")),
                short(own["model"]["whole"]),
            )

    heads = ("step", "margin: least, median", "loss: jxent, Optax", "as Optax reports it", "label gradient 0")
    table((*heads, "error, median", "error, all together", "the model's rounding"), rows(), texts=0)


COLOURS = {"jxent": "#d62728", "Optax": "#1f77b4", "model": "0.45"}


def draw(runs, folder):
    """A column for each optimizer: the loss, and the errors of the gradient."""
    figure, panels = plt.subplots(2, len(runs), figsize=(13, 7.5), sharex="col", sharey="row", layout="constrained")
    for (name, both), (loss, errors) in zip(runs.items(), panels.T, strict=True):
        own = both["jxent"]
        at = [found["step"] for found in own]
        for by in LOSSES:
            loss.plot(at, [found["loss"] for found in both[by]], color=COLOURS[by], label=f"trained by {by}")
        for by in (*LOSSES, "model"):
            label = "the model's own rounding" if by == "model" else f"gradient of {by}"
            for key, line, of in (("median", "-", "an example, median"), ("whole", "--", "all together")):
                shown = [max(found[by][key], 1e-9) for found in own]
                errors.plot(at, shown, line, color=COLOURS[by], label=f"{label}: {of}")
        loss.set_title(name, fontsize=11)
        errors.set(xlabel="step", xscale="log")
    panels[0, 0].set(yscale="log", ylabel="training loss in float64")
    panels[1, 0].set(yscale="log", ylabel="relative error of the logits' gradient", ylim=(2e-8, 2))
    panels[0, 0].legend(frameon=False)
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save_figure(figure, panels.flat, folder, "confidence")
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder of the record and the figure")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the batches")
    parser.add_argument("--smoke", action="store_true", help="few steps")
    args = parser.parse_args()
    data, runs = load_data(), {}
    record = machine() | {"seed": args.seed, "runs": runs}
    print(headline(record))
    for name, (_, last) in list(OPTIMIZERS.items())[: 1 if args.smoke else None]:
        until = [10, 20] if args.smoke else sorted({int(step) for step in np.geomspace(10, last, 40).round()})
        runs[name] = {by: run(name, by, data, until, args.seed) for by in LOSSES}
        print(f"\n{name}")
        print_table(runs[name])
    if args.out:
        save(record, args.out, "confidence.json")
        draw(runs, args.out)


if __name__ == "__main__":
    main()
