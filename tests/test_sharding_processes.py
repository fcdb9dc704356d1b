"""Losses of several processes: those of one process."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from sharded_calls import assert_equal

pytestmark = pytest.mark.usefixtures("x64")


# The program of each process. The first process writes the results.
PROCESS = r"""
import sys
import jax, jax.numpy as jnp, numpy as np, jxent
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

address, processes, index, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4 // processes)
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, index, initialization_timeout=60)
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 4 // processes
rng = np.random.default_rng(5)
arrays = rng.normal(size=(8, 6, 12)), rng.normal(size=(12, 32)), rng.integers(0, 32, (8, 6)).astype(np.int32)
arrays[2][0] = -100

def loss(hidden, kernel, labels):
    return jxent.linear_cross_entropy(hidden, kernel, labels, label_smoothing=0.1, block_size=16)

results = []
for mode in ("Auto", "Explicit"):
    mesh = jax.make_mesh((2, 2), ("data", "vocab"), axis_types=(AxisType[mode],) * 2)
    for kernel in (P(None, "vocab"), P("data", "vocab")):
        specs = P("data"), kernel, P("data")
        put = [
            jax.make_array_from_callback(a.shape, NamedSharding(mesh, s), lambda i, a=a: a[i])
            for a, s in zip(arrays, specs)
        ]
        # Every process gets all of the gradients, to compare them.
        f = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=NamedSharding(mesh, P()))
        value, grads = f(*put)
        results += [np.asarray(a.addressable_data(0)) for a in (value, *grads)]
if index == 0:
    np.savez(f"{folder}/{processes}.npz", *results)
if processes > 1:
    jax.distributed.shutdown()
"""


def run_processes(number, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [[sys.executable, "-c", PROCESS, address, str(number), str(i), str(folder)] for i in range(number)]
    environment = os.environ | {"XLA_FLAGS": ""}
    started = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for c in commands
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()
            process.wait()
    with np.load(folder / f"{number}.npz") as file:
        return [file[name] for name in file]


@pytest.mark.exhaustive
def test_two_processes(tmp_path):
    """They have two devices each, and talk over the loopback interface. `run_processes` has the time limit."""
    two, one = run_processes(2, tmp_path), run_processes(1, tmp_path)
    assert len(two) == 12
    assert_equal(two, one)
    for i in range(3):
        assert_equal(two[i], two[i + 3])
