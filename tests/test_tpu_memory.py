"""What one TPU chip holds for the loss of a language model, besides arguments and results, without a TPU.

Needs `libtpu`, as test_tpu_compiler.py does.
"""

import os

import pytest

pytest.importorskip("libtpu", reason="the TPU compiler comes with pip install 'jax[tpu]'")
os.environ |= {  # for libtpu not to look for chips
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import jxent

POSITIONS, FEATURES, VOCAB = 8192, 2048, 151936
FULL = 4 * POSITIONS * VOCAB  # bytes of the logits in float32


# In both cases the largest part of what is allowed is one array: the float32 sum of the kernel's gradient (a quarter of
# `FULL`, as the features are of the positions), or the logits of a block.
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(("wrt", "most"), [((0, 1), 0.26), ((0,), 0.07)], ids=["both", "frozen kernel"])
def test_default_block(topology, wrt, most):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    chip = jax.sharding.SingleDeviceSharding(devices[0])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    traced = jax.jit(jax.value_and_grad(jxent.linear_cross_entropy, wrt)).trace(
        array(POSITIONS, FEATURES), array(FEATURES, VOCAB), array(POSITIONS, dtype=jnp.int32)
    )
    program = traced.lower(lowering_platforms=("tpu",)).compile()
    assert program.memory_analysis().temp_size_in_bytes <= most * FULL
