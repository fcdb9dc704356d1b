"""Train the language model of `train_lm.py` on a mesh of devices, with sharded parameters, batches and vocabulary.

The mesh has 4 x 2 devices, simulated on the CPU: batches are sharded over its first axis, "data", the embedding's
vocabulary over its second, "model". Only the arrays say so: the model, the loss and the update are those of one device,
imported from `train_lm.py`, and `jax.jit` makes the program for the mesh from them. The script trains on one device
first, then on the mesh, and shows that the losses agree. It also prints what the devices send one another to compute
the loss and its gradients: after the loop over blocks of positions both gradients, once, and inside it a few numbers
per position; hidden states, embedding and logits stay where they are.

    pip install jxent flax optax orbax-checkpoint tokenizers matplotlib tqdm
    python train_lm_sharded.py                  # one process with 8 simulated devices; writes to train_lm_sharded/
    python train_lm_sharded.py --processes 2    # two processes with 4 each, as on a cluster of two machines
    python train_lm_sharded.py --smoke          # seconds, to see that everything works
"""

import argparse
import collections
import contextlib
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm
from train_lm import Settings, Transformer, jxent_loss, mean_loss, prepare_data, training_batch, update_rule

MESH_SHAPE = {"data": 4, "model": 2}
DEVICES = math.prod(MESH_SHAPE.values())
FULL = Settings(vocab=2048, features=64, layers=2, batch=8, steps=40, files=200)
SMOKE = Settings(vocab=512, features=32, layers=1, batch=4, steps=10, files=60)
TIME_LIMIT = 900  # seconds, for all processes together
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
# Sums in another order leave the losses 2e-6 apart, 4 units in the last place, and 40 steps do not amplify that. One
# wrong token in one batch makes it 5e-4.
TOLERANCE = 2e-5


def spec_of(path, array):
    """How a parameter, and the optimizer's moments of it, are sharded: the embedding by vocabulary, others as FSDP."""
    if "embedding" in jax.tree_util.keystr(path):
        return PartitionSpec("model")
    if array.ndim < 2:
        return PartitionSpec()
    largest = max(range(array.ndim), key=lambda axis: array.shape[axis])
    return PartitionSpec(*("data" if axis == largest else None for axis in range(array.ndim)))


def new_state(settings):
    """The parameters and the optimizer's state, and what makes a model and an optimizer of them again."""
    model = Transformer(settings, nnx.Rngs(settings.seed))
    optimizer = nnx.Optimizer(model, update_rule(settings), wrt=nnx.Param)
    return nnx.split((model, optimizer))


def make_meshes():
    """The mesh of all devices of all processes, and one of the same axes with a single device of this process."""
    options = {"axis_names": tuple(MESH_SHAPE), "axis_types": (AxisType.Auto,) * len(MESH_SHAPE)}
    every = jax.make_mesh(tuple(MESH_SHAPE.values()), **options)
    return every, jax.make_mesh((1,) * len(MESH_SHAPE), devices=jax.local_devices()[:1], **options)


def train(mesh, settings, tokens):
    """Returns the loss of each step."""
    graph, shapes = nnx.eval_shape(partial(new_state, settings))
    shardings = jax.tree.map_with_path(lambda *leaf: NamedSharding(mesh, spec_of(*leaf)), shapes)
    over_batch, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=shardings)  # no device ever holds more than its part
    def initial():
        return new_state(settings)[1]

    @partial(jax.jit, out_shardings=(shardings, everywhere), donate_argnums=0)
    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(mean_loss)(model, batch)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    state, losses = initial(), []
    name = f"training on {mesh.size} device{'s'[: mesh.size > 1]}"
    total, hidden = settings.steps * settings.batch * settings.length, jax.process_index() > 0
    with tqdm(desc=name, total=total, unit=" tokens", unit_scale=True, disable=hidden) as progress:
        for i in range(settings.steps):
            # Every process draws the whole batch, and hands over what its own devices need.
            drawn = training_batch(settings, tokens, i)
            batch = jax.make_array_from_callback(drawn.shape, over_batch, drawn.__getitem__)
            state, loss = step(state, batch)
            losses.append(float(loss))
            progress.update(drawn.size)
            progress.set_postfix_str(f"step {i + 1}, loss {losses[-1]:.2f}")
    return np.array(losses)


