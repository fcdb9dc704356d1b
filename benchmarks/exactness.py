"""Relative error of the loss and its derivatives in float32: jxent beside what else there is.

First the loss and the label's gradient; then, of the libraries in JAX, the loss's tangent along a random vector and the
label's element of the Hessian times that vector, both relative to the magnitudes of their terms.

Every row has 1000 classes; the label's logit lies `margin` above the largest of the others, and `offset` is added to
all. The truth is float64 NumPy on the same float32 logits. Prints Markdown tables; with `--out` it also writes two
records, and figures over margins up to 100. jax-cce and tokamax get the logits as hidden states of an identity kernel,
which multiplies exactly. PyTorch is optional.

    pip install -e ".[bench]"
    python benchmarks/exactness.py                            # the tables, half a minute
    python benchmarks/exactness.py --out benchmarks/records   # and the record and the figure
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import FuncFormatter
from peers import linear_losses, optional
from report import headline, machine, save

import jxent

matplotlib.use("Agg")

MARGINS = (1.0, 5.0, 10.0, 17.0, 20.0, 40.0)  # of the tables
DRAWN = tuple(np.arange(0.0, 101.0, 2.0))
OFFSETS = (0.0, 1e4)
QUANTITIES = ("loss", "gradient at the label")
ALONG = ("tangent", "Hessian-vector product at the label")
CLASSES = 1000
ROWS = 64
ROUNDOFF = float(jnp.finfo(jnp.float32).eps) / 2
SMALLEST = float(jnp.finfo(jnp.float32).tiny)


def rows(rng, margin):
    """Logits in float64, without an offset; the label is class 0, which is the largest (at a margin of 0, a tie)."""
    logits = rng.normal(size=(ROWS, CLASSES))
    logits[:, 0] = logits[:, 1:].max(-1) + margin
    return logits


def truth(logits):
    """Loss and label gradient in float64, each with what errors are relative to."""
    x = logits.astype(np.float64)
    loss = np.log1p(np.exp(x[:, 1:] - x[:, :1]).sum(-1))
    return [(loss, loss), (np.expm1(-loss), -np.expm1(-loss))]


def vector():
    return np.random.default_rng(7).normal(size=(ROWS, CLASSES)).astype(np.float32)


def truth_along(logits):
    """Tangent and the label's element of the Hessian-vector product in float64, each with its terms' magnitudes."""
    (loss, _), _ = truth(logits)
    x, v = logits.astype(np.float64), vector().astype(np.float64)
    u = v - v[:, :1]  # the label, class 0, is the largest
    terms = np.exp(x[:, 1:] - x[:, :1] - loss[:, None]) * u[:, 1:]
    tangent, size, p = terms.sum(-1), np.abs(terms).sum(-1), np.exp(-loss)
    return [(tangent, size), (-p * tangent, p * size)]


# --- the libraries: logits to (losses, label gradients) ---------------------------------------------------------------


def jax_peer(losses):
    def run(logits):
        value, pull = jax.vjp(lambda x: losses(x, jnp.zeros(len(x), jnp.int32)), jnp.asarray(logits))
        return value, pull(jnp.ones_like(value))[0][:, 0]

    return run


def peer_along(losses):
    """Of losses (logits, labels) to the tangent, and the label's element of the Hessian-vector product."""

    def of_zeros(x):
        return losses(x, jnp.zeros(len(x), jnp.int32))

    def run(logits):
        x, v = jnp.asarray(logits), vector()
        product = jax.jvp(jax.grad(lambda x: jnp.sum(of_zeros(x))), (x,), (v,))[1]
        return jax.jvp(of_zeros, (x,), (v,))[1], product[:, 0]

    return run


def linear_peer(loss):
    """Of a mean loss of (hidden, kernel, labels): it takes the rows one by one. What jax-cce pads with it masks."""

    def row(logits):
        value, gradient = jax.value_and_grad(loss)(logits[None], jnp.eye(CLASSES), jnp.zeros(1, jnp.int32))
        return value, gradient[0, 0]

    return jax.jit(lambda logits: jax.lax.map(row, logits))


def torch_peer(logits):
    torch = optional("torch")
    x = torch.tensor(logits, requires_grad=True)
    value = torch.nn.functional.cross_entropy(x, torch.zeros(len(x), dtype=torch.long), reduction="none")
    value.sum().backward()
    return value.detach().numpy(), x.grad.numpy()[:, 0]


IN_JAX = {
    "jxent": lambda x, t: jxent.cross_entropy(x, t, reduction="none"),
    "Optax": optax.softmax_cross_entropy_with_integer_labels,
    "`jax.nn.log_softmax`": lambda x, t: -jax.nn.log_softmax(x)[jnp.arange(len(x)), t],
}


def libraries():
    """Name -> function of logits."""
    found = {name: jax_peer(losses) for name, losses in IN_JAX.items()}
    if optional("torch"):
        found["PyTorch"] = torch_peer
    linear = linear_losses()
    for name, peer in {"jax-cce": "jax-cce", "tokamax": "tokamax, xla"}.items():
        if peer in linear:
            found[name] = linear_peer(linear[peer])
    return found


# --- their errors -----------------------------------------------------------------------------------------------------


