"""The harness of compare.py, skipping.py and growth.py: programs, a check of their results, and rounds of their times.

A program is one candidate, compiled for one case. Its loss and a sample of its gradients are checked before its time
counts. Each round runs every program once, in an order shuffled anew, so that other work of the machine meets all of
them. Two sets of inputs take turns. A program's outputs are dropped before the next one runs. Ratios are medians of
each round's ratio. Temporaries are those of `compiled.memory_analysis()`.
"""

import contextlib
import dataclasses
import os
import random
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import peers
import psutil
import torch_memory
from cases import rows_of
from report import mib, reason, steps

LOSS_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}
GRADIENT_ERROR = {"float32": 1e-3, "bfloat16": 1e-1}  # of the largest element of the sample

# PyTorch and JAX share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


# --- programs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Program:
    name: str
    run: Callable[[int], Any]  # of input set 0 or 1; returns when the outputs are there
    gradients: Callable[[Any], dict] = lambda out: {}  # of the outputs: number of an input -> its gradient, as in JAX
    compile_s: float | None = None
    temporaries: int | None = None
    outputs: int | None = None
    matmuls: int | None = None
    loss_error: float | None = None
    by_process: bool = False  # the temporaries are the growth of a process
    label: str | None = None  # for tables and figures, where it is not the name


def jax_program(name, function, sets, dtype="float32"):
    """The program of a JAX function, compiled for the first of the sets of arguments."""
    # float32 multiplies in float32 on every device, as PyTorch does unless told otherwise.
    exact = dtype == "float32" and jax.default_backend() != "cpu"
    start = time.perf_counter()
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        program = jax.jit(function).lower(*sets[0]).compile()
    made = Program(name, lambda i: jax.block_until_ready(program(*sets[i])), compile_s=time.perf_counter() - start)
    memory = program.memory_analysis()
    made.temporaries, made.outputs = memory.temp_size_in_bytes, memory.output_size_in_bytes
    made.matmuls = program.as_text().count(" dot(") if jax.default_backend() == "cpu" else None
    return made


def loss_program(case, grad, name, sets):
    """The program of one of the case's losses, with its gradients or without."""
    loss, wrt = case.losses()[name]
    if not grad:
        return jax_program(name, loss, sets, dtype=case.dtype)
    program = jax_program(name, jax.value_and_grad(loss, wrt), sets, dtype=case.dtype)
    program.gradients = lambda out: dict(zip(wrt, out[1], strict=True))
    return program


def floor_program(case, grad, sets):
    label, function = case.floor(grad)
    program = jax_program("floor", function, sets, dtype=case.dtype)
    program.label = f"floor: {label}"
    return program


def torch_program(grad, name, loss, tensors):
    """The first run compiles and allocates and counts for nothing."""
    torch = peers.torch_here()
    torch._dynamo.reset()  # else it stops compiling after some sizes
    run = peers.torch_call(loss, grad)
    start = time.perf_counter()
    run(tensors[0])
    first = time.perf_counter() - start
    program = Program(name, lambda i: run(tensors[i]), compile_s=first if "compiled" in name else None)
    if grad:
        program.gradients = lambda out: dict(enumerate([out[1][0], *(g.T for g in out[1][1:])]))
    program.outputs = 4 + (sum(t.nbytes for t in tensors[0][:-1]) if grad else 0)
    if tensors[0][0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run(tensors[0])
        program.temporaries = max(0, torch.cuda.max_memory_allocated() - before - program.outputs)
        del out
    return program


def fits(program):
    """Raises if a CPU's machine has too little memory left, which ends a process. A device raises by itself."""
    needed, free = program.temporaries + program.outputs, psutil.virtual_memory().available
    if jax.default_backend() == "cpu" and needed > 0.9 * free:
        raise MemoryError(f"needs {mib(needed)}, and {mib(free)} are free")


# --- what they compute ------------------------------------------------------------------------------------------------


def check(case, program, truths):
    """Runs the program on all sets of inputs; raises if its loss or its gradients are wrong."""
    program.loss_error = 0.0
    for i, want in enumerate(truths):
        out = program.run(i)
        gradients = program.gradients(out)
        error = abs(float(as_numpy(out[0] if gradients else out)) / want.loss - 1)
        program.loss_error = max(program.loss_error, error if np.isfinite(error) else np.inf)
        if program.loss_error > LOSS_ERROR[case.dtype]:
            raise ValueError(f"the loss is wrong by {program.loss_error:.1e}")
        for number, gradient in gradients.items():
            exact = want.gradients[number]
            error = np.max(np.abs(as_numpy(gradient[rows_of(gradient)]) - exact)) / np.max(np.abs(exact))
            if not error <= (case.gradient_error or GRADIENT_ERROR[case.dtype]):
                raise ValueError(f"a gradient is wrong by {error:.1e}")
        del out, gradients


def as_numpy(array):
    if type(array).__module__.startswith("torch"):
        array = array.detach().double().cpu().numpy()
    return np.asarray(array).astype(np.float64)


def candidates(case, grad, sets, truths, only=None, apart=True):
    """(programs that are right, with the floor as the last one; name -> why another is left out).

    `only` has the names that take part, all by default. Without `apart` no other process is started to measure
    PyTorch's memory on a CPU.
    """
    ours, theirs = case.losses(), case.torch_losses()
    names = [name for name in (*ours, *theirs, "floor") if only is None or name in only]
    right, left_out = [], {}
    tensors = peers.torch_sets(sets) if theirs else None
    for name in steps(names, f"{case}: compile and check"):
        try:
            if name in theirs:
                program = torch_program(grad, name, theirs[name], tensors)
            else:
                program = floor_program(case, grad, sets) if name == "floor" else loss_program(case, grad, name, sets)
                fits(program)
            if name != "floor":
                check(case, program, truths)
            right.append(program)
        except Exception as error:  # XLA, Pallas, PyTorch and the peers raise what they like
            left_out[name] = reason(error)
    if apart and tensors and not tensors[0][0].is_cuda:
        peaks = torch_memory.peaks(case, grad, [program.name for program in right if program.name in theirs])
        for program in right:
            if program.name in peaks:
                program.temporaries, program.by_process = peaks[program.name], True
    return right, left_out


# --- times ------------------------------------------------------------------------------------------------------------


def rounds(programs, number, title):
    """(name -> seconds in each round after one that warms up, name -> why one that ran before fails now)."""
    order, shuffle = list(programs), random.Random(0)
    times, failed = {program.name: [] for program in programs}, {}
    for turn in steps(range(number + 1), title, unit="round"):
        shuffle.shuffle(order)
        for program in list(order):
            try:
                start = time.perf_counter()
                out = program.run(turn % 2)
                taken = time.perf_counter() - start
                del out
            except Exception as error:  # two libraries share a GPU's memory
                order.remove(program)
                failed[program.name] = reason(error)
                continue
            if turn:
                times[program.name].append(taken)
    return {name: taken for name, taken in times.items() if name not in failed}, failed


def ratio(times, name, to):
    """Median over the rounds of the time of `name` as a multiple of that of `to`; None if one was not timed."""
    return float(np.median(np.divide(times[name], times[to]))) if {name, to} <= times.keys() else None


def entry(program, times):
    numbers = dataclasses.asdict(program)
    del numbers["run"], numbers["gradients"]
    return numbers | {
        "quartiles_s": np.percentile(times[program.name], (25, 50, 75)).tolist(),
        "jxent_of_this": ratio(times, "jxent", program.name),
        "floor_of_this": ratio(times, "floor", program.name),
        "times_s": times[program.name],
    }
