"""What compare.py and growth.py share: inputs, their float64 losses, programs, rounds, and the record of the machine.

A program is one candidate, compiled for one case. Its loss and a sample of its gradients are checked before its time
counts. Rounds run each program once, in an order shuffled anew; two sets of inputs take turns; a program's outputs are
dropped before the next one runs.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peers
from tqdm import tqdm

DISTINCT = 1024  # rows repeat after so many, with labels of their own: the float64 loss of a large case takes seconds
CONFIDENT = 16  # rows of these that are sure of their label
LOSS_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}
GRADIENT_ERROR = {"float32": 1e-3, "bfloat16": 1e-1}  # of the largest element of the sample
MIB = 2**20

# PyTorch and JAX share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class Case(NamedTuple):
    loss: str  # cross_entropy or linear_cross_entropy
    size: tuple[int, ...]  # positions x classes, or positions x features x classes
    dtype: str

    @property
    def linear(self):
        return self.loss == "linear_cross_entropy"

    @property
    def logits_bytes(self):
        return self.size[0] * self.size[-1] * jnp.dtype(self.dtype).itemsize

    def __str__(self):
        axes = ("positions", "features", "classes") if self.linear else ("positions", "classes")
        return " x ".join(f"{n:,} {axis}" for n, axis in zip(self.size, axes, strict=True)) + f", {self.dtype}"


class Truth(NamedTuple):
    """The loss, and for each gradient an index and the values there, all in float64."""

    loss: float
    gradients: tuple[tuple[Any, np.ndarray], ...]


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


def shapes(case):
    """Abstract arguments of the case's losses."""
    dtype = jnp.dtype(case.dtype)
    if case.linear:
        positions, features, classes = case.size
        floats = [((positions, features), dtype), ((features, classes), dtype)]
    else:
        positions = case.size[0]
        floats = [(case.size, dtype)]
    return tuple(jax.ShapeDtypeStruct(*shape) for shape in [*floats, ((positions,), jnp.int32)])


