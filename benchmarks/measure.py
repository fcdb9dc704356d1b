"""What compare.py and growth.py share: programs, the check of what they compute, and rounds of their times.

A program is one candidate, compiled for one case. Its loss and a sample of its gradients are checked before its time
counts. Rounds run each program once, in an order shuffled anew; two sets of inputs take turns; a program's outputs are
dropped before the next one runs.
"""

import contextlib
import dataclasses
import os
import random
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import psutil
import torch_memory
from report import mib, reason
from tqdm import tqdm

LOSS_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}
GRADIENT_ERROR = {"float32": 1e-3, "bfloat16": 1e-1}  # of the largest element of the sample

# PyTorch and JAX share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


# --- programs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Program:
    name: str
    run: Callable[[int], Any]  # of input set 0 or 1; returns when the outputs are there
    gradients: Callable[[Any], tuple] | None = None  # of the outputs, as in JAX; None for a floor
    compile_s: float | None = None
    temporaries: int | None = None
    outputs: int | None = None
    device_peak: int | None = None
    setting: str | None = None
    tried_s: dict[str, float | str] | None = None  # seconds of each setting
    loss_error: float | None = None
    gradient_error: float | None = None
    by_process: bool = False  # the temporaries are the growth of a process


def compiled(case, name, function, sets):
    """The program of a JAX function, whose outputs have no gradients to check."""
    # float32 multiplies in float32 on every device, as PyTorch does unless told otherwise.
    exact = case.dtype == "float32" and jax.default_backend() != "cpu"
    start = time.perf_counter()
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        program = jax.jit(function).lower(*sets[0]).compile()
    seconds, memory = time.perf_counter() - start, program.memory_analysis()
    sizes = {"temporaries": memory.temp_size_in_bytes, "outputs": memory.output_size_in_bytes}
    return Program(name, lambda i: jax.block_until_ready(program(*sets[i])), compile_s=seconds, **sizes)


def jax_program(case, grad, name, loss, sets):
    """The program of a JAX loss, with its gradients or without."""
    function = jax.value_and_grad(loss, tuple(range(len(sets[0]) - 1))) if grad else loss
    program = compiled(case, name, function, sets)
    program.gradients = (lambda out: out[1]) if grad else (lambda out: ())
    return program


