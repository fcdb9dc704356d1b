"""A sum of matmuls in float32, rounded once at its end, and the memory that XLA:TPU needs for it.

pip install "jax[tpu]"              # no TPU is needed
python benchmarks/tpu_peak.py       # docs/project/xla-tpu-peak.md; MiB
"""

import os
from functools import partial

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies

chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]


def sum_of_products(hidden, kernel, result):
    def add_block(i, total):
        block = lax.dynamic_slice_in_dim(hidden, i * 1024, 1024)
        logits = lax.dot(block, kernel, preferred_element_type=jnp.float32)
        logits = lax.optimization_barrier(jnp.exp(logits - logits.max(1, keepdims=True)).astype(jnp.bfloat16))
        return total + lax.dot(block.T, logits, preferred_element_type=jnp.float32)

    return lax.fori_loop(0, 8, add_block, jnp.zeros(kernel.shape, jnp.float32)).astype(result)


one = jax.sharding.SingleDeviceSharding(chip)
arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one) for shape in ((8192, 2048), (2048, 151936))]
for result in (jnp.bfloat16, jnp.float32):
    lowered = jax.jit(partial(sum_of_products, result=result)).trace(*arrays).lower(lowering_platforms=("tpu",))
    held = lowered.compile().memory_analysis()
    sizes = {name: getattr(held, f"{name}_in_bytes") // 2**20 for name in ("temp_size", "peak_memory")}
    print("JAX", jax.__version__, "result", result.__name__, sizes)
