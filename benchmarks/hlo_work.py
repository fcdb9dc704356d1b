"""What a program reads, writes and multiplies, from the text that XLA's TPU compiler makes of it, for tpu.py.

The compiler's own counts leave out how often a loop turns.
"""

import math
import re
from typing import NamedTuple

WIDTH = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional"}
FREE |= {"call", "opt-barrier", "partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update"}
SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str  # of the line


class Work(NamedTuple):
    flops: int
    bytes: int
    cycles: int

    def __add__(self, other):
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times):
        return Work(*(times * a for a in self))


NOTHING = Work(0, 0, 0)


def dimensions(array):
    return [int(n) for n in re.search(r"\[([\d,]*)\]", array)[1].split(",") if n]


def size_in_hbm(type_):
    """Bytes of the arrays in HBM: those in another memory have a layout with S(1), or some other number."""
    arrays = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", type_)
    return sum(math.prod(dimensions(a)) * WIDTH.get(a.split("[")[0], 4) for a in arrays if not re.search(r"S\(\d", a))


class Program:
    """The text of an optimised HLO module."""

    def __init__(self, text):
        self.computations, self.types, self.made, body = {}, {}, {}, None
        for line in text.splitlines():
            if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                body = self.computations[start[2]] = []
                if start[1]:
                    self.entry = start[2]
            elif parts := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)", line):
                name, type_, opcode, operands, rest = parts.groups()
                found = [] if opcode in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", operands)
                made = Instruction(name, type_, opcode, found, operands + rest if not found else rest)
                body.append(made)
                self.types[name], self.made[name] = type_, made

    def called(self, instruction, *keys):
        names = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.rest)
        return re.findall(r"[\w.\-]+", " ".join(names))

    def turns(self, loop):
        """How often a loop turns that counts from 0 in steps of 1, as those of `scan` and `fori_loop` do."""
        (condition,) = self.called(loop, "condition")
        *rest, root = self.computations[condition]
        while root.opcode == "fusion":
            *inner, root = self.computations[self.called(root, "calls")[0]]
            rest += inner
        assert root.opcode == "compare", root
        assert "direction=LT" in root.rest, root
        (limit,) = (int(re.match(r"\d+", i.rest)[0]) for i in rest if i.opcode == "constant" and i.type[:5] == "s32[]")
        index = next(int(i.rest.split("index=")[1].split(",")[0]) for i in rest if i.opcode == "get-tuple-element")
        counter = self.made[self.made[loop.operands[0]].operands[index]]
        while counter.opcode == "copy":
            counter = self.made[counter.operands[0]]
        assert counter.opcode == "constant", counter
        return limit - int(re.match(r"\d+", counter.rest)[0])

    def moved(self, i):
        """Bytes of HBM that an instruction reads and writes, of an array that it takes or sets a part of only these."""
        if i.opcode in FREE or 'target="AllocateBuffer"' in i.rest:
            return 0
        size = {name: size_in_hbm(self.types[name]) for name in i.operands}
        if i.opcode == "copy-start":  # of (result, operand, context)
            first = re.match(r"\((\w+\[[\d,]*\](?:\{[^}]*\})?)", i.type)[1]
            return size_in_hbm(first) + sum(size.values())
        result = size_in_hbm(i.type)
        if i.opcode in SLICES:
            return 2 * size_in_hbm(i.type) + sum(size[name] for name in i.operands[1:])
        if i.opcode == "dynamic-update-slice":
            return 2 * size[i.operands[1]]
        if i.opcode != "fusion":
            return result + sum(size.values())
        (body,) = (self.computations[name] for name in self.called(i, "calls"))
        parameters = {j.name: int(re.match(r"\d+", j.rest)[0]) for j in body if j.opcode == "parameter"}
        total = result
        for name, number in parameters.items():
            whole = size_in_hbm(self.types[i.operands[number]])
            users = [j for j in body if name in j.operands]
            if all(j.opcode in SLICES and j.operands[0] == name for j in users):
                total += min(whole, sum(size_in_hbm(j.type) for j in users))
            elif all(j.opcode == "dynamic-update-slice" and j.operands[0] == name for j in users):
                # Written in place: what stays as it is neither is read nor is part of the result.
                written = sum(size_in_hbm(self.types[j.operands[1]]) for j in users)
                total += 0 if whole == 0 else 2 * written - sum(size_in_hbm(j.type) for j in users)
            else:
                total += whole
        return total

    def multiplied(self, i):
        """Flops of a multiplication of matrices, which the TPU compiler writes as a convolution."""
        if i.opcode == "convolution":
            kernel = re.search(r"dim_labels=\w+_(\w+)->", i.rest)[1]
            other = dimensions(self.types[i.operands[1]])
            return 2 * math.prod(dimensions(i.type)) * math.prod(other) // other[kernel.index("o")]
        if i.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1].split(",")
            left = dimensions(self.types[i.operands[0]])
            return 2 * math.prod(dimensions(i.type)) * math.prod(left[int(n)] for n in contracted if n)
        return 0

    def work(self, name=None, fused=False):
        """Of a computation, the entry if none is named."""
        total = NOTHING
        for i in self.computations[name or self.entry]:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
            if not fused:
                total += Work(0, self.moved(i), int(cycles[1]) if cycles else 0)
            total += Work(self.multiplied(i), 0, 0)
            if i.opcode == "fusion":
                total += self.work(*self.called(i, "calls"), fused=True)
            elif i.opcode == "while":
                total += self.work(*self.called(i, "body")) * self.turns(i)
            elif i.opcode == "call":
                total += self.work(*self.called(i, "to_apply"))
            elif i.opcode == "conditional":
                branches = self.called(i, "branch_computations", "true_computation", "false_computation")
                total += max(self.work(branch) for branch in branches)
        return total

    def kernels(self):
        """Custom kernels, of which neither the flops nor the bytes read twice are known."""
        return sum('target="tpu_custom_call"' in i.rest for i in self.made.values())
