"""What a loss that rounds does to training, once the examples are learned with confidence.

A small network learns handwritten digits (scikit-learn's, nothing is downloaded) in float32 at a constant learning
rate, without weight decay or smoothing, once with `jxent.cross_entropy` and once with Optax's, from the same parameters
and on the same batches, with each of several optimizers. At steps in between, on the logits of all training examples:

- the error of either library's gradient, of the logits, against float64 on the same float32 logits: of each example's,
  and of all together, which the confident examples hardly enter;
- the share of examples whose gradient at the label is 0;
- the loss of the float32 parameters in float64, beside what the library reports;
- the model's own rounding, which no loss can mend: the same error, but of the exact gradient at the float32 logits
  against that at the logits that the same parameters have in float64.

    pip install -e ".[bench,examples]" && python benchmarks/confidence.py --out benchmarks/records
    python benchmarks/confidence.py --smoke       # some seconds, to see that it runs

Prints Markdown tables; `--out` writes a record and a figure. After Prieto et al. 2025, "Grokking at the Edge of
Numerical Stability", https://arxiv.org/abs/2501.04697.
"""

import argparse
import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.ticker import PercentFormatter
from measure import headline, machine, save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jxent

matplotlib.use("Agg")

HIDDEN = 128
BATCH_SIZE = 128
LOSSES = {
    "jxent": lambda logits, labels: jxent.cross_entropy(logits, labels, reduction="none"),
    "Optax": optax.softmax_cross_entropy_with_integer_labels,
}
OPTIMIZERS = {  # and steps
    "SGD": (optax.sgd(0.5), 100_000),
    "Adam": (optax.adam(5e-3), 60_000),
    "Adam, eps=1e-30": (optax.adam(5e-3, eps=1e-30), 60_000),
}
MEASURED = 40  # times, at steps that grow by a factor


class Network(nnx.Module):
    """Images (batch, 64) to logits (batch, 10)."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, 10, rngs=rngs)

    def __call__(self, images):
        return self.second(nnx.relu(self.first(images)))


def load_data():
    """((images, labels) of training, those held out)."""
    digits = load_digits()
    images, labels = digits.data.astype(np.float32) / 16, digits.target.astype(np.int32)
    images, held_images, labels, held_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return (images, labels), (held_images, held_labels)


def trainer(loss, optimizer, images, labels, seed):
    """(the state before step 0, a function of a state and two steps to train from the one to the other, a model)."""
    graph, state = nnx.split((model := Network(nnx.Rngs(seed)), nnx.Optimizer(model, optimizer, wrt=nnx.Param)))
    images, labels = jnp.asarray(images), jnp.asarray(labels)

    @jax.jit
    def advance(state, start, stop):
        def step(i, state):
            model, optimizer = nnx.merge(graph, state)
            # Drawn from the step's number alone: the same for either loss.
            batch = jax.random.randint(jax.random.fold_in(jax.random.key(seed), i), (BATCH_SIZE,), 0, len(labels))
            grads = nnx.grad(lambda model: jnp.mean(loss(model(images[batch]), labels[batch])))(model)
            optimizer.update(model, grads)
            return nnx.state((model, optimizer))

        return jax.lax.fori_loop(start, stop, step, state)

    return state, advance, lambda state: nnx.merge(graph, state)[0]


# --- the truth, in float64 --------------------------------------------------------------------------------------------


def exact(logits, labels):
    """(losses, gradients) of the logits, with the label left out of the sum: nothing cancels."""
    x = np.asarray(logits, np.float64)
    rows = np.arange(len(x))
    z = x - x.max(-1, keepdims=True)
    terms = np.exp(z)
    terms[rows, labels] = 0
    at_label = z[rows, labels]
    log_z = np.log1p(terms.sum(-1) + np.expm1(at_label))
    losses = log_z - at_label
    gradients = np.exp(z - log_z[:, None])
    gradients[rows, labels] = np.expm1(-losses)
    return losses, gradients


def logits_in_float64(model, images):
    w, b, v, c = (
        np.asarray(a[...], np.float64)
        for a in (model.first.kernel, model.first.bias, model.second.kernel, model.second.bias)
    )
    return np.maximum(images.astype(np.float64) @ w + b, 0) @ v + c


# --- what is measured -------------------------------------------------------------------------------------------------


def norm(gradients):
    """Of each example, of whatever size."""
    largest = np.max(np.abs(gradients), -1)
    return largest * np.linalg.norm(gradients / np.where(largest == 0, 1, largest)[:, None], axis=-1)


def difference(got, want):
    """The relative error of each example's gradient, in the middle and at worst, and of all together."""
    seen = norm(want) > 0  # beyond a margin of 745 float64 has 0 as well
    each = (norm(got - want)[seen] / norm(want)[seen]) if seen.any() else np.zeros(1)
    whole = np.linalg.norm(norm(got - want)) / np.linalg.norm(norm(want))
    return {"median": float(np.median(each)), "worst": float(np.max(each)), "whole": float(whole)}


