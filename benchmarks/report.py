"""How benchmarks report: the machine and the versions, Markdown tables, figures, records and progress bars."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform

import jax
import psutil
from tqdm import tqdm

MIB = 2**20
RECORDS = pathlib.Path(__file__).parent / "records"
FIGURES = RECORDS.parent.parent / "docs" / "figures"  # of the records; the site has only what is below docs/


def machine():
    """The record of where and with what something was measured."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    versions = {"Python": platform.python_version()}
    libraries = "jax-cce", "tokamax", "torch", "cut-cross-entropy", "liger-kernel", "quack-kernels", "distrax"
    for name in ("jxent", "jax", "jaxlib", "numpy", "optax", *libraries):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "cpu": cpu,
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "versions": versions,
    }


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def headline(record):
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    device = "" if record["backend"] == "cpu" else f"{len(record['devices'])} x {record['devices'][0]}; "
    cores = "1 core" if record["cores"] == 1 else f"{record['cores']} cores"
    return f"{device}{record['cpu']}, {cores}, {record['memory_bytes'] / 2**30:.0f} GiB; {versions}"


def reason(error):
    """The first line of an error, cut short."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:300]}"


def steps(items, title, **options):
    """The items, with a progress bar in a terminal."""
    return tqdm(list(items), desc=title, leave=False, disable=None, **options)


def mib(size):
    """Bytes for a reader."""
    if size is None:
        return ""
    return f"{size / MIB:,.0f} MiB" if size >= 10 * MIB else f"{size / 1024:,.0f} KiB"


def table(heads, rows, texts=1):
    """Prints a Markdown table row by row, as the rows come. The first `texts` columns are texts, others numbers."""
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * texts}{'---:|' * (len(heads) - texts)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


def save(record, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{path}")


def save_figure(figure, panels, folder, name, dpi=110):
    """Writes a PNG, without the frame of the panels."""
    folder = FIGURES if folder.resolve() == RECORDS.resolve() else folder
    for panel in panels:
        panel.grid(color="0.92", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=dpi)
    print(f"\n{folder / name}.png")