def inputs(case, seed):
    """Arguments of the case's losses: random normal logits, and a few rows whose label leads by some 20."""
    positions, classes = case.size[0], case.size[-1]
    few = min(CONFIDENT, positions // 8)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, positions)
    rows = np.arange(positions) % DISTINCT
    labels[rows < few] = labels[rows[rows < few]]

    def make(labels):
        keys = jax.random.split(jax.random.key(seed), 2)
        sure = jnp.arange(few)
        if case.linear:
            kernel = jax.random.normal(keys[1], case.size[1:], case.dtype) / np.sqrt(case.size[1]).astype(case.dtype)
            rows = jax.random.normal(keys[0], (min(positions, DISTINCT), case.size[1]), case.dtype)
            rows = rows.at[sure].set(20 * kernel[:, labels[:few]].T)
        else:
            rows = jax.random.normal(keys[0], (min(positions, DISTINCT), classes), case.dtype)
            rows = rows.at[sure, labels[:few]].set(25)
        rows = rows[jnp.arange(positions) % DISTINCT]
        return (rows, kernel, labels) if case.linear else (rows, labels)

    return jax.block_until_ready(jax.jit(make)(jnp.asarray(labels, jnp.int32)))


def truth(case, arguments):
    """Loss and a sample of the gradients in float64 NumPy."""
    labels = np.asarray(arguments[-1])
    positions, classes = len(labels), case.size[-1]
    distinct = np.asarray(arguments[0][:DISTINCT]).astype(np.float64)
    kernel = np.asarray(arguments[1]) if case.linear else None
    rows = np.arange(positions) % DISTINCT
    step = max(1, 2**25 // len(distinct))

    def columns(at, rows=slice(None)):
        return distinct[rows] @ kernel[:, at].astype(np.float64) if case.linear else distinct[rows][:, at]

    chunks = [np.arange(start, min(start + step, classes)) for start in range(0, classes, step)]
    top, total = np.full(len(distinct), -np.inf), np.zeros(len(distinct))
    for at in chunks:
        x = columns(at)
        new = np.maximum(top, x.max(-1))
        total = total * np.exp(top - new) + np.exp(x - new[:, None]).sum(-1)
        top = new
    log_normalizer = top + np.log(total)
    picked = np.empty(positions)
    for start in range(0, positions, DISTINCT):
        at = labels[start : start + DISTINCT]
        if case.linear:
            picked[start : start + DISTINCT] = np.einsum("nf,fn->n", distinct[: len(at)], kernel[:, at].astype("f8"))
        else:
            picked[start : start + DISTINCT] = distinct[np.arange(len(at)), at]
    loss = np.mean(log_normalizer[rows] - picked)

    some = np.unique(np.linspace(0, min(positions, DISTINCT) - 1, 8).astype(int))
    gradient = np.zeros((len(some), case.size[1]))
    for at in chunks:
        dlogits = np.exp(columns(at, some) - log_normalizer[some, None]) - (labels[some, None] == at)
        if case.linear:
            gradient += dlogits @ kernel[:, at].T.astype(np.float64)
        else:
            gradient[:, at] = dlogits
    samples = [(some, gradient / positions)]
    if case.linear:
        at = np.unique(labels[some])
        dlogits = np.exp(columns(at) - log_normalizer[:, None]) * np.bincount(rows)[:, None]
        for column, label in enumerate(at):
            np.subtract.at(dlogits[:, column], rows[labels == label], 1)
        samples.append(((slice(None), at), distinct.T @ dlogits / positions))
    return Truth(float(loss), tuple(samples))


def sample(gradients, truth):
    """What a program gives where `truth` has gradients, as float64 arrays."""
    return [as_numpy(g[index]) for g, (index, _) in zip(gradients, truth.gradients, strict=True)]


def as_numpy(array):
    if type(array).__module__.startswith("torch"):
        array = array.detach().double().cpu().numpy()
    return np.asarray(array).astype(np.float64)


def precision(case):
    """float32 multiplies in float32 on every device, as PyTorch does unless told otherwise."""
    exact = case.dtype == "float32" and jax.default_backend() != "cpu"
    return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


def compiled(case, function, arguments):
    """The compiled function and the seconds that lowering and compiling took."""
    start = time.perf_counter()
    with precision(case):
        program = jax.jit(function).lower(*arguments).compile()
    return program, time.perf_counter() - start


def differentiated(case, loss, grad):
    return jax.value_and_grad(loss, (0, 1) if case.linear else 0) if grad else loss


def jax_program(case, grad, name, function, sets):
    program, seconds = compiled(case, function, sets[0])
    memory = program.memory_analysis()

    def gradients(out):
        return out[1] if case.linear else (out[1],)

    return Program(
        name,
        lambda i: jax.block_until_ready(program(*sets[i])),
        gradients if grad else lambda out: (),
        seconds,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
    )


def jax_losses(case):
    return peers.linear_losses() if case.linear else peers.logits_losses()


def torch_losses(case):
    """Name -> {setting: loss}; one setting, None, for most."""
    losses = {
        name: {None: loss}
        for name, loss in (peers.torch_linear_losses() if case.linear else peers.torch_logits_losses()).items()
    }
    if case.linear and (chunked := peers.torch_chunked_losses(case.size[0])):
        losses["PyTorch, linear_cross_entropy"] = chunked
    return losses


def torch_sets(sets):
    """The same arrays as tensors, the kernel as PyTorch lays it out; shared with JAX where the layout is the same."""
    torch = peers.torch_here()

    def tensor(array):
        shared = torch.from_dlpack(array)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return shared.long()
        return shared.detach().requires_grad_()

    def weight(kernel):
        return torch.from_dlpack(kernel).T.contiguous().requires_grad_()

    return [(tensor(s[0]), *(weight(k) for k in s[1:-1]), tensor(s[-1])) for s in sets]


def torch_call(loss, grad):
    """A function of a tuple of tensors that computes the loss, and gradients, and waits for them."""
    torch = peers.torch_here()

    def run(tensors):
        if grad:
            value = loss(*tensors)
            out = value.detach(), torch.autograd.grad(value, tensors[:-1])
        else:
            with torch.no_grad():
                out = loss(*tensors)
        if tensors[0].is_cuda:
            torch.cuda.synchronize()
        return out

    return run


def torch_program(grad, name, settings, tensors):
    """The program of the fastest setting. The first run of each compiles and allocates and counts for nothing."""
    torch = peers.torch_here()
    runs = {setting: torch_call(loss, grad) for setting, loss in settings.items()}
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


def fits(program, limit=None):
    """Raises if what the program allocates exceeds the limit, or what a CPU's machine has left."""
    needed = program.temporaries + program.outputs
    limit = limit or (0.9 * available() if jax.default_backend() == "cpu" else None)
    if limit and needed > limit:
        raise MemoryError(f"needs {mib(needed)}, which is more than {mib(limit)}")


def checked(case, program, sets, truths):
    """Runs the program on both sets of inputs; raises if its loss or its gradients are wrong."""
    loss_error, gradient_error = 0.0, None
    for i, want in enumerate(truths[: len(sets)]):
        out = program.run(i)
        gradients = program.gradients(out)
        loss = float(as_numpy(out[0] if gradients else out))
        loss_error = np.fmax(loss_error, abs(loss / want.loss - 1)) if np.isfinite(loss) else np.inf
        if gradients:
            for got, (_, exact) in zip(sample(gradients, want), want.gradients, strict=True):
                error = np.max(np.abs(got - exact)) / np.max(np.abs(exact))
                gradient_error = max(gradient_error or 0.0, float(error) if np.isfinite(error) else np.inf)
        del out, gradients
    program.loss_error, program.gradient_error = float(loss_error), gradient_error
    if program.loss_error > LOSS_ERROR[case.dtype]:
        raise ValueError(f"the loss is wrong by {program.loss_error:.1e}")
    if gradient_error is not None and gradient_error > GRADIENT_ERROR[case.dtype]:
        raise ValueError(f"a gradient is wrong by {gradient_error:.1e}")


def candidates(case, grad, sets, truths, only=None, tensors=None, note=lambda text: None, limit=None, apart=True):
    """(programs that are right, name -> why another is left out).

    `tensors` are `torch_sets(sets)`, or None to leave PyTorch out; `limit` is of the bytes that a program allocates.
    Without `apart` no other process is started to measure PyTorch's memory on a CPU.
    """
    programs, left_out = [], {}
    for name, loss in jax_losses(case).items():
        if only is not None and name not in only:
            continue
        note(f"{name}: compile")
        try:
            programs.append(jax_program(case, grad, name, differentiated(case, loss, grad), sets))
        except Exception as error:  # XLA, Pallas and the peers raise what they like
            left_out[name] = reason(error)
    programs.sort(key=lambda program: program.temporaries)  # so that each may raise the device's peak
    right = []
    for program in programs:
        note(f"{program.name}: check")
        try:
            fits(program, limit)
            before = device_memory()
            checked(case, program, sets, truths)
            after = device_memory()
            if before and after and after["peak_bytes_in_use"] > before["peak_bytes_in_use"]:
                program.device_peak = after["peak_bytes_in_use"] - before["bytes_in_use"]
            right.append(program)
        except Exception as error:
            left_out[program.name] = reason(error)
    compared = torch_losses(case) if tensors else {}
    for name, settings in compared.items():
        if only is not None and name not in only:
            continue
        note(f"{name}: compile and check")
        try:
            peers.torch_here()._dynamo.reset()  # else it stops compiling after some sizes
            program = torch_program(grad, name, settings, tensors)
            checked(case, program, sets, truths)
            right.append(program)
        except Exception as error:
            left_out[name] = reason(error)
    if apart and tensors and not tensors[0][0].is_cuda:
        note("PyTorch: memory")
        jobs = [(program.name, program.setting) for program in right if program.name in compared]
        peaks = torch_peaks(case, grad, jobs)
        for program in right:
            if program.name in peaks:
                program.temporaries, program.by_process = peaks[program.name], True
    order = [*jax_losses(case), *compared]
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
    floor = jax_program(case, False, name, function, arguments)
    fits(floor)
    floor.gradients = None
    return floor


def work(case, grad):
    """(amount, unit) of the floor: floating-point operations of the matmuls, or bytes read and written."""
    if case.linear:
        return 2.0 * float(np.prod(case.size, dtype=np.float64)) * (3 if grad else 1), "FLOP/s"
    return float(case.logits_bytes * (2 if grad else 1)), "B/s"


def rounds(programs, number, seed=0, title=None):
    """(name -> seconds in each round after one that warms up, name -> why one that ran before fails now)."""
    order, shuffle = list(programs), random.Random(seed)
    times, failed = {program.name: [] for program in programs}, {}
    with tqdm(total=(number + 1) * len(order), desc=title, leave=False, disable=None, unit="run") as bar:
        for turn in range(number + 1):
            shuffle.shuffle(order)
            for program in list(order):
                bar.set_postfix_str(program.name)
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
                bar.update()
    return {name: taken for name, taken in times.items() if name not in failed}, failed


def progress(title):
    """A function that shows what is being done on one line of the terminal, and nothing in a log."""

    def note(text):
        if sys.stderr.isatty():
            print(f"\r\x1b[K{title}: {text}" if text else "\r\x1b[K", end="", file=sys.stderr, flush=True)

    return note


def quartiles(values):
    return [float(q) for q in np.percentile(values, (25, 50, 75))]


def ratio(times, name, to):
    """Median over the rounds of the time of `name` as a multiple of that of `to`."""
    return float(np.median(np.divide(times[name], times[to])))


def device_memory():
    stats = jax.devices()[0].memory_stats() or {}
    return stats if {"peak_bytes_in_use", "bytes_in_use"} <= stats.keys() else None


def available():
    """Bytes that may be allocated here: of the device, or of the machine for a CPU."""
    if jax.default_backend() != "cpu":
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def torch_peaks(case, grad, jobs):
    """Name -> bytes of temporaries of (name, setting) `jobs` on a CPU; nothing for those that could not be measured.

    By a process of its own: the growth of its resident memory during the second run, less the gradients. Small arrays
    that fit in pages already resident do not show, so less than a MiB means little. Linux only.
    """
    if not jobs or not sys.platform.startswith("linux"):
        return {}
    job = json.dumps({"case": case, "grad": grad, "jobs": jobs})
    # glibc is told to give every array of some size back when it is freed; else the next run uses the same pages again.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, job], capture_output=True, text=True, check=False, env=env)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return dict(found)


def print_torch_peaks(case, grad, jobs):
    torch = peers.torch_here()
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    rows = torch.randn(case.size[0], case.size[1], dtype=dtype).requires_grad_()
    labels = torch.randint(0, case.size[-1], (case.size[0],))
    tensors = (rows, labels)
    if case.linear:
        weight = torch.randn(case.size[2], case.size[1], dtype=dtype) / case.size[1] ** 0.5
        tensors = (rows, weight.requires_grad_(), labels)
    losses = torch_losses(case)
    for name, setting in jobs:
        run = torch_call(losses[name][setting], grad)
        out = run(tensors)
        outputs = sum(t.nbytes for t in out[1]) if grad else 0
        del out
        before = resident("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        out = run(tensors)
        peak = resident("VmHWM")
        del out
        print(json.dumps([name, max(0, peak - before - outputs)]), flush=True)


def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def machine():
    """The record of where and with what something was measured."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    versions = {"Python": platform.python_version()}
    for name in ("jxent", "jax", "jaxlib", "numpy", "optax", "jax-cce", "tokamax", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "cpu": cpu,
        "cores": peers.cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "versions": versions,
    }


def headline(record):
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    device = "" if record["backend"] == "cpu" else f"{len(record['devices'])} x {record['devices'][0]}; "
    cores = "1 core" if record["cores"] == 1 else f"{record['cores']} cores"
    return f"{device}{record['cpu']}, {cores}, {record['memory_bytes'] / 2**30:.0f} GiB; {versions}"


def reason(error):
    """The first line of an error, cut short."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:300]}"


def mib(size):
    """Bytes for a reader."""
    if size is None:
        return ""
    return f"{size / MIB:,.0f} MiB" if size >= 10 * MIB else f"{size / 1024:,.0f} KiB"


def save(record, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print_torch_peaks(Case(given["case"][0], tuple(given["case"][1]), given["case"][2]), given["grad"], given["jobs"])