def torch_program(grad, name, settings, tensors):
    """The program of the fastest setting. The first run of each compiles and allocates and counts for nothing."""
    torch = peers.torch_here()
    torch._dynamo.reset()  # else it stops compiling after some sizes
    runs = {setting: peers.torch_call(loss, grad) for setting, loss in settings.items()}
    first, tried, errors = {}, {}, {}
    for setting, run in runs.items():
        try:
            start = time.perf_counter()
            run(tensors[0])
            first[setting] = time.perf_counter() - start
            if len(runs) > 1:
                start = time.perf_counter()
                run(tensors[1])
                tried[setting] = time.perf_counter() - start
        except Exception as error:  # compilers and allocators raise what they like
            errors[setting] = reason(error)
    if not first:
        raise RuntimeError("; ".join(errors.values()))
    best = min(tried, key=tried.get) if tried else next(iter(first))
    run = runs[best]

    def gradients(out):
        return (out[1][0], *(g.T for g in out[1][1:])) if grad else ()

    program = Program(name, lambda i: run(tensors[i]), gradients, setting=best, tried_s={**tried, **errors} or None)
    program.compile_s = first[best] if "compiled" in name else None
    program.outputs = 4 + (sum(t.nbytes for t in tensors[0][:-1]) if grad else 0)
    if tensors[0][0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run(tensors[0])
        program.temporaries = max(0, torch.cuda.max_memory_allocated() - before - program.outputs)
        del out
    return program


def as_numpy(array):
    if type(array).__module__.startswith("torch"):
        array = array.detach().double().cpu().numpy()
    return np.asarray(array).astype(np.float64)


def fits(program, limit=None):
    """Raises if what the program allocates exceeds the limit, or what a CPU's machine has left."""
    needed = program.temporaries + program.outputs
    limit = limit or (0.9 * available() if jax.default_backend() == "cpu" else None)
    if limit and needed > limit:
        raise MemoryError(f"needs {mib(needed)}, which is more than {mib(limit)}")


def check(case, program, truths):
    """Runs the program on both sets of inputs; raises if its loss or its gradients are wrong."""
    loss_error, gradient_error = 0.0, None
    for i, want in enumerate(truths):
        out = program.run(i)
        gradients = program.gradients(out)
        loss = float(as_numpy(out[0] if gradients else out))
        loss_error = np.fmax(loss_error, abs(loss / want.loss - 1)) if np.isfinite(loss) else np.inf
        if gradients:
            for gradient, (index, exact) in zip(gradients, want.gradients, strict=True):
                error = np.max(np.abs(as_numpy(gradient[index]) - exact)) / np.max(np.abs(exact))
                gradient_error = max(gradient_error or 0.0, float(error) if np.isfinite(error) else np.inf)
        del out, gradients
    program.loss_error, program.gradient_error = float(loss_error), gradient_error
    if program.loss_error > LOSS_ERROR[case.dtype]:
        raise ValueError(f"the loss is wrong by {program.loss_error:.1e}")
    if gradient_error is not None and gradient_error > GRADIENT_ERROR[case.dtype]:
        raise ValueError(f"a gradient is wrong by {gradient_error:.1e}")


def candidates(case, grad, sets, truths, only=None, limit=None, apart=True):
    """(programs that are right, name -> why another is left out).

    `only` has the names that take part, all by default; `limit` is of the bytes that a program allocates. Without
    `apart` no other process is started to measure PyTorch's memory on a CPU.
    """
    ours, theirs = (
        {name: loss for name, loss in losses.items() if only is None or name in only}
        for losses in (peers.jax_losses(case), peers.torch_losses(case))
    )
    programs, right, left_out = [], [], {}
    for name, loss in steps(ours.items(), f"{case}: compile"):
        try:
            programs.append(jax_program(case, grad, name, loss, sets))
        except Exception as error:  # XLA, Pallas and the peers raise what they like
            left_out[name] = reason(error)
    programs.sort(key=lambda program: program.temporaries)  # so that each may raise the device's peak
    for program in steps(programs, f"{case}: check"):
        try:
            fits(program, limit)
            before = device_memory()
            check(case, program, truths)
            after = device_memory()
            if before and after and after["peak_bytes_in_use"] > before["peak_bytes_in_use"]:
                program.device_peak = after["peak_bytes_in_use"] - before["bytes_in_use"]
            right.append(program)
        except Exception as error:
            left_out[program.name] = reason(error)
    tensors = peers.torch_sets(sets) if theirs else None
    for name, settings in steps(theirs.items(), f"{case}: PyTorch"):
        try:
            program = torch_program(grad, name, settings, tensors)
            check(case, program, truths)
            right.append(program)
        except Exception as error:
            left_out[name] = reason(error)
    if apart and tensors and not tensors[0][0].is_cuda:
        jobs = [(program.name, program.setting) for program in right if program.name in theirs]
        peaks = torch_memory.peaks(case, grad, jobs)
        for program in right:
            if program.name in peaks:
                program.temporaries, program.by_process = peaks[program.name], True
    order = [*ours, *theirs]
    return sorted(right, key=lambda program: order.index(program.name)), left_out


def floors(case, grad, sets):
    """What no candidate can do without: the matmuls, or reading (and writing) the logits."""
    if not case.linear:
        name = "read and write" if grad else "read the logits"
        function = (lambda logits: logits + 1) if grad else (lambda logits: jnp.sum(logits, dtype=jnp.float32))
        arguments = [s[:1] for s in sets]
    elif grad:
        name = "three matmuls"
        dlogits = jax.random.normal(jax.random.key(2), (case.size[0], case.size[2]), case.dtype)

        def function(hidden, kernel, dlogits):
            return hidden @ kernel, dlogits @ kernel.T, hidden.T @ dlogits

        arguments = [(*s[:2], dlogits) for s in sets]
    else:
        name, function, arguments = "one matmul", jnp.matmul, [s[:2] for s in sets]
    floor = compiled(case, name, function, arguments)
    fits(floor)
    return floor


def steps(items, title):
    """The items, with a progress bar in a terminal."""
    return tqdm(list(items), desc=title, leave=False, disable=None)


# --- times ------------------------------------------------------------------------------------------------------------


def rounds(programs, number, title):
    """(name -> seconds in each round after one that warms up, name -> why one that ran before fails now)."""
    order, shuffle = list(programs), random.Random(0)
    times, failed = {program.name: [] for program in programs}, {}
    for turn in tqdm(range(number + 1), desc=title, leave=False, disable=None, unit="round"):
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


def quartiles(values):
    return np.percentile(values, (25, 50, 75)).tolist()


def ratio(times, name, to):
    """Median over the rounds of the time of `name` as a multiple of that of `to`; None if one was not timed."""
    return float(np.median(np.divide(times[name], times[to]))) if {name, to} <= times.keys() else None


# --- memory -----------------------------------------------------------------------------------------------------------


def device_memory():
    stats = jax.devices()[0].memory_stats() or {}
    return stats if {"peak_bytes_in_use", "bytes_in_use"} <= stats.keys() else None


def available():
    """Bytes that may be allocated here: of the device, or of the machine for a CPU."""
    if jax.default_backend() == "cpu":
        return psutil.virtual_memory().available
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
