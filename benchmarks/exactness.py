"""Relative errors of losses, divergences and their derivatives in float32, by jxent and by other libraries.

    pip install -e ".[bench]" distrax                         # PyTorch and distrax are optional
    python benchmarks/exactness.py                            # the tables of docs/benchmarks/accuracy.md, half a minute
    python benchmarks/exactness.py --out benchmarks/records   # and its figures and the README's, over more values

Rows have 1000 classes. Of the cross-entropy the label's logit lies `margin` above the largest of the others, `offset`
is added to all. Of KL(P || Q) the logits of Q are those of P plus noise. The truth is NumPy, with float64 or more, on
the same float32 logits. jax-cce and tokamax get the logits as hidden states of an identity kernel, which multiplies
exactly.
"""

import argparse
import itertools
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import FuncFormatter
from peers import linear_losses, optional
from report import headline, machine, save, save_figure, table

import jxent

matplotlib.use("Agg")

CLASSES, ROWS = 1000, 64
MARGINS = (1.0, 5.0, 10.0, 17.0, 20.0, 40.0)
DRAWN_MARGINS = tuple(np.arange(0.0, 101.0, 2.0))
NOISES = tuple(10.0**e for e in np.arange(0.5, -6.25, -0.25))
ROUNDOFF = float(jnp.finfo(jnp.float32).eps) / 2
SMALLEST = float(jnp.finfo(jnp.float32).tiny)


class Experiment(NamedTuple):
    name: str  # of the figure
    title: str
    axis: str  # what varies from row to row of a table
    tried: tuple[float, ...]
    shown: tuple[float, ...]  # of these, in the tables
    drawn: tuple[float, ...]
    offsets: tuple[float, ...]
    quantities: tuple[str, str]
    logits: Callable[..., list[np.ndarray]]  # of a generator of random numbers and a value of the axis
    truth: Callable[..., list[tuple[np.ndarray, np.ndarray]]]  # each quantity, and what its error is relative to
    libraries: dict[str, Callable[..., Any]]  # functions of the logits to both quantities


# --- the libraries ----------------------------------------------------------------------------------------------------


def jax_peer(rows):
    """Of a function of logits to a value for each row: the values, and their gradients by the last of the logits."""

    def run(*logits):
        *first, last = map(jnp.asarray, logits)
        value, pull = jax.vjp(lambda x: rows(*first, x), last)
        return value, pull(jnp.ones_like(value))[0]

    return run


def torch_peer(rows):
    def run(*logits):
        *first, last = (optional("torch").tensor(x) for x in logits)
        value = rows(*first, last.requires_grad_())
        value.sum().backward()
        return value.detach().numpy(), last.grad.numpy()

    return run


def linear_peer(loss):
    """Of a mean loss of (hidden, kernel, labels): it takes the rows one by one. What jax-cce pads with it masks."""

    def row(logits):
        value, gradient = jax.value_and_grad(loss)(logits[None], jnp.eye(CLASSES), jnp.zeros(1, jnp.int32))
        return value, gradient[0]

    return jax.jit(lambda logits: jax.lax.map(row, logits))


def at_label(peer):
    def run(logits):
        value, gradient = peer(logits)
        return value, gradient[:, 0]

    return run


def along_vector(rows):
    """The tangent, and the label's element of the Hessian-vector product."""

    def run(logits):
        x, v = jnp.asarray(logits), vector()
        product = jax.jvp(jax.grad(lambda x: jnp.sum(rows(x))), (x,), (v,))[1]
        return jax.jvp(rows, (x,), (v,))[1], product[:, 0]

    return run


def of_label_0(losses):
    return lambda logits: losses(logits, jnp.zeros(len(logits), jnp.int32))


IN_JAX = {
    "jxent": of_label_0(lambda x, t: jxent.cross_entropy(x, t, reduction="none")),
    "Optax": of_label_0(optax.softmax_cross_entropy_with_integer_labels),
    "`jax.nn.log_softmax`": lambda x: -jax.nn.log_softmax(x)[:, 0],
}


