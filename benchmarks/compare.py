"""Time and memory of the losses compared with other libraries, on the machine at hand.

    pip install -e ".[bench]"                            # PyTorch is compared too, if it is installed
    python benchmarks/compare.py                         # the preset of the backend at hand: docs/benchmarks/cpu.md
    python benchmarks/compare.py --preset divergences    # docs/benchmarks/compiled.md; "policy" too
    python benchmarks/compare.py --preset skipping       # docs/benchmarks/skipping.md, by the share unmasked
    python benchmarks/compare.py --preset gpu            # half an hour on a GPU: see gpu.py
    python benchmarks/compare.py --size 2048x512x50257 --rounds 15 --only jxent floor
    python benchmarks/compare.py --smoke                 # tiny sizes, half a minute; with --preset, of that preset

Every candidate's loss, and a sample of its gradients, is checked against float64. A wrong candidate, or one that fails,
is named and left out. timing.py says how the others are timed. The floor is the matmuls alone, or reading (and writing)
the logits. Temporaries do not include the results. For PyTorch they are the peak of its allocator on a GPU, and on a
CPU the growth of a process of its own (not with --smoke). Matmuls are those in the text of a CPU's program: those of a
loop count once, and a program that skips positions has two loops. What compiled PyTorch takes to compile includes its
first run. Prints Markdown, and with `--out` writes a JSON record with every time.
"""

import argparse
import pathlib

import gpu
import jax
import peers
import skipping
import timing
from cases import of_size, truth
from objectives import divergences, policy
from report import MIB, headline, machine, mib, save, table

BOTH = ("float32", "bfloat16")


def cases(dtypes, *sizes):
    return [of_size(size, dtype) for size in sizes for dtype in dtypes]


PRESETS = {
    "cpu": [
        *cases(BOTH, (2048, 32000), (32768, 1000), (512, 131072)),
        *cases(["float32"], (500000, 10), (2048, 512, 50257), (4096, 256, 32000), (4096, 512, 128256)),
    ],
    "small": cases(["float32"], (1, 10), (32, 10), (1024, 100)),  # dispatch, not arithmetic
    "gpu": cases(["bfloat16"], *gpu.SIZES),
    "tpu": cases(["bfloat16"], (8192, 151936), (8192, 2048, 151936)),
    "divergences": divergences(2048, 512, 256, 32000),
    "policy": [policy(2048, 256, 32000)],
    "skipping": [],  # skipping.py has its programs and sizes
}
SMOKE = {"divergences": divergences(64, 16, 8, 1000), "policy": [policy(64, 8, 1000)], "skipping": []}
SMOKE["gpu"] = cases(["bfloat16"], (128, 64, 1001))
SMOKE_OF_OTHERS = [of_size((130, 1003), "bfloat16"), of_size((100, 64, 1001), "float32")]
ROUNDS = {"cpu": 7, "small": 400, "gpu": 20, "tpu": 20, "divergences": 7, "policy": 9, "skipping": 5}

# What others have published for these sizes, with gradients: docs/benchmarks/accelerators.md has the sources.
PUBLISHED = {
    (16384, 2048, 248320): "H100: CCE 92.55 ms and 3.09 GB, full logits 137 ms and 47.55 GB, Liger 321 ms and 6.05 GB",
    (8192, 4096, 128256): "B200: Liger's CuTe kernels 17.51 ms and 2,415 MiB",
    (32768, 4096, 128256): "H100, forward and backward: tokamax's full logits 57.4 + 156.1 ms, in chunks 110.8 + 284.5",
}


def measured(case, only, number, apart=True):
    """The record of one case: for each pass, every program's numbers and times, and who is left out."""
    sets = [case.inputs(seed) for seed in (0, 1)]
    truths = [truth(case, arguments) for arguments in sets]
    passes = {}
    for name in case.passes:
        grad = name == "value_and_grad"
        programs, left_out = timing.candidates(case, grad, sets, truths, only, apart)
        times, failed = timing.rounds(programs, number, f"{case}, {name}")
        entries = [timing.entry(program, times) for program in programs if program.name in times]
        passes[name] = {"programs": entries, "left_out": left_out | failed}
    return {"title": str(case), "passes": passes}


