"""What losses of post-training hold on an H100, from programs that XLA's GPU compiler makes without a GPU.

    pip install -e ".[bench]"
    pip install --no-deps jax-cuda13-pjrt==$JAX_VERSION 'nvidia-cuda-nvcc>=13.0,<13.1' 'nvidia-nvvm>=13.0,<13.1'
    python benchmarks/h100.py            # a minute
    python benchmarks/h100.py --smoke    # small sizes

Prints Markdown tables: arguments, gradients and temporaries, in bfloat16, of the losses that Liger's own benchmark
measures, at its sizes, beside its figures. Those are the peak that PyTorch allocated on an H100 (JSD) and on an A100
(GRPO): benchmark/data/all_benchmark_data.csv of liger-kernel 0.8.5, rows of versions 0.3.1 and 0.6.1; docs/memory.md
says what those have in them besides. Ours have run on no GPU.
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # or JAX asks the plugin for a GPU

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import jxent

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
FEATURES, VOCAB = 4096, 128256
MIB = 2**20
# positions: (Liger, PyTorch), in MiB
PUBLISHED = {
    "JSD": {1024: (4652, 10609), 2048: (5232, 17146), 4096: (6392, 30220), 8192: (8712, 56368)},
    "GRPO": {2048: (7345, 9083), 4096: (7409, 13138), 8192: (7536, 21250), 16384: (7793, 37475)},
}


def chips(topology):
    """Devices of that topology, such as "1x1x8"."""
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H100, topology=topology
    ).devices


def jsd(teacher, kernel_p, student, kernel_q, labels):
    del labels
    return jxent.linear_js_divergence(teacher, kernel_p, student, kernel_q, vocab_axis=0)


def jsd_of_logits(teacher, kernel_p, student, kernel_q, labels):
    del labels
    log_p, log_q = log_softmax_of(teacher, kernel_p), log_softmax_of(student, kernel_q)
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m), axis=-1)) / 2


def log_softmax_of(hidden, kernel):
    return jax.nn.log_softmax((hidden @ kernel.T).astype(jnp.float32))


def log_probs(hidden, kernel, labels):
    _, stats = jxent.linear_cross_entropy(hidden, kernel, labels, vocab_axis=0, reduction="none", return_stats=True)
    return stats.log_prob


def log_probs_of_logits(hidden, kernel, labels):
    return jnp.take_along_axis(log_softmax_of(hidden, kernel), labels[..., None], axis=-1)[..., 0]


def grpo(log_probs, reference, kernel_r, policy, kernel, labels):
    """With the ratio of the first update, and the divergence from a reference model, both as Liger's."""
    log_prob = log_probs(policy, kernel, labels)
    behind = jax.lax.stop_gradient(log_probs(reference, kernel_r, labels)) - log_prob
    ratio = jnp.exp(log_prob - jax.lax.stop_gradient(log_prob))
    advantages = jnp.linspace(-1, 1, len(labels), dtype=jnp.float32)
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
    return jnp.mean(0.1 * (jnp.expm1(behind) - behind) - gain)


LOSSES = {
    "JSD": (jsd, jsd_of_logits),
    "GRPO": (partial(grpo, log_probs), partial(grpo, log_probs_of_logits)),
}


def held(loss, positions, features, vocab):
    """MiB of arguments, results and temporaries of the value and the gradients of the model that is trained."""
    device = chips("1x1x1")[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    hidden, kernel, labels = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (
            ((positions, features), jnp.bfloat16),
            ((vocab, features), jnp.bfloat16),
            ((positions,), jnp.int32),
        )
    )
    with jax.default_device(device):
        traced = jax.jit(jax.value_and_grad(loss, (2, 3))).trace(hidden, kernel, hidden, kernel, labels)
        memory = traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis()
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes) / MIB


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")
    smoke = parser.parse_args().smoke
    features, vocab = (64, 5003) if smoke else (FEATURES, VOCAB)
    print(f"JAX {jax.__version__}, compiled for an H100: {features} features, {vocab} classes, bfloat16; MiB in all\n")
    print("| loss | positions | jxent | Liger | `jax.nn`, full logits | PyTorch, full logits |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, published in PUBLISHED.items():
        for positions, (liger, torch) in published.items():
            ours, full = (held(loss, positions, features, vocab) for loss in LOSSES[name])
            liger, torch = ("", "") if smoke else (f"{liger:,}", f"{torch:,}")  # theirs are of the full size
            print(f"| {name} | {positions} | {ours:,.0f} | {liger} | {full:,.0f} | {torch} |", flush=True)


if __name__ == "__main__":
    main()
