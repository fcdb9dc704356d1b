"""What only long runs show: precision over 10,000 steps, flat memory, resumed training, the same bits again.

    pip install -e ".[bench,examples]"
    python benchmarks/long_runs.py                       # all but the last below; 40 minutes on two busy CPU cores
    python benchmarks/long_runs.py memory determinism    # some of it; the record keeps the rest
    python benchmarks/long_runs.py --smoke               # under three minutes of CPU time, to see that it works

training     the network of examples/train_digits.py in bfloat16 and in float32, beside float64
memory       resident memory and live arrays over calls of changing shapes
resume       examples/train_lm.py, killed several times, beside a run that was left alone
determinism  losses and gradients again, in other processes, on one device and on eight simulated ones
cache        where `jax.jit` begins to forget programs; takes 5 GiB, and runs only by this name

Prints Markdown tables and writes a JSON record and a plot. Exits with 1 if something that must hold does not. All of it
runs on CPU devices. Resident memory is read from /proc, which Linux has.
"""

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm

import jxent

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
MIB = 2**20
LOSSES = ("cross_entropy", "linear_cross_entropy")


class Result(NamedTuple):
    """Of one run: (title, header, rows) of each table, whether what must hold does, and the numbers behind it."""

    tables: list
    checks: dict
    data: dict


