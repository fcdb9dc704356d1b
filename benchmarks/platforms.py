"""Devices that need not be there, and programs that their compilers make, for the tables of compiled.py.

The compilers of the TPU and of the GPU run on any machine: `pip install "jax[tpu]"`, and tests/h100.py for the GPU's.
"""

import contextlib
import functools
import os
from unittest import mock

import jax
import jax.numpy as jnp
from h100 import h100s
from jax.experimental import topologies

import jxent

jax.config.update("jax_platforms", "cpu")  # or JAX asks the plugins for devices

PLATFORMS = ("cpu", "h100", "tpu")
LOWERED_FOR = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # by a device's own name of its platform


@functools.cache
def tpus(topology):
    """The chips of a topology such as "v5e:2x4"."""
    # libtpu must not look for chips, and other processes may use chips or compile at the same time.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def one_device(platform):
    return {"cpu": jax.devices, "h100": lambda: h100s(1), "tpu": lambda: tpus("v5e:2x4")}[platform]()[0]


def eight_devices(platform):
    """Simulated CPU devices, H100s of one host, or a TPU v5e 2x4."""
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", 8)
    return {"cpu": jax.devices, "h100": lambda: h100s(8), "tpu": lambda: tpus("v5e:2x4")}[platform]()


@contextlib.contextmanager
def on(device):
    """Libraries that ask where they run get this device, also as the default backend, which Pallas asks for."""
    with jax.default_device(device), mock.patch.object(jax, "default_backend", return_value=device.platform):
        yield


def compiled(f, arrays, device, context=None, **options):
    """The program of a function of abstract arrays, traced in the context; options are those of `jax.jit`."""
    one = jax.sharding.SingleDeviceSharding(device)
    arrays = jax.tree.map(lambda a: a if a.sharding else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), arrays)
    with on(device):
        with context or contextlib.nullcontext():
            traced = jax.jit(f, **options).trace(*arrays)
        return traced.lower(lowering_platforms=(LOWERED_FOR[device.platform],)).compile()


def temporaries(program):
    """Bytes; for a TPU those at the peak, besides arguments and results.

    For a TPU JAX 0.12 counts some arrays twice in `temp_size_in_bytes`. For a CPU the peak is not known.
    """
    held, (device, *_) = program.memory_analysis(), jax.tree.leaves(program.input_shardings)[0].device_set
    if device.platform != "tpu":
        return held.temp_size_in_bytes
    results = held.output_size_in_bytes - held.alias_size_in_bytes  # donated arguments are the room of results
    return held.peak_memory_in_bytes - held.argument_size_in_bytes - results


# --- what is compiled most --------------------------------------------------------------------------------------------

ONE_LOOP = {"ignore_index": None}  # no label is ignored, so that a program has one loop of known length


def arguments(positions, features, vocab, dtype):
    """Hidden states, kernel and labels, without their values."""
    shapes = ((positions, features), dtype), ((features, vocab), dtype), ((positions,), jnp.int32)
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def linear(**options):
    def loss(hidden, kernel, labels):
        return jnp.sum(jxent.linear_cross_entropy(hidden, kernel, labels, **options))

    return loss
