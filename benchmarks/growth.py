"""How time and temporaries of the loss with its gradients grow with positions and with classes, for each library.

    pip install -e ".[bench]"                          # PyTorch is drawn too, if it is installed
    python benchmarks/growth.py                        # the preset of the backend at hand
    python benchmarks/growth.py --loss cross_entropy --most-seconds 2
    python benchmarks/growth.py --smoke                # tiny sizes
    python benchmarks/growth.py --draw benchmarks/records/growth-cpu.json    # the figures of an earlier run

Temporaries are read from compiled programs up to a million positions or classes, without running them; PyTorch's are
measured where it is timed. A line of times ends where the next point would take longer than `--most-seconds` or
allocate more than `--most-memory`. Dashed are the matmuls alone, or reading and writing the logits, and the size of
the logits. Prints why each line ends; writes a figure for each loss and axis, as PNG and SVG, and a JSON record.
"""

import argparse
import json
import pathlib
import tempfile

import jax
import matplotlib
import matplotlib.pyplot as plt
import measure
import peers
from cases import Case, inputs, shapes, truth
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter
from report import MIB, RECORDS, headline, machine, mib, reason, save

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
SMOKE = {"dtype": "float32", "features": 32, "positions": (128, [64, 256, 4096]), "classes": (1003, [128, 1024])}


# --- what is measured -------------------------------------------------------------------------------------------------


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
        losses = {name: loss for name, loss in peers.jax_losses(case).items() if only is None or name in only}
        if last is None:
            names = [*losses, *(n for n in peers.torch_losses(case) if only is None or n in only), "floor"]
        else:
            names = [name for name, taken in last.items() if taken * number / previous <= most_s]
            for name in set(last) - set(names):
                ends.setdefault(name, f"{number:,} {axis} would take more than {most_s:g} s")
        if 3 * case.logits_bytes > limit:  # what XLA allocates is known beforehand, what PyTorch does is not
            for name in [name for name in names if name.startswith(("PyTorch", "floor"))]:
                names.remove(name)
                ends.setdefault(name, f"{number:,} {axis} may take more than {mib(limit)}")
        timed = run(case, names, rounds, limit, ends, apart) if names else {}
        points += [{"at": number, **point} for point in timed.values()]
        untimed = [name for name in losses if name not in timed]
        for name in measure.steps(untimed, f"{case}: compile"):
            try:
                program = measure.jax_program(case, True, name, losses[name], [shapes(case)])
                points.append({"at": number, "name": name, "temporaries": program.temporaries})
            except Exception as error:  # XLA and the peers raise what they like
                ends.setdefault(f"{name}, compiled", f"{number:,} {axis}: {reason(error)}")
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
    sets = [inputs(case, seed) for seed in (0, 1)]
    truths = [truth(case, arguments) for arguments in sets]
    programs, left_out = measure.candidates(case, True, sets, truths, names, limit, apart)
    if "floor" in names:
        try:
            programs.append(measure.floors(case, True, sets))
        except Exception as error:
            left_out["floor"] = reason(error)
    times, failed = measure.rounds(programs, rounds, str(case))
    for name, why in (left_out | failed).items():
        ends.setdefault(name, f"{case}: {why}")
    points = {}
    for program in programs:
        if program.name in times:
            floor = program.gradients is None
            unseen = program.by_process and program.temporaries < MIB
            points["floor" if floor else program.name] = {
                "name": "floor" if floor else program.name,
                "label": program.name,
                "temporaries": None if floor or unseen else program.temporaries,
                "setting": program.setting,
                "quartiles_s": measure.quartiles(times[program.name]),
                "times_s": times[program.name],
            }
    return points


# --- the figures ------------------------------------------------------------------------------------------------------


def draw(record, grown, folder):
    """The figure of one loss and axis: time on the left, temporaries on the right."""
    loss, axis, size = grown["loss"], grown["axis"], grown["size"]
    names = ("positions", "features", "classes") if len(size) == 3 else ("positions", "classes")
    fixed = ", ".join(f"{n:,} {name}" for n, name in zip(size, names, strict=True) if name != axis)
    device = record["cpu"] if record["backend"] == "cpu" else record["devices"][0]
    figure, (times, held) = plt.subplots(1, 2, figsize=(15, 5.8), layout="constrained")
    figure.suptitle(f"{loss}, the loss and its gradients: {fixed}, {record['dtype']}; {device}", fontsize=12)
    draw_lines(times, grown, "seconds")
    times.set_yscale("log")
    times.set_title("time")
    times.yaxis.set_major_formatter(EngFormatter("s"))
    draw_lines(held, grown, "bytes")
    held.set_yscale("log", base=2)
    held.set_title("temporaries, outputs aside")
    held.yaxis.set_major_locator(LogLocator(base=16, numticks=12))
    held.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{binary(n)}B"))
    for panel in (times, held):
        panel.set_xscale("log", base=2)
        panel.set_xlabel(axis)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda n, _: binary(n)))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(color="0.9", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False, loc="upper left")
    for kind in ("png", "svg"):
        figure.savefig(folder / f"growth-{loss}-{axis}.{kind}", dpi=110)
    plt.close(figure)


def draw_lines(panel, grown, quantity):
    names = list(dict.fromkeys(point["name"] for point in grown["points"] if point["name"] != "floor"))
    for name, (at, values, label) in lines(grown, quantity).items():
        style = {"color": "0.35", "linestyle": "--"}
        if name != "floor":
            style = {"color": f"C{names.index(name)}", "marker": "o", "linewidth": 3 if name == "jxent" else 1.4}
        panel.plot(at, values, label=label, **style)


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


def binary(number):
    """With a prefix for a power of 1024."""
    power = max(p for p in range(5) if p == 0 or number >= 1024**p)
    return f"{number / 1024**power:g} {('', 'Ki', 'Mi', 'Gi', 'Ti')[power]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="sizes for a kind of device; of the one at hand by default")
    parser.add_argument("--loss", choices=LOSSES, help="both by default")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="libraries by name, as the figures have them")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--most-seconds", type=float, default=5.0, help="of one run")
    parser.add_argument("--most-memory", type=float, metavar="GIB", help="60%% of what is there by default")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and two rounds, to see that it runs")
    parser.add_argument("--draw", type=pathlib.Path, metavar="RECORD", help="only draw, from an earlier record")
    parser.add_argument("--out", type=pathlib.Path, help="folder of what is written; benchmarks/records by default")
    args = parser.parse_args()
    folder = args.out or (pathlib.Path(tempfile.mkdtemp()) if args.smoke else RECORDS)
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
    record = machine() | {"dtype": preset["dtype"], "rounds": rounds, "memory_limit": limit, "parts": []}
    print(f"{headline(record)}; {rounds} rounds, no more than {mib(limit)}")
    for loss in (args.loss,) if args.loss else LOSSES:
        for axis in AXES:
            part = grown(preset, loss, axis, args.only, rounds, args.most_seconds, limit, not args.smoke)
            record["parts"].append(part)
            path = save(record, folder, f"growth-{name}.json")
            draw(record, part, folder)
            print(f"{folder}/growth-{loss}-{axis}.png, .svg")
            for peer, why in part["ends"].items():
                print(f"  {peer} ends: {why}")
    print(path)


if __name__ == "__main__":
    main()