def cross_entropies():
    found = {name: jax_peer(rows) for name, rows in IN_JAX.items()}
    if torch := optional("torch"):
        found["PyTorch"] = torch_peer(
            lambda x: torch.nn.functional.cross_entropy(x, torch.zeros(len(x), dtype=torch.long), reduction="none")
        )
    linear = linear_losses()
    for name, peer in {"jax-cce": "jax-cce", "tokamax": "tokamax, xla"}.items():
        if peer in linear:
            found[name] = linear_peer(linear[peer])
    return {name: at_label(peer) for name, peer in found.items()}


def divergences():
    def of_log_probs(divergence):
        return lambda p, q: divergence(jax.nn.log_softmax(p), jax.nn.log_softmax(q))

    found = {
        "jxent": lambda p, q: jxent.kl_divergence(p, q, reduction="none"),
        "Optax": of_log_probs(lambda a, b: optax.losses.kl_divergence_with_log_targets(b, a)),
        "jax.nn": of_log_probs(lambda a, b: jnp.sum(jnp.exp(a) * (a - b), -1)),
    }
    if distrax := optional("distrax"):
        found["distrax"] = lambda p, q: distrax.Categorical(p).kl_divergence(distrax.Categorical(q))
    found = {name: jax.jit(jax_peer(rows)) for name, rows in found.items()}
    if torch := optional("torch"):
        f = torch.nn.functional
        found["PyTorch"] = torch_peer(
            lambda p, q: f.kl_div(f.log_softmax(q, -1), f.log_softmax(p, -1), log_target=True, reduction="none").sum(-1)
        )
    return found


# --- logits and truth -------------------------------------------------------------------------------------------------


def confident(rng, margin):
    """The label is class 0, which is the largest (at a margin of 0, a tie)."""
    logits = rng.normal(size=(ROWS, CLASSES))
    logits[:, 0] = logits[:, 1:].max(-1) + margin
    return [logits]


def loss_and_gradient(logits):
    x = logits.astype(np.float64)
    loss = np.log1p(np.exp(x[:, 1:] - x[:, :1]).sum(-1))
    return [(loss, loss), (np.expm1(-loss), -np.expm1(-loss))]


def vector():
    return np.random.default_rng(7).normal(size=(ROWS, CLASSES)).astype(np.float32)


def tangent_and_product(logits):
    """Each is relative to the magnitudes of its terms."""
    (loss, _), _ = loss_and_gradient(logits)
    x, v = logits.astype(np.float64), vector().astype(np.float64)
    u = v - v[:, :1]  # the label, class 0, is the largest
    terms = np.exp(x[:, 1:] - x[:, :1] - loss[:, None]) * u[:, 1:]
    tangent, size, p = terms.sum(-1), np.abs(terms).sum(-1), np.exp(-loss)
    return [(tangent, size), (-p * tangent, p * size)]


def nearly_equal(rng, noise):
    p = (3 * rng.normal(size=(ROWS, CLASSES))).astype(np.float32)
    return [p, (p + noise * rng.normal(size=p.shape)).astype(np.float32)]


def kl_and_gradient(p, q):
    """The gradient is by the logits of Q, q - p, and its error is relative to its largest element."""
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a.astype(np.longdouble) for a in (p, q)))
    u = log_q - log_p
    value, gradient = (np.exp(log_p) * (np.expm1(u) - u)).sum(-1), np.exp(log_p) * np.expm1(u)
    return [(value, value), (gradient, np.abs(gradient).max(-1, keepdims=True))]


