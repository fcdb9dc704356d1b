"""Divergences beside what else there is: errors of value and gradient where P and Q nearly agree; memory and time.

Rows of 1000 float32 classes, Q being P with noise added. The truth has 64 bits of mantissa, on the same logits. For the
memory a student of 256 features learns from a frozen teacher of 512, over 32000 classes. distrax and PyTorch are
optional.

    pip install -e ".[bench]" distrax
    python benchmarks/divergences.py --smoke                    # seconds
    python benchmarks/divergences.py --out benchmarks/records   # and the record and the figure, two minutes
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
from peers import optional
from report import headline, machine, save
from turns import measured, print_measured

import jxent

matplotlib.use("Agg")

NOISES = tuple(10.0**e for e in np.arange(0.5, -6.25, -0.25))
SHOWN = (1.0, 1e-2, 1e-4, 1e-6)  # in the table
CLASSES, ROWS = 1000, 64
ROUNDOFF = float(jnp.finfo(jnp.float32).eps) / 2


# --- errors -----------------------------------------------------------------------------------------------------------


def truth(p, q):
    """(KL, its gradient by the logits of Q), of which the second is q - p."""
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a.astype(np.longdouble) for a in (p, q)))
    u = log_q - log_p
    return (np.exp(log_p) * (np.expm1(u) - u)).sum(-1), np.exp(log_p) * np.expm1(u)


def jax_peer(divergence):
    def run(p, q):
        value, pull = jax.vjp(lambda q: divergence(jnp.asarray(p), q), jnp.asarray(q))
        return value, pull(jnp.ones_like(value))[0]

    return jax.jit(run)


def of_log_probs(divergence):
    return lambda p, q: divergence(jax.nn.log_softmax(p), jax.nn.log_softmax(q))


def torch_peer(p, q):
    torch = optional("torch")
    x = torch.tensor(q, requires_grad=True)
    log_p, log_q = torch.nn.functional.log_softmax(torch.tensor(p), -1), torch.nn.functional.log_softmax(x, -1)
    value = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    value.sum().backward()
    return value.detach().numpy(), x.grad.numpy()


def libraries():
    """Name -> function of the logits of P and Q, to the value and the gradient by the latter."""
    found = {
        "jxent": jax_peer(lambda p, q: jxent.kl_divergence(p, q, reduction="none")),
        "Optax": jax_peer(of_log_probs(lambda a, b: optax.losses.kl_divergence_with_log_targets(b, a))),
        "jax.nn": jax_peer(of_log_probs(lambda a, b: jnp.sum(jnp.exp(a) * (a - b), -1))),
    }
    if distrax := optional("distrax"):
        found["distrax"] = jax_peer(lambda p, q: distrax.Categorical(p).kl_divergence(distrax.Categorical(q)))
    if optional("torch"):
        found["PyTorch"] = torch_peer
    return found


def errors(peers):
    """A row for each noise, quantity and library: the worst relative error of the rows."""
    rng, found = np.random.default_rng(0), []
    for noise in NOISES:
        p = (3 * rng.normal(size=(ROWS, CLASSES))).astype(np.float32)
        q = (p + noise * rng.normal(size=p.shape)).astype(np.float32)
        value, gradient = truth(p, q)
        largest = np.abs(gradient).max(-1)
        for name, peer in peers.items():
            of_value, of_gradient = peer(p, q)
            worst = {
                "value": np.abs(np.asarray(of_value, float) / value - 1).max(),
                "gradient": (np.abs(np.asarray(of_gradient, float) - gradient).max(-1) / largest).max(),
            }
            found += [
                {"noise": noise, "quantity": quantity, "library": name, "error": float(error)}
                for quantity, error in worst.items()
            ]
    return found


def print_errors(found, names):
    for quantity in ("value", "gradient"):
        print(f"\nWorst relative error of the {quantity} of KL\n")
        print("| noise | " + " | ".join(names) + " |")
        print("|---:|" + "---:|" * len(names))
        for noise in SHOWN:
            here = [row for row in found if np.isclose(row["noise"], noise) and row["quantity"] == quantity]
            cells = {row["library"]: f"{row['error']:.1e}" for row in here}
            print(f"| {noise:g} | " + " | ".join(cells[name] for name in names) + " |")


def draw(found, path):
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    figure.suptitle(f"KL(P || Q) in float32, {CLASSES} classes, logits of Q = those of P + noise", fontsize=12)
    names = list(dict.fromkeys(row["library"] for row in found))
    widths = dict(zip(names, (2.8, 6.5, 4.5, 2.4, 1.1), strict=False))
    for quantity, panel in zip(("value", "gradient"), panels, strict=True):
        for name in names:
            line = [(r["noise"], r["error"]) for r in found if (r["quantity"], r["library"]) == (quantity, name)]
            panel.plot(*zip(*line, strict=True), label=name, linewidth=widths[name], zorder=9 if name == "jxent" else 2)
        for at, style, text in ((1, ":", "100%: noise alone"), (ROUNDOFF, "--", "unit roundoff")):
            panel.axhline(at, color="0.35", linewidth=0.9, linestyle=style, zorder=1)
            panel.annotate(text, (3, at * 1.3), fontsize=8.5, color="0.25")
        panel.set(xscale="log", yscale="log", xlabel="standard deviation of the noise")
        panel.set_title(f"worst relative error of the {quantity}", fontsize=11)
        panel.invert_xaxis()
        panel.yaxis.set_major_formatter(
            FuncFormatter(lambda e, _: f"{e:.0%}" if 0.009 < e < 2 else f"1e{np.log10(e):.0f}")
        )
        panel.grid(color="0.92", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    for kind in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{kind}"), dpi=110)
    plt.close(figure)


# --- memory and time --------------------------------------------------------------------------------------------------


def dense(*arrays):
    log_p, log_q = (jax.nn.log_softmax(hidden @ kernel) for hidden, kernel in (arrays[:2], arrays[2:]))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))


def mapped(hidden_p, kernel_p, hidden_q, kernel_q):
    """What one would write without a library: `lax.map` over parts, each computed again for its gradient."""

    def part(hidden):
        return dense(hidden[0], kernel_p, hidden[1], kernel_q)

    parts = [h.reshape(8, -1, h.shape[-1]) for h in (hidden_p, hidden_q)]
    return jnp.mean(jax.lax.map(jax.checkpoint(part), tuple(parts)))


def floor(hidden_p, kernel_p, hidden_q, kernel_q):
    """The four matmuls of the gradient, in eight parts, and nothing between them."""

    def part(kernel_gradient, hidden):
        g = hidden[0] @ kernel_p + hidden[1] @ kernel_q
        return kernel_gradient + hidden[1].T @ g, g @ kernel_q.T

    parts = [h.reshape(8, -1, h.shape[-1]) for h in (hidden_p, hidden_q)]
    return jax.lax.scan(part, jnp.zeros_like(kernel_q), tuple(parts))


def arrays_of(positions, features_p, features, classes):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((positions, features_p), (features_p, classes), (positions, features), (features, classes))
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    arrays[1], arrays[3] = arrays[1] / features_p**0.5, arrays[3] / features**0.5
    return arrays


def programs(arrays):
    """Name -> the compiled program of value and gradients, of the student's arrays if nothing else is said."""
    of_student, of_both = (2, 3), (0, 1, 2, 3)
    losses = {
        "jxent, KL": (jxent.linear_kl_divergence, of_student),
        "jxent, KL, both sides": (jxent.linear_kl_divergence, of_both),
        "jxent, JS": (jxent.linear_js_divergence, of_student),
        "jax.nn, full logits": (dense, of_student),
        "jax.nn, lax.map and checkpoint": (mapped, of_student),
    }
    found = {
        name: jax.jit(jax.value_and_grad(loss, wrt)).lower(*arrays).compile() for name, (loss, wrt) in losses.items()
    }
    return found | {"the four matmuls alone": jax.jit(floor).lower(*arrays).compile()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder for divergences.json, .png and .svg")
    parser.add_argument("--smoke", action="store_true", help="small shapes, one round")
    args = parser.parse_args()
    peers = libraries()
    found = errors(peers)
    print_errors(found, list(peers))
    shape = (64, 16, 8, 1000) if args.smoke else (2048, 512, 256, 32000)
    arrays = arrays_of(*shape)
    rows = measured(programs(arrays), arrays, rounds=2 if args.smoke else 7)
    print_measured(rows)
    if args.out:
        record = machine() | {"classes": CLASSES, "rows": ROWS, "errors": found}
        record |= {"positions, features of the teacher, of the student, classes": shape, "programs": rows}
        draw(found, save(record, args.out, "divergences.json"))
        print(f"\n{headline(record)}\n{args.out}/divergences: .json, .png, .svg")


if __name__ == "__main__":
    main()