def compiled_loss(mesh, settings):
    """The program of the loss and of its gradients in the hidden states and in the embedding."""

    def argument(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    positions = settings.batch, settings.length
    hidden = argument((*positions, settings.features), jnp.float32, "data")
    embedding = argument((settings.vocab, settings.features), jnp.float32, "model")
    labels = argument(positions, jnp.int32, "data")
    return jax.jit(jax.value_and_grad(jxent_loss, (0, 1))).lower(hidden, embedding, labels).compile()


def collectives(text):
    """What the devices of a compiled program send: ((inside a loop, operation, shapes, bytes), how often), ..."""
    bodies, computation, found = set(re.findall(r"body=%?([\w.-]+)", text)), "", collections.Counter()
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = header[1]
        elif sent := re.search(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", line):
            arrays = re.findall(r"([a-z]+(\d*)\[([\d,]*)\])", sent[1])  # such as ("f32[2,128]", "32", "2,128")
            lengths = [[int(n) for n in shape.split(",") if n] for _, _, shape in arrays]
            size = sum(math.prod(n) * int(bits or 8) // 8 for n, (_, bits, _) in zip(lengths, arrays, strict=True))
            found[computation in bodies, sent[2], ", ".join(name for name, _, _ in arrays), size] += 1
    return sorted(found.items())


def describe_loss(mesh, one, settings):
    """Prints the mesh, and what its devices hold and send for the loss and its gradients."""
    sharded, alone = compiled_loss(mesh, settings), compiled_loss(one, settings)
    if jax.process_index() > 0:
        return
    print(f"Mesh {dict(mesh.shape)} of devices, each as process:device")
    print(np.array([[f"{device.process_index}:{device.id}" for device in row] for row in mesh.devices]))
    shapes = {
        "hidden states": (settings.batch, settings.length, settings.features),
        "embedding": (settings.vocab, settings.features),
    }
    print("\nThe loss and its gradients. Inputs, and their parts on each device:")
    for (name, shape), sharding in zip(shapes.items(), sharded.input_shardings[0], strict=False):
        print(f"  {name:13}  {shape!s:14}  {sharding.shard_shape(shape)}")
    print("Collectives, each device's arrays:")
    print(f"  {'operation':18}  {'arrays':28}  {'bytes':>9}  where")
    for (inside, operation, arrays, size), count in collectives(sharded.as_text()):
        where = "inside the loop" if inside else "outside"
        print(f"  {operation:18}  {arrays:28}  {size:9,}  {where}{f', {count} times' if count > 1 else ''}")
    many, few = (program.memory_analysis().temp_size_in_bytes / 2**20 for program in (sharded, alone))
    print(f"Temporaries: {many:.3g} MiB on each device, {few:.3g} MiB where one does it all.\n")


def compare(alone, sharded):
    """Prints losses of both runs side by side."""
    print(f"\n{'step':>6}  {'one device':>11}  {'mesh':>11}  {'difference':>11}")
    for i in sorted({0, 1, *np.linspace(0, len(alone) - 1, 7).astype(int).tolist()}):
        print(f"{i + 1:6}  {alone[i]:11.6f}  {sharded[i]:11.6f}  {sharded[i] - alone[i]:11.1e}")
    print(f"largest difference of all {len(alone)} steps: {np.max(np.abs(sharded - alone)):.1e}")


def plot(alone, sharded, path):
    """Writes both curves, and below them their difference, to an image file."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    losses, differences = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    steps = np.arange(1, len(alone) + 1)
    losses.plot(steps, alone, color="tab:blue", lw=5, alpha=0.35, label="one device")
    losses.plot(steps, sharded, color="tab:orange", lw=1.5, label=f"mesh of {DEVICES} devices")
    losses.set(title="One program, one device or a mesh: the same loss curve", ylabel="loss (nats per token)")
    losses.legend()
    differences.plot(steps, np.abs(sharded - alone) * 1e6, "o-", ms=3, lw=0.8, color="tab:orange")
    differences.set(xlabel="step", ylabel="difference ($10^{-6}$)")
    for axes in (losses, differences):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def use_simulated_devices(args):
    """This process's share of the simulated devices, and the way to the other processes. Before any device is used.

    On GPUs or TPUs nothing of this is needed but, where there are several processes, `jax.distributed.initialize()`,
    which finds the others by itself; a cluster's own launcher starts the script on each machine.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // args.processes)
    if args.coordinator:
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Gloo prints each of its connections
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.processes, args.process, shutdown_timeout_seconds=30)


def launch(processes, out):
    """Runs this script in several processes; exits if one fails. Only the first one's output is shown."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    sys.stdout.flush()
    running, deadline = [], time.monotonic() + TIME_LIMIT
    try:
        for i in range(processes):
            command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process", str(i)]
            with contextlib.nullcontext() if i == 0 else open(out / f"process_{i}.log", "w") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log))
        codes = [None]
        while None in codes:
            codes = [process.poll() for process in running]
            failed = [f"process {i} ended with exit code {code}" for i, code in enumerate(codes) if code]
            if failed or time.monotonic() > deadline:
                reason = ", ".join(failed) or f"not done after {TIME_LIMIT} s"
                sys.exit(f"{reason}; the output of all but process 0 is in {out}/process_*.log")
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()


def run(settings, out):
    """What each process does; the first one also prints and writes."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(None):
        tokens = prepare_data(settings, out)[1]  # read: `main` has written them
    mesh, one = make_meshes()
    describe_loss(mesh, one, settings)
    alone, sharded = train(one, settings, tokens), train(mesh, settings, tokens)
    if jax.process_index() == 0:
        compare(alone, sharded)
        plot(alone, sharded, out / "curves.png")
        print(f"curves: {out / 'curves.png'}; all of it took {time.perf_counter() - start:.0f} s")
    assert np.max(np.abs(sharded - alone)) <= TOLERANCE, "the mesh trains another model than one device"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="train_lm_sharded", help="folder of all that is written")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2, 4, 8), help="that share the devices")
    parser.add_argument("--smoke", action="store_true", help="a tiny run")
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)  # this and the next are for the launcher
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings, out = (SMOKE, Path(args.out) / "smoke") if args.smoke else (FULL, Path(args.out))
    if args.coordinator is None:
        if args.smoke:
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        prepare_data(settings, out)
    if args.processes > 1 and args.coordinator is None:
        launch(args.processes, out)
    else:
        use_simulated_devices(args)
        run(settings, out)


if __name__ == "__main__":
    main()