def child(function, *arguments, devices=1, cores=None):
    """What a function of this file returns in a fresh process, which compiles everything anew."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        given = json.dumps([function.__name__, arguments, answer.name, cores])
        subprocess.run([sys.executable, __file__, "--child", given], env=environment, check=True)
        return json.loads(pathlib.Path(answer.name).read_text())


def side_by_side(calls, processes):
    """What `child` returns for each of the calls ((function, arguments...), options), so many at a time."""
    with ThreadPoolExecutor(processes) as pool:
        running = [pool.submit(child, *call, **options) for call, options in calls]
        return [future.result() for future in running]


# --- training -------------------------------------------------------------------------------------------------------


class Precision(NamedTuple):
    parameters: str
    compute: str  # of the forward and backward pass
    nudge: float = 0.0  # relative, of each initial parameter


PRECISIONS = {
    "float64": Precision("float64", "float64"),
    "float32": Precision("float32", "float32"),
    "bfloat16": Precision("float32", "bfloat16"),
    # Training is chaotic: a change of the last digit grows. This run shows how far float64 drifts from itself.
    "float64, nudged": Precision("float64", "float64", 2.0**-24),
}


def trained(name, smoothing, steps, every, line=0):
    """The loss of each step, [loss, accuracy] on held-out digits every `every` steps, and the logits at 20 of those."""
    from train_digits import BATCH_SIZE, CNN, load_data

    precision = PRECISIONS[name]
    images, heldout_images, labels, heldout_labels = load_data(seed=0)
    graph, params = nnx.split(CNN(nnx.Rngs(0)))  # drawn in float32
    rng = np.random.default_rng(0)
    whole = len(labels) // BATCH_SIZE * BATCH_SIZE
    epochs = -(-steps * BATCH_SIZE // whole)
    batches = np.concatenate([rng.permutation(len(labels))[:whole] for _ in range(epochs)]).reshape(-1, BATCH_SIZE)

    def initial(p):
        p = np.asarray(p, np.float64)
        return jnp.asarray(p * (1 + precision.nudge * rng.uniform(-1, 1, p.shape)), precision.parameters)

    def logits_of(params, images):
        model = nnx.merge(graph, jax.tree.map(lambda p: p.astype(precision.compute), params))
        return model(images.astype(precision.compute))

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, images, labels):
        def loss_fn(params):
            return jxent.cross_entropy(logits_of(params, images), labels, label_smoothing=smoothing)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def eval_step(params):
        loss, stats = jxent.cross_entropy(logits_of(params, heldout_images), heldout_labels, return_stats=True)
        return loss, (stats.prediction == heldout_labels).mean()

    with jax.enable_x64(precision.parameters == "float64"):
        schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, warmup_steps=steps // 10, decay_steps=steps)
        rule = optax.adamw(lambda count: schedule(count.astype(precision.parameters)), weight_decay=1e-2)
        params = jax.tree.map(initial, params)
        state, losses, heldout, logits = rule.init(params), [], [], []
        title = f"{name}, smoothing {smoothing:g}"
        for i, batch in enumerate(tqdm(batches[:steps], desc=title, unit="step", position=line, mininterval=2)):
            params, state, loss = train_step(params, state, images[batch], labels[batch])
            losses.append(loss)
            if (i + 1) % every == 0:
                losses[-every:] = map(float, losses[-every:])
                heldout.append([float(a) for a in eval_step(params)])
            if (i + 1) % (steps // 20) == 0 and name == "float64":
                logits.append(np.asarray(logits_of(params, images), np.float64).tolist())
        finite = all(np.all(np.isfinite(a)) for a in (*jax.tree.leaves(params), losses, heldout))
    return {"losses": losses, "heldout": heldout, "logits": logits, "labels": labels.tolist(), "finite": bool(finite)}


def loss_errors(logits, labels, smoothing, dtype):
    """Relative errors at logits (checkpoint, digit, class) rounded to `dtype`: of jxent, and of Optax where it can."""

    def ours(x):
        return jxent.cross_entropy(x, labels, label_smoothing=smoothing)

    def optax_loss(x):
        return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()

    def value_and_grad(loss, x):
        return [np.asarray(a, np.float64) for a in jax.jit(jax.vmap(jax.value_and_grad(loss)))(x)]

    rounded = jnp.asarray(logits, dtype)
    with jax.enable_x64(True):
        loss, grad = value_and_grad(ours, jnp.asarray(np.asarray(rounded), jnp.float64))
    errors = {}
    for name, function in {"jxent": ours, **({} if smoothing else {"Optax": optax_loss})}.items():
        got_loss, got_grad = value_and_grad(function, rounded)
        off, size = np.abs(got_grad - grad), np.abs(grad)
        found = [np.abs(got_loss / loss - 1).max(), (off / size.max((1, 2), keepdims=True)).max()]
        if not smoothing:  # with it an element is p - smoothing / classes, and may be next to 0
            normal = size > jnp.finfo(dtype).tiny
            found.append((off[normal] / size[normal]).max())
        errors[name] = [f"{x:.1e}" for x in found] + [""] * (3 - len(found))
    return errors


def training(smoke, folder):
    steps, every = (20, 10) if smoke else (10_000, 100)
    names = list(PRECISIONS)[: 3 if smoke else None]
    rows, error_rows, data, curves = [], [], {}, {}
    keys = [(smoothing, name) for smoothing in ((0.1,) if smoke else (0.1, 0.0)) for name in names]
    calls = [((trained, name, smoothing, steps, every, i), {}) for i, (smoothing, name) in enumerate(keys)]
    runs = dict(zip(keys, side_by_side(calls, 2), strict=True))
    for (smoothing, name), run in runs.items():
        truth = runs[smoothing, "float64"]
        loss, heldout, accuracy = np.array(run["losses"]), *np.array(run["heldout"]).T
        loss64, heldout64, accuracy64 = np.array(truth["losses"]), *np.array(truth["heldout"]).T
        means, means64 = (a.reshape(-1, every).mean(1) for a in (loss, loss64))
        curves[smoothing, name] = means
        row = [f"{smoothing:g}", name, f"{means[-1]:.6g}", f"{heldout[-1]:.4f}", f"{accuracy[-1]:.2%}"]
        off = np.abs(loss - loss64).max(), np.abs(means - means64).max(), abs(means[-1] - means64[-1])
        off += (abs(heldout[-1] - heldout64[-1]),)
        points = f"{100 * np.abs(accuracy - accuracy64).max():.2f} points"
        rows.append(row + ([""] * 5 if name == "float64" else [*(f"{x:.1e}" for x in off), points]))
        data[f"{name}, smoothing {smoothing:g}"] = {"means": means.tolist(), "heldout": run["heldout"]}
        for dtype in ("float32", "bfloat16") if name == "float64" else ():
            errors = loss_errors(np.array(run["logits"]), np.array(run["labels"]), smoothing, dtype)
            error_rows += [[f"{smoothing:g}", dtype, peer, *errors[peer]] for peer in errors]
    plot_training(curves, every, folder)
    header = ["smoothing", "precision", "training loss", "held-out loss", "held-out accuracy"]
    header += ["a step's loss off by at most", f"mean of {every} steps by at most", "final mean by"]
    header += ["final held-out loss by", "accuracy by at most"]
    title = f"{steps:,} training steps, beside float64"
    errors_header = ["smoothing", "logits in", "loss of", "loss", "gradient of its largest element"]
    errors_header += ["each gradient element that does not underflow"]
    errors_title = "Largest relative error at the logits of the float64 run, rounded to the dtype, at 20 of its steps"
    tables = [(title, header, rows), (errors_title, errors_header, error_rows)]
    return Result(tables, {"no NaN or infinity in training": all(run["finite"] for run in runs.values())}, data)


def plot_training(curves, every, folder):
    colours = {"float64": "0.2", "float64, nudged": "0.6", "float32": "tab:blue", "bfloat16": "tab:orange"}
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle("Handwritten digits: the same training in three precisions")
    smoothings = sorted({smoothing for smoothing, _ in curves}, reverse=True)
    panels = figure.subplots(2, len(smoothings), sharex=True, height_ratios=(3, 2), squeeze=False)
    for (loss_axes, apart_axes), smoothing in zip(panels.T, smoothings, strict=True):
        reference = curves[smoothing, "float64"]
        steps = every * np.arange(1, len(reference) + 1)
        for name, colour in [(name, colour) for name, colour in colours.items() if (smoothing, name) in curves]:
            means = curves[smoothing, name]
            if name == "float64":
                loss_axes.plot(steps, means, color=colour, lw=5, alpha=0.4, label=name)
                continue
            label = f"{name}: first parameters changed by $2^{{-24}}$" if "nudged" in name else name
            apart_axes.plot(steps, np.abs(means - reference), color=colour, lw=1.2, label=label)
            if "nudged" not in name:
                loss_axes.plot(steps, means, color=colour, lw=1.4, label=name)
        title, scale = (f"label smoothing {smoothing:g}", "linear") if smoothing else ("no label smoothing", "log")
        loss_axes.set(title=title, ylabel=f"training loss, means of {every} steps (nats)", yscale=scale)
        loss_axes.set_ylim(0 if smoothing else None, None)
        apart_axes.set(xlabel="step", ylabel="difference from float64 (nats)", yscale="log")
        for axes in (loss_axes, apart_axes):
            axes.grid(alpha=0.3)
            axes.legend()
    for kind in ("png", "svg"):
        figure.savefig(folder / f"long-runs-training.{kind}", dpi=110)


# --- memory ---------------------------------------------------------------------------------------------------------


def resident():
    """Resident memory of this process in MiB."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def programs():
    """The smallest program, for comparison, and both losses with gradients; each with a maker of its inputs."""
    loss = jax.jit(jax.value_and_grad(jxent.cross_entropy))
    linear = jax.jit(jax.value_and_grad(jxent.linear_cross_entropy, (0, 1)))
    f32, i32 = np.float32, np.int32
    return {
        "x + 1": (jax.jit(lambda x: x + 1), lambda n, c: [np.ones((n, c), f32)]),
        "cross_entropy": (loss, lambda n, c: [np.ones((n, c), f32), np.zeros(n, i32)]),
        "linear_cross_entropy": (linear, lambda n, c: [np.ones((n, 32), f32), np.ones((32, c), f32), np.zeros(n, i32)]),
    }


