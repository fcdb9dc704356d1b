"""How time and temporaries of the losses with gradients grow with positions and with classes, for each library.

    pip install -e ".[bench]"                                   # PyTorch is drawn too, if it is installed
    python benchmarks/growth.py --out benchmarks/records        # the figures of docs/benchmarks/cpu.md and a record
    python benchmarks/growth.py --smoke                         # tiny sizes
    python benchmarks/growth.py --draw benchmarks/records/growth-cpu.json --out .     # the figures of an earlier run

Small sizes are timed as compare.py does. Beyond them temporaries are read from compiled programs, which never run;
PyTorch has none. Dashed are the matmuls alone, or reading and writing the logits, and the size of the logits.
"""

import argparse
import json
import pathlib
import tempfile

import matplotlib
import matplotlib.pyplot as plt
from cases import of_size
from compare import measured
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter
from report import MIB, headline, machine, reason, save, save_figure, steps
from timing import loss_program

matplotlib.use("Agg")

LOSSES = ("cross_entropy", "linear_cross_entropy")
DRAWN = (
    "jxent",
    "Optax",
    "Optax, full logits",
    "jax-cce",
    "PyTorch, compiled",
    "PyTorch, linear_cross_entropy",
    "floor",
)
FEATURES = 256
FIXED = {"positions": 32000, "classes": 2048}  # the other axis, where this one grows
# Sizes that are timed, and larger ones that are compiled.
TIMED = {"positions": [2**n for n in range(7, 14)], "classes": [2**n for n in range(10, 15)]}
COMPILED = {"positions": [2**n for n in (15, 17, 19, 21)], "classes": [2**n for n in range(15, 21)]}
SMOKE_TIMED = {"positions": [64, 256], "classes": [128, 1024]}
SMOKE_COMPILED = {"positions": [4096], "classes": [2048]}


def case_of(loss, axis, number, smoke):
    fixed, features = (100, 32) if smoke else (FIXED[axis], FEATURES)
    positions, classes = (number, fixed) if axis == "positions" else (fixed, number)
    size = (positions, features, classes) if loss == "linear_cross_entropy" else (positions, classes)
    return of_size(size, "float32")._replace(passes=("value_and_grad",))


def grown(loss, axis, rounds, smoke):
    """The record of one figure: its points are {name, label, at, temporaries, quartiles_s, ...}."""
    points, logits_bytes = [], {}
    timed, compiled = (SMOKE_TIMED, SMOKE_COMPILED) if smoke else (TIMED, COMPILED)
    for at in timed[axis]:
        case = case_of(loss, axis, at, smoke)
        found = measured(case, DRAWN, rounds, apart=not smoke)["passes"]["value_and_grad"]
        points += [{"at": at, **program} for program in found["programs"]]
        for name, why in found["left_out"].items():
            print(f"Left out: {name} of {case}: {why}")
    for at in compiled[axis]:
        case = case_of(loss, axis, at, smoke)
        for name in steps([name for name in case.losses() if name in DRAWN], f"{case}: compile"):
            try:
                program = loss_program(case, True, name, [case.shapes()])
                points.append({"at": at, "name": name, "temporaries": program.temporaries})
            except Exception as error:  # XLA and the peers raise what they like
                print(f"Left out: {name} of {case}: {reason(error)}")
    for at in (*timed[axis], *compiled[axis]):
        size = case_of(loss, axis, at, smoke).size
        logits_bytes[str(at)] = 4 * size[0] * size[-1]
    fixed = case_of(loss, axis, 0, smoke).size
    return {"loss": loss, "axis": axis, "size": fixed, "points": points, "logits_bytes": logits_bytes}


def draw(record, part, folder):
    """The figure of one loss and axis: time on the left, temporaries on the right."""
    loss, axis, size = part["loss"], part["axis"], part["size"]
    names = ("positions", "features", "classes") if len(size) == 3 else ("positions", "classes")
    fixed = ", ".join(f"{n:,} {name}" for n, name in zip(size, names, strict=True) if name != axis)
    figure, (times, held) = plt.subplots(1, 2, figsize=(15, 5.8), layout="constrained")
    figure.suptitle(f"{loss}, the loss and its gradients: {fixed}, float32; {record['cpu']}", fontsize=12)
    for i, name in enumerate(dict.fromkeys(point["name"] for point in part["points"])):
        style = {"color": f"C{i}", "marker": "o", "linewidth": 3 if name == "jxent" else 1.4}
        style = {"color": "0.35", "linestyle": "--"} if name == "floor" else style
        points = [point for point in part["points"] if point["name"] == name]
        label = points[0].get("label") or name
        seconds = [(point["at"], point["quartiles_s"][1]) for point in points if "quartiles_s" in point]
        seen = [
            p for p in points if p["temporaries"] is not None and (p["temporaries"] > MIB or not p.get("by_process"))
        ]
        sizes = [(point["at"], max(point["temporaries"], 1024)) for point in seen if name != "floor"]
        for panel, line in ((times, seconds), (held, sizes)):
            if line:
                panel.plot(*zip(*line, strict=True), label=label, **style)
    logits = sorted((int(at), size) for at, size in part["logits_bytes"].items())
    held.plot(*zip(*logits, strict=True), label="the logits themselves", color="0.35", linestyle="--")

    times.set(title="time", yscale="log")
    times.yaxis.set_major_formatter(EngFormatter("s"))
    held.set_title("temporaries, results aside")
    held.set_yscale("log", base=2)
    held.yaxis.set_major_locator(LogLocator(base=16, numticks=12))
    held.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{binary(n)}B"))
    for panel in (times, held):
        panel.set_xscale("log", base=2)
        panel.set_xlabel(axis)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda n, _: binary(n)))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.legend(fontsize=8, frameon=False, loc="upper left")
    save_figure(figure, (times, held), folder, f"growth-{loss}-{axis}")
    plt.close(figure)


def seen(point):
    """Whether it has temporaries to draw. Less than a MiB of a process is not seen."""
    held = point["temporaries"]
    return point["name"] != "floor" and held is not None and (held > MIB or not point.get("by_process"))


def binary(number):
    """With a prefix for a power of 1024."""
    power = max(p for p in range(5) if p == 0 or number >= 1024**p)
    return f"{number / 1024**power:g} {('', 'Ki', 'Mi', 'Gi', 'Ti')[power]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and two rounds, to see that it runs")
    parser.add_argument("--draw", type=pathlib.Path, metavar="RECORD", help="only draw, from an earlier record")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the figures and the record; a new one by default")
    args = parser.parse_args()
    folder = args.out or pathlib.Path(tempfile.mkdtemp())
    if args.draw:
        record = json.loads(args.draw.read_text())
    else:
        rounds = 2 if args.smoke else args.rounds
        record = machine() | {"rounds": rounds}
        print(f"{headline(record)}; {rounds} rounds")
        record["parts"] = [grown(loss, axis, rounds, args.smoke) for loss in LOSSES for axis in FIXED]
        save(record, folder, f"growth-{record['backend']}.json")
    for part in record["parts"]:
        draw(record, part, folder)


if __name__ == "__main__":
    main()
