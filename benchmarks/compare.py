"""Time and memory of the losses beside other libraries, forward and with gradients, on the machine at hand.

    pip install -e ".[bench]"                          # PyTorch is compared too, if it is installed
    python benchmarks/compare.py                       # the preset of the backend at hand
    python benchmarks/compare.py --smoke               # tiny sizes, half a minute
    python benchmarks/compare.py --size 2048x512x50257 --rounds 15
    python benchmarks/compare.py --only jxent Optax --loss cross_entropy --dtype bfloat16

Every candidate is compiled and checked against float64 NumPy; a wrong one, or one that fails, is named and left out.
The others take turns in one process, in an order shuffled anew each round, on two sets of inputs. Times are medians
over the rounds, with quartiles; ratios are medians of each round's ratio. The floor is the matmuls alone, or reading
(and writing) the logits. Temporaries are what XLA's memory analysis says, outputs aside; for PyTorch the peak of its
allocator on a GPU, and on a CPU the growth of a process of its own (not with --smoke). What compiled PyTorch takes to
compile includes its first run. Prints Markdown, and writes a JSON record with every time.
"""

import argparse
import dataclasses
import pathlib
import tempfile

import jax
import measure
import numpy as np
import peers
from cases import Case, inputs, truth
from report import MIB, RECORDS, headline, machine, mib, reason, save

LOSSES = ("cross_entropy", "linear_cross_entropy")
BOTH = ("float32", "bfloat16")


def cases(loss, dtypes, *sizes):
    return [Case(loss, size, dtype) for size in sizes for dtype in dtypes]


PRESETS = {
    "cpu": [
        *cases("cross_entropy", BOTH, (2048, 32000), (32768, 1000), (512, 131072)),
        *cases("cross_entropy", ("float32",), (500000, 10)),
        *cases("linear_cross_entropy", ("float32",), (2048, 512, 50257), (4096, 256, 32000), (4096, 512, 128256)),
    ],
    "small": cases("cross_entropy", ("float32",), (1, 10), (32, 10), (1024, 100)),  # dispatch, not arithmetic
    "gpu": [
        *cases("cross_entropy", ("bfloat16",), (32768, 32768), (16384, 131072)),
        *cases("linear_cross_entropy", ("bfloat16",), (16384, 2048, 248320), (32768, 4096, 131072)),
        *cases("linear_cross_entropy", ("bfloat16",), (32768, 2560, 128256), (8192, 2304, 256000)),
    ],
    "tpu": [
        *cases("cross_entropy", ("bfloat16",), (8192, 151936)),
        *cases("linear_cross_entropy", ("bfloat16",), (8192, 2048, 151936)),
    ],
}
SMOKE = [
    *cases("cross_entropy", ("bfloat16",), (130, 1003)),
    *cases("linear_cross_entropy", ("float32",), (100, 64, 1001)),
]
ROUNDS = {"cpu": 7, "small": 400, "gpu": 20, "tpu": 20}

# What others have published for these sizes, on their hardware.
PUBLISHED = {
    (16384, 2048, 248320): "H100, with gradients: Apple's CCE 92.55 ms and 3.09 GB, full logits 137 ms and 47.6 GB, "
    "Liger 321 ms",
    (32768, 4096, 131072): "H100, with gradients: Liger's kernels for Hopper 211 ms",
    (32768, 2560, 128256): "H100, with gradients: marin's default 208,000 tokens/s, full logits 247,000 tokens/s",
    (8192, 2304, 256000): "A100, with gradients: Apple's CCE 134.8 ms",
    (32768, 32768): "H100, forward: quack about 3.1 TB/s",
    (16384, 131072): "H100, forward: quack about 3.1 TB/s",
}


def measured(case, only, number, apart):
    """The record of one case: for each pass, every program's numbers and times, and who is left out."""
    sets = [inputs(case, seed) for seed in (0, 1)]
    truths = [truth(case, arguments) for arguments in sets]
    passes = {}
    for grad in (False, True):
        name = "value_and_grad" if grad else "forward"
        programs, left_out = measure.candidates(case, grad, sets, truths, only, apart=apart)
        try:
            floors = [measure.floors(case, grad, sets)]
        except Exception as error:  # most often there is no room for it
            floors, left_out["floor"] = [], reason(error)
        times, failed = measure.rounds([*programs, *floors], number, f"{case}, {name}")
        floor = next((program.name for program in floors if program.name in times), None)
        passes[name] = {
            "programs": [entry(program, times, floor) for program in programs if program.name in times],
            "floor": floor_entry(case, grad, floor, times) if floor else None,
            "left_out": left_out | failed,
        }
    return {"loss": case.loss, "size": case.size, "dtype": case.dtype, "passes": passes}


def entry(program, times, floor):
    numbers = dataclasses.asdict(program)
    del numbers["run"], numbers["gradients"]
    return numbers | {
        "quartiles_s": measure.quartiles(times[program.name]),
        "jxent_of_this": measure.ratio(times, "jxent", program.name),
        "floor_of_this": measure.ratio(times, floor, program.name),
        "times_s": times[program.name],
    }