def visit(calls, title, line, clear_every=None):
    """Makes the calls (name, positions, classes); returns memory, live arrays and programs after each."""
    functions, client = programs(), jax.devices()[0].client
    gc.collect()
    found = {"memory": [resident()], "arrays": [len(jax.live_arrays())], "programs": [len(client.live_executables())]}
    for i, (name, *sizes) in enumerate(tqdm(calls, desc=title, unit="call", position=line)):
        function, make = functions[name]
        jax.block_until_ready(function(*make(*sizes)))
        if clear_every and (i + 1) % clear_every == 0:
            jax.clear_caches()
            gc.collect()
        found["memory"].append(resident())
        found["arrays"].append(len(jax.live_arrays()))
        found["programs"].append(len(client.live_executables()))
    return found


def memory(smoke, folder):
    rng = np.random.default_rng(0)
    count, calls, distinct, clear_every = (2, 20, (4, 4, 2), 2) if smoke else (20, 1000, (150, 200, 50), 50)
    shapes = [(LOSSES[i % 2], *map(int, rng.integers((16, 100), (512, 2000)))) for i in range(count)]
    order = [*shapes, *(shapes[i] for i in rng.integers(0, count, calls))]
    visits = {name: [(name, i + 1, 5) for i in range(n)] for name, n in zip(programs(), distinct, strict=True)}
    visits[f"{count} shapes"] = order
    given = [((visit, these, name, line), {}) for line, (name, these) in enumerate(visits.items())]
    given.append(((visit, visits["cross_entropy"], "clear_caches", len(visits), clear_every), {}))
    *kept, again, cleared = side_by_side(given, 2 if smoke else 5)
    start = count + calls // 10
    flat = again["memory"][start:]
    slope = np.polyfit(np.arange(len(flat)), flat, 1)[0] * 1024
    rows = [["after the first pass", f"{again['memory'][count]:.1f} MiB", again["arrays"][count]]]
    rows += [[f"after {n} calls", f"{again['memory'][n]:.1f} MiB", again["arrays"][n]] for n in (start, len(order))]
    rows.append([f"slope after call {start}", f"{slope:+.2f} KiB per call", ""])
    rows.append(["largest increase after that", f"{max(flat) - flat[0]:+.2f} MiB", ""])
    tables = [(f"{len(order):,} calls over {count} shapes", ["", "resident memory", "live arrays"], rows)]

    header = ["program", "shapes, each once", "programs alive", "each of the first half", "each of the second"]
    rows = []
    for (name, found), number in zip(zip(programs(), kept, strict=True), distinct, strict=True):
        at = [found["memory"][n] for n in (0, number // 2, number)]
        each = [f"{(after - before) / (number / 2):.2f} MiB" for before, after in itertools.pairwise(at)]
        rows.append([f"`{name}`", number, found["programs"][-1], *each])
    tables.append(("Resident memory of each compiled program", header, rows))
    ends = range(0, distinct[1] + 1, clear_every)
    rows = [[f"round {n // clear_every}" if n else "start", *(f"{cleared[k][n]:.0f}" for k in cleared)] for n in ends]
    title = f"`jax.clear_caches()` after every {clear_every} new shapes of `cross_entropy`"
    tables.append((title, ["", "resident memory, MiB", "live arrays", "programs alive"], rows))
    back = all(found["arrays"][-1] == found["arrays"][0] for found in (again, cleared, *kept))
    checks = {"as many live arrays after the calls as before": back}
    return Result(tables, checks, {"again": again, "kept": kept, "cleared": cleared})


def cache(smoke, folder):
    """Shapes of the identity until the cache of `jax.jit` is full."""
    total, every = (60, 20) if smoke else (9000, 1000)
    function, client, rows = jax.jit(lambda x: x), jax.devices()[0].client, []
    for n in tqdm(range(1, total + 1), desc="jit's cache", unit="shape"):
        function(np.zeros(n, np.float32))
        if n % every == 0:
            rows.append([f"{n:,}", f"{len(client.live_executables()):,}", f"{resident():,.0f}"])
    jax.clear_caches()
    gc.collect()
    rows.append(["`jax.clear_caches()`", len(client.live_executables()), f"{resident():,.0f}"])
    return Result([("The identity under `jax.jit`", ["shapes", "programs alive", "resident, MiB"], rows)], {}, {})


# --- resume ---------------------------------------------------------------------------------------------------------


def train_lm(changes, out):
    """Trains the language model of examples/train_lm.py, from its last checkpoint if it has one."""
    import train_lm as example

    settings = dataclasses.replace(example.Settings(), **changes)
    _, tokens, heldout, _ = example.prepare_data(settings, pathlib.Path(out))
    batches = example.heldout_batches(settings, heldout)
    example.train(settings, tokens, batches, pathlib.Path(out), stop_at=settings.steps)


def train_until(kill_at, changes, out):
    """Runs `train_lm` in a process, and kills that when its progress bar shows step `kill_at`."""
    given = json.dumps(["train_lm", [changes, str(out)], os.devnull, None])
    command = [sys.executable, __file__, "--child", given]
    step, text = 0, b""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while chunk := os.read(process.stderr.fileno(), 4096):
            text = (text + chunk)[-4096:]
            shown = re.findall(rb"step (\d+), loss", text)
            step = int(shown[-1]) if shown else step
            if kill_at and step >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
    if not kill_at and process.returncode:
        sys.exit(text.decode())
    return step


def last_checkpoint(out):
    """The history and the parameters and optimizer state, as arrays, of the last checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((out / "checkpoints").absolute()) as manager:
        wanted = ocp.args.Composite(run=ocp.args.JsonRestore(), state=ocp.args.StandardRestore())
        found = manager.restore(manager.latest_step(), args=wanted)
    return found.run["history"], found.state


def resume(smoke, folder):
    changes = {"vocab": 512, "features": 32, "layers": 1, "files": 60, "heldout_windows": 8, "eval_every": 50}
    changes |= {"steps": 200, "save_every": 30} if smoke else {"vocab": 2048, "steps": 800, "save_every": 60}
    kills = (70,) if smoke else (100, 250, 400, 650)
    with tempfile.TemporaryDirectory() as name:
        whole, broken = pathlib.Path(name) / "whole", pathlib.Path(name) / "broken"
        whole.mkdir()
        train_until(None, changes, whole)
        shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("checkpoints"))
        rows = []
        for kill_at in tqdm(kills, desc="kill and resume", unit="kill"):
            step = train_until(kill_at, changes, broken)
            saved = max((int(path.name) for path in broken.glob("checkpoints/*") if path.name.isdigit()), default=0)
            rows.append([f"killed after step {step}", f"continued from step {saved}"])
        train_until(None, changes, broken)
        (curve, state), (broken_curve, broken_state) = last_checkpoint(whole), last_checkpoint(broken)
    leaves, broken_leaves = ([np.asarray(a) for a in jax.tree.leaves(s)] for s in (state, broken_state))
    same = [a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(leaves, broken_leaves, strict=True)]
    same_curve = curve == broken_curve  # JSON keeps every digit of a float
    rows.append([f"losses of all {changes['steps']} steps", "the same bits" if same_curve else "differ"])
    rows.append([f"{len(same)} arrays of the model and of the optimizer", f"{sum(same)} with the same bits"])
    checks = {"a resumed run has the same losses": same_curve, "and the same parameters": all(same)}
    checks["kills hit while training"] = len({row[1] for row in rows[: len(kills)]}) == len(kills)
    return Result([("Killed and resumed", ["", ""], rows)], checks, {"settings": changes, "loss": curve})


# --- determinism ----------------------------------------------------------------------------------------------------

LAYOUTS = {  # devices along the axes of positions and of classes, and who says so
    "positions, `jit`": (8, 1, AxisType.Explicit),
    "classes, `jit`": (1, 8, AxisType.Explicit),
    "both, `jit`": (4, 2, AxisType.Explicit),
    "both, `jit`, `Auto` axes": (4, 2, AxisType.Auto),
    "positions, `shard_map`": (8, 1, None),
    "classes, `shard_map`": (1, 8, None),
    "both, `shard_map`": (4, 2, None),
}


def inputs(loss, dtype, smoke):
    positions, features, classes = (256, 16, 128) if smoke else (4096, 64, 2048)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, positions, dtype=np.int32)
    labels[rng.random(positions) < 0.1] = -100
    shapes = [(positions, classes)] if loss == "cross_entropy" else [(positions, features), (features, classes)]
    scales = [3.0] if loss == "cross_entropy" else [1.0, 3.0 / features**0.5]
    arrays = [jnp.asarray(s * rng.normal(size=shape), dtype) for s, shape in zip(scales, shapes, strict=True)]
    return [*arrays, labels]


def on_mesh(loss, layout, arguments):
    """The loss as a layout calls it, and its arguments placed on the mesh."""
    along, across, axes = LAYOUTS[layout]
    data, model = "data" if along > 1 else None, "model" if across > 1 else None
    mesh = jax.make_mesh((along, across), ("data", "model"), axis_types=(axes or AxisType.Auto,) * 2)
    specs = (P(data, model), P(data)) if loss == "cross_entropy" else (P(data), P(None, model), P(data))
    function = getattr(jxent, loss)
    if axes is None:
        function = partial(function, axis_name=model, batch_axis_name=data)
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P())
    arguments = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arguments, specs, strict=True)]
    return function, arguments


def bits(smoke, repeats, path):
    """{case: digests of the repeated calls}; writes the loss and gradients of each case to `path`."""
    alone, found, values = jax.device_count() == 1, {}, {}
    grid = [(loss, dtype) for loss in LOSSES for dtype in ("float32", "bfloat16")[: 1 if smoke else 2]]
    for loss, dtype in tqdm(grid, desc=f"{jax.device_count()} devices", unit="loss and dtype"):
        function, given = getattr(jxent, loss), inputs(loss, dtype, smoke)
        sizes = (100, 1000, 4096) if loss == "linear_cross_entropy" and not smoke else ()
        cases = {"one device": (function, given)} if alone else {}
        cases |= {f"`block_size={n}`": (partial(function, block_size=n), given) for n in sizes if alone}
        cases |= {name: on_mesh(loss, name, given) for name in list(LAYOUTS)[:: 6 if smoke else 1] if not alone}
        for name, (function, arguments) in cases.items():
            run = jax.jit(jax.value_and_grad(function, tuple(range(len(given) - 1))))
            key = f"{loss}|{dtype}|{name}"
            found[key] = []
            for _ in range(repeats):
                leaves = [np.asarray(a) for a in jax.tree.leaves(run(*arguments))]
                found[key].append(hashlib.sha256(b"".join(a.tobytes() for a in leaves)).hexdigest())
            values |= {f"{key}|{i}": a.astype(np.float32) for i, a in enumerate(leaves)}
    np.savez(path, **values)
    return found


def apart(path, key, other_path, other_key):
    """How far two cases lie apart: the loss relative to itself, gradients to their largest element."""
    with np.load(path) as file, np.load(other_path) as other_file:
        names = [name for name in file if name.startswith(f"{key}|")]
        pairs = [(file[name], other_file[name.replace(key, other_key)]) for name in names]
        errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]
    return [f"{errors[0]:.1e}", f"{max(errors[1:]):.1e}"]


def determinism(smoke, folder):
    repeats, processes = (3, 2) if smoke else (5, 2)
    rows, checks, digests = [], {}, {}
    with tempfile.TemporaryDirectory() as name:
        kinds = {"one": {}, "many": {"devices": 8}} | ({} if smoke else {"core": {"cores": 1}})
        grid = [(kind, i) for kind in kinds for i in range(processes)]
        calls = [((bits, smoke, repeats, f"{name}/{kind}{i}.npz"), kinds[kind]) for kind, i in grid]
        found = side_by_side(calls, 2 if smoke else 6)
        for i, kind in enumerate(kinds):
            path, (first, *others) = f"{name}/{kind}0.npz", found[i * processes : (i + 1) * processes]
            for key in [key for key in first if kind != "core" or key.endswith("one device")]:
                loss, dtype, case = key.split("|")
                alone, shown = f"{loss}|{dtype}|one device", case if kind != "core" else "one device, one core"
                digests[f"{loss}, {dtype}, {shown}"] = first[key]
                again, elsewhere = len(set(first[key])) == 1, all(first[key] == other[key] for other in others)
                off = ["same bits"] * 2
                if first[key][0] != digests[alone.replace("|", ", ")][0]:
                    off = apart(path, key, f"{name}/one0.npz", alone)
                rows.append([f"`{loss}`", dtype, shown, *("yes" if x else "no" for x in (again, elsewhere)), *off])
                checks[f"the same bits again: {loss}, {dtype}, {shown}"] = again and elsewhere
    rows.sort(key=lambda row: (row[0], row[1] == "bfloat16"))
    header = ["loss", "dtype", "layout", f"same bits in {repeats} calls", f"in {processes} processes"]
    header += ["loss, from one device", "gradients, of the largest element"]
    return Result([("The same bits, and what differs from one device", header, rows)], checks, {"digests": digests})


# --- all of it ------------------------------------------------------------------------------------------------------

RUNS = {f.__name__: f for f in (training, memory, resume, determinism, cache)}


def show(tables):
    for title, header, rows in tables:
        print(f"\n**{title}**\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
        for row in rows:
            print(f"| {' | '.join(map(str, row))} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="run", help=f"{', '.join(RUNS)}; all but cache by default")
    parser.add_argument("--smoke", action="store_true", help="small sizes, a record in a temporary folder")
    parser.add_argument("--out", type=pathlib.Path, help="folder of what is written; benchmarks/records by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what `child` runs in its process
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.child:
        name, arguments, answer, cores = json.loads(args.child)
        if cores:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        pathlib.Path(answer).write_text(json.dumps(globals()[name](*arguments)))
        return
    if unknown := set(args.runs) - set(RUNS):
        parser.error(f"no such run: {', '.join(unknown)}")
    folder = args.out or (pathlib.Path(tempfile.mkdtemp()) if args.smoke else HERE / "records")
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.runs or [name for name in RUNS if name != "cache"]:
        start = time.perf_counter()
        result = RUNS[name](args.smoke, folder)
        show(result.tables)
        record = {}
        with contextlib.suppress(FileNotFoundError):  # read late: another process may have written in the meantime
            record = json.loads((folder / "long-runs.json").read_text())
        machine = measure.machine() | {"seconds": round(time.perf_counter() - start)}
        measure.save(record | {name: {"machine": machine} | result._asdict()}, folder, "long-runs.json")
        failed += [statement for statement, holds in result.checks.items() if not holds]
    print(f"\n{folder / 'long-runs.json'}")
    if failed:
        sys.exit("does not hold: " + "; ".join(failed))


if __name__ == "__main__":
    main()