def errors(peers, margins, seed, quantities=QUANTITIES, truth=truth):
    """A row for each offset, quantity, margin and library: the worst relative error, and whether all are 0."""
    rng, found = np.random.default_rng(seed), []
    for margin in margins:
        noise = rows(rng, margin)
        for offset in OFFSETS:
            logits = (noise + offset).astype(np.float32)
            wanted, spread = truth(logits), np.ptp(logits.astype(np.float64), -1).max()
            for name, peer in peers.items():
                for quantity, got, (want, size) in zip(quantities, peer(logits), wanted, strict=True):
                    got = np.asarray(got, np.float64)
                    found.append(
                        {
                            "offset": offset,
                            "quantity": quantity,
                            "margin": margin,
                            "library": name.strip("`"),
                            "error": float(np.max(np.abs(got - want) / size)),
                            "zero": not np.any(got),
                            "smallest": float(np.min(size)),
                            "smallest_exponential": float(np.exp(-spread)),
                        }
                    )
    return found


def shown(row):
    error = row["error"]
    return "100%: it is 0" if row["zero"] else f"{error:.0e}" if error < 1e-3 else f"{error:.1%}"


def lines(found):
    """The same as one object for each offset, quantity and library."""
    series = {}
    for row in found:
        key = {name: row[name] for name in ("offset", "quantity", "library")}
        line = series.setdefault(tuple(key.values()), key | {"margins": [], "errors": []})
        line["margins"].append(row["margin"])
        line["errors"].append(row["error"])
    return list(series.values())


def tables(found, names, quantities=QUANTITIES):
    cells = {(row["offset"], row["quantity"], row["margin"], row["library"]): shown(row) for row in found}
    for offset in OFFSETS:
        for quantity in quantities:
            print(f"\nWorst relative error of the {quantity}, offset {offset:g}\n")
            print("| margin | " + " | ".join(names) + " |")
            print("|---:|" + "---:|" * len(names))
            for margin in MARGINS:
                line = [cells[offset, quantity, margin, name.strip("`")] for name in names]
                print(f"| {margin:g} | " + " | ".join(line) + " |")


# --- the figure -------------------------------------------------------------------------------------------------------

WIDTHS = (2.8, 6.5, 5.0, 3.6, 2.4, 1.1)  # coinciding lines show as edges of the wider one


def draw(found, title, folder, name="exactness", quantities=QUANTITIES):
    figure, panels = plt.subplots(2, 2, figsize=(13, 8.6), sharex=True, sharey=True, layout="constrained")
    figure.suptitle(title, fontsize=12)
    for offset, line in zip(OFFSETS, panels, strict=True):
        for quantity, panel in zip(quantities, line, strict=True):
            draw_panel(panel, [row for row in found if row["offset"] == offset and row["quantity"] == quantity])
            panel.set_title(f"{quantity}, offset {offset:g}", fontsize=11)
    for panel in panels[:, 0]:
        panel.set_ylabel(f"worst relative error of {ROWS} rows")
    for panel in panels[1]:
        panel.set_xlabel("margin of the label's logit over the largest other")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=3)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=110)
    plt.close(figure)


def draw_panel(panel, part):
    for i, name in enumerate(dict.fromkeys(row["library"] for row in part)):
        margins, worst = zip(*((row["margin"], row["error"]) for row in part if row["library"] == name), strict=True)
        panel.plot(margins, worst, label=name, linewidth=WIDTHS[i], zorder=9 if i == 0 else 2 + i)
    end = max(row["margin"] for row in part)
    too_small = {
        "some exponentials below\nfloat32's normal numbers": ("smallest_exponential", "0.95"),
        "the result itself below": ("smallest", "0.88"),
    }
    for text, (key, shade) in too_small.items():
        start = min((row["margin"] for row in part if row[key] < SMALLEST), default=end)
        panel.axvspan(start, end, color=shade, linewidth=0, zorder=0)
        panel.annotate(text, (start + 1, 2e-7), va="bottom", fontsize=8, color="0.3", rotation=90, zorder=10)
    for at, style, text, place in ((1, ":", "100%: a result of 0", "bottom"), (ROUNDOFF, "--", "unit roundoff", "top")):
        panel.axhline(at, color="0.35", linewidth=0.9, linestyle=style, zorder=1)
        panel.annotate(text, (45, at * (1.4 if place == "bottom" else 0.8)), va=place, fontsize=8.5, color="0.25")
    panel.set_yscale("log")
    panel.set_xlim(-1, end)
    panel.set_ylim(1.5e-8, 6)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda e, _: f"{e:.0%}" if e > 0.009 else f"1e{np.log10(e):.0f}"))
    panel.grid(color="0.92", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder for exactness.json, .png and .svg")
    args = parser.parse_args()
    peers = libraries()
    found = errors(peers, MARGINS, seed=0)
    tables(found, list(peers))
    peers_along = {name: peer_along(losses) for name, losses in IN_JAX.items()}
    found_along = errors(peers_along, MARGINS, 0, ALONG, truth_along)
    tables(found_along, list(peers_along), ALONG)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        drawn = errors(peers, DRAWN, seed=1)
        drawn_along = errors(peers_along, DRAWN, 1, ALONG, truth_along)
        record = machine() | {"classes": CLASSES, "rows": ROWS}
        save(record | {"tables": found, "figure": lines(drawn)}, args.out, "exactness.json")
        save(record | {"tables": found_along, "figure": lines(drawn_along)}, args.out, "exactness-along.json")
        title = f"float32, {CLASSES} classes, against float64 on the same logits"
        draw(drawn, title, args.out)
        draw(drawn_along, title, args.out, "exactness-along", ALONG)
        print(f"\n{headline(record)}\n{args.out}/exactness and exactness-along: .json, .png, .svg")


if __name__ == "__main__":
    main()