def experiments():
    of_margins = partial(
        Experiment,
        title=f"float32, {CLASSES} classes, against float64 on the same logits",
        axis="margin",
        tried=MARGINS,
        shown=MARGINS,
        drawn=DRAWN_MARGINS,
        offsets=(0.0, 1e4),
        logits=confident,
    )
    of_noises = partial(
        Experiment,
        title=f"KL(P || Q) in float32, {CLASSES} classes, logits of Q = those of P + noise",
        axis="noise",
        tried=NOISES,
        shown=(1.0, 1e-2, 1e-4, 1e-6),
        drawn=NOISES,
        offsets=(0.0,),
        logits=nearly_equal,
    )
    first, of_kl = ("loss", "gradient at the label"), ("value", "gradient")
    along = ("tangent", "Hessian-vector product at the label")
    along_vectors = {name: along_vector(rows) for name, rows in IN_JAX.items()}
    return [
        of_margins("exactness", quantities=first, truth=loss_and_gradient, libraries=cross_entropies()),
        of_margins("exactness-along", quantities=along, truth=tangent_and_product, libraries=along_vectors),
        of_noises("divergences", quantities=of_kl, truth=kl_and_gradient, libraries=divergences()),
    ]


# --- errors, tables and figures ---------------------------------------------------------------------------------------


def errors(experiment, values, seed):
    """A row for each value, offset, library and quantity: the worst relative error, and whether all are 0."""
    rng, found = np.random.default_rng(seed), []
    for value in values:
        random = experiment.logits(rng, value)
        for offset in experiment.offsets:
            logits = [(x + offset).astype(np.float32) for x in random]
            wanted, spread = experiment.truth(*logits), np.ptp(logits[0].astype(np.float64), -1).max()
            for name, peer in experiment.libraries.items():
                for quantity, got, (want, size) in zip(experiment.quantities, peer(*logits), wanted, strict=True):
                    got = np.asarray(got, np.float64)
                    row = {"value": value, "offset": offset, "library": name, "quantity": quantity}
                    row |= {"error": float(np.max(np.abs(got - want) / size)), "zero": not np.any(got)}
                    row |= {"smallest": float(np.min(size)), "smallest_exponential": float(np.exp(-spread))}
                    found.append(row)
    return found


def recorded(experiment, found):
    """The errors of the tables, in the order of the values."""
    record = {experiment.axis: list(experiment.tried)}
    for row in found:
        place = record.setdefault(f"{row['quantity']}, offset {row['offset']:g}", {})
        place.setdefault(row["library"].strip("`"), []).append(float(f"{row['error']:.3g}"))
    return record


def shown(row):
    error = row["error"]
    if row["zero"]:
        return "100%: it is 0"
    if error > 2:
        return f"{error:.0f} times" if error < 1e4 else f"{error:.0e} times"
    return f"{error:.0e}" if error < 1e-3 else f"{error:.1%}"


def print_tables(experiment, found):
    names = list(experiment.libraries)
    cells = {(r["offset"], r["quantity"], f"{r['value']:g}", r["library"]): shown(r) for r in found}
    for offset in experiment.offsets:
        for quantity in experiment.quantities:
            print(f"\nWorst relative error of the {quantity}, offset {offset:g}")
            values = (f"{value:g}" for value in experiment.shown)
            rows = ((value, *(cells[offset, quantity, value, name] for name in names)) for value in values)
            table((experiment.axis, *names), rows, texts=0)


WIDTHS = (2.8, 6.5, 5.0, 3.6, 2.4, 1.1)  # coinciding lines show as edges of the wider one
LABELS = {"margin": "margin of the label's logit over the largest other", "noise": "standard deviation of the noise"}


