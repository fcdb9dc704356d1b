"""Time by the share of unmasked positions, for `compare.py --preset skipping`.

Every program gets masks of several shares. Optax takes full logits, and so the same time for any mask. PyTorch takes
full logits of the rows that the mask selects: an array whose shape depends on the data, which JAX cannot have.
Each round runs a program once with every mask. Ratios are to the same program with all positions unmasked.
"""

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from peers import torch_here
from report import mib, save_figure, steps, table
from timing import Program, jax_program, ratio, rounds

import jxent

matplotlib.use("Agg")

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05, 0.005)
KINDS = ("scattered", "answers")
SIZE, SMOKE = (4096, 256, 32000), (512, 16, 999)  # positions, features, classes


def cross_entropy(**options):
    def loss(hidden, kernel, labels, where):
        return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels, where=where, **options))

    return loss


def with_weights(hidden, kernel, labels, where):
    """Losses of which the mask selects some afterwards, so that the others have no gradient."""
    losses = jxent.linear_cross_entropy(hidden, kernel, labels, reduction="none")
    return jnp.sum(jnp.where(where, losses, 0))


def kl(hidden, kernel, labels, where):
    del labels
    teacher = jax.lax.stop_gradient((2 * hidden, kernel))
    return jxent.linear_kl_divergence(*teacher, hidden, kernel, where=where)


def full_logits(hidden, kernel, labels, where):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
    return jnp.mean(losses, where=where)


def with_gradients(loss):
    return jax.value_and_grad(loss, (0, 1))


OURS = {
    "value and gradients": with_gradients(cross_entropy()),
    'reduction="none"': with_gradients(cross_entropy(reduction="none")),
    'reduction="none", selected afterwards': with_gradients(with_weights),
    "recompute=True": with_gradients(cross_entropy(recompute=True)),
    "the loss alone": cross_entropy(),
    "linear_kl_divergence": with_gradients(kl),
}
PEERS = {"Optax, full logits": with_gradients(full_logits)}


def rows_selected(hidden, kernel, labels):
    """The loss and its gradients by PyTorch, a function of the mask."""
    torch = torch_here()
    hidden, weight, labels = (torch.from_numpy(np.array(a)) for a in (hidden, kernel.T, labels))
    hidden.requires_grad_()
    weight.requires_grad_()

    def run(mask):
        rows = torch.from_numpy(mask)
        loss = torch.nn.functional.cross_entropy(hidden[rows] @ weight.T, labels[rows].long())
        return loss, torch.autograd.grad(loss, (hidden, weight))

    return run


def masks(positions, rng):
    """By share and kind: scattered, and the ends of eight sequences, as of answers after prompts."""
    found, length = {}, positions // 8
    for share in SHARES:
        found[share, "scattered"] = rng.permutation(positions) < share * positions
        found[share, "answers"] = np.arange(positions) % length >= (1 - share) * length
    return found


def measured(number, size=SIZE):
    positions, features, classes = size
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(positions, features)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(features, classes)) / features**0.5, jnp.float32)
    arrays = hidden, kernel, jnp.asarray(rng.integers(0, classes, positions), jnp.int32)
    all_masks = masks(positions, rng)

    found = {}
    for name, function in steps((OURS | PEERS).items(), "programs"):
        program = jax_program(name, function, [(*arrays, mask) for mask in all_masks.values()])
        found[name] = {"temporaries": program.temporaries, **timed(name, program.run, all_masks, number)}
    if torch_here():
        of_mask, of_number = rows_selected(*arrays), list(all_masks.values())
        found["PyTorch, full logits of the rows selected"] = timed(
            "PyTorch", lambda i: of_mask(of_number[i]), all_masks, number
        )
    return {"size": size, "shares": SHARES, "programs": found}


def timed(name, run, all_masks, number):
    """Seconds with all positions unmasked, and ratios to them for each mask; `run` takes the mask's number."""
    programs = [Program(str(mask), lambda _, i=i: run(i)) for i, mask in enumerate(all_masks)]
    times, failed = rounds(programs, number, name)
    if failed:
        raise RuntimeError(failed)
    whole = str((1.0, "scattered"))
    ratios = {kind: [ratio(times, str((share, kind)), whole) for share in SHARES] for kind in KINDS}
    return {"seconds": float(np.median(times[whole])), "ratios": ratios}


def print_table(record):
    positions, features, classes = record["size"]
    print(f"\n{positions} x {features} x {classes}; time relative to that with all unmasked, scattered and answers")
    heads = ("", "seconds, all", "temporaries", *(f"{share:.1%}" for share in SHARES[1:]))
    rows = []
    for name, found in record["programs"].items():
        pairs = zip(*(found["ratios"][kind][1:] for kind in KINDS), strict=True)
        ratios = [f"{scattered:.2f}, {answers:.2f}" for scattered, answers in pairs]
        rows.append((name, f"{found['seconds']:.2f}", mib(found.get("temporaries")), *ratios))
    table(heads, rows)


def draw(record, folder):
    figure, (relative, absolute) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    percent = [100 * share for share in SHARES]
    for name, found in record["programs"].items():
        ratios = np.array(found["ratios"]["scattered"])
        if name in OURS:
            relative.plot(percent, ratios, "o-", ms=4, label=name)
        if name == "value and gradients" or name not in OURS:
            label = name if name not in OURS else "jxent"
            absolute.plot(percent, found["seconds"] * ratios, "o-", ms=4, label=label)
    relative.plot([0, 100], [0, 1], color="0.6", ls="--", lw=1, label="in proportion")
    relative.set(title="jxent", ylabel="time relative to all positions unmasked", ylim=(0, 1.08))
    absolute.set(title="loss and gradients", ylabel="seconds", ylim=(0, None))
    for panel in (relative, absolute):
        panel.set(xlabel="unmasked positions (%)", xlim=(0, 100))
        panel.legend(frameon=False, loc="upper left")
    save_figure(figure, (relative, absolute), folder, "skipping")
    plt.close(figure)
