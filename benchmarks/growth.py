"""How time and temporaries of the loss with its gradients grow with positions and with classes, for each library.

    pip install -e ".[bench]"                          # PyTorch is drawn too, if it is installed
    python benchmarks/growth.py                        # the preset of the backend at hand
    python benchmarks/growth.py --loss cross_entropy --most-seconds 2
    python benchmarks/growth.py --smoke                # tiny sizes
    python benchmarks/growth.py --draw benchmarks/records/growth-cpu.json    # the figures of an earlier run

Temporaries are read from compiled programs up to a million positions or classes, without running them; PyTorch's are
measured where it is timed. A line of times ends where the next point would take longer than `--most-seconds` or
allocate more than `--most-memory`. Dashed are the matmuls alone, or reading and writing the logits, and the size of
the logits. Writes a figure for each loss and axis, as PNG and SVG, and a JSON record.
"""

import argparse
import json
import pathlib
import tempfile

import jax
import matplotlib
import matplotlib.pyplot as plt
import measure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from measure import Case

matplotlib.use("Agg")

LOSSES = ("cross_entropy", "linear_cross_entropy")
AXES = ("positions", "classes")


def powers(first, last, factor=2):
    found = [first]
    while found[-1] < last:
        found.append(found[-1] * factor)
    return found


# Of each loss: features (of linear_cross_entropy), positions and classes where the other axis grows, and the sizes.
PRESETS = {
    "cpu": {
        "dtype": "float32",
        "features": 256,
        "positions": (2048, powers(128, 8192) + powers(32768, 2**20, 4)),
        "classes": (32000, powers(1024, 131072) + powers(262144, 2**20)),
    },
    "gpu": {
        "dtype": "bfloat16",
        "features": 2048,
        "positions": (8192, powers(1024, 131072) + powers(262144, 2**20)),
        "classes": (131072, powers(4096, 2**20)),
    },
}
SMOKE = {"dtype": "float32", "features": 32, "positions": (128, [64, 256, 2**20]), "classes": (1003, [128, 1024])}

STYLES = {
    "jxent": ("#d62728", "o"),
    "jxent, full logits": ("#ff9896", "o"),
    "Optax": ("#1f77b4", "s"),
    "Optax, full logits": ("#1f77b4", "s"),
    "jax.nn": ("#17becf", "D"),
    "jax.nn, full logits": ("#17becf", "D"),
    "jax-cce": ("#2ca02c", "^"),
    "tokamax, xla": ("#8c564b", "v"),
    "tokamax, mosaic_tpu": ("#bcbd22", "v"),
    "PyTorch": ("#9467bd", "P"),
    "PyTorch, full logits": ("#9467bd", "P"),
    "PyTorch, compiled": ("#e377c2", "X"),
    "PyTorch, full logits, compiled": ("#e377c2", "X"),
    "PyTorch, linear_cross_entropy": ("#ff7f0e", "*"),
}


def case_of(preset, loss, axis, number):
    positions = number if axis == "positions" else preset["positions"][0]
    classes = number if axis == "classes" else preset["classes"][0]
    size = (positions, preset["features"], classes) if loss == "linear_cross_entropy" else (positions, classes)
    return Case(loss, size, preset["dtype"])


