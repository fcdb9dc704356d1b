"""The sizes that others have published figures for, on the GPU at hand: `compare.py --preset gpu`, in half an hour.

    pip install -e ".[bench,test]" "jax[cuda13]" torch liger-kernel quack-kernels   # PyTorch's: as far as they install
    pip install "cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy.git"
    python benchmarks/compare.py --preset gpu --out benchmarks/records              # the record and the figure

First jxent's losses and gradients are compared with float64, of small sizes, on that GPU; if one is wrong, nothing is
timed. Then PyTorch's libraries are timed, each in a process of its own (torch_kernels.py), and last the JAX programs,
by turns. The record is written after each size. No size is begun that might end after `MINUTES`. The share is the time
of the matmuls (three with gradients, one without) at the GPU's peak, as a part of the time measured.
"""

import math
import pathlib
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch_kernels
from cases import of_size
from report import save, save_figure, table
from timing import as_numpy

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import reference

import jxent

matplotlib.use("Agg")

MINUTES = 28
HEADS = ("share of the peak", "peak memory, with inputs and results")
ONLY = ("jxent", "Optax, full logits", "tokamax, xla", "tokamax, chunked_xla", "floor")  # of the JAX programs
SIZES = [(16384, 2048, 248320), (8192, 4096, 128256), (32768, 4096, 128256)]
# Flops per second in bfloat16, dense, from NVIDIA's data sheets, by a part of a device's name.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
START = time.monotonic()

LOSS_ERROR, GRADIENT_ERROR = 1e-5, {"float32": 1e-4, "bfloat16": 2e-2}  # a gradient's of its largest element
SMOOTH, BLOCK = {"label_smoothing": 0.1, "z_loss_weight": 1e-3}, {"block_size": 256}
CALLS = {  # name -> options of the loss, and options of its blocks
    "smoothing, z-loss": (SMOOTH, BLOCK),
    "statistics": ({"reduction": "none", "return_stats": True}, BLOCK),
    'reduction="none"': ({"reduction": "none"}, BLOCK),
    "the default block": ({}, {}),
    "(vocab, features)": ({}, {"vocab_axis": 0}),
    "recompute": (SMOOTH, BLOCK | {"recompute": True}),
    "soft cap, temperature": ({"logit_softcap": 30.0, "temperature": 0.7}, BLOCK),
}


def as_one(result):
    """One number of the losses, and of log-probabilities and entropies if there are statistics."""
    parts = (result[0], result[1].log_prob, result[1].entropy) if isinstance(result, tuple) else (result,)
    return sum(jnp.sum(part * (2 + jnp.cos(jnp.arange(part.size))).reshape(part.shape)) for part in parts)


def off(got, exact):
    got, exact = as_numpy(got), as_numpy(exact)
    return float(np.max(np.abs(got - exact)) / np.max(np.abs(exact)))


def ours(options, blocks, hidden, kernel, labels):
    kernel, options = kernel.T if "vocab_axis" in blocks else kernel, options | blocks
    return as_one(jxent.linear_cross_entropy(hidden, kernel, labels, precision="highest", **options))


def checked(smoke):
    """Errors of loss and gradients (of the largest element), by call and dtype; ends the program if one is large."""
    size, most = ((257, 16, 503), 2) if smoke else ((1500, 256, 50257), None)
    found = {}
    for dtype in ("bfloat16",) if smoke else GRADIENT_ERROR:
        *arrays, labels = of_size(size, dtype).inputs(0)
        for name, (options, blocks) in list(CALLS.items())[:most]:
            got = jax.jit(jax.value_and_grad(partial(ours, options, blocks), (0, 1)))(*arrays, labels)
            with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
                exact = jax.value_and_grad(
                    lambda h, k, y, o=options: as_one(reference.cross_entropy(h @ k, y, **o)), (0, 1)
                )
                want = jax.jit(exact)(*map(as_numpy, arrays), np.asarray(labels))
            found[f"{name}, {dtype}"] = jax.tree.leaves(jax.tree.map(off, got, want))
    wrong = [n for n, e in found.items() if not (e[0] <= LOSS_ERROR and np.max(e) <= GRADIENT_ERROR[n.split()[-1]])]
    print(f"\njxent against float64, {' x '.join(map(str, size))}")
    table(("", "loss", "hidden", "kernel"), [(name, *(f"{e:.0e}" for e in errors)) for name, errors in found.items()])
    if wrong:
        raise SystemExit(f"wrong on {jax.devices()[0].device_kind}: {'; '.join(wrong)}. Nothing was timed.")
    return found


def prepare(record, cases, number, smoke):
    """Checks jxent and times PyTorch, before JAX takes memory; then yields the cases while there is time for one."""
    record["checked"] = checked(smoke)
    seconds = MINUTES * 60 * 0.4 / len(torch_kernels.LIBRARIES)
    record["kernels"] = torch_kernels.measured([case.size for case in cases], "bfloat16", number, seconds, smoke)
    for case in cases:
        if time.monotonic() - START > (MINUTES - 5) * 60:
            print(f"\nLeft out, for want of time: {case}")
        else:
            yield case._replace(torch_losses=dict)


def complete(record, case, peak, folder):
    """Adds PyTorch's programs to the last case, and share and peak memory to each program; prints, draws and saves."""
    peak = peak or next((peak for name, peak in PEAKS.items() if name in record["devices"][0]), None)
    positions, features, classes = case.size
    inputs = sum(math.prod(a.shape) * a.dtype.itemsize for a in case.shapes())
    for name, taken in record["cases"][-1]["passes"].items():
        for line in record["kernels"]:
            if line["size"] == list(case.size) and line["pass"] == name:
                if "entry" in line:
                    taken["programs"].append(line["entry"])
                else:
                    taken["left_out"][line["name"]] = line["left_out"]
        flops = 2 * positions * features * classes * (3 if name == "value_and_grad" else 1)
        for program in taken["programs"]:
            program["share"] = flops / peak / program["quartiles_s"][1] if peak else None
            held = program["temporaries"]  # not known of PyTorch on a CPU
            program["peak_bytes"] = None if held is None else inputs + program["outputs"] + held
    if folder:  # what has been measured is kept, whatever ends the run
        save(record, folder, "compare-gpu.json")
        draw(record, folder)


def draw(record, folder):
    """Milliseconds, and peak memory, of each program with gradients, by size."""
    cases = record["cases"]
    figure, panels = plt.subplots(len(cases), 2, figsize=(12, 3.2 * len(cases)), layout="constrained", squeeze=False)
    for case, (times, held) in zip(cases, panels, strict=True):
        programs = [p for p in case["passes"]["value_and_grad"]["programs"] if p["name"] != "floor"]
        programs.sort(key=lambda p: -p["quartiles_s"][1])
        names, colors = [p["name"] for p in programs], ["C1" if p["name"] == "jxent" else "C0" for p in programs]
        bars = times.barh(names, [p["quartiles_s"][1] * 1e3 for p in programs], color=colors)
        times.bar_label(bars, [f" {p['share']:.0%}" if p["share"] else "" for p in programs])
        held.barh(names, [(p["peak_bytes"] or 0) / 2**30 for p in programs], color=colors)
        times.set(title=case["title"].split(", ")[1], xlabel="ms, and share of three matmuls at the peak")
        held.set(xlabel="GiB at the peak, inputs and gradients too", yticks=[])
    save_figure(figure, panels.flat, folder, "compare-gpu")
    plt.close(figure)
