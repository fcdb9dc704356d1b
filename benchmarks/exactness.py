"""Relative error of the loss and of the label's gradient in float32: jxent beside what else there is.

Every row has 1000 classes; the label's logit lies `margin` above the largest of the others, and `offset` is added to
all. The truth is float64 NumPy on the same float32 logits. Prints Markdown tables; with `--out` it also writes a record
and a figure over margins up to 100. jax-cce and tokamax get the logits as hidden states of an identity kernel, which
multiplies exactly. PyTorch is optional.

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
    """Loss and label gradient in float64."""
    x = logits.astype(np.float64)
    loss = np.log1p(np.exp(x[:, 1:] - x[:, :1]).sum(-1))
    return loss, np.expm1(-loss)


# --- the libraries: logits to (losses, label gradients) ---------------------------------------------------------------


def jax_peer(losses):
    def run(logits):
        value, pull = jax.vjp(lambda x: losses(x, jnp.zeros(len(x), jnp.int32)), jnp.asarray(logits))
        return value, pull(jnp.ones_like(value))[0][:, 0]

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


def libraries():
    """Name -> function of logits."""
    found = {
        "jxent": jax_peer(lambda x, t: jxent.cross_entropy(x, t, reduction="none")),
        "Optax": jax_peer(optax.softmax_cross_entropy_with_integer_labels),
        "`jax.nn.log_softmax`": jax_peer(lambda x, t: -jax.nn.log_softmax(x)[jnp.arange(len(x)), t]),
    }
    if optional("torch"):
        found["PyTorch"] = torch_peer
    linear = linear_losses()
    for name, peer in {"jax-cce": "jax-cce", "tokamax": "tokamax, xla"}.items():
        if peer in linear:
            found[name] = linear_peer(linear[peer])
    return found


# --- their errors -----------------------------------------------------------------------------------------------------


def errors(peers, margins, seed):
    """A row for each offset, quantity, margin and library: the worst relative error, and whether all are 0."""
    rng, found = np.random.default_rng(seed), []
    for margin in margins:
        noise = rows(rng, margin)
        for offset in OFFSETS:
            logits = (noise + offset).astype(np.float32)
            wanted, spread = truth(logits), np.ptp(logits.astype(np.float64), -1).max()
            for name, peer in peers.items():
                for quantity, got, want in zip(QUANTITIES, peer(logits), wanted, strict=True):
                    got = np.asarray(got, np.float64)
                    found.append(
                        {
                            "offset": offset,
                            "quantity": quantity,
                            "margin": margin,
                            "library": name.strip("`"),
                            "error": float(np.max(np.abs(got - want) / np.abs(want))),
                            "zero": not np.any(got),
                            "smallest": float(np.min(np.abs(want))),
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


def tables(found, names):
    cells = {(row["offset"], row["quantity"], row["margin"], row["library"]): shown(row) for row in found}
    for offset in OFFSETS:
        for quantity in QUANTITIES:
            print(f"\nWorst relative error of the {quantity}, offset {offset:g}\n")
            print("| margin | " + " | ".join(names) + " |")
            print("|---:|" + "---:|" * len(names))
            for margin in MARGINS:
                line = [cells[offset, quantity, margin, name.strip("`")] for name in names]
                print(f"| {margin:g} | " + " | ".join(line) + " |")


# --- the figure -------------------------------------------------------------------------------------------------------

WIDTHS = (2.8, 6.5, 5.0, 3.6, 2.4, 1.1)  # coinciding lines show as edges of the wider one


def draw(found, title, folder):
    figure, panels = plt.subplots(2, 2, figsize=(13, 8.6), sharex=True, sharey=True, layout="constrained")
    figure.suptitle(title, fontsize=12)
    for offset, line in zip(OFFSETS, panels, strict=True):
        for quantity, panel in zip(QUANTITIES, line, strict=True):
            draw_panel(panel, [row for row in found if row["offset"] == offset and row["quantity"] == quantity])
            panel.set_title(f"{quantity}, offset {offset:g}", fontsize=11)
    for panel in panels[:, 0]:
        panel.set_ylabel(f"worst relative error of {ROWS} rows")
    for panel in panels[1]:
        panel.set_xlabel("margin of the label's logit over the largest other")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, handlelength=3)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"exactness.{kind}", dpi=110)
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
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        drawn = errors(peers, DRAWN, seed=1)
        record = machine() | {"classes": CLASSES, "rows": ROWS, "tables": found, "figure": lines(drawn)}
        path = save(record, args.out, "exactness.json")
        draw(drawn, f"float32, {CLASSES} classes, against float64 on the same logits", args.out)
        print(f"\n{headline(record)}\n{path}, {args.out}/exactness.png, .svg")


if __name__ == "__main__":
    main()
