"""Random calls of the losses against their definitions: how many, and the worst error of each quantity.

    pip install -e ".[bench,test]"
    python benchmarks/fuzz.py                       # a million cases, about an hour on two cores
    python benchmarks/fuzz.py --smoke               # some seconds
    python benchmarks/fuzz.py --seed 7 --minutes 10 --out fuzz.json      # as many as that gives, and their record

Each program is a random `Config` of tests/random_calls.py, or of a file beside it: function, shapes, dtypes, options,
what makes the logits, and how far XLA optimises. It gets many cases of random values, some of them hostile. float16,
bfloat16 and float32 are judged in float64, and a few cases of every program with many digits; float64 with many digits
alone. Prints the worst relative errors in Markdown, and whatever exceeds what is promised, with the configuration and
the seed; with `--out` writes a JSON record; exits with 1 if anything does.
"""

import argparse
import collections
import json
import pathlib
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import oracle
import random_calls as calls
import random_divergences as divergences
import random_linear_sigmoid as linear_sigmoid
import random_log_probs as log_probs
import random_sigmoid as sigmoid

DTYPES = ("float32", "bfloat16", "float16", "float64")
LEVELS = (None, None, 0, 3)  # of XLA's optimisations
MODULES = {module.Config: module for module in (calls, divergences, log_probs, sigmoid, linear_sigmoid)}


def random_config(rng, number):
    """One of the many; half of the programs are in float32.

    Of eight in a row two each are of the losses of classes, divergences, log-probabilities, and of yes or no.
    """

    def flag():
        return bool(rng.integers(2))

    def one_of(*values):
        return values[rng.integers(len(values))]

    kinds = random_loss, random_divergence, random_log_probs, random_sigmoid, random_linear_sigmoid
    kinds += random_loss, random_divergence, random_log_probs
    return kinds[number % len(kinds)](flag, one_of, one_of("float32", "float32", "float32", *DTYPES[1:]))


def random_loss(flag, one_of, dtype):
    function = one_of("cross_entropy", "cross_entropy", "linear_cross_entropy", "nll_loss")
    linear, nll = function == "linear_cross_entropy", function == "nll_loss"
    entries = one_of(0, 0, 1, 3, 6)
    probabilities = entries > 0 or flag()
    of_stats = ("loss",), ("loss", *calls.STATS), ("loss", "entropy"), ("log_prob", "log_normalizer"), ("entropy",)
    return calls.Config(
        function=function,
        positions=one_of((1,), (4,), (7,), (2, 3)),
        classes=one_of(1, 2, 3, 5, 10, 33, 100),
        features=one_of(1, 3, 8),
        axis=one_of(-1, 0) if linear else one_of(-1, 0, 1),
        dtype=dtype,
        probabilities=probabilities,
        entries=entries,
        class_weight=flag(),
        sample_weight=flag(),
        where=flag(),
        ignored=(entries > 0 or not probabilities) and flag(),
        label_smoothing=0.0 if nll else one_of(0.0, 0.1, 1.0),
        z_loss_weight=0.0 if nll else one_of(0.0, 1e-3),
        logit_softcap=None if nll else one_of(None, None, 30.0, 5.0),
        temperature=1.0 if nll else one_of(1.0, 1.0, 1.0, 0.5, 0.7, 4.0),
        by_position=not nll and one_of(False, False, False, True),
        traced=flag(),
        bias=linear and flag(),
        block_size=one_of(None, 1, 3) if linear else None,
        recompute=linear and flag(),
        reduction=one_of("mean", "sum", "none"),
        differentiated=("loss",) if nll else one_of(("loss",), *of_stats),
        producer=None if linear else one_of(None, None, *calls.PRODUCERS),
        level=one_of(*LEVELS),
        shared=one_of(
            "", "", "hidden" if linear else "logits", "kernel", "bias", "class_weight", "sample_weight", "where"
        ),
    )


def random_divergence(flag, one_of, dtype):
    linear, name = flag(), one_of("kl_divergence", "js_divergence", "tv_distance")
    return divergences.Config(
        function=f"{'linear_' if linear else ''}{name}",
        positions=one_of((1,), (4,), (7,), (2, 3)),
        classes=one_of(1, 2, 3, 5, 10, 33, 100),
        features=one_of((3, 3), (8, 8), (1, 4), (1, 1)),
        axis=one_of((-1, -1), (-1, 0), (0, -1)) if linear else one_of(-1, 0, 1),
        dtype=dtype,
        beta=one_of(0.5, 0.1, 0.9) if name == "js_divergence" else None,
        temperature=one_of(1.0, 1.0, 0.5, 1.25, 4.0),
        by_position=one_of(False, False, True),
        traced=flag(),
        sample_weight=flag(),
        where=flag(),
        bias=linear and flag(),
        block_size=one_of(None, 1, 3) if linear else None,
        recompute=linear and flag(),
        reduction=one_of("mean", "sum", "none"),
        producer=None if linear else one_of(None, None, *calls.PRODUCERS),
        level=one_of(*LEVELS),
    )


def random_log_probs(flag, one_of, dtype):
    function, forward = one_of("linear_log_probs", "linear_top_k"), one_of(False, False, False, True)
    classes = one_of(1, 2, 3, 5, 10) if forward else one_of(1, 2, 3, 5, 10, 33, 100)
    entries = one_of(1, 2, 5, 12)
    return log_probs.Config(
        function=function,
        positions=one_of((1,), (4,), (7,), (2, 3)),
        classes=classes,
        features=one_of(1, 3) if forward else one_of(1, 3, 8),
        axis=one_of(-1, 0),
        dtype=dtype,
        entries=min(entries, classes) if function == "linear_top_k" else entries,
        where=flag(),
        logit_softcap=one_of(None, None, None, 30.0, 5.0),
        temperature=one_of(1.0, 1.0, 0.5, 0.7, 4.0),
        by_position=one_of(False, False, True),
        traced=flag(),
        bias=flag(),
        block_size=one_of(None, 1, 3),
        forward=forward,
        level=one_of(*LEVELS),
    )


