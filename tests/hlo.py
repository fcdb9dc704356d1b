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
    """The collectives in the text of an optimised HLO module, each array of a combined one by itself."""
    computations, name = {}, None
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = start[1]
            computations[name] = []
        elif name is not None:
            computations[name].append(line)
    called = {
        name: {called for called in re.findall(r"%?([\w.\-]+)", " ".join(lines)) if called in computations} - {name}
        for name, lines in computations.items()
    }
    in_loop, reached = set(), set(re.findall(r"body=%?([\w.\-]+)", text))
    while reached:
        in_loop |= reached
        reached = set().union(*(called[name] for name in reached)) - in_loop

    found = []
    for name, lines in computations.items():
        for line in lines:
            if made := re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line):
                arrays = re.findall(r"(\w+)\[([\d,]*)\]", made[1])
                if made[3] and made[2] == "all-gather":
                    arrays = arrays[len(arrays) // 2 :]  # of (operands, results)
                for dtype, dims in arrays:
                    size = math.prod(int(n) for n in dims.split(",") if n)
                    found.append(Collective(made[2], size, size * BYTES.get(dtype, 4), name in in_loop))
    return found
