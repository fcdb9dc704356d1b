"""A reader of optimised HLO: what a compiled program sends between devices, and what it reads, writes and multiplies.

The compiler's own counts (`compiled.cost_analysis()`) leave out how often a loop turns. `Program.work` counts it.
"""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
# Instructions that move nothing, and those that read only the part of an array that they return.
FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional"}
FREE |= {"call", "opt-barrier", "partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update"}
SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}
CUBLAS = 'target="__cublas'  # XLA:GPU calls this library for multiplications of matrices
CALLS = ("calls", "to_apply", "body", "condition", r"\w+_computations?")


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str  # of the line; with the operands where none of them is an instruction


class Collective(NamedTuple):
    kind: str
    size: int  # elements of the result on one device
    bytes: int
    in_loop: bool


class Work(NamedTuple):
    flops: int
    bytes: int
    cycles: int = 0  # by the estimate of the TPU's compiler; other compilers make none

    def __add__(self, other):
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times):
        return Work(*(times * a for a in self))


NOTHING = Work(0, 0)


def arrays_in(type_):
    """(dtype, dimensions, layout) of each array of a type, which may be a tuple."""
    found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", type_)
    return [(dtype, [int(n) for n in sizes.split(",") if n], layout) for dtype, sizes, layout in found]


def dimensions(type_):
    return arrays_in(type_)[0][1]


def size_in_hbm(type_):
    """Bytes of the arrays in HBM: those in another memory have a layout with S(1), or some other number."""
    return sum(array_in_hbm(*array) for array in arrays_in(type_))


def array_in_hbm(dtype, sizes, layout):
    return 0 if re.search(r"S\(\d", layout) else math.prod(sizes) * BYTES.get(dtype, 4)