def random_sigmoid(flag, one_of, dtype):
    return sigmoid.Config(
        positions=one_of((1,), (7,), (2, 3), (3, 5)),
        dtype=dtype,
        labels=one_of("float", "float", "int", "bool"),
        pos_weight=flag(),
        sample_weight=flag(),
        where=flag(),
        label_smoothing=one_of(0.0, 0.1, 1.0),
        traced=flag(),
        reduction=one_of("mean", "sum", "none"),
        level=one_of(*LEVELS),
    )


def random_linear_sigmoid(flag, one_of, dtype):
    forward, entries = one_of(False, False, False, True), one_of(0, 0, 1, 3, 6)
    probabilities = not entries and flag()
    return linear_sigmoid.Config(
        positions=one_of((1,), (4,), (7,), (2, 3)),
        classes=one_of(1, 2, 3, 5, 10) if forward else one_of(1, 2, 3, 5, 10, 33, 100),
        features=one_of(1, 3) if forward else one_of(1, 3, 8),
        axis=one_of(-1, 0),
        dtype=dtype,
        probabilities=probabilities,
        entries=entries,
        pos_weight=flag(),
        sample_weight=flag(),
        where=flag(),
        ignored=not probabilities and flag(),
        label_smoothing=one_of(0.0, 0.1, 1.0),
        traced=flag(),
        bias=flag(),
        block_size=one_of(None, 1, 3),
        recompute=flag(),
        reduction=one_of("mean", "sum", "none"),
        forward=forward,
        level=one_of(*LEVELS),
    )


def judged(config, seed, cases):
    """[(number of cases, name -> fraction of the bound)]: in float64 arithmetic, and with many digits for some."""
    calls = MODULES[type(config)]
    few = max(1, min(cases, 300 // (config.number * getattr(config, "classes", 1))))
    found = []
    for number, arithmetic in ((cases, oracle.Float64), (few, oracle.Digits)):
        if arithmetic is oracle.Digits or config.dtype != "float64":
            values = calls.draw(config, np.random.default_rng(seed), number)
            want = calls.expected(config, values, arithmetic)
            found.append((number, calls.judge(config, values, calls.run(config, values), want)))
    return found


def options(config):
    """What the second table has a row for; of a program with a soft cap only that."""
    for option, value in config._asdict().items():
        told = option not in ("function", "dtype", "features") and value not in (False, None, 0.0, ("loss",))
        if told and (option == "logit_softcap" or not capped(config)):
            text = "+".join(value) if option == "differentiated" else value
            yield option if value is True else f"{option}={text}"


def capped(config):
    return getattr(config, "logit_softcap", None) is not None


def table(title, rows, errors, dtypes):
    """Prints in Markdown the errors under the key of each row and each dtype."""
    print(f"| {title} | {' | '.join(dtypes)} |\n|---|{'---:|' * len(dtypes)}")
    for name, key in rows.items():
        cells = [f"{errors[*key, dtype]:.1e}" if (*key, dtype) in errors else "" for dtype in dtypes]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=420)
    parser.add_argument("--cases", type=int, default=3000, help="of each program")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no program begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="6 programs of 20 cases")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    programs, cases = (6, 20) if args.smoke else (args.programs, args.cases)
    start = time.monotonic()
    rng = np.random.default_rng(args.seed)
    total, failures = 0, []
    worst = collections.defaultdict(float)  # (soft cap or not, function, quantity, dtype) -> relative error
    by_option = collections.defaultdict(float)  # (option, dtype) -> the same, of all quantities
    for number in tqdm(range(programs), unit="program", disable=None):
        if time.monotonic() - start > 60 * args.minutes:
            programs = number
            break
        config, seed = random_config(rng, number), int(rng.integers(2**32))
        results, wrong = [], []
        try:
            results = judged(config, seed, cases)
        except Exception as error:  # one that does not run is a failure, and no end to the others
            wrong.append({"error": repr(error)})
        for count, fractions in results:
            total += count
            for name, fraction in fractions.items():
                error = fraction * MODULES[type(config)].bound(config, name)
                key = (capped(config), config.function, name, config.dtype)
                worst[key] = max(worst[key], error)
                for option in options(config):
                    by_option[option, config.dtype] = max(by_option[option, config.dtype], error)
                if fraction > 1:
                    wrong.append({"cases": count, name: fraction})
        for what in wrong:
            failures.append({"function": config.function, "config": config._asdict(), "seed": seed, **what})
            tqdm.write(str(failures[-1]))
        if number % 50 == 49:
            jax.clear_caches()

    print(f"{total:,} cases of {programs:,} programs, seed {args.seed}; JAX {jax.__version__}\n")
    for cap in (False, True):
        rows = {f"`{key[1]}`: {key[2]}": key[:3] for key in sorted(worst) if key[0] == cap}
        table("with a soft cap" if cap else "no soft cap", rows, worst, DTYPES)
    rows = {key[0]: key[:1] for key in sorted(by_option)}
    table("option, of all quantities", rows, by_option, ("float32", "float64"))
    print(f"{len(failures)} above what is promised")
    if args.out:
        record = {"jax": jax.__version__, "programs": programs, "cases": total, "seed": args.seed, "failures": failures}
        record["worst"] = [[*key, value] for key, value in worst.items()]
        record["options"] = [[*key, value] for key, value in by_option.items()]
        args.out.write_text(json.dumps(record, indent=1))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
