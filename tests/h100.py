"""H100s that need not be there: XLA's GPU compiler runs on any machine, for the tests and benchmarks/compiled.py.

pip install --no-deps jax-cuda13-pjrt==$JAX_VERSION 'nvidia-cuda-nvcc>=13.0,<13.1' 'nvidia-nvvm>=13.0,<13.1'
"""

import functools

from jax.experimental import topologies

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
# Nothing is tuned where there is no GPU, so that the sizes of tiles in XLA's own matmuls mean nothing. Calls of cuBLAS
# have no such sizes, and what they add their result to can be read from them. All other kernels are the same.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


@functools.cache
def h100s(number):
    options = {"platform": "cuda", "topology_name": "", "target_config": H100, "topology": f"1x1x{number}"}
    return topologies.get_topology_desc(**options).devices