def grown(preset, loss, axis, only, rounds, most_s, limit, apart):
    """One loss and axis: points of {name, at, temporaries, quartiles_s, ...}, and why each line of times ends."""
    points, ends, logits_bytes, last, previous = [], {}, {}, None, None
    for number in preset[axis][1]:
        case = case_of(preset, loss, axis, number)
        logits_bytes[str(number)] = case.logits_bytes
        losses = {name: f for name, f in measure.jax_losses(case).items() if only is None or name in only}
        if last is None:
            names = [*losses, *(n for n in measure.torch_losses(case) if only is None or n in only), "floor"]
        else:
            names = [name for name, taken in last.items() if taken * number / previous <= most_s]
            for name in set(last) - set(names):
                ends.setdefault(name, f"{number:,} {axis} would take more than {most_s:g} s")
        if 3 * case.logits_bytes > limit:  # what XLA allocates is known beforehand, what PyTorch does is not
            for name in [name for name in names if name.startswith(("PyTorch", "floor"))]:
                names.remove(name)
                ends.setdefault(name, f"{number:,} {axis} may take more than {measure.mib(limit)}")
        timed = run(case, names, rounds, limit, ends, apart) if names else {}
        points += [{"at": number, **point} for point in timed.values()]
        note = measure.progress(str(case))
        for name in [name for name in losses if name not in timed]:
            note(f"{name}: compile")
            try:
                function = measure.differentiated(case, losses[name], True)
                program = measure.jax_program(case, True, name, function, [measure.shapes(case)])
                points.append({"at": number, "name": name, "temporaries": program.temporaries})
            except Exception as error:  # XLA and the peers raise what they like
                ends.setdefault(f"{name}, compiled", f"{number:,} {axis}: {measure.reason(error)}")
        note("")
        last, previous = {name: point["quartiles_s"][1] for name, point in timed.items()}, number
    return {
        "loss": loss,
        "axis": axis,
        "size": case_of(preset, loss, axis, 0).size,
        "logits_bytes": logits_bytes,
        "points": points,
        "ends": ends,
    }


def run(case, names, rounds, limit, ends, apart):
    """Name -> the point of each program of these names that is right and fits."""
    sets = [measure.inputs(case, seed) for seed in (0, 1)]
    truths = [measure.truth(case, arguments) for arguments in sets]
    tensors = measure.torch_sets(sets) if any(name.startswith("PyTorch") for name in names) else None
    note = measure.progress(str(case))
    programs, left_out = measure.candidates(case, True, sets, truths, names, tensors, note, limit, apart)
    if "floor" in names:
        try:
            floor = measure.floors(case, True, sets)
            programs.append(floor)
        except Exception as error:
            left_out["floor"] = measure.reason(error)
    note("")
    times, failed = measure.rounds(programs, rounds, title=str(case))
    for name, why in (left_out | failed).items():
        ends.setdefault(name, f"{case}: {why}")
    points = {}
    for program in programs:
        if program.name in times:
            floor = program.gradients is None
            unseen = program.by_process and program.temporaries < measure.MIB
            points["floor" if floor else program.name] = {
                "name": "floor" if floor else program.name,
                "label": program.name,
                "temporaries": None if floor or unseen else program.temporaries,
                "setting": program.setting,
                "quartiles_s": measure.quartiles(times[program.name]),
                "times_s": times[program.name],
            }
    return points


def draw(record, grown, folder):
    """The figure of one loss and axis: time on the left, temporaries on the right."""
    loss, axis, size = grown["loss"], grown["axis"], grown["size"]
    names = ("positions", "features", "classes") if len(size) == 3 else ("positions", "classes")
    fixed = ", ".join(f"{n:,} {name}" for n, name in zip(size, names, strict=True) if name != axis)
    device = record["cpu"] if record["backend"] == "cpu" else record["devices"][0]
    figure, panels = plt.subplots(1, 2, figsize=(15, 5.8), layout="constrained")
    figure.suptitle(f"{loss}, the loss and its gradients: {fixed}, {record['dtype']}; {device}", fontsize=12)
    panel(panels[0], grown, "seconds", "time")
    panel(panels[1], grown, "bytes", "temporaries, outputs aside")
    for kind in ("png", "svg"):
        figure.savefig(folder / f"growth-{loss}-{axis}.{kind}", dpi=110)
    plt.close(figure)