class Program:
    """The text of an optimised HLO module, `compiled.as_text()`."""

    def __init__(self, text):
        self.computations, self.roots, self.types, self.made = {}, {}, {}, {}
        for line in text.splitlines():
            if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                computation = start[2]
                body = self.computations[computation] = []
                if start[1]:
                    self.entry = computation
            elif parts := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)", line):
                root, name, type_, opcode, operands, rest = parts.groups()
                found = [] if opcode in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", operands)
                made = Instruction(name, type_, opcode, found, operands + rest if not found else rest)
                body.append(made)
                if root:
                    self.roots[computation] = made
                self.types[name], self.made[name] = type_, made

    def called(self, instruction, *keys):
        """Names of the computations that an instruction calls under these keys."""
        names = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.rest)
        return re.findall(r"[\w.\-]+", " ".join(names))

    # --- what is sent ---

    def in_loops(self):
        """Names of the computations that are bodies of loops, or called by one."""
        called = {name: set() for name in self.computations}
        bodies = set()
        for name, body in self.computations.items():
            for instruction in body:
                called[name].update(self.called(instruction, *CALLS))
                bodies.update(self.called(instruction, "body"))
        found, reached = set(), bodies
        while reached:
            found |= reached
            reached = set().union(*(called.get(name, ()) for name in reached)) - found
        return found

    def collectives(self):
        """The collectives, each array of a combined one by itself.

        XLA:TPU runs one beside other work, and writes it into each of the fusions that it passes, with one channel. It
        is in a loop if all of these are. An all-reduce within an `all-reduce-scatter` leaves each device its slice.
        """
        in_loops, found = self.in_loops(), {}
        for name, body in self.computations.items():
            for made in body:
                kind, arrays = made.opcode.removesuffix("-start"), arrays_in(made.type)
                if kind not in KINDS:
                    continue
                if made.opcode == "all-gather-start" or made.type.startswith("(("):
                    arrays = arrays[len(arrays) // 2 :]  # of (operands, results)
                if name.startswith("all-reduce-scatter"):
                    kind, arrays = "reduce-scatter", arrays_in(self.roots[name].type)
                sizes = [(dtype, math.prod(lengths)) for dtype, lengths, _ in arrays]
                channel = re.search(r"channel_id=(\d+)", made.rest)
                key = (kind, channel[1]) if channel and "fus" in name else (name, made.name)
                copies = found.setdefault(key, [])
                copies.append([Collective(kind, n, n * BYTES.get(dtype, 4), name in in_loops) for dtype, n in sizes])
        return [c for copies in found.values() for c in min(copies, key=lambda copy: any(c.in_loop for c in copy))]

    # --- what is computed, read and written ---

    def turns(self, loop):
        """How often a loop turns that counts from 0 in steps of 1, as those of `scan` and `fori_loop` do."""
        (condition,) = self.called(loop, "condition")
        body, root = self.computations[condition], self.roots[condition]
        while root.opcode == "fusion":
            (inner,) = self.called(root, "calls")
            body, root = body + self.computations[inner], self.roots[inner]
        assert root.opcode == "compare", root
        assert "direction=LT" in root.rest, root
        (limit,) = (int(re.match(r"\d+", i.rest)[0]) for i in body if i.opcode == "constant" and i.type[:5] == "s32[]")
        index = next(int(i.rest.split("index=")[1].split(",")[0]) for i in body if i.opcode == "get-tuple-element")
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
        if CUBLAS in i.rest:  # of (result, workspace)
            result = array_in_hbm(*arrays_in(i.type)[0])
        if i.opcode in SLICES:
            return 2 * result + sum(size[name] for name in i.operands[1:])
        if i.opcode == "dynamic-update-slice":
            return 2 * size[i.operands[1]]
        if i.opcode == "fusion":
            return result + self.read_by_fusion(i)
        return result + sum(size.values())

    def uses_in(self, fusion):
        """For each operand of a fusion: (operand, its names in the fusion, the instructions there that use it)."""
        (body,) = (self.computations[name] for name in self.called(fusion, "calls"))
        for parameter in (i for i in body if i.opcode == "parameter"):
            names, users = {parameter.name}, []
            for i in body:  # in the order in which they may depend on each other
                if names.isdisjoint(i.operands):
                    continue
                if i.opcode == "bitcast":
                    names.add(i.name)
                else:
                    users.append(i)
            yield fusion.operands[int(re.match(r"\d+", parameter.rest)[0])], names, users

    def read_by_fusion(self, fusion):
        """Bytes of HBM that a fusion reads; fewer by the part of its result that stays as it is."""
        total = 0
        for operand, names, users in self.uses_in(fusion):
            whole = size_in_hbm(self.types[operand])
            if all(j.opcode in SLICES and j.operands[0] in names for j in users):
                total += min(whole, sum(size_in_hbm(j.type) for j in users))
            elif all(j.opcode == "dynamic-update-slice" and j.operands[0] in names for j in users):
                # Written in place: what stays as it is neither is read nor is part of the result.
                written = sum(size_in_hbm(self.types[j.operands[1]]) for j in users)
                total += 0 if whole == 0 else 2 * written - sum(size_in_hbm(j.type) for j in users)
            else:
                total += whole
        return total

    def reads_whole(self, i):
        """The operands of an instruction that it reads to the last element: neither a slice of them nor a gather."""
        if i.opcode in FREE:
            return []
        if i.opcode == "fusion":
            parts = {*SLICES, "dynamic-update-slice"}
            return [
                operand
                for operand, names, users in self.uses_in(i)
                if any(j.opcode not in parts or not names.isdisjoint(j.operands[1:]) for j in users)
            ]
        return i.operands[1:] if i.opcode in {*SLICES, "dynamic-update-slice"} else i.operands

    def readings(self, dtype, size):
        """For each loop: how often its body reads an array of this dtype and so many elements as a whole.

        A kernel that reads it for several results counts once.
        """

        def count(name):
            total = 0
            for i in self.computations[name]:
                types = [self.types[operand] for operand in self.reads_whole(i)]
                total += sum([(of, math.prod(n)) for of, n, _ in arrays_in(t)] == [(dtype, size)] for t in types)
                if i.opcode in ("call", "conditional"):
                    total += sum(map(count, self.called(i, "to_apply", r"\w+_computations?")))
            return total

        loops = [i for i in self.made.values() if i.opcode == "while"]
        return [count(*self.called(loop, "body")) for loop in loops]

    def multiplied(self, i):
        """Flops of a multiplication of matrices: a convolution for a TPU, a call of cuBLAS for a GPU."""
        if i.opcode == "convolution":
            kernel = re.search(r"dim_labels=\w+_(\w+)->", i.rest)[1]
            other = dimensions(self.types[i.operands[1]])
            return 2 * math.prod(dimensions(i.type)) * math.prod(other) // other[kernel.index("o")]
        if i.opcode == "dot" or CUBLAS in i.rest:
            contracted = re.search(r'lhs_contracting_dim\w*"?[=:][{\[]([\d,"]*)', i.rest)[1]
            left = dimensions(self.types[i.operands[0]])
            return 2 * math.prod(dimensions(i.type)) * math.prod(left[int(n)] for n in re.findall(r"\d+", contracted))
        return 0

    def work(self, name=None, fused=False):
        """Of a computation, the entry if none is named. For programs of a TPU or a GPU, whose memory is HBM."""
        total = NOTHING
        for i in self.computations[name or self.entry]:
            total += Work(self.multiplied(i), *((0, 0) if fused else (self.moved(i), estimated_cycles(i))))
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

    def seconds(self, peak, bandwidth, name=None):
        """Of a computation if each instruction takes as long as its flops or bytes, and none runs beside another."""
        total = 0.0
        for i in self.computations[name or self.entry]:
            own = Work(self.multiplied(i), self.moved(i))
            if i.opcode == "fusion":
                own += self.work(*self.called(i, "calls"), fused=True)
            total += max(own.flops / peak, own.bytes / bandwidth)
            if i.opcode == "while":
                total += self.seconds(peak, bandwidth, *self.called(i, "body")) * self.turns(i)
            elif i.opcode == "call":
                total += self.seconds(peak, bandwidth, *self.called(i, "to_apply"))
            elif i.opcode == "conditional":
                branches = self.called(i, "branch_computations", "true_computation", "false_computation")
                total += max(self.seconds(peak, bandwidth, branch) for branch in branches)
        return total

    def multiplications(self):
        """The instructions that multiply matrices."""
        return [i for i in self.made.values() if i.opcode in ("dot", "convolution") or CUBLAS in i.rest]

    def matmuls(self):
        """How many multiplications of matrices the program has, one of a loop counted once."""
        return len(self.multiplications())

    def kernels(self):
        """Custom kernels, of which neither the flops nor the bytes read twice are known."""
        targets = 'target="tpu_custom_call"', 'target="__gpu$xla.gpu.triton"'
        return sum(any(target in i.rest for target in targets) for i in self.made.values())


def estimated_cycles(i):
    found = re.search(r'"estimated_cycles":"?(\d+)', i.rest)
    return int(found[1]) if found else 0


def collectives(text):
    return Program(text).collectives()