forward = nnx.jit(lambda model, images: model(images))


@partial(jax.jit, static_argnums=0)
def losses_and_gradients(name, logits, labels):
    values, pull = jax.vjp(lambda logits: LOSSES[name](logits, labels), logits)
    return values, pull(jnp.ones_like(values))[0]


def measured(model, training, held_out):
    images, labels = training
    logits = np.asarray(forward(model, images))
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    margins = logits[rows, labels].astype(np.float64) - others.max(-1)
    _, want = exact(logits, labels)
    in_float64 = logits_in_float64(model, images)
    loss, ideal = exact(in_float64, labels)
    found = {
        "loss": float(np.mean(loss)),
        "margins": [float(q) for q in np.quantile(margins, (0, 0.5, 1))],
        "largest_logit": float(np.max(np.abs(logits))),
        "model": difference(want, ideal),
        "held_out_accuracy": float(np.mean(np.argmax(forward(model, held_out[0]), -1) == held_out[1])),
    }
    for name in LOSSES:
        values, gradients = (np.asarray(a, np.float64) for a in losses_and_gradients(name, logits, labels))
        found[name] = difference(gradients, want) | {
            "reported": float(np.mean(values)),
            "zero_at_label": float(np.mean(gradients[rows, labels] == 0)),
        }
    return found


def run(name, trained_by, training, held_out, steps, seed):
    """What is measured at each of these steps, of one optimizer and loss."""
    state, advance, model_of = trainer(LOSSES[trained_by], OPTIMIZERS[name][0], *training, seed)
    done, found = 0, []
    with tqdm(total=steps[-1], desc=f"{name}, {trained_by}", unit="step") as progress:
        for until in steps:
            while done < until:
                size = min(500, until - done)
                state = jax.block_until_ready(advance(state, done, done + size))
                done += size
                progress.update(size)
            found.append({"step": until} | measured(model_of(state), training, held_out))
            progress.set_postfix_str(f"loss {found[-1]['loss']:.1e}, margin {found[-1]['margins'][1]:.0f}")
    return found


def short(number):
    return "0" if number == 0 else f"{number:.0e}" if number < 1e-3 else f"{number:.1%}"


def table(runs):
    own, peer = runs["jxent"], runs["Optax"]
    print("| step | margins: least, median | float64 loss: trained by jxent | by Optax | Optax reports there ", end="")
    print("| gradient at the label 0: jxent | Optax | error of an example's gradient, median: jxent | Optax ", end="")
    print("| worst: jxent | Optax | of all together: jxent | Optax | the model's rounding: median | worst | all |")
    print("|---:|" + "---:|" * 15)
    for a, b in list(zip(own, peer, strict=True))[-1::-3][::-1]:
        cells = [f"{a['step']:,}", f"{a['margins'][0]:.0f}, {a['margins'][1]:.0f}", f"{a['loss']:.2e}"]
        cells += [f"{b['loss']:.2e}", f"{b['Optax']['reported']:.2e}"]
        cells += [f"{a[name]['zero_at_label']:.0%}" for name in LOSSES]
        cells += [short(a[name][key]) for key in ("median", "worst", "whole") for name in LOSSES]
        cells += [short(a["model"][key]) for key in ("median", "worst", "whole")]
        print("| " + " | ".join(cells) + " |")


# --- the figure -------------------------------------------------------------------------------------------------------

COLOURS = {"jxent": "#d62728", "Optax": "#1f77b4", "model": "0.45"}