def panel(panel, grown, quantity, title):
    """One panel; every line bears its name at its right."""
    ends = []
    for name, (at, values, label) in lines(grown, quantity).items():
        floor = name == "floor"
        colour, marker = ("0.35", None) if floor else STYLES.get(name, ("0.5", "."))
        panel.plot(
            at,
            values,
            color=colour,
            marker=marker,
            markersize=5,
            linestyle="--" if floor else "-",
            linewidth=2.6 if name == "jxent" else 1.4,
            zorder=3 if name == "jxent" else 2,
        )
        ends.append((values[-1], at[-1], label, colour))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=10 if quantity == "seconds" else 2)
    panel.set_title(title)
    panel.set_xlabel(grown["axis"])
    panel.xaxis.set_major_formatter(FuncFormatter(count))
    if quantity == "bytes":
        panel.yaxis.set_major_locator(LogLocator(base=16, numticks=12))
    panel.yaxis.set_major_formatter(FuncFormatter(duration if quantity == "seconds" else size_of))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(color="0.9", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    name_lines(panel, ends)


def name_lines(panel, ends):
    """Names right of the panel, in the order of the lines' ends, at least a line of text apart."""
    to_axes = panel.transScale + panel.transLimits
    ends = sorted(ends)
    wanted = [float(to_axes.transform((at, value))[1]) for value, at, _, _ in ends]
    heights, gap = list(wanted), 0.048
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    over = heights[-1] - 1.0 if heights else 0.0
    if over > 0:
        heights[-1] -= over
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - gap)
    for (value, at, label, colour), height in zip(ends, heights, strict=True):
        panel.annotate(
            label,
            (at, value),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.5,
                "shrinkA": 1,
                "shrinkB": 3,
            },
            annotation_clip=False,
        )


def lines(grown, quantity):
    """Name -> (sizes, values, label) of what is drawn."""
    found = {}
    for point in grown["points"]:
        value = point["quartiles_s"][1] if quantity == "seconds" and "quartiles_s" in point else None
        if quantity == "bytes" and point["temporaries"] is not None:
            value = max(point["temporaries"], 1024)  # a logarithm has no place for nothing
        if value is not None:
            at, values, _ = found.setdefault(point["name"], ([], [], point.get("label", point["name"])))
            at.append(point["at"])
            values.append(value)
    if quantity == "bytes":
        at = sorted({point["at"] for point in grown["points"]})
        found["floor"] = at, [grown["logits_bytes"][str(n)] for n in at], "the logits themselves"
    return found


def count(number, _):
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def duration(seconds, _):
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size * 0.999:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def size_of(number, _):
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:g} {unit}"
    return f"{number:g} B"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="sizes for a kind of device; of the one at hand by default")
    parser.add_argument("--loss", choices=(*LOSSES, "both"), default="both")
    parser.add_argument("--axis", choices=(*AXES, "both"), default="both")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="libraries by name, as the figures have them")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--most-seconds", type=float, default=5.0, help="of one run")
    parser.add_argument("--most-memory", type=float, metavar="GIB", help="60%% of what is there by default")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and two rounds, to see that it runs")
    parser.add_argument("--draw", type=pathlib.Path, metavar="RECORD", help="only draw, from an earlier record")
    parser.add_argument("--out", type=pathlib.Path, help="folder of what is written; benchmarks/records by default")
    args = parser.parse_args()
    folder = args.out or (pathlib.Path(tempfile.mkdtemp()) if args.smoke else pathlib.Path(__file__).parent / "records")
    folder.mkdir(parents=True, exist_ok=True)
    if args.draw:
        record = json.loads(args.draw.read_text())
        for part in record["parts"]:
            draw(record, part, folder)
        return

    name = args.preset or ("cpu" if jax.default_backend() == "cpu" else "gpu")
    preset = SMOKE if args.smoke else PRESETS[name]
    limit = int(args.most_memory * 2**30 if args.most_memory else 0.6 * measure.available())
    rounds = 2 if args.smoke else args.rounds
    record = measure.machine() | {"dtype": preset["dtype"], "rounds": rounds, "memory_limit": limit, "parts": []}
    print(f"{measure.headline(record)}; {rounds} rounds, no more than {measure.mib(limit)}")
    for loss in LOSSES:
        for axis in AXES:
            if args.loss in ("both", loss) and args.axis in ("both", axis):
                part = grown(preset, loss, axis, args.only, rounds, args.most_seconds, limit, not args.smoke)
                record["parts"].append(part)
                path = measure.save(record, folder, f"growth-{name}.json")
                draw(record, part, folder)
                print(f"{folder}/growth-{loss}-{axis}.png, .svg")
                for peer, why in part["ends"].items():
                    print(f"  {peer} ends: {why}")
    print(path)


if __name__ == "__main__":
    main()