HEADS = (
    "",
    "ms, median",
    "quartiles",
    "jxent / this",
    "floor / this",
    "temporaries",
    "matmuls",
    "compile",
    "loss error",
)


def print_case(record):
    """The Markdown of one case's record."""
    for name, taken in record["passes"].items():
        print(f"\n{record['title']}: {'the loss' if name == 'forward' else 'the loss and its gradients'}")
        of_peak = "share" in next(iter(taken["programs"]), {})
        table((*HEADS, *(gpu.HEADS if of_peak else ())), map(row, taken["programs"]))
        for peer, why in taken["left_out"].items():
            print(f"\nLeft out: {peer}: {why}")


def row(program):
    low, median, high = program["quartiles_s"]
    ratios = [f"{r:.2f}" if r else "" for r in (program["jxent_of_this"], program["floor_of_this"])]
    held = mib(program["temporaries"])
    if program["by_process"] and program["temporaries"] < MIB:
        held = "< 1 MiB"
    seconds = "" if program["compile_s"] is None else f"{program['compile_s']:.1f} s"
    error = "" if program["loss_error"] is None else f"{program['loss_error']:.0e}"
    cells = [ms(median), f"{ms(low)} to {ms(high)}", *ratios, held, program["matmuls"] or "", seconds, error]
    if "share" in program:
        cells += [f"{program['share']:.0%}" if program["share"] else "", mib(program["peak_bytes"])]
    return [program["label"] or program["name"], *cells]


def ms(seconds):
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def size(text):
    numbers = tuple(int(n) for n in text.split("x"))
    if len(numbers) not in (2, 3) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected AxB or AxBxC, got {text}")
    return numbers


def main():
    of_backend = jax.default_backend() if jax.default_backend() in PRESETS else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default=of_backend, help="that of the device at hand by default")
    parser.add_argument("--size", type=size, help="positions x classes, or positions x features x classes, instead")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="candidates by name, as the tables have them")
    parser.add_argument("--rounds", type=int, help="after one that warms up; by the preset")
    parser.add_argument("--peak", type=float, help="TFLOP/s of a GPU that gpu.py does not know, for its shares")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and two rounds, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the record, and of a figure of skipping")
    args = parser.parse_args()
    if args.preset == "skipping" and (args.size or args.only):
        parser.error("skipping has a size and programs of its own")
    if args.preset == "gpu" and args.size and len(args.size) == 2:
        parser.error("gpu times losses of hidden states: --size positions x features x classes")
    chosen = SMOKE.get(args.preset, SMOKE_OF_OTHERS) if args.smoke else PRESETS[args.preset]
    if args.size:
        chosen = cases(BOTH if args.preset != "gpu" else ["bfloat16"], args.size)
    number = args.rounds or (2 if args.smoke else ROUNDS[args.preset])

    record = machine() | {"rounds": number, "cases": []}
    print(f"{headline(record)}; {number} rounds")
    if args.preset == "gpu":
        chosen = gpu.prepare(record, chosen, number, args.smoke)
    for case in chosen:
        only = args.only or (gpu.ONLY if args.preset == "gpu" else None)
        record["cases"].append(measured(case, only, number, apart=not args.smoke))
        if args.preset == "gpu":
            gpu.complete(record, case, args.peak and args.peak * 1e12, args.out)
        print_case(record["cases"][-1])
        if case.size in PUBLISHED:
            print(f"\nPublished, with gradients: {PUBLISHED[case.size]}.")
    if args.preset == "skipping":
        record |= skipping.measured(number, skipping.SMOKE if args.smoke else skipping.SIZE)
        skipping.print_table(record)
    if args.out:
        save(record | {"absent": peers.absent}, args.out, f"compare-{args.preset}.json")
        if args.preset == "skipping":
            skipping.draw(record, args.out)


if __name__ == "__main__":
    main()
