"""Devices that need not be there, and programs that their compilers make, for the tables of compiled.py.

The compilers of the TPU and of the GPU run on any machine:

    pip install "jax[tpu]"
    pip install --no-deps jax-cuda13-pjrt==$JAX_VERSION 'nvidia-cuda-nvcc>=13.0,<13.1' 'nvidia-nvvm>=13.0,<13.1'
"""

import contextlib
import functools
import os
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import jxent

jax.config.update("jax_platforms", "cpu")  # or JAX asks the plugins for devices

PLATFORMS = ("cpu", "h100", "tpu")
LOWERED_FOR = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # by a device's own name of its platform

# What the compiler has to know of an H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_address_bits: 64 name: "NVIDIA H100 80GB HBM3" runtime_version: "13.0.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def tpus(topology):
    """The chips of a topology such as "v5e:2x4"."""
    # libtpu must not look for chips, and other processes may use chips or compile at the same time.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@functools.cache
def h100s(number):
    options = {"platform": "cuda", "topology_name": "", "target_config": H100, "topology": f"1x1x{number}"}
    return topologies.get_topology_desc(**options).devices


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
    return program.memory_analysis().temp_size_in_bytes


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