def draw(experiment, found, folder):
    lines, columns = experiment.offsets, experiment.quantities
    figure, panels = plt.subplots(
        len(lines), 2, figsize=(13, 0.6 + 4 * len(lines)), squeeze=False, layout="constrained"
    )
    figure.suptitle(experiment.title, fontsize=12)
    for (offset, quantity), panel in zip(itertools.product(lines, columns), panels.flat, strict=True):
        chosen = [row for row in found if (row["offset"], row["quantity"]) == (offset, quantity)]
        draw_lines(panel, chosen)
        if experiment.axis == "margin":
            shade_underflow(panel, chosen)
        else:
            panel.set(xscale="log", xlim=(max(experiment.drawn), min(experiment.drawn)), ylim=(1.5e-8, 6e6))
        panel.set_title(f"{quantity}, offset {offset:g}", fontsize=11)
        panel.set(xlabel=LABELS[experiment.axis], ylabel=f"worst relative error of {ROWS} rows")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=3)
    save_figure(figure, panels.flat, folder, experiment.name)
    plt.close(figure)


def draw_lines(panel, found, texts=8.5, above=1.3):
    for i, name in enumerate(dict.fromkeys(row["library"] for row in found)):
        values, worst = zip(*((row["value"], row["error"]) for row in found if row["library"] == name), strict=True)
        panel.plot(values, worst, label=name.strip("`"), linewidth=WIDTHS[i], zorder=9 if i == 0 else 2 + i)
    for at, style, text, place in ((1, ":", "100%: a result of 0", above), (ROUNDOFF, "--", "unit roundoff", 0.45)):
        panel.axhline(at, color="0.35", linewidth=0.9, linestyle=style, zorder=1)
        panel.annotate(text, (0.4, at * place), xycoords=("axes fraction", "data"), fontsize=texts, color="0.25")
    panel.set_yscale("log")
    percent = FuncFormatter(lambda e, _: f"{e:.0%}" if 0.009 < e < 2 else f"1e{np.log10(e):.0f}")
    panel.yaxis.set_major_formatter(percent)


def shade_underflow(panel, found):
    """From the margin on where float32's normal numbers end."""
    end = max(row["value"] for row in found)
    too_small = {
        "some exponentials below\nfloat32's normal numbers": ("smallest_exponential", "0.95"),
        "the result itself below": ("smallest", "0.88"),
    }
    for text, (key, shade) in too_small.items():
        start = min((row["value"] for row in found if row[key] < SMALLEST), default=end)
        panel.axvspan(start, end, color=shade, linewidth=0, zorder=0)
        panel.annotate(text, (start + 1, 2e-7), va="bottom", fontsize=8, color="0.3", rotation=90, zorder=10)
    panel.set(xlim=(-1, end), ylim=(1.5e-8, 6))


def draw_first_page(experiment, found, folder):
    """The loss at offset 0 in one panel, which can be read on a telephone."""
    chosen = [row for row in found if (row["offset"], row["quantity"]) == (0, "loss")]
    end = min(row["value"] for row in chosen if row["smallest_exponential"] < SMALLEST)
    figure, panel = plt.subplots(figsize=(4.4, 4.0), layout="constrained")
    draw_lines(panel, chosen, texts=9.5, above=1.9)
    panel.axvspan(end, max(experiment.drawn), color="0.9", linewidth=0, zorder=0)
    panel.annotate("float32's normal\nnumbers end", (end + 9, 2e-4), ha="left", va="center", fontsize=9.5, rotation=90)
    panel.set(xlim=(-1, max(experiment.drawn)), ylim=(1.5e-8, 9))
    panel.set(xlabel="margin of the label's logit over the next", ylabel="relative error of the loss")
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    save_figure(figure, [panel], folder, f"{experiment.name}-loss", dpi=200)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder of the figures")
    args = parser.parse_args()
    record = machine()
    print(headline(record))
    for experiment in experiments():
        tried = errors(experiment, experiment.tried, seed=0)
        record[experiment.name] = recorded(experiment, tried)
        print_tables(experiment, tried)
        if args.out:
            found = errors(experiment, experiment.drawn, seed=1)
            draw(experiment, found, args.out)
            if experiment.name == "exactness":
                draw_first_page(experiment, found, args.out)
    if args.out:
        save(record, args.out, "exactness.json")


if __name__ == "__main__":
    main()