def draw(record, folder):
    """A column for each optimizer: the loss, the errors of an example's gradient, the margins and what is 0."""
    runs = record["runs"]
    figure, panels = plt.subplots(3, len(runs), figsize=(15, 11), sharex="col", sharey="row", layout="constrained")
    figure.suptitle(
        "Handwritten digits, a small network in float32: training on after everything is learned", fontsize=12
    )
    for (name, both), (loss, errors, shares) in zip(runs.items(), panels.T, strict=True):
        loss.set_title(name, fontsize=11)
        steps = [found["step"] for found in both["jxent"]]
        own = both["jxent"]
        for by in LOSSES:
            style = (
                {"linewidth": 3, "color": COLOURS[by]} if by == "jxent" else {"linestyle": "--", "color": COLOURS[by]}
            )
            loss.plot(steps, [found["loss"] for found in both[by]], label=f"trained by {by}: in float64", **style)
        reported = [found["Optax"]["reported"] for found in both["Optax"]]
        loss.plot(steps, reported, ":", color="k", label="trained by Optax: as it reports it (0 is off the scale)")
        for by, whose in {"jxent": "jxent", "Optax": "Optax", "model": "the model's own rounding"}.items():
            for key, style in {"median": "-", "worst": ":", "whole": "--"}.items():
                label = f"{whose}: {'all together' if key == 'whole' else key}"
                shown = [max(found[by][key], 1e-9) for found in own]
                errors.plot(steps, shown, style, color=COLOURS[by], label=label)
        for by in LOSSES:
            zero = [found[by]["zero_at_label"] for found in own]
            shares.plot(steps, zero, color=COLOURS[by], linewidth=2, label=f"gradient at the label is 0: {by}")
        margins = shares.twinx()
        low, middle, high = zip(*(found["margins"] for found in own), strict=True)
        margins.fill_between(steps, low, high, color="0.9", linewidth=0, label="margins, least to largest (right)")
        margins.plot(steps, middle, color="0.5", label="median margin (right)")
        margins.set_ylim(0, 100)
        margins.set_zorder(shares.get_zorder() - 1)
        shares.patch.set_visible(False)
        margins.spines["top"].set_visible(False)
        if panels[2, -1] is shares:
            margins.set_ylabel("margin of the label's logit")
        else:
            margins.set_yticklabels([])
        if panels[2, 0] is shares:
            lines = [a.get_legend_handles_labels() for a in (shares, margins)]
            shares.legend(lines[0][0] + lines[1][0], lines[0][1] + lines[1][1], fontsize=8, loc="upper left")
        shares.set_xlabel("step")
    for panel in panels.flat:
        panel.set_xscale("log")
        panel.grid(color="0.92", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    for line in panels[:2]:
        line[0].set_yscale("log")
    panels[0, 0].legend(fontsize=8, loc="lower left")
    panels[1, 0].set_ylim(2e-8, 2)
    panels[2, 0].set_ylim(-0.02, 1.05)
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, title="relative error (second row)")
    panels[0, 0].set_ylabel("training loss (nats)")
    panels[1, 0].set_ylabel("relative error of the logits' gradient")
    panels[2, 0].set_ylabel("share of training examples")
    panels[2, 0].yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    for kind in ("png", "svg"):
        figure.savefig(folder / f"confidence.{kind}", dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder for confidence.json, .png and .svg")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the batches")
    parser.add_argument("--smoke", action="store_true", help="few steps")
    parser.add_argument("--draw", type=pathlib.Path, metavar="RECORD", help="only draw, from an earlier record")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.draw.read_text()), args.out or args.draw.parent)
        return
    training, held_out = load_data()
    record = machine() | {"hidden": HIDDEN, "batch_size": BATCH_SIZE, "seed": args.seed, "runs": {}}
    for name, (_, last) in OPTIMIZERS.items():
        last = 100 if args.smoke else last
        steps = sorted({int(step) for step in np.geomspace(10, last, 4 if args.smoke else MEASURED).round()})
        runs = {by: run(name, by, training, held_out, steps, args.seed) for by in LOSSES}
        record["runs"][name] = runs
        print(f"\n{name}; errors at the logits of the model that jxent trained\n")
        table(runs)
    if args.out:
        path = save(record, args.out, "confidence.json")
        draw(record, args.out)
        print(f"\n{headline(record)}\n{path}, {args.out}/confidence.png, .svg")


if __name__ == "__main__":
    main()