def floor_entry(case, grad, floor, times):
    """Its rate is that of the matmuls' floating-point operations, or of the bytes read and written."""
    if case.linear:
        amount, unit = 2.0 * float(np.prod(case.size, dtype=np.float64)) * (3 if grad else 1), "FLOP/s"
    else:
        amount, unit = float(case.logits_bytes * (2 if grad else 1)), "B/s"
    return {
        "name": floor,
        "quartiles_s": measure.quartiles(times[floor]),
        "jxent_of_this": measure.ratio(times, "jxent", floor),
        "rate": amount / float(np.median(times[floor])),
        "unit": unit,
        "times_s": times[floor],
    }


def table(record):
    """The Markdown of one case's record."""
    case = Case(record["loss"], tuple(record["size"]), record["dtype"])
    for name, taken in record["passes"].items():
        call = "the loss" if name == "forward" else "the loss and its gradients"
        print(f"\n`{case.loss}`, {case}: {call}\n")
        print("| | ms, median | quartiles | jxent / this | floor / this | temporaries | compile | loss error |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        for program in taken["programs"]:
            label = f"{program['name']} ({program['setting']})" if program["setting"] else program["name"]
            low, median, high = program["quartiles_s"]
            of = [f"{r:.2f}" if r else "" for r in (program["jxent_of_this"], program["floor_of_this"])]
            seconds = "" if program["compile_s"] is None else f"{program['compile_s']:.1f} s"
            held = mib(program["temporaries"])
            if program["by_process"] and program["temporaries"] < MIB:
                held = "< 1 MiB"
            cells = [label, ms(median), f"{ms(low)} to {ms(high)}", *of, held, seconds]
            print(f"| {' | '.join(cells)} | {program['loss_error']:.0e} |")
        if floor := taken["floor"]:
            low, median, high = floor["quartiles_s"]
            share = "" if floor["jxent_of_this"] is None else f"{floor['jxent_of_this']:.2f}"
            print(f"| floor: {floor['name']} | {ms(median)} | {ms(low)} to {ms(high)} | {share} | 1.00 | | | |")
            size, unit = (1e12, "T") if floor["rate"] >= 1e12 else (1e9, "G")
            print(f"\nThe floor runs at {floor['rate'] / size:,.1f} {unit}{floor['unit']}.")
        if taken["programs"]:
            print(f"Outputs take {mib(taken['programs'][0]['outputs'])}.")
        peaks = [f"{p['name']} {mib(p['device_peak'])}" for p in taken["programs"] if p["device_peak"]]
        if peaks:
            print(f"Peak on the device: {', '.join(peaks)}.")
        for program in taken["programs"]:
            if program["tried_s"]:
                tried = (f"{k} {v if isinstance(v, str) else ms(v) + ' ms'}" for k, v in program["tried_s"].items())
                print(f"{program['name']}, one run each: {', '.join(tried)}.")
        for peer, why in taken["left_out"].items():
            print(f"Left out: {peer}: {why}")
    if published := PUBLISHED.get(case.size):
        print(f"\nPublished: {published}.")


def ms(seconds):
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def size(text):
    numbers = tuple(int(n) for n in text.split("x"))
    if len(numbers) not in (2, 3) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected AxB or AxBxC, got {text}")
    return numbers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="sizes for a kind of device; of the one at hand by default")
    parser.add_argument("--loss", choices=LOSSES, help="of the preset's; both by default")
    parser.add_argument("--size", type=size, help="AxB (positions, classes) or AxBxC (positions, features, classes)")
    parser.add_argument("--dtype", choices=BOTH, help="instead of the preset's")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="candidates by name, as the tables have them")
    parser.add_argument("--rounds", type=int, help="after one that warms up; by the preset")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and two rounds, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the record; benchmarks/records by default")
    args = parser.parse_args()
    preset = args.preset or (jax.default_backend() if jax.default_backend() in PRESETS else "cpu")
    chosen = SMOKE if args.smoke else PRESETS[preset]
    if args.size:
        dtype = "float32" if preset in ("cpu", "small") else "bfloat16"
        chosen = cases(LOSSES[len(args.size) - 2], (dtype,), args.size)
    if args.dtype:
        chosen = list(dict.fromkeys(case._replace(dtype=args.dtype) for case in chosen))
    chosen = [case for case in chosen if args.loss in (None, case.loss)]
    if not chosen:
        parser.error(f"no such size of {args.loss}")
    number = args.rounds or (2 if args.smoke else ROUNDS[preset])
    folder = args.out or (pathlib.Path(tempfile.mkdtemp()) if args.smoke else RECORDS)

    record = machine() | {"rounds": number, "cases": []}
    print(f"{headline(record)}; {number} rounds")
    for case in chosen:
        record["cases"].append(measured(case, args.only, number, not args.smoke))
        record["absent"] = peers.absent
        path = save(record, folder, f"compare-{preset}.json")
        table(record["cases"][-1])
    print(f"\n{path}")


if __name__ == "__main__":
    main()
