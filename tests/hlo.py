"""What a compiled program moves between devices."""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}


class Collective(NamedTuple):
    kind: str
    size: int  # elements of the result on one device
    bytes: int
    in_loop: bool


def collectives(text):
    """The collectives in the text of an optimised HLO module, each array of a combined one by itself.

    XLA:TPU runs one beside other work, and writes it into each of the fusions that it passes, with one channel. It is
    in a loop if all of these are. An all-reduce within an `all-reduce-scatter` leaves each device its slice.
    """
    computations, name = {}, None
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = start[1]
            computations[name] = []
        elif name is not None:
            computations[name].append(line)
    calls = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)")
    called = {
        name: {called for names in calls.findall(" ".join(lines)) for called in re.findall(r"%([\w.\-]+)", names)}
        for name, lines in computations.items()
    }
    in_loop, reached = set(), set(re.findall(r"body=%?([\w.\-]+)", text))
    while reached:
        in_loop |= reached
        reached = set().union(*(called[name] for name in reached if name in called)) - in_loop

    found = {}
    for name, lines in computations.items():
        for line in lines:
            if made := re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line):
                arrays = re.findall(r"(\w+)\[([\d,]*)\]", made[1])
                kind = made[2]
                if name.startswith("all-reduce-scatter"):
                    kind, arrays = "reduce-scatter", re.findall(r"ROOT .*? = (\w+)\[([\d,]*)\]", "\n".join(lines))
                if made[3] and made[2] == "all-gather":
                    arrays = arrays[len(arrays) // 2 :]  # of (operands, results)
                sizes = [(dtype, math.prod(int(n) for n in dims.split(",") if n)) for dtype, dims in arrays]
                channel = re.search(r"channel_id=(\d+)", line)
                of_one = found.setdefault((kind, channel[1]) if channel and "fus" in name else (name, line), [])
                of_one.append([Collective(kind, n, n * BYTES.get(dtype, 4), name in in_loop) for dtype, n in sizes])
    return [c for of_one in found.values() for c in min(of_one, key=lambda copy: any(c.in_loop for c in copy))]
